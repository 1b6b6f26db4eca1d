"""Pooling in one and three dimensions, adaptive and global pooling: by loops, numerically, and
against PyTorch."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn import ops
from portacnn.errors import ArgumentError, ShapeError
from support import oracles_nd
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


def face(kind: str, axes: int) -> tuple[Any, Any]:
    return getattr(ops, f"{kind}{axes}d"), getattr(ops, f"{kind}{axes}d_backward")


# x shape, OUT, options, and (kernel, stride, pads, dilation) written out
CASES = {
    "1d": ((2, 2, 7), (3,), {"kernel_size": 2}, ((2,), (2,), ((0, 0),), (1,))),
    "1d, overlapping, padded": (
        (2, 2, 6),
        (4,),
        {"kernel_size": 4, "stride": 1, "padding": ((0, 1),)},
        ((4,), (1,), ((0, 1),), (1,)),
    ),
    "1d, hanging over": (
        (1, 2, 6),
        (3,),
        {"kernel_size": 3, "stride": 2, "ceil_mode": True},
        ((3,), (2,), ((0, 0),), (1,)),
    ),
    "1d, larger than the input": (
        (1, 1, 2),
        (1,),
        {"kernel_size": 3, "ceil_mode": True},
        ((3,), (3,), ((0, 0),), (1,)),
    ),
    "2d, padded beyond half": (
        (1, 1, 3, 4),
        (5, 6),
        {"kernel_size": 3, "stride": 1, "padding": ((2, 2), (2, 2))},
        ((3, 3), (1, 1), ((2, 2), (2, 2)), (1, 1)),
    ),
    "3d": (
        (2, 2, 4, 3, 5),
        (2, 1, 2),
        {"kernel_size": 2},
        ((2,) * 3, (2,) * 3, ((0, 0),) * 3, (1,) * 3),
    ),
    "3d, padded": (
        (1, 2, 3, 4, 3),
        (2, 4, 2),
        {"kernel_size": (2, 3, 3), "stride": (2, 1, 2), "padding": (1, 1, 1)},
        ((2, 3, 3), (2, 1, 2), ((1, 1),) * 3, (1,) * 3),
    ),
}
DILATED = {
    "1d, dilated": (
        (2, 1, 8),
        (3,),
        {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2},
        ((3,), (2,), ((1, 1),), (2,)),
    ),
    "3d, dilated": (
        (1, 1, 5, 4, 3),
        (3, 3, 3),
        {"kernel_size": (2, 2, 1), "stride": 1, "dilation": (2, 1, 1)},
        ((2, 2, 1), (1, 1, 1), ((0, 0),) * 3, (2, 1, 1)),
    ),
}
MAXIMA = {**CASES, **DILATED}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MAXIMA)
@with_each_kernel
def test_max_pool(backend: Here, name: str, dtype: str):
    shape, out, options, plain = MAXIMA[name]
    pool, pool_backward = face("max_pool", len(out))
    ties = np.random.default_rng(0).integers(-1, 2, shape).astype(float)
    low = np.where(ties > -1, ties, -np.inf)
    for host in (distinct(*shape), ties, low, np.full(shape, -np.inf)):
        expected, chosen = oracles_nd.max_pool(host, out, *plain)
        dy_host = normal(*expected.shape, seed=1)
        for layout in ("packed", "batch_last", "stepped"):
            x, dy = (
                laid_out(backend, host, dtype, layout),
                laid_out(backend, dy_host, dtype, layout),
            )
            with untouched(backend, x, dy):
                y, cache = pool(x, **options)
                dx = pool_backward(dy, cache)
            np.testing.assert_array_equal(backend.host(y), expected.astype(dtype))
            agree(backend, dx, oracles_nd.routed(shape, chosen, dy_host), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("name", CASES)
@with_each_kernel
def test_avg_pool(backend: Here, name: str, include: bool, dtype: str):
    shape, out, options, (kernel, stride, pads, _) = CASES[name]
    pool, pool_backward = face("avg_pool", len(out))
    host = normal(*shape)
    for divisor in (None, 5):
        expected, shares = oracles_nd.avg_pool(host, out, kernel, stride, pads, include, divisor)
        dy_host = normal(*expected.shape, seed=1)
        for layout in LAYOUTS:
            x, dy = (
                laid_out(backend, host, dtype, layout),
                laid_out(backend, dy_host, dtype, layout),
            )
            with untouched(backend, x, dy):
                y, cache = pool(x, **options, count_include_pad=include, divisor_override=divisor)
                dx = pool_backward(dy, cache)
            agree(backend, y, expected, x)
            agree(backend, dx, oracles_nd.shared(shape, shares, dy_host), x)


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
            agree(backend, avg(x, out, keep=False)[0], oracles_nd.adaptive_avg_pool(host, out), x)
    ties = np.random.default_rng(0).integers(-1, 2, shape).astype(float)
    for values in (host, ties, np.full(shape, -np.inf)):
        expected, chosen = oracles_nd.adaptive_max_pool(values, out)
        x, dy = backend.array(values, dtype), normal(*expected.shape, seed=1)
        y, cache = maximum(x, out)
        np.testing.assert_array_equal(backend.host(y), expected.astype(dtype))
        agree(
            backend,
            max_backward(backend.array(dy, dtype), cache),
            oracles_nd.routed(shape, chosen, dy),
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
def test_adaptive_against_pytorch(backend: Here, sizes: list, layouts: tuple):
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


@with_each_kernel
def test_empty_batch(backend: Here):
    x = backend.array(np.zeros((0, 2, 4)))
    for op, backward, arguments in [
        (ops.max_pool1d, ops.max_pool1d_backward, (2,)),
        (ops.avg_pool1d, ops.avg_pool1d_backward, (2,)),
        (ops.adaptive_avg_pool1d, ops.adaptive_avg_pool1d_backward, (2,)),
        (ops.adaptive_max_pool1d, ops.adaptive_max_pool1d_backward, (2,)),
    ]:
        y, cache = op(x, *arguments)
        assert tuple(y.shape) == (0, 2, 2)
        assert tuple(backward(y, cache).shape) == (0, 2, 4)


def test_nothing_kept(backend: Here):
    x = backend.array(normal(1, 1, 4))
    for name in ("max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d"):
        assert getattr(ops, name)(x, 2, keep=False)[1] is None


def test_errors(backend: Here):
    x = backend.array(normal(1, 2, 5))
    refuses(
        ShapeError,
        "max_pool1d: ",
        "length",
        "got 4 axes",
        call=lambda: ops.max_pool1d(x[None, ...], 2),
    )
    refuses(ShapeError, "avg_pool3d: ", "depth", "got 3 axes", call=lambda: ops.avg_pool3d(x, 2))
    refuses(ShapeError, "max_pool1d: ", "kernel 6", "input 5", call=lambda: ops.max_pool1d(x, 6))
    refuses(
        ShapeError,
        "kernel 7",
        "input 5",
        call=lambda: ops.max_pool1d(x, 7, stride=2, ceil_mode=True),
    )
    refuses(
        ArgumentError,
        "max_pool1d: ",
        "half of the kernel 2",
        call=lambda: ops.max_pool1d(x, 2, padding=2),
    )
    four = {"kernel_size": 2, "padding": ((0, 2),)}
    refuses(ArgumentError, "half of the kernel 2", call=lambda: ops.max_pool1d(x[:, :, :4], **four))
    two = backend.array(normal(1, 1, 2))
    blind = {"kernel_size": 2, "dilation": 3, "padding": 1}
    refuses(
        ArgumentError,
        "max_pool1d: ",
        "contain only padding",
        call=lambda: ops.max_pool1d(two, **blind),
    )
    for divisor in (0, 1.5):
        call = lambda divisor=divisor: ops.avg_pool1d(x, 2, divisor_override=divisor)  # noqa: E731
        refuses(ArgumentError, "avg_pool1d: ", "divisor_override", call=call)
    refuses(
        ArgumentError,
        "adaptive_avg_pool1d: ",
        "output_size",
        call=lambda: ops.adaptive_avg_pool1d(x, 0),
    )
    refuses(
        ArgumentError, "output_size", "1 of them", call=lambda: ops.adaptive_max_pool1d(x, (2, 2))
    )
    refuses(ShapeError, "at least one cell", call=lambda: ops.adaptive_avg_pool1d(x[:, :, :0], 2))
    refuses(ShapeError, "global_avg_pool: ", "*S", call=lambda: ops.global_avg_pool(x[:, :, 0]))
    refuses_integers_and_lists(backend, "global_max_pool: ", ops.global_max_pool, normal(1, 1, 2))
