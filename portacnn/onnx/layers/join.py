"""Arithmetic on two values, or a value and a constant; concatenation."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from portacnn import layers as L
from portacnn.onnx.builder import GraphBuilder, emitter
from portacnn.onnx.importer import (
    Importer,
    Known,
    Value,
    of_sample,
    operator,
)
from portacnn.onnx.reading import Operation

_ARITHMETIC = {
    "Add": "add",
    "Sum": "add",
    "Sub": "subtract",
    "Mul": "multiply",
    "Div": "divide",
    "Pow": "power",
    "Max": "maximum",
    "Min": "minimum",
    "Mod": "fmod",
    "Equal": "equal",
    "Greater": "greater",
    "GreaterOrEqual": "greater_equal",
    "Less": "less",
    "LessOrEqual": "less_equal",
    "And": "logical_and",
    "Or": "logical_or",
    "Xor": "logical_xor",
}
_OPERATORS = {kind: name for name, kind in reversed(_ARITHMETIC.items())}  # add: Add, not Sum
_OPERATORS["not_equal"] = "Equal"
_SEVERAL = ("Sum", "Max", "Min")  # take any number of inputs
_COMPARED = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
_LOGICAL = ("And", "Or", "Xor")
_LEARNT = ("add", "subtract", "multiply", "divide")


@emitter(L.Arithmetic)
def write_arithmetic(graph: GraphBuilder, layer: Any, *inputs: str) -> str:
    """Write the operator. Truth values are bool in ONNX, and numbers here."""
    name = _OPERATORS[layer.kind_]
    if name in _LOGICAL:
        inputs = tuple(graph.cast(x, "bool") for x in inputs)
    y = graph.add(name, inputs, **({"fmod": 1} if name == "Mod" else {}))
    if layer.kind_ == "not_equal":
        y = graph.add("Not", [y])
    return graph.cast(y) if name in (*_COMPARED, *_LOGICAL) else y


@emitter(L.ArithmeticWith)
def write_arithmetic_with(graph: GraphBuilder, layer: Any, x: str) -> str:
    value = graph.weight(layer, "value")
    return write_arithmetic(graph, layer, *([value, x] if layer.constant_first else [x, value]))


@operator(*_ARITHMETIC)
def read_arithmetic(at: Importer, op: Operation) -> Any:
    kind = _ARITHMETIC[op.kind]
    given = [at.given(op, i) for i in range(len(op.inputs))]
    if None in given or not given or (op.kind not in _SEVERAL and len(given) != 2):
        raise op.wrong(f"it has {len(given)} inputs, or one is omitted")
    if op.kind == "Mod" and not op.whole("fmod", 0):
        raise op.wrong("of floating-point values it must have fmod=1")
    legacy = op.whole("axis", -1) if at.opset < 7 and op.whole("broadcast", 0) else None
    op.ignore("consumed_inputs")
    result = given[0]
    for other in given[1:]:
        result = _two(at, op, kind, result, other, legacy)
    return result


def _two(at: Importer, op: Operation, kind: str, a: Any, b: Any, legacy: int | None) -> Any:
    if isinstance(a, Value) and isinstance(b, Value):
        return at.add(op, L.Arithmetic(kind), a, b)
    x, constant = (a, b) if isinstance(a, Value) else (b, a)
    array = constant.array
    # before opset 7, an axis attribute aligns the smaller input
    if legacy is not None and array.ndim:
        if not -1 <= legacy < x.rank:
            raise op.wrong(f"axis {legacy} is outside the {x.rank} axes")
        array = array.reshape(
            array.shape + (1,) * (x.rank - legacy - array.ndim if legacy >= 0 else 0)
        )
    array = of_sample(op, _floats(at, op, array), x)
    learn = constant.learn and array.size > 1 and kind in _LEARNT
    learn = learn and not _normalizes_images(at, constant, array.shape, x)
    layer = L.ArithmeticWith(kind, array.shape, constant is a, learn)
    return at.add(op, layer, x, value=constant._replace(array=array))


def _floats(at: Importer, op: Operation, array: Any) -> Any:
    """Return numbers or truth values as floating point."""
    if array.dtype.kind not in "fiub":
        raise op.wrong(f"expected numbers, got {array.dtype}")
    if array.dtype.kind != "f":
        at.source.budget.take(8 * array.size)
        array = array.astype(np.float64)
    return array


def repeated(at: Importer, op: Operation, known: Known, x: Value, learn: bool = False) -> Value:
    """Add a layer that returns a constant for each sample, with as many axes as x.

    Args:
        learn: whether it is a weight, if it is an initializer of several elements.
    """
    array = of_sample(op, _floats(at, op, known.array), x)
    array = array.reshape((1,) * (len(x.shape) - array.ndim) + array.shape)
    layer = L.Constant(array.shape, learn and known.learn and array.size > 1)
    return at.add(op, layer, x, value=known._replace(array=array))


def values_of(at: Importer, op: Operation, learn: bool = False) -> list[Value]:
    """Return the inputs, constants ``repeated`` for each sample."""
    given = [at.given(op, i) for i in range(len(op.inputs))]
    x = next((value for value in given if isinstance(value, Value)), None)
    if x is None or None in given:
        at.value(op, given.index(None) if None in given else 0)  # raises
    return [
        value if isinstance(value, Value) else repeated(at, op, value, x, learn)  # type: ignore[arg-type]
        for value in given
    ]


@emitter(L.Constant)
def write_constant(graph: GraphBuilder, layer: Any, x: str) -> str:
    count = [graph.constant([n], dtype="int64") for n in (0, 1)]
    batch = graph.add("Slice", [graph.add("Shape", [x]), *count])
    shape = graph.constant(list(layer.shape), dtype="int64")
    to = graph.add("Concat", [batch, shape], axis=0)
    return graph.add("Expand", [graph.weight(layer, "value"), to])


@emitter(L.Where)
def write_where(graph: GraphBuilder, layer: Any, condition: str, a: str, b: str) -> str:
    return graph.add("Where", [graph.cast(condition, "bool"), a, b])


@operator("Where")
def read_where(at: Importer, op: Operation) -> Value:
    if len(op.inputs) != 3:
        raise op.wrong(f"expected 3 inputs, got {len(op.inputs)}")
    return at.add(op, L.Where(), *values_of(at, op))


def _normalizes_images(at: Importer, constant: Known, shape: Sequence[int], x: Value) -> bool:
    """Return whether a constant is the mean or standard deviation of images: one number for each
    color, before the first layer with weights. ``export`` names a weight there by its path."""
    channels = x.shape[0] if len(x.shape) == 3 else 0
    return (
        x.node in at.unlearned
        and 1 < channels <= 4
        and tuple(shape) == (channels, 1, 1)
        and not constant.name.endswith(".value")
    )


@emitter(L.Concat)
def write_concat(graph: GraphBuilder, layer: Any, *inputs: str) -> str:
    return graph.add("Concat", inputs, axis=layer.axis)


@operator("Concat")
def read_concat(at: Importer, op: Operation) -> Any:
    values = values_of(at, op, learn=True)
    axis = at.axis(op, op.whole("axis", 1), values[0].rank)
    return values[0] if len(values) == 1 else at.add(op, L.Concat(axis), *values)
