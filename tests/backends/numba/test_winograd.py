"""Winograd's convolution, forward and both gradients, against SciPy's correlation in float64: every
batch size, odd sizes, any padding, chunks of rows and of samples, each thread count."""

from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import correlate2d

from tests.support.checks import pieces_for

if find_spec("numba") is None:
    pytest.skip("numba is not installed", allow_module_level=True)

from portacnn.backends.numba import winograd
from portacnn.backends.numba.epilogue import Full
from portacnn.backends.numpy.epilogue import Epilogue
from portacnn.ops.windows import Plane


def oracle(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The convolution of padded x (N, C, P, Q) by SciPy, channel by channel."""
    return np.array(
        [[sum(map(correlate2d, one, kernel, ["valid"] * len(one))) for kernel in weight]
         for one in x]
    )  # fmt: skip


def last(array: np.ndarray, dtype: str) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(array, 0, -1).astype(dtype))


def close(actual: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    assert actual.dtype == dtype
    limit = 1e-5 if dtype == "float32" else 1e-13
    np.testing.assert_allclose(actual, expected, rtol=0, atol=limit * abs(expected).max())


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 19) | st.sampled_from([32, 33, 65]),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(3, 12),
    st.integers(3, 12),
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)),
    st.sampled_from(["float32", "float64"]),
    st.integers(1, 3),
    st.sampled_from([1, 64, 100_000]),
    st.integers(0, 99),
)
def test_values_and_gradients(n, c, o, height, width, pads, dtype, threads, most, seed):
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((n, c, height, width))
    weight = generator.standard_normal((o, c, 3, 3))
    top, bottom, left, right = pads
    around = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    expected = oracle(around, weight)
    dy = generator.standard_normal(expected.shape)
    with pytest.MonkeyPatch.context() as patch, pieces_for(threads):
        patch.setattr(winograd, "_COLUMNS", most)
        winograd._chunks.cache_clear()
        factors = winograd.factors(weight.astype(dtype))
        y = np.full((o, *expected.shape[2:], n), np.nan, dtype)
        full = Full.of(Epilogue(), o, y.dtype)
        winograd.convolve(last(x, dtype), factors, y, (top, left), full)
        close(np.moveaxis(y, -1, 0), expected, dtype)

        dx = np.full((c, height, width, n), np.nan, dtype)
        full = Full.of(Epilogue(), c, dx.dtype)
        turned = factors.turned()
        winograd.convolve(last(dy, dtype), turned, dx, (2 - top, 2 - left), full)
        flipped = weight[:, :, ::-1, ::-1].swapaxes(0, 1)
        wide = np.pad(dy, ((0, 0), (0, 0), (2, 2), (2, 2)))
        whole = oracle(wide, flipped)[:, :, top:, left:]
        close(np.moveaxis(dx, -1, 0), whole[:, :, :height, :width], dtype)

        dweight = winograd.weight_gradient(last(x, dtype), last(dy, dtype), (top, left))
        expected = np.array(
            [[sum(map(correlate2d, around[:, i], dy[:, j], ["valid"] * n)) for i in range(c)]
             for j in range(o)]
        )  # fmt: skip
        close(dweight, expected, dtype)
    winograd._chunks.cache_clear()


def test_the_epilogue_runs_on_every_element():
    generator = np.random.default_rng(5)
    x, weight = generator.standard_normal((3, 2, 5, 7)), generator.standard_normal((4, 2, 3, 3))
    scale, shift = generator.standard_normal((2, 4))
    residual = generator.standard_normal((3, 4, 3, 5))
    plain = oracle(x, weight) * scale[:, None, None] + shift[:, None, None] + residual
    y = np.empty((4, 3, 5, 3))
    parts = Epilogue(scale, shift, last(residual, "float64").reshape(4, -1), -1.0, 1.5)
    full = Full.of(parts, 4, y.dtype)
    winograd.convolve(last(x, "float64"), winograd.factors(weight), y, (0, 0), full)
    close(np.moveaxis(y, -1, 0), np.clip(plain, -1.0, 1.5), "float64")


def test_nan_and_infinity_reach_no_other_tile_than_their_own():
    x = np.zeros((1, 1, 10, 10))
    x[0, 0, 4, 4] = np.nan
    y = np.empty((1, 8, 8, 1))
    weight = np.ones((1, 1, 3, 3))
    full = Full.of(Epilogue(low=0.0), 1, y.dtype)
    winograd.convolve(last(x, "float64"), winograd.factors(weight), y, (0, 0), full)
    assert np.isnan(y[0, 2:5, 2:5]).all()
    for rest in (y[0, 6:], y[0, :, 6:], y[0, :2]):
        assert (rest == 0).all()


@pytest.mark.parametrize(
    ("geometry", "expected"),
    [
        ((64, 56, 56, 64, 56, 56, 3, 3, 1, 1, 1, 1, 1, 1, 8), True),
        ((64, 56, 56, 64, 28, 28, 3, 3, 2, 2, 1, 1, 1, 1, 8), False),
        ((64, 56, 56, 64, 56, 56, 5, 5, 1, 1, 2, 2, 1, 1, 8), False),
        ((64, 56, 56, 64, 54, 54, 3, 3, 1, 1, 1, 1, 2, 2, 8), False),
        ((3, 56, 56, 8, 56, 56, 3, 3, 1, 1, 1, 1, 1, 1, 8), False),
        ((512, 7, 7, 512, 7, 7, 3, 3, 1, 1, 1, 1, 1, 1, 1), False),
    ],
)
def test_it_takes_only_what_it_computes_faster(geometry, expected):
    assert winograd.suits(Plane(*geometry)) is expected
