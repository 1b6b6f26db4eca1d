"""Convolution and pooling through PyTorch's own kernels (oneDNN, cuDNN): they never build columns.

Each forward declines, by ``NotImplemented``, what PyTorch's kernel cannot do: then the portable op runs.
"""

from typing import Any

import torch
import torch.nn.functional as F

from portacnn.backends import torch_norm
from portacnn.ops.windows import Windows
from portacnn.runtime import Kernel

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
aten = torch.ops.aten


def _even(windows: Windows) -> list[int] | None:
    """The padding as PyTorch takes it, the same before and after; None where it is not, or would be laid out for little."""
    if windows.sparse or any(before != after for before, after in windows.pads):
        return None
    return [before for before, _ in windows.pads]


def _beyond(windows: Windows) -> list[int]:
    """How many cells of the padded input lie behind the last window; below 0 where that hangs over the end (ceil mode)."""
    return [
        n + before + after - ((o - 1) * s + d * (k - 1) + 1)
        for n, k, s, (before, after), d, o in zip(
            windows.size, windows.kernel, windows.stride, windows.pads, windows.dilation, windows.out, strict=True
        )
    ]


@torch.no_grad()
def conv(x: Any, weight: Any, bias: Any, windows: Windows, groups: int, *, keep: bool) -> Any:
    pads = _even(windows)
    if pads is None:
        return NotImplemented
    y = _CONV[len(pads)](x, weight, bias, windows.stride, pads, windows.dilation, groups)
    return y, (x, weight, bias is not None, windows, groups) if keep else None


@torch.no_grad()
def conv_backward(dy: Any, saved: Any, *, need_dx: bool = True) -> Any:
    return _conv_gradients(dy, saved, need_dx, transposed=False)


@torch.no_grad()
def conv_transpose(x: Any, weight: Any, bias: Any, windows: Windows, groups: int, *, keep: bool) -> Any:
    pads = _even(windows)
    if pads is None:
        return NotImplemented
    y = _CONV_TRANSPOSE[len(pads)](x, weight, bias, windows.stride, pads, _beyond(windows), groups, windows.dilation)
    return y, (x, weight, bias is not None, windows, groups) if keep else None


@torch.no_grad()
def conv_transpose_backward(dy: Any, saved: Any, *, need_dx: bool = True) -> Any:
    return _conv_gradients(dy, saved, need_dx, transposed=True)


def _conv_gradients(dy: Any, saved: Any, need_dx: bool, transposed: bool) -> Any:
    x, weight, with_bias, windows, groups = saved
    return aten.convolution_backward(
        dy,
        x,
        weight,
        [dy.shape[1]] if with_bias else None,
        list(windows.stride),
        _even(windows),
        list(windows.dilation),
        transposed,
        _beyond(windows) if transposed else [0] * len(windows.size),
        groups,
        [need_dx, True, with_bias],
    )


# Pooling in one dimension is pooling in two over images of one row: PyTorch's own 1-d functions have no backward of their own.


def _row(numbers: Any, one: int) -> list[int]:
    return [one, *numbers] if len(numbers) == 1 else list(numbers)


def _rows(x: Any) -> Any:
    return x[:, :, None] if x.ndim == 3 else x


def _flat(y: Any, axes: int) -> Any:
    return y[:, :, 0] if axes == 1 else y


def _pooling(windows: Windows) -> tuple | None:
    """(kernel, stride, pads) as PyTorch's pools take them; None where they do not: pads that differ, or are too wide."""
    pads = _even(windows)
    if pads is None or any(p > k // 2 for p, k in zip(pads, windows.kernel, strict=True)):
        return None
    return _row(windows.kernel, 1), _row(windows.stride, 1), _row(pads, 0)


@torch.no_grad()
def max_pool(x: Any, windows: Windows, *, keep: bool) -> Any:
    geometry = _pooling(windows)
    if geometry is None:
        return NotImplemented
    arguments = (*geometry, _row(windows.dilation, 1), min(_beyond(windows)) < 0)
    x = _rows(x)
    pool = F.max_pool2d if x.ndim == 4 else F.max_pool3d
    y, indices = pool(x, *arguments, return_indices=True)
    return _flat(y, len(windows.size)), (x, indices, arguments, len(windows.size)) if keep else None


@torch.no_grad()
def max_pool_backward(dy: Any, saved: Any) -> Any:
    x, indices, arguments, axes = saved
    backward = aten.max_pool2d_with_indices_backward if x.ndim == 4 else aten.max_pool3d_with_indices_backward
    return _flat(backward(_rows(dy), x, *arguments, indices), axes)


@torch.no_grad()
def avg_pool(x: Any, windows: Windows, count_include_pad: bool, divisor: int | None, *, keep: bool) -> Any:
    geometry = _pooling(windows)
    if geometry is None or max(windows.dilation) > 1:
        return NotImplemented
    if len(windows.size) == 3 and any(n < k for n, k in zip(windows.size, windows.kernel, strict=True)):
        return NotImplemented  # avg_pool3d alone asks that the kernel fit into the input without its padding
    arguments = (*geometry, min(_beyond(windows)) < 0, count_include_pad, divisor)
    x = _rows(x)
    pool = F.avg_pool2d if x.ndim == 4 else F.avg_pool3d
    return _flat(pool(x, *arguments), len(windows.size)), (x, arguments, len(windows.size)) if keep else None


@torch.no_grad()
def avg_pool_backward(dy: Any, saved: Any) -> Any:
    x, arguments, axes = saved
    backward = aten.avg_pool2d_backward if x.ndim == 4 else aten.avg_pool3d_backward
    return _flat(backward(_rows(dy), x, *arguments), axes)


@torch.no_grad()
def adaptive_avg_pool(x: Any, size: tuple[int, ...], *, keep: bool) -> Any:
    if len(size) > 3:
        return NotImplemented
    x = _rows(x)
    pool = F.adaptive_avg_pool2d if x.ndim == 4 else F.adaptive_avg_pool3d
    return _flat(pool(x, _row(size, 1)), len(size)), (x, len(size)) if keep else None


@torch.no_grad()
def adaptive_avg_pool_backward(dy: Any, saved: Any) -> Any:
    x, axes = saved
    backward = aten._adaptive_avg_pool2d_backward if x.ndim == 4 else aten._adaptive_avg_pool3d_backward
    return _flat(backward(_rows(dy), x), axes)


@torch.no_grad()
def adaptive_max_pool(x: Any, size: tuple[int, ...], *, keep: bool) -> Any:
    if len(size) > 3:
        return NotImplemented
    x = _rows(x)
    pool = F.adaptive_max_pool2d if x.ndim == 4 else F.adaptive_max_pool3d
    y, indices = pool(x, _row(size, 1), return_indices=True)
    return _flat(y, len(size)), (x, indices, len(size)) if keep else None


@torch.no_grad()
def adaptive_max_pool_backward(dy: Any, saved: Any) -> Any:
    x, indices, axes = saved
    backward = aten.adaptive_max_pool2d_backward if x.ndim == 4 else aten.adaptive_max_pool3d_backward
    return _flat(backward(_rows(dy), x, indices), axes)


KERNELS = {
    "conv": Kernel(conv, conv_backward),
    "conv_transpose": Kernel(conv_transpose, conv_transpose_backward),
    "max_pool": Kernel(max_pool, max_pool_backward),
    "avg_pool": Kernel(avg_pool, avg_pool_backward),
    "adaptive_avg_pool": Kernel(adaptive_avg_pool, adaptive_avg_pool_backward),
    "adaptive_max_pool": Kernel(adaptive_max_pool, adaptive_max_pool_backward),
    **torch_norm.KERNELS,
}
