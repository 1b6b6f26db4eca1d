"""The operators that shapes are computed with, as NumPy functions of known arrays.

They move elements or compute with numbers, along any axis and in any dtype. ``folding`` runs them.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from portacnn.onnx.importer import Importer, plain_axes
from portacnn.onnx.reading import TYPES, Operation, brief

_MOST_AXES = 16
Arrays = Sequence[Any]  # None for an omitted input
Function = Callable[[Importer, Operation, Arrays], Any]


# --- numbers --------------------------------------------------------------------------------------


def alike(op: Operation, arrays: Arrays) -> tuple[int, ...]:
    """Return the broadcast shape. Raises ModelFormatError if dtypes differ."""
    if any(a is None for a in arrays) or not arrays:
        raise op.wrong("an input is missing")
    if len({a.dtype.str for a in arrays}) != 1:
        kinds = " and ".join(str(a.dtype) for a in arrays[:4])
        raise op.wrong(f"constants must have dtypes of one kind, got {kinds}")
    try:
        return np.broadcast_shapes(*(a.shape for a in arrays))
    except ValueError:
        shapes = " and ".join(brief(a.shape) for a in arrays[:4])
        raise op.wrong(f"constants {shapes} do not broadcast") from None


def _values(function: Callable[..., Any], kinds: str = "fiu", most: int | None = None) -> Any:
    """Return a function of equal dtypes that broadcast, applied from left to right."""

    def run(at: Importer, op: Operation, arrays: Arrays) -> Any:
        op.ignore("broadcast", "axis", "consumed_inputs", "fmod", "direction")
        shape = alike(op, arrays)
        dtype = arrays[0].dtype
        if dtype.kind not in kinds or (most is not None and len(arrays) != most):
            raise op.wrong(f"it is not supported for {len(arrays)} constants of {dtype}")
        at.source.budget.take(prod(shape) * dtype.itemsize)
        made = arrays[0] if len(arrays) > 1 else function(arrays[0])
        for other in arrays[1:]:
            made = function(made, other)
        return made if made.dtype.kind == "b" else made.astype(dtype)

    return run


def _divide(at: Importer, op: Operation, arrays: Arrays) -> Any:
    """Divide; integers are truncated toward zero, and not divided by 0."""
    if len(arrays) == 2 and arrays[1] is not None and arrays[1].dtype.kind in "iu":
        if (arrays[1] == 0).any():
            raise op.wrong("an integer is divided by 0")
        return _values(lambda a, b: np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)), most=2)(
            at, op, arrays
        )
    return _values(np.divide, "f", 2)(at, op, arrays)


def _power(at: Importer, op: Operation, arrays: Arrays) -> Any:
    if len(arrays) != 2 or None in [a if a is None else 0 for a in arrays]:
        raise op.wrong("it needs two inputs")
    base, exponent = arrays
    if base.dtype.kind not in "fiu" or exponent.dtype.kind not in "fiu":
        raise op.wrong(f"it is not supported for {base.dtype} and {exponent.dtype}")
    if base.dtype.kind != "f":
        if exponent.dtype.kind != "f" and (exponent < 0).any():
            raise op.wrong("integers have no negative powers")
        base = base.astype(np.float64)
    made = _values(np.power, "f", 2)(at, op, [base, exponent.astype(base.dtype)])
    return made.astype(arrays[0].dtype)


def _modulo(at: Importer, op: Operation, arrays: Arrays) -> Any:
    if len(arrays) == 2 and arrays[1].dtype.kind in "iu" and (arrays[1] == 0).any():
        raise op.wrong("an integer is divided by 0")
    function = np.fmod if op.whole("fmod", 0) else np.mod
    return _values(function, most=2)(at, op, arrays)


def dtype_of_cast(op: Operation, arrays: Arrays) -> np.dtype:
    op.ignore("saturate", "round_mode")
    if op.kind == "CastLike":
        return arrays[1].dtype
    kind = TYPES.get(to := op.whole("to", 0))
    if kind is None:
        raise op.wrong(f"casting constants to type {to} is not supported")
    known = {"bool": "?", "float16": "<f2", "bfloat16": "<f4"}
    return np.dtype(known.get(kind.name, kind.dtype))


def _cast(at: Importer, op: Operation, arrays: Arrays) -> Any:
    dtype = dtype_of_cast(op, arrays)
    at.source.budget.take(arrays[0].size * dtype.itemsize)
    return arrays[0].astype(dtype)


def reduced(op: Operation, arrays: Arrays) -> tuple[tuple[int, ...], bool]:
    """Return the axes of a reduction, and whether they are kept."""
    data, kept = arrays[0], bool(op.whole("keepdims", 1))
    axes = _whole_numbers(op, arrays, 1, "axes")
    op.ignore("noop_with_empty_axes")
    if not axes and op.whole("noop_with_empty_axes", 0):
        return (), True
    return tuple(plain_axes(op, axes or range(data.ndim), data.ndim)), kept


def _reduction(function: Callable[..., Any]) -> Any:
    def run(at: Importer, op: Operation, arrays: Arrays) -> Any:
        axes, kept = reduced(op, arrays)
        empty = not arrays[0].size and op.kind in ("ReduceMax", "ReduceMean", "ReduceMin")
        if empty or arrays[0].dtype.kind not in "fiu":
            raise op.wrong(f"it is not supported for {arrays[0].dtype} {brief(arrays[0].shape)}")
        at.source.budget.take(arrays[0].nbytes)
        made = np.asarray(function(arrays[0], axis=axes, keepdims=kept))
        return made.astype(arrays[0].dtype)

    return run


def _range(at: Importer, op: Operation, arrays: Arrays) -> Any:
    alike(op, arrays)
    if len(arrays) != 3 or any(a.size != 1 for a in arrays) or arrays[0].dtype.kind not in "fi":
        raise op.wrong("it needs three numbers")
    first, limit, step = (a.reshape(()).item() for a in arrays)
    count = max(0.0, np.ceil((limit - first) / step)) if step else np.inf
    if not count < 1 << 31:
        raise op.wrong("its range has no end")
    at.source.budget.take(8 * int(count))
    return (first + step * np.arange(int(count))).astype(arrays[0].dtype)


def _triangle(at: Importer, op: Operation, arrays: Arrays) -> Any:
    offset = (_whole_numbers(op, arrays, 1) or [0])[0]
    if arrays[0].ndim < 2 or abs(offset) > 1 << 31:
        raise op.wrong("expected matrices")
    return (np.triu if op.whole("upper", 1) else np.tril)(arrays[0], offset)


def _matrix_product(at: Importer, op: Operation, arrays: Arrays) -> Any:
    a, b = arrays
    if a.dtype != b.dtype or a.dtype.kind != "f" or not a.ndim or not b.ndim:
        raise op.wrong(f"it is not supported for constants of {a.dtype} and {b.dtype}")
    at.source.budget.take(a.nbytes + b.nbytes + a.itemsize * a.size * b.shape[-1])
    return np.matmul(a, b)


def _running_sum(at: Importer, op: Operation, arrays: Arrays) -> Any:
    (axis,) = plain_axes(op, (_whole_numbers(op, arrays, 1) or [0])[:1], arrays[0].ndim)
    if op.whole("exclusive", 0) or op.whole("reverse", 0):
        raise op.wrong("exclusive and reverse are not supported")
    return np.cumsum(arrays[0], axis=axis, dtype=arrays[0].dtype)


VALUES: dict[str, Callable[[Importer, Operation, Arrays], Any]] = {
    "Abs": _values(np.abs, most=1),
    "Add": _values(np.add, most=2),
    "And": _values(np.logical_and, "b", 2),
    "Cast": _cast,
    "CastLike": _cast,
    "Ceil": _values(np.ceil, "f", 1),
    "CumSum": _running_sum,
    "Div": _divide,
    "Equal": _values(np.equal, "fiub", 2),
    "Floor": _values(np.floor, "f", 1),
    "Greater": _values(np.greater, most=2),
    "GreaterOrEqual": _values(np.greater_equal, most=2),
    "Less": _values(np.less, most=2),
    "LessOrEqual": _values(np.less_equal, most=2),
    "MatMul": _matrix_product,
    "Max": _values(np.maximum),
    "Min": _values(np.minimum),
    "Mod": _modulo,
    "Mul": _values(np.multiply, most=2),
    "Neg": _values(np.negative, "fi", 1),
    "Not": _values(np.logical_not, "b", 1),
    "Or": _values(np.logical_or, "b", 2),
    "Pow": _power,
    "Range": _range,
    "ReduceL1": _reduction(lambda a, **how: np.sum(np.abs(a), **how)),
    "ReduceL2": _reduction(lambda a, **how: np.sqrt(np.sum(a * a, **how))),
    "ReduceMax": _reduction(np.max),
    "ReduceMean": _reduction(np.mean),
    "ReduceMin": _reduction(np.min),
    "ReduceProd": _reduction(np.prod),
    "ReduceSumSquare": _reduction(lambda a, **how: np.sum(a * a, **how)),
    "Round": _values(np.round, "f", 1),
    "Sign": _values(np.sign, most=1),
    "Sqrt": _values(np.sqrt, "f", 1),
    "Sub": _values(np.subtract, most=2),
    "Sum": _values(np.add),
    "Trilu": _triangle,
    "Xor": _values(np.logical_xor, "b", 2),
}


# --- elements that move ---------------------------------------------------------------------------


def _whole_numbers(
    op: Operation, arrays: Arrays, index: int, attribute: str = ""
) -> list[int] | None:
    """Return whole numbers from an input, or in older opsets an attribute; None if omitted."""
    if attribute and op.has(attribute):
        return op.ints(attribute)
    array = arrays[index] if index < len(arrays) else None
    if array is None:
        return None
    if array.dtype.kind not in "iu" or array.size > 1024:
        raise op.wrong(
            f"its input {index} must be a short list of whole numbers, got {array.dtype} "
            f"{brief(array.shape)}"
        )
    return [int(n) for n in array.reshape(-1)]


def _numbers(op: Operation, arrays: Arrays, index: int, attribute: str = "") -> list[int]:
    found = _whole_numbers(op, arrays, index, attribute)
    if found is None:
        raise op.wrong(f"its input {index} is missing")
    return found


def _reshape(at: Importer, op: Operation, arrays: Arrays) -> Any:
    array, wanted = arrays[0], _numbers(op, arrays, 1, "shape")
    keep = op.whole("allowzero", 0)
    shape = [
        array.shape[i] if n == 0 and i < array.ndim and not keep else n
        for i, n in enumerate(wanted)
    ]
    others = prod(n for n in shape if n != -1)
    if shape.count(-1) == 1 and others > 0:
        shape = [array.size // others if n == -1 else n for n in shape]
    if any(n < 0 for n in shape) or prod(shape) != array.size or len(shape) > _MOST_AXES:
        raise op.wrong(f"a constant {brief(array.shape)} cannot be reshaped to {brief(wanted)}")
    return array.reshape(shape)


def _flatten(at: Importer, op: Operation, arrays: Arrays) -> Any:
    axis, shape = op.whole("axis", 1), arrays[0].shape
    if not -len(shape) <= axis <= len(shape):
        raise op.wrong(f"axis {axis} is outside the {len(shape)} axes")
    axis = axis + len(shape) if axis < 0 else axis
    return arrays[0].reshape(prod(shape[:axis]), prod(shape[axis:]))


def _squeeze(at: Importer, op: Operation, arrays: Arrays) -> Any:
    shape, axes = arrays[0].shape, _whole_numbers(op, arrays, 1, "axes")
    away = [i for i, n in enumerate(shape) if n == 1] if axes is None else axes
    away = plain_axes(op, away, len(shape))
    if any(shape[i] != 1 for i in away):
        raise op.wrong(f"axes {brief(away)} of {brief(shape)} must have length 1")
    return arrays[0].reshape([n for i, n in enumerate(shape) if i not in away])


def _unsqueeze(at: Importer, op: Operation, arrays: Arrays) -> Any:
    axes = _numbers(op, arrays, 1, "axes")
    rank = arrays[0].ndim + len(axes)
    if rank > _MOST_AXES:
        raise op.wrong(f"more than {_MOST_AXES} axes")
    new, old = plain_axes(op, axes, rank), iter(arrays[0].shape)
    return arrays[0].reshape([1 if i in new else next(old) for i in range(rank)])


def _transpose(at: Importer, op: Operation, arrays: Arrays) -> Any:
    rank, order = arrays[0].ndim, op.ints("perm")
    order = list(range(rank))[::-1] if order is None else order
    if sorted(order) != list(range(rank)):
        raise op.wrong(f"perm must contain each of {rank} axes once, got {brief(order)}")
    return arrays[0].transpose(order)


def _slice(at: Importer, op: Operation, arrays: Arrays) -> Any:
    starts, ends = _numbers(op, arrays, 1, "starts"), _numbers(op, arrays, 2, "ends")
    axes = _whole_numbers(op, arrays, 3, "axes")
    axes = list(range(len(starts))) if axes is None else axes
    steps = _whole_numbers(op, arrays, 4)
    steps = [1] * len(starts) if steps is None else steps
    if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps:
        raise op.wrong("starts, ends, axes and steps have different lengths")
    index = [slice(None)] * arrays[0].ndim
    axes = plain_axes(op, axes, arrays[0].ndim)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        index[axis] = slice(start, end, step)
    return arrays[0][tuple(index)]


def _split(at: Importer, op: Operation, arrays: Arrays) -> list[Any]:
    (axis,) = plain_axes(op, [op.whole("axis", 0)], arrays[0].ndim)
    size, count = arrays[0].shape[axis], len(op.outputs)
    op.ignore("num_outputs")
    sizes = _whole_numbers(op, arrays, 1, "split")
    if sizes is None:
        each = -(-size // count)
        sizes = [each] * (count - 1) + [size - each * (count - 1)]
    if len(sizes) != count or any(n < 0 for n in sizes) or sum(sizes) != size:
        raise op.wrong(f"{size} elements cannot be split into {brief(sizes)} for {count} outputs")
    ends = [0, *np.cumsum(sizes).tolist()]
    before = (slice(None),) * axis
    return [arrays[0][(*before, slice(first, last))] for first, last in pairwise(ends)]


def _concat(at: Importer, op: Operation, arrays: Arrays) -> Any:
    if any(a is None for a in arrays):
        raise op.wrong("an input is missing")
    rank = arrays[0].ndim
    (axis,) = plain_axes(op, [op.whole("axis", 1)], rank)
    alike = {(a.dtype.str, a.shape[:axis], a.shape[axis + 1 :], a.ndim) for a in arrays}
    if len(alike) != 1:
        raise op.wrong("these constants cannot be concatenated: their shapes or dtypes differ")
    at.source.budget.take(sum(a.nbytes for a in arrays))
    return np.concatenate(arrays, axis=axis)


def _gather(at: Importer, op: Operation, arrays: Arrays) -> Any:
    data, indices = arrays[0], arrays[1] if len(arrays) > 1 else None
    if data is None or indices is None or not data.ndim or indices.dtype.kind not in "iu":
        raise op.wrong("its inputs are missing, or its indices are not whole numbers")
    (axis,) = plain_axes(op, [op.whole("axis", 0)], data.ndim)
    size = data.shape[axis]
    if indices.size and not -size <= int(indices.min()) <= int(indices.max()) < size:
        raise op.wrong(f"indices are beyond the {size} elements of axis {axis}")
    if indices.ndim + data.ndim > _MOST_AXES:
        raise op.wrong(f"more than {_MOST_AXES} axes")
    at.source.budget.take(data.nbytes // max(size, 1) * indices.size)
    return np.take(data, indices, axis=axis)


def _where(at: Importer, op: Operation, arrays: Arrays) -> Any:
    condition, *others = arrays
    if len(others) != 2 or any(a is None for a in arrays) or condition.dtype.kind != "b":
        raise op.wrong("expected a condition of booleans and two inputs")
    shape = alike(op, [condition, *(np.broadcast_to(np.False_, a.shape) for a in others)])
    alike(op, [np.empty(0, a.dtype) for a in others])
    at.source.budget.take(prod(shape) * others[0].itemsize)
    return np.where(condition, *others)


def _expand(at: Importer, op: Operation, arrays: Arrays) -> Any:
    wanted = _numbers(op, arrays, 1)
    if any(not 0 <= n < 1 << 31 for n in wanted) or len(wanted) > _MOST_AXES:
        raise op.wrong(f"a shape {brief(wanted)} is invalid")
    shape = alike(op, [np.broadcast_to(np.False_, s) for s in (arrays[0].shape, tuple(wanted))])
    at.source.budget.take(prod(shape) * arrays[0].itemsize)
    return np.broadcast_to(arrays[0], shape)


def _tile(at: Importer, op: Operation, arrays: Arrays) -> Any:
    repeats = _numbers(op, arrays, 1)
    if len(repeats) != arrays[0].ndim or any(not 0 <= n < 1 << 31 for n in repeats):
        raise op.wrong(f"repeats {brief(repeats)} do not fit {brief(arrays[0].shape)}")
    at.source.budget.take(arrays[0].nbytes * prod(repeats))
    return np.tile(arrays[0], repeats)


def _total(at: Importer, op: Operation, arrays: Arrays) -> Any:
    return _reduction(np.sum)(at, op, arrays)


def _same(at: Importer, op: Operation, arrays: Arrays) -> Any:
    op.ignore("seed", "ratio", "is_test", "consumed_inputs")
    return arrays[0]


MOVES: dict[str, tuple[tuple[int, ...] | None, Callable[[Importer, Operation, Arrays], Any]]] = {
    "Concat": (None, _concat),
    "Dropout": ((0,), _same),
    "Expand": ((0,), _expand),
    "Flatten": ((0,), _flatten),
    "Gather": ((0,), _gather),
    "Identity": ((0,), _same),
    "ReduceSum": ((0,), _total),
    "Reshape": ((0,), _reshape),
    "Slice": ((0,), _slice),
    "Split": ((0,), _split),
    "Squeeze": ((0,), _squeeze),
    "Tile": ((0,), _tile),
    "Transpose": ((0,), _transpose),
    "Unsqueeze": ((0,), _unsqueeze),
    "Where": ((1, 2), _where),
}
"""Operators that move elements, with the inputs whose elements move; None for all. What is done to
numbers is done to the factors of N."""

NUMPY_OPERATORS = frozenset(MOVES) | frozenset(VALUES)
