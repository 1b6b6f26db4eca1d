"""NumPy arrays in reused memory (see ``portacnn.ops.workspace``)."""

import mmap
from math import prod
from typing import Any

import numpy as np

from portacnn.ops import workspace

# bytes; larger arrays that do not fit into an arena get their own pages
_LARGE = 256 << 10
# bytes; larger mappings request huge pages, as NumPy does for its arrays
_HUGE = 4 << 20


def _allocate(nbytes: int) -> mmap.mmap:
    """Map zeroed pages from the operating system. They are returned to it at once when freed;
    ``free`` might keep a part.

    An array in these pages has them as its base, and views of it have the array as theirs, because
    NumPy follows chains of bases through arrays only. The array therefore lives as long as its
    views.
    """
    try:
        if not hasattr(mmap, "MAP_PRIVATE"):  # Windows, where mappings are private
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
    """Return an uninitialized array, in the workspace of the running pass if there is one. See
    ``portacnn.ops.workspace``.
    """
    active = workspace.current()
    return np.empty(shape, dtype) if active is None else active.take(_MEMORY, shape, dtype)


def reserve(shape: tuple[int, ...], dtype: Any, *, zeros: bool = False) -> np.ndarray:
    """Return a kept array. See ``portacnn.ops.workspace.reserve``."""
    return workspace.reserve(_MEMORY, shape, dtype, zeros=zeros)


def temporaries(*shapes: tuple[int, ...], dtype: Any) -> list[np.ndarray]:
    """Return temporary arrays. See ``portacnn.ops.workspace.temporaries``."""
    return workspace.temporaries(_MEMORY, *shapes, dtype=dtype)
