"""numba, as the kernels here use it: machine code that releases the GIL, kept on disk for the next
process.

The cache is never needed. Where a file of it is damaged or missing, or cannot be written or read, a
kernel is compiled in memory, and there is one warning in a process.
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
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile
from numba.core.compiler_lock import global_compiler_lock

from portacnn.backends.threads import apart
from portacnn.cache import cache_folder

_log = logging.getLogger("portacnn")
_DIGEST = sha256().digest_size


@cache
def _folder() -> Path | None:
    """Where machine code is kept; None where there is no such folder.

    A folder for each state of the sources: numba looks at the file alone that a function stands in,
    and would go on using what it once made of an older file beside that.
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
    except OSError as error:  # what is there can still be read
        _warn(error)
    return folder


_warned = False


def _warn(error: Exception) -> None:
    global _warned
    if not _warned:
        _warned = True
        _log.warning(
            "kernels that are not in the cache will be compiled anew in every process (%s: %s); "
            "PORTACNN_CACHE can name another folder for it",
            type(error).__name__,
            error,
        )


class _Locator:
    """What numba asks about the place of a kernel's files."""

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
    """Each file ends with the SHA-256 of what is before: numba would run machine code that is
    damaged."""

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
        # Two processes that saved at once may have written each other's file.
        return found if found is not None and tuple(found.signature.args) == tuple(sig) else None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            _warn(error)


def compiled(function: Callable[..., Any], *, reorder: bool = True) -> Any:
    """``numba.njit`` for a kernel. What it compiles is kept in portacnn's cache folder (or in
    NUMBA_CACHE_DIR, where that is set).

    With ``reorder``, sums may be reordered, and a product and a sum rounded once; NaN and infinity
    count as everywhere.
    """
    fastmath = {"reassoc", "contract", "nsz"} if reorder else False
    kernel = numba.njit(nogil=True, error_model="numpy", fastmath=fastmath)(function)
    # numba's compiler cannot be interrupted: its lock may be left held, and the threads of the pool
    # would wait for ever.
    kernel._compile_for_args = partial(apart, kernel._compile_for_args)
    if _folder() is not None:
        try:
            kernel._cache = _Cache(function)
        except Exception as error:  # a program without its sources, for one
            _warn(error)
    return kernel


# a child would wait for ever for a lock that another thread held
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )
