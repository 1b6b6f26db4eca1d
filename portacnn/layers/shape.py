"""Layers that move or select elements, and sums and means over axes.

Notation: N batch, S one sample's axes. The batch is axis 0, before and after.
"""

from collections.abc import Sequence
from functools import lru_cache, partial
from math import inf, prod
from typing import Any

from portacnn import ops
from portacnn.arguments import one_of, real, wholes
from portacnn.errors import ArgumentError, PortacnnError, ShapeError
from portacnn.layers.base import Layer, Shape
from portacnn.layers.conv import PADDING_MODES
from portacnn.layers.limits import count_taps
from portacnn.ops.pointwise import unbroadcast
from portacnn.ops.reduce import check_reduction
from portacnn.ops.windows import check_pads
from portacnn.runtime import Array, backend_of, where

__all__ = [
    "CenterCrop",
    "Crop",
    "Expand",
    "MergeIntoBatch",
    "Pad",
    "Permute",
    "Reduce",
    "Reshape",
    "Slice",
    "SplitFromBatch",
    "Take",
]


def _several(layer: Layer, name: str, values: Sequence[int], least: int) -> tuple[int, ...]:
    try:
        return wholes(name, values, least)
    except PortacnnError as error:
        raise error.at(type(layer).__name__)


class Reshape(Layer):
    """Reshape each sample: x (N, *S) -> y (N, *shape)."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = _several(self, "shape", shape, 1)

    def infer(self, shape: Shape) -> Shape:
        if prod(shape) != prod(self.shape):
            raise ShapeError(
                f"samples {shape} cannot be reshaped to {self.shape}: the sizes differ"
            )
        return self.shape

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        return backend_of(x).xp.reshape(x, (x.shape[0], *self.shape)), tuple(
            x.shape
        ) if keep else None

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        return backend_of(dy).xp.reshape(dy, self.kept(cache))


class MergeIntoBatch(Layer):
    """Merge the first axis of the samples with the batch: x (N, rows, *S) -> y (N * rows, *S).

    The layers that follow take each row as a sample: the windows of an image, or the heads of
    attention. ``SplitFromBatch`` is the inverse. Batch norm computes its statistics over all rows.

    Args:
        rows: the length of the axis.
    """

    def __init__(self, rows: int) -> None:
        (self.rows,) = _several(self, "rows", [rows], 1)

    def infer(self, shape: Shape) -> Shape:
        if shape[:1] != (self.rows,):
            raise ShapeError(f"expected samples ({self.rows}, *S), got {shape}")
        return shape[1:]

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        return _merged(x, self.rows), keep or None

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        self.kept(cache)
        return _split(dy, self.rows)


class SplitFromBatch(Layer):
    """Split an axis from the batch: x (N * rows, *S) -> y (N, rows, *S), the inverse of
    ``MergeIntoBatch``.

    Args:
        rows: the length of the axis.
    """

    def __init__(self, rows: int) -> None:
        (self.rows,) = _several(self, "rows", [rows], 1)

    def infer(self, shape: Shape) -> Shape:
        return (self.rows, *shape)

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        if x.shape[0] % self.rows:
            raise ShapeError(f"expected a multiple of {self.rows} rows, got {x.shape[0]}")
        return _split(x, self.rows), keep or None

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        self.kept(cache)
        return _merged(dy, self.rows)


def _merged(x: Array, rows: int) -> Array:
    return backend_of(x).xp.reshape(x, (x.shape[0] * rows, *x.shape[2:]))


def _split(x: Array, rows: int) -> Array:
    return backend_of(x).xp.reshape(x, (x.shape[0] // rows, rows, *x.shape[1:]))


class Permute(Layer):
    """Permute the axes: y's axis i is x's axis ``dims[i]``, as torch.permute.

    Args:
        dims: every axis once; the first is 0, the batch.
    """

    def __init__(self, dims: Sequence[int]) -> None:
        self.dims = _several(self, "dims", dims, 0)
        if self.dims[:1] != (0,) or sorted(self.dims) != list(range(len(self.dims))):
            raise ArgumentError(
                f"dims must be every axis once and 0 first, got {self.dims}", type(self).__name__
            )

    def infer(self, shape: Shape) -> Shape:
        if len(shape) + 1 != len(self.dims):
            raise ShapeError(f"expected samples of {len(self.dims) - 1} axes, got {shape}")
        return tuple(shape[axis - 1] for axis in self.dims[1:])

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        return backend_of(x).xp.permute_dims(x, self.dims), keep or None

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        self.kept(cache)
        back = tuple(sorted(range(len(self.dims)), key=self.dims.__getitem__))
        return backend_of(dy).xp.permute_dims(dy, back)


class Pad(Layer):
    """Pad each sample: x (N, *S) -> y (N, *OUT).

    Args:
        pads: (before, after) for every axis of a sample.
        mode: "zeros", "reflect", "replicate" or "circular" (see ``portacnn.ops.pad``).
        value: the fill value for mode "zeros"; it may be infinite.
    """

    def __init__(
        self, pads: Sequence[Sequence[int]], mode: str = "zeros", value: float = 0.0
    ) -> None:
        where = type(self).__name__
        sides = [_several(self, "pads", pair, 0) for pair in pads]
        if any(len(pair) != 2 for pair in sides):
            raise ArgumentError(f"pads must be (before, after) for every axis, got {pads!r}", where)
        self.pads = tuple((before, after) for before, after in sides)
        try:
            self.mode = PADDING_MODES[one_of("mode", mode, *PADDING_MODES)]
            self.value = value if value in (-inf, inf) else real("value", value)
            if self.mode != "constant" and value != 0:
                raise ArgumentError(
                    f'a value is for mode="zeros" only; got {value!r} with mode={mode!r}'
                )
        except PortacnnError as error:
            raise error.at(where)

    def infer(self, shape: Shape) -> Shape:
        if len(shape) != len(self.pads):
            raise ShapeError(f"expected samples of {len(self.pads)} axes, got {shape}")
        check_pads(shape, self.pads, self.mode)
        return tuple(
            n + before + after for n, (before, after) in zip(shape, self.pads, strict=True)
        )

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        flat = [n for pair in reversed(self.pads) for n in pair]
        return ops.pad(x, flat, self.mode, self.value, keep=keep)

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        return ops.pad_backward(dy, cache)


class Slice(Layer):
    """Slice every sample: ``x[:, start:stop:step, ...]``, with one slice for each axis.

    Args:
        starts, stops, steps: for every axis of a sample, 0 <= start < stop, step >= 1.
    """

    def __init__(self, starts: Sequence[int], stops: Sequence[int], steps: Sequence[int]) -> None:
        self.starts, self.stops = (
            _several(self, "starts", starts, 0),
            _several(self, "stops", stops, 1),
        )
        self.steps = _several(self, "steps", steps, 1)
        if not len(self.starts) == len(self.stops) == len(self.steps):
            raise ArgumentError(
                "expected starts, stops and steps of one length, one for each axis",
                type(self).__name__,
            )

    def _ranges(self) -> list[range]:
        return [
            range(*numbers) for numbers in zip(self.starts, self.stops, self.steps, strict=True)
        ]

    def infer(self, shape: Shape) -> Shape:
        if len(shape) != len(self.starts) or any(
            stop > n for n, stop in zip(shape, self.stops, strict=True)
        ):
            raise ShapeError(f"expected samples of at least {self.stops}, got {shape}")
        if not all(self._ranges()):
            raise ShapeError(f"the slice from {self.starts} to {self.stops} is empty")
        return tuple(map(len, self._ranges()))

    def _index(self) -> tuple[slice, ...]:
        parts = [slice(r.start, r[-1] + 1, r.step) for r in self._ranges()]
        return (slice(None), *parts)

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        return x[self._index()], tuple(x.shape) if keep else None

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        dx = backend_of(dy).xp.zeros(self.kept(cache), dtype=dy.dtype, device=dy.device)
        dx[self._index()] = dy
        return dx


class Crop(Layer):
    """Crop margins: x (N, C, *S) -> y (N, C, *OUT), the inverse of ``Pad``.

        Crop([(1, 1), (2, 0)])  # a row above and below, two columns on the left

    Args:
        margins: (before, after) for every spatial axis: the number of cells to remove.

    Raises:
        ArgumentError: a number is negative or not whole.
        ShapeError: when the network is built, if the number of axes differs or the output is empty.
    """

    def __init__(self, margins: Sequence[Sequence[int]]) -> None:
        sides = [_several(self, "margins", pair, 0) for pair in margins]
        if not sides or any(len(pair) != 2 for pair in sides):
            raise ArgumentError(
                f"margins must be (before, after) for every spatial axis, got {margins!r}",
                type(self).__name__,
            )
        self.margins = tuple((before, after) for before, after in sides)

    def kept_of(self, size: Sequence[int]) -> list[slice]:
        """Return the slice of each spatial axis to keep. Raises ShapeError if a sample does not
        fit."""
        if len(size) != len(self.margins):
            raise ShapeError(
                f"expected samples (C, *S) of {len(self.margins)} spatial axes, got {tuple(size)}"
            )
        cells = [
            slice(before, n - after) for n, (before, after) in zip(size, self.margins, strict=True)
        ]
        if any(part.start >= part.stop for part in cells):
            raise ShapeError(f"margins {self.margins} leave nothing of {tuple(size)} cells")
        return cells

    def infer(self, shape: Shape) -> Shape:
        return (*shape[:1], *(part.stop - part.start for part in self.kept_of(shape[1:])))

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        index = (slice(None), slice(None), *self.kept_of(x.shape[2:]))
        return x[index], (tuple(x.shape), index) if keep else None

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        shape, index = self.kept(cache)
        dx = backend_of(dy).xp.zeros(shape, dtype=dy.dtype, device=dy.device)
        dx[index] = dy
        return dx


class CenterCrop(Crop):
    """Crop the centre: x (N, C, *S) -> y (N, C, *size), as torchvision.transforms.CenterCrop.
    Images smaller than ``size`` are not supported.

    If the total margin of an axis is odd, the margin before is half of it, rounded to the nearest
    even number.

    Args:
        size: of the output, one number for each spatial axis.

    Raises:
        ArgumentError: a number is negative or not whole.
        ShapeError: when the network is built, if the number of axes differs or samples are smaller.
    """

    def __init__(self, size: Sequence[int]) -> None:
        self.size = _several(self, "size", size, 1)

    def kept_of(self, size: Sequence[int]) -> list[slice]:
        if len(size) != len(self.size) or any(n < m for n, m in zip(size, self.size, strict=False)):
            raise ShapeError(f"expected samples (C, *S) of at least {self.size}, got {tuple(size)}")
        starts = [round((n - m) / 2) for n, m in zip(size, self.size, strict=True)]
        return [slice(start, start + m) for start, m in zip(starts, self.size, strict=True)]


class Take(Layer):
    """Select indices along one axis, in any order and with repeats: x (N, *S) -> y (N, *OUT), as
    torch.index_select.

    Args:
        indices: the indices to select.
        axis: 1 or more; 0 is the batch.
    """

    def __init__(self, indices: Sequence[int], axis: int) -> None:
        self.indices = _several(self, "indices", indices, 0)
        (self.axis,) = _several(self, "axis", [axis], 1)
        if not self.indices:
            raise ArgumentError("expected at least one index", type(self).__name__)

    def infer(self, shape: Shape) -> Shape:
        if self.axis > len(shape) or max(self.indices) >= shape[self.axis - 1]:
            raise ShapeError(
                f"index {max(self.indices)} is out of range for axis {self.axis} of a batch of "
                f"samples {shape}"
            )
        count_taps((len(self.indices),))  # backward adds up the places of one cell one by one
        return (*shape[: self.axis - 1], len(self.indices), *shape[self.axis :])

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        xp = backend_of(x).xp
        y = xp.take(x, self.constants("indices", lambda: self.indices, "int64", x), axis=self.axis)
        return y, x.shape[self.axis] if keep else None

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        """Return dx: each index's gradient is the sum over its positions in y. Computed with
        gathers, because the array API standard has no scatter."""
        cells, xp = self.kept(cache), backend_of(dy).xp
        dx: Any = 0.0
        for number, places in enumerate(_rounds(self.indices, cells)):
            whose = self.constants(f"whose {number}", partial(_or_zero, places), "int64", dy)
            part = xp.take(dy, whose, axis=self.axis)
            if None in places:
                some = self.constants(f"some {number}", partial(_is_some, places), "bool", dy)
                part = xp.where(
                    xp.reshape(some, (cells, *(1,) * (dy.ndim - self.axis - 1))), part, 0.0
                )
            with where(dy):
                dx = part if number == 0 else dx + part
        return dx


def _or_zero(places: list[int | None]) -> list[int]:
    return [place or 0 for place in places]


def _is_some(places: list[int | None]) -> list[bool]:
    return [place is not None for place in places]


@lru_cache(maxsize=64)
def _rounds(indices: tuple[int, ...], cells: int) -> list[list[int | None]]:
    """Return, for the first, second, ... selection of each index, its position in ``indices``; None
    if it is not selected again."""
    rounds: list[list[int | None]] = []
    times = [0] * cells
    for place, cell in enumerate(indices):
        if times[cell] == len(rounds):
            rounds.append([None] * cells)
        rounds[times[cell]][cell] = place
        times[cell] += 1
    return rounds


class Expand(Layer):
    """Repeat axes of length 1: x (N, *S) -> y (N, *shape), as torch.Tensor.expand.

    Args:
        shape: of one sample, with as many axes as S.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = _several(self, "shape", shape, 1)

    def infer(self, shape: Shape) -> Shape:
        if len(shape) != len(self.shape) or any(
            n not in (1, m) for n, m in zip(shape, self.shape, strict=True)
        ):
            raise ShapeError(f"samples {shape} cannot be expanded to {self.shape}")
        return self.shape

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        y = backend_of(x).xp.broadcast_to(x, (x.shape[0], *self.shape))
        return y, tuple(x.shape) if keep else None

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        with where(dy):
            return unbroadcast(dy, self.kept(cache))


class Reduce(Layer):
    """The sum, mean, maximum or another reduction over some axes of every sample.

    Args:
        kind: as for ``portacnn.ops.reduce``.
        axes: 1 or more; 0 is the batch.
        keepdims: whether to keep the axes with length 1.
    """

    def __init__(self, kind: str, axes: Sequence[int], keepdims: bool = False) -> None:
        self.axes, self.keepdims = _several(self, "axes", axes, 1), bool(keepdims)
        try:
            check_reduction(kind, self.axes)
        except PortacnnError as error:
            raise error.at(type(self).__name__)
        self.reduction = kind

    def infer(self, shape: Shape) -> Shape:
        if max(self.axes) > len(shape):
            raise ShapeError(
                f"axis {max(self.axes)} is out of range for a batch of samples {shape}"
            )
        kept = [(1 if axis in self.axes else n, axis) for axis, n in enumerate(shape, 1)]
        return tuple(n for n, axis in kept if self.keepdims or axis not in self.axes)

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        return ops.reduce(x, self.reduction, self.axes, self.keepdims, keep=keep)

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        return ops.reduce_backward(dy, cache)
