"""Linear layers, Flatten, and products of matrices."""

from typing import Any

import numpy as np

from portacnn import layers as L
from portacnn.layers import Layer
from portacnn.onnx.builder import GraphBuilder, bias_of, emitter
from portacnn.onnx.importer import Importer, Value, operator
from portacnn.onnx.reading import Operation, brief


@emitter(L.Linear)
def write_linear(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add("Gemm", [x, graph.weight(layer, "weight"), *bias_of(graph, layer)], transB=1)


@operator("Gemm")
def read_gemm(at: Importer, op: Operation) -> Value:
    x, weight, bias = at.value(op), at.weight(op, 1), at.optional_weight(op, 2)
    op.ignore("broadcast")
    if len(x.shape) != 1 or op.whole("transA", 0):
        raise op.wrong(f"expected samples (F,) and no transA, got {brief(x.shape)}")
    if weight.array.ndim != 2:
        raise op.wrong(f"expected a matrix as weight, got {brief(weight.array.shape)}")
    matrix = weight.array if op.whole("transB", 0) else weight.array.T
    matrix = _scaled(at, matrix, op.real("alpha", 1.0))
    state = {"weight": weight._replace(array=matrix)}
    beta = op.real("beta", 1.0)
    if bias is not None:
        outputs = matrix.shape[0]
        if bias.array.size not in (1, outputs) or any(n != 1 for n in bias.array.shape[:-1]):
            raise op.wrong(
                f"expected a bias of 1 or {outputs} elements, got {brief(bias.array.shape)}"
            )
        row = _scaled(at, bias.array.reshape(-1), beta)
        at.source.budget.take(8 * outputs)
        state["bias"] = bias._replace(array=np.broadcast_to(row, (outputs,)))
    return at.add(op, L.Linear(x.shape[0], matrix.shape[0], bias is not None), x, **state)


def _scaled(at: Importer, array: Any, factor: float) -> Any:
    if factor == 1.0:
        return array
    at.source.budget.take(array.nbytes)
    return (array * factor).astype(array.dtype)


@emitter(L.Flatten)
def write_flatten(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add("Flatten", [x], axis=1)


@emitter(L.MatMul)
def write_matmul(graph: GraphBuilder, layer: Any, *inputs: str) -> str:
    return graph.add("MatMul", inputs)


@emitter(L.MatMulWith)
def write_matmul_with(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add("MatMul", [x, graph.weight(layer, "weight")])


@operator("MatMul")
def read_matmul(at: Importer, op: Operation) -> Value:
    x, other = at.value(op), at.given(op, 1)
    if isinstance(other, Value):
        return at.add(op, L.MatMul(), x, other)
    weight = at.weight(op, 1)
    if weight.array.ndim != 2:
        raise op.wrong(f"expected a matrix as weight, got {brief(weight.array.shape)}")
    features, outputs = weight.array.shape
    if len(x.shape) == 1:
        layer: Layer = L.Linear(features, outputs, bias=False)
        return at.add(op, layer, x, weight=weight._replace(array=weight.array.T))
    return at.add(op, L.MatMulWith(outputs), x, weight=weight)
