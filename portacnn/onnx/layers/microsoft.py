"""Operators of the domain com.microsoft with plain meanings, which onnxruntime's optimizer writes.

Their definitions: github.com/microsoft/onnxruntime, docs/ContribOperators.md.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from portacnn import layers as L
from portacnn.layers import Layer
from portacnn.onnx.importer import Importer, Known, Value, of_sample, operator
from portacnn.onnx.layers.activation import swish
from portacnn.onnx.layers.conv import read_conv
from portacnn.onnx.layers.linear import product, read_gemm
from portacnn.onnx.reading import Operation


@operator("com.microsoft.Gelu")
def read_gelu(at: Importer, op: Operation) -> Value:
    return at.add(op, L.GELU(), at.value(op))


@operator("com.microsoft.BiasGelu", "com.microsoft.FastGelu")
def read_bias_gelu(at: Importer, op: Operation) -> Value:
    """Read GELU of x + bias. FastGelu approximates it by tanh, and may lack the bias."""
    x, bias = at.value(op), at.optional_weight(op, 1)
    if bias is None and op.kind.endswith("BiasGelu"):
        raise op.wrong("its input 1 is missing")
    if bias is not None:
        array = of_sample(op, bias.array, x)
        layer = L.ArithmeticWith("add", array.shape, learn=bias.learn)
        x = at.add(op, layer, x, value=bias._replace(array=array))
    return at.add(op, L.GELU("tanh" if op.kind.endswith("FastGelu") else "none"), x)


@operator("com.microsoft.QuickGelu")
def read_quick_gelu(at: Importer, op: Operation) -> Value:
    return swish(at, op, op.real("alpha", 1.702))


_ACTIVATIONS: dict[str, Callable[..., Layer]] = {
    "Clip": lambda low, high: L.Clip(low, high),
    "HardSigmoid": lambda alpha, beta: L.HardSigmoid(alpha, beta),
    "LeakyRelu": lambda alpha: L.LeakyReLU(alpha),
    "Relu": L.ReLU,
    "Sigmoid": L.Sigmoid,
    "Tanh": L.Tanh,
}


def _activated(at: Importer, op: Operation, y: Value, parameters: list[float]) -> Value:
    """Add the activation that an operator names."""
    name = op.word("activation", "")
    if not name:
        return y
    if name not in _ACTIVATIONS:
        raise op.wrong(f"activation must be one of {', '.join(_ACTIVATIONS)}; got {name[:80]!r}")
    try:
        layer = _ACTIVATIONS[name](*parameters)
    except TypeError:
        raise op.wrong(f"activation {name} has {len(parameters)} parameters") from None
    return at.add(op, layer, y)


@operator("com.microsoft.FusedConv")
def read_fused_conv(at: Importer, op: Operation) -> Value:
    """Read a convolution, a sum with input 3 if there is one, and an activation."""
    y = read_conv(at, op)
    if (other := at.given(op, 3)) is not None:
        if isinstance(other, Known):
            raise op.wrong("its input 3 is a constant; expected a value to add")
        y = at.add(op, L.Arithmetic("add"), y, other)
    found = op.any_of(("activation_params", "floats"))
    given = [] if found is None else [float(str(np.float32(n))) for n in found[1]]
    return _activated(at, op, y, given)


@operator("com.microsoft.FusedGemm")
def read_fused_gemm(at: Importer, op: Operation) -> Value:
    y = read_gemm(at, op)
    names = ("activation_alpha", "activation_beta", "activation_gamma")
    given = [op.real(name, 0.0) for name in names if op.has(name)]
    return _activated(at, op, y, given)


@operator("com.microsoft.FusedMatMul", "com.microsoft.TransposeMatMul")
def read_fused_matmul(at: Importer, op: Operation) -> Any:
    """Read alpha * a @ b, with the last two axes of a and b swapped if transA and transB say so."""
    if op.whole("transBatchA", 0) or op.whole("transBatchB", 0):
        raise op.wrong("transBatchA and transBatchB are not supported")
    factors = [
        _swapped(at, op, at.given(op, index), op.whole(name, 0))
        for index, name in enumerate(("transA", "transB"))
    ]
    y = product(at, op, *factors)
    alpha = op.real("alpha", 1.0)
    if alpha == 1.0:
        return y
    factor = Known(np.array(alpha))
    return at.add(op, L.ArithmeticWith("multiply", (), learn=False), y, value=factor)


def _swapped(at: Importer, op: Operation, x: Any, swap: int) -> Any:
    if x is None:
        raise op.wrong("an input is missing")
    if not swap:
        return x
    if isinstance(x, Known):
        array = x.array
        return x if array.ndim < 2 else x._replace(array=array.swapaxes(-1, -2))
    if len(x.shape) < 2:
        raise op.wrong("it would swap the batch (axis 0) with another axis")
    order = list(range(x.rank))
    order[-2:] = [order[-1], order[-2]]
    return at.add(op, L.Permute(order), x)
