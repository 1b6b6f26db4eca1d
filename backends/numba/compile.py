"""numba, as the kernels here use it: machine code that lets go of the interpreter's lock, kept on disk for the next process."""

import logging
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numba

from portacnn.cache import cache_folder

_log = logging.getLogger("portacnn")


@cache
def _folder() -> str | None:
    """Where machine code is kept; None where nothing can be written.

    A folder for each state of the sources: numba looks at the file alone that a function stands in, and would go on using what
    it once made of an older file beside that.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    state = sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    try:
        folder = Path(numba.config.CACHE_DIR or cache_folder() / "numba") / state
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        _log.warning("kernels will be compiled anew in every process, for want of a folder to keep them in: %s", error)
        return None
    return str(folder)


def compiled(function: Callable[..., Any], *, reorder: bool = True) -> Any:
    """``numba.njit`` for a kernel. What it compiles is kept in portacnn's cache folder (or in NUMBA_CACHE_DIR, where that is set).

    With ``reorder``, sums may be reordered, and a product and a sum rounded once; NaN and infinity count as everywhere.
    """
    folder, before = _folder(), numba.config.CACHE_DIR
    try:
        numba.config.CACHE_DIR = folder or before  # read when a function is made, and only then
        return numba.njit(
            nogil=True,
            cache=folder is not None,
            error_model="numpy",
            fastmath={"reassoc", "contract", "nsz"} if reorder else False,
        )(function)
    finally:
        numba.config.CACHE_DIR = before
