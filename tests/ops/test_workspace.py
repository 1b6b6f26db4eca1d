"""Memory used again, and several threads: neither may be seen in any result."""

import os
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from portacnn import ops
from portacnn.backends import threads
from portacnn.backends.numpy.memory import empty, reserve
from portacnn.ops.workspace import Plan, Workspace, current, planning, run_in
from portacnn.runtime import resolve
from support.checks import choices
from support.matrix import Here
from support.memory_meter import metered
from support.nets import bits
from support.nets import trained as run

each_set = pytest.mark.parametrize("choice", choices(Here("numpy", resolve("numpy"))))
FLOAT = np.dtype("float32")


# --- a workspace by itself ------------------------------------------------------------------------


def test_bytes_are_free_when_nothing_refers_to_them():
    room, shape = Workspace(), (8, 128, 2)

    def a_pass():
        first = empty(shape, FLOAT)
        place = first.ctypes.data
        views = [
            first[2:].transpose(2, 0, 1),
            as_strided(first, (4,), (8,)),
            first.reshape(-1).view(np.int32),
        ]
        del first
        for _ in range(3):
            other = empty(shape, FLOAT)
            assert not any(np.shares_memory(other, view) for view in views)
            del other
            views.pop()
        return place, empty(shape, FLOAT).ctypes.data

    # The first pass measures. It has no arena: its arrays lie where malloc puts them.
    run_in(room, a_pass)
    places = {place for _ in range(3) for place in run_in(room, a_pass)}
    assert len(places) == 1
    assert empty(shape, FLOAT).base is None  # outside of a pass an array has memory of its own


@pytest.mark.parametrize("seed", range(4))
def test_arrays_that_live_never_share_bytes(seed):
    """Drawn sizes and lifetimes, over passes that leave some of them behind; some die in another
    thread."""
    draws, room, live = np.random.default_rng(seed), Workspace(), []

    def a_pass():
        for number in range(60):
            array = empty((int(draws.integers(0, 3000)),), FLOAT)
            array[...] = number
            live.append((array[::2] if number % 3 else array, number))
            while len(live) > draws.integers(1, 20):
                dead = [live.pop(draws.integers(len(live)))]
                if number % 10 == 0:
                    worker = threading.Thread(target=dead.clear)
                    worker.start()
                    worker.join()
            for kept, value in live:
                assert (kept == value).all()

    for _ in range(8):
        reserved = int(draws.integers(0, 2)) * 4096
        room.grow(reserved)
        run_in(room, a_pass, reserved=reserved)


def planned(room, numbers):
    """Arrays of prepared functions at the start of the arena, reserved as zeros."""
    for plan in (Plan(), Plan(room)):  # the first measures
        room.grow(plan.size)
        with planning(plan):
            arrays = [reserve((n,), FLOAT, zeros=True) for n in numbers]
        room.grow(plan.size)
    return plan, arrays


def test_an_array_that_is_still_used_is_not_where_prepared_functions_write():
    """A result of an ordinary pass that somebody keeps, and then a pass with reserved bytes."""
    room, kept = Workspace(), []

    def a_pass(arrays=()):
        for array in arrays:
            array[...] = 3
        kept.append(empty((1000,), FLOAT))
        kept[-1][...] = 7

    for _ in range(2):  # the first pass measures
        run_in(room, a_pass)
    plan, arrays = planned(room, [500, 300])
    run_in(room, a_pass, arrays, reserved=plan.size)
    for array in kept:
        assert (array == 7).all()
    assert all((array == 3).all() for array in arrays)
    kept.clear()
    room.grow()  # to the last pass
    version = room.version
    room.grow(plan.size)
    assert room.version == version  # nobody keeps anything


def test_every_array_that_was_reserved_as_zeros_is_filled_again():
    plan, arrays = planned(Workspace(), [100, 50, 200])
    for array in arrays:
        assert not array.any()
        array[...] = 1
    plan.restore()
    for array in arrays:
        assert not array.any()


def test_the_arena_is_as_large_as_what_lives_at_one_time():
    room, sizes = Workspace(), [40, 10, 30, 20, 10, 5, 25]  # of 64 KiB

    def a_pass(factor):
        before = None
        for size in sizes:
            # two at a time, as a layer's input and output
            after = empty((factor * size << 14,), FLOAT)
            before = after
            del after
        del before

    need = max(a + b for a, b in pairwise(sizes)) << 16
    for factor in (1, 3, 2, 1, 3):
        run_in(room, a_pass, factor)
    room.grow()
    assert 3 * need <= room.size <= 1.2 * 3 * need


def test_passes_may_be_nested_and_broken_off():
    inner, outer = Workspace(), Workspace()

    def broken(kept):
        kept.append(empty((1000,), FLOAT))
        kept[-1][...] = 7
        raise KeyboardInterrupt

    def a_pass(depth):
        mine = empty((1000,), FLOAT)
        mine[...] = 1
        kept = []
        with pytest.raises(KeyboardInterrupt):
            run_in(inner, broken, kept)
        other = empty((1000,), FLOAT)
        other[...] = 2
        assert (mine == 1).all()
        assert (kept[0] == 7).all()
        assert current() is outer

    for depth in range(3):
        run_in(outer, a_pass, depth)
    assert current() is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_an_arena_of_its_own():
    room = Workspace()

    def a_pass():
        array = empty((100_000,), FLOAT)
        array[...] = 1
        child = os.fork()
        if child == 0:
            array[...] = 2
            os._exit(int(array[0]))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
        assert (array == 1).all()

    run_in(room, empty, (200_000,), FLOAT)
    run_in(room, a_pass)


# --- training -------------------------------------------------------------------------------------


@each_set
def test_training_takes_no_more_memory_the_longer_it_goes_on(choice, monkeypatch):
    with ops.use_kernels(choice):
        run(0, epochs=1)
        with metered(monkeypatch) as meter:
            run(0, epochs=1)
            once = meter.peak()
            meter.restart_peak()
            trainer = run(0, epochs=2)
            assert meter.peak() <= once + (64 << 10)
            trainer.model.release_memory()
            assert meter.mapped == 0  # a Trainer that is kept for its figures keeps no arena


@each_set
def test_steps_and_predictions_share_one_arena(choice, monkeypatch):
    """An epoch ends with predictions, of as many images as a step has, which take less."""
    with ops.use_kernels(choice), metered(monkeypatch) as meter:
        trainer = run(0, epochs=0)
        x = trainer.x_train[:50]
        batch = np.arange(50)
        for _ in range(3):
            trainer.run_batch(batch)
        step = meter.mapped
        expected = trainer.model.predict(x)
        few = trainer.model.predict(x[:2])
        for _ in range(2):
            np.testing.assert_array_equal(trainer.model.predict(x), expected)
            np.testing.assert_array_equal(trainer.model.predict(x[:2]), few)
            assert meter.mapped == step
        trainer.run_batch(batch)
        assert meter.mapped == step
        trainer.model.release_memory()
        assert meter.mapped == 0


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
    workers = [
        threading.Thread(target=lambda s=seed: found.update({s: result(s)})) for seed in (1, 2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == expected


PROGRAM = """
import hashlib, numpy
from portacnn import ops
from support.nets import trained as run
for choice in ("auto", "native"):
    with ops.use_kernels(choice):
        model = run(0, epochs=1).model
        state = model.state_dict()
        one = model.predict(numpy.linspace(0, 1, 784, dtype="float32").reshape(1, 1, 28, 28))
    print(hashlib.sha256(b"".join(value.tobytes() for value in (*state.values(), one))).hexdigest())
"""


def test_training_is_the_same_to_the_bit_from_run_to_run():
    """In processes of their own, with two threads each."""
    tests = Path(__file__).resolve().parents[1]
    environment = os.environ | {
        "PORTACNN_NUM_THREADS": "2",
        "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}",
    }
    printed = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
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
    x = (
        x
        if layout == "batch first"
        else np.ascontiguousarray(x.transpose(1, 2, 3, 0)).transpose(3, 0, 1, 2)
    )
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
