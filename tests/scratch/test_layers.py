"""The tutorials' layers against their definitions, written out with loops in float64."""

import math

import numpy as np
import pytest

import portacnn
from portacnn import scratch
from portacnn.errors import (
    ArgumentError,
    ArrayError,
    ShapeError,
    StateError,
)
from support import oracles
from support.checks import DTYPES, agree, distinct, normal, refuses, untouched, with_each_kernel

dtypes = pytest.mark.parametrize("dtype", DTYPES)


@with_each_kernel
@dtypes
@pytest.mark.parametrize(("stride", "pad"), [(1, 0), (2, 1), (3, 2)])
def test_convolution(backend, dtype, stride, pad):
    x, W, b = normal(2, 3, 7, 6), normal(4, 3, 3, 2, seed=1), normal(4, seed=2)
    here = [backend.array(a, dtype) for a in (x, W, b)]
    layer = scratch.Convolution(here[1], here[2], stride, pad)
    pads = ((pad, pad), (pad, pad))
    expected = oracles.conv(x, W, b, (stride, stride), pads, (1, 1), 1)
    dy = normal(*expected.shape, seed=3)
    dout = backend.array(dy, dtype)
    with untouched(backend, *here, dout):
        agree(backend, layer.forward(here[0]), expected, here[0])
        dx = layer.backward(dout)
    for got, wanted in zip(
        (dx, layer.dW, layer.db),
        oracles.conv_gradients(x, W, dy, (stride, stride), pads, (1, 1), 1),
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
    y, chosen = oracles.max_pool(x, out, window, (stride, stride), ((pad, pad), (pad, pad)), (1, 1))
    dy = normal(*y.shape, seed=1)
    layer = scratch.Pooling(*window, stride, pad)
    here = backend.array(x, dtype)
    agree(backend, layer.forward(here), y, here)
    agree(
        backend,
        layer.backward(backend.array(dy, dtype)),
        oracles.routed(x.shape, chosen, dy),
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
    expected = oracles.conv(x, W, b, (1, 1), ((0, 0), (0, 0)), (1, 1), 1)
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
