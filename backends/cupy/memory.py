"""How arrays lie in a CUDA device's memory, and how many blocks go through them: what the host
sides of kernels share."""

from typing import Any

import numpy as np

from portacnn.backends.cupy.nvrtc import NULL, supported
from portacnn.backends.cupy.plan import PROCESSORS
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import Windows
from portacnn.runtime import Array, backend_of, dtype_name

THREADS = 256
_VECTOR = 16  # bytes
FULL = 8 * PROCESSORS  # blocks of 256 threads: as many as run at once
# numbers of an array: indices, and what is added to them on the way, then fit into an int
MOST = 2**30


def or_null(array: Array | None) -> Any:
    return NULL if array is None else array


def address(array: Array) -> int:
    return array.data.ptr


def vector(n: int, *arrays: Array | None) -> int:
    """How many numbers of these arrays a thread may read at once where their last axis of n lies
    together: 16 bytes, or 1."""
    count = _VECTOR // arrays[0].itemsize
    return (
        count
        if n % count == 0
        and all(array is None or address(array) % _VECTOR == 0 for array in arrays)
        else 1
    )


def at_or_value(number: Any, dtype: str) -> tuple[Any, Any]:
    """A number that may stand in the device's memory, as kernels take one: (where, 0), or (NULL,
    the number itself)."""
    if hasattr(number, "shape") and not isinstance(number, np.generic):
        return number.astype(dtype, copy=False), 0
    return NULL, number


def can(*arrays: Array) -> bool:
    """Whether kernels take these arrays: of float32 or of float64, all of them, not empty and not
    too large."""
    first = arrays[0].dtype
    return supported(dtype_name(arrays[0])) and all(
        a.dtype == first and 0 < a.size <= MOST for a in arrays
    )


def reachable(windows: Windows) -> bool:
    """Whether the cells that windows reach over, padding included, are no more than an int counts
    on each axis, and worth it."""
    return not windows.sparse and all(
        2 * e + a + b < 2**31 for e, (a, b) in zip(windows.extent, windows.pads, strict=True)
    )


def blocks_for(count: int) -> tuple[int]:
    """A grid for threads that go on to every so many numbers."""
    return (min(-(-count // THREADS), FULL),)


def lies_last(x: Array) -> bool:
    """Whether x (N, C, ...) lies batch-last in memory, or, where it lies neither way, is to be laid
    so."""
    return x.ndim > 1 and not x.flags.c_contiguous


def laid(x: Array, last: bool) -> Array:
    """x as it lies in memory, contiguous: (C, ..., N) if ``last``, else (N, C, ...). A copy where
    it lies otherwise."""
    return backend_of(x).contiguous(batch_last(x) if last else x)


def unlaid(memory: Array, last: bool) -> Array:
    """Undoes ``laid``."""
    return batch_first(memory) if last else memory
