"""Normalization layers. See ``portacnn.ops.norm`` for the formulas."""

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar

from portacnn import ops
from portacnn.arguments import real
from portacnn.errors import ArgumentError, PortacnnError, ShapeError
from portacnn.layers.base import Layer, Shape
from portacnn.layers.limits import count_taps
from portacnn.layers.passes import is_recomputing
from portacnn.ops.fused import ConvNorm
from portacnn.ops.norm import trailing
from portacnn.ops.response_norm import check_response_norm
from portacnn.ops.windows import per_axis
from portacnn.runtime import Array

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LocalResponseNorm",
]


class _Norm(Layer):
    """Base class: a weight initialized to ones, a bias initialized to zeros, and the op's
    gradients."""

    op_backward: ClassVar[Any]

    def _take(self, eps: float) -> None:
        try:
            self.eps = real("eps", eps, least=0.0)
        except PortacnnError as error:
            raise error.at(type(self).__name__)

    def _declare_affine(self, shape: Shape, weight: bool, bias: bool) -> None:
        if weight:
            self.declare("weight", shape, "ones")
        if bias:
            self.declare("bias", shape, "zeros")

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        skipped = self.frozen_grads()
        dx, dweight, dbias = type(self).op_backward(dy, cache, need_dx=need_dx, **skipped)
        self.add_grads(weight=dweight, bias=dbias)
        return dx


class _ChannelNorm(_Norm):
    """Base class of batch and instance norm: parameters and statistics for each channel."""

    ranks: ClassVar[tuple[int, ...]]  # allowed numbers of axes of one sample

    def _set(
        self,
        num_features: int | None,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
    ) -> None:
        self._take(eps)
        try:
            if num_features is not None:
                per_axis("num_features", num_features, 1, 1)
            if momentum is not None:
                real("momentum", momentum, least=0.0, most=1.0)
        except PortacnnError as error:
            raise error.at(type(self).__name__)
        self.num_features, self.momentum = num_features, momentum
        self.affine, self.track_running_stats = affine, track_running_stats

    def infer(self, shape: Shape) -> Shape:
        if len(shape) not in self.ranks:
            expected = " or ".join(
                ("(C,)", "(C, L)", "(C, H, W)", "(C, D, H, W)")[rank - 1] for rank in self.ranks
            )
            raise ShapeError(f"expected samples {expected}, got {shape}")
        channels = shape[0]
        if channels != (self.num_features or channels):
            raise ShapeError(
                f"expected {self.num_features} channels, got {channels} (samples {shape})"
            )
        self._declare_affine((channels,), self.affine, self.affine)
        if self.track_running_stats:
            self.declare_buffer("running_mean", (channels,), 0.0)
            self.declare_buffer("running_var", (channels,), 1.0)
            # Optional, because files written before PyTorch 0.4.1 lack the count.
            self.declare_buffer("num_batches_tracked", (), 0, "int64", optional=True)
        return shape

    def _moves(self, train: bool) -> bool:
        """Return whether this forward pass updates the running statistics: in training, unless they
        are frozen."""
        return train and "running_mean" not in self.frozen

    def _statistics(self, train: bool) -> tuple[Array | None, Array | None]:
        """Return the running mean and variance. Returns copies if the forward pass is repeated
        (``Recompute``), because the first one already updated them."""
        mean, var = self.buffers.get("running_mean"), self.buffers.get("running_var")
        if mean is None or not (train and is_recomputing()):
            return mean, var
        # Copies, not None: a kernel may return other bits without running statistics.
        return self.home.xp.asarray(mean, copy=True), self.home.xp.asarray(var, copy=True)


class _BatchNorm(_ChannelNorm):
    op_backward = ops.batch_norm_backward

    @property
    def least_batch(self) -> int:
        """See ``Layer.least_batch``: the variance needs two values per channel."""
        return 2 if prod(self.input_shape[1:]) == 1 and self._moves(True) else 1

    @property
    def least_predicted(self) -> int:
        """See ``Layer.least_predicted``: without running statistics, predictions use the batch's
        own."""
        return 1 if self.track_running_stats else self.least_batch

    def __init__(
        self,
        num_features: int | None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        self._set(num_features, eps, momentum, affine, track_running_stats)

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        return self.run(ops.batch_norm, x, train, keep)

    def after_conv(self) -> ConvNorm:
        """Return the arrays with which inference normalizes, for ``conv_unit``."""
        self.check_built()
        mean, var = self.buffers["running_mean"], self.buffers["running_var"]
        return ConvNorm(mean, var, self.params.get("weight"), self.params.get("bias"), self.eps)

    def run(self, op: Any, x: Array, train: bool, keep: bool) -> tuple[Array, Any]:
        """Run ``batch_norm`` or a fused op with the same arguments."""
        home, train = self.home, self._moves(train)
        count = (
            self.buffers.get("num_batches_tracked") if train and x.shape[0] else None
        )  # an empty batch does not count
        momentum = self.momentum
        if momentum is None:  # the cumulative average
            momentum = 0.0 if count is None else 1.0 / home.xp.astype(count + 1, x.dtype)
        y, cache = op(
            x,
            *self._statistics(train),
            self.params.get("weight"),
            self.params.get("bias"),
            training=train or not self.track_running_stats,
            momentum=momentum,
            eps=self.eps,
            keep=keep,
        )
        if count is not None and not is_recomputing():
            count[...] = count + 1
        return y, cache


class BatchNorm1d(_BatchNorm):
    """Normalize each channel over the batch, as torch.nn.BatchNorm1d: x (N, C) or (N, C, L) -> y of
    the same shape.

    Training uses the batch's mean and variance, predictions use the running statistics. A backward
    pass outside training (``train=False, keep=True``) treats the running statistics as constants.

    Args:
        num_features: C; None infers it from the input shape when the network is built.
        eps: added to the variance.
        momentum: the weight of a batch in the running statistics; None for the cumulative average
            over all batches.
        affine: whether to learn a weight and a bias.
        track_running_stats: if False, the batch's own statistics are always used.

    Parameters: ``weight``, ``bias`` (C,). Buffers: ``running_mean``, ``running_var`` (C,),
    ``num_batches_tracked`` ().
    """

    ranks = (1, 2)


class BatchNorm2d(_BatchNorm):
    """Normalize each channel over the batch and the spatial axes: x (N, C, H, W). Arguments and
    state as for ``BatchNorm1d``."""

    ranks = (3,)


class BatchNorm3d(_BatchNorm):
    """Normalize each channel over the batch and the spatial axes: x (N, C, D, H, W). Arguments and
    state as for ``BatchNorm1d``."""

    ranks = (4,)


class _InstanceNorm(_ChannelNorm):
    op_backward = ops.instance_norm_backward

    def __init__(
        self,
        num_features: int | None,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
    ) -> None:
        if momentum is None:
            raise ArgumentError(
                "expected momentum as a number, got None (the average is for batch norm only)",
                type(self).__name__,
            )
        self._set(num_features, eps, momentum, affine, track_running_stats)

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        self.check_built()
        train = self._moves(train)
        return ops.instance_norm(
            x,
            *self._statistics(train),
            self.params.get("weight"),
            self.params.get("bias"),
            use_input_stats=train or not self.track_running_stats,
            momentum=self.momentum,
            eps=self.eps,
            keep=keep,
        )


class InstanceNorm1d(_InstanceNorm):
    """Normalize each channel of each sample over its length, as torch.nn.InstanceNorm1d: x (N, C,
    L) -> y of the same shape.

    It uses the sample's own mean and variance, in training and in predictions. With
    ``track_running_stats``, predictions use the running statistics.

    Args:
        num_features, eps, momentum: as for ``BatchNorm1d``.
        affine: whether to learn a weight and a bias.
        track_running_stats: whether to keep running statistics.

    Parameters (if ``affine``) and buffers (if ``track_running_stats``) as for ``BatchNorm1d``.
    """

    ranks = (2,)


class InstanceNorm2d(_InstanceNorm):
    """Normalize each channel of each sample over its spatial axes: x (N, C, H, W). Arguments as for
    ``InstanceNorm1d``."""

    ranks = (3,)


class InstanceNorm3d(_InstanceNorm):
    """Normalize each channel of each sample over its spatial axes: x (N, C, D, H, W). Arguments as
    for ``InstanceNorm1d``."""

    ranks = (4,)


class GroupNorm(_Norm):
    """Normalize each group of channels of each sample, as torch.nn.GroupNorm: x (N, C, ...) -> y of
    the same shape.

    Args:
        num_groups: G, which divides C.
        num_channels: C; None infers it from the input shape when the network is built.
        eps: added to the variance.
        affine: whether to learn a weight and a bias.

    Parameters: ``weight``, ``bias`` (C,).
    """

    op_backward = ops.group_norm_backward

    def __init__(
        self, num_groups: int, num_channels: int | None, eps: float = 1e-5, affine: bool = True
    ) -> None:
        self._take(eps)
        try:
            (self.num_groups,) = per_axis("num_groups", num_groups, 1, 1)
            if num_channels is not None:
                per_axis("num_channels", num_channels, 1, 1)
        except PortacnnError as error:
            raise error.at(type(self).__name__)
        if num_channels is not None and num_channels % num_groups:
            raise ArgumentError(
                f"{num_channels} channels do not split into {num_groups} groups",
                type(self).__name__,
            )
        self.num_channels, self.affine = num_channels, affine

    def infer(self, shape: Shape) -> Shape:
        if not shape:
            raise ShapeError("expected samples (C, ...), got ()")
        channels = shape[0]
        if channels != (self.num_channels or channels):
            raise ShapeError(
                f"expected {self.num_channels} channels, got {channels} (samples {shape})"
            )
        if channels % self.num_groups:
            raise ShapeError(f"{channels} channels do not split into {self.num_groups} groups")
        self._declare_affine((channels,), self.affine, self.affine)
        return shape

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        self.check_built()
        weight, bias = self.params.get("weight"), self.params.get("bias")
        return ops.group_norm(x, self.num_groups, weight, bias, eps=self.eps, keep=keep)


class LayerNorm(_Norm):
    """Normalize each sample over its last axes, as torch.nn.LayerNorm: x (N, ...,
    *normalized_shape) -> y of the same shape.

    Args:
        normalized_shape: the sizes of the last axes, or a number for the last axis.
        eps: added to the variance.
        elementwise_affine: whether to learn a weight and a bias.
        bias: if False, learn the weight only.

    Parameters: ``weight``, ``bias`` (*normalized_shape).
    """

    op_backward = ops.layer_norm_backward

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
    ) -> None:
        self._take(eps)
        try:
            self.normalized_shape = trailing(normalized_shape)
        except PortacnnError as error:
            raise error.at(type(self).__name__)
        self.elementwise_affine, self.bias = elementwise_affine, bias

    def infer(self, shape: Shape) -> Shape:
        if shape[max(len(shape) - len(self.normalized_shape), 0) :] != self.normalized_shape:
            raise ShapeError(
                f"expected samples whose last axes are {self.normalized_shape}, got {shape}"
            )
        self._declare_affine(
            self.normalized_shape, self.elementwise_affine, self.elementwise_affine and self.bias
        )
        return shape

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        self.check_built()
        weight, bias = self.params.get("weight"), self.params.get("bias")
        return ops.layer_norm(x, self.normalized_shape, weight, bias, eps=self.eps, keep=keep)


class LocalResponseNorm(Layer):
    """Divide each value by the activity of neighbouring channels, as torch.nn.LocalResponseNorm: x
    (N, C, *S) -> y of the same shape.

    Args:
        size, alpha, beta, k: as for ``portacnn.ops.local_response_norm``; alpha is divided by size.
    """

    def __init__(self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> None:
        try:
            check_response_norm(size, alpha, beta, k)
        except PortacnnError as error:
            raise error.at(type(self).__name__)
        self.size, self.alpha, self.beta, self.k = int(size), alpha, beta, k

    def infer(self, shape: Shape) -> Shape:
        if len(shape) < 2:
            raise ShapeError(f"expected samples (C, *S) of at least 2 axes, got {shape}")
        count_taps((min(self.size, shape[0]),))  # the window is summed channel by channel
        return shape

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        return ops.local_response_norm(
            x, self.size, alpha=self.alpha, beta=self.beta, k=self.k, keep=keep
        )

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        return ops.local_response_norm_backward(dy, cache)
