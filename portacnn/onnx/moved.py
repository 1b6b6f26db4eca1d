"""Operators on values whose batch is not axis 0: they are rewritten to what they mean for (N, *S).

Their axes are renumbered, and constants lose the axis of the batch. The operator's converter then
reads them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from portacnn import layers as L
from portacnn.layers.base import Shape
from portacnn.onnx.batch_axis import index_in, reshape
from portacnn.onnx.importer import Importer
from portacnn.onnx.reading import Operation, brief
from portacnn.onnx.values import Known, Value, shown


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
    return index_in(x, axis) + 1


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
    "Abs Acos Acosh Asin Asinh Atan Atanh Cast CastLike Ceil Celu Clip Cos Cosh Dropout Elu Erf "
    "Exp Floor Gelu HardSigmoid HardSwish Identity LeakyRelu Log Mish Neg Not Reciprocal Relu "
    "Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu "
    "com.microsoft.FastGelu com.microsoft.Gelu com.microsoft.QuickGelu"
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
            "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin "
            "ReduceProd ReduceSum ReduceSumSquare"
        ),
        _reduce,
    ),
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _one_axis(0),
}
