"""Pooling layers."""

from collections.abc import Sequence

from portacnn import ops
from portacnn.errors import ShapeError
from portacnn.layers.base import Layer, Shape
from portacnn.ops.pool import pool_windows
from portacnn.ops.windows import Padding, per_axis
from portacnn.runtime import Array


class MaxPool2d(Layer):
    """The maximum over each window, as torch.nn.MaxPool2d: x (N, C, H, W) -> y (N, C, OH, OW).

    Args:
        kernel_size, stride, padding, dilation, ceil_mode: as for ``portacnn.ops.max_pool2d``; without ``ceil_mode``, rows
            and columns at the end that fill no window are left out.
    """

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        ceil_mode: bool = False,
    ) -> None:
        self.kernel_size = per_axis("kernel_size", kernel_size, 2, 1)
        self.stride = self.kernel_size if stride is None else per_axis("stride", stride, 2, 1)
        self.padding = padding
        self.dilation = per_axis("dilation", dilation, 2, 1)
        self.ceil_mode = ceil_mode

    def infer(self, shape: Shape) -> Shape:
        return _pooled(shape, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)

    def forward(self, x: Array, *, train: bool = False, keep: bool | None = None) -> Array:
        y, cache = ops.max_pool2d(
            x,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            ceil_mode=self.ceil_mode,
            keep=train if keep is None else keep,
        )
        self._keep(cache)
        return y

    def backward(self, dy: Array, *, need_dx: bool = True) -> Array | None:
        return ops.max_pool2d_backward(dy, self._kept())


class AvgPool2d(Layer):
    """The mean over each window, as torch.nn.AvgPool2d: x (N, C, H, W) -> y (N, C, OH, OW).

    Args:
        kernel_size, stride, padding, ceil_mode, count_include_pad: as for ``portacnn.ops.avg_pool2d``.
    """

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: Padding = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> None:
        self.kernel_size = per_axis("kernel_size", kernel_size, 2, 1)
        self.stride = self.kernel_size if stride is None else per_axis("stride", stride, 2, 1)
        self.padding = padding
        self.ceil_mode = ceil_mode
        self.count_include_pad = count_include_pad

    def infer(self, shape: Shape) -> Shape:
        return _pooled(shape, self.kernel_size, self.stride, self.padding, (1, 1), self.ceil_mode)

    def forward(self, x: Array, *, train: bool = False, keep: bool | None = None) -> Array:
        y, cache = ops.avg_pool2d(
            x,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            ceil_mode=self.ceil_mode,
            count_include_pad=self.count_include_pad,
            keep=train if keep is None else keep,
        )
        self._keep(cache)
        return y

    def backward(self, dy: Array, *, need_dx: bool = True) -> Array | None:
        return ops.avg_pool2d_backward(dy, self._kept())


def _pooled(
    shape: Shape,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: Padding,
    dilation: tuple[int, ...],
    ceil_mode: bool,
) -> Shape:
    if len(shape) != 3:
        raise ShapeError(f"expected samples (C, H, W), got {shape}")
    return (shape[0], *pool_windows(shape[1:], kernel_size, stride, padding, dilation, ceil_mode).out)
