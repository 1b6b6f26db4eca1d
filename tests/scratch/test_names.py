"""The tutorials' names against the tutorials' algorithms, written out here with loops in float64,
and pasted scripts that run."""

import inspect
import math
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

import portacnn
from portacnn import optim, scratch
from portacnn.errors import (
    ArgumentError,
    ArrayError,
    LabelError,
    ModelFormatError,
    NotFiniteError,
    ShapeError,
    StateError,
)
from support import oracles, oracles_nd
from support.checks import DTYPES, agree, distinct, normal, refuses, untouched, with_each_kernel
from support.matrix import needs

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "portacnn" / "data" / "mnist_sample"
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def weights(here, host, dtype="float64"):
    """What an optimizer will write into."""
    return here.backend.asarray(np.asarray(host), dtype)


def digits(count, first=0):
    """(images (N, 1, 28, 28), labels) from the bundled sample."""
    (x, t), _ = portacnn.load_mnist_sample()
    return x[first : first + count], t[first : first + count]


# --- layers ---------------------------------------------------------------------------------------


@with_each_kernel
@dtypes
@pytest.mark.parametrize(("stride", "pad"), [(1, 0), (2, 1), (3, 2)])
def test_convolution(backend, dtype, stride, pad):
    x, W, b = normal(2, 3, 7, 6), normal(4, 3, 3, 2, seed=1), normal(4, seed=2)
    here = [backend.array(a, dtype) for a in (x, W, b)]
    layer = scratch.Convolution(here[1], here[2], stride, pad)
    pads = ((pad, pad), (pad, pad))
    expected = oracles_nd.conv(x, W, b, (stride, stride), pads, (1, 1), 1)
    dy = normal(*expected.shape, seed=3)
    dout = backend.array(dy, dtype)
    with untouched(backend, *here, dout):
        agree(backend, layer.forward(here[0]), expected, here[0])
        dx = layer.backward(dout)
    for got, wanted in zip(
        (dx, layer.dW, layer.db),
        oracles_nd.conv_gradients(x, W, dy, (stride, stride), pads, (1, 1), 1),
        strict=True,
    ):
        agree(backend, got, wanted, here[0])


def affine(x, W, b, dy):
    """The book's: (y, dx, dW, db) with W (in, out), over samples laid out flat."""
    flat = np.array([[sample[i] for i in np.ndindex(sample.shape)] for sample in x])
    y, dx, dW, db = oracles.linear(flat, W.T, b, dy)
    return y, dx.reshape(x.shape), dW.T, db


@with_each_kernel
@dtypes
@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 3, 2)])
def test_affine(backend, dtype, shape):
    x, W, b = normal(*shape), normal(math.prod(shape[1:]), 4, seed=1), normal(4, seed=2)
    dy = normal(3, 4, seed=3)
    y, *gradients = affine(x, W, b, dy)
    here = [backend.array(a, dtype) for a in (x, W, b, dy)]
    layer = scratch.Affine(here[1], here[2])
    with untouched(backend, *here):
        agree(backend, layer.forward(here[0]), y, here[0])
        dx = layer.backward(here[3])
    for got, wanted in zip((dx, layer.dW, layer.db), gradients, strict=True):
        agree(backend, got, wanted, here[0])


@with_each_kernel
@dtypes
@pytest.mark.parametrize(
    ("window", "stride", "pad"), [((2, 2), 2, 0), ((3, 2), 1, 1), ((2, 3), 3, 1)]
)
def test_pooling(backend, dtype, window, stride, pad):
    """On negative numbers: zeros of the padding must not win, and the output's size counts the
    padding."""
    x = distinct(2, 3, 7, 6) - 100
    out = [(n + 2 * pad - k) // stride + 1 for n, k in zip((7, 6), window, strict=True)]
    y, chosen = oracles.max_pool2d(
        x, window, (stride, stride), ((pad, pad), (pad, pad)), (1, 1), out
    )
    dy = normal(*y.shape, seed=1)
    layer = scratch.Pooling(*window, stride, pad)
    here = backend.array(x, dtype)
    agree(backend, layer.forward(here), y, here)
    agree(
        backend,
        layer.backward(backend.array(dy, dtype)),
        oracles.max_pool2d_gradient(x.shape, chosen, dy),
        here,
    )


def test_pooling_without_a_stride_goes_one_by_one(backend):
    assert scratch.Pooling(2, 2).forward(backend.array(normal(1, 1, 4, 5))).shape == (1, 1, 3, 4)


@dtypes
def test_relu_and_sigmoid(backend, dtype):
    x, dy = distinct(3, 4, 2), normal(3, 4, 2, seed=1)
    here, dout = backend.array(x, dtype), backend.array(dy, dtype)
    relu, sigmoid = scratch.Relu(), scratch.Sigmoid()
    s = np.array([1 / (1 + math.exp(-v)) for v in x.ravel()]).reshape(x.shape)
    with untouched(backend, here, dout):
        agree(backend, relu.forward(here), [[[max(v, 0) for v in r] for r in p] for p in x], here)
        agree(
            backend,
            relu.backward(dout),
            np.array([d if v > 0 else 0 for v, d in zip(x.flat, dy.flat, strict=True)]).reshape(
                x.shape
            ),
            here,
        )
        agree(backend, sigmoid.forward(here), s, here)
        agree(backend, sigmoid.backward(dout), dy * s * (1 - s), here)
    assert sigmoid.out is not None


def batch_norm(rows, gamma, beta, dy):
    """One feature's numbers, as the paper has it: (y, dx, dgamma, dbeta, mean, variance), number by
    number."""
    n = len(rows)
    mean = sum(rows) / n
    var = sum((v - mean) ** 2 for v in rows) / n
    std = math.sqrt(var + 1e-6)
    xhat = [(v - mean) / std for v in rows]
    dbeta, dgamma = sum(dy), sum(d * h for d, h in zip(dy, xhat, strict=True))
    dx = [gamma / std * (d - dbeta / n - h * dgamma / n) for d, h in zip(dy, xhat, strict=True)]
    return [gamma * h + beta for h in xhat], dx, dgamma, dbeta, mean, var


@with_each_kernel
@dtypes
@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2, 3)])
def test_batch_normalization(backend, dtype, shape):
    """Per feature for (N, D), as in the book; per channel, over all its pixels, for images."""
    gamma, beta = normal(3, seed=1), normal(3, seed=2)
    layer = scratch.BatchNormalization(backend.array(gamma, dtype), backend.array(beta, dtype))
    running_mean, running_var = np.zeros(3), np.zeros(3)
    for step in range(2):
        x, dy = 2 * normal(*shape, seed=3 + step) + 1, normal(*shape, seed=5 + step)
        y, dx, dgamma, dbeta = np.zeros(shape), np.zeros(shape), np.zeros(3), np.zeros(3)
        for c in range(3):
            rows = x[:, c].ravel()
            out, back, dgamma[c], dbeta[c], mean, var = batch_norm(
                rows, gamma[c], beta[c], dy[:, c].ravel()
            )
            y[:, c], dx[:, c] = np.reshape(out, y[:, c].shape), np.reshape(back, y[:, c].shape)
            running_mean[c] = 0.9 * running_mean[c] + 0.1 * mean
            running_var[c] = 0.9 * running_var[c] + 0.1 * var
        here, dout = backend.array(x, dtype), backend.array(dy, dtype)
        with untouched(backend, here, dout):
            agree(backend, layer.forward(here), y, here)
            agree(backend, layer.backward(dout), dx, here)
        agree(backend, layer.dgamma, dgamma, here)
        agree(backend, layer.dbeta, dbeta, here)
        agree(backend, layer.running_mean, running_mean, here)
        agree(backend, layer.running_var, running_var, here)
    by_channel = (3,) + (1,) * (len(shape) - 2)
    mean, var, g, b = (a.reshape(by_channel) for a in (running_mean, running_var, gamma, beta))
    agree(
        backend,
        layer.forward(here, train_flg=False),
        g * (x - mean) / np.sqrt(var + 1e-6) + b,
        here,
    )
    agree(backend, layer.backward(dout), dy * g / np.sqrt(var + 1e-6), here)


def test_batch_normalization_keeps_the_arrays_it_was_given(backend):
    given = [backend.array(np.full(3, v), "float64") for v in (1.0, 0.0, 2.0, 3.0)]
    layer = scratch.BatchNormalization(
        given[0], given[1], running_mean=given[2], running_var=given[3]
    )
    with untouched(backend, *given):
        layer.forward(backend.array(normal(4, 3)))
    assert layer.running_mean is not given[2]


def test_batch_normalization_of_every_pixel_is_refused():
    layer = scratch.BatchNormalization(np.ones(12), np.zeros(12))
    refuses(
        ShapeError,
        "BatchNormalization",
        "shape (3,)",
        call=lambda: layer.forward(normal(5, 3, 2, 2)),
    )
    refuses(
        ArgumentError,
        "both",
        call=lambda: scratch.BatchNormalization(np.ones(3), np.ones(3), running_mean=np.ones(3)),
    )


def test_batch_normalization_of_an_empty_batch_moves_nothing():
    layer = scratch.BatchNormalization(
        np.ones(3), np.zeros(3), running_mean=np.ones(3), running_var=np.full(3, 2.0)
    )
    assert layer.forward(np.zeros((0, 3))).shape == (0, 3)
    assert layer.running_mean.tolist() == [1, 1, 1]
    assert layer.running_var.tolist() == [2, 2, 2]


@dtypes
def test_dropout(backend, dtype):
    x, dy = distinct(20, 5, 8), normal(20, 5, 8, seed=1)
    here, dout = backend.array(x, dtype), backend.array(dy, dtype)
    layer = scratch.Dropout(0.3, seed=4)
    with untouched(backend, here, dout):
        y = backend.host(layer.forward(here))
        dx = backend.host(layer.backward(dout))
        kept = y != 0
        # to the bit, and not divided by 0.7
        assert np.array_equal(y, np.where(kept, backend.host(here), 0))
        assert np.array_equal(dx, np.where(kept, backend.host(dout), 0))
        assert np.array_equal(backend.host(layer.mask), kept)
        assert abs(kept.mean() - 0.7) < 0.06
        assert not np.array_equal(backend.host(layer.forward(here)) != 0, kept)
        agree(backend, layer.forward(here, train_flg=False), 0.7 * x, here)
        agree(backend, layer.backward(dout), 0.7 * dy, here)
    again = scratch.Dropout(0.3, seed=4).forward(distinct(20, 5, 8))
    assert np.array_equal(again != 0, kept)  # the same bits on every backend
    assert not backend.host(scratch.Dropout(1).forward(here)).any()
    assert np.array_equal(backend.host(scratch.Dropout(0).forward(here)), backend.host(here))
    refuses(ArgumentError, "Dropout", "dropout_ratio", call=lambda: scratch.Dropout(1.5))


@with_each_kernel
@dtypes
def test_softmax_with_loss(backend, dtype):
    logits, labels = 3 * normal(4, 3), np.array([2, 0, 1, 1])
    soft = np.abs(normal(4, 3, seed=1))
    soft /= soft.sum(axis=1, keepdims=True)
    x = backend.array(logits, dtype)
    for t in (
        labels,
        labels[:, None],
        labels.astype(np.uint8),
        np.eye(3)[labels],
        np.eye(3, dtype=int)[labels],
        soft,
    ):
        loss, dlogits = oracles.cross_entropy(logits, t[:, 0] if t.shape == (4, 1) else t)
        layer = scratch.SoftmaxWithLoss()
        agree(backend, layer.forward(x, backend.array(t)), loss, x)
        assert layer.loss.shape == ()
        agree(backend, layer.backward(), dlogits, x)
        agree(backend, layer.backward(2), 2 * dlogits, x)
        e = np.exp(logits)
        agree(backend, layer.y, e / e.sum(axis=1, keepdims=True), x)


def test_the_loss_does_not_end_at_16(backend):
    loss = scratch.SoftmaxWithLoss().forward(backend.array([[0.0, 1e4]]), backend.array([0]))
    assert backend.host(loss) == 1e4
    loss = scratch.SoftmaxWithLoss().forward(backend.array([[0.0, 1.0]]), backend.array([2]))
    assert np.isnan(backend.host(loss))
    layer = scratch.SoftmaxWithLoss()
    refuses(
        ShapeError,
        "labels",
        call=lambda: layer.forward(backend.array(normal(4, 3)), backend.array([0, 1, 2])),
    )


def test_no_backward_without_a_forward():
    layers = [
        scratch.Convolution(normal(1, 1, 2, 2), None),
        scratch.Affine(normal(2, 2), None),
        scratch.BatchNormalization(np.ones(2), np.ones(2)),
        scratch.Pooling(2, 2),
        scratch.Relu(),
        scratch.Sigmoid(),
        scratch.Dropout(),
        scratch.SoftmaxWithLoss(),
    ]
    assert scratch.SoftmaxWithLoss().y is None
    for layer in layers:
        refuses(
            StateError,
            type(layer).__name__,
            "forward",
            call=lambda layer=layer: layer.backward(normal(1, 2)),
        )


def test_float32_images_and_float64_weights(backend):
    """What load_mnist and numpy.random.randn make of a pasted network; bytes, too."""
    x = np.arange(32).reshape(2, 1, 4, 4) % 7
    W, b = normal(3, 1, 2, 2), normal(3, seed=1)
    expected = oracles_nd.conv(x, W, b, (1, 1), ((0, 0), (0, 0)), (1, 1), 1)
    for kind in ("float32", "uint8"):
        layer = scratch.Convolution(backend.array(W), backend.array(b))
        images = backend.array(x, kind)
        agree(backend, layer.forward(images), expected, backend.array(W))
        dx = layer.backward(backend.array(np.ones(expected.shape), "float32"))
        assert dx.dtype == (images.dtype if kind == "float32" else layer.W.dtype)
        flat = scratch.Affine(backend.array(normal(16, 3)), backend.array(b))
        assert flat.forward(images).dtype == flat.W.dtype
        assert flat.backward(backend.array(normal(2, 3))).shape == images.shape
        assert scratch.Pooling(2, 2).forward(images).dtype == dx.dtype
    other = portacnn.resolve("array_api_strict" if backend.backend.name == "numpy" else "numpy")
    refuses(ArrayError, "one library", call=lambda: layer.forward(other.asarray(x, "float32")))


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


def test_numerical_gradient(backend):
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


# --- SimpleConvNet --------------------------------------------------------------------------------

SMALL = {
    "input_dim": (1, 10, 10),
    "conv_param": {"filter_num": 3, "filter_size": 3, "pad": 0, "stride": 1},
    "hidden_size": 4,
    "output_size": 5,
}


def test_its_names_and_shapes():
    net = scratch.SimpleConvNet(seed=0)
    assert {key: array.shape for key, array in net.params.items()} == {
        "W1": (30, 1, 5, 5),
        "b1": (30,),
        "W2": (30 * 12 * 12, 100),
        "b2": (100,),
        "W3": (100, 10),
        "b3": (10,),
    }
    assert isinstance(net.layers, OrderedDict)
    assert list(net.layers) == ["Conv1", "Relu1", "Pool1", "Affine1", "Relu2", "Affine2"]
    assert isinstance(net.last_layer, scratch.SoftmaxWithLoss)
    assert net.params["W1"].dtype == np.float32
    assert float(net.params["W1"].std()) == pytest.approx(0.01, rel=0.1)
    assert scratch.SimpleConvNet(dtype="float64").params["W1"].dtype == np.float64
    refuses(ArgumentError, "filters", call=lambda: scratch.SimpleConvNet(conv_param={"filters": 3}))


@pytest.mark.parametrize("pad", [0, 1])
def test_it_is_the_network_of_portacnn(backend, pad):
    """From the same seed: logits, loss, gradients and accuracy."""
    arguments = {
        **SMALL,
        "input_dim": (2, 9, 11),
        "conv_param": {"filter_num": 3, "filter_size": 3, "pad": pad, "stride": 2},
    }
    x, t = normal(7, 2, 9, 11), np.arange(7) % 5
    for dtype in DTYPES:
        ours = scratch.SimpleConvNet(
            **arguments, weight_init_std="he", device=backend.device, seed=3, dtype=dtype
        )
        other = portacnn.SimpleConvNet(
            **arguments, weight_init_std="he", device=backend.device, seed=3, dtype=dtype
        )
        agree(backend, ours.predict(x), backend.host(other.predict(x)), ours.params["W1"])
        assert ours.loss(x, t) == pytest.approx(other.loss(x, t), rel=1e-6)
        assert ours.accuracy(x, t, batch_size=3) == other.accuracy(x, t)
        grads, expected = ours.gradient(x, t), other.gradient(x, t)
        for key, name in (("1", "conv1"), ("2", "fc1"), ("3", "fc2")):
            agree(
                backend, grads[f"b{key}"], backend.host(expected[f"{name}.bias"]), ours.params["W1"]
            )
            agree(
                backend,
                grads[f"W{key}"],
                backend.host(expected[f"{name}.weight"]).T
                if key != "1"
                else backend.host(expected["conv1.weight"]),
                ours.params["W1"],
            )


def test_gradient_check(backend):
    """ch07/gradient_check.py: mean differences of 1e-7 and less, in float32 too."""
    small = {
        **SMALL,
        "input_dim": (1, 6, 6),
        "conv_param": {"filter_num": 2, "filter_size": 3},
        "hidden_size": 2,
    }
    rng = np.random.default_rng(0)
    x, t = rng.random((1, 1, 6, 6)), np.array([1]).reshape(1, 1)
    for dtype, limit in (("float32", 1e-7), ("float64", 1e-8)):
        net = scratch.SimpleConvNet(**small, device=backend.device, seed=1, dtype=dtype)
        before = {key: backend.host(array).tobytes() for key, array in net.params.items()}
        own = dict(net.params)
        numerical, grads = net.numerical_gradient(x, t), net.gradient(x, t)
        assert list(numerical) == list(grads) == list(net.params)
        for key, array in net.params.items():
            assert numerical[key].dtype == array.dtype
            assert np.abs(backend.host(numerical[key]) - backend.host(grads[key])).mean() < limit
        assert any(np.abs(backend.host(g)).max() > 1e-3 for g in grads.values())
        assert all(net.params[key] is own[key] for key in own)
        assert before == {key: backend.host(array).tobytes() for key, array in net.params.items()}


def test_layers_share_the_parameters(backend):
    net = scratch.SimpleConvNet(**SMALL, device=backend.device, seed=0)
    x, t = normal(4, 1, 10, 10), np.arange(4)
    assert net.layers["Conv1"].W is net.params["W1"]
    assert net.layers["Affine2"].b is net.params["b3"]
    loss = net.loss(x, t)
    optimizer = scratch.SGD(lr=0.5)
    own = dict(net.params)
    for _ in range(3):
        optimizer.update(net.params, net.gradient(x, t))
    assert all(net.params[key] is own[key] for key in own)
    assert net.loss(x, t) < loss - 1e-3
    for key in (
        "W1",
        "W2",
        "W3",
    ):  # written into by hand, as the book's optimizers do; strict has no in-place views to share
        net.params[key][...] = backend.xp.zeros_like(net.params[key])
    assert np.allclose(backend.host(net.predict(x)), backend.host(net.params["b3"]))
    net.params["b3"] = backend.array(np.arange(5), "float32")  # or put in its place
    assert np.allclose(backend.host(net.predict(x)), np.arange(5))
    assert net.layers["Affine2"].b is net.params["b3"]


def test_accuracy_counts_the_last_short_batch(backend):
    net = scratch.SimpleConvNet(**SMALL, device=backend.device, seed=0)
    for key in ("W1", "W2", "W3"):
        net.params[key][...] = backend.xp.zeros_like(net.params[key])
    net.params["b3"][...] = backend.array([0, 0, 1, 0, 0], "float32")  # it always says 2
    x = normal(7, 1, 10, 10)
    t = np.array([0, 2, 2, 0, 0, 2, 2])
    for labels in (t, t[:, None], np.eye(5)[t], t.astype(np.uint8)):
        assert net.accuracy(x, labels, batch_size=5) == 4 / 7
        assert net.accuracy(x, labels) == 4 / 7
    assert net.accuracy(backend.array(x), backend.array(t), batch_size=3) == 4 / 7
    refuses(ArgumentError, "image", call=lambda: net.accuracy(x[:0], t[:0]))
    refuses(LabelError, "outside", call=lambda: net.accuracy(x, t + 3))
    refuses(LabelError, "7 labels", call=lambda: net.accuracy(x, t[:6]))
    refuses(ShapeError, "1, 10, 10", call=lambda: net.predict(x[:, :, :9]))


def test_nan_is_never_right(backend):
    """The book's argmax takes NaN for the largest, and all-NaN images for zeros."""
    net, (x, t) = quick_net(backend.device), digits(20)
    t = 0 * t
    x[:12] = np.nan
    rest = net.accuracy(x[12:], t[12:])
    for batch_size in (7, 100):
        assert net.accuracy(x, t, batch_size) == pytest.approx(rest * 8 / 20)
    for wrong in (0, 1.5, "7"):
        refuses(
            ArgumentError,
            "batch_size must be a whole number",
            call=lambda wrong=wrong: net.accuracy(x, t, wrong),
        )


def test_bytes_are_taken_as_they_are(backend):
    net = scratch.SimpleConvNet(**SMALL, device=backend.device, seed=0)
    x = np.random.default_rng(0).integers(0, 256, (3, 1, 10, 10), dtype=np.uint8)
    assert np.array_equal(
        backend.host(net.predict(x)), backend.host(net.predict(x.astype("float32")))
    )


# --- files ----------------------------------------------------------------------------------------


def test_save_and_load(backend, tmp_path):
    net = scratch.SimpleConvNet(**SMALL, device=backend.device, seed=0)
    other = scratch.SimpleConvNet(**SMALL, device=backend.device, seed=1, dtype="float64")
    own = dict(other.params)
    net.save_params(tmp_path / "params.pkl")  # the name that is pasted; safetensors all the same
    other.load_params(tmp_path / "params.pkl")
    assert all(other.params[key] is own[key] for key in own)
    x = normal(2, 1, 10, 10)
    assert np.allclose(backend.host(other.predict(x)), backend.host(net.predict(x)), atol=1e-6)
    loaded = pytest.importorskip("safetensors.numpy").load_file(tmp_path / "params.pkl")
    assert {key: array.shape for key, array in loaded.items()} == {
        key: array.shape for key, array in net.params.items()
    }
    assert np.array_equal(loaded["W2"], backend.host(net.params["W2"]))


def test_default_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = scratch.SimpleConvNet(**SMALL, seed=0)
    net.save_params()
    assert os.listdir() == ["params.safetensors"]
    net.load_params()


def test_converted_from_the_book(tmp_path):
    """As load_params says to do it, in the book's own environment."""
    params = {
        key: normal(*array.shape) for key, array in scratch.SimpleConvNet(**SMALL).params.items()
    }
    pytest.importorskip("safetensors.numpy").save_file(params, tmp_path / "params.safetensors")
    net = scratch.SimpleConvNet(**SMALL, dtype="float64")
    net.load_params(tmp_path / "params.safetensors")
    assert all(np.array_equal(net.params[key], params[key]) for key in params)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


def test_a_pickle_is_refused_unread(tmp_path):
    net = scratch.SimpleConvNet(**SMALL, seed=0)
    before = {key: array.copy() for key, array in net.params.items()}
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "params.pkl").write_bytes(pickle.dumps({"W1": Bomb()}, protocol))
        words = ("params.pkl", "pickle", "can run code", "safetensors.numpy.save_file(params, ...)")
        refuses(ModelFormatError, *words, call=lambda: net.load_params(tmp_path / "params.pkl"))
    (tmp_path / "params.pkl").write_bytes(pickle.dumps({"W1": Bomb()}, 0))
    refuses(
        ModelFormatError,
        "not an intact safetensors file",
        call=lambda: net.load_params(tmp_path / "params.pkl"),
    )
    assert all(np.array_equal(net.params[key], before[key]) for key in before)


def test_parameters_of_another_network(tmp_path):
    net = scratch.SimpleConvNet(**SMALL, seed=0)
    before = {key: array.copy() for key, array in net.params.items()}
    scratch.SimpleConvNet(**{**SMALL, "hidden_size": 7}).save_params(tmp_path / "wide")
    portacnn.SimpleConvNet(**SMALL).save(tmp_path / "model")
    for name in ("wide", "model"):
        refuses(
            ModelFormatError,
            name,
            "expected parameters",
            call=lambda name=name: net.load_params(tmp_path / name),
        )
    assert all(np.array_equal(net.params[key], before[key]) for key in before)


# --- Trainer --------------------------------------------------------------------------------------


def quick_net(device):
    conv = {"filter_num": 4, "filter_size": 5, "pad": 0, "stride": 2}
    return scratch.SimpleConvNet(
        conv_param=conv, hidden_size=20, weight_init_std="he", device=device, seed=0
    )


def test_it_learns(backend):
    """From NumPy arrays, on every backend, and to the same losses as the book's optimizer gives on
    NumPy."""
    (x_train, t_train), (x_test, t_test) = digits(400), digits(203, first=1000)
    arguments = (x_train, t_train, x_test, t_test, 3, 40, "Adam", {"lr": 0.01}, 100, False)
    trainer = scratch.Trainer(quick_net(backend.device), *arguments)
    # brought there once
    for array in (trainer.x_train, trainer.t_train, trainer.x_test, trainer.t_test):
        assert array.device == trainer.network.params["W1"].device
    trainer.train()
    assert len(trainer.train_loss_list) == trainer.current_iter == trainer.max_iter == 30
    assert len(trainer.train_acc_list) == len(trainer.test_acc_list) == trainer.current_epoch == 3
    assert trainer.train_loss_list[-1] < 1.2 < 2 < trainer.train_loss_list[0]
    assert trainer.test_acc_list[-1] == trainer.network.accuracy(x_test[:100], t_test[:100]) > 0.5
    again = scratch.Trainer(quick_net("numpy"), *arguments)
    for _ in range(5):
        again.train_step()
    assert np.allclose(again.train_loss_list, trainer.train_loss_list[:5], rtol=1e-4)


def test_it_reaches_nine_in_ten():
    """On the bundled digits, 4,000 to train on and 1,000 to test on, in four epochs."""
    (x_train, t_train), (x_test, t_test) = portacnn.load_mnist_sample()
    trainer = scratch.Trainer(
        quick_net("numpy"),
        x_train,
        t_train,
        x_test,
        t_test,
        4,
        100,
        "adam",
        {"lr": 0.01},
        verbose=False,
    )
    trainer.train()
    assert trainer.test_acc_list[-1] > 0.9


class TwoLayerNet:
    """A network as the chapters before the seventh build it, from layers and NumPy alone."""

    def __init__(self, inputs, hidden, classes, rng):
        self.params = {
            "W1": 0.05 * rng.standard_normal((inputs, hidden)),
            "b1": np.zeros(hidden),
            "gamma": np.ones(hidden),
            "beta": np.zeros(hidden),
            "W2": 0.05 * rng.standard_normal((hidden, classes)),
            "b2": np.zeros(classes),
        }
        p = self.params
        self.layers = OrderedDict()
        self.layers["Affine1"] = scratch.Affine(p["W1"], p["b1"])
        self.layers["BatchNorm"] = scratch.BatchNormalization(p["gamma"], p["beta"])
        self.layers["Relu"] = scratch.Relu()
        self.layers["Dropout"] = scratch.Dropout(0.1, seed=0)
        self.layers["Affine2"] = scratch.Affine(p["W2"], p["b2"])
        self.last = scratch.SoftmaxWithLoss()

    def predict(self, x, train_flg=False):
        for name, layer in self.layers.items():
            x = (
                layer.forward(x, train_flg)
                if name in ("BatchNorm", "Dropout")
                else layer.forward(x)
            )
        return x

    def loss(self, x, t):
        return self.last.forward(self.predict(x, train_flg=True), t)

    def accuracy(self, x, t):
        return np.mean(np.argmax(self.predict(x), axis=1) == np.argmax(t, axis=1))

    def gradient(self, x, t):
        self.loss(x, t)
        dout = self.last.backward()
        for layer in list(self.layers.values())[::-1]:
            dout = layer.backward(dout)
        first, norm, second = (
            self.layers["Affine1"],
            self.layers["BatchNorm"],
            self.layers["Affine2"],
        )
        return {
            "W1": first.dW,
            "b1": first.db,
            "gamma": norm.dgamma,
            "beta": norm.dbeta,
            "W2": second.dW,
            "b2": second.db,
        }


@pytest.mark.parametrize("optimizer", ["SGD", "momentum", "Nesterov", "AdaGrad", "RMSprop", "Adam"])
def test_it_trains_any_network_of_the_book(optimizer):
    """301 images in batches of 50: the last one is filled up, so that batch normalization never
    sees one image alone."""
    x, t = digits(301)
    x, t = x.reshape(301, 784), np.eye(10)[t]
    net = TwoLayerNet(784, 30, 10, np.random.default_rng(0))
    rate = {"RMSprop": 0.01, "Adam": 0.01}.get(optimizer, 0.1)
    trainer = scratch.Trainer(
        net, x, t, x[:90], t[:90], 10, 50, optimizer, {"lr": rate}, 100, verbose=False
    )
    trainer.train()
    assert trainer.iter_per_epoch == 7
    assert trainer.train_acc_list[-1] > 0.9
    assert trainer.train_loss_list[-1] < trainer.train_loss_list[0]


def test_an_epoch_sees_every_image():
    seen = []

    class Spy:
        def __init__(self):
            self.params = {"w": np.zeros(1)}

        def gradient(self, x, t):
            assert np.array_equal(x[:, 0], t)
            seen.append(t.tolist())
            return {"w": np.zeros(1)}

        def loss(self, x, t):
            return 0.0 if len(seen) < 8 else float("nan")

        def accuracy(self, x, t):
            return len(x)

    x = np.arange(10.0)[:, None]
    trainer = scratch.Trainer(
        Spy(), x, np.arange(10), x, np.arange(10), epochs=2, mini_batch_size=4
    )
    for _ in range(6):
        trainer.train_step()
    for epoch in (seen[:3], seen[3:]):
        numbers = [number for batch in epoch for number in batch]
        assert len(numbers) == 12
        assert set(numbers) == set(range(10))
        assert numbers[10:] == numbers[:2]
    assert seen[:3] != seen[3:]
    assert trainer.train_acc_list == [10, 10]
    trainer.train_step()
    with pytest.raises(NotFiniteError, match="step 8 is nan"):
        trainer.train_step()
    few = scratch.Trainer(
        Spy(), x[:3], np.arange(3), x, np.arange(10), 1, 8, evaluate_sample_num_per_epoch=2
    )
    seen.clear()
    few.train_step()
    assert len(seen[0]) == 8
    assert set(seen[0]) == {0, 1, 2}
    assert few.train_acc_list == [2]


def test_what_it_says(capsys):
    x, t = digits(20)
    scratch.Trainer(quick_net("numpy"), x, t, x, t, 2, 10).train()
    lines = capsys.readouterr().out.splitlines()
    assert [line[:12] for line in lines[:2]] == ["=== epoch:1,", "=== epoch:2,"]
    assert lines[2:] == ["=============== Final Test Accuracy ===============", lines[3]]
    scratch.Trainer(quick_net("numpy"), x, t, x, t, 1, 10, verbose=False).train()
    assert not capsys.readouterr().out


def test_the_trainer_refuses():
    x, t = digits(20)
    net = quick_net("numpy")
    refuses(
        ArgumentError,
        "optimizer",
        "nesterov",
        call=lambda: scratch.Trainer(net, x, t, x, t, optimizer="lion"),
    )
    refuses(
        TypeError,
        "batch_size (called mini_batch_size here)",
        call=lambda: scratch.Trainer(net, x, t, x, t, batch_size=5),
    )
    refuses(
        ArgumentError,
        "mini_batch_size",
        call=lambda: scratch.Trainer(net, x, t, x, t, mini_batch_size=0),
    )
    refuses(LabelError, "train", "19", call=lambda: scratch.Trainer(net, x, t[:19], x, t))
    refuses(LabelError, "test", call=lambda: scratch.Trainer(net, x, t, x[:0], t[:0]))


def test_load_mnist_flattens_as_the_book_does(monkeypatch):
    monkeypatch.setenv("PORTACNN_DATA", str(SAMPLE))
    (x, t), _ = scratch.load_mnist()
    assert (x.shape, x.dtype, t.shape) == ((4000, 784), np.float32, (4000,))
    (x, t), _ = scratch.load_mnist(flatten=False, one_hot_label=True)
    assert (x.shape, t.shape) == ((4000, 1, 28, 28), (4000, 10))
    (x, _), _ = scratch.load_mnist(False, root=SAMPLE)
    assert (x.shape, x.dtype) == ((4000, 784), np.uint8)


# --- pasted scripts -------------------------------------------------------------------------------

# In the manner of the book's scripts, but for the import and for less data. No pyplot: what would
# be drawn is printed.
TRAIN_CONVNET = """
import numpy as np
from portacnn.scratch import load_mnist, SimpleConvNet, Trainer

(x_train, t_train), (x_test, t_test) = load_mnist(flatten=False)
x_train, t_train = x_train[:400], t_train[:400]
x_test, t_test = x_test[:150], t_test[:150]

max_epochs = 2
network = SimpleConvNet(input_dim=(1, 28, 28),
                        conv_param={'filter_num': 6, 'filter_size': 5, 'pad': 0, 'stride': 1},
                        hidden_size=20, output_size=10, weight_init_std=0.01)
trainer = Trainer(network, x_train, t_train, x_test, t_test,
                  epochs=max_epochs, mini_batch_size=100,
                  optimizer='Adam', optimizer_param={'lr': 0.001},
                  evaluate_sample_num_per_epoch=100)
trainer.train()
network.save_params("params.pkl")
network.load_params("params.pkl")
x = np.arange(max_epochs)
assert len(x) == len(trainer.train_acc_list) == len(trainer.test_acc_list)
print("kind", type(network.params['W1']).__module__, network.params['W1'].shape)
"""

GRADIENT_CHECK = """
import numpy as np
from portacnn.scratch import SimpleConvNet

network = SimpleConvNet(input_dim=(1, 10, 10),
                        conv_param={'filter_num': 3, 'filter_size': 3, 'pad': 0, 'stride': 1},
                        hidden_size=5, output_size=10, weight_init_std=0.01)
X = np.random.rand(100).reshape((1, 1, 10, 10))
T = np.array([1]).reshape((1, 1))
grad_num = network.numerical_gradient(X, T)
grad = network.gradient(X, T)
for key, val in grad_num.items():
    difference = np.abs(grad_num[key] - grad[key]).mean()
    assert difference < 1e-6, (key, difference)
"""

TWO_LAYERS = """
import numpy as np
from portacnn.scratch import *

def predict(x):
    return softmax(sigmoid(x @ params['W1'] + params['b1']) @ params['W2'] + params['b2'])

(x_train, t_train), _ = load_mnist(normalize=True, one_hot_label=True)
params = {'W1': 0.01 * np.random.randn(784, 3), 'b1': np.zeros(3),
          'W2': 0.01 * np.random.randn(3, 10), 'b2': np.zeros(10)}
x, t = x_train[:5], t_train[:5]
loss_W = lambda W: cross_entropy_error(predict(x), t)
before = loss_W(None)
for i in range(3):
    grads = {}
    for key in ('b1', 'W2', 'b2'):
        grads[key] = numerical_gradient(loss_W, params[key])
    for key in grads:
        params[key] -= 1.0 * grads[key]
assert loss_W(None) < before - 0.1
print("loss %.3f -> %.3f" % (before, loss_W(None)))
"""

DEEP = """
import numpy as np
from portacnn.scratch import *

class DeepNet:
    def __init__(self):
        he = np.sqrt(2.0 / np.array([9, 36, 4 * 8 * 8, 20]))
        self.params = {}
        for i, shape in enumerate([(4, 1, 3, 3), (4, 4, 3, 3), (4 * 8 * 8, 20), (20, 10)]):
            self.params['W' + str(i + 1)] = he[i] * np.random.randn(*shape)
            self.params['b' + str(i + 1)] = np.zeros(shape[0] if i < 2 else shape[1])
        p = self.params
        self.layers = [Convolution(p['W1'], p['b1'], 1, 1), Relu(),
                       Pooling(pool_h=2, pool_w=2, stride=2),
                       Convolution(p['W2'], p['b2'], 1, 2), Relu(),
                       Pooling(pool_h=2, pool_w=2, stride=2),
                       Affine(p['W3'], p['b3']), Relu(), Dropout(0.1),
                       Affine(p['W4'], p['b4']), Dropout(0.1)]
        self.last_layer = SoftmaxWithLoss()

    def predict(self, x, train_flg=False):
        for layer in self.layers:
            x = layer.forward(x, train_flg) if isinstance(layer, Dropout) else layer.forward(x)
        return x

    def loss(self, x, t):
        return self.last_layer.forward(self.predict(x, train_flg=True), t)

    def accuracy(self, x, t):
        return np.sum(np.argmax(self.predict(x), axis=1) == t) / x.shape[0]

    def gradient(self, x, t):
        self.loss(x, t)
        dout = self.last_layer.backward(1)
        for layer in reversed(self.layers):
            dout = layer.backward(dout)
        grads = {}
        for i, place in enumerate((0, 3, 6, 9)):
            grads['W' + str(i + 1)] = self.layers[place].dW
            grads['b' + str(i + 1)] = self.layers[place].db
        return grads

(x_train, t_train), (x_test, t_test) = load_mnist(flatten=False)
trainer = Trainer(DeepNet(), x_train[:1000], t_train[:1000], x_test[:200], t_test[:200],
                  epochs=3, mini_batch_size=50, optimizer='Adam',
                  optimizer_param={'lr': 0.005}, verbose=False)
trainer.train()
assert trainer.test_acc_list[-1] > 0.7, trainer.test_acc_list
"""


def paste(code, tmp_path, **environment):
    (tmp_path / "pasted.py").write_text(code, encoding="utf-8")
    variables = {**os.environ, "PORTACNN_DATA": str(SAMPLE), "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, "-W", "error", "pasted.py"],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "library", ["numpy", pytest.param("torch", marks=needs("torch")), "array_api_strict"]
)
def test_train_convnet_pasted(tmp_path, library):
    """The library is the variable's, and nothing else is changed."""
    output = paste(TRAIN_CONVNET, tmp_path, PORTACNN_BACKEND=library)
    assert "=== epoch:2, train acc:" in output
    assert f"kind {library}" in output
    assert (tmp_path / "params.pkl").read_bytes()[8:9] == b"{"


@pytest.mark.parametrize(
    "code", [GRADIENT_CHECK, TWO_LAYERS, DEEP], ids=["gradient_check", "two_layers", "deep"]
)
def test_pasted(tmp_path, code):
    paste(code, tmp_path)


def test_the_sample_has_the_form_that_the_book_expects():
    """The loader that load_mnist's own error recommends."""
    names = {}
    exec("from portacnn.scratch import *", names)
    (x, t), (v, _) = names["load_mnist_sample"]()
    assert (x.shape, v.shape, t.shape) == ((4000, 784), (1000, 784), (4000,))
    np.testing.assert_array_equal(
        names["load_mnist_sample"](flatten=False)[0][0].reshape(4000, 784), x
    )
    assert names["load_mnist_sample"](one_hot_label=True)[1][1].shape == (1000, 10)


# --- the names themselves -------------------------------------------------------------------------


def test_names():
    assert list(scratch.__all__) == sorted(
        scratch.__all__, key=lambda name: (not name.isupper(), name)
    )
    for name in scratch.__all__:
        thing = getattr(scratch, name)
        assert inspect.getdoc(thing)
        if inspect.isclass(thing) and not issubclass(thing, optim.Optimizer):
            for method, function in vars(thing).items():
                assert method.startswith("_") or not callable(function) or function.__doc__, (
                    f"{name}.{method}"
                )


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("im2col", "input_data filter_h filter_w stride pad"),
        ("col2im", "col input_shape filter_h filter_w stride pad"),
        ("Convolution", "W b stride pad"),
        ("Pooling", "pool_h pool_w stride pad"),
        ("Affine", "W b"),
        ("Dropout", "dropout_ratio"),
        ("BatchNormalization", "gamma beta momentum running_mean running_var"),
        ("SimpleConvNet", "input_dim conv_param hidden_size output_size weight_init_std"),
        ("SGD", "lr"),
        ("Momentum", "lr momentum"),
        ("Nesterov", "lr momentum"),
        ("AdaGrad", "lr"),
        ("RMSprop", "lr decay_rate"),
        ("Adam", "lr beta1 beta2"),
        (
            "Trainer",
            "network x_train t_train x_test t_test epochs mini_batch_size optimizer "
            "optimizer_param "
            "evaluate_sample_num_per_epoch verbose",
        ),
        ("load_mnist", "normalize flatten one_hot_label"),
        ("numerical_gradient", "f x"),
        ("cross_entropy_error", "y t"),
    ],
)
def test_signatures_begin_as_the_book_s(name, arguments):
    parameters = inspect.signature(getattr(scratch, name)).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional[: len(arguments.split())] == arguments.split()
