"""Emitters of graphs, and of the layers that occur only in graphs. ``export_layers`` has the
others."""

from typing import Any

from portacnn.errors import ArgumentError
from portacnn.layers import (
    CELU,
    SELU,
    Arithmetic,
    ArithmeticWith,
    Clip,
    Concat,
    Elementwise,
    Graph,
    HardSigmoid,
    HardSwish,
    MatMul,
    MatMulWith,
    Pad,
    Permute,
    PReLU,
    Reduce,
    Reshape,
    Slice,
    Take,
)
from portacnn.layers.graph import INPUT
from portacnn.models.graph_model import GraphModel
from portacnn.onnx.builder import GraphBuilder, emitter

_ARITHMETIC = {
    "add": "Add",
    "subtract": "Sub",
    "multiply": "Mul",
    "divide": "Div",
    "power": "Pow",
    "maximum": "Max",
    "minimum": "Min",
}
_FUNCTIONS = {
    "abs": "Abs",
    "cos": "Cos",
    "erf": "Erf",
    "exp": "Exp",
    "log": "Log",
    "negative": "Neg",
    "reciprocal": "Reciprocal",
    "sin": "Sin",
    "softsign": "Softsign",
    "sqrt": "Sqrt",
}


@emitter(Graph)
def graph_(graph: GraphBuilder, layer: Any, x: str) -> str:
    values = {INPUT: x}
    for name, child, inputs in layer.nodes:
        values[name] = graph.layer(child, *(values[i] for i in inputs))
    return values[layer.nodes[-1].name]


@emitter(GraphModel)
def graph_model(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.layer(layer.children["graph"], x)


@emitter(Arithmetic)
def arithmetic(graph: GraphBuilder, layer: Any, *inputs: str) -> str:
    return graph.add(_ARITHMETIC[layer.kind_], inputs)


@emitter(ArithmeticWith)
def arithmetic_with(graph: GraphBuilder, layer: Any, x: str) -> str:
    value = graph.weight(layer, "value")
    return graph.add(_ARITHMETIC[layer.kind_], [value, x] if layer.constant_first else [x, value])


@emitter(Concat)
def concat(graph: GraphBuilder, layer: Any, *inputs: str) -> str:
    return graph.add("Concat", inputs, axis=layer.axis)


@emitter(MatMul)
def matmul(graph: GraphBuilder, layer: Any, *inputs: str) -> str:
    return graph.add("MatMul", inputs)


@emitter(MatMulWith)
def matmul_with(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add("MatMul", [x, graph.weight(layer, "weight")])


@emitter(Reshape)
def reshape(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.reshape(x, (0, *layer.shape))


@emitter(Permute)
def permute(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add("Transpose", [x], perm=layer.dims)


@emitter(Pad)
def pad(graph: GraphBuilder, layer: Any, x: str) -> str:
    mode = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}[
        layer.mode
    ]
    if mode == "wrap" and graph.opset < 19:
        raise ArgumentError(f"circular padding needs opset 19 or newer, got {graph.opset}")
    sides = [0, *(before for before, _ in layer.pads), 0, *(after for _, after in layer.pads)]
    value = [graph.constant(float(layer.value))] if layer.value else []
    return graph.add("Pad", [x, graph.constant(sides, dtype="int64"), *value], mode=mode)


@emitter(Slice)
def slice_(graph: GraphBuilder, layer: Any, x: str) -> str:
    axes = range(1, len(layer.starts) + 1)
    numbers = (layer.starts, layer.stops, list(axes), layer.steps)
    return graph.add("Slice", [x, *(graph.constant(list(row), dtype="int64") for row in numbers)])


@emitter(Take)
def take(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add(
        "Gather", [x, graph.constant(list(layer.indices), dtype="int64")], axis=layer.axis
    )


@emitter(Reduce)
def reduce(graph: GraphBuilder, layer: Any, x: str) -> str:
    y = graph.reduce("ReduceMean" if layer.reduction == "mean" else "ReduceSum", x, layer.axes)
    return y if layer.keepdims else graph.reshape(y, (0, *layer.output_shape))


@emitter(SELU)
def selu(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add("Selu", [x], alpha=float(layer.alpha), gamma=float(layer.gamma))


@emitter(CELU)
def celu(graph: GraphBuilder, layer: Any, x: str) -> str:
    """ELU in other units. Only ONNX's own operator covers a negative alpha."""
    if layer.alpha < 0:
        return graph.add("Celu", [x], alpha=float(layer.alpha))
    alpha = graph.constant(float(layer.alpha))
    return graph.add("Mul", [graph.add("Elu", [graph.add("Div", [x, alpha])], alpha=1.0), alpha])


@emitter(HardSigmoid)
def hard_sigmoid(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add("HardSigmoid", [x], alpha=float(layer.alpha), beta=float(layer.beta))


@emitter(HardSwish)
def hard_swish(graph: GraphBuilder, layer: Any, x: str) -> str:
    """Written as its formula: the operator exists from opset 14 on."""
    return graph.add("Mul", [x, graph.add("HardSigmoid", [x], alpha=1.0 / 6.0, beta=0.5)])


@emitter(Clip)
def clip(graph: GraphBuilder, layer: Any, x: str) -> str:
    bounds = [
        "" if bound is None else graph.constant(float(bound)) for bound in (layer.min, layer.max)
    ]
    while bounds and not bounds[-1]:
        bounds.pop()
    return graph.add("Clip", [x, *bounds])


@emitter(PReLU)
def prelu(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add("PRelu", [x, graph.weight(layer, "weight")])


@emitter(Elementwise)
def elementwise(graph: GraphBuilder, layer: Any, x: str) -> str:
    """Mish is written as its formula: the operator exists from opset 18 on."""
    if layer.function == "mish":
        return graph.add("Mul", [x, graph.add("Tanh", [graph.add("Softplus", [x])])])
    return graph.add(_FUNCTIONS[layer.function], [x])
