"""Pooling with a window that slides: the maximum or the mean of what it sees. (Of given outputs:
see ``adaptive``.)

Notation: N batch, C channels, S/OUT the spatial axes in/out (H, W/OH, OW). Each tap of the window
is one slice of the input (see ``windows``), and pooling folds the taps together one after the
other: no columns are built. A padded cell is never anyone's maximum.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

from portacnn.arguments import listed
from portacnn.errors import ArgumentError, PortacnnError
from portacnn.ops.dispatch import Cache, op
from portacnn.ops.faces import check_input, faces
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import Padding, Windows, per_axis
from portacnn.runtime import Array, backend_of


@op()
def max_pool(x: Array, windows: Windows, *, keep: bool) -> tuple[Array, tuple | None]:
    """x (N, C, *S) -> y (N, C, *OUT): the largest input under each window; NaN if there is one."""
    xp = backend_of(x).xp
    xt = _packed(x, windows)
    shape = (xt.shape[0], *windows.out, xt.shape[-1])
    y = xp.full(shape, -float("inf"), dtype=x.dtype, device=x.device)
    # whose input y is
    winner = xp.zeros(shape, dtype=_counter(xp, windows), device=x.device) if keep else None
    # From the last tap to the first, and what is not less wins: so of equals the first one has it
    # in the end, and where all inputs are -inf it is still an input, not the padding beside it. Of
    # several NaN the last one has it, as in PyTorch.
    for tap in reversed(windows.taps):
        here, seen = xt[tap.reads], tap.reaches
        if winner is not None:
            loses = (here < y[seen]) | (y[seen] != y[seen])
            winner[seen] = xp.where(loses, winner[seen], tap.index)
        y[seen] = xp.maximum(y[seen], here)
    return batch_first(y), (xt.shape, winner, windows) if keep else None


@max_pool.backward
def max_pool_backward(dy: Array, saved: tuple) -> Array:
    """The gradient of max pooling: dy (N, C, *OUT) -> dx (N, C, *S).

    Of equal maxima the first, in reading order, takes it all; of several NaN the last: both as in
    PyTorch.
    """
    shape, winner, windows = saved
    xp = backend_of(dy).xp
    dy = batch_last(dy)
    dx = xp.zeros(shape, dtype=dy.dtype, device=dy.device)
    for tap in windows.taps:
        dx[tap.reads] += xp.where(winner[tap.reaches] == tap.index, dy[tap.reaches], 0.0)
    return batch_first(dx)


def _packed(x: Array, windows: Windows) -> Array:
    """(N, C, *S) as (C, *S, N), contiguous unless little of it is read."""
    xt = batch_last(x)
    return xt if windows.sparse else backend_of(x).contiguous(xt)


def _counter(xp: Any, windows: Windows) -> Any:
    """The smallest integer type that can number the taps: it is written and read once a tap."""
    return xp.int8 if prod(windows.kernel) <= 128 else xp.int32


@op()
def avg_pool(
    x: Array, windows: Windows, count_include_pad: bool, divisor: int | None, *, keep: bool
) -> tuple[Array, tuple | None]:
    """x (N, C, *S) -> y (N, C, *OUT): the mean under each window, zeros of the padding counted or
    not; or sum / divisor."""
    xp = backend_of(x).xp
    xt = _packed(x, windows)
    y = xp.zeros((xt.shape[0], *windows.out, xt.shape[-1]), dtype=x.dtype, device=x.device)
    for tap in windows.taps:
        y[tap.reaches] += xt[tap.reads]
    y *= _weights(x, windows, count_include_pad, divisor)
    return batch_first(y), (xt.shape, windows, count_include_pad, divisor) if keep else None


@avg_pool.backward
def avg_pool_backward(dy: Array, saved: tuple) -> Array:
    """The gradient of average pooling: dy (N, C, *OUT) -> dx (N, C, *S).

    Each output's, divided as the mean was, goes to all inputs of its window.
    """
    shape, windows, count_include_pad, divisor = saved
    xp = backend_of(dy).xp
    share = batch_last(dy) * _weights(dy, windows, count_include_pad, divisor)
    dx = xp.zeros(shape, dtype=dy.dtype, device=dy.device)
    for tap in windows.taps:
        dx[tap.reads] += share[tap.reaches]
    return batch_first(dx)


def _weights(
    like: Array, windows: Windows, count_include_pad: bool, divisor: int | None
) -> Array | float:
    """One over the number of cells in each window, or over the divisor: a number where all are
    alike, else (*OUT, 1).

    A window that hangs over the end in ceil mode counts the padding it covers, but nothing beyond
    the padding.
    """
    if divisor is not None:
        return 1.0 / divisor
    inside = windows.covers
    padded = tuple(
        n + before + after for n, (before, after) in zip(windows.size, windows.pads, strict=True)
    )
    if inside or (
        count_include_pad and all(r <= p for r, p in zip(windows.extent, padded, strict=True))
    ):
        return 1.0 / prod(windows.kernel)
    xp = backend_of(like).xp
    weights = xp.ones((1,), dtype=like.dtype, device=like.device)
    for n, k, s, d, (before, after), out in zip(
        windows.size,
        windows.kernel,
        windows.stride,
        windows.dilation,
        windows.pads,
        windows.out,
        strict=True,
    ):
        low, high = (-before, n + after) if count_include_pad else (0, n)
        # Integers: floats of 24 bits, or of 8, would not tell the cells of a long axis apart.
        start = xp.arange(out, dtype=xp.int64, device=like.device) * s - before
        # Of the cells start, start + d, ..., start + (k - 1)*d those from the first inside up to
        # the last inside.
        first = (xp.clip(start, min=low) - start + (d - 1)) // d
        last = (xp.clip(start + (k - 1) * d, max=high - 1) - start) // d
        cells = xp.astype(last - first + 1, like.dtype)
        weights = weights[..., None] / cells  # one axis more, for each spatial axis: (1, OH, OW)
    return xp.reshape(weights, (*windows.out, 1))


# --- the public faces -----------------------------------------------------------------------------


def pool_windows(
    size: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: Padding,
    dilation: int | Sequence[int],
    ceil_mode: bool,
) -> Windows:
    """The geometry for an input of this spatial size; ``stride=None`` means the kernel's.
    ShapeError or ArgumentError.

    Every window has to see an input. PyTorch sees to it by keeping the padding to half of the
    kernel, and so does this for a padding in numbers, as PyTorch writes it; one given side by side
    (as in ONNX) may be wider.
    """
    windows = Windows.of(
        size, kernel_size, kernel_size if stride is None else stride, padding, dilation, ceil_mode
    )
    padding = listed(padding)
    by_side = isinstance(padding, Sequence) and all(isinstance(p, Sequence) for p in padding)
    for pads, k, d in zip(windows.pads, windows.kernel, windows.dilation, strict=True):
        extent = d * (k - 1) + 1
        if (windows.blind or not by_side) and max(pads) > extent // 2:
            raise ArgumentError(
                f"padding {pads} is more than half of the kernel {extent}: some windows would see "
                "nothing but padding"
            )
    if windows.blind:
        raise ArgumentError(
            f"padding {windows.pads} leaves windows of the kernel {windows.kernel} "
            "nothing else to see"
        )
    return windows


def _checked(name: str, axes: int, x: Array, *geometry: Any) -> Windows:
    """Check the input of the op called ``name``, and give the geometry."""
    check_input(name, axes, x)
    try:
        return pool_windows(x.shape[2:], *geometry)
    except PortacnnError as error:
        raise error.at(name)


def _max_pool(
    axes: int,
    x: Array,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] | None = None,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    keep: bool = True,
) -> tuple[Array, Cache | None]:
    """The maximum over each window, as torch.nn.functional.max_pool1d, max_pool2d and max_pool3d.

    Windows that would hang over the end are left out (28 by 5 with stride 5: 5 outputs, three cells
    unseen), or with ``ceil_mode`` are kept and see what there is.

    Args:
        x: (N, C, *S), floating point; S is W, (H, W) or (D, H, W).
        kernel_size, stride, dilation: a number, or one for each spatial axis; the stride is the
            kernel's where not given.
        padding: cells around the input that are never a maximum, as for ``conv2d``. As numbers, at
            most half of the kernel; as pairs (before, after), as long as every window sees an
            input.
        ceil_mode: keep windows that hang over the end, if they start before it.
        keep: keep what the backward needs.

    Returns:
        y (N, C, *OUT), with OUT = (S + before + after - dilation*(K-1) - 1) / stride + 1 rounded
        down, with ``ceil_mode`` up; and the cache.

    Raises:
        ShapeError, ArgumentError, ArrayError: as for ``conv2d``.
    """
    windows = _checked(
        f"max_pool{axes}d", axes, x, kernel_size, stride, padding, dilation, ceil_mode
    )
    return max_pool(x, windows, keep=keep)


def _avg_pool(
    axes: int,
    x: Array,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] | None = None,
    padding: Padding = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    dilation: int | Sequence[int] = 1,
    keep: bool = True,
) -> tuple[Array, Cache | None]:
    """The mean over each window, as torch.nn.functional.avg_pool1d, avg_pool2d and avg_pool3d, and
    as ONNX's with dilation.

    Args:
        x: (N, C, *S), floating point; S is W, (H, W) or (D, H, W).
        kernel_size, stride: a number, or one for each spatial axis; the stride is the kernel's
            where not given.
        padding: zeros around the input, as for ``max_pool2d``.
        ceil_mode: keep windows that hang over the end, if they start before it.
        count_include_pad: divide by the whole window, padding too, or only by the cells inside the
            input. What lies beyond the padding is never counted.
        divisor_override: divide by this instead.
        dilation: the distance between a window's cells, a number or one for each spatial axis;
            PyTorch has none.
        keep: keep what the backward needs.

    Returns:
        y (N, C, *OUT), OUT as for ``max_pool2d``, and the cache.

    Raises:
        ShapeError, ArgumentError, ArrayError: as for ``conv2d``.
    """
    name = f"avg_pool{axes}d"
    windows = _checked(name, axes, x, kernel_size, stride, padding, dilation, ceil_mode)
    return avg_pool(
        x, windows, bool(count_include_pad), checked_divisor(divisor_override, name), keep=keep
    )


def checked_divisor(divisor: int | None, where: str) -> int | None:
    """``divisor_override``, a whole number of at least 1, or None. Raises ArgumentError."""
    if divisor is None:
        return None
    try:
        return per_axis("divisor_override", divisor, 1, 1)[0]
    except PortacnnError as error:
        raise error.at(where)


max_pool1d, max_pool2d, max_pool3d = faces("max_pool", _max_pool)
max_pool1d_backward = max_pool2d_backward = max_pool3d_backward = max_pool_backward
avg_pool1d, avg_pool2d, avg_pool3d = faces("avg_pool", _avg_pool)
avg_pool1d_backward = avg_pool2d_backward = avg_pool3d_backward = avg_pool_backward
