"""Compute results ahead of the loop that takes them: threads of the same process, and a queue of
bounded length."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int
) -> Generator[Result, None, None]:
    """Yield ``function(item)`` for each item, in the order of the items, computed by threads.

        >>> list(in_order(lambda n: n * n, range(4), threads=2, ahead=2))
        [0, 1, 4, 9]

    An exception of the function is raised here, at its item's turn. When the loop ends, for
    whatever reason, the threads have ended.

    Args:
        function: called by several threads at once.
        items: taken one by one, at most ``ahead`` of them before their turn.
        threads: number of threads.
        ahead: largest number of results that wait.
    """
    from concurrent.futures import Future, ThreadPoolExecutor  # not for everyone who imports us

    waiting: deque[Future[Any] | Callable[[], Any]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="portacnn-data")

    def finished(oldest: Any) -> Any:
        return oldest.result() if isinstance(oldest, Future) else oldest()

    try:
        for item in items:
            try:
                waiting.append(pool.submit(function, item))
            except RuntimeError:  # no thread can be started, as when the interpreter shuts down
                waiting.append(lambda item=item: function(item))  # type: ignore[misc]
            if len(waiting) > ahead:
                yield finished(waiting.popleft())
        while waiting:
            yield finished(waiting.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
