"""Memory used again, and several threads: neither may be seen in any result."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from checks import choices
from conftest import Here
from nets import bits

from portacnn import SimpleConvNet, Trainer, ops
from portacnn.backends import threads
from portacnn.errors import StateError
from portacnn.ops.workspace import Workspace, empty, scratch, workspace
from portacnn.runtime import resolve


def run(seed: int, epochs: int = 2) -> Trainer:
    draws = np.random.default_rng(seed)
    x, t = draws.random((50, 1, 28, 28), dtype=np.float32), draws.integers(0, 10, 50)
    trainer = Trainer(
        SimpleConvNet(seed=seed, device="numpy"), x, t, x, t, epochs=epochs, mini_batch_size=20, verbose=False
    )
    trainer.train()
    return trainer


def held(trainer: Trainer) -> int:
    room = trainer._workspace
    arrays = [array for arrays in room._arrays.values() for array in arrays]
    return sum(array.nbytes for array in (*arrays, *room._scratch.values()))


each_set = pytest.mark.parametrize("choice", choices(Here("numpy", resolve("numpy"))))


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


def test_scratch_is_the_same_room_for_whoever_asks():
    room, kind = Workspace(), np.dtype("float32")
    with workspace(room):
        first, second = scratch(np.empty, (2, 3), kind), scratch(np.empty, (5,), kind)
        other, wide = scratch(np.empty, (6,), kind, 1), scratch(np.empty, (6,), np.dtype("float64"))
        assert first.shape == (2, 3)
        assert np.shares_memory(first, second)
        assert not any(np.shares_memory(first, array) for array in (other, wide))
        larger = scratch(np.empty, (7,), kind)
        assert not np.shares_memory(first, larger)  # whoever holds the smaller one keeps it
        assert np.shares_memory(larger, scratch(np.empty, (6,), kind))
        assert not np.shares_memory(larger, empty(np.empty, (7,), kind))
    with workspace(room):
        assert np.shares_memory(larger, scratch(np.empty, (7,), kind))
    assert not np.shares_memory(larger, scratch(np.empty, (7,), kind))


@each_set
def test_a_workspace_does_not_grow(choice):
    with ops.use_kernels(choice):
        once, twice = run(0, epochs=1), run(0, epochs=4)
    assert held(once) == held(twice)
    assert (held(once) > 0) == (choice != "reference")


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


@each_set
def test_two_models_that_train_at_once_do_not_meet(choice):
    def result(seed: int) -> tuple[list[float], dict]:
        with ops.use_kernels(choice):
            trainer = run(seed)
        return trainer.train_loss_list, bits(trainer.model)

    expected = {seed: result(seed) for seed in (1, 2)}
    found: dict[int, tuple] = {}
    workers = [threading.Thread(target=lambda s=seed: found.update({s: result(s)})) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == expected


PROGRAM = """
import hashlib, numpy
from portacnn import ops
from test_workspace import run
for choice in ("auto", "native"):
    with ops.use_kernels(choice):
        model = run(0, epochs=2).model
        state = model.state_dict()
        one = model.predict(numpy.linspace(0, 1, 784, dtype="float32").reshape(1, 1, 28, 28))
    print(hashlib.sha256(b"".join(value.tobytes() for value in (*state.values(), one))).hexdigest())
"""


@pytest.mark.parametrize("count", [1, 2])
def test_training_is_the_same_to_the_bit_from_run_to_run(count):
    """In processes of their own, for a given number of threads."""
    tests = Path(__file__).parent
    environment = os.environ | {"PORTACNN_NUM_THREADS": str(count), "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    printed = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(2)
    ]
    assert printed[0] == printed[1]
    assert len(printed[0]) == 2


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
