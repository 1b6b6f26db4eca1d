"""Convolution and pooling through PyTorch's own kernels (oneDNN, cuDNN): they never build columns.

Each forward declines, by ``NotImplemented``, what PyTorch's kernel cannot do: then the portable op runs.
"""

from typing import Any

import torch
import torch.nn.functional as F

from portacnn.ops.windows import Windows
from portacnn.runtime import Kernel

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL = {2: F.avg_pool2d, 3: F.avg_pool3d}


def _even(windows: Windows) -> list[int] | None:
    """The padding as PyTorch takes it, the same before and after; None where it is not."""
    if any(before != after for before, after in windows.pads):
        return None
    return [before for before, _ in windows.pads]


def _ceil_mode(windows: Windows) -> bool:
    """Whether the last window hangs over the padded end on some axis: only ceil mode makes such."""
    return any(
        (o - 1) * s + d * (k - 1) + 1 > n + before + after
        for n, k, s, (before, after), d, o in zip(
            windows.size, windows.kernel, windows.stride, windows.pads, windows.dilation, windows.out, strict=True
        )
    )


@torch.no_grad()
def conv(x: Any, weight: Any, bias: Any, windows: Windows, groups: int, *, keep: bool) -> Any:
    pads = _even(windows)
    if pads is None:
        return NotImplemented
    y = _CONV[len(pads)](x, weight, bias, windows.stride, pads, windows.dilation, groups)
    return y, (x, weight, bias is not None, windows, groups) if keep else None


@torch.no_grad()
def conv_backward(dy: Any, saved: Any, *, need_dx: bool = True) -> Any:
    x, weight, with_bias, windows, groups = saved
    pads = _even(windows)
    return torch.ops.aten.convolution_backward(
        dy,
        x,
        weight,
        [weight.shape[0]] if with_bias else None,
        list(windows.stride),
        pads,
        list(windows.dilation),
        False,
        [0] * len(windows.size),
        groups,
        [need_dx, True, with_bias],
    )


@torch.no_grad()
def max_pool(x: Any, windows: Windows, *, keep: bool) -> Any:
    pads = _even(windows)
    axes = len(windows.size)
    if pads is None or axes == 1 or any(p > k // 2 for p, k in zip(pads, windows.kernel, strict=True)):
        return NotImplemented
    arguments = (list(windows.kernel), list(windows.stride), pads, list(windows.dilation), _ceil_mode(windows))
    y, indices = _MAX_POOL[axes](x, *arguments, return_indices=True)
    return y, (x, indices, arguments) if keep else None


@torch.no_grad()
def max_pool_backward(dy: Any, saved: Any) -> Any:
    x, indices, arguments = saved
    if x.ndim == 4:
        return torch.ops.aten.max_pool2d_with_indices_backward(dy, x, *arguments, indices)
    return torch.ops.aten.max_pool3d_with_indices_backward(dy, x, *arguments, indices)


@torch.no_grad()
def avg_pool(x: Any, windows: Windows, count_include_pad: bool, *, keep: bool) -> Any:
    pads = _even(windows)
    axes = len(windows.size)
    if pads is None or axes == 1:
        return NotImplemented
    arguments = (list(windows.kernel), list(windows.stride), pads, _ceil_mode(windows), count_include_pad, None)
    return _AVG_POOL[axes](x, *arguments), (x, arguments) if keep else None


@torch.no_grad()
def avg_pool_backward(dy: Any, saved: Any) -> Any:
    x, arguments = saved
    if x.ndim == 4:
        return torch.ops.aten.avg_pool2d_backward(dy, x, *arguments)
    return torch.ops.aten.avg_pool3d_backward(dy, x, *arguments)


KERNELS = {
    "conv": Kernel(conv, conv_backward),
    "max_pool": Kernel(max_pool, max_pool_backward),
    "avg_pool": Kernel(avg_pool, avg_pool_backward),
}
