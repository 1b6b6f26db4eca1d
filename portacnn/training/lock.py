"""Lock a file through the operating system, which releases it when the process ends, even if
killed."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that excludes every other holder of ``locked(path)``, in this process or another.

    The file is removed at the end. A file left behind by a killed process is not locked and is
    taken over. If the file system has no locks, or the file cannot be created, nothing is locked.

    Raises:
        BlockingIOError: if somebody else holds the lock.
    """
    handle = _take(path)
    try:
        yield
    finally:
        if handle is not None and handle in _held:  # not in a child that was forked within
            _held.discard(handle)
            # Windows does not remove an open file; leaving it is harmless
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(handle)


_held: set[int] = set()


def _take(path: Path) -> int | None:
    for _ in range(100):
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        except OSError:
            return None
        try:
            _lock(handle)
        except BlockingIOError:
            os.close(handle)
            raise
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                _held.add(handle)
                return handle
        # the holder removed it after we opened it: our lock is on a file without a name
        os.close(handle)
    return None


def _lock(handle: int) -> None:
    try:
        if os.name == "nt":
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # Windows raises PermissionError
        raise BlockingIOError(error.errno, error.strerror) from error
    except OSError:  # no locks on this file system
        pass


def _let_go_in_child() -> None:
    """Close inherited locks: in a forked child they would outlive the process that took them."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
