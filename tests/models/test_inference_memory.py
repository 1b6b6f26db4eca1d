"""Prepared inference: its memory, its threads, and what an interruption leaves behind."""

import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portacnn import Model, SimpleConvNet, ops, runtime
from portacnn.layers import BatchNorm2d, Conv2d, Flatten, Linear, MaxPool2d, ReLU, Residual
from portacnn.models import ResNet20, inference, turns
from portacnn.models.inference import FEW
from portacnn.ops import use_kernels, workspace
from support.checks import agree, choices, normal
from support.matrix import Here
from support.memory_meter import metered
from support.nets import model_on, patches, small_net

X, T = patches(40)
each_set = pytest.mark.parametrize("choice", choices(Here("numpy", runtime.resolve("numpy"))))


WIDE = np.random.default_rng(0).random((40, 2, 12, 12), dtype="float32")


def wide_net(seed: int = 0) -> Model:
    """Some 60 KiB of activations an image, of which few live at one time; fused layers, a padded
    one, and a block that is not prepared."""
    model = Model(
        conv1=Conv2d(2, 16, 3, padding=1),
        relu1=ReLU(),
        conv2=Conv2d(16, 16, 3, padding=1),
        norm=BatchNorm2d(16),
        relu2=ReLU(),
        block=Residual(Conv2d(16, 16, 3, padding=1), activation=ReLU()),
        pool=MaxPool2d(2),
        flatten=Flatten(),
        fc=Linear(None, 4),
    )
    return model.build((2, 12, 12), device="numpy", seed=seed)


@pytest.mark.parametrize("choice", [choice for choice in each_set.args[1] if choice != "reference"])
@pytest.mark.parametrize("order", ["up", "mixed"])
def test_memory_follows_the_largest_batch(choice: str, order: str, monkeypatch: pytest.MonkeyPatch):
    """Not the number of sizes: those of prepared ways (up to 8), those above, and what kernels keep
    by shape."""
    up = [*range(1, 12), *range(13, 41, 6), 40]
    sizes = up if order == "up" else np.random.default_rng(0).permutation(up)
    with ops.use_kernels(choice):
        expected = [wide_net().predict(WIDE[:1])]  # what is kept for all models is there now
        with metered(monkeypatch) as meter:
            model = wide_net()
            for _ in range(2):
                model.predict(WIDE)
            need = meter.held()
            del model
            assert meter.held() < need / 4
            model = wide_net()
            before = meter.held()
            for size in sizes:
                model.predict(WIDE[:size])
            assert meter.held() - before <= 1.2 * need + (
                256 << 10
            )  # shapes, plans and ways themselves are Python objects
            model.release_memory()
            assert meter.mapped == 0
            np.testing.assert_array_equal(model.predict(WIDE[:1]), expected[0])


@pytest.mark.parametrize("choice", [choice for choice in each_set.args[1] if choice != "reference"])
def test_a_residual_networks_arena_is_as_large_as_its_largest_batch_needs(
    choice: str, monkeypatch: pytest.MonkeyPatch
):
    """With 9 to 24 images in turn, forth and back."""
    x = np.random.default_rng(0).random((24, 3, 16, 16), dtype="float32")
    with ops.use_kernels(choice), metered(monkeypatch) as meter:
        alone = ResNet20(input_size=16, device="numpy", seed=0)
        for _ in range(2):
            alone.predict(x)
        need = meter.mapped
        assert need > 24 * 16 * 16 * 16 * 4  # at least one activation
        del alone
        assert meter.held() < need
        model = ResNet20(input_size=16, device="numpy", seed=0)
        for count in (*range(9, 25), *range(24, 8, -1)):
            model.predict(x[:count])
            assert meter.mapped <= 1.1 * need
        model.release_memory()
        assert meter.mapped == 0


@each_set
def test_every_size_gives_the_bits_that_it_gives_alone(choice: str):
    """Prepared ways lie in the same memory one after another, and so do ordinary passes."""
    sizes = [1, 3, 8, 20, 3, 1, 40, 1, 8, 2, 9, 8, 3, 40, 2, 20, 2, 40, 2]
    with ops.use_kernels(choice):
        alone = {size: wide_net().predict(WIDE[-size:]) for size in set(sizes)}
        model = wide_net()
        for size in sizes:
            np.testing.assert_array_equal(
                model.predict(WIDE[-size:]), alone[size], err_msg=f"{size} images"
            )


def test_prepared_ways_are_limited(backend: Here, monkeypatch: pytest.MonkeyPatch):
    """The oldest shapes, dtypes and choices of kernels are prepared again when they come back."""
    model, prepared = model_on(backend), []
    prepare = Linear.prepare

    def look(self: Linear, x: Any) -> Any:
        if self.path == "fc2":
            prepared.append(tuple(x.shape))
        return prepare(self, x)

    monkeypatch.setattr(Linear, "prepare", look)
    arguments = [
        (count, dtype, choice)
        for count in range(1, FEW + 1)
        for dtype in ("float32", "float64")
        for choice in ("auto", "reference")
    ][:18]

    def ask(count: int, dtype: str, choice: str) -> int:
        prepared.clear()
        with use_kernels(choice):
            model.predict(backend.array(X[:count], dtype))
        return len(prepared)

    assert all(ask(*each) for each in arguments)
    ask(*arguments[-1])
    assert ask(*arguments[-1]) == 0  # it is there
    assert ask(*arguments[0]) > 0  # and this one is not any more


def test_a_batch_larger_than_its_own_is_not_held(monkeypatch: pytest.MonkeyPatch):
    model = wide_net()
    monkeypatch.setattr("portacnn.models.sizes._MOST", 10)
    with metered(monkeypatch) as meter:
        for _ in range(2):
            model.predict(WIDE, batch_size=20)
        assert meter.mapped == 0
        for _ in range(2):
            model.predict(WIDE, batch_size=10)
        assert meter.mapped > 0


@pytest.mark.parametrize(("counts", "seen"), [((40,), 30), ((40, 1, 8), 2)])
def test_a_layers_output_that_somebody_keeps_stays_as_it_is(counts: tuple[int, ...], seen: int):
    """Also where prepared functions write, at the arena's beginning: those that are made later, and
    those that there are."""
    model, kept = wide_net(), []
    for count in (*counts, *counts):
        model.predict(WIDE[:count])
    handles = [layer.on_output(kept.append) for layer in model.children.values()]
    model.predict(WIDE[:seen])
    before = [array.copy() for array in kept]
    for handle in handles:
        handle.remove()
    for count in (8, 1, 8, 40, 30, 1):
        expected = wide_net().predict(WIDE[:count])
        np.testing.assert_array_equal(model.predict(WIDE[:count]), expected)
    for array, as_it_was in zip(kept, before, strict=True):
        np.testing.assert_array_equal(array, as_it_was)


def test_a_model_may_ask_another_in_its_forward():
    class Asking(ReLU):
        def forward(self, x: Any, **how: Any) -> Any:
            answers.append(other.predict(WIDE[: x.shape[0]]))
            return super().forward(x, **how)

    answers: list[Any] = []
    other, model = (
        wide_net(1),
        Model(conv=Conv2d(2, 4, 3), relu=Asking(), flatten=Flatten(), fc=Linear(None, 3)),
    )
    model.build((2, 12, 12), device="numpy", seed=0)
    for count in (1, 20, 1, 20):
        answers.clear()
        y = model.predict(WIDE[:count])
        np.testing.assert_allclose(y, model(WIDE[:count]), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(answers[-1], other(WIDE[:count]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [2, 12])
@each_set
def test_after_an_interruption_anywhere_the_next_predict_is_right(count: int, choice: str):
    """An exception at every opcode of the three modules in turn, as a signal's handler may raise
    it."""
    model, x, y = small_net("numpy"), X[:count], X[-count:]
    watched = {Path(module.__file__).name for module in (inference, turns, workspace)}
    left = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left
        if Path(frame.f_code.co_filename).name not in watched:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    with use_kernels(choice):
        expected = [small_net("numpy").predict(images) for images in (x, y, x[:1])]
        before, number, interrupted = sys.gettrace(), 0, True
        while interrupted:
            number += 1 if number < 120 else 13
            left, interrupted = number, False
            try:
                sys.settrace(trace)
                model.predict(x)
            except KeyboardInterrupt:
                interrupted = True
            finally:
                sys.settrace(before)
            for images, right in zip(
                (y, x[:1], x), (expected[1], expected[2], expected[0]), strict=True
            ):
                np.testing.assert_array_equal(
                    model.predict(images), right, err_msg=f"after opcode {number}"
                )
    assert number > 100


def test_a_batch_is_as_large_as_memory_allows(monkeypatch: pytest.MonkeyPatch):
    model, sizes = small_net("numpy"), []
    forward = type(model).forward

    def look(self: Any, x: Any, **options: Any) -> Any:
        sizes.append(x.shape[0])
        return forward(self, x, **options)

    monkeypatch.setattr(type(model), "forward", look)
    many = np.tile(X, (14, 1, 1, 1))[:515]
    expected = model.predict(many, batch_size=50)
    sizes.clear()
    np.testing.assert_allclose(model.predict(many), expected, rtol=1e-5, atol=1e-5)
    assert sizes == [256, 256]  # and three that go a prepared way
    numbers = 4 * 3 * 6 * 6  # four times the largest output
    monkeypatch.setattr("portacnn.models.sizes._MAX_BYTES", 8 * numbers * 20 + 7)
    model.build((1, 8, 8), device="numpy", seed=0)
    sizes.clear()
    model.predict(X)
    assert sizes == [20, 20]


@pytest.fixture(autouse=True)
def a_free_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interruption between two lines, which no signal makes, may have left it taken."""
    monkeypatch.setattr(turns, "_turn", turns._Turn())


@each_set
@pytest.mark.parametrize("count", [1, FEW, 40])
def test_threads_on_one_model_get_their_own_results_to_the_bit(count: int, choice: str):
    """With every other thread's images different from the own ones; prepared ways and workspaces
    are made for each thread."""
    model = SimpleConvNet(
        input_dim=(1, 8, 8), conv_param={"filter_num": 3, "filter_size": 3}, seed=0, device="numpy"
    )
    inputs = [normal(count, 1, 8, 8, seed=seed).astype("float32") for seed in range(4)]
    with use_kernels(choice):
        expected = [model.predict(x) for x in inputs]
    wrong: list[Any] = []
    start = threading.Barrier(len(inputs))

    def ask(number: int) -> None:
        try:
            start.wait()
            with use_kernels(choice):
                for _ in range(60):
                    np.testing.assert_array_equal(model.predict(inputs[number]), expected[number])
        except BaseException as error:
            wrong.append(error)

    workers = [threading.Thread(target=ask, args=(number,)) for number in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_a_second_thread_goes_the_prepared_way_too(monkeypatch: pytest.MonkeyPatch):
    """While the first is in the middle of its own and waits for the second: nobody waits for ever,
    and nobody goes a slower way."""
    monkeypatch.setattr("portacnn.models.turns.PATIENCE", 0.05)
    model, x = small_net("numpy"), X[:1]
    calls: list[str] = []
    forward = type(model).forward
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, x, **how: calls.append("forward") or forward(self, x, **how),
    )

    model.predict(x)
    fc2, prepare = model.children["fc2"], Linear.prepare
    answers: list[Any] = []

    def meeting(self: Linear, x: Any) -> Any:
        inner = prepare(self, x)

        def run(x: Any) -> Any:
            if threading.current_thread() is first and not answers:
                second = threading.Thread(target=lambda: answers.append(model.predict(X[:1])))
                second.start()
                second.join(30)
            return inner(x)

        return run if self is fc2 else inner

    monkeypatch.setattr(Linear, "prepare", meeting)
    model.release_memory()
    found: list[Any] = []
    first = threading.Thread(target=lambda: found.append(model.predict(x)))
    first.start()
    first.join(60)
    np.testing.assert_array_equal(found[0], answers[0])
    assert calls == []


def test_threads_take_turns_and_share_one_memory(monkeypatch: pytest.MonkeyPatch):
    """Side by side they would predict half as many images per second."""
    monkeypatch.setattr("portacnn.models.turns.PATIENCE", 60.0)
    model = small_net("numpy")
    inside, most, start = [0], [0], threading.Barrier(6)

    def enter(y: Any) -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.001)  # lets another thread run

    def leave(y: Any) -> None:
        inside[0] -= 1

    model.layer_at("conv1").on_output(enter)
    model.layer_at("fc2").on_output(leave)

    def ask() -> None:
        start.wait()
        for count in (1, 3, 20, 1):
            model.predict(X[:count])

    workers = [threading.Thread(target=ask) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (inside[0], most[0]) == (0, 1)
    assert len(model._inference._idle) == 1


def test_an_interrupted_call_leaves_the_turn_to_others(monkeypatch: pytest.MonkeyPatch):
    model, errors = small_net("numpy"), [KeyboardInterrupt, None]
    monkeypatch.setattr("portacnn.models.turns.PATIENCE", 60.0)

    def interrupt(y: Any) -> None:
        if (error := errors.pop(0)) is not None:
            raise error

    handle = model.layer_at("fc2").on_output(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.predict(X)
    handle.remove()
    worker = threading.Thread(target=lambda: errors.append(model.predict(X).shape))
    worker.start()
    worker.join(20)
    assert errors == [None, (40, 4)]


def test_a_turn_that_never_ends_is_waited_for_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("portacnn.models.turns.PATIENCE", 0.05)
    lost = threading.Thread(target=turns._turn.lock.acquire)
    lost.start()
    lost.join()
    model, taken, waits = small_net("numpy"), [turns._turn], []
    for _ in range(20):
        start = time.perf_counter()
        model.predict(X[:1])
        waits.append(time.perf_counter() - start)
        taken.append(turns._turn)
    assert waits[0] >= 0.05
    assert len(set(taken)) == 2  # the lost one, and one for all others


def test_a_thread_that_calls_again_and_again_keeps_its_turn_for_a_slice():
    """Two threads in a loop: they change seldom. A change costs as much as a small call."""
    order: list[int] = []
    start = threading.Barrier(2)

    def ask(number: int) -> None:
        start.wait()
        for _ in range(400):
            turns.in_turn(lambda: (order.append(number), time.sleep(0.0001)))

    workers = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    changes = sum(a != b for a, b in pairwise(order))
    assert 2 <= changes < 200  # both wait for the other, but not after each call: 799


def test_a_turn_that_was_kept_in_vain_goes_to_the_next_thread(monkeypatch: pytest.MonkeyPatch):
    """Its thread calls in a loop, another one waits, and the thread then does something else."""
    monkeypatch.setattr("portacnn.models.turns.PATIENCE", 60.0)
    monkeypatch.setattr("portacnn.models.turns.SLICE", 60.0)
    monkeypatch.setattr("portacnn.models.turns.SOON", 0.01)
    answers: list[int] = []
    other = threading.Thread(target=lambda: turns.in_turn(answers.append, 1))

    def until_the_other_waits() -> None:
        other.start()
        while not turns._waiting.locked():
            time.sleep(0.001)

    turns.in_turn(int)
    turns.in_turn(until_the_other_waits)
    assert turns._turn.kept
    other.join(10)
    assert answers == [1]
    turns.in_turn(answers.append, 2)  # it is not this thread's any more
    assert answers == [1, 2]
    assert turns._turn.lock.acquire(timeout=0)  # and free
    turns._turn.lock.release()


def test_after_an_error_it_goes_on(backend: Here):
    model, x = model_on(backend), backend.array(X[:2])
    expected = backend.host(model.predict(x))
    for bad in (normal(2, 3, 8, 8), normal(20, 3, 8, 8), np.ones((2, 1, 8, 8), dtype="int32")):
        with pytest.raises(Exception, match="expected"):
            model.predict(backend.array(bad))
    agree(backend, model.predict(x), expected, x)
