"""Convolution layers."""

from collections.abc import Sequence
from math import prod

from portacnn import ops
from portacnn.errors import ArgumentError, ShapeError
from portacnn.init import Initializer
from portacnn.layers.base import Layer, Shape
from portacnn.ops.windows import Padding, Windows, per_axis
from portacnn.runtime import Array


class Conv2d(Layer):
    """Two-dimensional convolution, as torch.nn.Conv2d: x (N, C, H, W) -> y (N, O, OH, OW).

    Args:
        in_channels: C, or None to take it from the input's shape when the network is built.
        out_channels: O.
        kernel_size, stride, padding, dilation, groups: as for ``portacnn.ops.conv2d``.
        bias: whether there is one.
        weight_init, bias_init: rules of ``portacnn.init``; PyTorch's by default.

    Parameters: ``weight`` (O, C/groups, KH, KW), ``bias`` (O,).

    Raises:
        ArgumentError: numbers that mean nothing; groups that do not divide the channels.
    """

    def __init__(
        self,
        in_channels: int | None,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        weight_init: Initializer = "default",
        bias_init: Initializer = "default",
    ) -> None:
        self.in_channels = in_channels
        (self.out_channels,) = per_axis("out_channels", out_channels, 1, 1)
        self.kernel_size = per_axis("kernel_size", kernel_size, 2, 1)
        self.stride = per_axis("stride", stride, 2, 1)
        self.padding = padding
        self.dilation = per_axis("dilation", dilation, 2, 1)
        (self.groups,) = per_axis("groups", groups, 1, 1)
        self.bias = bias
        self.weight_init, self.bias_init = weight_init, bias_init
        for channels in (in_channels, out_channels):
            if channels is not None and (channels < 1 or channels % groups):
                raise ArgumentError(f"{channels} channels do not split into {groups} groups", type(self).__name__)

    def infer(self, shape: Shape) -> Shape:
        if len(shape) != 3:
            raise ShapeError(f"expected samples (C, H, W), got {shape}")
        channels, *size = shape
        if channels != (self.in_channels or channels):
            raise ShapeError(f"expected {self.in_channels} input channels, got {channels} (samples {shape})")
        if channels % self.groups:
            raise ShapeError(f"{channels} input channels do not split into {self.groups} groups")
        windows = Windows.of(size, self.kernel_size, self.stride, self.padding, self.dilation)
        weight = (self.out_channels, channels // self.groups, *self.kernel_size)
        fan_in, fan_out = prod(weight[1:]), self.out_channels // self.groups * prod(self.kernel_size)
        self.declare("weight", weight, self.weight_init, fan_in=fan_in, fan_out=fan_out)
        if self.bias:
            self.declare("bias", (self.out_channels,), self.bias_init, fan_in=fan_in, fan_out=fan_out)
        return (self.out_channels, *windows.out)

    def forward(self, x: Array, *, train: bool = False, keep: bool | None = None) -> Array:
        self._home()
        y, cache = ops.conv2d(
            x,
            self.params["weight"],
            self.params.get("bias"),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            keep=train if keep is None else keep,
        )
        self._keep(cache)
        return y

    def backward(self, dy: Array, *, need_dx: bool = True) -> Array | None:
        dx, dweight, dbias = ops.conv2d_backward(dy, self._kept(), need_dx=need_dx)
        self._write_grads(weight=dweight, bias=dbias)
        return dx
