"""Convolution by XLA's own, and its gradients by the transposes of that linear map.

Notation: x (N, C, *S), weight (O, C/G, *K), y (N, O, *OUT); G groups.
"""

from collections.abc import Callable
from typing import Any

import jax

from portacnn.backends.jax.arrays import JaxArray
from portacnn.backends.jax.compiled import compiled
from portacnn.ops.windows import Windows
from portacnn.runtime import Kernel


def padding(windows: Windows) -> list[tuple[int, int]]:
    """Return the cells before and after each axis that the windows span; negative if some of the
    input is outside."""
    return [
        (-start, start + (o - 1) * s + d * (k - 1) + 1 - n)
        for start, o, s, d, k, n in zip(
            windows.start,
            windows.out,
            windows.stride,
            windows.dilation,
            windows.kernel,
            windows.size,
            strict=True,
        )
    ]


def _map(windows: Windows, groups: int) -> Callable[[Any, Any], Any]:
    """Return the convolution as a function of x and weight."""

    def convolve(x: Any, weight: Any) -> Any:
        return jax.lax.conv_general_dilated(
            x,
            weight,
            windows.stride,
            padding(windows),
            rhs_dilation=windows.dilation,
            feature_group_count=groups,
        )

    return convolve


def _transposed(function: Callable[[Any], Any], like: Any, y: Any) -> Any:
    """Return the adjoint of a linear map of arrays like ``like``, applied to y."""
    return jax.linear_transpose(function, like)(y)[0]


def _with_bias(y: Any, bias: JaxArray | None) -> JaxArray:
    if bias is not None:
        y = y + bias.held.reshape((1, -1) + (1,) * (y.ndim - 2))
    return JaxArray(y)


def _sum(dy: Any) -> JaxArray:
    """Return the gradient of a bias."""
    return JaxArray(dy.sum(axis=(0, *range(2, dy.ndim))))


def _declines(*arrays: JaxArray) -> bool:
    """Whether an array is empty, which XLA's convolution does not take."""
    return any(0 in array.shape for array in arrays)


@compiled
def conv(x: Any, weight: Any, bias: Any, windows: Windows, groups: int, *, keep: bool) -> Any:
    if _declines(x, weight):
        return NotImplemented
    y = _with_bias(_map(windows, groups)(x.held, weight.held), bias)
    return y, (x, weight, bias is not None, windows, groups) if keep else None


@compiled
def conv_backward(
    dy: Any,
    saved: Any,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> Any:
    x, weight, with_bias, windows, groups = saved
    x, weight, dy, convolve = x.held, weight.held, dy.held, _map(windows, groups)
    return (
        JaxArray(_transposed(lambda x: convolve(x, weight), x, dy)) if need_dx else None,
        JaxArray(_transposed(lambda w: convolve(x, w), weight, dy)) if need_dweight else None,
        _sum(dy) if with_bias and need_dbias else None,
    )


@compiled
def conv_transpose(
    x: Any, weight: Any, bias: Any, windows: Windows, groups: int, *, keep: bool
) -> Any:
    if _declines(x, weight):
        return NotImplemented
    convolve, held, factor = _map(windows, groups), x.held, weight.held
    shape = (held.shape[0], factor.shape[1] * groups, *windows.size)
    like = jax.ShapeDtypeStruct(shape, held.dtype)
    y = _with_bias(_transposed(lambda y: convolve(y, factor), like, held), bias)
    return y, (x, weight, bias is not None, windows, groups) if keep else None


@compiled
def conv_transpose_backward(
    dy: Any,
    saved: Any,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> Any:
    x, weight, with_bias, windows, groups = saved
    x, weight, dy, convolve = x.held, weight.held, dy.held, _map(windows, groups)
    return (
        JaxArray(convolve(dy, weight)) if need_dx else None,
        JaxArray(_transposed(lambda w: convolve(dy, w), weight, x)) if need_dweight else None,
        _sum(dy) if with_bias and need_dbias else None,
    )


KERNELS = {
    "conv": Kernel(conv, conv_backward),
    "conv_transpose": Kernel(conv_transpose, conv_transpose_backward),
}
