"""numba as these kernels use it: machine code that releases the GIL and is cached on disk for the
next process.

The cache is optional. If a file of it is damaged, missing, or cannot be read or written, a kernel
is compiled in memory, and one warning is logged per process.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numba
import numpy as np
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile
from numba.core.compiler_lock import global_compiler_lock

from portacnn.backends.threads import apart
from portacnn.cache import cache_folder

_log = logging.getLogger("portacnn")
_DIGEST = sha256().digest_size


@cache
def _folder() -> Path | None:
    """Return the folder of cached machine code, or None if there is none.

    There is one folder per state of the sources. numba checks only the file that defines a
    function, so it would use outdated code after a change in another file.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    state = sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    try:
        folder = Path(numba.config.CACHE_DIR or cache_folder() / "numba") / state
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _warn(error)
        return None
    try:
        TemporaryFile(dir=folder).close()
    except OSError as error:  # existing files can still be read
        _warn(error)
    return folder


_warned = False


def _warn(error: Exception) -> None:
    global _warned
    if not _warned:
        _warned = True
        _log.warning(
            "compiled kernels cannot be cached, so every process compiles them again (%s: %s); "
            "set PORTACNN_CACHE to another folder",
            type(error).__name__,
            error,
        )


class _Locator:
    """Tells numba where the files of a kernel are."""

    def __init__(self, function: Callable[..., Any], source: str) -> None:
        self._line, self._stamp = (
            function.__code__.co_firstlineno,
            sha256(Path(source).read_bytes()).hexdigest(),
        )

    from_function = classmethod(lambda cls, function, source: cls(function, source))

    def ensure_cache_path(self) -> None:
        os.makedirs(self.get_cache_path(), exist_ok=True)

    def get_cache_path(self) -> str:
        return str(_folder())

    def get_source_stamp(self) -> str:
        return self._stamp

    def get_disambiguator(self) -> str:
        return str(self._line)


class _Format(CompileResultCacheImpl):
    _locator_classes = (_Locator,)


class _Files(IndexDataCacheFile):
    """Cache files that end with the SHA-256 of their contents. Without it, numba would run damaged
    machine code.
    """

    @contextmanager
    def _open_for_write(self, path: str) -> Iterator[BytesIO]:
        content = BytesIO()
        yield content
        with super()._open_for_write(path) as file:
            file.write(content.getvalue() + sha256(content.getvalue()).digest())

    def _load_index(self) -> dict[Any, str]:
        return super()._load_index() if _is_whole(self._index_path) else {}

    def _load_data(self, name: str) -> Any:
        if not _is_whole(self._data_path(name)):
            raise FileNotFoundError(name)
        return super()._load_data(name)


def _is_whole(path: str) -> bool:
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return False
    except OSError as error:
        _warn(error)
        return False
    if sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]:
        return True
    _warn(ValueError(f"{path} is damaged"))
    return False


class _Cache(FunctionCache):
    _impl_class = _Format

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = _Files(
            self.cache_path, self._impl.filename_base, self._impl.locator.get_source_stamp()
        )

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            found = super().load_overload(sig, target_context)
        except Exception as error:
            _warn(error)
            return None
        # Two processes that save at the same time may overwrite each other's file.
        return found if found is not None and tuple(found.signature.args) == tuple(sig) else None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            _warn(error)


def compiled(function: Callable[..., Any], *, reorder: bool = True) -> Any:
    """Compile a kernel with ``numba.njit``. The machine code is cached in portacnn's cache folder
    (or in NUMBA_CACHE_DIR, if set).

    With ``reorder``, sums may be reordered, and a multiply-add may be rounded once. NaN and
    infinity keep their usual meaning.
    """
    fastmath = {"reassoc", "contract", "nsz"} if reorder else False
    kernel = numba.njit(nogil=True, error_model="numpy", fastmath=fastmath)(function)
    # numba's compiler must not be interrupted: its lock could stay held, and the threads of the
    # pool would wait forever.
    kernel._compile_for_args = partial(apart, kernel._compile_for_args)
    if _folder() is not None:
        try:
            kernel._cache = _Cache(function)
        except Exception as error:  # for example a program without its sources
            _warn(error)
    return kernel


def read(array: np.ndarray) -> np.ndarray:
    """Return a flat, read-only view of a contiguous array, as an argument of a kernel that reads
    it. numba has another type for writeable arrays and would compile again for it.
    """
    flat = array.reshape(-1)
    flat.flags.writeable = False
    return flat


# otherwise a child would wait forever for a lock that another thread held
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )
