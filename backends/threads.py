"""Several cores for NumPy's loops, which use one: pieces of an array, each in a thread of its own
(NumPy releases the GIL).

How many: ``PORTACNN_NUM_THREADS``, else the cores that this process may use: those it is bound to,
and no more than its control group grants (a container's limit). Pieces are always cut at the same
places for the same size and the same number of threads, and no result depends on which thread was
first.

BLAS has threads of its own, which go on spinning for a while after a product, on the core that the
next piece would need. So products are cut here too, and BLAS is held to one thread while they run.

A signal handler may raise an exception in the main thread between any two steps of this code
(Ctrl-C does). Two rules keep what is here correct then. What has to happen on the way out stands in
two nested ``finally`` blocks and may be done twice: an exception that interrupts the inner one does
not reach the outer one. And no lock is a Python object: ``with lock`` of a lock made in C cannot be
left without releasing it, where ``Semaphore`` or ``Condition`` can.
"""

import atexit
import ctypes
import os
from _thread import start_new_thread
from collections.abc import Callable, Sequence
from contextvars import copy_context
from functools import cache
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, RLock, get_ident, local, main_thread
from typing import Any

from portacnn.errors import ArgumentError

VARIABLE = "PORTACNN_NUM_THREADS"
WORTH = 1 << 17  # elements below which handing out the work takes longer than doing it
PER_ELEMENT = 16  # multiply-adds of a product that take about as long as one element of other loops
_GROUP = Path("/sys/fs/cgroup")


@cache
def thread_count() -> int:
    """How many threads to use. Raises ArgumentError where the variable is not a whole number above
    0."""
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
    """The cores that a control group's quota amounts to, rounded up; None where there is none. Both
    versions of the files."""
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
    """A piece of work that is run by a thread of the pool or by the caller: by whichever claims it
    first."""

    __slots__ = ("_claims", "_context", "_finished", "_piece", "_work", "done", "error")

    def __init__(self, work: Callable[[slice], Any], piece: slice) -> None:
        self._piece = piece
        self._work: Any = work
        self._context: Any = copy_context()  # np.errstate, for one
        self._claims: dict[str, str] = {}
        self._finished = Lock()
        self._finished.acquire()
        self.done = False
        self.error: BaseException | None = None

    def claim(self, who: str) -> bool:
        """Whether it is ``who``'s to run. One step of the interpreter, and whoever asks again gets
        the same answer."""
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
        """Let go of the arrays, when nobody will run it any more: a thread or the queue may keep
        the task itself for long."""
        self._work = self._context = None

    def wait(self) -> None:
        """Until a thread of the pool has run it. If it is interrupted, it can be called again."""
        while not self.done:
            self._finished.acquire()


_CALLER, _POOL = "caller", "pool"


class _Pool:
    """Threads that run tasks. None of them needs to exist: callers run the tasks that no thread has
    claimed."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[_Task] = SimpleQueue()
        self._starting = RLock()
        self._started = 0

    def hand_out(self, tasks: list[_Task]) -> None:
        if self._started < len(tasks):
            self._start(len(tasks))
        if self._started:
            for task in tasks:
                self._tasks.put(task)

    def _start(self, count: int) -> None:
        with self._starting:
            while self._started < count:
                try:
                    # Not threading.Thread: its start() can be interrupted half way, and waits for
                    # the thread.
                    start_new_thread(_serve, (self._tasks,))
                # the interpreter is shutting down, or the system's limit is reached
                except RuntimeError:
                    return
                self._started += 1


def _serve(tasks: "SimpleQueue[_Task]") -> None:
    """What a thread of the pool does. It ends with the process."""
    while True:
        task = tasks.get()
        if task.claim(_POOL):
            task.run()
        del task  # and with it the arrays, until the next one comes


_pool = _Pool()


def pieces(rows: int, elements: int) -> list[slice]:
    """The slices of ``rows`` that ``in_pieces`` hands out: one a thread, or a single one for fewer
    ``elements`` than pay."""
    count = max(1, min(thread_count(), rows)) if elements >= WORTH else 1
    cuts = [rows * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(cuts)]


def in_pieces(work: Callable[[slice], Any], rows: int, elements: int) -> None:
    """Call ``work`` on slices that together make up ``rows``, side by side where there are
    ``elements`` enough to do.

    However it returns, no thread is at work on a slice any more.
    """
    first, *rest = pieces(rows, elements)
    if not rest:
        work(first)
        return
    tasks = _here.tasks = [_Task(work, piece) for piece in rest]
    try:
        try:
            _pool.hand_out(tasks)
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
            # which would keep each other, and the arrays, by way of the error's traceback
            del tasks, errors


class _Here(local):
    tasks: Sequence[_Task] = ()
    """What the last call of ``in_pieces`` in this thread has handed out."""


_here = _Here()


def _settle(tasks: Sequence[_Task]) -> None:
    """Wait for the tasks that threads of the pool have claimed; the others will never be run by
    one."""
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
    """``function(*args, **options)``, called in a thread of its own: signal handlers raise in the
    main thread alone.

    For what other libraries cannot have interrupted. If the wait is, it goes on, and the process
    ends after it.
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
_holders: set[int] = set()  # the threads in whose calls BLAS is held
# what to put back, by library, and by thread where each has its own limit
_before: dict[tuple[Any, int], int] = {}


class _OpenBLAS:
    """NumPy's BLAS, as a rule. Through threadpoolctl (3.8) only one thread of the process can set
    its limit, and it takes longer.

    As a ``PyDLL``: these functions read or write a number, and releasing the GIL for that would
    cost more.
    """

    internal_api, threading_layer = "openblas", "pthreads"

    def __init__(self, path: str) -> None:
        library = ctypes.PyDLL(path)
        names = [
            f"{a}openblas_{{}}_num_threads{b}" for a in ("", "scipy_") for b in ("", "64_", "_64")
        ]
        name = next(name for name in names if hasattr(library, name.format("set")))
        self.get_num_threads, self.set_num_threads = (
            getattr(library, name.format(verb)) for verb in ("get", "set")
        )


@cache
def _blas() -> list[Any]:
    """The BLAS libraries of this process. None in a checkout that runs uninstalled, without
    threadpoolctl."""
    return apart(_found)  # an exception in one of ctypes' callbacks is lost, and with it a library


def _found() -> list[Any]:
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
    # it cannot be opened by its path, or its functions have other names
    except (OSError, StopIteration):
        return library


def _of_thread(library: Any) -> bool:
    """Whether each thread has a limit of its own, not the process: OpenBLAS with OpenMP."""
    return (
        getattr(library, "threading_layer", None) == "openmp" and library.internal_api == "openblas"
    )


def on_one_blas_thread(function: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
    """``function(*args, **options)``, whose products each run in the thread that asks for them.

    The number of BLAS threads is the whole process's: it is 1 while any thread is in here, and the
    last one out puts back what was.
    """
    thread = get_ident()
    if thread in _holders:  # in an outer call
        return function(*args, **options)
    try:
        try:
            _hold(thread)
            return function(*args, **options)
        finally:
            _let_go(thread)
    finally:
        if thread in _holders or _before:
            _let_go(thread)


def _hold(thread: int) -> None:
    with _lock:
        for library in _blas():
            count = library.get_num_threads()
            if count != 1:
                _before.setdefault((library, thread if _of_thread(library) else 0), count)
                library.set_num_threads(1)
        _holders.add(thread)


def _let_go(thread: int) -> None:
    with _lock:
        _holders.discard(thread)
        if not _before:
            return
        for (library, owner), count in list(_before.items()):
            if owner == thread or not (owner or _holders):
                library.set_num_threads(count)
                del _before[library, owner]


def products_in_pieces(work: Callable[[slice], Any], rows: int, multiply_adds: int) -> None:
    """``in_pieces`` for work that is matrix products."""
    on_one_blas_thread(in_pieces, work, rows, multiply_adds // PER_ELEMENT)


# --- fork -----------------------------------------------------------------------------------------


def _before_fork() -> None:
    """A call under way in this thread (this is in a signal handler, for one) goes on in the child
    without the pool's threads."""
    _settle(_here.tasks)


def _in_child() -> None:
    """Of all threads only the one that called ``fork`` is in the child: none of the pool, none that
    would release a lock."""
    global _pool, _lock
    _pool, _lock = _Pool(), RLock()
    _apart.clear()
    _holders.intersection_update({get_ident()})
    if not _holders:
        _let_go(get_ident())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_in_child)
