"""Padding against NumPy's np.pad, PyTorch, and numerical gradients."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn.errors import ArgumentError, ShapeError
from portacnn.ops import pad, pad_backward
from support.checks import (
    DTYPES,
    LAYOUTS,
    agree,
    gradient_agrees,
    laid_out,
    normal,
    refuses,
    refuses_integers_and_lists,
    untouched,
    with_each_kernel,
)
from support.matrix import Here, needs

BY_NUMPY = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
modes = pytest.mark.parametrize("mode", BY_NUMPY)


def by_numpy(x: np.ndarray, flat: Any, mode: str, value: float = 0.0) -> np.ndarray:
    pairs = [(0, 0)] * (x.ndim - len(flat) // 2) + [
        tuple(flat[i : i + 2]) for i in range(len(flat) - 2, -1, -2)
    ]
    return np.pad(
        x, pairs, BY_NUMPY[mode], **({"constant_values": value} if mode == "constant" else {})
    )


@st.composite
def drawn(draw: st.DrawFn) -> tuple:
    mode, axes = draw(st.sampled_from(sorted(BY_NUMPY))), draw(st.integers(1, 3))
    size = draw(st.tuples(*[st.integers(1, 4)] * axes))
    flat = []
    for n in reversed(size):
        most = {"reflect": n - 1, "circular": n}.get(mode, 4)
        flat += [draw(st.integers(0, most)), draw(st.integers(0, most))]
    return (
        mode,
        (draw(st.integers(1, 2)), 2, *size),
        flat[: draw(st.sampled_from(range(0, len(flat) + 1, 2)))],
    )


@settings(max_examples=25)
@given(case=drawn(), dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS))
def test_values_and_adjoint(backend: Here, case: tuple, dtype: str, layout: str):
    """The op is linear, so its gradient is right if <pad(x), dy> = <x, dx> for x that are one in a
    single place."""
    mode, shape, flat = case
    host = normal(*shape)
    x = laid_out(backend, host, dtype, layout)
    expected = by_numpy(host, flat, mode)
    dy_host = normal(*expected.shape, seed=1)
    dy = laid_out(backend, dy_host, dtype, layout)
    with untouched(backend, x, dy):
        y, cache = pad(x, flat, mode)
        dx = pad_backward(dy, cache)
    agree(backend, y, expected, x)
    places = by_numpy(np.arange(host.size).reshape(shape), flat, mode, -1).astype(int)
    dx_host = np.array([dy_host[places == i].sum() for i in range(host.size)]).reshape(shape)
    agree(backend, dx, dx_host, x)


@modes
def test_gradients_agree_with_numerical_gradients(backend: Here, mode: str):
    host, flat = normal(1, 2, 3, 4), (3, 1, 0, 2)
    y, cache = pad(backend.array(host), flat, mode)
    dy = backend.array(normal(*y.shape, seed=1))
    gradient = pad_backward(dy, cache)
    gradient_agrees(
        backend, gradient, lambda a: backend.xp.sum(pad(a, flat, mode, keep=False)[0] * dy), host
    )


@needs("torch")
@modes
def test_values_and_gradients_agree_with_pytorch(backend: Here, mode: str):
    import torch

    host, flat = normal(2, 3, 4, 5, 3), (2, 1, 0, 3, 1, 1)
    leaf = torch.tensor(host, requires_grad=True)
    expected = torch.nn.functional.pad(leaf, flat, mode)
    dy = normal(*expected.shape, seed=1)
    expected.backward(torch.tensor(dy))
    x = backend.array(host)
    y, cache = pad(x, flat, mode)
    agree(backend, y, expected.detach().numpy(), x)
    agree(backend, pad_backward(backend.array(dy), cache), leaf.grad.numpy(), x)


def test_any_axis_and_any_value(backend: Here):
    host = normal(2, 3)
    x = backend.array(host)
    agree(
        backend,
        pad(x, [1, 0, 0, 2], value=-np.inf)[0],
        by_numpy(host, [1, 0, 0, 2], "constant", -np.inf),
        x,
    )
    agree(backend, pad(x, ())[0], host, x)


@modes
def test_empty_batch_and_one_cell(backend: Here, mode: str):
    x = backend.array(np.zeros((0, 2, 4)))
    y, cache = pad(x, (2, 1), mode)
    assert tuple(y.shape) == (0, 2, 7)
    assert tuple(pad_backward(y, cache).shape) == (0, 2, 4)
    if mode != "reflect":
        one = backend.array(np.full((1, 1, 1), 3.0))
        agree(
            backend, pad(one, (1, 1), mode)[0], by_numpy(np.full((1, 1, 1), 3.0), (1, 1), mode), one
        )


@with_each_kernel
def test_a_gradient_that_is_one_number_broadcast(backend: Here):
    y, cache = pad(backend.array(normal(1, 1, 3)), (2, 0), "reflect")
    one = backend.xp.broadcast_to(backend.array(np.ones((1, 1, 1))), y.shape)
    agree(backend, pad_backward(one, cache), [[[1.0, 2.0, 2.0]]], one)


@pytest.mark.parametrize(
    ("kind", "words", "flat", "options"),
    [
        (ArgumentError, ("mode", "'reflect'", "'zeros'"), (1, 1), {"mode": "zeros"}),
        (ArgumentError, ("two whole numbers", "(1, 1, 1)"), (1, 1, 1), {}),
        (ArgumentError, ("two whole numbers", "1"), 1, {}),
        (ArgumentError, ("at least 0", "-1"), (1, -1), {}),
        (ArgumentError, ("whole numbers", "1.5"), (1, 1.5), {}),
        (ArgumentError, ("value", "constant"), (1, 1), {"mode": "circular", "value": 1.0}),
        (ShapeError, ("at most 8 numbers",), (0,) * 10, {}),
        (ShapeError, ("reflect", "at most 3 cells to 4", "(4, 0)"), (4, 0), {"mode": "reflect"}),
        (
            ShapeError,
            ("circular", "at most 3 cells to 3", "(0, 4)"),
            (0, 0, 0, 4),
            {"mode": "circular"},
        ),
    ],
)
def test_wrong_arguments_are_refused(backend: Here, kind, words, flat, options):
    x = backend.array(normal(1, 2, 3, 4))
    refuses(kind, "pad: ", *words, call=lambda: pad(x, flat, **options))
    hollow = backend.array(np.zeros((1, 2, 0)))
    refuses(
        ShapeError, "replicate", "at least 1 cell", call=lambda: pad(hollow, (1, 0), "replicate")
    )


def test_integers_and_lists(backend: Here):
    refuses_integers_and_lists(backend, "pad: ", lambda x: pad(x, (1, 1)), normal(1, 1, 2))
