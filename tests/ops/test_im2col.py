"""im2col and col2im against the tutorials' definition, written as a table of places: which pixel
each entry shows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn.errors import ArgumentError, ArrayError, ShapeError
from portacnn.ops import col2im, im2col
from support import oracles
from support.checks import DTYPES, LAYOUTS, agree, laid_out, normal, refuses, untouched
from support.matrix import Here


def both(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def check(here: Here, shape, kernel, stride, pad, dtype: str, layout: str) -> None:
    """Shapes, every entry, and that col2im is the adjoint: <im2col(x), c> == <x, col2im(c)>."""
    places, (oh, ow) = oracles.im2col_places(shape, kernel, both(stride), both(pad))
    host = normal(*shape)
    expected = np.zeros((shape[0] * oh * ow, shape[1] * kernel[0] * kernel[1]))
    c, back = normal(*expected.shape, seed=1), np.zeros(shape)
    for entry, pixel in places.items():
        expected[entry] = host[pixel]
        back[pixel] += c[entry]
    x, cs = laid_out(here, host, dtype, layout), laid_out(here, c, dtype, layout)
    with untouched(here, x, cs):
        col = im2col(x, *kernel, stride, pad)
        image = col2im(cs, shape, *kernel, stride, pad)
    # moved, not computed
    agree(here, col, expected, x, tolerance=1e-7 if dtype == "float32" else 0)
    agree(here, image, back, x)
    left, right = np.sum(here.host(col) * here.host(cs)), np.sum(here.host(x) * here.host(image))
    np.testing.assert_allclose(
        left,
        right,
        rtol=1e-4 if dtype == "float32" else 1e-9,
        atol=1e-4 if dtype == "float32" else 1e-9,
    )


@st.composite
def drawn(draw: st.DrawFn) -> tuple:
    numbers = lambda low, high: st.integers(low, high) | st.tuples(*[st.integers(low, high)] * 2)  # noqa: E731
    kernel, stride, pad = (
        draw(st.tuples(*[st.integers(1, 3)] * 2)),
        draw(numbers(1, 4)),
        draw(numbers(0, 2)),
    )
    least = [max(1, k - 2 * p) for k, p in zip(kernel, both(pad), strict=True)]
    size = [draw(st.integers(low, low + 4)) for low in least]
    return (draw(st.integers(0, 3)), draw(st.integers(1, 3)), *size), kernel, stride, pad


@settings(max_examples=40)
@given(geometry=drawn(), dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS))
def test_drawn_arguments_agree_with_the_reference(
    backend: Here, geometry: tuple, dtype: str, layout: str
):
    check(backend, *geometry, dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "pad"),
    [
        ((1, 3, 7, 7), (5, 5), 1, 0),  # the tutorials' first example
        ((2, 2, 6, 8), (3, 3), (2, 3), 0),  # the stride runs past the end
        ((2, 1, 4, 5), (2, 3), 3, (2, 1)),
        ((1, 1, 1, 1), (3, 3), 1, 1),
        ((0, 2, 4, 4), (2, 2), 2, 0),
    ],
)
def test_known_geometries_are_correct(backend: Here, shape, kernel, stride, pad, layout: str):
    for dtype in DTYPES:
        check(backend, shape, kernel, stride, pad, dtype, layout)


def test_the_order_of_rows_and_entries(backend: Here):
    """Written out by hand: rows by image, output row, output column; entries by channel, kernel
    row, kernel column."""
    x = backend.array(np.arange(24.0).reshape(2, 2, 2, 3))
    expected = [
        [0, 1, 3, 4, 6, 7, 9, 10],
        [1, 2, 4, 5, 7, 8, 10, 11],
        [12, 13, 15, 16, 18, 19, 21, 22],
        [13, 14, 16, 17, 19, 20, 22, 23],
    ]
    agree(backend, im2col(x, 2, 2), np.array(expected), x, tolerance=0)
    ones = backend.array(np.ones((4, 8)))
    agree(
        backend,
        col2im(ones, (2, 2, 2, 3), 2, 2),
        np.array([[[[1, 2, 1]] * 2] * 2] * 2),
        x,
        tolerance=0,
    )


def test_integer_images_are_accepted(backend: Here):
    x = backend.array(np.arange(16, dtype="uint8").reshape(1, 1, 4, 4))
    col = im2col(x, 2, 2, stride=2)
    assert col.dtype == x.dtype
    np.testing.assert_array_equal(
        backend.host(col), [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    )


def test_wrong_arguments_are_refused(backend: Here):
    x = backend.array(normal(2, 1, 4, 5))
    refuses(ShapeError, "(N, C, H, W)", "(1, 4, 5)", call=lambda: im2col(x[0, ...], 2, 2))
    refuses(ShapeError, "kernel 5x2", "input 4x5", call=lambda: im2col(x, 5, 2))
    refuses(ArgumentError, "stride", "at least 1", "-1", call=lambda: im2col(x, 2, 2, stride=-1))
    refuses(ArgumentError, "padding", "at least 0", "-1", call=lambda: im2col(x, 2, 2, pad=-1))
    refuses(ArgumentError, "kernel_size", "at least 1", "(0, 2)", call=lambda: im2col(x, 0, 2))
    col = im2col(x, 2, 2)
    refuses(
        ShapeError,
        "(24, 4)",
        "(2, 1, 4, 5)",
        "got (23, 4)",
        call=lambda: col2im(col[:23, :], x.shape, 2, 2),
    )
    refuses(ShapeError, "(N, C, H, W)", "(2, 4, 5)", call=lambda: col2im(col, (2, 4, 5), 2, 2))
    refuses(ShapeError, "kernel 5x5", "input 4x5", call=lambda: col2im(col, (2, 1, 4, 5), 5, 5))
    refuses(
        ArrayError, "expected an array", "list", call=lambda: col2im([[1.0]], (1, 1, 1, 1), 1, 1)
    )
    refuses(ArrayError, "expected an array", "list", call=lambda: im2col([[[[1.0]]]], 1, 1))
