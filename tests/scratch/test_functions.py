"""The tutorials' functions and optimizers against their definitions, with loops in float64."""

import math

import numpy as np
import pytest

import portacnn
from portacnn import scratch
from portacnn.errors import (
    ArgumentError,
    ArrayError,
    ShapeError,
)
from support import oracles
from support.checks import DTYPES, agree, normal, refuses, untouched, with_each_kernel

dtypes = pytest.mark.parametrize("dtype", DTYPES)


def weights(here, host, dtype="float64"):
    """What an optimizer will write into."""
    return here.backend.asarray(np.asarray(host), dtype)


# --- functions ------------------------------------------------------------------------------------


@dtypes
def test_activations(backend, dtype):
    x = normal(2, 5)
    here = backend.array(x, dtype)
    e = np.exp(x)
    with untouched(backend, here):
        agree(backend, scratch.relu(here), np.where(x > 0, x, 0), here)
        agree(backend, scratch.sigmoid(here), 1 / (1 + np.exp(-x)), here)
        agree(backend, scratch.softmax(here), e / e.sum(axis=1, keepdims=True), here)
        agree(backend, scratch.softmax(here[0, :]), e[0] / e[0].sum(), here)
    assert backend.host(
        scratch.softmax(backend.array([1010.0, 1000.0, 990.0]))
    ).sum() == pytest.approx(1)
    assert backend.host(scratch.relu(backend.array([-1, 2]))).tolist() == [0, 2]
    agree(
        backend,
        scratch.softmax(backend.array([0, 1])),
        [1 / (1 + math.e), math.e / (1 + math.e)],
        backend.array(0.0),
    )


@dtypes
def test_cross_entropy_error(backend, dtype):
    y = np.array([[0.1, 0.05, 0.85], [0.3, 0.0, 0.7], [0.5, 0.25, 0.25]])
    labels = np.array([2, 1, 0])
    one_by_one = [-math.log(y[n, k] + 1e-7) for n, k in enumerate(labels)]
    here = backend.array(y, dtype)

    def agrees(got, expected):
        assert got.shape == ()
        agree(backend, backend.xp.asarray(got), expected, here)  # NumPy makes a scalar of a sum

    for t in (labels, labels[:, None], np.eye(3)[labels], np.eye(3, dtype=int)[labels]):
        agrees(scratch.cross_entropy_error(here, backend.array(t)), sum(one_by_one) / 3)
    agrees(scratch.cross_entropy_error(here[0, :], backend.array([0, 0, 1])), one_by_one[0])
    agrees(scratch.cross_entropy_error(here[0, :], backend.array([2])), one_by_one[0])
    soft = backend.array([[0.5, 0.0, 0.5]], dtype)
    wanted = -0.5 * (math.log(0.1 + 1e-7) + math.log(0.85 + 1e-7))
    agrees(scratch.cross_entropy_error(here[:1, :], soft), wanted)
    for wrong in (3, -1):
        assert np.isnan(
            backend.host(scratch.cross_entropy_error(here[0, :], backend.array([wrong])))
        )
    refuses(
        ShapeError, "labels", call=lambda: scratch.cross_entropy_error(here, backend.array([1, 2]))
    )
    other = portacnn.resolve("array_api_strict" if backend.backend.name == "numpy" else "numpy")
    refuses(
        ArrayError,
        "one library",
        call=lambda: scratch.cross_entropy_error(here, other.asarray(labels)),
    )


def test_gradients_agree_with_numerical_gradients(backend):
    def f(x):
        return backend.xp.sum(x * x * x)

    for dtype, limit in (("float64", 1e-7), ("float32", 1e-4)):
        x = weights(backend, [[3.0, 4.0], [0.0, -2.0]], dtype)
        with untouched(backend, x):
            agree(backend, scratch.numerical_gradient(f, x), [[27, 48], [0, 12]], x, limit)
            # what f reads by another way than its argument, and as a Python number
            agree(
                backend,
                scratch.numerical_gradient(lambda _, x=x: float(backend.host(f(x))), x),
                [[27, 48], [0, 12]],
                x,
                limit,
            )
    refuses(
        ArrayError,
        "3.0",
        call=lambda: scratch.numerical_gradient(f, weights(backend, [3, 4], "int64")),
    )


def correlation(x, k, pad, stride):
    """Number by number, for any number of axes; the kernel is not flipped."""
    x = np.pad(np.asarray(x, dtype=float), pad)
    out = [(n - m) // stride + 1 for n, m in zip(x.shape, k.shape, strict=True)]
    y = np.zeros(out)
    for place in np.ndindex(*out):
        for tap in np.ndindex(k.shape):
            y[place] += x[tuple(p * stride + t for p, t in zip(place, tap, strict=True))] * k[tap]
    return y


@with_each_kernel
@pytest.mark.parametrize(("pad", "stride"), [(0, 1), (1, 2), (2, 3)])
def test_plain_convolutions(backend, pad, stride):
    line, image, k1, k2 = normal(9), normal(7, 6, seed=1), normal(4, seed=2), normal(3, 2, seed=3)
    here = [backend.array(a, "float64") for a in (line, image, k1, k2)]
    with untouched(backend, *here):
        agree(
            backend,
            scratch.convolution_1d(here[0], here[2], pad, stride),
            correlation(line, k1, pad, stride),
            here[0],
        )
        got = scratch.convolution_2d(here[1], here[3], padding=pad, stride=stride)
        agree(backend, got, correlation(image, k2, pad, stride), here[0])
        agree(backend, scratch.corr2d(here[1], here[3]), correlation(image, k2, 0, 1), here[0])


def test_convolution_of_mathematics_by_flipping():
    x, k = normal(9), normal(4, seed=1)
    assert np.allclose(scratch.convolution_1d(x, np.flip(k)), np.convolve(x, k, "valid"))
    assert np.allclose(scratch.convolution_1d(x, np.flip(k), padding=3), np.convolve(x, k))
    signal = pytest.importorskip("scipy.signal")
    x, k = normal(6, 7), normal(3, 2, seed=1)
    assert np.allclose(scratch.convolution_2d(x, np.flip(k)), signal.convolve2d(x, k, "valid"))


def test_plain_convolutions_of_integers(backend):
    image, kernel = np.arange(9).reshape(3, 3), np.arange(4).reshape(2, 2)
    expected = [[19, 25], [37, 43]]  # printed in d2l.ai
    for x_dtype, k_dtype, result in (
        ("int64", "int64", "float64"),
        ("uint8", "float32", "float32"),
        ("float32", "int64", "float32"),
        ("float32", "float64", "float64"),
        ("float64", "float32", "float64"),
    ):
        got = scratch.corr2d(backend.array(image, x_dtype), backend.array(kernel, k_dtype))
        agree(backend, got, expected, backend.array(0.0, result))


def test_plain_convolutions_refuse():
    x = normal(4, 4)
    refuses(
        ShapeError, "convolution_1d", "1 axes", call=lambda: scratch.convolution_1d(x, normal(2))
    )
    refuses(ShapeError, "corr2d", "kernel", call=lambda: scratch.corr2d(x, normal(2)))
    refuses(
        ShapeError, "convolution_2d", "larger", call=lambda: scratch.convolution_2d(x, normal(5, 2))
    )
    refuses(
        ArgumentError,
        "convolution_2d",
        "stride",
        call=lambda: scratch.convolution_2d(x, x, stride=0),
    )
    refuses(ArrayError, "numpy.asarray", call=lambda: scratch.convolution_1d([1, 2, 3], [1, 2]))


def test_im2col_is_ours():
    assert scratch.im2col is portacnn.ops.im2col
    assert scratch.col2im is portacnn.ops.col2im


# --- optimizers -----------------------------------------------------------------------------------


def nesterov(p, gradients, lr, rate):
    """Sutskever's: the gradient is that at p + rate*v; told in terms of the point looked ahead to,
    as the book does."""
    v = 0.0
    for g in gradients:
        p += rate * rate * v - (1 + rate) * lr * g
        v = rate * v - lr * g
    return p


def adagrad(p, gradients, lr):
    h = 0.0
    for g in gradients:
        h += g * g
        p -= lr * g / (math.sqrt(h) + 1e-7)
    return p


def rmsprop(p, gradients, lr, decay):
    h = 0.0
    for g in gradients:
        h = decay * h + (1 - decay) * g * g
        p -= lr * g / (math.sqrt(h) + 1e-7)
    return p


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: scratch.SGD(0.1), lambda p, g: oracles.sgd(p, g, 0.1)),
        (lambda: scratch.Momentum(lr=0.1), lambda p, g: oracles.momentum(p, g, 0.1, 0.9)),
        (lambda: scratch.Nesterov(0.1, 0.8), lambda p, g: nesterov(p, g, 0.1, 0.8)),
        (lambda: scratch.AdaGrad(0.1), lambda p, g: adagrad(p, g, 0.1)),
        (lambda: scratch.RMSprop(0.1, decay_rate=0.9), lambda p, g: rmsprop(p, g, 0.1, 0.9)),
        (lambda: scratch.Adam(), lambda p, g: oracles.adam(p, g, 0.001, 0.9, 0.999, 1e-8)),
    ],
    ids=["SGD", "Momentum", "Nesterov", "AdaGrad", "RMSprop", "Adam"],
)
def test_optimizers(backend, make, rule):
    start, steps = normal(3, 2), [normal(3, 2, seed=s + 1) for s in range(4)]
    p = weights(backend, start)
    params, optimizer = {"W1": p}, make()
    for g in steps:
        optimizer.update(params, {"W1": backend.array(g, "float64")})
    assert params["W1"] is p
    expected = np.array([rule(start[i], [g[i] for g in steps]) for i in np.ndindex(3, 2)]).reshape(
        3, 2
    )
    agree(backend, p, expected, p)
