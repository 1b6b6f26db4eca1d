"""Memory used again, and several threads: neither may be seen in any result."""

import threading

import numpy as np
import pytest

from portacnn import SimpleConvNet, Trainer, ops
from portacnn.backends import threads
from portacnn.errors import ArgumentError, StateError
from portacnn.ops.workspace import Workspace, empty, workspace


def run(seed: int, epochs: int = 2) -> Trainer:
    draws = np.random.default_rng(seed)
    x, t = draws.random((50, 1, 28, 28), dtype=np.float32), draws.integers(0, 10, 50)
    trainer = Trainer(
        SimpleConvNet(seed=seed, device="numpy"), x, t, x, t, epochs=epochs, mini_batch_size=20, verbose=False
    )
    trainer.train()
    return trainer


def held(trainer: Trainer) -> int:
    return sum(array.nbytes for arrays in trainer._workspace._arrays.values() for array in arrays)


def test_a_block_gets_each_array_once_and_the_next_block_the_same_ones():
    room = Workspace()
    with workspace(room):
        first, second = empty(np.empty, (3,), np.dtype("float32")), empty(np.empty, (3,), np.dtype("float32"))
        other = empty(np.empty, (3,), np.dtype("float64"))
    assert first is not second
    assert other.dtype == np.float64
    with workspace(room):
        assert empty(np.empty, (3,), np.dtype("float32")) is first
    assert empty(np.empty, (3,), np.dtype("float32")) is not first


def test_a_workspace_in_use_is_refused():
    room = Workspace()
    with workspace(room), pytest.raises(StateError, match="one of its own"), workspace(room):
        pass
    with workspace(room):
        pass


def test_a_workspace_does_not_grow():
    once, twice = run(0, epochs=1), run(0, epochs=4)
    assert held(once) == held(twice) > 0


def test_what_a_person_is_handed_stays_as_it_is():
    trainer = run(0, epochs=1)
    x, t = trainer.x_train[:20], trainer.t_train[:20]
    logits = trainer.model.predict(x)
    gradients = trainer.model.gradient(x, t)
    before = logits.copy(), {path: value.copy() for path, value in gradients.items()}
    trainer.epochs = 2
    trainer.train()
    np.testing.assert_array_equal(logits, before[0])
    for path, value in gradients.items():
        np.testing.assert_array_equal(value, before[1][path])


def test_two_models_that_train_at_once_do_not_meet():
    expected = [run(seed).train_loss_list for seed in (1, 2)]
    found: dict[int, list[float]] = {}
    workers = [threading.Thread(target=lambda s=seed: found.update({s: run(s).train_loss_list})) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [found[1], found[2]] == expected


@pytest.mark.parametrize("pieces", [1, 2, 3, 7])
@pytest.mark.parametrize("layout", ["batch last", "batch first"])
def test_the_number_of_threads_changes_no_bit(monkeypatch, pieces, layout):
    draws = np.random.default_rng(0)
    x = draws.standard_normal((9, 5, 12, 11)).astype("float32")
    x = x if layout == "batch first" else np.ascontiguousarray(x.transpose(1, 2, 3, 0)).transpose(3, 0, 1, 2)
    monkeypatch.setattr(threads, "WORTH", 1)
    monkeypatch.setattr(threads, "thread_count", lambda: pieces)
    results = []
    for choice in ("reference", "auto"):
        with ops.use_kernels(choice):
            y, relu_cache = ops.relu(x)
            pooled, pool_cache = ops.max_pool2d(y, 3, stride=2, padding=1)
            dy = ops.max_pool2d_backward(np.ones_like(pooled) * pooled, pool_cache)
            results.append((y, pooled, dy, ops.relu_backward(dy, relu_cache)))
    for portable, threaded in zip(*results, strict=True):
        np.testing.assert_array_equal(portable, threaded)


def test_an_error_in_a_thread_comes_out(monkeypatch):
    monkeypatch.setattr(threads, "WORTH", 1)
    monkeypatch.setattr(threads, "thread_count", lambda: 2)

    def work(piece: slice) -> None:
        if piece.start:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        threads.in_pieces(work, 4, 4)


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_the_variable_is_checked(monkeypatch, text):
    monkeypatch.setenv("PORTACNN_NUM_THREADS", text)
    threads.thread_count.cache_clear()
    with pytest.raises(ArgumentError, match=f"PORTACNN_NUM_THREADS must be a whole number above 0, got '{text}'"):
        threads.thread_count()
    monkeypatch.setenv("PORTACNN_NUM_THREADS", "3")
    assert threads.thread_count() == 3
    threads.thread_count.cache_clear()
