"""``predict``: what it gives is what ``forward`` gives, whoever asks at the same time, and whatever
happens to the model."""

import copy
import gc
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from portacnn import Normalize, ops, runtime
from portacnn.models.inference import FEW
from portacnn.ops import use_kernels
from portacnn.runtime import Kernel
from support.checks import agree, choices, normal, with_each_kernel
from support.matrix import Here
from support.nets import model_on, patches, small_net

X, T = patches(40)
COUNTS = [*range(1, FEW + 2), 40]


@pytest.mark.parametrize("count", COUNTS)
@with_each_kernel
def test_predict_agrees_with_forward(backend: Here, count: int):
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
    traced = set()  # a compiled pass calls no kernel again
    for choice in ("auto", "reference", "native", "auto", "reference"):
        called.clear()
        with use_kernels(choice):
            model.predict(x)
        assert set(called) == (set() if choice in traced else seen[choice]), choice
        traced |= {choice} if backend.backend.compiles else set()


@pytest.mark.parametrize("count", [1, 40])
def test_reference_gives_the_portable_ops_bits(backend: Here, count: int):
    model, x = model_on(backend), backend.array(X[:count])
    for choice in choices(backend):
        with use_kernels(choice):
            model.predict(x)
    with use_kernels("reference"):
        np.testing.assert_array_equal(backend.host(model.predict(x)), backend.host(model(x)))
