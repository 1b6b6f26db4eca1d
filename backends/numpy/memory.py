"""NumPy's arrays in memory that is used again (see ``portacnn.ops.workspace``)."""

import mmap
from math import prod
from typing import Any

import numpy as np

from portacnn.ops import workspace

# bytes from which an array that found no place in an arena gets pages of its own
_LARGE = 256 << 10
# bytes from which the system is asked for large pages, as NumPy does for its own arrays
_HUGE = 4 << 20


def _allocate(nbytes: int) -> mmap.mmap:
    """Pages of the system's, zeros at first. It gets them back at once: ``free`` would keep some of
    what had been an arena.

    An array made in them has them as its base, and its views have that array: NumPy follows the
    chain of bases only through arrays. So the array lives as long as its views.
    """
    try:
        if not hasattr(mmap, "MAP_PRIVATE"):  # Windows, where they are private
            return mmap.mmap(-1, nbytes)
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if nbytes >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        raise MemoryError(f"unable to allocate {nbytes} bytes") from error
    return pages


def _view(pages: mmap.mmap, offset: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.ndarray(shape, dtype, pages, offset)


def _fresh(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    nbytes = prod(shape) * dtype.itemsize
    return np.empty(shape, dtype) if nbytes < _LARGE else _view(_allocate(nbytes), 0, shape, dtype)


_MEMORY = workspace.Memory(_fresh, _allocate, _view)


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """See ``portacnn.ops.workspace``: in the workspace of the pass that is running, if there is
    one."""
    room = workspace.current()
    return np.empty(shape, dtype) if room is None else room.take(_MEMORY, shape, dtype)


def reserve(shape: tuple[int, ...], dtype: Any, *, zeros: bool = False) -> np.ndarray:
    """See ``portacnn.ops.workspace.reserve``."""
    return workspace.reserve(_MEMORY, shape, dtype, zeros=zeros)


def temporaries(*shapes: tuple[int, ...], dtype: Any) -> list[np.ndarray]:
    """See ``portacnn.ops.workspace.temporaries``."""
    return workspace.temporaries(_MEMORY, *shapes, dtype=dtype)
