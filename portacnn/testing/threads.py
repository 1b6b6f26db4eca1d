"""Calls from two threads at once."""

from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

from portacnn.testing.report import Fault

_TIMES = 10


def in_two_threads(work: Callable[[int], Any]) -> Iterator[tuple[int, Any]]:
    """Yield the results of ``work(0)`` and ``work(1)``, each called ten times in a thread of its
    own, with their number.

    Raises:
        Fault: if a call raised an exception.
    """
    found: list[tuple[int, Any]] = []
    errors: list[Exception] = []

    def run(number: int) -> None:
        try:
            for _ in range(_TIMES):
                found.append((number, work(number)))
        except Exception as error:
            errors.append(error)

    threads = [Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise Fault(f"in a thread: {errors[0]!r}")
    yield from found
