"""Limits of each element (``clip``, ReLU6) on NumPy: several cores, reused memory, a few passes
over a piece that stays in the cache.

The backward pass needs one bit of each input. It is stored as a byte, all bits set or none, so that
the forward pass does not keep its input, and the gradient is one pass with ``&`` (see ``pool``).
"""

from collections.abc import Iterator
from math import inf, prod
from typing import Any

import numpy as np

from portacnn.backends.numpy.memory import empty
from portacnn.backends.numpy.pool import BITS, empty_like, in_memory_order
from portacnn.backends.threads import in_pieces
from portacnn.runtime import Kernel

_NEAR = 256 << 10  # bytes of a piece, which stays in a core's L2 cache for the next pass


def clip(
    x: np.ndarray, *, min: float | None = None, max: float | None = None, keep: bool = True
) -> Any:
    """Compute ``clip``. Declines dtypes other than float32 and float64, and 0-dimensional
    arrays.
    """
    if x.dtype.itemsize not in BITS or x.ndim == 0:
        return NotImplemented
    order = in_memory_order(x)
    y, inside = empty_like(x), None
    rows_x, rows_y = x.transpose(order), y.transpose(order)
    rows_inside = empty(rows_x.shape, np.dtype(np.int8)) if keep else None
    if rows_inside is not None:
        inside = rows_inside.transpose(np.argsort(order))
    low, high = -inf if min is None else float(min), inf if max is None else float(max)

    def work(some: slice) -> None:
        for block in _pieces(some, rows_x):
            np.clip(rows_x[block], low, high, out=rows_y[block])
            if rows_inside is not None:
                _find_inside(rows_x[block], min, max, rows_inside[block])

    in_pieces(work, len(rows_x), x.size)
    return y, inside


def _find_inside(x: np.ndarray, low: float | None, high: float | None, out: np.ndarray) -> None:
    """Write -1 where x is within the limits, else 0."""
    mask = out.view(bool)
    if low is None and high is None:
        mask[...] = True
    elif low is None:
        np.less_equal(x, high, out=mask)
    else:
        np.greater_equal(x, low, out=mask)
        if high is not None:
            mask &= np.less_equal(x, high)
    np.negative(out, out=out)


def clip_backward(dy: np.ndarray, saved: np.ndarray) -> np.ndarray:
    order = in_memory_order(saved)
    bits = BITS[dy.dtype.itemsize]
    given, mask = dy.transpose(order).view(bits), saved.transpose(order)
    dx = empty(mask.shape, dy.dtype)
    result = dx.view(bits)

    def work(some: slice) -> None:
        for block in _pieces(some, dx):
            np.bitwise_and(given[block], mask[block], out=result[block])

    in_pieces(work, len(dx), dx.size)
    return dx.transpose(np.argsort(order))


def _pieces(some: slice, rows: np.ndarray) -> Iterator[slice]:
    """Split a slice of rows into pieces."""
    step = max(1, _NEAR // max(prod(rows.shape[1:]) * rows.itemsize, 1))
    for start in range(some.start, some.stop, step):
        yield slice(start, min(start + step, some.stop))


KERNELS = {"clip": Kernel(clip, clip_backward)}
