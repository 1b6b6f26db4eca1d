"""Normalization and special functions with PyTorch's own kernels: one pass each, where the portable
ops need ten.

Each forward function returns ``NotImplemented`` for a case that PyTorch's kernel does not support;
the portable op then runs.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from portacnn.ops.norm import trailing
from portacnn.runtime import Kernel

_aten = torch.ops.aten

# PyTorch computes y as a * x + b, which loses precision if the mean is large compared with the
# standard deviation (a constant -3333 in float32 ends 0.02 off, not 0). Its kernels therefore get x
# minus one of the elements that share a mean, which changes only the mean.


# PyTorch 2.13 misreads weights that are not contiguous, in the backward passes of batch norm and
# group norm.


def _contiguous(array: Any) -> Any:
    return None if array is None else array.contiguous()


def _less_first(x: Any, sets: int) -> Any:
    """Return x, split into ``sets`` equal parts, minus the first element of each part;
    contiguous.
    """
    flat = x.reshape(sets, -1)
    return (flat - flat[:, :1]).reshape(x.shape).contiguous()


@torch.no_grad()
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
    if x.numel() == 0 or isinstance(momentum, torch.Tensor):
        return NotImplemented
    x, weight, bias = x.contiguous(), _contiguous(weight), _contiguous(bias)
    if not training:
        y, mean, rstd = _aten.native_batch_norm(
            x, weight, bias, running_mean, running_var, False, 0.0, eps
        )
        # The backward pass reads the running statistics, which may have changed by then.
        running = (running_mean.clone(), running_var.clone()) if keep else ()
        return y, (x, weight, bias is not None, *running, mean, rstd, False, eps) if keep else None
    origin = x[0].reshape(x.shape[1], -1)[:, 0].clone()
    x = x - origin.reshape(-1, *[1] * (x.ndim - 2))
    no_mean = None if running_mean is None else torch.zeros_like(running_mean)
    y, mean, rstd = _aten.native_batch_norm(
        x, weight, bias, no_mean, running_var, True, momentum, eps
    )
    if running_mean is not None:
        running_mean.copy_((1.0 - momentum) * running_mean + momentum * (mean + origin))
    return y, (x, weight, bias is not None, None, None, mean, rstd, True, eps) if keep else None


@torch.no_grad()
def batch_norm_backward(
    dy: Any,
    saved: Any,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> Any:
    x, weight, with_bias, running_mean, running_var, mean, rstd, training, eps = saved
    wanted = [need_dx, need_dweight and weight is not None, need_dbias and with_bias]
    # Both contiguous: if an axis of length 1 leaves the memory format ambiguous, PyTorch 2.13
    # misreads one of them.
    dy = dy.contiguous()
    return _wanted(
        wanted,
        _aten.native_batch_norm_backward(
            dy, x, weight, running_mean, running_var, mean, rstd, training, eps, wanted
        ),
    )


@torch.no_grad()
def group_norm(
    x: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    *,
    eps: float = 1e-5,
    keep: bool = True,
) -> Any:
    if x.numel() == 0:
        return NotImplemented
    n, c, *size = x.shape
    x, weight, bias = _less_first(x, n * num_groups), _contiguous(weight), _contiguous(bias)
    y, mean, rstd = _aten.native_group_norm(x, weight, bias, n, c, prod(size), num_groups, eps)
    return y, (x, weight, bias is not None, mean, rstd, num_groups) if keep else None


@torch.no_grad()
def group_norm_backward(
    dy: Any,
    saved: Any,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> Any:
    x, weight, with_bias, mean, rstd, num_groups = saved
    n, c, *size = x.shape
    need_dbias = need_dbias and with_bias
    # without a weight, PyTorch's function fails if it is asked for the bias's gradient
    wanted = [need_dx, need_dweight and weight is not None, need_dbias and weight is not None]
    dx, dweight, dbias = _wanted(
        wanted,
        _aten.native_group_norm_backward(
            dy.contiguous(), x, mean, rstd, weight, n, c, prod(size), num_groups, wanted
        ),
    )
    if need_dbias and weight is None:
        dbias = dy.sum(dim=[0, *range(2, dy.ndim)])
    return dx, dweight, dbias


@torch.no_grad()
def layer_norm(
    x: Any,
    normalized_shape: int | Sequence[int],
    weight: Any = None,
    bias: Any = None,
    *,
    eps: float = 1e-5,
    keep: bool = True,
) -> Any:
    if x.numel() == 0:
        return NotImplemented
    shape = list(trailing(normalized_shape))
    x, weight, bias = (
        _less_first(x, x.numel() // prod(shape)),
        _contiguous(weight),
        _contiguous(bias),
    )
    y, mean, rstd = _aten.native_layer_norm(x, shape, weight, bias, eps)
    return y, (x, shape, weight, bias, mean, rstd) if keep else None


@torch.no_grad()
def layer_norm_backward(
    dy: Any,
    saved: Any,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> Any:
    x, shape, weight, bias, mean, rstd = saved
    wanted = [need_dx, need_dweight and weight is not None, need_dbias and bias is not None]
    return _wanted(
        wanted, _aten.native_layer_norm_backward(dy, x, shape, mean, rstd, weight, bias, wanted)
    )


def _wanted(wanted: list[bool], gradients: Sequence[Any]) -> tuple[Any, ...]:
    """Replace gradients that were not requested by None; PyTorch returns undefined values for
    them.
    """
    return tuple(
        gradient if want else None for want, gradient in zip(wanted, gradients, strict=True)
    )


def erf(x: Any) -> Any:
    return torch.special.erf(x)


KERNELS = {
    "batch_norm": Kernel(batch_norm, batch_norm_backward),
    "group_norm": Kernel(group_norm, group_norm_backward),
    "layer_norm": Kernel(layer_norm, layer_norm_backward),
    "erf": Kernel(erf),
}
