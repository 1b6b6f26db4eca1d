"""Several cores for NumPy's loops, which use one: each thread processes a piece of the array (NumPy
releases the GIL).

The number of threads is ``PORTACNN_NUM_THREADS``. The default is the number of cores that this
process may use: its CPU affinity, limited by the quota of its control group (a container's limit).
The cuts depend only on the size and the number of threads, and no result depends on the order in
which threads run.

BLAS has its own threads. They keep spinning for a while after a product, on the core that the next
piece needs. Products are therefore cut here too, and BLAS is limited to one thread while they run.

A signal handler may raise an exception in the main thread between any two bytecodes of this code
(Ctrl-C does). Two rules keep the code correct then. First, cleanup is written in two nested
``finally`` blocks and may run twice: an exception that interrupts the inner block does not reach
the outer one. Second, locks are not implemented in Python: ``with lock`` of a lock implemented in C
always releases it, whereas ``Semaphore`` and ``Condition`` may not.
"""

import atexit
import ctypes
import os
import sys
from _thread import start_new_thread
from collections.abc import Callable, Sequence
from contextvars import copy_context
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, RLock, get_ident, local, main_thread
from typing import Any

from portacnn.errors import ArgumentError

VARIABLE = "PORTACNN_NUM_THREADS"
WORTH = 1 << 17  # elements; below, distributing the work takes longer than doing it
PER_ELEMENT = 16  # multiply-adds of a product that cost about as much as one element of a loop
_GROUP = Path("/sys/fs/cgroup")


@cache
def thread_count() -> int:
    """Return the number of threads to use. Raises ArgumentError if the variable is not a positive
    integer.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if text and not (text.isdecimal() and int(text) > 0):
        raise ArgumentError(f"{VARIABLE} must be a whole number above 0, got {text!r}")
    if text:
        return int(text)
    bound = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min(bound, granted(_GROUP) or bound)


def granted(group: Path) -> int | None:
    """Return the cores of a control group's quota, rounded up, or None without a quota. Reads the
    files of both cgroup versions.
    """
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = (
                (group / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        except (OSError, ValueError):
            return None
    try:
        cores = -(-int(quota) // int(period))
    except (ValueError, ZeroDivisionError):  # "max": no limit
        return None
    return cores if cores > 0 else None


class _Task:
    """A piece of work. Either a thread of the pool or the caller runs it: whichever claims it
    first.
    """

    __slots__ = ("_claims", "_context", "_finished", "_piece", "_work", "done", "error")

    def __init__(self, work: Callable[[slice], Any], piece: slice) -> None:
        self._piece = piece
        self._work: Any = work
        self._context: Any = copy_context()  # for example np.errstate
        self._claims: dict[str, str] = {}
        self._finished = Lock()
        self._finished.acquire()
        self.done = False
        self.error: BaseException | None = None

    def claim(self, who: str) -> bool:
        """Return whether ``who`` may run it. Atomic; repeated calls return the same answer."""
        return self._claims.setdefault("by", who) is who

    def run(self) -> None:
        try:
            self._context.run(self._work, self._piece)
        except BaseException as error:
            self.error = error
        finally:
            self.done = True
            self._finished.release()

    def forget(self) -> None:
        """Drop the references to arrays when the task will not run any more; a thread or the queue
        may keep the task itself.
        """
        self._work = self._context = None

    def wait(self) -> None:
        """Wait until a thread of the pool has run it. May be called again after an interruption."""
        while not self.done:
            self._finished.acquire()


_CALLER, _POOL = "caller", "pool"


class _Pool:
    """Threads that run tasks. The pool may be empty: callers run the tasks that no thread has
    claimed.
    """

    def __init__(self) -> None:
        self._tasks: SimpleQueue[_Task] = SimpleQueue()
        self._starting = RLock()
        self._started = 0

    def submit(self, tasks: list[_Task]) -> None:
        if self._started < len(tasks):
            self._start(len(tasks))
        if self._started:
            for task in tasks:
                self._tasks.put(task)

    def _start(self, count: int) -> None:
        with self._starting:
            while self._started < count:
                try:
                    # Not threading.Thread: its start() can be interrupted half way, and it waits
                    # for the thread.
                    start_new_thread(_serve, (self._tasks,))
                # Python is shutting down, or the system's thread limit is reached
                except RuntimeError:
                    return
                self._started += 1


def _serve(tasks: "SimpleQueue[_Task]") -> None:
    """Run tasks for ever: the main function of a pool thread, which ends with the process."""
    while True:
        task = tasks.get()
        if task.claim(_POOL):
            task.run()
        del task  # frees its arrays before the next one arrives


_pool = _Pool()


def pieces(rows: int, elements: int) -> list[slice]:
    """Return the slices of ``rows`` that ``in_pieces`` uses: one per thread, or a single one if
    there are too few ``elements``.
    """
    count = max(1, min(thread_count(), rows)) if elements >= WORTH else 1
    cuts = [rows * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(cuts)]


def in_pieces(work: Callable[[slice], Any], rows: int, elements: int) -> None:
    """Call ``work`` on slices that together cover ``rows``, in parallel if there are enough
    ``elements``.

    When it returns or raises, no thread is working on a slice any more.
    """
    first, *rest = pieces(rows, elements)
    if not rest:
        work(first)
        return
    tasks = _here.tasks = [_Task(work, piece) for piece in rest]
    try:
        try:
            _pool.submit(tasks)
            work(first)
            for task, piece in zip(tasks, rest, strict=True):
                if task.claim(_CALLER):
                    work(piece)
        finally:
            _settle(tasks)
    finally:
        _settle(tasks)
        _here.tasks = []
        for task in tasks:
            task.forget()
    errors = [task.error for task in tasks if task.error is not None]
    if errors:
        try:
            raise errors[0]
        finally:
            # break the reference cycle through the traceback, which keeps the arrays alive
            del tasks, errors


def in_parts(work: Callable[[int], Any], count: int, elements: int) -> None:
    """Call ``work`` on the numbers below ``count``, in parallel if there are enough ``elements``.
    For work whose parts have memory allocated before (see ``pieces``).
    """

    def run(some: slice) -> None:
        for number in range(some.start, some.stop):
            work(number)

    in_pieces(run, count, elements)


class _Here(local):
    tasks: Sequence[_Task] = ()
    """The tasks of the last call of ``in_pieces`` in this thread."""


_here = _Here()


def _settle(tasks: Sequence[_Task]) -> None:
    """Wait for the tasks that pool threads have claimed. Claim the others, so that no thread starts
    them.
    """
    interruption: BaseException | None = None
    while True:
        try:
            for task in [task for task in tasks if not task.claim(_CALLER)]:
                task.wait()
            break
        except BaseException as error:
            interruption = error
    if interruption is not None:
        raise interruption


def apart(function: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
    """Return ``function(*args, **options)``, called in a separate thread, where signal handlers do
    not raise.

    For functions of other libraries that must not be interrupted. If the wait is interrupted, the
    call continues, and the process exits only after it.
    """
    if get_ident() != main_thread().ident:
        return function(*args, **options)
    results: list[Any] = []

    def call(_: slice) -> None:
        _apart.append(task)
        try:
            results.append(function(*args, **options))
        finally:
            _apart.remove(task)

    task = _Task(call, slice(0))
    try:
        start_new_thread(task.run, ())
    except RuntimeError:
        return function(*args, **options)
    task.wait()
    task.forget()  # its function refers to it, and its context to what is being trained
    if task.error is not None:
        raise task.error
    return results[0]


_apart: list[_Task] = []


@atexit.register
def _wait() -> None:
    for task in list(_apart):
        task.wait()


# --- BLAS -----------------------------------------------------------------------------------------

_lock = RLock()
_holders: set[int] = set()  # the threads that hold BLAS at one thread
# the settings to restore, by library, and by thread if each thread has its own
_before: dict[tuple[Any, int], int] = {}


class _OpenBLAS:
    """Direct access to OpenBLAS, NumPy's usual BLAS. threadpoolctl (3.8) is slower and can set the
    limit from one thread only.

    It is a ``PyDLL``, which keeps the GIL: these functions only read or write an integer, and
    releasing the GIL would cost more.

    Args:
        path: of the library, or of one that is linked to it.

    Raises:
        OSError: it cannot be opened.
        LookupError: it has none of the functions, by any of their names.
    """

    internal_api, threading_layer = "openblas", "pthreads"

    def __init__(self, path: str) -> None:
        library = ctypes.PyDLL(path)
        for prefix, suffix in product(("scipy_", ""), ("64_", "_64", "")):
            name = f"{prefix}openblas_{{}}{suffix}"
            if hasattr(library, name.format("set_num_threads")):
                self.get_num_threads, self.set_num_threads, self.parallel = (
                    getattr(library, name.format(verb))
                    for verb in ("get_num_threads", "set_num_threads", "get_parallel")
                )
                return
        raise LookupError(path)


@cache
def _blas() -> list[Any]:
    """Return NumPy's BLAS library, or else all of this process that threadpoolctl finds."""
    return apart(_found)  # ctypes callbacks lose exceptions, and a library with them


def _found() -> list[Any]:
    return _of_numpy() or _of_threadpoolctl()


def _of_numpy() -> list[Any]:
    """Return the OpenBLAS that NumPy is linked to; none on systems that do not look for a name in
    linked libraries (Windows), with another BLAS, and with OpenMP, whose limit is each thread's.

    It needs no threadpoolctl, which a checkout may lack.
    """
    loaded = getattr(sys.modules.get("numpy._core._multiarray_umath"), "__file__", None)
    try:
        library = _OpenBLAS(str(loaded))
    except (AttributeError, OSError, LookupError):
        return []
    return [library] if library.parallel() == 1 else []  # 1: pthreads


def _of_threadpoolctl() -> list[Any]:
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return []
    found = [
        library for library in ThreadpoolController().lib_controllers if library.user_api == "blas"
    ]
    return [_direct(library) for library in found]


def _direct(library: Any) -> Any:
    if library.internal_api != "openblas" or _of_thread(library):
        return library
    try:
        return _OpenBLAS(library.filepath)
    except (OSError, LookupError, AttributeError):
        return library


def _of_thread(library: Any) -> bool:
    """Return whether the limit belongs to each thread instead of the process: OpenBLAS with
    OpenMP.
    """
    return (
        getattr(library, "threading_layer", None) == "openmp" and library.internal_api == "openblas"
    )


def on_one_blas_thread(function: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
    """Return ``function(*args, **options)``; matrix products inside it run in the calling thread
    only.

    The number of BLAS threads is a setting of the whole process. It is 1 while any thread is in
    this function; the last one restores it.
    """
    thread = get_ident()
    if thread in _holders:  # nested call
        return function(*args, **options)
    try:
        try:
            _hold(thread)
            return function(*args, **options)
        finally:
            _release(thread)
    finally:
        if thread in _holders or _before:
            _release(thread)


def _hold(thread: int) -> None:
    with _lock:
        for library in _blas():
            count = library.get_num_threads()
            if count != 1:
                _before.setdefault((library, thread if _of_thread(library) else 0), count)
                library.set_num_threads(1)
        _holders.add(thread)


def _release(thread: int) -> None:
    with _lock:
        _holders.discard(thread)
        if not _before:
            return
        for (library, owner), count in list(_before.items()):
            if owner == thread or not (owner or _holders):
                library.set_num_threads(count)
                del _before[library, owner]


def products_in_pieces(work: Callable[[slice], Any], rows: int, multiply_adds: int) -> None:
    """Call ``in_pieces`` for work that consists of matrix products."""
    on_one_blas_thread(in_pieces, work, rows, multiply_adds // PER_ELEMENT)


# --- fork -----------------------------------------------------------------------------------------


def _before_fork() -> None:
    """Finish the work of this thread before a fork, since the pool's threads do not exist in the
    child (fork in a signal handler).
    """
    _settle(_here.tasks)


def _in_child() -> None:
    """Reset pool and locks in a forked child, in which only the forking thread exists."""
    global _pool, _lock
    _pool, _lock = _Pool(), RLock()
    _apart.clear()
    _holders.intersection_update({get_ident()})
    if not _holders:
        _release(get_ident())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_in_child)
