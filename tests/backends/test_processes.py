"""Processes: forked ones compute as their parents do, and so does what is left to do when a program
ends."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from portacnn import Trainer, ops
from portacnn.backends import threads
from portacnn.models import SimpleConvNet
from portacnn.ops import use_kernels

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]
rng = np.random.default_rng(0)
X, T = rng.random((20, 1, 28, 28), dtype=np.float32), rng.integers(0, 10, 20)


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything goes to two threads, however small it is."""
    monkeypatch.setattr(threads, "WORTH", 1)
    monkeypatch.setattr(threads, "thread_count", lambda: 2)


def in_child(call: Callable[[], bool]) -> bool:
    """Whether ``call`` gives True in a fork of this process, within 20 seconds."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that hangs
        status = 1
        try:
            status = 0 if call() else 2
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


@pytest.fixture(params=["native", "auto"])
def kernels(request: pytest.FixtureRequest) -> Any:
    with use_kernels(request.param):
        yield request.param


def losses() -> list[float]:
    trainer = Trainer(
        SimpleConvNet(seed=0), X, T, X, T, mini_batch_size=10, epochs=1, seed=0, verbose=False
    )
    trainer.train()
    return trainer.train_loss_list


def test_a_child_computes_as_its_parent(kernels: str):
    """An op, predict, data loading, training; in a child, and in a child's child."""
    model = SimpleConvNet(seed=0)
    expected = (
        ops.relu(X - 0.5)[0],
        model.predict(X),
        ops.take_batch(X, np.arange(5)),
        np.array(losses()),
    )

    def same() -> bool:
        found = (
            ops.relu(X - 0.5)[0],
            model.predict(X),
            ops.take_batch(X, np.arange(5)),
            np.array(losses()),
        )
        return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))

    assert in_child(lambda: same() and in_child(same))
    assert same()


def test_a_child_does_not_wait_for_a_call_of_its_parent(monkeypatch: pytest.MonkeyPatch):
    """Calls of ``predict`` take turns, and the thread whose turn it is does not exist there."""
    monkeypatch.setattr("portacnn.models.turns.PATIENCE", 60.0)
    busy, model = SimpleConvNet(seed=0), SimpleConvNet(seed=0)
    model.predict(X[:1])
    inside, leave = threading.Event(), threading.Event()
    busy.layer_at("fc2").on_output(lambda y: inside.set() or leave.wait(20))
    worker = threading.Thread(target=lambda: busy.predict(X[:1]))
    worker.start()
    assert inside.wait(20)
    assert in_child(lambda: model.predict(X[:1]).shape == (1, 10))
    leave.set()
    worker.join(20)
    assert not worker.is_alive()


def _predicted(first: int) -> np.ndarray:
    return _served.predict(X[first : first + 10])


_served = SimpleConvNet(seed=0)


def test_a_pool_of_forked_workers(kernels: str):
    """As servers do: the model is loaded and tried, then workers are forked."""
    expected = _served.predict(X)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map_async(_predicted, [0, 10]).get(timeout=30)
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=1e-5, atol=1e-6)


class Library:
    """As threadpoolctl has a BLAS."""

    count = 7

    def get_num_threads(self) -> int:
        return self.count

    def set_num_threads(self, count: int) -> None:
        self.count = count


def test_while_other_threads_hold_all_there_is(monkeypatch: pytest.MonkeyPatch):
    """Locks and BLAS, held by threads that the child does not have."""
    library, held, done = Library(), threading.Event(), threading.Event()
    monkeypatch.setattr(threads, "_blas", lambda: [library])

    def hold() -> None:
        with threads._pool._starting, threads._lock:
            held.set()
            done.wait(20)

    holders = [
        threading.Thread(target=threads.on_one_blas_thread, args=(done.wait, 20)),
        threading.Thread(target=hold),
    ]
    for holder in holders:
        holder.start()
        while library.count != 1:
            time.sleep(0.001)
    held.wait(10)
    try:

        def computes() -> bool:
            seen: list[int] = []
            free = library.count
            threads.products_in_pieces(
                lambda some: seen.append(library.count), 2, threads.PER_ELEMENT
            )
            return [free, *seen, library.count] == [7, 1, 1, 7]

        assert in_child(computes)
    finally:
        done.set()
        for holder in holders:
            holder.join()
    assert library.count == 7


def test_a_fork_in_the_middle_of_a_call():
    """In a signal handler, for one: parent and child both finish it."""
    done = np.zeros(2, dtype=int)
    begun = threading.Event()
    child = -1

    def work(some: slice) -> None:
        nonlocal child
        if some.start == 0:
            begun.wait(0.1)
            child = os.fork()
            if child == 0:
                signal.alarm(20)
        else:
            begun.set()
            time.sleep(0.05)
        done[some] += 1

    try:
        threads.in_pieces(work, 2, 2)
    finally:
        if child == 0:
            os._exit(0 if (done == 1).all() else 2)
    assert (done == 1).all()
    assert os.waitpid(child, 0)[1] == 0


# --- when a program ends --------------------------------------------------------------------------

PROGRAM = """
import atexit, sys, threading
import numpy as np
from portacnn import Trainer
from portacnn.backends import threads
from portacnn.models import SimpleConvNet

threads.WORTH = 1
threads.thread_count = lambda: 2
x, t = np.ones((8, 1, 28, 28), dtype=np.float32), np.zeros(8, dtype=np.int64)
model = SimpleConvNet(seed=0)
trainer = Trainer(model, x, t, x, t, mini_batch_size=2, epochs=1, verbose=False)

def train():
    threading.main_thread().join()
    trainer.train()
    print(len(trainer.train_loss_list), flush=True)

def predict():
    print(model.predict(x).shape, flush=True)

if "warm" in sys.argv:
    model.predict(x)
threading.Thread(target=train).start()
atexit.register(predict)
"""


@pytest.mark.parametrize("warm", ["warm", "cold"])
def test_work_after_the_main_thread_has_ended(warm: str):
    """A thread that trains, and a function of ``atexit``; the pool's threads running already, or
    not."""
    environment = os.environ | {"PORTACNN_KERNELS": "native"}
    command = [sys.executable, "-c", PROGRAM, warm]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (run.stdout, run.stderr, run.returncode) == ("4\n(8, 10)\n", "", 0)


def test_no_more_threads_to_be_had(monkeypatch: pytest.MonkeyPatch):
    """The interpreter is shutting down, or the system's limit is reached: the work is done in the
    calling thread."""

    def refuse(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threads, "_pool", threads._Pool())
    monkeypatch.setattr(threads, "start_new_thread", refuse)
    seen: list[tuple[slice, int]] = []
    threads.in_pieces(lambda some: seen.append((some, threading.get_ident())), 2, 2)
    assert seen == [(slice(0, 1), threading.get_ident()), (slice(1, 2), threading.get_ident())]
