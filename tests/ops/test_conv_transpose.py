"""Transposed convolution: by loops, by numerical gradients, by PyTorch on drawn geometries, and as
convolution's adjoint."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn import ops
from portacnn.errors import ArgumentError, ShapeError
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

# x shape, weight shape, options, and (stride, pads, output_padding, dilation, groups) written out
CASES = {
    "1d": ((2, 2, 4), (2, 3, 3), {}, ((1,), ((0, 0),), (0,), (1,), 1)),
    "1d, asymmetric": (
        (1, 2, 4),
        (2, 1, 3),
        {"stride": 2, "padding": ((0, 2),)},
        ((2,), ((0, 2),), (0,), (1,), 1),
    ),
    "2d, doubling": (
        (2, 2, 3, 2),
        (2, 2, 3, 3),
        {"stride": 2, "padding": 1, "output_padding": 1},
        ((2, 2), ((1, 1), (1, 1)), (1, 1), (1, 1), 1),
    ),
    "2d, groups, dilation": (
        (1, 4, 3, 3),
        (4, 1, 2, 3),
        {"stride": (1, 3), "dilation": (3, 1), "output_padding": (2, 1), "groups": 2},
        ((1, 3), ((0, 0), (0, 0)), (2, 1), (3, 1), 2),
    ),
    "2d, one pixel": (
        (1, 1, 1, 1),
        (1, 2, 2, 2),
        {},
        ((1, 1), ((0, 0), (0, 0)), (0, 0), (1, 1), 1),
    ),
    "2d, gaps between the kernels": (
        (1, 1, 2, 3),
        (1, 1, 1, 2),
        {"stride": 3},
        ((3, 3), ((0, 0), (0, 0)), (0, 0), (1, 1), 1),
    ),
    "3d": (
        (1, 2, 2, 3, 2),
        (2, 2, 2, 1, 3),
        {"stride": (2, 1, 2), "padding": (1, 0, 1)},
        ((2, 1, 2), ((1, 1), (0, 0), (1, 1)), (0,) * 3, (1,) * 3, 1),
    ),
}
cases = pytest.mark.parametrize("name", CASES)


def face(axes: int) -> tuple[Any, Any]:
    return getattr(ops, f"conv_transpose{axes}d"), getattr(ops, f"conv_transpose{axes}d_backward")


@pytest.mark.parametrize("dtype", DTYPES)
@cases
@with_each_kernel
def test_values_are_correct(backend: Here, name: str, dtype: str):
    x_shape, w_shape, options, plain = CASES[name]
    hosts = normal(*x_shape), normal(*w_shape, seed=1), normal(w_shape[1] * plain[-1], seed=2)
    expected = oracles.conv_transpose(*hosts, *plain)
    for layout in LAYOUTS:
        x, weight, bias = (laid_out(backend, host, dtype, layout) for host in hosts)
        with untouched(backend, x, weight, bias):
            y, _ = face(x.ndim - 2)[0](x, weight, bias, **options)
        agree(backend, y, expected, x)


@cases
@with_each_kernel
def test_gradients_are_correct(backend: Here, name: str):
    x_shape, w_shape, options, plain = CASES[name]
    hosts = [normal(*x_shape), normal(*w_shape, seed=1), normal(w_shape[1] * plain[-1], seed=2)]
    arrays = [backend.array(host) for host in hosts]
    op, backward = face(arrays[0].ndim - 2)
    y, cache = op(*arrays, **options)
    dy_host = normal(*y.shape, seed=3)
    dy = backend.array(dy_host)
    with untouched(backend, *arrays, dy):
        gradients = backward(dy, cache)
    for i, gradient in enumerate(gradients):

        def loss(a: Any, i: int = i) -> Any:
            changed = [*arrays[:i], a, *arrays[i + 1 :]]
            return backend.xp.sum(op(*changed, **options, keep=False)[0] * dy)

        gradient_agrees(backend, gradient, loss, hosts[i])
    for layout in LAYOUTS:
        again = backward(laid_out(backend, dy_host, layout=layout), cache)
        for a, b in zip(again, gradients, strict=True):
            agree(backend, a, backend.host(b), arrays[0])
    dx, _, _ = backward(dy, cache, need_dx=False)
    assert dx is None
    nothing = op(*arrays[:2], **options)[1]
    assert backward(dy, nothing)[2] is None


@st.composite
def drawn(draw: st.DrawFn) -> dict[str, Any]:
    axes = draw(st.integers(1, 3))
    both = lambda low, high: st.tuples(*[st.integers(low, high)] * axes)  # noqa: E731
    case = {"size": draw(both(1, 3)), "kernel": draw(both(1, 3)), "stride": draw(both(1, 3))}
    case |= {"dilation": draw(both(1, 2)), "padding": draw(both(0, 1))}
    case["output_padding"] = tuple(
        draw(st.integers(0, max(s, d) - 1))
        for s, d in zip(case["stride"], case["dilation"], strict=True)
    )
    n, cg, og, groups = (draw(st.integers(1, high)) for high in (2, 2, 2, 3))
    return {**case, "n": n, "cg": cg, "og": og, "groups": groups}


@needs("torch")
@settings(max_examples=15)
@given(
    case=drawn(), dtype=st.sampled_from(DTYPES), layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3)
)
@with_each_kernel
def test_drawn_arguments_agree_with_pytorch(backend: Here, case: dict, dtype: str, layouts: tuple):
    import torch

    axes, groups = len(case["size"]), case["groups"]
    hosts = [
        normal(case["n"], case["cg"] * groups, *case["size"]),
        normal(case["cg"] * groups, case["og"], *case["kernel"], seed=1),
        normal(case["og"] * groups, seed=2),
    ]
    options = {
        name: case[name] for name in ("stride", "padding", "output_padding", "groups", "dilation")
    }
    leaves = [torch.tensor(host, requires_grad=True) for host in hosts]
    try:
        expected = getattr(torch.nn.functional, f"conv_transpose{axes}d")(*leaves, **options)
    except RuntimeError:
        expected = None
    op, backward = face(axes)
    x, weight, bias = (
        laid_out(backend, h, dtype, layout) for h, layout in zip(hosts, layouts, strict=True)
    )
    if expected is None:
        refuses(ShapeError, "output size", call=lambda: op(x, weight, bias, **options))
        return
    dy = normal(*expected.shape, seed=3)
    expected.backward(torch.tensor(dy))
    y, cache = op(x, weight, bias, **options)
    results = [y, *backward(backend.array(dy, dtype), cache)]
    for got, right in zip(
        results, [expected.detach(), *(leaf.grad for leaf in leaves)], strict=True
    ):
        agree(backend, got, right.numpy(), x)


@with_each_kernel
def test_conv_transpose_is_the_adjoint_of_conv(backend: Here):
    """<conv(a), b> = <a, conv_transpose(b)>, with the same weight, padding and stride."""
    a, weight = normal(2, 3, 7, 6), normal(4, 3, 3, 2, seed=1)
    options = {"stride": (2, 1), "padding": ((1, 2), (0, 1)), "dilation": (1, 2)}
    y, _ = ops.conv2d(backend.array(a), backend.array(weight), **options)
    b = normal(*y.shape, seed=2)
    back, _ = ops.conv_transpose2d(
        backend.array(b), backend.array(weight), output_padding=(1, 0), **options
    )
    assert tuple(back.shape) == a.shape
    assert np.sum(backend.host(y) * b) == pytest.approx(np.sum(a * backend.host(back)), rel=1e-12)


@with_each_kernel
def test_an_empty_batch_is_accepted(backend: Here):
    x, weight = backend.array(np.zeros((0, 2, 3, 3))), backend.array(normal(2, 3, 2, 2))
    y, cache = ops.conv_transpose2d(x, weight, backend.array(normal(3)), stride=2)
    assert tuple(y.shape) == (0, 3, 6, 6)
    dx, dweight, dbias = ops.conv_transpose2d_backward(y, cache)
    assert tuple(dx.shape) == tuple(x.shape)
    agree(backend, dweight, np.zeros(weight.shape), x)
    agree(backend, dbias, np.zeros(3), x)


X, W = normal(1, 4, 3, 3), normal(4, 3, 2, 2)


@pytest.mark.parametrize(
    ("kind", "words", "x", "weight", "bias", "options"),
    [
        (ShapeError, ("height x width", "got 3 axes"), X[0], W, None, {}),
        (ShapeError, ("(C, O/groups, height x width)", "(3, 2, 2)"), X, W[0], None, {}),
        (ShapeError, ("expected 3 input channels", "got 4"), X, W[:3], None, {}),
        (ShapeError, ("4 input channels", "3 groups"), X, W, None, {"groups": 3}),
        (ShapeError, ("bias of shape (6,)", "(3,)"), X, W, normal(3), {"groups": 2}),
        (ShapeError, ("output size 0x0",), X, W, None, {"padding": 2}),
        (ShapeError, ("input 0x3",), X[:, :, :0], W, None, {}),
        (ArgumentError, ("output_padding", "below", "1x1"), X, W, None, {"output_padding": 1}),
        (
            ArgumentError,
            ("output_padding", "2x0"),
            X,
            W,
            None,
            {"output_padding": (2, 0), "stride": 2},
        ),
        (ArgumentError, ("output_padding", "at least 0"), X, W, None, {"output_padding": -1}),
        (ArgumentError, ("padding", "numbers", "'same'"), X, W, None, {"padding": "same"}),
        (ArgumentError, ("stride", "at least 1"), X, W, None, {"stride": 0}),
        (ArgumentError, ("groups", "at least 1"), X, W, None, {"groups": 0}),
    ],
)
def test_wrong_arguments_are_refused(backend: Here, kind, words, x, weight, bias, options):
    x, weight, bias = (None if a is None else backend.array(a) for a in (x, weight, bias))
    refuses(
        kind,
        "conv_transpose2d: ",
        *words,
        call=lambda: ops.conv_transpose2d(x, weight, bias, **options),
    )


def test_mixed_arrays_and_integers_are_refused(backend: Here):
    refuses_mixed(backend, "conv_transpose2d: ", ops.conv_transpose2d, X, W)
    weight = backend.array(W, "float32")
    refuses_integers_and_lists(
        backend, "conv_transpose2d: ", lambda x: ops.conv_transpose2d(x, weight), X
    )
