"""Adaptive and global pooling in one to three dimensions: by loops, numerically, by PyTorch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn import ops
from support import oracles
from support.checks import (
    DTYPES,
    LAYOUTS,
    agree,
    distinct,
    face,
    gradient_agrees,
    laid_out,
    normal,
    untouched,
    with_each_kernel,
)
from support.matrix import Here, needs

ADAPTIVE = {
    "1d": ((2, 2, 7), (3,)),
    "1d, more outputs than inputs": ((1, 2, 3), (5,)),
    "2d": ((2, 2, 5, 6), (2, 4)),
    "2d, one pixel": ((1, 2, 1, 1), (2, 1)),
    "3d": ((1, 2, 4, 3, 5), (3, 2, 5)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ADAPTIVE)
@with_each_kernel
def test_adaptive_values_and_maxima(backend: Here, name: str, dtype: str):
    shape, out = ADAPTIVE[name]
    (avg, _), (maximum, max_backward) = (
        face(f"adaptive_{kind}_pool", len(out)) for kind in ("avg", "max")
    )
    host = normal(*shape)
    for layout in LAYOUTS:
        x = laid_out(backend, host, dtype, layout)
        with untouched(backend, x):
            agree(backend, avg(x, out, keep=False)[0], oracles.adaptive_avg_pool(host, out), x)
    ties = np.random.default_rng(0).integers(-1, 2, shape).astype(float)
    for values in (host, ties, np.full(shape, -np.inf)):
        expected, chosen = oracles.adaptive_max_pool(values, out)
        x, dy = backend.array(values, dtype), normal(*expected.shape, seed=1)
        y, cache = maximum(x, out)
        np.testing.assert_array_equal(backend.host(y), expected.astype(dtype))
        agree(
            backend,
            max_backward(backend.array(dy, dtype), cache),
            oracles.routed(shape, chosen, dy),
            x,
        )


@pytest.mark.parametrize("name", ADAPTIVE)
@with_each_kernel
def test_numerical_gradient_of_adaptive_means(backend: Here, name: str):
    shape, out = ADAPTIVE[name]
    avg, avg_backward = face("adaptive_avg_pool", len(out))
    host = normal(*shape)
    y, cache = avg(backend.array(host), out)
    dy = backend.array(normal(*y.shape, seed=1))
    with untouched(backend, dy):
        gradient = avg_backward(dy, cache)
    gradient_agrees(
        backend, gradient, lambda a: backend.xp.sum(avg(a, out, keep=False)[0] * dy), host
    )


@needs("torch")
@settings(max_examples=15)
@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 7) | st.none()), min_size=2, max_size=3
    ),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
)
@with_each_kernel
def test_adaptive_pooling_agrees_with_pytorch(backend: Here, sizes: list, layouts: tuple):
    import torch

    size, out = zip(*sizes, strict=True)
    host = distinct(2, 1, *size)
    for kind in ("adaptive_avg_pool", "adaptive_max_pool"):
        leaf = torch.tensor(host, requires_grad=True)
        expected = getattr(torch.nn.functional, f"{kind}{len(size)}d")(leaf, out)
        dy = normal(*expected.shape, seed=1)
        expected.backward(torch.tensor(dy))
        pool, pool_backward = face(kind, len(size))
        x = laid_out(backend, host, layout=layouts[0])
        y, cache = pool(x, out)
        agree(backend, y, expected.detach().numpy(), x)
        agree(
            backend,
            pool_backward(laid_out(backend, dy, layout=layouts[1]), cache),
            leaf.grad.numpy(),
            x,
        )


@pytest.mark.parametrize("axes", [1, 2, 3, 4])
@with_each_kernel
def test_global_pools(backend: Here, axes: int):
    shape = (2, 3, *(3, 2, 4, 2)[:axes])
    host = distinct(*shape)
    x, flat = backend.array(host), host.reshape(2, 3, -1)
    dy_host = normal(2, 3, *(1,) * axes)
    dy = backend.array(dy_host)
    y, cache = ops.global_avg_pool(x)
    agree(backend, y, flat.mean(axis=2).reshape(dy_host.shape), x)
    agree(
        backend,
        ops.global_avg_pool_backward(dy, cache),
        np.broadcast_to(dy_host / flat.shape[2], shape),
        x,
    )
    y, cache = ops.global_max_pool(x)
    agree(backend, y, flat.max(axis=2).reshape(dy_host.shape), x)
    expected = np.where(
        host == host.max(axis=tuple(range(2, axes + 2)), keepdims=True), dy_host, 0.0
    )
    agree(backend, ops.global_max_pool_backward(dy, cache), expected, x)


@with_each_kernel
def test_the_mean_of_a_large_image_keeps_its_digits(backend: Here):
    host = (np.random.default_rng(0).random((1, 1, 512, 512)) + 100).astype("float32")
    for layout in ("packed", "batch_last"):
        x = laid_out(backend, host, layout=layout)
        assert (
            abs(
                float(backend.host(ops.global_avg_pool(x, keep=False)[0])[0, 0, 0, 0])
                / host.mean(dtype="float64")
                - 1
            )
            < 1e-6
        )


@with_each_kernel
def test_a_constant_stays_what_it_is(backend: Here):
    x = backend.array(np.full((1, 1, 5, 7), 3.25), "float32")
    for y in (
        ops.avg_pool2d(x, 3, padding=1, count_include_pad=False)[0],
        ops.adaptive_avg_pool2d(x, (3, 4))[0],
    ):
        assert np.allclose(backend.host(y), 3.25, rtol=2e-7)
