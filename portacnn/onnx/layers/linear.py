"""Linear layers, Flatten, and products of matrices."""

from typing import Any

import numpy as np

from portacnn import layers as L
from portacnn.layers import Layer
from portacnn.onnx.builder import GraphBuilder, bias_of, emitter
from portacnn.onnx.importer import Importer, Known, Value, operator
from portacnn.onnx.layers.join import repeated
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
    return product(at, op, at.given(op, 0), at.given(op, 1))


def product(at: Importer, op: Operation, a: Any, b: Any) -> Value:
    """Add the product of two values, or of a value and a constant matrix or vector on either
    side."""
    if isinstance(a, Value) and isinstance(b, Value):
        return at.add(op, L.MatMul(), a, b)
    x, weight = (a, b) if isinstance(a, Value) else (b, a)
    if not isinstance(x, Value) or weight is None or weight.array.dtype.kind != "f":
        raise op.wrong("expected a value, and a value or a floating-point constant")
    if x is a and weight.array.ndim <= 2:
        return _times(at, op, x, weight)
    if x is a:
        return at.add(op, L.MatMul(), x, repeated(at, op, weight, x, learn=True))
    if len(x.shape) < 2:
        raise op.wrong("it operates on the batch (axis 0) of its second factor")
    row = weight.array.ndim == 1
    matrix = weight._replace(array=weight.array[None]) if row else weight
    y = at.add(op, L.MatMul(), repeated(at, op, matrix, x, learn=True), x)
    return at.reshaped(op, y, (*y.shape[:-2], y.shape[-1])) if row else y


def _times(at: Importer, op: Operation, x: Value, weight: Known) -> Value:
    """Add x @ weight: a matrix, or a vector, which sums the last axis."""
    array = weight.array
    if not array.ndim or 0 in array.shape:
        raise op.wrong(f"expected a matrix or a vector as weight, got {brief(array.shape)}")
    matrix = array[:, None] if array.ndim == 1 else array
    features, outputs = matrix.shape
    if len(x.shape) == 1:
        layer: Layer = L.Linear(features, outputs, bias=False)
        y = at.add(op, layer, x, weight=weight._replace(array=matrix.T))
    else:
        y = at.add(op, L.MatMulWith(outputs), x, weight=weight._replace(array=matrix))
    return at.reshaped(op, y, y.shape[:-1]) if array.ndim == 1 else y
