"""Batch norm whose batch is spread over several processes, which are threads here. The oracle is
NumPy in float64, over the whole batch."""

import numpy as np
import pytest

from portacnn import ops
from portacnn.ops.fused import batch_norm_relu, batch_norm_relu_backward
from portacnn.ops.statistics import is_shared, statistics_over
from support.matrix import Here, backends
from support.ranks import on_ranks

pytestmark = backends("numpy", "strict-device1", "torch", "torch-cuda", "cupy", "cupy-emulated")
PARTS = [slice(0, 4), slice(4, 5), slice(5, 11)]


def oracle(x, weight, bias, dy, eps, relu):
    """y, dx, dweight, dbias, mean and unbiased variance."""
    axes = (0, *range(2, x.ndim))
    along = (1, -1, *(1,) * (x.ndim - 2))
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    xhat = (x - mean) / np.sqrt(var + eps)
    y = weight.reshape(along) * xhat + bias.reshape(along)
    if relu:
        dy = dy * (y > 0)
        y = np.maximum(y, 0)
    g = dy * weight.reshape(along)
    inner = g - g.mean(axes, keepdims=True) - xhat * (g * xhat).mean(axes, keepdims=True)
    count = x.size // x.shape[1]
    unbiased = var.ravel() * count / (count - 1)
    dx = inner / np.sqrt(var + eps)
    return y, dx, (dy * xhat).sum(axes), dy.sum(axes), mean.ravel(), unbiased


def on_three(here: Here, x, weight, bias, dy, dtype, relu, eps=1e-5):
    """The same, from three processes with a part of the batch each."""
    op, backward = (
        (batch_norm_relu, batch_norm_relu_backward)
        if relu
        else (ops.batch_norm, ops.batch_norm_backward)
    )

    def work(communicator):
        part = PARTS[communicator.rank]
        with here.backend.active():
            mean, var = here.array(np.zeros(x.shape[1]), dtype), here.array(np.ones(3), dtype)
            given = [here.array(each, dtype) for each in (x[part], dy[part], weight, bias)]
            with statistics_over(communicator.all_reduce):
                assert is_shared()
                y, cache = op(given[0], mean, var, *given[2:], training=True, momentum=1.0, eps=eps)
                grads = backward(given[1], cache)
            assert not is_shared()
            return [here.host(each).astype("float64") for each in (y, *grads, mean, var)]

    y, dx, dweight, dbias, mean, var = zip(*on_ranks(3, work), strict=True)
    for same in (mean, var):
        np.testing.assert_array_equal(same[0], same[1])
        np.testing.assert_array_equal(same[0], same[2])
    return np.concatenate(y), np.concatenate(dx), sum(dweight), sum(dbias), mean[0], var[0]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("dtype", "shape"), [("float64", (11, 3, 4, 2)), ("float32", (11, 3))])
def test_it_is_the_norm_of_the_whole_batch(backend: Here, dtype, shape, relu):
    """The second process has one value per channel where there are no pixels."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(5.0, 2.0, shape), rng.normal(size=shape)
    weight, bias = rng.normal(size=3), rng.normal(size=3)
    tolerance = {"float64": 1e-12, "float32": 2e-5}[dtype]
    if dtype == "float32":
        x, dy, weight, bias = (np.float64(np.float32(each)) for each in (x, dy, weight, bias))
    expected = oracle(x, weight, bias, dy, 1e-5, relu)
    found = on_three(backend, x, weight, bias, dy, dtype, relu)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def test_a_large_mean_costs_no_digits(backend: Here):
    """A mean of 10^5 with a deviation of 1, in float32; sums of squares would have no digit left.
    And a constant, of which each mean is the same: exactly the bias."""
    rng = np.random.default_rng(0)
    x = np.float64(np.float32(1e5 + rng.normal(size=(11, 3, 5))))
    x[:, 2] = np.float32(0.1) * 1e5
    dy = rng.normal(size=x.shape)
    ones, zeros = np.ones(3), np.zeros(3)
    expected = oracle(x, ones, zeros, dy, 1e-5, False)
    y, dx, _, _, _, var = on_three(backend, x, ones, zeros, dy, "float32", False)
    np.testing.assert_allclose(y[:, :2], expected[0][:, :2], atol=1e-4)
    np.testing.assert_allclose(dx[:, :2], expected[1][:, :2], atol=1e-4)
    np.testing.assert_allclose(var[:2], expected[5][:2], rtol=1e-4)
    assert (y[:, 2] == 0).all()
    assert var[2] == 0
