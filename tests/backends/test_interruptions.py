"""Exceptions that signal handlers raise, as Ctrl-C does: wherever one comes, nothing is left
running, held or half changed."""

import dis
import gc
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from portacnn.backends import threads
from portacnn.models import DeepConvNet, SimpleConvNet
from portacnn.ops import use_kernels


class Interruption(BaseException):
    """As KeyboardInterrupt, but nobody else's."""


def interrupt(point: int, call: Callable[[], Any], path: str) -> bool:
    """Call ``call``, and raise Interruption at a point of the code in the file ``path``; whether
    there were so many points.

    The interpreter looks for signals when a function begins, after each call, and when a loop jumps
    back: these are the points.
    """
    left, fired = point, False

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left, fired
        if frame.f_code.co_filename != path:
            return None
        frame.f_trace_opcodes = True
        before, instructions = seen.get(frame), _instructions(frame.f_code)
        seen[frame] = frame.f_lasti
        after_call = before is not None and instructions[before].startswith("CALL")
        if event == "call" or (
            event == "opcode" and (after_call or instructions[frame.f_lasti] == "JUMP_BACKWARD")
        ):
            if left == 0:
                fired = True
                raise Interruption
            left -= 1
        return trace

    seen: dict[FrameType, int] = {}
    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interruption:
        pass
    finally:
        sys.settrace(outer)
    return fired


_CODES: dict[CodeType, dict[int, str]] = {}


def _instructions(code: CodeType) -> dict[int, str]:
    """The names of instructions by their offset."""
    if code not in _CODES:
        _CODES[code] = {one.offset: one.opname for one in dis.get_instructions(code)}
    return _CODES[code]


@pytest.fixture(params=[2, 4])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Everything goes to so many threads, however small it is."""
    monkeypatch.setattr(threads, "WORTH", 1)
    monkeypatch.setattr(threads, "thread_count", lambda: request.param)
    return request.param


class Library:
    """As threadpoolctl has a BLAS."""

    def __init__(self, count: int) -> None:
        self.count = count

    def get_num_threads(self) -> int:
        return self.count

    def set_num_threads(self, count: int) -> None:
        self.count = count


@pytest.fixture
def blas(monkeypatch: pytest.MonkeyPatch) -> list[Library]:
    libraries = [Library(7), Library(3)]
    monkeypatch.setattr(threads, "_blas", lambda: libraries)
    return libraries


class Work:
    """Pieces of work that take a while, and what they notice."""

    def __init__(self, libraries: list[Library]) -> None:
        self.libraries, self.left, self.wrong = libraries, False, []
        self.done = np.zeros(8, dtype=int)

    def __call__(self, some: slice) -> None:
        if [library.count for library in self.libraries] != [1, 1]:
            self.wrong.append("BLAS not held")
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.0005)
        self.done[some] += 1
        if self.left:
            self.wrong.append("at work after the call")

    def run(self) -> None:
        try:
            threads.products_in_pieces(self, 8, threads.PER_ELEMENT)
        finally:
            self.left = True


def test_wherever_a_product_is_interrupted(cut: int, blas: list[Library]):
    """Nothing is at work after it, BLAS has its threads, and the next one is computed in full."""
    point, fired, works = 0, True, []
    while fired:
        works.append(Work(blas))
        fired = interrupt(point, works[-1].run, threads.__file__)
        assert [library.count for library in blas] == [7, 3], f"at point {point}"
        works.append(Work(blas))
        works[-1].run()
        assert (works[-1].done == 1).all(), f"after an interruption at point {point}"
        point += 1
    assert point > 50
    assert [work.wrong for work in works] == [[]] * len(works)
    # which a lock that was left held would stop
    other = threading.Thread(target=Work(blas).run, daemon=True)
    other.start()
    other.join(10)
    assert not other.is_alive()


def test_interrupted_again_while_it_waits(monkeypatch: pytest.MonkeyPatch):
    """A user who presses Ctrl-C several times: the threads are waited for all the same."""
    monkeypatch.setattr(threads, "WORTH", 1)
    monkeypatch.setattr(threads, "thread_count", lambda: 2)
    begun, finished, raised = threading.Event(), threading.Event(), 0

    def handler(*_: Any) -> None:
        nonlocal raised
        raised += 1
        if raised == 5:
            signal.setitimer(signal.ITIMER_REAL, 0)
        raise Interruption

    def work(some: slice) -> None:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            while raised < 5:
                time.sleep(0.001)
            time.sleep(0.01)
            finished.set()
        else:
            begun.wait(10)
            signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with pytest.raises(Interruption):
            threads.in_pieces(work, 2, 2)
        assert finished.is_set()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert raised == 5


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["native", "auto"])
@pytest.mark.parametrize("net", [SimpleConvNet, DeepConvNet])
def test_at_random_moments(cut: int, kernels: str, net: Any):
    """At random moments of predict and of a gradient; every next result is right to the bit."""
    rng, moments = np.random.default_rng(0), random.Random(0)
    x, t = rng.random((16, 1, 28, 28), dtype=np.float32), rng.integers(0, 10, 16)
    model = net(seed=1)
    jobs: list[Callable[[], list[np.ndarray]]] = [
        lambda: [model.predict(x)],
        lambda: [model.predict(x[:4])],
        lambda: list(model.gradient(x, t).values()),
    ]

    def libraries() -> list[int]:
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    def handler(*_: Any) -> None:
        raise Interruption

    callbacks = gc.callbacks[:]
    # an exception that is raised in one, such as hypothesis's, is printed and lost
    gc.callbacks.clear()
    before, number, came = signal.signal(signal.SIGALRM, handler), 0, 0
    try:
        with use_kernels(kernels):
            expected, times = [job() for job in jobs], []
            for job in jobs:
                start = time.perf_counter()
                job()
                times.append(time.perf_counter() - start)
            blas = libraries()
            while came < 250:
                which = number % len(jobs)
                number += 1
                try:
                    try:
                        signal.setitimer(signal.ITIMER_REAL, moments.uniform(1e-6, times[which]))
                        jobs[which]()
                    finally:
                        signal.setitimer(signal.ITIMER_REAL, 0)
                except Interruption:
                    came += 1
                which = moments.randrange(len(jobs))
                for got, right in zip(jobs[which](), expected[which], strict=True):
                    np.testing.assert_array_equal(got, right)
                assert libraries() == blas
    finally:
        signal.signal(signal.SIGALRM, before)
        gc.callbacks.extend(callbacks)
