"""How ``bench_worker.py`` times a step, a prediction, an epoch, and calls of several threads."""

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

WARM_UP_STEPS, WARM_UP_SECONDS = 5, 0.3
MIN_STEPS, MAX_STEPS = 5, 5000
THREADS = 8
"""The callers of mode serve."""
ROUNDS = 5
"""Of mode serve: one thread, then eight threads."""


@dataclass
class Subject:
    """What is timed.

    Attributes:
        run: one step, prediction or epoch.
        warm_up: what to do first. None calls ``run`` itself for a while and then many times;
            otherwise ``run`` is timed once.
        check: called after the timing; raises if results are not finite.
        device_bytes: the peak memory of a device with its own memory, else None.
    """

    run: Callable[[], Any]
    synchronize: Callable[[], None]
    parameters: int
    where: str
    warm_up: Callable[[], Any] | None = None
    check: Callable[[], None] = lambda: None
    device_bytes: Callable[[], int | None] = lambda: None


def timed(subject: Subject, seconds: float) -> list[float]:
    """Return the seconds of each run, including the wait for the device."""

    def once() -> float:
        start = time.perf_counter()
        subject.run()
        subject.synchronize()
        return time.perf_counter() - start

    if subject.warm_up is not None:
        subject.warm_up()
        subject.synchronize()
        return [once()]
    repeat(once, WARM_UP_STEPS, WARM_UP_SECONDS)
    return repeat(once, MIN_STEPS, seconds)


def repeat(once: Callable[[], float], steps: int, seconds: float) -> list[float]:
    """Run at least ``steps`` times, and as often as runs start within ``seconds``."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < steps or (time.perf_counter() < end and len(times) < MAX_STEPS):
        times.append(once())
    return times


def served(subject: Subject, seconds: float) -> tuple[list[float], list[float]]:
    """Return the seconds per call with one thread and with ``THREADS`` threads that call ``run``,
    both ``ROUNDS`` times. One and many take turns, so that both see the same machine.
    """
    repeat(lambda: per_call(subject, 1, 0.0), WARM_UP_STEPS, WARM_UP_SECONDS)
    one, many = [], []
    for _ in range(ROUNDS):
        one.append(per_call(subject, 1, seconds))
        many.append(per_call(subject, THREADS, seconds))
    return one, many


def per_call(subject: Subject, threads: int, seconds: float) -> float:
    """Return the seconds per call while ``threads`` threads call ``run``, each at least once."""
    done = [0] * threads
    failures: list[BaseException] = []
    start = time.perf_counter()

    def work(number: int) -> None:
        try:
            while not done[number] or time.perf_counter() - start < seconds:
                subject.run()
                done[number] += 1
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    if failures:
        raise failures[0]
    subject.synchronize()
    return (time.perf_counter() - start) / sum(done)


def times_in_ms(times: list[float]) -> dict[str, Any]:
    return {
        "median_ms": 1e3 * statistics.median(times),
        "min_ms": 1e3 * min(times),
        "max_ms": 1e3 * max(times),
        "steps": len(times),
    }
