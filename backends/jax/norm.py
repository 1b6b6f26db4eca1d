"""Batch norm over the axes as they are, (N, C, *S): XLA fuses each pass with its neighbours."""

from math import prod
from typing import Any

import jax.numpy as jnp

from portacnn.backends.jax.arrays import JaxArray
from portacnn.backends.jax.compiled import compiled
from portacnn.ops.norm import move_towards
from portacnn.runtime import Kernel


def _along(values: Any, x: Any) -> Any:
    """Return one value per channel (C,) in a shape that broadcasts with x."""
    return values.reshape((1, -1) + (1,) * (x.ndim - 2))


def _mean(x: Any) -> Any:
    """Return the mean of each channel (C,)."""
    return jnp.mean(x, axis=(0, *range(2, x.ndim)))


def _held(array: JaxArray | None) -> Any:
    return None if array is None else array.held


@compiled
def batch_norm(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    training: bool = False,
    momentum: Any = 0.1,
    eps: float = 1e-5,
    keep: bool = True,
) -> Any:
    if 0 in x.shape:
        return NotImplemented
    value, count = x.held, prod(x.shape) // x.shape[1]
    if training:
        # Relative to one value of the channel, as in the portable op: a constant channel becomes
        # exactly zero, and a large mean costs no precision.
        origin = value[(0, slice(None), *(0,) * (value.ndim - 2))]
        shift = _mean(value - _along(origin, value))
        centred = (value - _along(origin, value)) - _along(shift, value)
        var = _mean(centred * centred)
        if running_mean is not None:
            move_towards(running_mean, JaxArray(origin + shift), momentum)
            move_towards(running_var, JaxArray(var * (count / (count - 1))), momentum)
    else:
        origin, shift, var = running_mean.held, None, running_var.held
        centred = value - _along(origin, value)
    rstd = 1.0 / jnp.sqrt(var + eps)
    y = centred * _along(rstd if weight is None else rstd * weight.held, value)
    if bias is not None:
        y = y + _along(bias.held, value)
    if not keep:
        return JaxArray(y), None
    # New arrays, because those given may be written to before the backward pass.
    own = (None if shift is None else JaxArray(shift), JaxArray(origin), JaxArray(rstd))
    return JaxArray(y), (x, *own, weight, bias is not None)


@compiled
def batch_norm_backward(
    dy: Any,
    saved: Any,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> Any:
    x, shift, origin, rstd, weight, with_bias = saved
    dy, rstd, weight = dy.held, rstd.held, _held(weight)
    xhat = x.held - _along(origin.held, dy)
    if shift is not None:
        xhat = xhat - _along(shift.held, dy)
    xhat = xhat * _along(rstd, dy)
    axes = (0, *range(2, dy.ndim))
    along_dy, along_xhat = jnp.sum(dy, axis=axes), jnp.sum(dy * xhat, axis=axes)
    dx = None
    if need_dx:
        dx = dy
        if shift is not None:  # x changes the mean and the variance too
            count = prod(dy.shape) // dy.shape[1]
            dx = dx - _along(along_dy / count, dy) - xhat * _along(along_xhat / count, dy)
        dx = JaxArray(dx * _along(rstd if weight is None else rstd * weight, dy))
    return (
        dx,
        JaxArray(along_xhat) if need_dweight and weight is not None else None,
        JaxArray(along_dy) if need_dbias and with_bias else None,
    )


KERNELS = {"batch_norm": Kernel(batch_norm, batch_norm_backward)}
