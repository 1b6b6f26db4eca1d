"""``predict``: what it gives is what ``forward`` gives, whoever asks at the same time, and whatever
happens to the model."""

import copy
import gc
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portacnn import Model, Normalize, SimpleConvNet, ops, runtime
from portacnn.layers import BatchNorm2d, Conv2d, Dropout, Flatten, Linear, MaxPool2d, ReLU, Residual
from portacnn.models import inference
from portacnn.models.inference import FEW
from portacnn.ops import use_kernels, workspace
from portacnn.runtime import Kernel
from support.checks import agree, choices, normal, with_each_kernel
from support.matrix import Here
from support.memory_meter import metered
from support.nets import patches, small_net

X, T = patches(40)
COUNTS = [*range(1, FEW + 2), 40]


def model_on(here: Here, seed: int = 0) -> Model:
    """All kinds of layers: fused ones, one without a way of its own, and containers."""
    model = Model(
        conv1=Conv2d(1, 3, 3, padding=1),
        relu1=ReLU(),
        pool1=MaxPool2d(2),
        block=Residual(Conv2d(3, 3, 3, padding=1), activation=ReLU()),
        norm=BatchNorm2d(3),
        drop=Dropout(0.5),
        flatten=Flatten(),
        fc1=Linear(None, 6),
        relu2=ReLU(),
        fc2=Linear(6, 4),
    )
    return model.build((1, 8, 8), device=here.device, seed=seed)


@pytest.mark.parametrize("count", COUNTS)
@with_each_kernel
def test_it_agrees_with_forward(backend: Here, count: int):
    model, x = model_on(backend), backend.array(X[:count])
    expected = backend.host(model(x))
    for _ in range(3):  # made, found again, found again
        agree(backend, model.predict(x), expected, x)
    agree(backend, model.predict(X[:count]), expected, x)  # host arrays go the same way


def test_an_image_alone_gets_what_it_gets_in_a_batch(backend: Here):
    model, x = model_on(backend), backend.array(X)
    whole = backend.host(model.predict(x))
    for size in (1, 3, FEW, 17):
        agree(backend, model.predict(x, batch_size=size), whole, x)
    assert tuple(model.predict(x[:0, ...]).shape) == (0, 4)


def test_bytes_and_floats_do_not_take_each_others_way(backend: Here):
    model, draws = model_on(backend), np.random.default_rng(0)
    model.preprocess = Normalize()
    images = draws.integers(0, 256, (3, 1, 8, 8)).astype("uint8")
    scaled = (images / np.float32(255)).astype("float32")
    expected = backend.host(model(backend.array(scaled)))
    like = backend.array(scaled)
    for _ in range(2):
        agree(backend, model.predict(backend.array(images)), expected, like)
        agree(backend, model.predict(like), expected, like)
        agree(backend, model.predict(backend.array(scaled.astype("float64"))), expected, like)


def test_a_prepared_way_follows_a_change_of_preprocess(backend: Here):
    model, draws = model_on(backend), np.random.default_rng(0)
    images = backend.array(draws.integers(0, 256, (3, 1, 8, 8)).astype("uint8"))
    model.preprocess = Normalize()
    first = backend.host(model.predict(images))
    model.preprocess = Normalize(mean=(0.5,), std=(0.25,))
    second = model.predict(images)
    assert np.abs(backend.host(second) - first).max() > 1e-3
    agree(backend, second, backend.host(model(model.batch(images))), second)


@pytest.mark.parametrize("count", [1, FEW, 40])
@with_each_kernel
def test_results_stay_as_they_are(backend: Here, count: int):
    """They do not lie in the memory that the next call uses."""
    model, a, b = model_on(backend), backend.array(X[:count]), backend.array(X[::-1][:count])
    first = model.predict(a)
    before = backend.host(first)
    second = model.predict(b)
    np.testing.assert_array_equal(backend.host(first), before)
    agree(backend, second, backend.host(model(b)), b)
    first[...] = 0.0  # it is the caller's own
    agree(backend, model.predict(a), before, a)


@pytest.mark.parametrize("count", [1, 40])
def test_the_images_are_left_alone(backend: Here, count: int):
    model, x = model_on(backend), backend.array(X[:count])
    for _ in range(2):
        model.predict(x)
    np.testing.assert_array_equal(backend.host(x), X[:count])


# --- when the model changes -----------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 40])
@with_each_kernel
def test_parameters_that_are_written_to_are_seen(backend: Here, count: int):
    model, other, x = model_on(backend), model_on(backend, seed=1), backend.array(X[:count])
    model.predict(x)
    for array in model.named_parameters().values():
        array *= 1.5
    agree(backend, model.predict(x), backend.host(model(x)), x)
    model.load_state_dict(other.state_dict())
    agree(backend, model.predict(x), backend.host(other(x)), x)
    model.children["norm"].buffers["running_mean"][...] = 0.25
    agree(backend, model.predict(x), backend.host(model(x)), x)


@pytest.mark.parametrize("count", [1, 40])
def test_a_step_of_training_is_seen(backend: Here, count: int):
    model, x = small_net(backend.device), backend.array(X[:count])
    model.predict(x)
    gradients = model.gradient(backend.array(X), T)
    for path, array in model.named_parameters().items():
        array -= 0.1 * gradients[path]
    agree(backend, model.predict(x), backend.host(model(x)), x)


@pytest.mark.parametrize("count", [1, 40])
def test_a_model_built_anew_is_seen(backend: Here, count: int):
    model, other, x = model_on(backend), model_on(backend, seed=1), backend.array(X[:count])
    model.predict(x)
    model.build((1, 8, 8), device=backend.device, seed=1)
    agree(backend, model.predict(x), backend.host(other(x)), x)
    model.build((1, 12, 8), device=backend.device, seed=1)
    y = backend.array(normal(count, 1, 12, 8), "float32")
    agree(backend, model.predict(y), backend.host(model(y)), y)


@pytest.mark.parametrize("count", [1, 40])
def test_a_model_that_moves_is_seen(backend: Here, count: int):
    model, x = model_on(backend), backend.array(X[:count])
    expected = backend.host(model.predict(x))
    model.to("numpy")
    np.testing.assert_allclose(model.predict(X[:count]), expected, rtol=1e-4, atol=1e-5)
    model.to(backend.device)
    agree(backend, model.predict(x), expected, x)


def test_parameters_that_it_has_left_behind_are_let_go(backend: Here):
    model, x = model_on(backend), backend.array(X[:2])
    for count in (1, 2):
        model.predict(x[:count, ...])
    left = [weakref.ref(array) for array in model.named_parameters().values()]
    model.build((1, 8, 8), device=backend.device, seed=1)
    model.predict(x)
    gc.collect()
    assert not any(array() is not None for array in left)


def test_a_copy_goes_ways_of_its_own(backend: Here):
    model, x = model_on(backend), backend.array(X[:1])
    before = backend.host(model.predict(x))
    twin = copy.deepcopy(model)
    for array in twin.named_parameters().values():
        array *= 2.0
    agree(backend, model.predict(x), before, x)
    agree(backend, twin.predict(x), backend.host(twin(x)), x)


# --- kernels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 40])
def test_the_choice_of_kernels_is_heeded(
    backend: Here, count: int, monkeypatch: pytest.MonkeyPatch
):
    """Not only when a way is made: one that was made under another choice is left alone."""
    called: list[str] = []
    x = backend.array(X[:count])
    own = runtime.backend_of(x)

    def watched(table: str) -> dict[str, Kernel]:
        def look(*args: Any, **kwargs: Any) -> Any:
            called.append(table)
            return NotImplemented

        def linear(x: Any, weight: Any, bias: Any = None) -> Any:
            """The one that is prepared: what it gives must not be used where the choice is
            another."""
            return lambda x: called.append(table) or ops.linear(x, weight, bias, keep=False)[0]

        return {
            "conv_relu": Kernel(look),
            "linear_relu": Kernel(look),
            "linear": Kernel(look, None, linear),
        }

    watched_sets = {word: watched(word) for word in ("numba", "native")}
    monkeypatch.setitem(runtime._by_type, type(x), replace(own, kernels=watched_sets))
    model = small_net(backend.device)
    seen = {"auto": {"numba", "native"}, "native": {"native"}, "reference": set()}
    for choice in ("auto", "reference", "native", "auto", "reference"):
        called.clear()
        with use_kernels(choice):
            model.predict(x)
        assert set(called) == seen[choice], choice


@pytest.mark.parametrize("count", [1, 40])
def test_reference_gives_the_portable_ops_bits(backend: Here, count: int):
    model, x = model_on(backend), backend.array(X[:count])
    for choice in choices(backend):
        with use_kernels(choice):
            model.predict(x)
    with use_kernels("reference"):
        np.testing.assert_array_equal(backend.host(model.predict(x)), backend.host(model(x)))


# --- memory and threads ---------------------------------------------------------------------------

each_set = pytest.mark.parametrize("choice", choices(Here("numpy", runtime.resolve("numpy"))))
WIDE = np.random.default_rng(0).random((64, 2, 12, 12), dtype="float32")


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
    up = [*range(1, 16), *range(17, 65, 6), 64]
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


@each_set
def test_every_size_gives_the_bits_that_it_gives_alone(choice: str):
    """Prepared ways lie in the same memory one after another, and so do ordinary passes."""
    sizes = [1, 3, 8, 20, 3, 1, 64, 1, 8, 2, 9, 8, 3, 64, 2, 20, 2, 64, 2]
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
            model.predict(WIDE[:60], batch_size=20)
        assert meter.mapped == 0
        for _ in range(2):
            model.predict(WIDE, batch_size=10)
        assert meter.mapped > 0


def test_a_layers_output_that_somebody_keeps_stays_as_it_is():
    model, kept = wide_net(), []
    model.predict(WIDE)
    handle = model.children["conv2"].on_output(kept.append)
    model.predict(WIDE[:40])
    before = kept[0].copy()
    handle.remove()
    for count in (64, 1, 8, 40, 1):
        model.predict(WIDE[:count])
    np.testing.assert_array_equal(kept[0], before)


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
    """An exception at every opcode of the two modules in turn, as a signal's handler may raise
    it."""
    model, x, y = small_net("numpy"), X[:count], X[-count:]
    watched = {Path(inference.__file__).name, Path(workspace.__file__).name}
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


def test_it_takes_as_many_at_a_time_as_there_is_room_for(monkeypatch: pytest.MonkeyPatch):
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
    numbers = 3 * 6 * 6 * 2 + 3 * 3 * 3 * 2 + 6 * 2 + 4
    monkeypatch.setattr("portacnn.models.sizes._MAX_BYTES", 8 * numbers * 20 + 7)
    model.build((1, 8, 8), device="numpy", seed=0)
    sizes.clear()
    model.predict(X)
    assert sizes == [20, 20]


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
    """While the first is in the middle of its own: nobody waits, and nobody goes a slower way."""
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


def test_after_an_error_it_goes_on(backend: Here):
    model, x = model_on(backend), backend.array(X[:2])
    expected = backend.host(model.predict(x))
    for bad in (normal(2, 3, 8, 8), normal(20, 3, 8, 8), np.ones((2, 1, 8, 8), dtype="int32")):
        with pytest.raises(Exception, match="expected"):
            model.predict(backend.array(bad))
    agree(backend, model.predict(x), expected, x)
