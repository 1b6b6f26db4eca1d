"""Where the batch is: files may move its axis, merge other axes with it, or remove it.

A layer takes (N, *S). A ``Value`` says which axis of the file N is. Here, operators on values whose
batch is not axis 0 are rewritten to what they mean for (N, *S): their axes are renumbered, and
constants lose the batch axis. ``reshape`` and ``transpose`` move the batch.
"""

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from portacnn import layers as L
from portacnn.layers.base import Shape
from portacnn.onnx.importer import Importer
from portacnn.onnx.reading import Operation, brief
from portacnn.onnx.values import Dim, Known, Value, product, shown

# --- moving the batch -----------------------------------------------------------------------------


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
    others = [_index(x, axis) for axis in order if axis != x.at]
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


def _index(x: Value, axis: int) -> int:
    """Return which axis of ``x.shape`` an axis of the file is."""
    return axis if x.at is None or axis < x.at else axis - 1


# --- operators on values whose batch is elsewhere -------------------------------------------------


class _Meaning(NamedTuple):
    """An operator for (N, *S).

    Attributes:
        place: of the batch in its outputs.
        inputs: other inputs, by index.
        attributes: other attributes, with their kind.
    """

    place: int | None
    inputs: dict[int, Known | Value] = {}  # noqa: RUF012 (never changed)
    attributes: dict[str, tuple[str, Any]] = {}  # noqa: RUF012


def is_moved(at: Importer, op: Operation) -> bool:
    """Return whether a value that an operation takes has its batch elsewhere than at axis 0."""
    return any(
        isinstance(value := at.values.get(name), Value) and value.at != 0 for name in op.inputs
    )


def of_one_sample(at: Importer, op: Operation) -> Value | None:
    """Return the output of ``x[0]`` or ``x[0:1]`` along the batch, which is x in a file for one
    sample. None if the operation is another."""
    x = at.given(op, 0)
    if at.batch != 1 or not isinstance(x, Value) or x.rows != 1 or x.at is None:
        return None
    if op.kind == "Gather" and (axis := op.whole("axis", 0)) in (x.at, x.at - x.rank):
        known = at.known(op, 1)
        if known is not None and known.array.size == 1 and known.array.reshape(-1)[0] in (0, -1):
            shape = [(n, 0) for n in known.array.shape]
            dims = x.dims()
            if not shape:
                return x._replace(at=None)
            return reshape(at, op, x, [*dims[: x.at], *shape, *dims[x.at + 1 :]], False)
        raise op.wrong(f"axis {axis} is the batch, which has one sample in this file")
    return None


def convert(at: Importer, op: Operation, converter: Callable[[Importer, Operation], Any]) -> Any:
    """Return the outputs of an operation on values whose batch is not at axis 0."""
    if op.kind in _POINTWISE:
        meaning = _Meaning(_input(at, op).at)
    elif op.kind in _BROADCAST:
        meaning = _broadcast(at, op)
    elif op.kind in _MEANINGS:
        meaning = _MEANINGS[op.kind](at, op)
    elif rows := _as_rows(at, op):
        meaning = _Meaning(0, rows)
    else:
        value = next(v for v in map(at.values.get, op.inputs) if isinstance(v, Value) and v.at != 0)
        what = "without a batch axis" if value.at is None else f"with the batch at axis {value.at}"
        raise op.wrong(
            f"its input is {value.described()}, {what}; operators of this kind need it at axis 0"
        )
    inputs = list(op.inputs)
    names: dict[str, Known | Value] = {}
    for i, name in enumerate(op.inputs):
        given = meaning.inputs.get(i, at.values.get(name) if name else None)
        if isinstance(given, Value):
            given = given._replace(at=0)
        elif given is None or i not in meaning.inputs:
            continue
        inputs[i] = f"{name} of {op.label}, input {i}"
        while inputs[i] in at.values or inputs[i] in at.source.initializers:
            inputs[i] += "+"
        names[inputs[i]] = given
    while inputs and not inputs[-1]:
        inputs.pop()
    at.values |= names
    try:
        moved = Operation(
            op.name, op.kind, inputs, op.outputs, op.attributes | meaning.attributes, op.asked
        )
        made = converter(at, moved)
    finally:
        for name in names:
            del at.values[name]
    placed = [
        v._replace(at=meaning.place) if isinstance(v, Value) else v
        for v in (made if isinstance(made, list) else [made])
    ]
    return placed


def _as_rows(at: Importer, op: Operation) -> dict[int, Known | Value]:
    """Return the inputs with their first axis merged with the batch, if all have no batch axis."""
    values = {
        i: v for i, name in enumerate(op.inputs) if isinstance(v := at.values.get(name), Value)
    }
    if any(v.at is not None or len(v.shape) < 2 for v in values.values()):
        return {}
    made: dict[int, Known | Value] = {}
    for i, v in values.items():
        y = at.add(op, L.MergeIntoBatch(v.shape[0]), v)
        made[i] = y._replace(inner=v.shape[0])
    return made


def check_across(op: Operation, known: Known, values: Sequence[Value]) -> None:
    """Raise ModelFormatError unless a constant that is repeated for each sample is used with values
    whose batch is at the same place."""
    assert known.across is not None
    after = known.array.ndim - known.across
    fits = all(v.at is not None and v.rank - v.at == after for v in values)
    if not fits or op.kind not in _BROADCAST | {"Concat"}:
        shape = [(n, 0) if i != known.across else (0, 1) for i, n in enumerate(known.array.shape)]
        raise op.wrong(
            f"a constant that is repeated for the number of samples, {shown(shape)}, is not "
            "supported here"
        )


def _input(at: Importer, op: Operation) -> Value:
    return at.value(op, 0)


def _axis(op: Operation, x: Value, axis: int) -> int:
    """Return the axis of (N, *S) that an axis of the file is."""
    if not -x.rank <= axis < x.rank:
        raise op.wrong(f"axis {axis} is outside the {x.rank} axes")
    axis %= x.rank
    if axis == x.at:
        raise op.wrong(f"axis {axis} of {x.described()} is the batch; samples must be independent")
    return _index(x, axis) + 1


def _one_axis(default: int) -> Callable[[Importer, Operation], _Meaning]:
    """Return the meaning of an operator along one axis, which stays."""

    def of(at: Importer, op: Operation) -> _Meaning:
        x = _input(at, op)
        axis = _axis(op, x, op.whole("axis", default))
        return _Meaning(x.at, {}, {"axis": ("i", axis)})

    return of


def _softmax(at: Importer, op: Operation) -> _Meaning:
    x = _input(at, op)
    first = op.whole("axis", -1 if at.opset >= 13 else 1)
    axis = _axis(op, x, first)
    if at.opset < 13 and x.at is not None and x.at > first % x.rank:
        raise op.wrong(f"it would merge the batch of {x.described()} with other axes")
    return _Meaning(x.at, {}, {"axis": ("i", axis)})


def _layer_norm(at: Importer, op: Operation) -> _Meaning:
    x = _input(at, op)
    first = op.whole("axis", -1)
    axis = _axis(op, x, first)
    if x.at is not None and x.at > first % x.rank:
        raise op.wrong(f"it would normalize over the batch of {x.described()}")
    return _Meaning(x.at, {}, {"axis": ("i", axis)})


def _axes_given(
    at: Importer, op: Operation, index: int, axes: Sequence[int]
) -> tuple[dict[int, Known | Value], dict[str, tuple[str, Any]]]:
    """Return axes as an input or an attribute, as the operation has them."""
    if index < len(op.inputs) and op.inputs[index]:
        return {index: Known(np.array(axes, np.int64))}, {}
    return {}, {"axes": ("ints", list(axes))}


def _reduce(at: Importer, op: Operation) -> _Meaning:
    x, kept = _input(at, op), op.whole("keepdims", 1)
    axes = at.numbers(op, 1, "axes")
    if not axes:
        if op.whole("noop_with_empty_axes", 0):
            return _Meaning(x.at)
        axes = list(range(x.rank))
    chosen = [_axis(op, x, axis) for axis in axes]
    place = x.at
    if place is not None and not kept:
        place -= sum(axis % x.rank < place for axis in axes)
    attribute = at.opset < (13 if op.kind == "ReduceSum" else 18)
    if not attribute and len(op.inputs) < 2:
        raise op.wrong("without axes it would reduce the batch")
    return _Meaning(place, *_axes_given(at, op, 1, chosen))


def _gather(at: Importer, op: Operation) -> _Meaning:
    x, indices = _input(at, op), at.known(op, 1)
    axis = _axis(op, x, given := op.whole("axis", 0))
    place = x.at
    if place is not None and indices is not None and given % x.rank < place:
        place += indices.array.ndim - 1
    return _Meaning(place, {}, {"axis": ("i", axis)})


def _slice(at: Importer, op: Operation) -> _Meaning:
    x = _input(at, op)
    starts = at.numbers(op, 1, "starts") or []
    axes = at.numbers(op, 3, "axes")
    axes = list(range(len(starts))) if axes is None else axes
    chosen = [0 if axis % x.rank == x.at else _axis(op, x, axis) for axis in axes]
    if op.has("starts"):
        return _Meaning(x.at, {}, {"axes": ("ints", chosen)})
    if len(op.inputs) < 4 or not op.inputs[3]:
        raise op.wrong(f"without axes it would slice the batch of {x.described()}")
    return _Meaning(x.at, {3: Known(np.array(chosen, np.int64))})


def _concat(at: Importer, op: Operation) -> _Meaning:
    given = [at.given(op, i) for i in range(len(op.inputs))]
    values = [v for v in given if isinstance(v, Value)]
    x = values[0]
    if any(v.at != x.at or v.rank != x.rank for v in values):
        raise op.wrong("its inputs have their batch at different axes")
    axis = _axis(op, x, op.whole("axis", 1))
    inputs: dict[int, Known | Value] = {}
    for i, known in enumerate(given):
        if isinstance(known, Known):
            if known.array.ndim != x.rank:
                raise op.wrong(f"{brief(known.array.shape)} does not fit {x.described()}")
            array = known.array[None] if x.at is None else np.moveaxis(known.array, x.at, 0)
            inputs[i] = known._replace(array=array, across=None if known.across is None else 0)
    return _Meaning(x.at, inputs, {"axis": ("i", axis)})


def _broadcast(at: Importer, op: Operation) -> _Meaning:
    """Align all inputs at their last axes, with the batch of all values at one place."""
    given = [at.given(op, i) for i in range(len(op.inputs))]
    values = [v for v in given if isinstance(v, Value)]
    behind = {len(v.shape) - v.at for v in values if v.at is not None}  # axes after the batch
    if len(behind) > 1:
        raise op.wrong(
            f"the batches of {' and '.join(v.described() for v in values)} are not at one place"
        )
    after = behind.pop() if behind else None
    inputs: dict[int, Known | Value] = {}
    shapes: dict[int, Shape] = {}
    for i, v in enumerate(given):
        if isinstance(v, Known):
            inputs[i] = v._replace(array=v.array.reshape(_without(op, v.array.shape, after)))
        elif isinstance(v, Value):
            shapes[i] = v.shape if v.at is not None else _without(op, v.shape, after)
    rank = max(map(len, shapes.values()))
    for i, shape in shapes.items():
        v = given[i]
        assert isinstance(v, Value)
        whole = (1,) * (rank - len(shape)) + shape
        inputs[i] = at.reshaped(op, v._replace(at=0), whole)
    return _Meaning(None if after is None else rank - after, inputs)


def _without(op: Operation, shape: Shape, after: int | None) -> Shape:
    """Return a shape without the axis of the batch, which has ``after`` axes behind it."""
    if after is None or len(shape) <= after:
        return shape
    at = len(shape) - 1 - after
    if shape[at] != 1:
        raise op.wrong(f"{brief(shape)} has elements of its own along the batch")
    return (*shape[:at], *shape[at + 1 :])


def _matmul(at: Importer, op: Operation) -> _Meaning:
    a, b = at.given(op, 0), at.given(op, 1)
    if isinstance(a, Value) and isinstance(b, Value):
        if a.at == b.at and a.rank == b.rank and (a.at is None or a.at < a.rank - 2):
            return _Meaning(a.at)
    elif isinstance(a, Value) and isinstance(b, Known) and a.at != a.rank - 1:
        if b.array.ndim == 2 or (a.at is None and b.array.ndim <= a.rank):
            return _Meaning(a.at)
    elif isinstance(b, Value) and b.at is None:
        return _Meaning(None)
    raise op.wrong(
        "it is not supported for "
        + " and ".join(v.described() for v in (a, b) if isinstance(v, Value))
        + ": the batch must be before the matrices"
    )


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_POINTWISE = _words(
    "Abs Acos Asin Atan Cast CastLike Ceil Celu Clip Cos Dropout Elu Erf Exp Floor Gelu "
    "HardSigmoid HardSwish Identity LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink "
    "Sigmoid Sign Sin Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu com.microsoft.FastGelu "
    "com.microsoft.Gelu com.microsoft.QuickGelu"
)
_BROADCAST = _words(
    "Add And Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or PRelu Pow "
    "Sub Sum Where Xor"
)
_MEANINGS: dict[str, Callable[[Importer, Operation], _Meaning]] = {
    "Concat": _concat,
    "Gather": _gather,
    "LayerNormalization": _layer_norm,
    "LogSoftmax": _softmax,
    "MatMul": _matmul,
    **dict.fromkeys(
        _words(
            "ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare"
        ),
        _reduce,
    ),
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _one_axis(0),
}
MOVING = frozenset(("Flatten", "Reshape", "Shape", "Size", "Squeeze", "Transpose", "Unsqueeze"))
"""Operators whose converters know where the batch is."""
