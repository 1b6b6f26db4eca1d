"""Fused ops: convolution, ReLU and max pooling; an affine map, batch norm or a sum, and ReLU; and
for inference a convolution with batch norm, a sum, limits and max pooling.

Each is composed of other ops and returns what these return in sequence, on every backend. A backend
may override a fused op as a whole. It then does not write intermediate results to memory and read
them again, which takes longer than the arithmetic on most machines. ``Sequential`` uses these ops
when such layers follow each other.

ReLU and max pooling commute, and so do adding a bias and max pooling. An override may therefore
pool first and do the rest on a quarter of the elements. If the maximum of a window is not above
zero, no gradient flows, in either order.
"""

from functools import partial
from math import prod
from typing import Any, NamedTuple

from portacnn.errors import PortacnnError, ShapeError
from portacnn.ops._linear import check_linear, linear, linear_backward
from portacnn.ops.activation import check_clip, clip, relu, relu_backward
from portacnn.ops.conv import conv, conv_backward
from portacnn.ops.dispatch import check_arrays, op
from portacnn.ops.join import add, check_add
from portacnn.ops.norm import RUNNING, batch_norm, batch_norm_backward, check_batch_norm
from portacnn.ops.pool import max_pool, max_pool_backward
from portacnn.ops.statistics import is_shared
from portacnn.ops.windows import Windows
from portacnn.runtime import Array, backend_of, describe


@op()
def conv_relu(
    x: Array,
    weight: Array,
    bias: Array | None,
    windows: Windows,
    groups: int,
    pool: Windows | None,
    *,
    keep: bool,
) -> tuple[Array, tuple | None]:
    """Return relu(conv(x)) for x (N, C, *S), (N, O, *OUT), or its maxima over the windows
    ``pool``.
    """
    y, conv_cache = conv(x, weight, bias, windows, groups, keep=keep)
    y, relu_cache = relu(y, keep=keep)
    pool_cache = None
    if pool is not None:
        y, pool_cache = max_pool(y, pool, keep=keep)
    return y, (conv_cache, relu_cache, pool_cache) if keep else None


@conv_relu.backward
def conv_relu_backward(
    dy: Array,
    saved: tuple,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> tuple[Array | None, Array | None, Array | None]:
    """Return the gradients of ``conv_relu``, as ``conv_backward`` does: dx (N, C, *S), dweight (O,
    C/G, *K), dbias (O,).
    """
    conv_cache, relu_cache, pool_cache = saved
    if pool_cache is not None:
        dy = max_pool_backward(dy, pool_cache)
    return conv_backward(
        relu_backward(dy, relu_cache),
        conv_cache,
        need_dx=need_dx,
        need_dweight=need_dweight,
        need_dbias=need_dbias,
    )


def _check_linear_relu(
    x: Array, weight: Array, bias: Array | None = None, *, keep: bool = True
) -> None:
    check_linear("linear_relu", x, weight, bias)


@op(_check_linear_relu)
def linear_relu(
    x: Array, weight: Array, bias: Array | None = None, *, keep: bool = True
) -> tuple[Array, tuple | None]:
    """Return relu(linear(x)) (N, O) for x (N, F). Arguments, results and errors are those of
    ``linear``.
    """
    y, linear_cache = linear(x, weight, bias, keep=keep)
    y, relu_cache = relu(y, keep=keep)
    return y, (linear_cache, relu_cache) if keep else None


@linear_relu.backward
def linear_relu_backward(
    dy: Array,
    saved: tuple,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> tuple[Array | None, Array | None, Array | None]:
    """Return the gradients of ``linear_relu``, as ``linear_backward`` does: dx (N, F), dweight (O,
    F), dbias (O,).
    """
    linear_cache, relu_cache = saved
    return linear_backward(
        relu_backward(dy, relu_cache),
        linear_cache,
        need_dx=need_dx,
        need_dweight=need_dweight,
        need_dbias=need_dbias,
    )


@op(partial(check_batch_norm, "batch_norm_relu"), writes=RUNNING, as_written=is_shared)
def batch_norm_relu(
    x: Array,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    training: bool = False,
    momentum: Any = 0.1,
    eps: float = 1e-5,
    keep: bool = True,
) -> tuple[Array, tuple | None]:
    """Return relu(batch_norm(x)) for x (N, C, ...). Arguments, results and errors are those of
    ``batch_norm``.
    """
    y, norm_cache = batch_norm(
        x,
        running_mean,
        running_var,
        weight,
        bias,
        training=training,
        momentum=momentum,
        eps=eps,
        keep=keep,
    )
    y, relu_cache = relu(y, keep=keep)
    return y, (norm_cache, relu_cache) if keep else None


@batch_norm_relu.backward
def batch_norm_relu_backward(
    dy: Array,
    saved: tuple,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> tuple[Array | None, Array | None, Array | None]:
    """Return the gradients of ``batch_norm_relu``, as ``batch_norm_backward`` does: dx (N, C, ...),
    dweight and dbias (C,).
    """
    norm_cache, relu_cache = saved
    return batch_norm_backward(
        relu_backward(dy, relu_cache),
        norm_cache,
        need_dx=need_dx,
        need_dweight=need_dweight,
        need_dbias=need_dbias,
    )


@op(check_add)
def add_relu(parts: list[Array], *, keep: bool = True) -> tuple[Array, Any]:
    """Return relu(add(parts)) for arrays of one shape."""
    return relu(add(parts), keep=keep)


@add_relu.backward
def add_relu_backward(dy: Array, y: Any) -> Array:
    """Return the gradient of every part; all parts have the same gradient."""
    return relu_backward(dy, y)


# --- a convolution and what follows it, for inference ---------------------------------------------


class Bounds(NamedTuple):
    """The limits of an activation; None is no limit."""

    low: float | None = None
    high: float | None = None


RELU = Bounds(0.0, None)


def add_clip(parts: list[Array], bounds: Bounds) -> Array:
    """Return the sum of arrays of one shape, limited to the bounds, for inference."""
    if bounds == RELU:
        return add_relu(parts, keep=False)[0]
    return _clipped(add(parts), bounds)


def _clipped(y: Array, bounds: Bounds) -> Array:
    if bounds == RELU:
        return relu(y, keep=False)[0]
    return y if bounds == Bounds() else clip(y, min=bounds.low, max=bounds.high, keep=False)[0]


class ConvNorm(NamedTuple):
    """A batch norm with running statistics that follows a convolution: arrays (O,)."""

    running_mean: Array
    running_var: Array
    weight: Array | None
    bias: Array | None
    eps: float

    def affine(self) -> tuple[Array, Array]:
        """Return the norm as scale and shift, (O,): y = scale * x + shift."""
        scale = 1.0 / backend_of(self.running_var).xp.sqrt(self.running_var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        shift = -self.running_mean * scale
        return scale, shift if self.bias is None else shift + self.bias

    def after(self, bias: Array | None) -> tuple[Array, Array]:
        """Return scale and shift, (O,), of a convolution's output before its ``bias``, and norm."""
        scale, shift = self.affine()
        return scale, shift if bias is None else bias * scale + shift

    def folded(self, weight: Array, bias: Array | None) -> tuple[Array, Array]:
        """Return weight (O, C/G, *K) and bias (O,) of a convolution that includes the norm."""
        scale, shift = self.after(bias)
        column = backend_of(weight).xp.reshape(scale, (-1, *(1,) * (weight.ndim - 1)))
        return weight * column, shift


def _check_conv_unit(
    parts: list[Array],
    weight: Array,
    bias: Array | None,
    windows: Windows,
    groups: int,
    norm: ConvNorm | None,
    low: float | None,
    high: float | None,
    pool: Windows | None,
) -> None:
    x, residual = parts if len(parts) == 2 else (parts[0], None)
    channels = weight.shape[0]
    names = ("running_mean", "running_var", "weight", "bias")
    arrays = {f"norm.{name}": a for name, a in zip(names, norm or (), strict=False)}
    check_arrays("conv_unit", x=x, residual=residual, weight=weight, bias=bias, **arrays)
    out = (x.shape[0], channels, *windows.out)
    if len(parts) > 2 or (residual is not None and tuple(residual.shape) != out):
        raise ShapeError(
            f"expected [x] or [x, residual] with a residual of the convolution's shape {out}, got "
            f"{'; '.join(map(describe, parts))}",
            "conv_unit",
        )
    for name, array in arrays.items():
        if array is not None and tuple(array.shape) != (channels,):
            raise ShapeError(
                f"expected {name} of shape ({channels},), got {tuple(array.shape)}", "conv_unit"
            )
    try:
        check_clip(low, high)
    except PortacnnError as error:
        raise error.at("conv_unit")


@op(_check_conv_unit)
def conv_unit(
    parts: list[Array],
    weight: Array,
    bias: Array | None,
    windows: Windows,
    groups: int,
    norm: ConvNorm | None,
    low: float | None,
    high: float | None,
    pool: Windows | None,
) -> Array:
    """Return max_pool(clip(batch_norm(conv(x)) + residual, low, high)), for inference: there is no
    cache and no backward function.

    Args:
        parts: [x] or [x, residual]; x (N, C, *S), residual (N, O, *OUT), which is added after the
            norm.
        weight, bias, windows, groups: as for ``conv``.
        norm: the batch norm, or None.
        low, high: the limits of the activation, or None: ReLU is 0.0 and None, ReLU6 0.0 and 6.0.
        pool: the windows of max pooling, or None.

    Returns:
        y (N, O, *OUT), or (N, O, *POOLED). NaN stays NaN.

    Raises:
        ShapeError, ArrayError, ArgumentError: arrays do not fit together, or a limit is not a
            number. The convolution's own arguments are checked by ``conv_windows``.
    """
    x = parts[0]
    outputs = x.shape[0] * weight.shape[0] * prod(windows.out)
    # One pass over the weights or one over the outputs, whichever are fewer.
    if norm is not None and prod(weight.shape) <= outputs:
        (weight, bias), norm = norm.folded(weight, bias), None
    return unit_in_sequence(parts, weight, bias, windows, groups, norm, low, high, pool)


def unit_in_sequence(
    parts: list[Array],
    weight: Array,
    bias: Array | None,
    windows: Windows,
    groups: int,
    norm: ConvNorm | None,
    low: float | None,
    high: float | None,
    pool: Windows | None,
) -> Array:
    """Return ``conv_unit`` computed by the other ops in sequence, with the norm as a pass over the
    outputs. For a backend on which many small ops cost more than this pass."""
    x, *residual = parts
    bounds = Bounds(low, high)
    is_relu = bounds == RELU and not residual
    if norm is None and is_relu:
        return conv_relu(x, weight, bias, windows, groups, pool, keep=False)[0]
    y, _ = conv(x, weight, bias, windows, groups, keep=False)
    if norm is not None:
        normalize = batch_norm_relu if is_relu else batch_norm
        y, _ = normalize(y, *norm[:4], eps=norm.eps, keep=False)
    if residual:
        y = add_clip([y, *residual], bounds)
    elif not is_relu:
        y = _clipped(y, bounds)
    return y if pool is None else max_pool(y, pool, keep=False)[0]
