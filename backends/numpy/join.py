"""Sums of arrays on NumPy: several cores, reused memory, and ReLU while a piece of the sum is in
the cache.
"""

from math import prod
from typing import Any

import numpy as np

from portacnn.backends.numpy.memory import empty
from portacnn.backends.numpy.pool import BITS, in_memory_order, relu_backward, zeros_for
from portacnn.backends.threads import in_pieces
from portacnn.runtime import Kernel

_NEAR = 256 << 10  # bytes of a piece, which stays in a core's L2 cache for the next pass


def add(parts: list[np.ndarray]) -> Any:
    return _sum(parts, relu=False)


def add_relu(parts: list[np.ndarray], *, keep: bool = True) -> Any:
    y = _sum(parts, relu=True)
    return y if y is NotImplemented else (y, y if keep else None)


def _sum(parts: list[np.ndarray], relu: bool) -> Any:
    """Return the sum, in the memory layout of the first part."""
    first = parts[0]
    alike = all(part.dtype == first.dtype and part.dtype.kind == "f" for part in parts)
    if len(parts) < 2 or first.ndim == 0 or first.dtype.itemsize not in BITS or not alike:
        return NotImplemented
    order = in_memory_order(first)
    rows = [part.transpose(order) for part in parts]
    y = empty(rows[0].shape, first.dtype)
    step = max(1, _NEAR // max(prod(y.shape[1:]) * y.itemsize, 1))

    def work(some: slice) -> None:
        for start in range(some.start, some.stop, step):
            block = slice(start, min(start + step, some.stop))
            total = y[block]
            np.add(rows[0][block], rows[1][block], out=total)
            for row in rows[2:]:
                total += row[block]
            if relu:
                np.maximum(total, zeros_for(total), out=total)

    in_pieces(work, y.shape[0], y.size)
    return y.transpose(np.argsort(order))


KERNELS = {"add": Kernel(add), "add_relu": Kernel(add_relu, relu_backward)}
