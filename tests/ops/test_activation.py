"""Activations beyond ReLU and sigmoid, and the error function: against math's functions, PyTorch,
finite differences."""

import math
from functools import cache
from typing import Any

import numpy as np
import pytest

from portacnn import ops
from portacnn.errors import ArgumentError
from support.checks import (
    DTYPES,
    LAYOUTS,
    agree,
    distinct,
    gradient_agrees,
    laid_out,
    normal,
    refuses,
    refuses_integers_and_lists,
    untouched,
    with_each_kernel,
)
from support.matrix import Here, needs

TOLERANCE = {"float32": 1e-5, "float64": 1e-11}


def sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v)) if v >= 0 else math.exp(v) / (1 + math.exp(v))


def normal_below(v: float) -> float:
    return 0.5 * math.erfc(-v / math.sqrt(2))


# name, options, the function of one number in Python's own arithmetic
CASES = [
    ("leaky_relu", {}, lambda v: v if v > 0 else 0.01 * v),
    ("leaky_relu", {"negative_slope": -0.3}, lambda v: v if v > 0 else -0.3 * v),
    ("leaky_relu", {"negative_slope": 0}, lambda v: max(v, 0.0)),
    ("elu", {}, lambda v: v if v > 0 else math.expm1(v)),
    ("elu", {"alpha": 0.4}, lambda v: v if v > 0 else 0.4 * math.expm1(v)),
    ("tanh", {}, math.tanh),
    ("silu", {}, lambda v: v * sigmoid(v)),
    ("gelu", {}, lambda v: v * normal_below(v)),
    (
        "gelu",
        {"approximate": "tanh"},
        lambda v: v / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    ),
    ("softplus", {}, lambda v: v if v > 20 else math.log1p(math.exp(v))),
    ("softplus", {"beta": 3.0}, lambda v: v if 3 * v > 20 else math.log1p(math.exp(3 * v)) / 3),
    (
        "softplus",
        {"beta": 0.5, "threshold": 1},
        lambda v: v if v > 2 else math.log1p(math.exp(v / 2)) * 2,
    ),
    ("softplus", {"threshold": 1e9}, lambda v: max(v, 0.0) + math.log1p(math.exp(-abs(v)))),
]
every = pytest.mark.parametrize(
    ("name", "options", "function"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES]
)


@pytest.mark.parametrize("dtype", DTYPES)
@every
@with_each_kernel
def test_values(backend: Here, name: str, options: dict, function: Any, dtype: str):
    host = np.concatenate(
        [np.linspace(-12, 12, 41), normal(15), [25.0, -25.0, 1e4, -1e4, 0.0, 1e-20]]
    ).reshape(31, 2)
    host = host.astype(dtype).astype("float64")
    expected = np.vectorize(function)(host)
    for layout in LAYOUTS:
        x = laid_out(backend, host, dtype, layout)
        with untouched(backend, x):
            y, _ = getattr(ops, name)(x, **options)
        got = backend.host(y)
        np.testing.assert_allclose(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert (y.dtype, y.device, type(y)) == (x.dtype, x.device, type(x))
    quick, nothing = getattr(ops, name)(x, **options, keep=False)
    assert nothing is None
    agree(backend, quick, got, x)


@every
@with_each_kernel
def test_numerical_gradient(backend: Here, name: str, options: dict, function: Any):
    host = distinct(4, 5, 3)
    dy = backend.array(normal(4, 5, 3))
    op, back = getattr(ops, name), getattr(ops, name + "_backward")
    _, cache = op(backend.array(host), **options)
    with untouched(backend, dy):
        dx = back(dy, cache)
    gradient_agrees(
        backend, dx, lambda x: backend.xp.sum(op(x, **options, keep=False)[0] * dy), host
    )


@needs("torch")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "options"),
    [case[:2] for case in CASES if case[1].get("threshold", 0) < 1e4],
)
@with_each_kernel
def test_pytorch(backend: Here, name: str, options: dict, dtype: str):
    """Gradients at the bends and far out, too. PyTorch's softplus overflows below a threshold of
    1e9."""
    import torch

    host = np.concatenate([np.linspace(-30, 30, 121), [0.0, 1e4, -1e4]])
    leaf = torch.tensor(host, dtype=getattr(torch, dtype), requires_grad=True)
    y = getattr(torch, name, None) or getattr(torch.nn.functional, name)
    y = y(leaf, **options)
    y.backward(torch.ones_like(y))
    x = backend.array(host, dtype)
    got, cache = getattr(ops, name)(x, **options)
    np.testing.assert_allclose(
        backend.host(got), y.detach().numpy(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )
    dx = getattr(ops, name + "_backward")(backend.array(np.ones(host.shape), dtype), cache)
    agree(backend, dx, leaf.grad.numpy(), x, TOLERANCE[dtype])


@every
@with_each_kernel
def test_any_shape(backend: Here, name: str, options: dict, function: Any):
    for shape in ((), (0,), (0, 3, 2), (1, 1, 1, 1)):
        x = backend.array(np.full(shape, 0.5))
        y, cache = getattr(ops, name)(x, **options)
        agree(backend, backend.xp.asarray(y), np.full(shape, function(0.5)), x)
        assert tuple(getattr(ops, name + "_backward")(y, cache).shape) == shape


# --- the error function ---------------------------------------------------------------------------


@cache
def erf_of_each(shape: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Normal numbers of this shape, and their error function."""
    host = normal(*shape)
    return host, np.array([math.erf(v) for v in host.ravel()]).reshape(shape)


@with_each_kernel
def test_erf(backend: Here):
    host = np.concatenate(
        [np.linspace(-7, 7, 7_001), [0.46875, -0.46875, 1e4, -1e4, 1e-300, 0.0, np.inf, -np.inf]]
    )
    expected = np.array([math.erf(v) for v in host])
    got = backend.host(ops.erf(backend.array(host)))
    np.testing.assert_allclose(got, expected, rtol=1e-15, atol=0)
    assert np.isnan(backend.host(ops.erf(backend.array(np.array([np.nan])))))
    single = backend.host(ops.erf(backend.array(host, "float32")))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, [math.erf(v) for v in host.astype("float32")], rtol=5e-7)


@pytest.mark.parametrize("shape", [(40, 50, 41), (82_000,), (3, 40_000)])
@with_each_kernel
def test_erf_in_any_layout(backend: Here, shape: tuple):
    """Of more elements than one block of the computation."""
    host, expected = erf_of_each(shape)
    for layout in LAYOUTS:
        x = laid_out(backend, host, "float64", layout)
        with untouched(backend, x):
            agree(backend, ops.erf(x), expected, x)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("leaky_relu", {"negative_slope": float("inf")}, ("negative_slope", "inf")),
        ("elu", {"alpha": "1"}, ("alpha", "'1'")),
        ("gelu", {"approximate": "erf"}, ("approximate", '"none", "tanh"', "'erf'")),
        ("softplus", {"beta": 0}, ("beta", "above 0", "0")),
        ("softplus", {"threshold": None}, ("threshold", "None")),
        ("softmax", {"dim": 2}, ("dim", "-2..1", "2x3")),
        ("softmax", {"dim": 1.0}, ("dim", "1.0")),
        ("log_softmax", {"dim": -3}, ("dim", "-3")),
        ("log_softmax", {"dim": None}, ("dim", "None")),
    ],
)
def test_errors(backend: Here, name: str, options: dict, words: tuple):
    x = backend.array(normal(2, 3))
    refuses(ArgumentError, f"{name}: ", *words, call=lambda: getattr(ops, name)(x, **options))


@pytest.mark.parametrize(
    "name",
    ["relu", "leaky_relu", "elu", "sigmoid", "tanh", "silu", "gelu", "softplus", "softmax", "erf"],
)
def test_integers_and_lists(backend: Here, name: str):
    arguments = (0,) if name == "softmax" else ()
    refuses_integers_and_lists(
        backend, f"{name}: ", lambda x: getattr(ops, name)(x, *arguments), normal(2, 3) * 9
    )


def test_options_may_stand_in_order(backend: Here):
    x = backend.array(normal(5))
    for name, options in (
        ("leaky_relu", {"negative_slope": 0.4}),
        ("elu", {"alpha": 2.0}),
        ("softplus", {"beta": 2.0, "threshold": 1.0}),
    ):
        agree(
            backend,
            getattr(ops, name)(x, *options.values())[0],
            backend.host(getattr(ops, name)(x, **options)[0]),
            x,
        )


@pytest.mark.parametrize(
    ("op", "options", "x", "slopes"),
    [
        ("relu", {}, [-1.0, 0.0, 1.0], [0.0, 0.0, 1.0]),
        ("leaky_relu", {"negative_slope": 0.25}, [-1.0, 0.0, 1.0], [0.25, 0.25, 1.0]),
        ("elu", {"alpha": 0.5}, [0.0, 1.0], [0.5, 1.0]),
        ("scaled_elu", {"alpha": 0.5, "beta": 2.0, "gamma": 3.0}, [0.0, 1.0], [3.0, 3.0]),
        ("hard_sigmoid", {"alpha": 0.5, "beta": 0.5}, [-1.0, 0.0, 1.0], [0.0, 0.5, 0.0]),
        ("hard_swish", {}, [-4.0, -3.0, 3.0, 4.0], [0.0, 0.0, 1.0, 1.0]),
        ("clip", {"min": -1.0, "max": 2.0}, [-2.0, -1.0, 2.0, 3.0], [0.0, 1.0, 1.0, 0.0]),
        ("softplus", {"beta": 2.0, "threshold": 4.0}, [2.0, 2.5], [1 / (1 + np.exp(-4)), 1.0]),
    ],
)
@with_each_kernel
def test_slopes_where_two_pieces_meet(backend: Here, op: str, options: Any, x: Any, slopes: Any):
    """As in PyTorch: differences on both sides would give a mean of the two."""
    array = backend.array(np.array(x))
    y, cache = getattr(ops, op)(array, **options)
    dx = getattr(ops, f"{op}_backward")(backend.array(np.full(len(x), 2.0)), cache)
    agree(backend, dx, 2.0 * np.array(slopes), y)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@with_each_kernel
def test_clip_of_values_at_and_beyond_its_limits(backend: Here, dtype: str, layout: str):
    """Infinity and NaN among them, and crossed limits; a cache may be used twice."""
    x, inf = normal(3, 4, 5, 7), np.inf
    x.reshape(-1)[:8] = [np.nan, inf, -inf, -0.5, 0.5, 2.0, 0.0, -0.0]
    dy = normal(3, 4, 5, 7, seed=1)
    x_, dy_ = laid_out(backend, x, dtype, layout), laid_out(backend, dy, dtype)
    for low, high in [(-0.5, 0.5), (None, 2.0), (0.0, None), (0.5, -0.5), (None, None)]:
        y, cache = ops.clip(x_, min=low, max=high)
        least, most = -inf if low is None else low, inf if high is None else high
        own = [v if v != v else min(max(v, least), most) for v in x.reshape(-1).tolist()]
        np.testing.assert_allclose(backend.host(y).reshape(-1), own, rtol=1e-6)
        inside = np.ones(x.shape, bool)
        inside &= True if low is None else x >= low
        inside &= True if high is None else x <= high
        for _ in range(2):
            dx = ops.clip_backward(dy_, cache)
            agree(backend, dx, np.where(inside, dy, 0.0), x_)


@pytest.mark.parametrize("op", ["clip", "leaky_relu", "softplus"])
@with_each_kernel
def test_the_result_is_an_array_of_its_own(backend: Here, op: str):
    """Also where every value stays as it is: no bounds, no slope, far beyond a threshold."""
    options = {"clip": {}, "leaky_relu": {"negative_slope": 1.0}, "softplus": {}}[op]
    x = backend.backend.asarray(np.full((2, 3), 50.0))
    y, _ = getattr(ops, op)(x, **options)
    x[...] = -1.0
    np.testing.assert_array_equal(backend.host(y), np.full((2, 3), 50.0))
