"""Several cores for NumPy's loops, which use one: pieces of an array, each in a thread of its own (NumPy lets go of the lock).

How many: ``PORTACNN_NUM_THREADS``, else the cores that this process may use. Pieces are always cut at the same places for the
same size and the same number of threads, and no result depends on which thread was first.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

from portacnn.errors import ArgumentError

VARIABLE = "PORTACNN_NUM_THREADS"
WORTH = 1 << 17  # elements below which handing out the work takes longer than doing it


@cache
def thread_count() -> int:
    """How many threads to use. Raises ArgumentError where the variable is not a whole number above 0."""
    text = os.environ.get(VARIABLE, "").strip()
    if text and not (text.isdecimal() and int(text) > 0):
        raise ArgumentError(f"{VARIABLE} must be a whole number above 0, got {text!r}")
    if text:
        return int(text)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_count() - 1, thread_name_prefix="portacnn")


def pieces(rows: int, elements: int) -> list[slice]:
    """The slices of ``rows`` that ``in_pieces`` hands out: one a thread, or a single one for fewer ``elements`` than pay."""
    count = max(1, min(thread_count(), rows)) if elements >= WORTH else 1
    cuts = [rows * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(cuts)]


def in_pieces(work: Callable[[slice], None], rows: int, elements: int) -> None:
    """Call ``work`` on slices that together make up ``rows``, side by side where there are ``elements`` enough to do."""
    first, *rest = pieces(rows, elements)
    others = [_pool().submit(work, piece) for piece in rest]
    work(first)
    for other in others:
        other.result()
