"""The CUDA kernels of batch norm, run on the host, against the textbook's chain rule in float64."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn.backends.cupy import norm as cupy_norm
from portacnn.backends.cupy.plan import PROCESSORS
from support.cuda_rig import Rig, close, needs_compiler, orders, rigged
from support.drawing import arguments_of

pytestmark = needs_compiler

dtypes = st.sampled_from(["float32", "float64"])


def per_channel(host: np.ndarray) -> np.ndarray:
    """(N, C, ...) -> float64 (C, P)."""
    return np.moveaxis(np.asarray(host, "float64"), 1, 0).reshape(host.shape[1], -1)


def wanted(
    x: np.ndarray,
    dy: np.ndarray,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    relu: bool,
    eps: float,
) -> tuple:
    """y, dx (N, C, ...), dweight, dbias, and for each the absolute values that it is a sum of. No
    mean and var: x's own."""
    channels, shape = x.shape[1], np.moveaxis(x, 1, 0).shape
    rows, grads = per_channel(x), per_channel(dy)
    weight = np.ones(channels) if weight is None else np.asarray(weight, "float64")
    bias = np.zeros(channels) if bias is None else np.asarray(bias, "float64")
    terms = [np.empty(array.shape) for array in (rows, rows, weight, weight)]
    y, dx, dweight, dbias = (
        np.empty_like(rows),
        np.empty_like(rows),
        np.empty(channels),
        np.empty(channels),
    )
    for c in range(channels):
        m = sum(rows[c]) / rows.shape[1] if mean is None else mean[c]
        away = rows[c] - m
        v = sum(away**2) / len(away) if var is None else var[c]
        root = (v + eps) ** 0.5
        y[c] = weight[c] * (away / root) + bias[c]
        terms[0][c] = np.abs(weight[c] * (away / root)) + abs(bias[c])
        g = np.where(y[c] > 0, grads[c], 0) if relu else grads[c]
        dweight[c], dbias[c] = (g * away / root).sum(), g.sum()
        terms[2][c], terms[3][c] = np.abs(g * away / root).sum(), np.abs(g).sum()
        dxhat = weight[c] * g
        dx[c] = dxhat / root
        terms[1][c] = np.abs(dx[c]).max()
        if mean is None:
            dvar = (dxhat * away).sum() * -0.5 * root**-3
            dmean = -dxhat.sum() / root + dvar * -2 * away.mean()
            dx[c] += dvar * 2 * away / len(away) + dmean / len(away)
    if relu:
        y = np.maximum(y, 0)
    y, dx = (np.moveaxis(array.reshape(shape), 0, 1) for array in (y, dx))
    return y, dx, dweight, dbias, *terms


def laid(rig: Rig, host: np.ndarray, dtype: str, last: bool) -> np.ndarray:
    return rig.array(host, dtype, (*range(1, host.ndim), 0) if last else None)


def written(rig: Rig, host: np.ndarray, dtype: str) -> np.ndarray:
    array = rig.empty(host.shape, dtype)
    array[...] = host
    return array


@settings(max_examples=20)
@given(
    arguments_of("batch_norm", "small") | arguments_of("batch_norm at rest", "small"),
    st.tuples(*[st.booleans()] * 3),
    dtypes,
    orders,
    st.integers(0, 999),
)
def test_batch_norm(arguments: dict, flags: tuple, dtype: str, order: str, seed: int):
    (n, c, *size), training = arguments["x"].shape, arguments["training"]
    relu, x_last, dy_last = flags
    with_weight, with_bias, with_running = (
        arguments[name] is not None for name in ("weight", "bias", "running_mean")
    )
    draw = np.random.default_rng(seed)
    shape = (n, c, *size)
    with rigged(order, seed) as rig:
        x, dy = (
            laid(rig, draw.normal(1, 3, shape), dtype, x_last),
            laid(rig, draw.normal(size=shape), dtype, dy_last),
        )
        weight = rig.array(draw.normal(size=c), dtype) if with_weight else None
        bias = rig.array(draw.normal(size=c), dtype) if with_bias else None
        before = draw.normal(size=c), draw.uniform(0.5, 2, c)
        running = (
            [written(rig, b, dtype) for b in before]
            if with_running or not training
            else [None, None]
        )
        momentum: Any = 0.3 if seed % 2 else rig.array(np.array(0.3), dtype)
        op = cupy_norm.batch_norm_relu if relu else cupy_norm.batch_norm
        options: dict[str, Any] = {"training": training, "momentum": momentum, "eps": 1e-4}
        y, saved = op(x, *running, weight, bias, **options)
        given_statistics = (None, None) if training else before
        y64, dx64, dweight64, dbias64, *terms = wanted(
            x, dy, weight, bias, *given_statistics, relu, 1e-4
        )
        close(y, y64, dtype, terms[0])
        if running[0] is not None:
            rows = per_channel(x)
            own = (rows.mean(1), rows.var(1, ddof=1)) if training else before
            for got, b, new in zip(running, before, own, strict=True):
                close(got, (1 - 0.3) * b + 0.3 * new, dtype, np.abs(b) + np.abs(rows).max())
        expected = ["norm_partials", "norm_forward"] if training else ["norm_forward"]
        for need_dx, frozen in ((True, False), (False, False), (True, True)):
            dx, dweight, dbias = cupy_norm.batch_norm_backward(
                dy, saved, need_dx=need_dx, need_dweight=not frozen, need_dbias=not frozen
            )
            assert (dx is None) == (not need_dx)
            if dx is not None:
                close(dx, dx64, dtype, terms[1])
            affine = (
                (dweight, dweight64, with_weight and not frozen, terms[2]),
                (dbias, dbias64, with_bias and not frozen, terms[3]),
            )
            summed = (training and need_dx) or (not frozen and (with_weight or with_bias))
            expected += [*(["norm_sums"] if summed else []), "norm_backward"]
            for got, want, there, sums in affine:
                if there:
                    close(got, want, dtype, sums)
                else:
                    assert got is None
        assert [name for name, *_ in rig.launches] == expected
        unmoved = [None if r is None else r.copy() for r in running]
        again, nothing = op(x, *unmoved, weight, bias, **options, keep=False)
        assert nothing is None
        if training or not with_running:
            np.testing.assert_array_equal(again, y)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
def test_many_parts(dtype: str, order: str, monkeypatch: pytest.MonkeyPatch):
    """Of 5 channels of 1,150 numbers, in 18 parts each, whose last is a shorter one."""
    monkeypatch.setattr(cupy_norm, "_LEAST", 32)
    draw = np.random.default_rng(2)
    shape = (23, 5, 10, 5)
    with rigged(order) as rig:
        x, dy = (
            rig.array(draw.normal(1, 3, shape), dtype),
            rig.array(draw.normal(size=shape), dtype),
        )
        weight, bias = rig.array(draw.normal(size=5), dtype), rig.array(draw.normal(size=5), dtype)
        y, saved = cupy_norm.batch_norm_relu(x, None, None, weight, bias, training=True)
        assert rig.launches[0][1] == (18, 5)
        dx, dweight, dbias = cupy_norm.batch_norm_backward(dy, saved)
        y64, dx64, dweight64, dbias64, *terms = wanted(x, dy, weight, bias, None, None, True, 1e-5)
        close(y, y64, dtype, terms[0])
        close(dx, dx64, dtype, terms[1])
        close(dweight, dweight64, dtype, terms[2])
        close(dbias, dbias64, dtype, terms[3])


def test_the_same_bits_in_any_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cupy_norm, "_LEAST", 64)
    draw = np.random.default_rng(1)
    host, above = draw.normal(2, 3, (8, 3, 9, 9)), draw.normal(size=(8, 3, 9, 9))
    results = []
    for order in ("forward", "reverse", "shuffled"):
        with rigged(order, 3) as rig:
            x, dy = rig.array(host, "float32"), rig.array(above, "float32")
            running = [written(rig, np.ones(3), "float32") for _ in range(2)]
            y, saved = cupy_norm.batch_norm_relu(x, *running, None, None, training=True)
            results.append(
                [y, *running, saved.statistics, cupy_norm.batch_norm_backward(dy, saved)[0]]
            )
    for one, *others in zip(*results, strict=True):
        for other in others:
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("first", [0.0, 1e6])
def test_a_mean_beside_which_the_spread_is_small(first: float):
    """Numbers near 4096.3, whose float32 neighbours are 1/2048 apart, and a spread of 1/100; or one
    that lies far away."""
    draw = np.random.default_rng(0)
    host = (4096.3 + draw.normal(0, 0.01, (16, 2, 20, 20))).astype("float32")
    host[0, :, 0, 0] += np.float32(first)
    with rigged() as rig:
        x, dy = rig.array(host, "float32"), rig.array(draw.uniform(0.5, 1, host.shape), "float32")
        weight = rig.array(np.array([1.0, -2.0]), "float32")
        running = [written(rig, np.zeros(2), "float32") for _ in range(2)]
        y, saved = cupy_norm.batch_norm(x, *running, weight, None, training=True, momentum=1.0)
        dx, dweight, _ = cupy_norm.batch_norm_backward(dy, saved)
        y64, dx64, dweight64, _, *terms = wanted(x, dy, weight, None, None, None, False, 1e-5)
        close(y, y64, "float32", terms[0])
        close(dx, dx64, "float32", terms[1])
        close(dweight, dweight64, "float32", terms[2])
        np.testing.assert_allclose(running[1], per_channel(x).var(1, ddof=1), rtol=1e-4)


@pytest.mark.parametrize("value", [-3333.0, 1e-30, 0.1])
def test_channels_of_numbers_all_alike_become_the_bias(value: float):
    with rigged() as rig:
        x, bias = (
            rig.array(np.full((7, 2, 5, 5), value), "float32"),
            rig.array(np.array([0.25, -1.0]), "float32"),
        )
        y, _ = cupy_norm.batch_norm(x, None, None, None, bias, training=True)
        np.testing.assert_array_equal(
            y, np.broadcast_to(np.array([0.25, -1.0], "float32")[:, None, None], y.shape)
        )


def test_nan_stays_in_its_channel():
    host = np.random.default_rng(0).normal(size=(3, 2, 4, 4))
    host[1, 0, 2, 2] = np.nan
    with rigged() as rig:
        x = rig.array(host, "float32")
        y, saved = cupy_norm.batch_norm_relu(x, None, None, None, None, training=True)
        assert np.isnan(y[:, 0]).all()
        assert np.isfinite(y[:, 1]).all()
        assert np.isfinite(cupy_norm.batch_norm_backward(x, saved)[0][:, 1]).all()


def test_a_large_layer_fills_the_device():
    parts, each = cupy_norm.cut(16, 100_000)
    assert 16 * parts >= 2 * PROCESSORS
    assert (parts - 1) * each < 100_000 <= parts * each


@settings(max_examples=300)
@given(st.integers(1, 3000), st.integers(1, 10**7))
def test_the_parts_are_the_channel(channels: int, count: int):
    parts, each = cupy_norm.cut(channels, count)
    assert 1 <= parts <= 128
    assert (parts - 1) * each < count <= parts * each


def test_what_is_declined():
    with rigged() as rig:
        half, empty = (
            rig.array(np.ones((2, 3, 2, 2)), "float16"),
            rig.array(np.ones((0, 3, 2, 2)), "float32"),
        )
        for x in (half, empty):
            assert cupy_norm.batch_norm(x, None, None, training=True) is NotImplemented
            assert cupy_norm.batch_norm_relu(x, None, None, training=True) is NotImplemented
        apart = written(rig, np.ones((3, 2)), "float32")[:, 0]
        assert (
            cupy_norm.batch_norm(rig.array(np.ones((2, 3)), "float32"), apart, apart)
            is NotImplemented
        )
