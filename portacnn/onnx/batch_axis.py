"""Operators that move the batch: files may move its axis, merge other axes with it, or remove it.

A layer takes (N, *S). A ``Value`` says which axis of the file N is. ``moved`` reads the operators
on values whose batch is not axis 0.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

from portacnn import layers as L
from portacnn.layers.base import Shape
from portacnn.onnx.importer import Importer
from portacnn.onnx.reading import Operation, brief
from portacnn.onnx.values import Dim, Value, product, shown


class _Place(NamedTuple):
    """A shape that keeps the samples apart: the sizes left and right of the batch."""

    at: int | None
    left: tuple[int, ...]
    right: tuple[int, ...]
    outer: int
    inner: int


def reshape(at: Importer, op: Operation, x: Value, wanted: Sequence[Dim], zero: bool) -> Value:
    """Reshape a value. The batch may be merged with its neighbours, and separated from them.

    Args:
        wanted: the sizes; one may be -1.
        zero: whether 0 means the size of x at this place.
    """
    dims = x.dims()
    copied = [
        dims[i] if zero and dim == (0, 0) and i < len(dims) else dim for i, dim in enumerate(wanted)
    ]
    place = _place(at, x, copied)
    if place is None:
        raise op.wrong(
            f"reshaping {x.described()} to {shown(list(wanted))} would move elements from one "
            "sample to another"
        )
    sizes = (*place.left, *place.right)
    if (place.outer, place.inner) == (x.outer, x.inner):
        return at.reshaped(op, x, sizes)._replace(at=place.at)
    y, p = x, x.at or 0
    if x.rows > 1:
        y = at.add(op, L.SplitFromBatch(x.rows), x)._replace(outer=1, inner=1)
    left, right = x.shape[:p], x.shape[p:]
    # (outer, inner, left, right) -> (left, outer, inner, right), which is the order in the file
    y = _permuted(at, op, y, (x.outer, x.inner, *left, *right), 2, 2 + p)
    before = len(place.left)
    apart = (*place.left, place.outer, place.inner, *place.right)
    y = _permuted(at, op, y, apart, before, before + 2)
    rows = place.outer * place.inner
    y = at.reshaped(op, y, (rows, *sizes) if rows > 1 else sizes)
    if rows > 1:
        y = at.add(op, L.MergeIntoBatch(rows), y)
    return y._replace(at=place.at, outer=place.outer, inner=place.inner)


def _permuted(at: Importer, op: Operation, x: Value, sizes: Shape, first: int, last: int) -> Value:
    """Reshape each sample to ``sizes``, and move the axes from first to last to the front. Axes of
    length 1 are moved by a reshape."""
    order = [*range(first, last), *range(first), *range(last, len(sizes))]
    long = [axis for axis in order if sizes[axis] != 1]
    if long == sorted(long):
        return at.reshaped(op, x, [sizes[axis] for axis in order])
    x = at.reshaped(op, x, sizes)
    return at.add(op, L.Permute([0, *(axis + 1 for axis in order)]), x)


def _place(at: Importer, x: Value, wanted: Sequence[Dim]) -> _Place | None:
    """Return where the batch is in a shape, or None if the shape mixes samples."""
    counted = [i for i, (_, b) in enumerate(wanted) if b]
    if len(counted) > 1 or any(a < -1 or b < 0 or (a and b) for a, b in wanted):
        return None
    if sum(dim == (-1, 0) for dim in wanted) > 1:
        return None
    if at.batch == 1 and not counted:
        return _of_one_sample(x, [a for a, _ in wanted])
    found = list(_places(at, x, wanted, counted))
    if not found:
        return None
    # rather the one that keeps the rows
    return min(found, key=lambda place: (place.outer, place.inner) != (x.outer, x.inner))


def _of_one_sample(x: Value, wanted: list[int]) -> _Place | None:
    """In a file for one sample, any axis of length 1 may be the batch, and nothing needs to be
    merged with it."""
    total, others = prod(x.shape) * x.rows, prod(n for n in wanted if n != -1)
    if -1 in wanted and others > 0 and total % others == 0:
        wanted = [total // others if n == -1 else n for n in wanted]
    if prod(wanted) != total or min(wanted, default=1) < 1:
        return None
    ones = [i for i, n in enumerate(wanted) if n == 1]
    if not ones:
        return _Place(None, (), tuple(wanted), 1, 1)
    place = x.at if x.at in ones else ones[0]
    return _Place(place, tuple(wanted[:place]), tuple(wanted[place + 1 :]), 1, 1)


def _places(
    at: Importer, x: Value, wanted: Sequence[Dim], counted: Sequence[int]
) -> Iterator[_Place]:
    """Yield the places where the batch can be."""
    p = x.at or 0
    before, after = prod(x.shape[:p]) * x.outer, x.inner * prod(x.shape[p:])
    sizes = [a for a, _ in wanted]
    for place in counted or range(len(wanted)):
        size = wanted[place]
        others = [n for i, n in enumerate(sizes) if i != place]
        if -1 in others:
            if counted:
                rows = size[1]
            elif at.batch is not None and size[0] % at.batch == 0:
                rows = size[0] // at.batch
            else:
                continue
            rest = rows * prod(n for n in others if n != -1)
            if rest < 1 or before * after % rest:
                continue
            others = [before * after // rest if n == -1 else n for n in others]
        elif counted:
            rows = size[1]
        elif size == (-1, 0):
            rows = 0
        elif at.batch is not None and size[0] % at.batch == 0:
            rows = size[0] // at.batch
        else:
            continue
        left, right = tuple(others[:place]), tuple(others[place:])
        if min(others, default=1) < 1 or before % prod(left) or after % prod(right):
            continue
        outer, inner = before // prod(left), after // prod(right)
        if rows in (0, outer * inner):
            yield _Place(place, left, right, outer, inner)


def transpose(at: Importer, op: Operation, x: Value, order: Sequence[int]) -> Value:
    """Permute the axes of a value, also the batch's."""
    place = None if x.at is None else order.index(x.at)
    others = [index_in(x, axis) for axis in order if axis != x.at]
    canonical = x._replace(at=0)
    if others == sorted(others):
        return x._replace(at=place)
    y = at.add(op, L.Permute([0, *(axis + 1 for axis in others)]), canonical)
    return y._replace(at=place)


def flatten(at: Importer, op: Operation, x: Value, axis: int) -> Value:
    """Merge the axes before ``axis``, and the others."""
    dims = [(a + b, 0) for a, b in x.dims()] if at.batch == 1 else x.dims()
    if not -len(dims) <= axis <= len(dims):
        raise op.wrong(f"axis {axis} is outside the {len(dims)} axes")
    axis = axis + len(dims) if axis < 0 else axis
    return reshape(at, op, x, [product(dims[:axis]), product(dims[axis:])], False)


def squeeze(at: Importer, op: Operation, x: Value, axes: Sequence[int] | None) -> Value:
    """Remove axes of length 1: also the batch, in a file for one sample."""
    removable = at.batch == 1 and x.rows == 1
    if axes is None:
        axes = [i for i, dim in enumerate(x.dims()) if dim == (1, 0) or (removable and dim[1])]
    away = _checked(op, axes, x.rank)
    dims = [dim for i, dim in enumerate(x.dims()) if i not in away]
    if any(x.dims()[i] != (1, 0) for i in away if i != x.at):
        raise op.wrong(f"axes {brief(axes)} of {x.described()} must have length 1")
    if x.at in away:
        if not removable:
            raise op.wrong("it would remove the batch")
        return at.reshaped(op, x._replace(at=0), [a for a, _ in dims])._replace(at=None)
    return reshape(at, op, x, dims, False) if x.at is not None else _resized(at, op, x, dims)


def unsqueeze(at: Importer, op: Operation, x: Value, axes: Sequence[int]) -> Value:
    """Insert axes of length 1. In a file for one sample, the first one is the batch if there is
    none."""
    new = _checked(op, axes, x.rank + len(axes))
    old = iter(x.dims())
    dims = [(1, 0) if i in new else next(old) for i in range(x.rank + len(axes))]
    return reshape(at, op, x, dims, False) if x.at is not None else _resized(at, op, x, dims)


def _resized(at: Importer, op: Operation, x: Value, dims: Sequence[Dim]) -> Value:
    """Reshape a value without a batch axis."""
    sizes = [a for a, _ in dims]
    place = sizes.index(1) if 1 in sizes else None
    if place is not None:
        del sizes[place]
    return at.reshaped(op, x._replace(at=0), sizes)._replace(at=place)


def _checked(op: Operation, axes: Sequence[int], rank: int) -> list[int]:
    found = [axis % rank if -rank <= axis < rank else -1 for axis in axes]
    if -1 in found or len(set(found)) != len(found) or rank > 16:
        raise op.wrong(f"axes {brief(axes)} are outside the {rank} axes")
    return found


def index_in(x: Value, axis: int) -> int:
    """Return which axis of ``x.shape`` an axis of the file is."""
    return axis if x.at is None or axis < x.at else axis - 1


MOVING = frozenset(("Flatten", "Reshape", "Shape", "Size", "Squeeze", "Transpose", "Unsqueeze"))
"""Operators whose converters know where the batch is."""
