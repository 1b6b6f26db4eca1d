"""Activation layers: one op on each element."""

from typing import Any, ClassVar

from portacnn import ops
from portacnn.layers.base import Layer, Shape
from portacnn.runtime import Array


class Activation(Layer):
    """A layer that is one elementwise op with no parameters. A subclass names the op and its backward."""

    op: ClassVar[Any]
    op_backward: ClassVar[Any]

    def infer(self, shape: Shape) -> Shape:
        return shape

    def forward(self, x: Array, *, train: bool = False, keep: bool | None = None) -> Array:
        y, cache = type(self).op(x, keep=train if keep is None else keep)
        self._keep(cache)
        return y

    def backward(self, dy: Array, *, need_dx: bool = True) -> Array | None:
        return type(self).op_backward(dy, self._kept())


class ReLU(Activation):
    """max(x, 0), any shape."""

    op, op_backward = ops.relu, ops.relu_backward


class Sigmoid(Activation):
    """1 / (1 + exp(-x)), any shape."""

    op, op_backward = ops.sigmoid, ops.sigmoid_backward
