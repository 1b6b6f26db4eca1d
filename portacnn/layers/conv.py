"""Convolutions and transposed convolutions in one, two and three dimensions.

Notation: C in-channels, O out-channels, S/OUT the spatial axes in/out (W; H, W; or D, H, W), K the
kernel.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, ClassVar

from portacnn import ops
from portacnn.errors import ArgumentError, PortacnnError, ShapeError
from portacnn.init import Initializer, rule
from portacnn.layers import units
from portacnn.layers.base import Layer, Shape
from portacnn.ops.conv import conv_windows
from portacnn.ops.fused import Bounds, ConvNorm
from portacnn.ops.pool import pool_windows
from portacnn.ops.windows import (
    Padding,
    Windows,
    check_output_padding,
    check_pads,
    pads_of,
    per_axis,
)
from portacnn.runtime import Array

__all__ = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]

SAMPLES = {1: "(C, W)", 2: "(C, H, W)", 3: "(C, D, H, W)"}
PADDING_MODES = {
    "zeros": "constant",
    "reflect": "reflect",
    "replicate": "replicate",
    "circular": "circular",
}


def spatial(shape: Shape, axes: int) -> tuple[int, ...]:
    """Return the spatial part of one sample's shape. Raises ShapeError if the number of spatial
    axes is not ``axes``."""
    if len(shape) != axes + 1:
        raise ShapeError(f"expected samples {SAMPLES[axes]}, got {shape}")
    return shape[1:]


class _Convolving(Layer):
    """Base class of convolutions and transposed convolutions: channels, groups and parameters."""

    axes: ClassVar[int]
    op: ClassVar[Any]
    op_backward: ClassVar[Any]

    def _check(
        self,
        in_channels: int | None,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: Padding,
        dilation: int | Sequence[int],
        groups: int,
        bias: bool,
        weight_init: Initializer,
        bias_init: Initializer,
    ) -> None:
        """Check and set the attributes common to all constructors."""
        try:
            if in_channels is not None:
                (in_channels,) = per_axis("in_channels", in_channels, 1, 1)
            self.in_channels = in_channels
            (self.out_channels,) = per_axis("out_channels", out_channels, 1, 1)
            self.kernel_size = per_axis("kernel_size", kernel_size, self.axes, 1)
            self.stride = per_axis("stride", stride, self.axes, 1)
            self.dilation = per_axis("dilation", dilation, self.axes, 1)
            pads_of(padding, (1,) * self.axes, self.kernel_size, self.stride, self.dilation)
            self.padding = padding
            (self.groups,) = per_axis("groups", groups, 1, 1)
            for channels in (in_channels, out_channels):
                if channels is not None and channels % groups:
                    raise ArgumentError(f"{channels} channels do not split into {groups} groups")
            rule(weight_init), rule(bias_init)
        except PortacnnError as error:
            raise error.at(type(self).__name__)
        self.bias, self.weight_init, self.bias_init = bias, weight_init, bias_init

    def _channels(self, shape: Shape) -> int:
        """Return the number of channels C of a sample. Raises ShapeError if it does not fit."""
        spatial(shape, self.axes)
        channels = shape[0]
        if channels != (self.in_channels or channels):
            raise ShapeError(
                f"expected {self.in_channels} input channels, got {channels} (samples {shape})"
            )
        if channels % self.groups:
            raise ShapeError(f"{channels} input channels do not split into {self.groups} groups")
        return channels

    def _declare(self, weight: Shape) -> None:
        """Declare the weight, (out, in / groups, *K) of the (untransposed) convolution, and the
        bias, with PyTorch's fans."""
        # PyTorch takes fan_in from the weight's second axis. In a transposed convolution that is
        # the output's axis.
        fans = {
            "fan_in": prod(weight[1:]),
            "fan_out": weight[0] // self.groups * prod(self.kernel_size),
        }
        self.declare("weight", weight, self.weight_init, **fans)
        if self.bias:
            self.declare("bias", (self.out_channels,), self.bias_init, **fans)


class Conv(_Convolving, abstract=True):
    """Base class of Conv1d, Conv2d and Conv3d: x (N, C, *S) -> y (N, O, *OUT).

    Args:
        in_channels: C; None infers it from the input shape when the network is built.
        out_channels: O.
        kernel_size, stride, padding, dilation, groups: as for ``portacnn.ops.conv2d``.
        bias: whether to add a bias.
        padding_mode: the values of the padding: "zeros", "reflect", "replicate" or "circular" (see
            ``portacnn.ops.pad``).
        weight_init, bias_init: initializers of ``portacnn.init``; default: PyTorch's.

    Parameters: ``weight`` (O, C/groups, *K), ``bias`` (O,).

    Raises:
        ArgumentError: a size is out of range, groups do not divide the channels, or the padding
            mode is unknown.
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
        padding_mode: str = "zeros",
        *,
        weight_init: Initializer = "default",
        bias_init: Initializer = "default",
    ) -> None:
        self._check(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            weight_init,
            bias_init,
        )
        if padding_mode not in PADDING_MODES:
            known = ", ".join(map(repr, PADDING_MODES))
            raise ArgumentError(
                f"padding_mode must be one of {known}; got {padding_mode!r}", type(self).__name__
            )
        self.padding_mode = padding_mode

    def infer(self, shape: Shape) -> Shape:
        channels, size = self._channels(shape), spatial(shape, self.axes)
        windows = Windows.of(size, self.kernel_size, self.stride, self.padding, self.dilation)
        if self.padding_mode != "zeros":
            check_pads(size, windows.pads, PADDING_MODES[self.padding_mode])
        self._declare((self.out_channels, channels // self.groups, *self.kernel_size))
        return (self.out_channels, *windows.out)

    def multiply_adds(self) -> int:
        return prod(self.declared["weight"].shape) * prod(self.output_shape[1:])

    def geometry(self) -> dict[str, Any]:
        """Return the op's options."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        self.check_built()
        geometry, margins = self.geometry(), None
        if self.padding_mode != "zeros":
            pads = pads_of(self.padding, x.shape[2:], self.kernel_size, self.stride, self.dilation)
            flat = [n for pair in reversed(pads) for n in pair]
            x, margins = ops.pad(x, flat, PADDING_MODES[self.padding_mode], keep=keep)
            geometry["padding"] = 0
        y, cache = type(self).op(
            x, self.params["weight"], self.params.get("bias"), **geometry, keep=keep
        )
        return y, (cache, margins) if keep else None

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        of_conv, margins = self.kept(cache)
        skipped = self.frozen_grads()
        dx, dweight, dbias = type(self).op_backward(dy, of_conv, need_dx=need_dx, **skipped)
        self.add_grads(weight=dweight, bias=dbias)
        return dx if dx is None or margins is None else ops.pad_backward(dx, margins)

    def unit(
        self,
        x: Array,
        bounds: Bounds | None = None,
        norm: ConvNorm | None = None,
        pool: Mapping[str, Any] | None = None,
    ) -> units.Unit | None:
        """Return the arguments of ``conv_unit`` for this layer and the ones after it; None if the
        padding is not zeros. ``pool`` has the options of ``pool_windows``."""
        self.check_built()
        if self.padding_mode != "zeros":
            return None
        weight, bias = self.params["weight"], self.params.get("bias")
        windows = conv_windows(self.axes, x, weight, bias, **self.geometry())
        pooling = None if pool is None else pool_windows(windows.out, **pool)
        return weight, bias, windows, self.groups, norm, *(bounds or Bounds()), pooling

    prepare, joined, prepare_joined = units.prepare, units.joined, units.prepare_joined


class Conv1d(Conv):
    """1-D convolution, as torch.nn.Conv1d: x (N, C, W) -> y (N, O, OW). Arguments: see ``Conv``."""

    axes, op, op_backward = 1, ops.conv1d, ops.conv1d_backward


class Conv2d(Conv):
    """2-D convolution, as torch.nn.Conv2d: x (N, C, H, W) -> y (N, O, OH, OW). Arguments: see
    ``Conv``."""

    axes, op, op_backward = 2, ops.conv2d, ops.conv2d_backward


class Conv3d(Conv):
    """3-D convolution, as torch.nn.Conv3d: x (N, C, D, H, W) -> y (N, O, OD, OH, OW). See
    ``Conv``."""

    axes, op, op_backward = 3, ops.conv3d, ops.conv3d_backward


class ConvTranspose(_Convolving, abstract=True):
    """Base class of ConvTranspose1d, ConvTranspose2d and ConvTranspose3d: x (N, C, *S) -> y (N, O,
    *OUT).

    Args:
        in_channels: C; None infers it from the input shape when the network is built.
        out_channels: O.
        kernel_size, stride, padding, output_padding, groups, dilation: as for
            ``portacnn.ops.conv_transpose2d``.
        bias: whether to add a bias.
        weight_init, bias_init: initializers of ``portacnn.init``; default: PyTorch's.

    Parameters: ``weight`` (C, O/groups, *K), ``bias`` (O,).

    Raises:
        ArgumentError: a size is out of range, groups do not divide the channels, or output_padding
            is neither below the stride nor below the dilation.
    """

    def __init__(
        self,
        in_channels: int | None,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        *,
        weight_init: Initializer = "default",
        bias_init: Initializer = "default",
    ) -> None:
        self._check(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            weight_init,
            bias_init,
        )
        try:
            self.output_padding = per_axis("output_padding", output_padding, self.axes, 0)
            check_output_padding(self.output_padding, self.stride, self.dilation)
            if isinstance(padding, str):
                raise ArgumentError(f"expected padding as whole numbers, got {padding!r}")
        except PortacnnError as error:
            raise error.at(type(self).__name__)

    def infer(self, shape: Shape) -> Shape:
        channels, size = self._channels(shape), spatial(shape, self.axes)
        windows = Windows.transposed(
            size, self.kernel_size, self.stride, self.padding, self.output_padding, self.dilation
        )
        self._declare((channels, self.out_channels // self.groups, *self.kernel_size))
        return (self.out_channels, *windows.size)

    def multiply_adds(self) -> int:
        return prod(self.declared["weight"].shape) * prod(self.input_shape[1:])

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        self.check_built()
        return type(self).op(
            x,
            self.params["weight"],
            self.params.get("bias"),
            stride=self.stride,
            padding=self.padding,
            output_padding=self.output_padding,
            groups=self.groups,
            dilation=self.dilation,
            keep=keep,
        )

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        skipped = self.frozen_grads()
        dx, dweight, dbias = type(self).op_backward(dy, cache, need_dx=need_dx, **skipped)
        self.add_grads(weight=dweight, bias=dbias)
        return dx


class ConvTranspose1d(ConvTranspose):
    """1-D transposed convolution, as torch.nn.ConvTranspose1d. Arguments: see ``ConvTranspose``."""

    axes, op, op_backward = 1, ops.conv_transpose1d, ops.conv_transpose1d_backward


class ConvTranspose2d(ConvTranspose):
    """2-D transposed convolution, as torch.nn.ConvTranspose2d. Arguments: see ``ConvTranspose``."""

    axes, op, op_backward = 2, ops.conv_transpose2d, ops.conv_transpose2d_backward


class ConvTranspose3d(ConvTranspose):
    """3-D transposed convolution, as torch.nn.ConvTranspose3d. Arguments: see ``ConvTranspose``."""

    axes, op, op_backward = 3, ops.conv_transpose3d, ops.conv_transpose3d_backward
