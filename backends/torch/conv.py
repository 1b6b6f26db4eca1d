"""Convolution with PyTorch's own kernels (oneDNN, cuDNN), which build no columns.

Each forward function returns ``NotImplemented`` for a case that PyTorch's kernel does not support;
the portable op then runs.
"""

from typing import Any

import torch
import torch.nn.functional as F

from portacnn.ops.windows import Windows
from portacnn.runtime import Kernel

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_aten = torch.ops.aten


def even(windows: Windows) -> list[int] | None:
    """Return the padding in PyTorch's form. None if before and after differ, or the windows are
    sparse.
    """
    if windows.sparse or any(before != after for before, after in windows.pads):
        return None
    return [before for before, _ in windows.pads]


def beyond(windows: Windows) -> list[int]:
    """Return the number of padded input cells after the last window; negative if it extends beyond
    the end (ceil mode).
    """
    return [
        n + before + after - ((o - 1) * s + d * (k - 1) + 1)
        for n, k, s, (before, after), d, o in zip(
            windows.size,
            windows.kernel,
            windows.stride,
            windows.pads,
            windows.dilation,
            windows.out,
            strict=True,
        )
    ]


@torch.no_grad()
def conv(x: Any, weight: Any, bias: Any, windows: Windows, groups: int, *, keep: bool) -> Any:
    pads = even(windows)
    if pads is None:
        return NotImplemented
    y = _CONV[len(pads)](x, weight, bias, windows.stride, pads, windows.dilation, groups)
    return y, (x, weight, bias is not None, windows, groups) if keep else None


@torch.no_grad()
def conv_backward(
    dy: Any,
    saved: Any,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> Any:
    return _conv_gradients(dy, saved, [need_dx, need_dweight, need_dbias], transposed=False)


@torch.no_grad()
def conv_transpose(
    x: Any, weight: Any, bias: Any, windows: Windows, groups: int, *, keep: bool
) -> Any:
    pads = even(windows)
    if pads is None:
        return NotImplemented
    y = _CONV_TRANSPOSE[len(pads)](
        x, weight, bias, windows.stride, pads, beyond(windows), groups, windows.dilation
    )
    return y, (x, weight, bias is not None, windows, groups) if keep else None


@torch.no_grad()
def conv_transpose_backward(
    dy: Any,
    saved: Any,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> Any:
    return _conv_gradients(dy, saved, [need_dx, need_dweight, need_dbias], transposed=True)


def _conv_gradients(dy: Any, saved: Any, wanted: list[bool], transposed: bool) -> Any:
    x, weight, with_bias, windows, groups = saved
    need_dx, need_dweight, need_dbias = wanted
    return _aten.convolution_backward(
        dy,
        x,
        weight,
        [dy.shape[1]] if with_bias else None,
        list(windows.stride),
        even(windows),
        list(windows.dilation),
        transposed,
        beyond(windows) if transposed else [0] * len(windows.size),
        groups,
        [need_dx, need_dweight, with_bias and need_dbias],
    )


KERNELS = {
    "conv": Kernel(conv, conv_backward),
    "conv_transpose": Kernel(conv_transpose, conv_transpose_backward),
}
