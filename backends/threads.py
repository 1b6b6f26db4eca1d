"""Several cores for NumPy's loops, which use one: pieces of an array, each in a thread of its own (NumPy lets go of the lock).

How many: ``PORTACNN_NUM_THREADS``, else the cores that this process may use: those it is bound to, and no more than its control
group grants (a container's limit). Pieces are always cut at the same places for the same size and the same number of
threads, and no result depends on which thread was first.

BLAS has threads of its own, which go on spinning for a while after a product, on the core that the next piece would need. So
products are cut here too, and BLAS is held to one thread while they run.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from portacnn.errors import ArgumentError

VARIABLE = "PORTACNN_NUM_THREADS"
WORTH = 1 << 17  # elements below which handing out the work takes longer than doing it
PER_ELEMENT = 16  # multiply-adds of a product that take about as long as one element of other loops
_GROUP = Path("/sys/fs/cgroup")


@cache
def thread_count() -> int:
    """How many threads to use. Raises ArgumentError where the variable is not a whole number above 0."""
    text = os.environ.get(VARIABLE, "").strip()
    if text and not (text.isdecimal() and int(text) > 0):
        raise ArgumentError(f"{VARIABLE} must be a whole number above 0, got {text!r}")
    if text:
        return int(text)
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(bound, granted(_GROUP) or bound)


def granted(group: Path) -> int | None:
    """The cores that a control group's quota amounts to, rounded up; None where there is none. Both versions of the files."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((group / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except (OSError, ValueError):
            return None
    try:
        cores = -(-int(quota) // int(period))
    except (ValueError, ZeroDivisionError):  # "max": no limit
        return None
    return cores if cores > 0 else None


@cache
def _pool() -> ThreadPoolExecutor:
    # NumPy's warnings are off in the caller's thread (``Backend.elsewhere``), and that is not inherited.
    return ThreadPoolExecutor(
        thread_count() - 1, thread_name_prefix="portacnn", initializer=partial(np.seterr, all="ignore")
    )


def pieces(rows: int, elements: int) -> list[slice]:
    """The slices of ``rows`` that ``in_pieces`` hands out: one a thread, or a single one for fewer ``elements`` than pay."""
    count = max(1, min(thread_count(), rows)) if elements >= WORTH else 1
    cuts = [rows * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(cuts)]


def in_pieces(work: Callable[[slice], Any], rows: int, elements: int) -> None:
    """Call ``work`` on slices that together make up ``rows``, side by side where there are ``elements`` enough to do."""
    first, *rest = pieces(rows, elements)
    others = [_pool().submit(work, piece) for piece in rest]
    work(first)
    for other in others:
        other.result()


# --- BLAS ------------------------------------------------------------------------------------------------------------

_lock = Lock()
_holding = 0
_before: list[tuple[Any, int]] = []


@cache
def _blas() -> list[Any]:
    """The BLAS libraries of this process. None in a checkout that runs uninstalled, without threadpoolctl."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return []
    return [library for library in ThreadpoolController().lib_controllers if library.user_api == "blas"]


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Within it, each product runs in the thread that asks for it. The number of BLAS threads is the whole process's: the first
    one in holds it, and the last one out of all threads puts back what was.
    """
    global _holding
    with _lock:
        if _holding == 0:
            _before[:] = [(library, library.get_num_threads()) for library in _blas()]
            for library, count in _before:
                if count != 1:
                    library.set_num_threads(1)
        _holding += 1
    try:
        yield
    finally:
        with _lock:
            _holding -= 1
            if _holding == 0:
                for library, count in _before:
                    if count != 1:
                        library.set_num_threads(count)


def products_in_pieces(work: Callable[[slice], Any], rows: int, multiply_adds: int) -> None:
    """``in_pieces`` for work that is matrix products."""
    with one_blas_thread():
        in_pieces(work, rows, multiply_adds // PER_ELEMENT)
