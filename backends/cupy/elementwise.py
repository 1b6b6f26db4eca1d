"""ReLU, sums of arrays, and batches from a data set on CUDA (cuda/elementwise.cu): one launch each.

Notation: N batch, C channels, S the spatial axes; for ``take_batch`` as in ops/batch.py.
"""

from math import prod
from typing import Any

import numpy as np

from portacnn.backends.cupy.memory import (
    MOST,
    THREADS,
    blocks_for,
    can,
    laid,
    lies_last,
    or_null,
    unlaid,
)
from portacnn.backends.cupy.nvrtc import Variant, kernel
from portacnn.ops.layout import batch_first
from portacnn.runtime import Array, Kernel, backend_of, dtype_name

FILE = "elementwise.cu"
VARIANTS: list[Variant] = [(FILE, {"BYTES": 0}), (FILE, {"BYTES": 1})]
_AT_ONCE = 4  # arrays that one launch adds
_MOST_TILES = 65535  # limit of a grid dimension


def _launch(name: str, *arguments: Any, like: Array) -> None:
    """Launch with threads that loop over the elements of ``like``."""
    run = kernel(FILE, name, dtype_name(like), BYTES=0)
    run(blocks_for(like.size), (THREADS,), (*arguments, np.int32(like.size)))


def relu(x: Array, *, keep: bool = True) -> Any:
    import cupy as cp

    if not can(x):
        return NotImplemented
    last = lies_last(x)
    xt = laid(x, last)
    y = cp.empty(xt.shape, dtype=x.dtype)
    _launch("relu", xt, y, like=y)
    return unlaid(y, last), (y, last) if keep else None


def relu_backward(dy: Array, y: Any) -> Array:
    import cupy as cp

    y, last = y
    dx = cp.empty(y.shape, dtype=y.dtype)
    _launch("relu_backward", laid(dy, last), y, dx, like=y)
    return unlaid(dx, last)


def _sum(parts: list[Array], relu: bool) -> Any:
    """Return the sum in memory order, with the layout of the first part, and whether that is
    batch-last.
    """
    import cupy as cp

    if len(parts) < 2 or not can(*parts):
        return NotImplemented
    last = lies_last(parts[0])
    total, *rest = (laid(part, last) for part in parts)
    while rest:
        some, rest = rest[: _AT_ONCE - 1], rest[_AT_ONCE - 1 :]
        arrays = [total, *some, *[None] * (_AT_ONCE - 1 - len(some))]
        total = cp.empty(total.shape, dtype=total.dtype)
        _launch("add", *map(or_null, arrays), total, np.bool_(relu and not rest), like=total)
    return total, last


def add(parts: list[Array]) -> Any:
    total = _sum(parts, relu=False)
    return total if total is NotImplemented else unlaid(*total)


def add_relu(parts: list[Array], *, keep: bool = True) -> Any:
    total = _sum(parts, relu=True)
    return total if total is NotImplemented else (unlaid(*total), total if keep else None)


def take_batch(
    images: Array, indices: Array | None = None, mean: Array | None = None, std: Array | None = None
) -> Any:
    import cupy as cp

    like = images if std is None else std
    if (
        images.ndim < 3
        or (indices is None and std is None)
        or not can(like)
        or not images.flags.c_contiguous
    ):
        return NotImplemented
    count, channels, *size = images.shape
    batch, length = count if indices is None else indices.shape[0], channels * prod(size)
    if not 0 < batch * length <= MOST or count == 0 or batch > 32 * _MOST_TILES:
        return NotImplemented
    contiguous = backend_of(images).contiguous
    if indices is not None:
        indices = contiguous(indices.astype("int64", copy=False))
    mean, std = (None if constant is None else contiguous(constant) for constant in (mean, std))
    y = cp.empty((channels, *size, batch), dtype=like.dtype)
    run = kernel(FILE, "take_batch", dtype_name(y), BYTES=int(images.dtype != y.dtype))
    grid = (-(-length // 32), -(-batch // 32))
    sizes = np.int32(count), np.int32(length), np.int32(prod(size)), np.int32(batch)
    run(grid, (THREADS,), (images, or_null(indices), or_null(mean), or_null(std), y, *sizes))
    return batch_first(y)


KERNELS = {
    "relu": Kernel(relu, relu_backward),
    "add": Kernel(add),
    "add_relu": Kernel(add_relu, relu_backward),
    "take_batch": Kernel(take_batch),
}
