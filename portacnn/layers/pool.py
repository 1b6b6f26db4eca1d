"""Pooling layers, in one, two and three dimensions.

Notation: C channels, S/OUT the spatial axes in/out (W; H, W; or D, H, W). All of them map x (N, C,
*S) -> y (N, C, *OUT).
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from portacnn import ops
from portacnn.errors import PortacnnError, ShapeError
from portacnn.layers.base import Layer, Shape
from portacnn.layers.conv import spatial
from portacnn.layers.limits import count_taps
from portacnn.ops.adaptive import output_of
from portacnn.ops.pool import checked_divisor, pool_windows
from portacnn.ops.windows import Padding, pads_of, per_axis
from portacnn.runtime import Array, backend_of

__all__ = [
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "GlobalAvgPool",
    "GlobalMaxPool",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
]


class _Pooling(Layer):
    """Base class: one op without parameters. A subclass names the op, its options and the output
    shape."""

    axes: ClassVar[int]
    op: ClassVar[Any]
    op_backward: ClassVar[Any]

    def geometry(self) -> dict[str, Any]:
        """Return the op's options."""
        return {}

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        return type(self).op(x, **self.geometry(), keep=keep)

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        return type(self).op_backward(dy, cache)


class _WindowPooling(_Pooling):
    """Pooling with a sliding window."""

    def _check(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None,
        padding: Padding,
        dilation: int | Sequence[int],
        ceil_mode: bool,
    ) -> None:
        """Check and set the attributes common to all constructors."""
        try:
            self.kernel_size = per_axis("kernel_size", kernel_size, self.axes, 1)
            self.stride = (
                self.kernel_size if stride is None else per_axis("stride", stride, self.axes, 1)
            )
            self.dilation = per_axis("dilation", dilation, self.axes, 1)
            pads_of(padding, (1,) * self.axes, self.kernel_size, self.stride, self.dilation)
        except PortacnnError as error:
            raise error.at(type(self).__name__)
        self.padding, self.ceil_mode = padding, ceil_mode

    def geometry(self) -> dict[str, Any]:
        return {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "ceil_mode": self.ceil_mode,
        }

    def infer(self, shape: Shape) -> Shape:
        size = spatial(shape, self.axes)
        windows = pool_windows(
            size, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        )
        return (shape[0], *windows.out)


class MaxPool(_WindowPooling, abstract=True):
    """Base class of MaxPool1d, MaxPool2d and MaxPool3d: the maximum over each window.

    Args:
        kernel_size, stride, padding, dilation, ceil_mode: as for ``portacnn.ops.max_pool2d``;
            without ``ceil_mode``, trailing cells that fill no window are ignored.
    """

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        ceil_mode: bool = False,
    ) -> None:
        self._check(kernel_size, stride, padding, dilation, ceil_mode)


class MaxPool1d(MaxPool):
    """The maximum over each window, as torch.nn.MaxPool1d. Arguments: see ``MaxPool``."""

    axes, op, op_backward = 1, ops.max_pool1d, ops.max_pool1d_backward


class MaxPool2d(MaxPool):
    """The maximum over each window, as torch.nn.MaxPool2d. Arguments: see ``MaxPool``."""

    axes, op, op_backward = 2, ops.max_pool2d, ops.max_pool2d_backward


class MaxPool3d(MaxPool):
    """The maximum over each window, as torch.nn.MaxPool3d. Arguments: see ``MaxPool``."""

    axes, op, op_backward = 3, ops.max_pool3d, ops.max_pool3d_backward


class AvgPool(_WindowPooling, abstract=True):
    """Base class of AvgPool1d, AvgPool2d and AvgPool3d: the mean over each window.

    Args:
        kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, dilation: as
            for ``portacnn.ops.avg_pool2d``.
    """

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: Padding = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
        dilation: int | Sequence[int] = 1,
    ) -> None:
        self._check(kernel_size, stride, padding, dilation, ceil_mode)
        self.count_include_pad = count_include_pad
        self.divisor_override = checked_divisor(divisor_override, type(self).__name__)

    def geometry(self) -> dict[str, Any]:
        return {
            **super().geometry(),
            "count_include_pad": self.count_include_pad,
            "divisor_override": self.divisor_override,
        }


class AvgPool1d(AvgPool):
    """The mean over each window, as torch.nn.AvgPool1d. Arguments: see ``AvgPool``."""

    axes, op, op_backward = 1, ops.avg_pool1d, ops.avg_pool1d_backward


class AvgPool2d(AvgPool):
    """The mean over each window, as torch.nn.AvgPool2d. Arguments: see ``AvgPool``."""

    axes, op, op_backward = 2, ops.avg_pool2d, ops.avg_pool2d_backward


class AvgPool3d(AvgPool):
    """The mean over each window, as torch.nn.AvgPool3d. Arguments: see ``AvgPool``."""

    axes, op, op_backward = 3, ops.avg_pool3d, ops.avg_pool3d_backward


class _AdaptivePooling(_Pooling):
    """Base class: pooling to a given output size.

    Args:
        output_size: a number, or one for each spatial axis; None keeps the axis's input size.
    """

    def __init__(self, output_size: int | Sequence[int | None] | None) -> None:
        try:
            output_of(output_size, (1,) * self.axes)
        except PortacnnError as error:
            raise error.at(type(self).__name__)
        self.output_size = output_size

    def geometry(self) -> dict[str, Any]:
        return {"output_size": self.output_size}

    def infer(self, shape: Shape) -> Shape:
        size = output_of(self.output_size, spatial(shape, self.axes))
        count_taps((sum(size),))  # an output is a slice of its axis
        return (shape[0], *size)


class AdaptiveAvgPool1d(_AdaptivePooling):
    """Average pooling to ``output_size`` (a number, or None for the input's size), as
    torch.nn.AdaptiveAvgPool1d."""

    axes, op, op_backward = 1, ops.adaptive_avg_pool1d, ops.adaptive_avg_pool1d_backward


class AdaptiveAvgPool2d(_AdaptivePooling):
    """Average pooling to ``output_size`` (OH, OW), as torch.nn.AdaptiveAvgPool2d.

    ``output_size``: one number or two; None keeps the axis's input size.
    """

    axes, op, op_backward = 2, ops.adaptive_avg_pool2d, ops.adaptive_avg_pool2d_backward


class AdaptiveAvgPool3d(_AdaptivePooling):
    """Average pooling to ``output_size`` (OD, OH, OW), as torch.nn.AdaptiveAvgPool3d.

    ``output_size``: one number or three; None keeps the axis's input size.
    """

    axes, op, op_backward = 3, ops.adaptive_avg_pool3d, ops.adaptive_avg_pool3d_backward


class AdaptiveMaxPool1d(_AdaptivePooling):
    """Max pooling to ``output_size``, as torch.nn.AdaptiveMaxPool1d. See ``AdaptiveAvgPool1d``."""

    axes, op, op_backward = 1, ops.adaptive_max_pool1d, ops.adaptive_max_pool1d_backward


class AdaptiveMaxPool2d(_AdaptivePooling):
    """Max pooling to ``output_size``, as torch.nn.AdaptiveMaxPool2d. See ``AdaptiveAvgPool2d``."""

    axes, op, op_backward = 2, ops.adaptive_max_pool2d, ops.adaptive_max_pool2d_backward


class AdaptiveMaxPool3d(_AdaptivePooling):
    """Max pooling to ``output_size``, as torch.nn.AdaptiveMaxPool3d. See ``AdaptiveAvgPool3d``."""

    axes, op, op_backward = 3, ops.adaptive_max_pool3d, ops.adaptive_max_pool3d_backward


class _GlobalPooling(_Pooling):
    """Base class: pool any number of spatial axes to length 1 each, or remove them with
    ``flatten``."""

    def __init__(self, flatten: bool = False) -> None:
        self.flatten = flatten

    def infer(self, shape: Shape) -> Shape:
        if len(shape) < 2:
            raise ShapeError(
                f"expected samples (C, *S) with at least one spatial axis, got {shape}"
            )
        return shape[:1] if self.flatten else (shape[0],) + (1,) * (len(shape) - 1)

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        y, cache = type(self).op(x, keep=keep)
        kept = (cache, tuple(y.shape)) if keep else None
        return backend_of(y).xp.reshape(y, tuple(y.shape[:2])) if self.flatten else y, kept

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        of_op, shape = self.kept(cache)
        return type(self).op_backward(backend_of(dy).xp.reshape(dy, shape), of_op)


class GlobalAvgPool(_GlobalPooling):
    """The mean of each channel, in any number of dimensions: x (N, C, *S) -> y (N, C, 1, ...), as
    AdaptiveAvgPool(1).

    Args:
        flatten: return (N, C), the input shape of a Linear layer.
    """

    op, op_backward = ops.global_avg_pool, ops.global_avg_pool_backward


class GlobalMaxPool(_GlobalPooling):
    """The maximum of each channel, in any number of dimensions: x (N, C, *S) -> y (N, C, 1, ...),
    as AdaptiveMaxPool(1).

    Args:
        flatten: return (N, C), the input shape of a Linear layer.
    """

    op, op_backward = ops.global_max_pool, ops.global_max_pool_backward
