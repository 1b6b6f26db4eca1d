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
}
_OPERATORS = {kind: name for name, kind in reversed(_ARITHMETIC.items())}  # add: Add, not Sum


@emitter(L.Arithmetic)
def write_arithmetic(graph: GraphBuilder, layer: Any, *inputs: str) -> str:
    return graph.add(_OPERATORS[layer.kind_], inputs)


@emitter(L.ArithmeticWith)
def write_arithmetic_with(graph: GraphBuilder, layer: Any, x: str) -> str:
    value = graph.weight(layer, "value")
    return graph.add(_OPERATORS[layer.kind_], [value, x] if layer.constant_first else [x, value])


@operator(*_ARITHMETIC)
def read_arithmetic(at: Importer, op: Operation) -> Any:
    kind = _ARITHMETIC[op.kind]
    given = [at.given(op, i) for i in range(len(op.inputs))]
    if (
        None in given
        or not given
        or (op.kind in ("Add", "Sub", "Mul", "Div", "Pow") and len(given) != 2)
    ):
        raise op.wrong(f"it has {len(given)} inputs, or one is omitted")
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
    if array.dtype.kind not in "fiu":
        raise op.wrong(f"expected numbers, got {array.dtype}")
    # before opset 7, an axis attribute aligns the smaller input
    if legacy is not None and array.ndim:
        if not -1 <= legacy < x.rank:
            raise op.wrong(f"axis {legacy} is outside the {x.rank} axes")
        array = array.reshape(
            array.shape + (1,) * (x.rank - legacy - array.ndim if legacy >= 0 else 0)
        )
    if array.dtype.kind != "f":
        at.source.budget.take(8 * array.size)
        array = array.astype(np.float64)
    array = of_sample(op, array, x)
    learn = constant.learn and array.size > 1 and kind in ("add", "subtract", "multiply", "divide")
    learn = learn and not _normalizes_images(at, constant, array.shape, x)
    layer = L.ArithmeticWith(kind, array.shape, constant is a, learn)
    return at.add(op, layer, x, value=constant._replace(array=array))


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
    values = [at.value(op, i) for i in range(len(op.inputs))]
    if not values:
        raise op.wrong("it has no inputs")
    axis = at.axis(op, op.whole("axis", 1), values[0].rank)
    return values[0] if len(values) == 1 else at.add(op, L.Concat(axis), *values)
