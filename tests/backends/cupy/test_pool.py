"""The CUDA kernels of pooling, run on the host, against plain loops over every window in
float64."""

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn.backends.cupy import pool as cupy_pool
from portacnn.ops.pool import pool_windows
from portacnn.ops.windows import Windows
from support.cuda_rig import Rig, close, needs_compiler, orders, rigged
from support.drawing import arguments_of

pytestmark = needs_compiler


def cells(windows: Windows, at: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Where the window of the output ``at`` looks, tap by tap; also where there is only padding, or
    nothing."""
    axes = zip(at, windows.stride, windows.pads, windows.kernel, windows.dilation, strict=True)
    return list(
        product(*([o * s - before + k * d for k in range(kk)] for o, s, (before, _), kk, d in axes))
    )


def inside(windows: Windows, cell: tuple[int, ...]) -> bool:
    return all(0 <= i < n for i, n in zip(cell, windows.size, strict=True))


def padded(windows: Windows, cell: tuple[int, ...]) -> bool:
    return all(
        -b <= i < n + a for i, n, (b, a) in zip(cell, windows.size, windows.pads, strict=True)
    )


def max_pool(x: np.ndarray, dy: np.ndarray, windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    y, dx = np.empty(dy.shape), np.zeros(x.shape)
    for n, c, *at in np.ndindex(*dy.shape):
        seen = [cell for cell in cells(windows, tuple(at)) if inside(windows, cell)]
        best = seen[0]
        for cell in seen:
            if x[n, c][cell] > x[n, c][best] or np.isnan(x[n, c][cell]):
                best = cell
        y[(n, c, *at)] = x[n, c][best]
        dx[(n, c, *best)] += dy[(n, c, *at)]
    return y, dx


def avg_pool(
    x: np.ndarray, dy: np.ndarray, windows: Windows, include: bool, divisor: Any
) -> tuple[np.ndarray, np.ndarray]:
    y, dx = np.empty(dy.shape), np.zeros(x.shape)
    for n, c, *at in np.ndindex(*dy.shape):
        looked = cells(windows, tuple(at))
        seen = [cell for cell in looked if inside(windows, cell)]
        by = divisor or (sum(padded(windows, cell) for cell in looked) if include else len(seen))
        y[(n, c, *at)] = sum(x[n, c][cell] for cell in seen) / by
        for cell in seen:
            dx[(n, c, *cell)] += dy[(n, c, *at)] / by
    return y, dx


def arrays(
    rig: Rig, windows: Windows, n: int, c: int, seed: int, dtype: str, last: bool
) -> tuple[np.ndarray, np.ndarray]:
    """x, with many that are equal, and dy."""
    draw = np.random.default_rng(seed)
    order = (*range(1, len(windows.size) + 2), 0) if last else None
    x = rig.array(draw.integers(-3, 4, (n, c, *windows.size)), dtype, order)
    return x, rig.array(draw.normal(size=(n, c, *windows.out)), dtype, order)


dtypes = st.sampled_from(["float32", "float64"])


@settings(max_examples=25)
@given(arguments_of("max_pool", "small"), st.integers(0, 999), dtypes, orders, st.booleans())
def test_max_pool(arguments: dict, seed: int, dtype: str, order: str, last: bool):
    windows, (n, c, *_) = arguments["windows"], arguments["x"].shape
    n = min(n, 5)  # the loops take their time
    with rigged(order, seed) as rig:
        x, dy = arrays(rig, windows, n, c, seed, dtype, last)
        y, saved = cupy_pool.max_pool(x, windows, keep=True)
        y64, dx64 = max_pool(x, np.asarray(dy, "float64"), windows)
        close(y, y64, dtype, np.abs(y64))
        close(
            cupy_pool.max_pool_backward(dy, saved), dx64, dtype, max_pool(x, np.abs(dy), windows)[1]
        )
        assert [name for name, *_ in rig.launches] == ["max_pool", "max_pool_backward"]
        again, nothing = cupy_pool.max_pool(x, windows, keep=False)
        assert nothing is None
        np.testing.assert_array_equal(again, y)


@settings(max_examples=25)
@given(arguments_of("avg_pool", "small"), st.integers(0, 999), dtypes, orders, st.booleans())
def test_avg_pool(arguments: dict, seed: int, dtype: str, order: str, last: bool):
    windows, (n, c, *_) = arguments["windows"], arguments["x"].shape
    include, divisor, n = arguments["count_include_pad"], arguments["divisor"], min(n, 5)
    with rigged(order, seed) as rig:
        x, dy = arrays(rig, windows, n, c, seed, dtype, last)
        y, saved = cupy_pool.avg_pool(x, windows, include, divisor, keep=True)
        y64, dx64 = avg_pool(
            np.asarray(x, "float64"), np.asarray(dy, "float64"), windows, include, divisor
        )
        terms = avg_pool(np.abs(np.asarray(x, "float64")), np.abs(dy), windows, include, divisor)
        close(y, y64, dtype, terms[0])
        close(cupy_pool.avg_pool_backward(dy, saved), dx64, dtype, terms[1])
        assert [name for name, *_ in rig.launches] == ["avg_pool", "avg_pool_backward"]
        assert cupy_pool.avg_pool(x, windows, include, divisor, keep=False)[1] is None


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(("stride", "ceil"), [(1, False), (2, True), ((2, 3), True)])
def test_averages_at_every_edge(stride: Any, ceil: bool, include: bool):
    """Padding on each side, more behind than before, and windows that hang over it."""
    windows = pool_windows((4, 5), (2, 3), stride, ((0, 1), (1, 2)), 1, ceil)
    with rigged() as rig:
        x, dy = arrays(rig, windows, 3, 2, 0, "float64", True)
        y, saved = cupy_pool.avg_pool(x, windows, include, None, keep=True)
        y64, dx64 = avg_pool(x, dy, windows, include, None)
        close(y, y64, "float64", np.ones(1))
        close(cupy_pool.avg_pool_backward(dy, saved), dx64, "float64", np.ones(1))


def test_rows_longer_than_a_block():
    windows = pool_windows((2, 30), (2, 2), None, 0, 1, False)
    with rigged("shuffled") as rig:
        x, dy = arrays(rig, windows, 37, 2, 0, "float32", True)
        y, saved = cupy_pool.max_pool(x, windows, keep=True)
        y64, dx64 = max_pool(x, np.asarray(dy, "float64"), windows)
        assert rig.launches[0][1][1] > 1
        close(y, y64, "float32", np.abs(y64))
        close(cupy_pool.max_pool_backward(dy, saved), dx64, "float32", np.abs(dx64))


def test_a_window_of_more_taps_than_a_byte_counts():
    windows = pool_windows((18, 19), (17, 17), 1, 0, 1, False)
    with rigged() as rig:
        x, dy = arrays(rig, windows, 2, 1, 0, "float64", True)
        host = np.array(x)
        host[:, :, 16, 16] = 9.0  # the last tap of the first window
        x = rig.array(host, "float64")
        y, saved = cupy_pool.max_pool(x, windows, keep=True)
        assert saved[1].dtype == "int32"
        y64, dx64 = max_pool(host, dy, windows)
        close(y, y64, "float64", np.abs(y64))
        close(cupy_pool.max_pool_backward(dy, saved), dx64, "float64", np.abs(dx64))


@pytest.mark.parametrize("kernel", [2, 3, (1, 3)])
def test_nan_wins_and_infinities_are_numbers(kernel: Any):
    host = np.full((2, 1, 6, 6), -np.inf)
    host[0, 0, 1, 2] = host[0, 0, 1, 3] = host[0, 0, 4, 4] = np.nan
    host[1, 0, 5, 5] = np.inf
    windows = pool_windows((6, 6), kernel, 1, 0, 1, False)
    with rigged() as rig:
        x, dy = rig.array(host, "float32"), rig.array(np.ones((2, 1, *windows.out)), "float32")
        y, saved = cupy_pool.max_pool(x, windows, keep=True)
        y64, dx64 = max_pool(host, np.ones(dy.shape), windows)
        np.testing.assert_array_equal(y, y64)
        np.testing.assert_array_equal(cupy_pool.max_pool_backward(dy, saved), dx64)


def test_the_same_bits_in_any_order():
    windows = pool_windows((9, 9), 3, 2, 1, 1, True)
    results = []
    for order in ("forward", "reverse", "shuffled"):
        with rigged(order, 1) as rig:
            x, dy = arrays(rig, windows, 5, 3, 1, "float32", True)
            (y, saved), (mean, kept) = (
                cupy_pool.max_pool(x, windows, keep=True),
                cupy_pool.avg_pool(x, windows, False, None, keep=True),
            )
            results.append(
                [
                    y,
                    mean,
                    cupy_pool.max_pool_backward(dy, saved),
                    cupy_pool.avg_pool_backward(dy, kept),
                ]
            )
    for one, *others in zip(*results, strict=True):
        for other in others:
            np.testing.assert_array_equal(one, other)


def test_what_is_declined():
    windows = pool_windows((4, 4), 2, None, 0, 1, False)
    with rigged() as rig:
        for shape, dtype in (((2, 3, 4, 4), "float16"), ((0, 3, 4, 4), "float32")):
            x = rig.array(np.ones(shape), dtype)
            assert cupy_pool.max_pool(x, windows, keep=True) is NotImplemented
            assert cupy_pool.avg_pool(x, windows, True, None, keep=True) is NotImplemented
        x = rig.array(np.ones((1, 1, 2, 2, 2, 2)), "float32")
        assert cupy_pool.max_pool(x, Windows.of((2, 2, 2, 2), 2), keep=True) is NotImplemented
