"""Dropout layers."""

from typing import Any, ClassVar

from portacnn import ops
from portacnn.arguments import real
from portacnn.errors import PortacnnError, ShapeError
from portacnn.layers.base import Layer, Shape
from portacnn.runtime import Array

_UNCHANGED = ()  # kept by a forward that dropped nothing


class Dropout(Layer):
    """In training each number is zero with probability p, and the others are divided by 1 - p; else nothing happens.

    What is dropped follows from ``seed`` and ``path``, which ``build`` gives, ``step`` and ``first`` (see ``Layer.at_step``),
    and the number's place in its sample: the same bits on every backend, however a batch is cut up. ``step`` counts the
    training forwards, unless it is an array: that belongs to whoever gave it.

    Args:
        p: the share to drop, 0 to 1.
    """

    op: ClassVar[Any] = ops.dropout
    op_backward: ClassVar[Any] = ops.dropout_backward
    axes: ClassVar[int | None] = None  # of one sample; None for any

    def __init__(self, p: float = 0.5) -> None:
        try:
            self.p = real("p", p, least=0.0, most=1.0)
        except PortacnnError as error:
            raise error.at(type(self).__name__)

    def infer(self, shape: Shape) -> Shape:
        if self.axes is not None and len(shape) != self.axes:
            raise ShapeError(f"expected samples of a channel axis and {self.axes - 1} more, got {shape}")
        return shape

    def forward(self, x: Array, *, train: bool = False, keep: bool | None = None) -> Array:
        self._home()
        keep = train if keep is None else keep
        if not train or self.p == 0:
            self._keep(_UNCHANGED if keep else None)
            return x
        y, cache = type(self).op(x, self.p, seed=self.seed, path=self.path, step=self.step, first=self.first, keep=keep)
        self._keep(cache)
        if isinstance(self.step, int):
            self.step += 1
        return y

    def backward(self, dy: Array, *, need_dx: bool = True) -> Array | None:
        cache = self._kept()
        return dy if cache is _UNCHANGED else type(self).op_backward(dy, cache)


class Dropout1d(Dropout):
    """``Dropout`` of whole channels of x (N, C, L)."""

    op, op_backward = ops.dropout1d, ops.dropout1d_backward
    axes = 2


class Dropout2d(Dropout):
    """``Dropout`` of whole channels of x (N, C, H, W)."""

    op, op_backward = ops.dropout2d, ops.dropout2d_backward
    axes = 3


class Dropout3d(Dropout):
    """``Dropout`` of whole channels of x (N, C, D, H, W)."""

    op, op_backward = ops.dropout3d, ops.dropout3d_backward
    axes = 4
