"""Convolution in groups by NumPy and by numba, on sizes that reach every loop, against sums over
taps in float64: whole vectors and rests of rows, each way to split a stride, several blocks."""

from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn.ops import conv2d, conv2d_backward, use_kernels
from portacnn.ops.fused import ConvNorm, conv_unit
from portacnn.ops.windows import Windows
from support.checks import pieces_for, pieces_of
from support.matrix import needs

KINDS = ["native", pytest.param("numba", marks=needs("numba"))]
each_kind = pytest.mark.parametrize("kind", KINDS)
LIMIT = {"float32": 1e-5, "float64": 1e-12}


class Case(NamedTuple):
    n: int
    groups: int
    inputs: int  # of a group
    outputs: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    pads: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int] = (1, 1)

    @property
    def windows(self) -> Windows:
        return Windows.of(self.size, self.kernel, self.stride, self.pads, self.dilation)


ONE, TWO = ((1, 1), (1, 1)), ((2, 2), (2, 2))
CASES = {
    "3x3, rows of several vectors": Case(16, 3, 1, 1, (9, 7), (3, 3), (1, 1), ONE),
    "3x3, one image": Case(1, 5, 1, 1, (7, 37), (3, 3), (1, 1), ONE),
    "3x3 by 2, one image": Case(1, 3, 1, 1, (18, 70), (3, 3), (2, 2), ONE),
    "3x3 by 2, two images, even padding": Case(2, 3, 1, 1, (11, 13), (3, 3), (2, 2), TWO),
    "3x3 by 2, four": Case(4, 2, 1, 2, (9, 23), (3, 3), (2, 2), ((0, 1), (0, 1))),
    "3x3 by 2, eight": Case(8, 2, 1, 1, (10, 11), (3, 3), (2, 2), ONE),
    "3x3 by 2, three": Case(3, 2, 1, 1, (10, 11), (3, 3), (2, 2), ONE),
    "3x3 by 2, many": Case(33, 2, 1, 1, (8, 7), (3, 3), (2, 2), ONE),
    "5x5": Case(3, 2, 1, 1, (13, 9), (5, 5), (1, 1), TWO),
    "5x5 by 2": Case(2, 2, 1, 1, (13, 12), (5, 5), (2, 2), TWO),
    "7x7": Case(2, 2, 1, 1, (9, 40), (7, 7), (1, 1), ((3, 3), (3, 3))),
    "dilated": Case(2, 2, 1, 3, (12, 11), (3, 3), (1, 1), TWO, (2, 2)),
    "uneven": Case(2, 3, 1, 2, (11, 9), (2, 4), (3, 2), ((0, 3), (2, 1)), (2, 1)),
    "stride beyond the kernel": Case(2, 3, 1, 1, (9, 8), (1, 2), (3, 3), ONE),
    "padding beyond the input": Case(1, 2, 1, 1, (1, 2), (2, 2), (1, 1), ((3, 3), (3, 3))),
    "few channels": Case(5, 3, 4, 2, (8, 7), (3, 3), (1, 1), ONE),
    "few channels by 2": Case(9, 2, 3, 5, (9, 8), (3, 3), (2, 2), ONE),
    "many channels": Case(2, 2, 18, 17, (6, 5), (3, 3), (2, 1), ONE),
    "1x1": Case(2, 3, 20, 5, (4, 5), (1, 1), (1, 1), ((0, 0), (0, 0))),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def numbers(case: Case, dtype: str) -> tuple[np.ndarray, ...]:
    """x, with the batch last in memory, weight, bias and dy, read-only."""
    draw = np.random.default_rng(0).standard_normal
    channels = case.groups * case.inputs, case.groups * case.outputs
    x = draw((channels[0], *case.size, case.n)).astype(dtype)
    dy = draw((channels[1], *case.windows.out, case.n)).astype(dtype)
    weight = draw((channels[1], case.inputs, *case.kernel)).astype(dtype)
    arrays = np.moveaxis(x, -1, 0), weight, draw(channels[1]).astype(dtype), np.moveaxis(dy, -1, 0)
    for array in (x, weight, arrays[2], dy):
        array.flags.writeable = False
    for array in arrays:
        array.flags.writeable = False
    return arrays


def oracle(case: Case, *arrays: np.ndarray) -> list[np.ndarray]:
    """y, dx, dweight and dbias."""
    x, weight, bias, dy = (array.astype("float64") for array in arrays)
    padded = np.pad(x, [(0, 0), (0, 0), *case.pads])
    y, dpadded, dweight = np.zeros(dy.shape), np.zeros(padded.shape), np.zeros(weight.shape)
    for g, i, j in product(range(case.groups), *map(range, case.kernel)):
        a = slice(g * case.inputs, (g + 1) * case.inputs)
        b = slice(g * case.outputs, (g + 1) * case.outputs)
        places = tuple(
            slice(k * d, k * d + (o - 1) * s + 1, s)
            for k, d, o, s in zip((i, j), case.dilation, case.windows.out, case.stride, strict=True)
        )
        seen, factor, given = padded[:, a, *places], weight[b, :, i, j], dy[:, b]
        y[:, b] += np.einsum("nchw,oc->nohw", seen, factor)
        dpadded[:, a, *places] += np.einsum("nohw,oc->nchw", given, factor)
        dweight[b, :, i, j] = np.einsum("nohw,nchw->oc", given, seen)
    (top, _), (left, _) = case.pads
    h, w = case.size
    dx = dpadded[:, :, top : top + h, left : left + w]
    return [y + bias[:, None, None], dx, dweight, dy.sum((0, 2, 3))]


def results(case: Case, kind: str, arrays: tuple[np.ndarray, ...]) -> list[np.ndarray]:
    x, weight, bias, dy = arrays
    options: dict[str, Any] = {
        "stride": case.stride, "padding": case.pads, "dilation": case.dilation,
        "groups": case.groups,
    }  # fmt: skip
    with use_kernels(kind):
        y, cache = conv2d(x, weight, bias, **options)
        return [y, *conv2d_backward(dy, cache)]


def check(case: Case, kind: str, dtype: str) -> None:
    arrays = numbers(case, dtype)
    found = results(case, kind, arrays)
    for got, expected in zip(found, oracle(case, *arrays), strict=True):
        assert got.dtype == dtype
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() <= LIMIT[dtype] * max(np.abs(expected).max(), 1.0)
    again = results(case, kind, arrays)
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("dtype", LIMIT)
@each_case
@each_kind
def test_sums_over_taps(kind: str, case: Case, dtype: str):
    check(case, kind, dtype)


@pytest.mark.parametrize("room", [1, 3000])
@each_case
@each_kind
def test_in_blocks_and_in_two_threads(kind: str, case: Case, room: int):
    with pieces_of(room), pieces_for(2):
        check(case, kind, "float32")


@st.composite
def drawn(draw: st.DrawFn) -> Case:
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (3, 3), (5, 5), (2, 3), (7, 1)]))
    stride = draw(st.sampled_from([(1, 1), (2, 2), (1, 2), (3, 1)]))
    pads = tuple(draw(st.tuples(st.integers(0, 3), st.integers(0, 3))) for _ in kernel)
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 3)]))
    size = tuple(
        max(1, d * (k - 1) + 1 - sum(pad)) + draw(st.integers(0, 18))
        for k, d, pad in zip(kernel, dilation, pads, strict=True)
    )
    n = draw(st.sampled_from([1, 1, 2, 3, 4, 8, 16, 17]))
    inputs, outputs = (draw(st.sampled_from([1, 1, 1, 2, 5])) for _ in "ab")
    return Case(n, draw(st.integers(2, 4)), inputs, outputs, size, kernel, stride, pads, dilation)


@settings(max_examples=15)
@given(case=drawn(), dtype=st.sampled_from([*LIMIT]))
@each_kind
def test_drawn_sizes(kind: str, case: Case, dtype: str):
    check(case, kind, dtype)


@pytest.mark.slow
@settings(max_examples=400)
@given(case=drawn(), dtype=st.sampled_from([*LIMIT]), room=st.sampled_from([1, 3000, 1 << 20]))
@each_kind
def test_many_drawn_sizes(kind: str, case: Case, dtype: str, room: int):
    with pieces_of(room), pieces_for(2):
        check(case, kind, dtype)


@pytest.mark.parametrize("name", ["3x3, one image", "few channels by 2", "many channels", "uneven"])
@each_kind
def test_norm_sum_and_limits(kind: str, name: str):
    """In one pass; and NaN stays."""
    case = CASES[name]
    x, weight, bias, residual = numbers(case, "float32")
    draw = np.random.default_rng(1).random
    mean, var, scale, shift = (draw(len(bias), "float32") + 0.5 for _ in range(4))
    norm = ConvNorm(mean, var, scale, shift, 1e-3)
    with use_kernels(kind):
        y = conv_unit([x, residual], weight, bias, case.windows, case.groups, norm, 0.0, 6.0, None)
        broken = residual.copy()
        broken[0, 0, 0, 0] = np.nan
        z = conv_unit([x, broken], weight, bias, case.windows, case.groups, norm, 0.0, 6.0, None)
    mean, var, scale, shift = (a.astype("float64")[:, None, None] for a in norm[:4])
    plain = oracle(case, x, weight, bias, residual)[0]
    expected = (plain - mean) / np.sqrt(var + 1e-3) * scale + shift + residual
    np.testing.assert_allclose(y, np.clip(expected, 0.0, 6.0), rtol=1e-5, atol=1e-4)
    assert np.isnan(z[0, 0, 0, 0])
    assert np.isnan(z).sum() == 1
