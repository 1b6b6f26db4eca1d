"""Activations."""

from math import isfinite, prod, sqrt
from typing import Any

import numpy as np

from portacnn import layers as L
from portacnn.layers import Layer
from portacnn.models.lenet5 import ScaledTanh
from portacnn.onnx.builder import GraphBuilder, emitter
from portacnn.onnx.importer import Importer, Known, Value, of_sample, operator
from portacnn.onnx.reading import Operation


def _same(op_type: str, kind: type[Layer], **options: tuple[str, float]) -> None:
    """Register the emitter and converter of a layer that is equal to one operator.

    Args:
        options: by the attribute's name in ONNX, the layer's name and ONNX's default.
    """

    @emitter(kind)
    def write(graph: GraphBuilder, layer: Any, x: str) -> str:
        values = {name: float(getattr(layer, own)) for name, (own, _) in options.items()}
        return graph.add(op_type, [x], **values)

    @operator(op_type)
    def read(at: Importer, op: Operation) -> Value:
        values = {own: op.real(name, default) for name, (own, default) in options.items()}
        return at.add(op, kind(**values), at.value(op))


_same("Relu", L.ReLU)
_same("LeakyRelu", L.LeakyReLU, alpha=("negative_slope", 0.01))
_same("Elu", L.ELU, alpha=("alpha", 1.0))
_same(
    "Selu",
    L.SELU,
    alpha=("alpha", 1.67326319217681884765625),
    gamma=("gamma", 1.05070102214813232421875),
)
_same("Sigmoid", L.Sigmoid)
_same("HardSigmoid", L.HardSigmoid, alpha=("alpha", 0.2), beta=("beta", 0.5))
_same("Tanh", L.Tanh)


@emitter(L.SiLU)
def write_silu(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add("Mul", [x, graph.add("Sigmoid", [x])])


@operator("Swish")
def read_swish(at: Importer, op: Operation) -> Value:
    return swish(at, op, op.real("alpha", 1.0))


def swish(at: Importer, op: Operation, alpha: float) -> Value:
    """Add x * sigmoid(alpha * x)."""
    x = at.value(op)
    if alpha == 1.0:
        return at.add(op, L.SiLU(), x)
    factor = Known(np.array(alpha))
    scaled = at.add(op, L.ArithmeticWith("multiply", (), learn=False), x, value=factor)
    return at.add(op, L.Arithmetic("multiply"), x, at.add(op, L.Sigmoid(), scaled))


@emitter(L.GELU)
def write_gelu(graph: GraphBuilder, layer: Any, x: str) -> str:
    """Write Gelu from opset 20 on; before, write its formula."""
    if graph.opset >= 20:
        return graph.add("Gelu", [x], approximate=layer.approximate)
    if layer.approximate == "tanh":
        cube = graph.add("Mul", [graph.add("Mul", [x, x]), x])
        bent = graph.add("Add", [x, graph.add("Mul", [cube, graph.constant(0.044715)])])
        # sqrt(2 / pi)
        rising = graph.add("Tanh", [graph.add("Mul", [bent, graph.constant(0.7978845608028654)])])
    else:
        rising = graph.add("Erf", [graph.add("Div", [x, graph.constant(sqrt(2.0))])])
    below = graph.add("Mul", [graph.add("Add", [rising, graph.constant(1.0)]), graph.constant(0.5)])
    return graph.add("Mul", [x, below])


@operator("Gelu")
def read_gelu(at: Importer, op: Operation) -> Value:
    return at.add(op, L.GELU(op.word("approximate", "none")), at.value(op))


@emitter(L.Softplus)
def write_softplus(graph: GraphBuilder, layer: Any, x: str) -> str:
    """Write the threshold only if it has an effect: above 20, log(1 + exp(z)) equals z in
    float32."""
    if layer.beta == 1 and layer.threshold >= 20 and graph.dtype == "float32":
        return graph.add("Softplus", [x])
    beta = graph.constant(layer.beta)
    z = graph.add("Mul", [x, beta])
    y = graph.add("Div", [graph.add("Softplus", [z]), beta])
    return graph.add("Where", [graph.add("Greater", [z, graph.constant(layer.threshold)]), x, y])


@operator("Softplus")
def read_softplus(at: Importer, op: Operation) -> Value:
    return at.add(op, L.Softplus(), at.value(op))


@emitter(L.CELU)
def write_celu(graph: GraphBuilder, layer: Any, x: str) -> str:
    """Write CELU as a scaled ELU; for negative alpha, write ONNX's Celu, because the scaling would
    swap the two sides."""
    if layer.alpha < 0:
        return graph.add("Celu", [x], alpha=float(layer.alpha))
    alpha = graph.constant(float(layer.alpha))
    return graph.add("Mul", [graph.add("Elu", [graph.add("Div", [x, alpha])], alpha=1.0), alpha])


@operator("Celu")
def read_celu(at: Importer, op: Operation) -> Value:
    return at.add(op, L.CELU(op.real("alpha", 1.0)), at.value(op))


@emitter(L.HardSwish)
def write_hard_swish(graph: GraphBuilder, layer: Any, x: str) -> str:
    """Write the formula: the operator exists from opset 14 on only."""
    return graph.add("Mul", [x, graph.add("HardSigmoid", [x], alpha=1.0 / 6.0, beta=0.5)])


@operator("HardSwish")
def read_hard_swish(at: Importer, op: Operation) -> Value:
    return at.add(op, L.HardSwish(), at.value(op))


@emitter(L.Clip)
def write_clip(graph: GraphBuilder, layer: Any, x: str) -> str:
    bounds = [
        "" if bound is None else graph.constant(float(bound)) for bound in (layer.min, layer.max)
    ]
    while bounds and not bounds[-1]:
        bounds.pop()
    return graph.add("Clip", [x, *bounds])


@operator("Clip")
def read_clip(at: Importer, op: Operation) -> Value:
    least, most = at.number(op, 1, "min", None), at.number(op, 2, "max", None)
    bounds = [
        b if b is not None and isfinite(b) and abs(b) < 3.4e38 else None for b in (least, most)
    ]
    if least != least or most != most:
        raise op.wrong("a bound is NaN")
    return at.add(op, L.Clip(*bounds), at.value(op))


@emitter(L.PReLU)
def write_prelu(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add("PRelu", [x, graph.weight(layer, "weight")])


@operator("PRelu")
def read_prelu(at: Importer, op: Operation) -> Value:
    x, slope = at.value(op), at.weight(op, 1)
    array = slope.array
    if at.opset < 7 and array.ndim == 1 and array.size > 1:  # one for each channel
        array = array.reshape((-1,) + (1,) * (x.rank - 2))
    array = of_sample(op, array, x)
    return at.add(op, L.PReLU(array.shape), x, weight=slope._replace(array=array))


_FUNCTIONS = {
    "abs": "Abs",
    "acos": "Acos",
    "acosh": "Acosh",
    "asin": "Asin",
    "asinh": "Asinh",
    "atan": "Atan",
    "atanh": "Atanh",
    "ceil": "Ceil",
    "cos": "Cos",
    "cosh": "Cosh",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "log": "Log",
    "logical_not": "Not",
    "mish": "Mish",
    "negative": "Neg",
    "reciprocal": "Reciprocal",
    "round": "Round",
    "sign": "Sign",
    "sin": "Sin",
    "sinh": "Sinh",
    "softsign": "Softsign",
    "sqrt": "Sqrt",
    "tan": "Tan",
}


@emitter(L.Elementwise)
def write_elementwise(graph: GraphBuilder, layer: Any, x: str) -> str:
    """Write Mish by its formula: the operator exists from opset 18 on only. Truth values are bool
    in ONNX, and numbers here."""
    if layer.function == "nonzero":
        return graph.cast(graph.cast(x, "bool"))
    if layer.function == "logical_not":
        return graph.cast(graph.add("Not", [graph.cast(x, "bool")]))
    if layer.function == "mish":
        return graph.add("Mul", [x, graph.add("Tanh", [graph.add("Softplus", [x])])])
    return graph.add(_FUNCTIONS[layer.function], [x])


@operator(*_FUNCTIONS.values())
def read_elementwise(at: Importer, op: Operation) -> Value:
    function = next(name for name, kind in _FUNCTIONS.items() if kind == op.kind)
    return at.add(op, L.Elementwise(function), at.value(op))


@emitter(L.Softmax)
def write_softmax(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add("Softmax", [x], axis=layer.dim)


@emitter(L.LogSoftmax)
def write_log_softmax(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add("LogSoftmax", [x], axis=layer.dim)


@operator("Softmax", "LogSoftmax")
def read_softmax(at: Importer, op: Operation) -> Value:
    x, kind = at.value(op), {"Softmax": L.Softmax, "LogSoftmax": L.LogSoftmax}[op.kind]
    axis = at.axis(op, op.whole("axis", -1 if at.opset >= 13 else 1), x.rank)
    if at.opset >= 13 or all(n == 1 for n in x.shape[axis:]):
        return at.add(op, kind(axis), x)
    # Before opset 13, Softmax flattens all axes from ``axis`` on.
    flat = at.reshaped(op, x, (*x.shape[: axis - 1], prod(x.shape[axis - 1 :])))
    return at.reshaped(op, at.add(op, kind(axis), flat), x.shape)


@emitter(ScaledTanh)
def write_scaled_tanh(graph: GraphBuilder, layer: Any, x: str) -> str:
    y = graph.add("Tanh", [graph.add("Mul", [x, graph.constant(layer.slope)])])
    return graph.add("Mul", [y, graph.constant(layer.amplitude)])
