"""ReLU and sigmoid: values, gradients, the ends of the number line."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn.errors import StateError
from portacnn.ops import relu, relu_backward, sigmoid, sigmoid_backward
from support.checks import (
    DTYPES,
    LAYOUTS,
    agree,
    distinct,
    gradient_agrees,
    laid_out,
    mixtures,
    normal,
    refuses,
    untouched,
    with_each_kernel,
)
from support.matrix import Here, needs


@with_each_kernel
def test_one_long_axis(backend: Here):
    """Kernels that compare with zeros have fewer of them."""
    x = normal(70_001)
    y, cache = relu(backend.array(x))
    np.testing.assert_array_equal(backend.host(y), np.where(x > 0, x, 0.0))
    np.testing.assert_array_equal(
        backend.host(relu_backward(backend.array(np.ones(70_001)), cache)), np.where(x > 0, 1, 0)
    )


def number_sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v)) if v > -700 else math.exp(v)


class Activation(NamedTuple):
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    value: Callable[[float], float]  # of one number
    slope: Callable[[float], float]


ACTIVATIONS = {
    "relu": Activation(
        relu, relu_backward, lambda v: v if v > 0 else 0.0, lambda v: 1.0 if v > 0 else 0.0
    ),
    "sigmoid": Activation(
        sigmoid, sigmoid_backward, number_sigmoid, lambda v: number_sigmoid(v) * number_sigmoid(-v)
    ),
}
activations = pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)


def each(function: Callable[[float], float], x: np.ndarray) -> np.ndarray:
    return np.array([function(float(v)) for v in x.flat]).reshape(x.shape)


def check(
    here: Here, activation: Activation, host: np.ndarray, dtype: str, layouts: tuple[str, str]
) -> None:
    dy = normal(*host.shape, seed=1)
    x, dys = (
        laid_out(here, a, dtype, layout) for a, layout in zip((host, dy), layouts, strict=True)
    )
    with untouched(here, x, dys):
        y, cache = activation.forward(x)
        dx = activation.backward(dys, cache)
    agree(here, y, each(activation.value, host), x)
    agree(here, dx, dy * each(activation.slope, host), x)


@activations
@settings(max_examples=20)
@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
    scale=st.sampled_from([1, 30, 1000]),
)
@with_each_kernel
def test_drawn(backend: Here, activation: Activation, shape, dtype, layouts, scale):
    check(backend, activation, scale * normal(*shape), dtype, layouts)


@activations
@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (1, 3, 2, 2), (2, 3, 4, 5)])
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@with_each_kernel
def test_batches_and_layouts(
    backend: Here, activation: Activation, shape: tuple[int, ...], layout: str
):
    for layouts in mixtures(layout, 2):
        check(backend, activation, normal(*shape), "float32", layouts)


@activations
@with_each_kernel
def test_numerical_gradient(backend: Here, activation: Activation):
    host = distinct(3, 7)
    dy = backend.array(normal(3, 7, seed=2))
    dx = activation.backward(dy, activation.forward(backend.array(host))[1])
    gradient_agrees(
        backend, dx, lambda a: backend.xp.sum(activation.forward(a, keep=False)[0] * dy), host
    )


@with_each_kernel
def test_relu_at_its_kink_and_at_the_ends(backend: Here):
    x = backend.array([-np.inf, -1.0, -0.0, 0.0, 1e-300, np.inf, np.nan])
    y, cache = relu(x)
    agree(backend, y, [0, 0, 0, 0, 1e-300, np.inf, np.nan], x, tolerance=0)
    dx = relu_backward(backend.array(np.full(7, 3.0)), cache)
    agree(backend, dx[:6], [0, 0, 0, 0, 3, 3], x, tolerance=0)


@pytest.mark.parametrize("dtype", DTYPES)
@with_each_kernel
def test_sigmoid_at_the_ends(backend: Here, dtype: str):
    """No overflow (a warning is an error here); on SciPy's word where it is installed, to the last
    digits."""
    special = pytest.importorskip("scipy.special", reason="SciPy is the oracle")
    host = np.array(
        [-np.inf, -1e4, -745.0, -88.0, -20.0, -1e-9, 0.0, 1e-9, 20.0, 88.0, 1e4, np.inf]
    )
    x = backend.array(host, dtype)
    y, cache = sigmoid(x)
    expected = special.expit(host)
    np.testing.assert_allclose(
        backend.host(y), expected, rtol=4e-7 if dtype == "float32" else 4e-16, atol=1e-300
    )
    dx = backend.host(sigmoid_backward(backend.array(np.ones(12), dtype), cache))
    assert np.all(np.isfinite(dx))
    assert dx[0] == dx[-1] == 0.0
    assert np.isnan(backend.host(sigmoid(backend.array([np.nan], dtype))[0])).all()


@needs("torch")
@with_each_kernel
def test_pytorchs_activations(backend: Here):
    import torch

    host, dy = np.round(normal(4, 5) * 3) / 2, normal(4, 5, seed=1)
    for name, activation in ACTIVATIONS.items():
        leaf = torch.tensor(host, requires_grad=True)
        expected = getattr(torch, name)(leaf)
        expected.backward(torch.tensor(dy))
        x = backend.array(host)
        y, cache = activation.forward(x)
        agree(backend, y, expected.detach().numpy(), x)
        agree(backend, activation.backward(backend.array(dy), cache), leaf.grad.numpy(), x)


@activations
def test_caches(backend: Here, activation: Activation):
    x = backend.array(normal(2, 3))
    y, cache = activation.forward(x, keep=False)
    assert cache is None
    agree(backend, y, backend.host(activation.forward(x)[0]), x, tolerance=0)
    refuses(StateError, "keep=True", call=lambda: activation.backward(x, None))
    other = next(one for one in ACTIVATIONS.values() if one is not activation)
    refuses(StateError, "relu", "sigmoid", call=lambda: activation.backward(x, other.forward(x)[1]))
