"""numba, as the kernels here use it: machine code that lets go of the interpreter's lock, kept on disk for the next process."""

import logging
from collections.abc import Callable
from typing import Any

import numba

from portacnn.cache import cache_folder

_log = logging.getLogger("portacnn")


def compiled(function: Callable[..., Any], *, reorder: bool = True) -> Any:
    """``numba.njit`` for a kernel. What it compiles is kept in portacnn's cache folder (or in NUMBA_CACHE_DIR, where that is set).

    With ``reorder``, sums may be reordered, and a product and a sum rounded once; NaN and infinity count as everywhere.
    """
    loose = {"reassoc", "contract", "nsz"} if reorder else False
    kept = numba.config.CACHE_DIR
    try:
        numba.config.CACHE_DIR = kept or str(cache_folder() / "numba")  # read when a function is made, and only then
        return numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=loose)(function)
    except (RuntimeError, OSError) as error:  # no folder that can be written to
        _log.warning("kernels will be compiled anew in every process: %s", error)
        return numba.njit(nogil=True, error_model="numpy", fastmath=loose)(function)
    finally:
        numba.config.CACHE_DIR = kept
