"""Convolution, ReLU and pooling as one op, and affine map and ReLU: against loops, one by one, and
against PyTorch."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn import ops
from portacnn.errors import StateError
from portacnn.ops.fused import (
    add_relu,
    add_relu_backward,
    conv_relu,
    conv_relu_backward,
    linear_relu,
    linear_relu_backward,
)
from portacnn.ops.windows import Windows
from support import oracles
from support.checks import (
    DTYPES,
    LAYOUTS,
    agree,
    distinct,
    laid_out,
    mixtures,
    normal,
    pieces_for,
    pieces_of,
    refuses,
    untouched,
    with_each_kernel,
)
from support.fused_cases import CASES, Case, Numbers, Pool
from support.matrix import Here, backends, needs


def by_loops(
    case: Case, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, seed: int
) -> tuple:
    """(y, dy, (dx, dweight, dbias)): layer by layer."""
    above = np.maximum(oracles.conv(x, weight, bias, *case.plain), 0.0)
    if case.pool is None:
        y = above
        dy = normal(*y.shape, seed=seed)
        up = dy
    else:
        w = case.pool.windows(above.shape[2:])
        y, chosen = oracles.max_pool(above, w.out, w.kernel, w.stride, w.pads, w.dilation)
        dy = normal(*y.shape, seed=seed)
        up = oracles.routed(above.shape, chosen, dy)
    return y, dy, oracles.conv_gradients(x, weight, up * (above > 0), *case.plain)


def check(
    here: Here,
    case: Case,
    dtype: str,
    layouts: tuple[str, str, str] = ("packed",) * 3,
    seed: int = 0,
) -> None:
    """Values and gradients against the loops; arrays left alone; library, device and dtype as they
    came."""
    x, weight, bias = case.arrays(seed)
    expected, dy, gradients = by_loops(case, x, weight, bias, seed + 3)
    xs, ws, dys = (
        laid_out(here, a, dtype, layout) for a, layout in zip((x, weight, dy), layouts, strict=True)
    )
    bs = None if bias is None else here.array(bias, dtype)
    with untouched(here, xs, ws, bs, dys):
        y, cache = conv_relu(xs, ws, bs, *case.arguments(), keep=True)
        dx, dweight, dbias = conv_relu_backward(dys, cache)
        quick, nothing = conv_relu(xs, ws, bs, *case.arguments(), keep=False)
        _, cache = conv_relu(xs, ws, bs, *case.arguments(), keep=True)
        no_dx, dweight2, dbias2 = conv_relu_backward(dys, cache, need_dx=False)
    assert nothing is None
    assert no_dx is None
    agree(here, y, expected, xs)
    agree(here, quick, expected, xs)
    agree(here, dx, gradients[0], xs)
    for got in (dweight, dweight2):
        agree(here, got, gradients[1], xs)
    for got in (dbias, dbias2):
        if bs is None:
            assert got is None
        else:
            agree(here, got, gradients[2], xs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@with_each_kernel
def test_values_and_gradients(backend: Here, case: Case, dtype: str):
    check(backend, case, dtype)


@with_each_kernel
def test_a_pool_of_more_taps_than_an_int8_counts(backend: Here):
    """12x12: kernels number the taps of a window, and in some windows the last ones win."""
    case = Case(2, 1, 4, (12, 36), (1, 1), pool=Pool((12, 12), (12, 12)))
    check(backend, case, "float32")


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("name", ["plain", "pool", "1d, pool", "pool overlapping"])
@with_each_kernel
def test_memory_layouts(backend: Here, name: str, layout: str):
    for layouts in mixtures(layout):
        check(backend, CASES[name], "float64", layouts, seed=31)


@pytest.mark.parametrize(("room", "count"), [(1, 1), (1500, 3), (6000, 2)])
@backends("numpy", "numpy-readonly")
@with_each_kernel
def test_numpys_convolutions_in_pieces(backend: Here, room: int, count: int):
    """Of one output row or row of pooling windows, and of a few that do not divide the output; in
    one thread and several."""
    with pieces_of(room), pieces_for(count):
        for case in CASES.values():
            check(backend, case, "float64", ("packed", "batch_last", "stepped"), seed=41)


@st.composite
def drawn(draw: st.DrawFn, axes: int = 2) -> Case:
    def each(low: int, high: int) -> Numbers:
        return draw(st.tuples(*[st.integers(low, high)] * axes))

    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    pads = tuple(zip(each(0, 4), each(0, 4), strict=True))
    least = (
        max(1, d * (k - 1) + 1 - sum(p)) for k, d, p in zip(kernel, dilation, pads, strict=True)
    )
    size = tuple(n + more for n, more in zip(least, each(0, 7), strict=True))
    out = Windows.of(size, kernel, stride, pads, dilation).out
    pool = None
    if draw(st.booleans()):
        under = tuple(draw(st.integers(1, min(3, n))) for n in out)
        hangs = draw(st.booleans()) and min(under) > 1
        pool = Pool(under, each(1, 4), padding=int(hangs), ceil=draw(st.booleans()))
    n, cg, og, groups = (draw(st.integers(1, high)) for high in (3, 2, 3, 2))
    return Case(n, cg, og, size, kernel, stride, pads, dilation, groups, draw(st.booleans()), pool)


layouts3 = st.tuples(*[st.sampled_from(LAYOUTS)] * 3)


@settings(derandomize=True, max_examples=15)
@given(case=drawn(), dtype=st.sampled_from(DTYPES), layouts=layouts3)
@with_each_kernel
def test_drawn(backend: Here, case: Case, dtype: str, layouts: tuple[str, str, str]):
    check(backend, case, dtype, layouts, seed=5)


@pytest.mark.slow
@settings(derandomize=True, max_examples=300)
@given(case=drawn() | drawn(axes=1), dtype=st.sampled_from(DTYPES), layouts=layouts3)
@with_each_kernel
def test_drawn_at_length(backend: Here, case: Case, dtype: str, layouts: tuple[str, str, str]):
    check(backend, case, dtype, layouts, seed=7)


@needs("torch")
@pytest.mark.parametrize(
    "name", ["plain", "stride, asymmetric pads", "pool", "pool overlapping", "pool with gaps"]
)
@with_each_kernel
def test_pytorch_with_equal_maxima(backend: Here, name: str):
    """Small whole numbers: every window has maxima that are alike, and the first of them takes the
    gradient."""
    import torch

    case, (stride, pads, dilation, groups) = CASES[name], CASES[name].plain
    draws = np.random.default_rng(3)
    hosts = [
        draws.integers(-1, 2, a.shape).astype("float64") for a in case.arrays() if a is not None
    ]
    leaves = [torch.tensor(a, requires_grad=True) for a in hosts]
    padded = torch.nn.functional.pad(leaves[0], (*pads[1], *pads[0]))
    y = torch.relu(torch.nn.functional.conv2d(padded, *leaves[1:], stride, 0, dilation, groups))
    if case.pool is not None:
        y = torch.nn.functional.max_pool2d(y, case.pool.kernel, case.pool.stride)
    dy = normal(*y.shape, seed=4)
    y.backward(torch.tensor(dy))
    x, *others = (backend.array(a) for a in hosts)
    got, cache = conv_relu(x, *others, *case.arguments(), keep=True)
    agree(backend, got, y.detach().numpy(), x)
    for gradient, leaf in zip(conv_relu_backward(backend.array(dy), cache), leaves, strict=True):
        agree(backend, gradient, leaf.grad.numpy(), x)


@pytest.mark.parametrize(
    "name", ["plain", "pool", "pool with gaps", "pool overlapping", "1d, pool", "3d, pool"]
)
@with_each_kernel
def test_nan_stays_and_does_not_spread(backend: Here, name: str):
    """Every output that sees it is NaN, and no other changes."""
    case = CASES[name]
    x, weight, bias = case.arrays()
    clean, *_ = by_loops(case, x, weight, bias, 0)
    middle = (0, 0, *(n // 2 for n in case.size))
    x[middle] = np.nan
    sees = oracles.conv(np.isnan(x) * 1.0, np.ones_like(weight), None, *case.plain)
    if case.pool is not None:
        w = case.pool.windows(sees.shape[2:])
        sees, _ = oracles.max_pool(sees, w.out, w.kernel, w.stride, w.pads, w.dilation)
    arrays = [None if a is None else backend.array(a) for a in (x, weight, bias)]
    y, _ = conv_relu(*arrays, *case.arguments(), keep=False)
    assert sees.any()
    agree(backend, y, np.where(sees > 0, np.nan, clean), arrays[0])


@with_each_kernel
def test_infinity_is_a_number_as_any_other(backend: Here):
    case = CASES["pool"]
    x, weight, bias = case.arrays()
    x[1, 0, 2, 2] = np.inf
    with np.errstate(invalid="ignore"):
        expected, *_ = by_loops(case, x, np.abs(weight), bias, 0)
        y, _ = conv_relu(
            *(backend.array(a) for a in (x, np.abs(weight), bias)), *case.arguments(), keep=False
        )
    assert np.isinf(expected).any()
    np.testing.assert_allclose(backend.host(y), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("name", ["plain", "pool", "pool overlapping", "1d, pool"])
@with_each_kernel
def test_batches_of_one_and_of_none(backend: Here, name: str, n: int):
    case = CASES[name]
    x, weight, bias = (backend.array(a, "float32") for a in case.arrays())
    whole, _ = conv_relu(x, weight, bias, *case.arguments(), keep=False)
    y, cache = conv_relu(x[:n, ...], weight, bias, *case.arguments(), keep=True)
    agree(backend, y, backend.host(whole)[:n], x)
    dx, dweight, dbias = conv_relu_backward(y, cache)
    assert tuple(dx.shape) == (n, *x.shape[1:])
    if n == 0:
        agree(backend, dweight, np.zeros(weight.shape), x)
        agree(backend, dbias, np.zeros(bias.shape), x)


def test_a_cache_of_another_op_is_refused(backend: Here):
    x, weight, bias = (backend.array(a) for a in CASES["plain"].arrays())
    y, cache = conv_relu(x, weight, bias, *CASES["plain"].arguments(), keep=True)
    refuses(StateError, "keep=True", call=lambda: conv_relu_backward(y, None))
    refuses(StateError, "conv_relu", "relu", call=lambda: conv_relu_backward(y, ops.relu(x)[1]))
    refuses(StateError, "conv", "conv_relu", call=lambda: ops.conv2d_backward(y, cache))


@needs("torch")
@with_each_kernel
def test_the_gradient_at_nan_is_pytorchs(backend: Here):
    """ReLU passes dy on where its output is NaN, in every op that has a ReLU in it."""
    import torch

    functional = torch.nn.functional

    def compare(names: str, ours: Any, theirs: Any) -> None:
        for name, own, other in zip(names.split(), ours, theirs, strict=True):
            np.testing.assert_allclose(
                backend.host(own), other.numpy(), rtol=1e-9, atol=1e-9, err_msg=name
            )

    def leaf(array: np.ndarray) -> Any:
        return torch.tensor(array, requires_grad=True)

    def gradients(y: Any, dy: np.ndarray, *leaves: Any) -> Any:
        return torch.autograd.grad(y, leaves, torch.tensor(dy))

    x = np.array([[np.nan, -1.0, 0.0, 2.0]] * 3)
    dy = normal(3, 4, seed=3)
    given, its_dy, t = backend.array(x), backend.array(dy), leaf(x)
    expected = gradients(functional.relu(t), dy, t)
    y, cache = ops.relu(given)
    compare("relu", [ops.relu_backward(its_dy, cache)], expected)
    y, cache = add_relu([given, backend.array(np.zeros_like(x))])
    compare("add_relu", [add_relu_backward(its_dy, cache)], expected)

    # NaN comes from one output's bias, so that the gradients stay finite and can be compared
    x, weight, bias = normal(3, 4), normal(5, 4, seed=1), np.array([np.nan, 1.0, -1.0, 0.5, np.nan])
    dy = normal(3, 5, seed=3)
    leaves = [leaf(a) for a in (x, weight, bias)]
    expected = gradients(functional.relu(functional.linear(*leaves)), dy, *leaves)
    y, cache = linear_relu(*(backend.array(a) for a in (x, weight, bias)))
    compare("dx dweight dbias", linear_relu_backward(backend.array(dy), cache), expected)

    for name in ("plain", "pool", "pool overlapping"):
        case = CASES[name]
        x, weight, _ = case.arrays()
        bias = np.full(weight.shape[0], -0.1)
        bias[0] = np.nan
        arrays = [backend.array(a) for a in (x, weight, bias)]
        y, cache = conv_relu(*arrays, *case.arguments(), keep=True)
        dy = normal(*y.shape, seed=4)
        ours = conv_relu_backward(backend.array(dy), cache)
        # whichever element of a window won, the bias's gradient is the sum of what is passed on
        np.testing.assert_allclose(
            backend.host(ours[2])[0], dy[:, 0].sum(), rtol=1e-9, err_msg=name
        )


@pytest.mark.parametrize("size", [11, 12, 20])
@with_each_kernel
def test_pooling_over_many_cells(backend: Here, size: int):
    """A kernel of one number: then each output is that of the largest cell, and so is the
    gradient."""
    host = distinct(2, 1, 2 * size, size + 3)
    x, weight, bias = (
        backend.array(a, "float64") for a in (host, np.full((1, 1, 1, 1), 2.0), np.asarray([0.25]))
    )
    pool = Windows.of((2 * size, size + 3), size, size)
    y, cache = conv_relu(x, weight, bias, Windows.of(host.shape[2:], 1), 1, pool, keep=True)
    blocks = host[:, :, :, :size].reshape(2, 1, 2, size * size)
    agree(backend, y, 2.0 * blocks.max(axis=-1)[..., None] + 0.25, x)
    dy = normal(2, 1, 2, 1)
    dx, dweight, dbias = conv_relu_backward(backend.array(dy, "float64"), cache)
    agree(backend, dweight, np.full((1, 1, 1, 1), (dy[..., 0] * blocks.max(axis=-1)).sum()), x)
    agree(backend, dbias, dy.sum(keepdims=True)[0, 0, 0], x)
    expected = np.zeros((2, 1, 2, size * size))
    np.put_along_axis(expected, blocks.argmax(axis=-1)[..., None], 2.0 * dy, axis=-1)
    right = np.zeros(host.shape)
    right[:, :, :, :size] = expected.reshape(2, 1, 2 * size, size)
    agree(backend, dx, right, x)


@pytest.mark.parametrize("kernel", [(2, 2), (2, 3), (3, 1)])
@pytest.mark.parametrize("count", [1, 5, 40])
@with_each_kernel
def test_of_equal_maxima_the_first_takes_the_gradient(
    backend: Here, kernel: tuple[int, int], count: int
):
    """A kernel of one number again, and inputs of which most windows have several largest."""
    kh, kw = kernel
    host = np.random.default_rng(0).integers(1, 3, (count, 1, 2 * kh, 3 * kw)).astype("float64")
    x, one = backend.array(host), backend.array(np.ones((1, 1, 1, 1)))
    pool = Windows.of(host.shape[2:], kernel, kernel)
    y, cache = conv_relu(x, one, None, Windows.of(host.shape[2:], 1), 1, pool, keep=True)
    dy = normal(*y.shape)
    dx, _, _ = conv_relu_backward(backend.array(dy), cache)
    windows = host.reshape(count, 2, kh, 3, kw).swapaxes(2, 3).reshape(count, 2, 3, kh * kw)
    expected = np.zeros(windows.shape)
    np.put_along_axis(expected, windows.argmax(axis=-1)[..., None], dy[:, 0, ..., None], axis=-1)
    expected = expected.reshape(count, 2, 3, kh, kw).swapaxes(2, 3).reshape(host.shape)
    agree(backend, dx, expected, x)
