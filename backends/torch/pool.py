"""Pooling with PyTorch's own kernels. See ``conv`` for what they decline."""

from typing import Any

import torch
import torch.nn.functional as F

from portacnn.backends.torch.conv import beyond, even
from portacnn.ops.windows import Windows
from portacnn.runtime import Kernel

_aten = torch.ops.aten

# One-dimensional pooling is two-dimensional pooling over images of one row, because PyTorch's 1-d
# functions have no backward function.


def _row(numbers: Any, one: int) -> list[int]:
    return [one, *numbers] if len(numbers) == 1 else list(numbers)


def _rows(x: Any) -> Any:
    return x[:, :, None] if x.ndim == 3 else x


def _flat(y: Any, axes: int) -> Any:
    return y[:, :, 0] if axes == 1 else y


def _pooling(windows: Windows) -> tuple | None:
    """Return (kernel, stride, pads) in PyTorch's form. None if before and after differ or the
    padding is too wide.
    """
    pads = even(windows)
    if pads is None or any(p > k // 2 for p, k in zip(pads, windows.kernel, strict=True)):
        return None
    # A single window that extends beyond the end by more than the (shortened) stride: PyTorch would
    # compute no output.
    spans = (d * (k - 1) + 1 for d, k in zip(windows.dilation, windows.kernel, strict=True))
    if any(span > n + 2 * p for span, n, p in zip(spans, windows.size, pads, strict=True)):
        return None
    return _row(windows.kernel, 1), _row(windows.stride, 1), _row(pads, 0)


@torch.no_grad()
def max_pool(x: Any, windows: Windows, *, keep: bool) -> Any:
    geometry = _pooling(windows)
    if geometry is None:
        return NotImplemented
    arguments = (*geometry, _row(windows.dilation, 1), min(beyond(windows)) < 0)
    x = _rows(x)
    pool = F.max_pool2d if x.ndim == 4 else F.max_pool3d
    y, indices = pool(x, *arguments, return_indices=True)
    return _flat(y, len(windows.size)), (x, indices, arguments, len(windows.size)) if keep else None


@torch.no_grad()
def max_pool_backward(dy: Any, saved: Any) -> Any:
    x, indices, arguments, axes = saved
    backward = (
        _aten.max_pool2d_with_indices_backward
        if x.ndim == 4
        else _aten.max_pool3d_with_indices_backward
    )
    return _flat(backward(_rows(dy), x, *arguments, indices), axes)


@torch.no_grad()
def avg_pool(
    x: Any, windows: Windows, count_include_pad: bool, divisor: int | None, *, keep: bool
) -> Any:
    geometry = _pooling(windows)
    if geometry is None or max(windows.dilation) > 1:
        return NotImplemented
    if len(windows.size) == 3 and any(
        n < k for n, k in zip(windows.size, windows.kernel, strict=True)
    ):
        # only avg_pool3d requires that the kernel fits into the unpadded input
        return NotImplemented
    arguments = (*geometry, min(beyond(windows)) < 0, count_include_pad, divisor)
    x = _rows(x)
    pool = F.avg_pool2d if x.ndim == 4 else F.avg_pool3d
    return _flat(pool(x, *arguments), len(windows.size)), (
        x,
        arguments,
        len(windows.size),
    ) if keep else None


@torch.no_grad()
def avg_pool_backward(dy: Any, saved: Any) -> Any:
    x, arguments, axes = saved
    backward = _aten.avg_pool2d_backward if x.ndim == 4 else _aten.avg_pool3d_backward
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
    backward = (
        _aten._adaptive_avg_pool2d_backward if x.ndim == 4 else _aten._adaptive_avg_pool3d_backward
    )
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
    backward = (
        _aten.adaptive_max_pool2d_backward if x.ndim == 4 else _aten.adaptive_max_pool3d_backward
    )
    return _flat(backward(_rows(dy), x, indices), axes)


KERNELS = {
    "max_pool": Kernel(max_pool, max_pool_backward),
    "avg_pool": Kernel(avg_pool, avg_pool_backward),
    "adaptive_avg_pool": Kernel(adaptive_avg_pool, adaptive_avg_pool_backward),
    "adaptive_max_pool": Kernel(adaptive_max_pool, adaptive_max_pool_backward),
}
