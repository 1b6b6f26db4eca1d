"""Limits of each element (``clip``, ReLU6) compiled by numba: one pass, one byte an element for the
gradient. The loops are written so that LLVM vectorizes them.
"""

from math import inf
from typing import Any

import numpy as np

from portacnn.backends.numba.compile import compiled, read
from portacnn.backends.numpy.memory import empty
from portacnn.backends.numpy.pool import BITS, in_memory_order
from portacnn.backends.threads import in_pieces
from portacnn.runtime import Kernel


@compiled
def _forward(x, low, high, y, inside):
    """Write y, and inside = -1 where x is within the limits, else 0; inside may be empty."""
    if inside.size:
        for i in range(x.size):
            value = x[i]
            within = (value >= low) & (value <= high)
            value = low if value < low else value  # NaN stays
            y[i] = high if value > high else value
            inside[i] = -np.int8(within)
    else:
        for i in range(x.size):
            value = x[i]
            value = low if value < low else value
            y[i] = high if value > high else value


@compiled
def _backward(dy, inside, dx):
    zero = dx.dtype.type(0)
    for i in range(dx.size):
        value, within = dy[i], inside[i]
        dx[i] = value if within != 0 else zero


def clip(
    x: np.ndarray, *, min: float | None = None, max: float | None = None, keep: bool = True
) -> Any:
    """Compute ``clip``. Declines dtypes other than float32 and float64, no limit at all, and arrays
    of 0 dimensions or with gaps in memory.
    """
    if x.dtype.itemsize not in BITS or x.ndim == 0 or (min is None and max is None):
        return NotImplemented
    order = in_memory_order(x)
    rows = x.transpose(order)
    if not rows.flags.c_contiguous:
        return NotImplemented
    back, number = np.argsort(order), x.dtype.type
    y = empty(rows.shape, x.dtype)
    inside = empty(rows.shape if keep else (0,), np.dtype(np.int8))
    low, high = number(-inf if min is None else min), number(inf if max is None else max)
    source, result, mask = read(rows), y.reshape(-1), inside.reshape(-1)
    in_pieces(lambda s: _forward(source[s], low, high, result[s], mask[s]), x.size, x.size)
    return y.transpose(back), inside.transpose(back) if keep else None


def clip_backward(dy: np.ndarray, saved: np.ndarray) -> np.ndarray:
    order = in_memory_order(saved)
    dx = empty(tuple(saved.shape[axis] for axis in order), dy.dtype)
    given, mask = read(np.ascontiguousarray(dy.transpose(order))), read(saved.transpose(order))
    result = dx.reshape(-1)
    in_pieces(lambda s: _backward(given[s], mask[s], result[s]), dx.size, dx.size)
    return dx.transpose(np.argsort(order))


KERNELS = {"clip": Kernel(clip, clip_backward)}
