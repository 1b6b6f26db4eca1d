"""Convolution in one and three dimensions: what conv2d's own tests cannot show. Values by loops,
gradients numerically."""

from inspect import signature
from typing import Any

import numpy as np
import pytest

from portacnn import ops
from portacnn.errors import ArgumentError, ShapeError
from support import oracles
from support.checks import (
    DTYPES,
    LAYOUTS,
    agree,
    face,
    gradient_agrees,
    laid_out,
    normal,
    refuses,
    untouched,
    with_each_kernel,
)
from support.matrix import Here

# x shape, weight shape, options as a caller writes them, and (stride, pads, dilation, groups)
# written out
CASES = {
    "1d": ((2, 2, 7), (3, 2, 3), {}, ((1,), ((0, 0),), (1,), 1)),
    "1d, all at once": (
        (2, 4, 9),
        (6, 2, 3),
        {"stride": 2, "padding": ((0, 3),), "dilation": 2, "groups": 2},
        ((2,), ((0, 3),), (2,), 2),
    ),
    "1d, same with stride": (
        (1, 1, 8),
        (2, 1, 3),
        {"stride": 2, "padding": "same"},
        ((2,), ((0, 1),), (1,), 1),
    ),
    "1d, one cell": ((1, 1, 1), (1, 1, 1), {}, ((1,), ((0, 0),), (1,), 1)),
    "3d": ((1, 2, 3, 2, 3), (2, 2, 2, 2, 2), {}, ((1,) * 3, ((0, 0),) * 3, (1,) * 3, 1)),
    "3d, all at once": (
        (1, 2, 4, 5, 3),
        (4, 1, 2, 3, 1),
        {"stride": (2, 1, 3), "padding": (1, 2, 0), "dilation": (1, 2, 1), "groups": 2},
        ((2, 1, 3), ((1, 1), (2, 2), (0, 0)), (1, 2, 1), 2),
    ),
    "3d, depthwise, asymmetric": (
        (1, 3, 2, 3, 3),
        (3, 1, 2, 2, 2),
        {"padding": ((1, 0), (0, 1), (2, 0)), "groups": 3},
        ((1,) * 3, ((1, 0), (0, 1), (2, 0)), (1,) * 3, 3),
    ),
}
cases = pytest.mark.parametrize("name", CASES)


@pytest.mark.parametrize("dtype", DTYPES)
@cases
@with_each_kernel
def test_values_are_correct(backend: Here, name: str, dtype: str):
    x_shape, w_shape, options, plain = CASES[name]
    hosts = normal(*x_shape), normal(*w_shape, seed=1), normal(w_shape[0], seed=2)
    expected = oracles.conv(*hosts, *plain)
    for layout in LAYOUTS:
        x, weight, bias = (laid_out(backend, host, dtype, layout) for host in hosts)
        conv, _ = face("conv", x.ndim - 2)
        with untouched(backend, x, weight, bias):
            agree(backend, conv(x, weight, bias, **options)[0], expected, x)
            y, cache = conv(x, weight, **options, keep=False)
        agree(backend, y, expected - hosts[2].reshape(-1, *(1,) * (x.ndim - 2)), x)
        assert cache is None


@cases
@with_each_kernel
def test_gradients_are_correct(backend: Here, name: str):
    x_shape, w_shape, options, _ = CASES[name]
    hosts = [normal(*x_shape), normal(*w_shape, seed=1), normal(w_shape[0], seed=2)]
    arrays = [backend.array(host) for host in hosts]
    conv, conv_backward = face("conv", arrays[0].ndim - 2)
    y, cache = conv(*arrays, **options)
    dy = backend.array(normal(*y.shape, seed=3))
    with untouched(backend, *arrays, dy):
        gradients = conv_backward(dy, cache)
    for i, gradient in enumerate(gradients):

        def loss(a: Any, i: int = i) -> Any:
            changed = [*arrays[:i], a, *arrays[i + 1 :]]
            return backend.xp.sum(conv(*changed, **options, keep=False)[0] * dy)

        gradient_agrees(backend, gradient, loss, hosts[i])
    dx, dweight, _ = conv_backward(dy, cache, need_dx=False)
    assert dx is None
    agree(backend, dweight, backend.host(gradients[1]), arrays[0])


@pytest.mark.parametrize("axes", [1, 3])
@with_each_kernel
def test_an_empty_batch_is_accepted(backend: Here, axes: int):
    x, weight = (
        backend.array(np.zeros((0, 2, *(4,) * axes))),
        backend.array(normal(3, 2, *(2,) * axes)),
    )
    conv, conv_backward = face("conv", x.ndim - 2)
    y, cache = conv(x, weight, backend.array(normal(3)))
    assert tuple(y.shape) == (0, 3, *(3,) * axes)
    dx, dweight, dbias = conv_backward(y, cache)
    assert tuple(dx.shape) == tuple(x.shape)
    agree(backend, dweight, np.zeros(weight.shape), x)
    agree(backend, dbias, np.zeros(3), x)


def test_wrong_arguments_are_refused(backend: Here):
    x, weight = backend.array(normal(1, 2, 5)), backend.array(normal(4, 2, 3))
    refuses(
        ShapeError,
        "conv1d: ",
        "length",
        "got 4 axes",
        call=lambda: ops.conv1d(x[None, ...], weight),
    )
    refuses(ShapeError, "conv3d: ", "depth x height x width", call=lambda: ops.conv3d(x, weight))
    refuses(
        ShapeError, "conv1d: ", "kernel 3", "input 2", call=lambda: ops.conv1d(x[:, :, :2], weight)
    )
    refuses(
        ShapeError,
        "conv1d: ",
        "expected 4 input channels",
        call=lambda: ops.conv1d(x, weight, groups=2),
    )
    for groups in (0, -1, 1.5):
        refuses(
            ArgumentError,
            "conv1d: ",
            "groups",
            call=lambda groups=groups: ops.conv1d(x, weight, groups=groups),
        )
    ops.conv1d(x, weight, stride=2)
    refuses(
        ArgumentError, "conv1d: ", "whole", "2.0", call=lambda: ops.conv1d(x, weight, stride=2.0)
    )
    refuses(
        ArgumentError, "conv1d: ", "1 of them", call=lambda: ops.conv1d(x, weight, stride=(1, 1))
    )


@pytest.mark.parametrize(
    "name", ["conv", "conv_transpose", "max_pool", "avg_pool", "adaptive_avg_pool"]
)
def test_faces_look_like_functions(name: str):
    for axes in (1, 2, 3):
        face = getattr(ops, f"{name}{axes}d")
        assert face.__name__ == f"{name}{axes}d"
        assert "Args:" in face.__doc__
        assert next(iter(signature(face).parameters)) == "x"
        assert "keep" in signature(face).parameters
