"""Convolution, ReLU and pooling as one op, and affine map and ReLU: against loops, one by one, and
against PyTorch."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn import ops
from portacnn.errors import ShapeError, StateError
from portacnn.ops import use_kernels, workspace
from portacnn.ops.conv import conv, conv_windows
from portacnn.ops.fused import (
    add_relu,
    add_relu_backward,
    conv_relu,
    conv_relu_backward,
    linear_relu,
    linear_relu_backward,
)
from portacnn.ops.pool import pool_windows
from portacnn.ops.windows import Windows
from support import oracles, oracles_nd
from support.checks import (
    DTYPES,
    LAYOUTS,
    agree,
    choices,
    distinct,
    laid_out,
    normal,
    pieces_of,
    refuses,
    refuses_integers_and_lists,
    refuses_mixed,
    untouched,
    with_each_kernel,
)
from support.matrix import Here, backends, needs

Numbers = tuple[int, ...]


@dataclass(frozen=True)
class Pool:
    """As a layer has it; pads and ``ceil`` make windows that hang over the edge."""

    kernel: Numbers
    stride: Numbers
    padding: Any = 0
    dilation: Any = 1
    ceil: bool = False

    def windows(self, size: Numbers) -> Windows:
        return pool_windows(size, self.kernel, self.stride, self.padding, self.dilation, self.ceil)


@dataclass(frozen=True)
class Case:
    """One fused convolution. Everything is written out for every axis."""

    n: int
    cg: int  # channels in a group
    og: int  # outputs of a group
    size: Numbers
    kernel: Numbers
    stride: Numbers = ()
    pads: tuple[tuple[int, int], ...] = ()
    dilation: Numbers = ()
    groups: int = 1
    bias: bool = True
    pool: Pool | None = None
    plain: tuple = field(init=False)

    def __post_init__(self) -> None:
        axes = len(self.size)
        plain = (
            self.stride or (1,) * axes,
            self.pads or ((0, 0),) * axes,
            self.dilation or (1,) * axes,
            self.groups,
        )
        object.__setattr__(self, "plain", plain)

    @property
    def windows(self) -> Windows:
        stride, pads, dilation, _ = self.plain
        return Windows.of(self.size, self.kernel, stride, pads, dilation)

    def arguments(self) -> tuple:
        """What the op takes after x, weight and bias."""
        windows = self.windows
        return windows, self.groups, None if self.pool is None else self.pool.windows(windows.out)

    def arrays(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        weight = normal(self.og * self.groups, self.cg, *self.kernel, seed=seed + 1)
        bias = normal(len(weight), seed=seed + 2) if self.bias else None
        return normal(self.n, self.cg * self.groups, *self.size, seed=seed), weight, bias


def by_loops(
    case: Case, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, seed: int
) -> tuple:
    """(y, dy, (dx, dweight, dbias)): layer by layer."""
    above = np.maximum(oracles_nd.conv(x, weight, bias, *case.plain), 0.0)
    if case.pool is None:
        y = above
        dy = normal(*y.shape, seed=seed)
        up = dy
    else:
        w = case.pool.windows(above.shape[2:])
        y, chosen = oracles_nd.max_pool(above, w.out, w.kernel, w.stride, w.pads, w.dilation)
        dy = normal(*y.shape, seed=seed)
        up = oracles_nd.routed(above.shape, chosen, dy)
    return y, dy, oracles_nd.conv_gradients(x, weight, up * (above > 0), *case.plain)


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


TWO, THREE = Pool((2, 2), (2, 2)), Pool((3, 3), (3, 3))
CASES = {
    "plain": Case(3, 2, 3, (5, 6), (3, 3)),
    "1x1, no bias": Case(2, 3, 2, (3, 4), (1, 1), bias=False),
    "stride, asymmetric pads": Case(2, 2, 5, (5, 6), (3, 2), (2, 3), ((0, 2), (3, 1))),
    "pads larger than the kernel": Case(2, 1, 2, (2, 3), (2, 2), pads=((3, 4), (5, 2))),
    "dilation": Case(2, 1, 2, (7, 8), (3, 2), pads=((1, 1), (0, 2)), dilation=(2, 3)),
    "groups": Case(2, 2, 1, (4, 4), (2, 2), groups=3),
    "pool": Case(3, 2, 5, (6, 8), (3, 3), pool=TWO),
    "pool, no bias": Case(2, 2, 3, (6, 8), (3, 3), bias=False, pool=TWO),
    "pool leaves a row and a column out": Case(2, 2, 3, (7, 9), (3, 3), pool=TWO),
    "pool of 3 by 2": Case(
        2, 1, 2, (8, 7), (2, 2), pads=((1, 0), (0, 1)), pool=Pool((3, 2), (3, 2))
    ),
    "pool with gaps": Case(2, 1, 3, (8, 9), (2, 3), pool=Pool((2, 2), (3, 3))),
    "pool with gaps, one row left over": Case(2, 1, 3, (9, 10), (2, 3), pool=Pool((1, 2), (4, 3))),
    "pool overlapping": Case(2, 2, 2, (7, 8), (3, 3), pool=Pool((3, 3), (2, 2))),
    "pool hanging over the end": Case(
        2, 2, 2, (7, 8), (3, 3), pool=Pool((2, 2), (2, 2), ceil=True)
    ),
    "pool hanging over the start": Case(
        2, 2, 2, (7, 8), (3, 3), pool=Pool((2, 2), (2, 2), padding=1)
    ),
    "pool spread": Case(2, 1, 2, (8, 8), (2, 2), pool=Pool((2, 2), (3, 3), dilation=(2, 1))),
    "pool of everything": Case(2, 1, 2, (5, 5), (2, 2), pool=Pool((4, 4), (4, 4))),
    "pool of one": Case(2, 1, 2, (4, 4), (2, 2), pool=Pool((1, 1), (1, 1))),
    "pool, stride": Case(2, 3, 2, (9, 11), (3, 3), (2, 2), ((1, 1), (1, 1)), pool=TWO),
    "pool, dilation, pads": Case(
        2, 1, 2, (9, 8), (3, 2), (1, 2), ((2, 0), (0, 3)), (2, 3), pool=TWO
    ),
    "pool, groups": Case(2, 1, 2, (5, 5), (2, 2), groups=2, pool=TWO),
    "pool, pads larger than the kernel": Case(
        2, 1, 2, (3, 2), (2, 2), pads=((3, 4), (5, 3)), pool=THREE
    ),
    "a channel more than a block": Case(17, 3, 9, (4, 4), (3, 3), pads=((1, 1), (1, 1)), pool=TWO),
    "1d": Case(2, 2, 3, (9,), (3,), (2,), ((0, 3),), (2,)),
    "1d, pool": Case(2, 2, 3, (11,), (3,), pads=((1, 1),), pool=Pool((2,), (2,))),
    "1d, pool overlapping": Case(2, 1, 3, (11,), (3,), pool=Pool((3,), (2,))),
    "3d": Case(1, 2, 2, (3, 4, 3), (2, 2, 2), pads=((1, 0), (0, 1), (2, 0))),
    "3d, pool": Case(1, 2, 2, (5, 4, 5), (2, 1, 2), pool=Pool((2, 2, 2), (2, 2, 2))),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@with_each_kernel
def test_values_and_gradients(backend: Here, case: Case, dtype: str):
    check(backend, case, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["plain", "pool", "1d, pool", "pool overlapping"])
@with_each_kernel
def test_memory_layouts(backend: Here, name: str, layout: str):
    for others in {"packed", layout}:
        check(backend, CASES[name], "float64", (layout, others, others), seed=31)
        check(backend, CASES[name], "float64", (others, layout, others), seed=31)
        check(backend, CASES[name], "float64", (others, others, layout), seed=31)


@pytest.mark.parametrize("room", [1, 1500, 6000])
@backends("numpy", "numpy-readonly")
@with_each_kernel
def test_numpys_convolutions_in_pieces(backend: Here, room: int):
    """Of one output row or row of pooling windows, and of a few that do not divide the output."""
    with pieces_of(room):
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
    sees = oracles_nd.conv(np.isnan(x) * 1.0, np.ones_like(weight), None, *case.plain)
    if case.pool is not None:
        w = case.pool.windows(sees.shape[2:])
        sees, _ = oracles_nd.max_pool(sees, w.out, w.kernel, w.stride, w.pads, w.dilation)
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


# --- affine map and ReLU --------------------------------------------------------------------------


def check_linear(
    here: Here, shape: tuple[int, int, int], dtype: str, layouts: Any, with_bias: bool
) -> None:
    """shape: (N, F, O)."""
    n, f, o = shape
    x, weight, dy = normal(n, f), normal(o, f, seed=1), normal(n, o, seed=2)
    bias = normal(o, seed=3) if with_bias else None
    before, *_ = oracles.linear(x, weight, bias, dy)
    _, *gradients = oracles.linear(x, weight, bias, dy * (before > 0))
    xs, ws, dys = (
        laid_out(here, a, dtype, layout) for a, layout in zip((x, weight, dy), layouts, strict=True)
    )
    bs = None if bias is None else here.array(bias, dtype)
    with untouched(here, xs, ws, bs, dys):
        y, cache = linear_relu(xs, ws, bs)
        results = linear_relu_backward(dys, cache)
        quick, nothing = linear_relu(xs, ws, bs, keep=False)
        no_dx, *others = linear_relu_backward(dys, linear_relu(xs, ws, bs)[1], need_dx=False)
    assert nothing is None
    assert no_dx is None
    agree(here, y, np.maximum(before, 0.0), xs)
    agree(here, quick, np.maximum(before, 0.0), xs)
    for got, expected in zip([*results, *others], [*gradients, *gradients[1:]], strict=True):
        if expected is None or (bs is None and got is None):
            assert got is None
        else:
            agree(here, got, expected, xs)
    assert (results[2] is None) == (bs is None)


@settings(derandomize=True, max_examples=20)
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(1, 5), st.integers(1, 5)),
    dtype=st.sampled_from(DTYPES),
    layouts=layouts3,
    with_bias=st.booleans(),
)
@with_each_kernel
def test_linear_drawn(backend: Here, shape: Any, dtype: str, layouts: Any, with_bias: bool):
    check_linear(backend, shape, dtype, layouts, with_bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@with_each_kernel
def test_linear_layouts(backend: Here, layout: str, dtype: str):
    check_linear(backend, (4, 3, 5), dtype, (layout,) * 3, True)


@with_each_kernel
def test_linear_nan_stays_in_its_row(backend: Here):
    x, weight, bias = normal(3, 4), normal(2, 4, seed=1), normal(2, seed=2)
    clean = np.maximum(x @ weight.T + bias, 0.0)
    x[1, 2], clean[1] = np.nan, np.nan
    arrays = [backend.array(a) for a in (x, weight, bias)]
    agree(backend, linear_relu(*arrays)[0], clean, arrays[0])


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


def test_linear_refuses_what_linear_refuses(backend: Here):
    x, w = normal(2, 4), normal(3, 4)
    weight = backend.array(w, "float32")
    refuses_mixed(backend, "linear_relu: ", linear_relu, x, w)
    refuses_integers_and_lists(backend, "linear_relu: ", lambda a: linear_relu(a, weight), x)
    wide = backend.array(normal(2, 5), "float32")
    refuses(
        ShapeError,
        "linear_relu: ",
        "4 input features",
        "got 5",
        call=lambda: linear_relu(wide, weight),
    )
    refuses(
        ShapeError,
        "linear_relu: ",
        "bias",
        call=lambda: linear_relu(wide[:, :4], weight, wide[0, ...]),
    )


# --- prepared -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*CASES, "linear", "linear_relu"])
def test_a_prepared_op_does_what_the_op_does(backend: Here, name: str, dtype: str):
    """For other arrays of the same kind, with other values in the same parameters, over and
    over."""
    if name in CASES:
        op, hosts, rest = conv_relu, CASES[name].arrays(), CASES[name].arguments()
    else:
        op, hosts, rest = (
            getattr(ops, name, linear_relu),
            (normal(3, 4), normal(5, 4, seed=1), normal(5, seed=2)),
            (),
        )
    for choice in choices(backend):
        with use_kernels(choice):
            x = backend.array(hosts[0], dtype)
            weight, bias = (
                None if a is None else backend.backend.asarray(a, dtype) for a in hosts[1:]
            )
            function = op.prepare(x, weight, bias, *rest)
            for seed in range(3):
                other = backend.array(normal(*hosts[0].shape, seed=seed), dtype)
                weight[...] = backend.array(normal(*hosts[1].shape, seed=seed + 9), dtype)
                if bias is not None:
                    bias[...] = backend.array(normal(*hosts[2].shape, seed=seed + 8), dtype)
                with untouched(backend, other, weight, bias):
                    got = function(other)
                with use_kernels("reference"):
                    expected, _ = op(other, weight, bias, *rest, keep=False)
                agree(backend, got, backend.host(expected), other)


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


@pytest.mark.parametrize("which", ["weight", "bias", "both"])
@pytest.mark.parametrize("name", ["conv2d", "conv_relu", "linear", "linear_relu"])
def test_a_prepared_op_sees_what_is_written_to_strided_parameters(
    backend: Here, name: str, which: str
):
    """A kernel that wants them in one piece must not keep a copy of its own."""
    op = {"conv2d": conv, "conv_relu": conv_relu, "linear": ops.linear, "linear_relu": linear_relu}[
        name
    ]
    convolves = name.startswith("conv")
    x = backend.array(normal(2, 3, 6, 5) if convolves else normal(2, 3), "float32")
    wide = backend.backend.asarray(normal(4, 6, 3, 3) if convolves else normal(4, 6), "float32")
    long = backend.backend.asarray(normal(8), "float32")
    weight, bias = wide[:, ::2, ...], long[::2]
    if which == "weight":  # each by itself: the other one must not be what a kernel declines
        bias = long = backend.backend.asarray(normal(4), "float32")
    elif which == "bias":
        wide = weight = backend.backend.asarray(backend.host(weight), "float32")
    rest = (
        (conv_windows(2, x, weight, bias, stride=1, padding=0, dilation=1, groups=1), 1)
        if convolves
        else ()
    )
    rest = (*rest, None) if name == "conv_relu" else rest
    for choice in choices(backend):
        with use_kernels(choice):
            function = op.prepare(x, weight, bias, *rest)
            function(x)
            wide[...] = wide * -0.5
            long[...] = long + 1.0
            with use_kernels("reference"):
                expected, _ = op(x, weight, bias, *rest, keep=False)
            agree(backend, function(x), backend.host(expected), x)


@pytest.mark.parametrize("relu", [False, True])
def test_a_prepared_convolution_takes_little_memory(backend: Here, relu: bool):
    """All of its columns at once would be 72 MiB: then it is better not prepared."""
    x = backend.array(np.zeros((8, 64, 64, 64)), "float32")
    weight = backend.array(np.zeros((1, 64, 3, 3)), "float32")
    windows = Windows.of((64, 64), 3, padding=1)
    for choice in choices(backend):
        plan = workspace.Plan()
        with use_kernels(choice), workspace.planning(plan):
            if relu:
                conv_relu.prepare(x, weight, None, windows, 1, None)
            else:
                conv.prepare(x, weight, None, windows, 1)
        assert plan.size < 20 << 20
