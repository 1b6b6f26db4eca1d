"""The affine map, alone and with ReLU, and its gradients against loops and PyTorch."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn.errors import ShapeError, StateError
from portacnn.ops import linear, linear_backward, relu
from portacnn.ops.fused import (
    linear_relu,
    linear_relu_backward,
)
from support import oracles
from support.checks import (
    DTYPES,
    LAYOUTS,
    agree,
    gradient_agrees,
    laid_out,
    normal,
    refuses,
    refuses_integers_and_lists,
    refuses_mixed,
    untouched,
    with_each_kernel,
)
from support.matrix import Here, needs


def check(
    here: Here,
    shape: tuple[int, int, int],
    dtype: str,
    layouts: tuple[str, str, str],
    with_bias: bool,
) -> None:
    """shape: (N, F, O)."""
    n, f, o = shape
    x, weight, dy = normal(n, f), normal(o, f, seed=1), normal(n, o, seed=2)
    bias = normal(o, seed=3) if with_bias else None
    y_, dx_, dweight_, dbias_ = oracles.linear(x, weight, bias, dy)
    xs, ws, dys = (
        laid_out(here, a, dtype, layout) for a, layout in zip((x, weight, dy), layouts, strict=True)
    )
    bs = None if bias is None else here.array(bias, dtype)
    with untouched(here, xs, ws, bs, dys):
        y, cache = linear(xs, ws, bs)
        dx, dweight, dbias = linear_backward(dys, cache)
    for got, expected in ((y, y_), (dx, dx_), (dweight, dweight_)):
        agree(here, got, expected, xs)
    if bs is None:
        assert dbias is None
    else:
        agree(here, dbias, dbias_, xs)


@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(1, 5), st.integers(1, 5)),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    with_bias=st.booleans(),
)
@with_each_kernel
def test_drawn_arguments_agree_with_the_reference(backend: Here, shape, dtype, layouts, with_bias):
    check(backend, shape, dtype, layouts, with_bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [0, 1, 4])
@with_each_kernel
def test_any_batch_and_layout_is_accepted(backend: Here, n: int, layout: str, dtype: str):
    check(backend, (n, 3, 2), dtype, (layout,) * 3, True)


@needs("torch")
@with_each_kernel
def test_linear_agrees_with_pytorch(backend: Here):
    import torch

    hosts = normal(4, 5), normal(3, 5, seed=1), normal(3, seed=2)
    leaves = [torch.tensor(a, requires_grad=True) for a in hosts]
    expected, dy = torch.nn.functional.linear(*leaves), normal(4, 3, seed=3)
    expected.backward(torch.tensor(dy))
    arrays = [backend.array(a) for a in hosts]
    y, cache = linear(*arrays)
    agree(backend, y, expected.detach().numpy(), arrays[0])
    for got, leaf in zip(linear_backward(backend.array(dy), cache), leaves, strict=True):
        agree(backend, got, leaf.grad.numpy(), arrays[0])


@with_each_kernel
def test_gradients_agree_with_numerical_gradients(backend: Here):
    hosts = [normal(2, 3), normal(4, 3, seed=1), normal(4, seed=2)]
    arrays, dy = [backend.array(a) for a in hosts], backend.array(normal(2, 4, seed=3))
    for i, gradient in enumerate(linear_backward(dy, linear(*arrays)[1])):

        def loss(a, i=i):
            return backend.xp.sum(linear(*arrays[:i], a, *arrays[i + 1 :], keep=False)[0] * dy)

        gradient_agrees(backend, gradient, loss, hosts[i])


@with_each_kernel
def test_what_is_not_needed_is_not_made(backend: Here):
    x, weight = backend.array(normal(2, 3)), backend.array(normal(4, 3))
    y, cache = linear(x, weight)
    assert linear(x, weight, keep=False)[1] is None
    dx, dweight, dbias = linear_backward(y, cache, need_dx=False)
    assert dx is None
    assert dbias is None
    agree(backend, dweight, backend.host(linear_backward(y, cache)[1]), x)
    refuses(StateError, "linear", "keep=True", call=lambda: linear_backward(y, None))
    refuses(StateError, "linear", "relu", call=lambda: linear_backward(y, relu(x)[1]))


@pytest.mark.parametrize(
    ("words", "x", "weight", "bias"),
    [
        (("(N, F)", "2x3x1"), (2, 3, 1), (4, 3), None),
        (("(O, F)", "4x3x1"), (2, 3), (4, 3, 1), None),
        (("expected 3 input features", "got 5", "2x5"), (2, 5), (4, 3), None),
        (("bias of shape (4,)", "(3,)"), (2, 3), (4, 3), (3,)),
        (("bias of shape (4,)", "(1, 4)"), (2, 3), (4, 3), (1, 4)),
    ],
)
def test_wrong_arguments_are_refused(backend: Here, words, x, weight, bias):
    arrays = [
        None if shape is None else backend.array(np.ones(shape)) for shape in (x, weight, bias)
    ]
    refuses(ShapeError, "linear: ", *words, call=lambda: linear(*arrays))


def test_foreign_arrays_are_refused(backend: Here):
    weight = backend.array(normal(4, 3), "float32")
    refuses_mixed(backend, "linear: ", linear, normal(2, 3), normal(4, 3))
    refuses_mixed(
        backend, "linear: ", lambda x, bias: linear(x, weight, bias), normal(2, 3), normal(4)
    )
    refuses_integers_and_lists(backend, "linear: ", lambda x: linear(x, weight), normal(2, 3))


# --- affine map and ReLU --------------------------------------------------------------------------


def check_relu(
    here: Here, shape: tuple[int, int, int], dtype: str, layouts: Any, with_bias: bool
) -> None:
    """shape: (N, F, O)."""
    n, f, o = shape
    x, weight, dy = normal(n, f), normal(o, f, seed=1), normal(n, o, seed=2)
    bias = normal(o, seed=3) if with_bias else None
    before, *_ = oracles.linear(x, weight, bias, dy)
    _, *gradients = oracles.linear(x, weight, bias, dy * (before > 0))
    xs, ws, dys = (
        laid_out(here, a, dtype, layout) for a, layout in zip((x, weight, dy), layouts, strict=True)
    )
    bs = None if bias is None else here.array(bias, dtype)
    with untouched(here, xs, ws, bs, dys):
        y, cache = linear_relu(xs, ws, bs)
        results = linear_relu_backward(dys, cache)
        quick, nothing = linear_relu(xs, ws, bs, keep=False)
        no_dx, *others = linear_relu_backward(dys, linear_relu(xs, ws, bs)[1], need_dx=False)
    assert nothing is None
    assert no_dx is None
    agree(here, y, np.maximum(before, 0.0), xs)
    agree(here, quick, np.maximum(before, 0.0), xs)
    for got, expected in zip([*results, *others], [*gradients, *gradients[1:]], strict=True):
        if expected is None or (bs is None and got is None):
            assert got is None
        else:
            agree(here, got, expected, xs)
    assert (results[2] is None) == (bs is None)


@settings(derandomize=True, max_examples=20)
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(1, 5), st.integers(1, 5)),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    with_bias=st.booleans(),
)
@with_each_kernel
def test_linear_relu_agrees_with_the_reference(
    backend: Here, shape: Any, dtype: str, layouts: Any, with_bias: bool
):
    check_relu(backend, shape, dtype, layouts, with_bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@with_each_kernel
def test_linear_relu_in_any_layout(backend: Here, layout: str, dtype: str):
    check_relu(backend, (4, 3, 5), dtype, (layout,) * 3, True)


@with_each_kernel
def test_linear_relu_keeps_nan_in_its_row(backend: Here):
    x, weight, bias = normal(3, 4), normal(2, 4, seed=1), normal(2, seed=2)
    clean = np.maximum(x @ weight.T + bias, 0.0)
    x[1, 2], clean[1] = np.nan, np.nan
    arrays = [backend.array(a) for a in (x, weight, bias)]
    agree(backend, linear_relu(*arrays)[0], clean, arrays[0])


def test_linear_relu_refuses_what_linear_refuses(backend: Here):
    x, w = normal(2, 4), normal(3, 4)
    weight = backend.array(w, "float32")
    refuses_mixed(backend, "linear_relu: ", linear_relu, x, w)
    refuses_integers_and_lists(backend, "linear_relu: ", lambda a: linear_relu(a, weight), x)
    wide = backend.array(normal(2, 5), "float32")
    refuses(
        ShapeError,
        "linear_relu: ",
        "4 input features",
        "got 5",
        call=lambda: linear_relu(wide, weight),
    )
    refuses(
        ShapeError,
        "linear_relu: ",
        "bias",
        call=lambda: linear_relu(wide[:, :4], weight, wide[0, ...]),
    )
