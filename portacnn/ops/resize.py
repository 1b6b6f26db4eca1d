"""Interpolation: images of another size, from their nearest cells or from the two nearest on each
axis.

Notation: N batch, C channels, S/OUT the spatial axes in/out; on one axis n cells in, m out. Output
o reads around the source coordinate ``start + o * step``, which ``coordinates`` names (the words
are ONNX's):

    asymmetric           o * n/m
    half_pixel           (o + 1/2) * n/m - 1/2   the outer cells keep their distance to the edge
    align_corners        o * (n-1)/(m-1)         the centres of the outer cells stay in place
    pytorch_half_pixel   half_pixel, but 0 for a single output
    half_pixel_symmetric half_pixel, but centred when n/m is a scale that m was rounded for
    tf_half_pixel_for_nn (o + 1/2) * n/m, or o if n is m

where a ``scale_factor`` stands for n/m as 1/scale_factor. Nearest interpolation reads the cell that
the coordinate is rounded to. Linear interpolation weights the two cells beside it by their
distance. Beyond the edge both read the edge cell. PyTorch's "nearest" is asymmetric and
rounded down, its "nearest-exact" half_pixel and rounded with "round_prefer_ceil".

The axes are interpolated one after the other. With n/m = q/p in lowest terms, outputs o, o + p,
o + 2p, ... read cells that lie q apart with the same weights. So each such *run* is a product of
slices: a doubling takes two runs (and the edges), and neither forward nor backward needs indices.
The backward adds every run's gradient to the slices that it read.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from math import ceil, floor
from typing import Any, NamedTuple

from portacnn.arguments import LARGEST, as_float, listed, one_of, told
from portacnn.errors import ArgumentError, PortacnnError, ShapeError
from portacnn.ops.dispatch import Cache, op
from portacnn.ops.faces import check_input
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import AXES, per_axis
from portacnn.runtime import Array, backend_of, describe

LINEAR = {"linear": 1, "bilinear": 2, "trilinear": 3}
"""The words for linear interpolation, and the number of spatial axes that each is for."""
MODES = ("nearest", *LINEAR)


class Run(NamedTuple):
    """Outputs at equal distances, and what they read: slices of the input and their weights."""

    outputs: slice
    taps: tuple[tuple[slice, float], ...]


class Axis(NamedTuple):
    """How one axis is interpolated: output o of ``out`` reads at start + o * step of ``size`` cells
    (see above)."""

    size: int
    out: int
    start: Fraction
    step: Fraction
    rounding: str | None  # None: linear interpolation


_ZERO, _HALF = Fraction(0), Fraction(1, 2)
ROUNDING: dict[str, Callable[[Fraction], int]] = {
    "floor": floor,
    "ceil": ceil,
    "round_prefer_floor": lambda at: ceil(at - _HALF),
    "round_prefer_ceil": lambda at: floor(at + _HALF),
}
"""The ways in which nearest interpolation rounds a coordinate."""

COORDINATES: dict[str, Callable[[int, int, Fraction], tuple[Fraction, Fraction]]] = {
    "asymmetric": lambda n, m, step: (_ZERO, step),
    "half_pixel": lambda n, m, step: ((step - 1) / 2, step),
    "align_corners": lambda n, m, step: (_ZERO, Fraction(n - 1, max(m - 1, 1))),
    "pytorch_half_pixel": lambda n, m, step: ((step - 1) / 2 if m > 1 else _ZERO, step),
    "half_pixel_symmetric": lambda n, m, step: ((n - m * step + step - 1) / 2, step),
    "tf_half_pixel_for_nn": lambda n, m, step: (_ZERO if step == 1 else step / 2, step),
}
"""By name, a function of n, m and n/m (or 1/scale_factor) that returns an axis's start and step."""


@lru_cache(maxsize=1024)
def runs_of(axis: Axis) -> list[Run]:
    """The runs of one axis, which together write each output once."""
    size, out, start, step, rounding = axis
    if size == 1:
        return [Run(slice(0, out), ((slice(0, 1), 1.0),))]
    runs: list[Run] = []
    for phase in range(min(step.denominator, out)):
        open_: list[dict[int, float]] = []  # what the outputs of the run so far read
        for o in range(phase, out, step.denominator):
            at = start + o * step
            at = at if rounding is None else Fraction(ROUNDING[rounding](at))
            at = min(max(at, _ZERO), Fraction(size - 1))
            low, part = floor(at), at - floor(at)
            taps = {low: float(1 - part), low + 1: float(part)} if part else {low: 1.0}
            by = step.numerator
            if open_ and taps != {cell + by: weight for cell, weight in open_[-1].items()}:
                runs.append(_run(o, open_, step))
                open_ = []
            open_.append(taps)
        runs.append(_run(o + step.denominator, open_, step))
    return runs


def _run(end: int, taps: Sequence[dict[int, float]], step: Fraction) -> Run:
    """The run of the outputs before ``end``, which read ``taps``."""

    def stepped(at: int, by: int) -> slice:
        return slice(at, at + by * (len(taps) - 1) + 1, by)

    outputs = stepped(end - step.denominator * len(taps), step.denominator)
    cells = tuple((stepped(cell, step.numerator or 1), weight) for cell, weight in taps[0].items())
    return Run(outputs, cells)


@op()
def resize(x: Array, axes: tuple[Axis, ...], *, keep: bool) -> tuple[Array, tuple | None]:
    """x (N, C, *S) -> y (N, C, *OUT). The op behind ``interpolate``."""
    xp = backend_of(x).xp
    y, first = _inner(x)
    for number, axis in enumerate(axes, first):
        given = y
        y = xp.empty(_but(given, number, axis.out), dtype=x.dtype, device=x.device)
        for outputs, ((cells, weight), *others) in runs_of(axis):
            part = given[_along(number, cells)]
            part = part if weight == 1.0 else part * weight
            for cells, weight in others:
                part = part + given[_along(number, cells)] * weight
            y[_along(number, outputs)] = part
    return _outer(y, first), axes if keep else None


@resize.backward
def interpolate_backward(dy: Array, saved: tuple) -> Array:
    """Return the gradient of ``interpolate``: dy (N, C, *OUT) -> dx (N, C, *S)."""
    xp = backend_of(dy).xp
    dx, first = _inner(dy)
    for number, axis in reversed(list(enumerate(saved, first))):
        given = dx
        dx = xp.zeros(_but(given, number, axis.size), dtype=dy.dtype, device=dy.device)
        for outputs, taps in runs_of(axis):
            part = given[_along(number, outputs)]
            if axis.size == 1:  # one cell that all outputs read
                part = xp.sum(part, axis=number, keepdims=True)
            for cells, weight in taps:
                dx[_along(number, cells)] += part if weight == 1.0 else part * weight
    return _outer(dx, first)


def _inner(x: Array) -> tuple[Array, int]:
    """x as its backend prefers it in memory, and which of its axes is the first spatial one."""
    return (x, 2) if backend_of(x).layout == "batch_first" else (batch_last(x), 1)


def _outer(y: Array, first: int) -> Array:
    return y if first == 2 else batch_first(y)


def _but(x: Array, axis: int, count: int) -> tuple[int, ...]:
    """x's shape, but for one axis."""
    return (*x.shape[:axis], count, *x.shape[axis + 1 :])


def _along(axis: int, cells: slice) -> Any:
    return (slice(None),) * axis + (cells, ...)


# --- the public face ------------------------------------------------------------------------------


def check_interpolation(
    size: int | Sequence[int] | None,
    scale_factor: float | Sequence[float] | None,
    mode: str,
    align_corners: bool,
    coordinates: str | None,
    rounding: str | None,
) -> None:
    """Raise ArgumentError for what is wrong whatever the input's size."""
    one_of("mode", mode, *MODES)
    if coordinates is not None:
        one_of("coordinates", coordinates, *COORDINATES)
        if align_corners:
            raise ArgumentError(f"pass either align_corners or coordinates={coordinates!r}")
    if rounding is not None:
        one_of("rounding", rounding, *ROUNDING)
        if mode != "nearest":
            raise ArgumentError(f'rounding is for mode="nearest", got it with mode="{mode}"')
    if (size is None) == (scale_factor is None):
        raise ArgumentError(
            f"pass either size or scale_factor, got size={size!r} and scale_factor={scale_factor!r}"
        )
    if align_corners and mode == "nearest":
        raise ArgumentError('align_corners is for the linear modes, got it with mode="nearest"')


def convention(mode: str, align_corners: bool, coordinates: str | None) -> str:
    """The name of the coordinates; PyTorch's if none are given."""
    default = "asymmetric" if mode == "nearest" else "half_pixel"
    return coordinates or ("align_corners" if align_corners else default)


def axes_of(
    shape: Sequence[int],
    size: int | Sequence[int] | None,
    scale_factor: float | Sequence[float] | None,
    mode: str,
    align_corners: bool = False,
    coordinates: str | None = None,
    rounding: str | None = None,
) -> tuple[Axis, ...]:
    """How each spatial axis of an input of this spatial ``shape`` is interpolated. Raises
    ArgumentError, ShapeError."""
    where = COORDINATES[convention(mode, align_corners, coordinates)]
    how = (rounding or "floor") if mode == "nearest" else None
    axes = []
    for n, m, ratio in sizes_of(shape, size, scale_factor, mode):
        start, step = where(n, m, Fraction(n, m) if ratio is None else ratio)
        if n == m and how is None and coordinates is None:  # as in PyTorch
            start, step = _ZERO, Fraction(1)
        axes.append(Axis(n, m, start, step, how))
    return tuple(axes)


def sizes_of(
    shape: Sequence[int],
    size: int | Sequence[int] | None,
    scale_factor: float | Sequence[float] | None,
    mode: str,
) -> tuple[tuple[int, int, Fraction | None], ...]:
    """For each spatial axis: its cells in and out, and 1/scale_factor if that is given. Raises
    ArgumentError, ShapeError."""
    count = len(shape)
    if LINEAR.get(mode, count) != count:
        raise ShapeError(
            f'mode "{mode}" is for inputs (N, C, {AXES[LINEAR[mode]]}), this one has {count} '
            "spatial axes; " + ", ".join(f'"{word}" is for {n}' for word, n in LINEAR.items())
        )
    if 0 in shape:
        raise ShapeError(f"expected at least one cell on every axis, got {tuple(shape)}")
    if size is not None:
        return tuple(
            (n, m, None) for n, m in zip(shape, per_axis("size", size, count, 1), strict=True)
        )
    factors = listed(scale_factor)
    factors = list(factors) if isinstance(factors, Sequence) else [factors] * count
    numbers = [as_float(factor) for factor in factors]
    if len(numbers) != count or not all(0.0 < number < float("inf") for number in numbers):
        raise ArgumentError(
            f"scale_factor must be a number above 0 or {count} of them ({AXES[count]}), "
            f"got {told(scale_factor)}"
        )
    # Read as the decimals that were written: 1.1 is 11/10, and its runs are ten.
    ratios = [1 / Fraction(repr(number)) for number in numbers]
    outs = tuple(floor(n * number) for n, number in zip(shape, numbers, strict=True))
    if not all(1 <= out <= LARGEST for out in outs):
        raise ShapeError(
            f"scale_factor {scale_factor!r} makes {outs} cells of {tuple(shape)}; expected "
            f"at least 1 on every axis and at most {LARGEST}"
        )
    return tuple(zip(shape, outs, ratios, strict=True))


def interpolate(
    x: Array,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool = False,
    *,
    coordinates: str | None = None,
    rounding: str | None = None,
    keep: bool = True,
) -> tuple[Array, Cache | None]:
    """Resize images, as torch.nn.functional.interpolate does without ``antialias``.

        >>> import numpy as np
        >>> from portacnn import ops
        >>> y, cache = ops.interpolate(np.array([[[1.0, 2.0]]]), scale_factor=2)
        >>> y.tolist()
        [[[1.0, 1.0, 2.0, 2.0]]]
        >>> ops.interpolate_backward(y, cache).tolist()
        [[[2.0, 4.0]]]

        y, cache = interpolate(x, scale_factor=2, mode="bilinear")  # (N, C, H, W) -> (N, C, 2H, 2W)

    Coordinates are exact fractions. PyTorch computes them in float32, so for some sizes its
    "nearest" reads the neighbouring cell.

    Args:
        x: (N, C, *S), floating point; S is W, (H, W) or (D, H, W).
        size: of the output, a number or one for each spatial axis; or
        scale_factor: floor(S * scale_factor) is the output's size; a number or one for each axis.
        mode: "nearest", or as the number of spatial axes is "linear", "bilinear" or "trilinear".
        align_corners: for the linear modes: the centres of the corner cells stay in place.
        coordinates: a key of ``COORDINATES``, for ONNX's other conventions; default: "asymmetric"
            for mode "nearest", else "half_pixel".
        rounding: for mode "nearest", a key of ``ROUNDING``; default: "floor".
        keep: keep what ``interpolate_backward`` needs.

    Returns:
        y (N, C, *OUT) and the cache.

    Raises:
        ArgumentError: an unknown mode; both or neither of size and scale_factor; numbers without a
            meaning; align_corners with "nearest".
        ShapeError: a mode for another number of axes; no cell left; an axis without cells.
        ArrayError: integers.
    """
    name = "interpolate"
    check_input(name, None, x)
    if x.ndim - 2 not in AXES:
        raise ShapeError(f"expected one to three spatial axes, got {describe(x)}", name)
    try:
        check_interpolation(size, scale_factor, mode, align_corners, coordinates, rounding)
        axes = axes_of(
            tuple(x.shape[2:]), size, scale_factor, mode, align_corners, coordinates, rounding
        )
    except PortacnnError as error:
        raise error.at(name)
    return resize(x, axes, keep=keep)
