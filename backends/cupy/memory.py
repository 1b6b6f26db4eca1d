"""Memory layouts of arrays on a CUDA device and grid sizes, shared by the host code of the
kernels.
"""

from typing import Any

import numpy as np

from portacnn.backends.cupy.nvrtc import NULL, supported
from portacnn.backends.cupy.plan import PROCESSORS
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import Windows
from portacnn.runtime import Array, backend_of, dtype_name

THREADS = 256
_VECTOR = 16  # bytes
FULL = 8 * PROCESSORS  # blocks of 256 threads that run at once
# elements of an array; indices plus offsets then fit into an int
MOST = 2**30


def or_null(array: Array | None) -> Any:
    """Return the array, or NULL for None."""
    return NULL if array is None else array


def address(array: Array) -> int:
    """Return the address of the array's first element."""
    return array.data.ptr


def vector(n: int, *arrays: Array | None) -> int:
    """Return how many elements of these arrays, whose last axis has size n, a thread may read at
    once: 16 bytes, or 1.
    """
    count = _VECTOR // arrays[0].itemsize
    return (
        count
        if n % count == 0
        and all(array is None or address(array) % _VECTOR == 0 for array in arrays)
        else 1
    )


def at_or_value(number: Any, dtype: str) -> tuple[Any, Any]:
    """Return a kernel's two arguments for a number that may be in device memory: (array, 0) or
    (NULL, number).
    """
    if hasattr(number, "shape") and not isinstance(number, np.generic):
        return number.astype(dtype, copy=False), 0
    return NULL, number


def can(*arrays: Array) -> bool:
    """Return whether the kernels support these arrays: all float32 or all float64, not empty and
    not too large.
    """
    first = arrays[0].dtype
    return supported(dtype_name(arrays[0])) and all(
        a.dtype == first and 0 < a.size <= MOST for a in arrays
    )


def reachable(windows: Windows) -> bool:
    """Return whether an int can count the cells that the windows span on each axis, padding
    included, and the windows are not sparse.
    """
    return not windows.sparse and all(
        2 * e + a + b < 2**31 for e, (a, b) in zip(windows.extent, windows.pads, strict=True)
    )


def blocks_for(count: int) -> tuple[int]:
    """Return a grid for kernels whose threads loop over all elements."""
    return (min(-(-count // THREADS), FULL),)


def lies_last(x: Array) -> bool:
    """Return whether x (N, C, ...) is stored batch-last, or, if it is contiguous in neither order,
    will be.
    """
    return x.ndim > 1 and not x.flags.c_contiguous


def laid(x: Array, last: bool) -> Array:
    """Return x in memory order, contiguous: (C, ..., N) if ``last``, else (N, C, ...). Copies if
    necessary.
    """
    return backend_of(x).contiguous(batch_last(x) if last else x)


def unlaid(memory: Array, last: bool) -> Array:
    """Undo ``laid``."""
    return batch_first(memory) if last else memory
