"""Compute the outputs of operators whose inputs are known when the file is read.

Operators that shapes are computed with are NumPy functions (``numpy_operators``), which may use
every axis and any dtype. All others are run as the layers that they are read as.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from portacnn.layers import Graph
from portacnn.layers.building import building_from
from portacnn.onnx import counts
from portacnn.onnx.counts import Count, Unknown
from portacnn.onnx.importer import COMPUTES, OPERATORS, Importer
from portacnn.onnx.numpy_operators import (
    MOVES,
    NUMPY_OPERATORS,
    VALUES,
    alike,
    dtype_of_cast,
    reduced,
)
from portacnn.onnx.reading import Operation, brief
from portacnn.onnx.values import Dim, Known, product, shown


def fold(at: Importer, op: Operation, given: Sequence[Known | None]) -> list[Known]:
    """Return the outputs of an operation whose inputs are all known."""
    if op.kind in _OF_SHAPES:
        return [_OF_SHAPES[op.kind](at, op, given)]
    if op.kind == "Expand" and (to := given[1:]) and to[0] and to[0].per_sample is not None:
        return [_expanded(op, given)]
    if any(known is not None and known.across is not None for known in given):
        return [_across(at, op, given)]
    counted = any(known is not None and known.per_sample is not None for known in given)
    learn = any(known is not None and known.learn for known in given)
    arrays = [None if known is None else known.array for known in given]
    if op.kind in MOVES:
        which, move = MOVES[op.kind]
        chosen = [i for i in (which or range(len(given))) if i < len(given)]
        names = {known.name for i in chosen if (known := given[i]) is not None}
        name = names.pop() if len(chosen) == 1 else ""
        made = _listed(move(at, op, arrays))
        factors: list[Any] = [None] * len(made)
        if counted:
            _no_count(op, [known for i, known in enumerate(given) if i not in chosen])
            factors = _listed(move(at, op, _factors(given, chosen)))
        return [_taken(at, array, learn, name, b) for array, b in zip(made, factors, strict=True)]
    if not counted and op.kind in VALUES:
        return [_taken(at, VALUES[op.kind](at, op, arrays), learn)]
    if counted and (op.kind in counts.FUNCTIONS or op.kind in ("Cast", "CastLike", "ReduceProd")):
        return [_counted(at, op, [known for known in given if known is not None])]
    _no_count(op, given)
    if op.kind in COMPUTES:
        return _listed(OPERATORS[op.kind](at, op))
    if op.kind not in OPERATORS:
        raise op.wrong("it is supported for numbers that do not depend on the number of samples")
    return _run(at, op, given)


def _listed(made: Any) -> list[Any]:
    return made if isinstance(made, list) else [made]


def _taken(at: Importer, array: Any, learn: bool, name: str = "", per_sample: Any = None) -> Known:
    array = np.asarray(array)
    if array.base is None:
        at.source.budget.take(array.nbytes)
    if per_sample is not None and not np.any(per_sample):
        per_sample = None
    return Known(array, learn, name, per_sample)


def _no_count(op: Operation, given: Sequence[Known | None]) -> None:
    if any(known is not None and known.per_sample is not None for known in given):
        raise op.wrong(
            "it computes with the number of samples, which is unknown; only shapes that keep it "
            "are supported"
        )


def _factors(given: Sequence[Known | None], chosen: Sequence[int]) -> list[Any]:
    """Return the inputs with the factors of N instead of the numbers, for the chosen ones."""
    return [
        known
        if known is None
        else known.array
        if i not in chosen
        else np.zeros_like(known.array)
        if known.per_sample is None
        else known.per_sample
        for i, known in enumerate(given)
    ]


def _counted(at: Importer, op: Operation, given: Sequence[Known]) -> Known:
    """Compute with numbers that contain N."""
    numbers = [
        Count(k.array, np.zeros_like(k.array) if k.per_sample is None else k.per_sample)
        for k in given
    ]
    if any(n.a.size > 1024 for n in numbers):
        raise op.wrong("it computes with the number of samples in more than 1024 elements")
    try:
        if op.kind in ("Cast", "CastLike"):
            made = counts.cast(numbers[0], dtype_of_cast(op, [k.array for k in given]))
        elif op.kind == "ReduceProd":
            axes, kept = reduced(op, [k.array for k in given])
            made = counts.product(numbers[0], axes, kept)
        else:
            alike(op, [k.array for k in given])
            made = counts.FUNCTIONS[op.kind](*numbers)
    except Unknown:
        raise op.wrong(
            "it computes with the number of samples, which is unknown, and the result is not a "
            "fixed number of elements for each sample"
        ) from None
    return _taken(at, np.asarray(made.a), False, "", np.asarray(made.b))


def _across(at: Importer, op: Operation, given: Sequence[Known | None]) -> Known:
    """Return an array with equal elements along the batch, after an operator that works on each
    element or adds axes."""
    known = [k for k in given if k is not None]
    ranks = {k.array.ndim for k in known if k.across is not None}
    places = {k.across for k in known if k.across is not None}
    elementwise = op.kind in ("Identity", "Cast", "CastLike") or op.kind in counts.FUNCTIONS
    rank = max(k.array.ndim for k in known)
    if not elementwise or len(places) != 1 or ranks != {rank}:
        raise op.wrong("a constant that is repeated for each sample is not supported here")
    made = fold(at, op, [None if k is None else k._replace(across=None) for k in given])[0]
    return made._replace(across=places.pop())


# --- operators as layers --------------------------------------------------------------------------


def _run(at: Importer, op: Operation, given: Sequence[Known | None]) -> list[Known]:
    """Run the layers that an operator is read as. The first axis of its first input is the
    batch."""
    first = given[0]
    if first is None or first.array.dtype.kind != "f" or not first.array.size:
        what = "missing" if first is None else f"{first.array.dtype} {brief(first.array.shape)}"
        raise op.wrong(f"its input 0 is {what}; expected a floating-point constant")
    rows = first.array.reshape(first.array.shape or (1,))
    inner = Importer(at.source, rows.shape[1:], rows.shape[0])
    inner.values = {
        name: known for name, known in zip(op.inputs, given, strict=True) if name and known
    }
    inner.values[op.inputs[0]] = inner.input
    values = _listed(OPERATORS[op.kind](inner, op))
    made: list[Known] = []
    for value in values:
        if isinstance(value, Known):
            made.append(value)
            continue
        if value.at != 0 or value.rows != 1:
            raise op.wrong("it is not supported for a constant")
        array = rows
        if nodes := inner.leading_to(value):
            widest = sum(prod(node.layer.output_shape) for node in nodes)
            at.source.budget.take(16 * len(rows) * (widest + prod(rows.shape[1:])))
            graph = Graph(*nodes)
            with building_from(inner.state_of(nodes)):
                graph.build(rows.shape[1:], device="numpy", dtype="float64")
            array = np.asarray(graph(rows.astype(np.float64))).astype(rows.dtype)
        array = array if first.array.ndim else array.reshape(array.shape[1:])
        made.append(Known(array, any(k is not None and k.learn for k in given)))
    return made


# --- shapes ---------------------------------------------------------------------------------------


def _dims_of(op: Operation, given: Sequence[Known | None]) -> list[Dim]:
    known = given[0] if given else None
    if known is None:
        raise op.wrong("its input 0 is missing")
    return [(n, 0) if i != known.across else (0, 1) for i, n in enumerate(known.array.shape)]


def _shape(at: Importer, op: Operation, given: Sequence[Known | None]) -> Known:
    return shape_of(op, _dims_of(op, given))


def shape_of(op: Operation, dims: list[Dim]) -> Known:
    """Return the output of Shape: some of these sizes."""
    end = op.whole("end", len(dims)) if op.has("end") else None
    return _known_dims(dims[slice(op.whole("start", 0), end)])


def _size(at: Importer, op: Operation, given: Sequence[Known | None]) -> Known:
    return size_of(_dims_of(op, given))


def size_of(dims: list[Dim]) -> Known:
    """Return the output of Size: the number of elements."""
    (count,) = (_known_dims([product(dims)]),)
    return count._replace(
        array=count.array.reshape(()),
        per_sample=None if count.per_sample is None else count.per_sample.reshape(()),
    )


def _known_dims(dims: list[Dim]) -> Known:
    a, b = (np.array([dim[i] for dim in dims], np.int64) for i in (0, 1))
    return Known(a, per_sample=b if b.any() else None)


def _wanted(op: Operation, known: Known | None) -> tuple[list[int], int | None]:
    """Return a shape to make, with 1 instead of N, and the axis of N."""
    if known is None or known.array.dtype.kind not in "iu" or known.array.size > 16:
        raise op.wrong("its shape must be a short list of whole numbers")
    dims = known.dims()
    places = [i for i, (_, b) in enumerate(dims) if b]
    if len(places) > 1 or any(dims[i] != (0, 1) for i in places):
        raise op.wrong(f"a constant of shape {shown(dims)} is not supported")
    if any(not 0 <= a < 1 << 31 for a, _ in dims):
        raise op.wrong(f"a shape {shown(dims)} is invalid")
    return [1 if b else a for a, b in dims], places[0] if places else None


def _expanded(op: Operation, given: Sequence[Known | None]) -> Known:
    """Return a constant that is repeated for each sample."""
    known, to = given[:2]
    shape, place = _wanted(op, to)
    if known is None or known.per_sample is not None or known.across is not None:
        raise op.wrong("its input 0 is missing or depends on the number of samples")
    left = len(shape) - known.array.ndim  # axes that are added
    if left < 0 or place is None or (place >= left and known.array.shape[place - left] != 1):
        raise op.wrong(
            f"a constant {brief(known.array.shape)} cannot be repeated for each sample of "
            f"{brief(shape)}"
        )
    try:
        array = np.broadcast_to(known.array, np.broadcast_shapes(known.array.shape, tuple(shape)))
    except ValueError:
        raise op.wrong(
            f"a constant {brief(known.array.shape)} does not broadcast to {brief(shape)}"
        ) from None
    return known._replace(array=array, across=place)


def _constant_of_shape(at: Importer, op: Operation, given: Sequence[Known | None]) -> Known:
    shape, place = _wanted(op, given[0])
    found = op.any_of(("value", "t"))
    value = np.zeros((), np.float32) if found is None else at.source.array(found[1])
    if value.size != 1:
        raise op.wrong("its value must be one number")
    if 0 in shape and len(shape) > 1:
        raise op.wrong(f"a tensor of shape {brief(shape)} is empty")
    at.source.budget.take(prod(shape) * value.itemsize)
    return Known(np.full(shape, value.reshape(()), value.dtype), across=place)


_OF_SHAPES = {"ConstantOfShape": _constant_of_shape, "Shape": _shape, "Size": _size}
FOLDED = NUMPY_OPERATORS | frozenset(_OF_SHAPES)
"""All operators that are computed here. Those that are not in ``OPERATORS`` are supported for
constants only."""
