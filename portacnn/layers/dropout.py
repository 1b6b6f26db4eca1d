"""Dropout layers."""

from typing import Any, ClassVar

from portacnn import ops
from portacnn.arguments import real
from portacnn.errors import PortacnnError, ShapeError
from portacnn.layers.base import Layer, Shape
from portacnn.runtime import Array

__all__ = ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "StochasticDepth"]

_UNCHANGED = ()  # the cache of a forward pass that dropped nothing


class Dropout(Layer):
    """In training, set each element to zero with probability p and divide the others by 1 - p.
    Outside training, return x.

    The mask depends only on ``seed`` and ``path`` (set by ``build``), the step and the position in
    the batch (see ``at_step``), and the element's index in its sample. It has the same bits on
    every backend, and does not change if a batch is split. Outside of ``at_step``, ``step`` counts
    the training forward passes.

    Args:
        p: the probability of dropping an element, 0 to 1.
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
            raise ShapeError(
                f"expected samples (C, *S) with {self.axes - 1} spatial axes, got {shape}"
            )
        return shape

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        self.check_built()
        if not train or self.p == 0:
            return x, _UNCHANGED if keep else None
        step, first, path = self.draw()
        return type(self).op(
            x, self.p, seed=self.seed, path=path, step=step, first=first, keep=keep
        )

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
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


class StochasticDepth(Dropout):
    """``Dropout`` of whole samples of x (N, *S), as torchvision.ops.StochasticDepth with mode
    "row". At the end of a residual block's body, it lets some samples skip the block (Huang et al.,
    2016)."""

    op, op_backward = ops.stochastic_depth, ops.stochastic_depth_backward
