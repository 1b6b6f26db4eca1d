"""Convolution and its gradients against loops, SciPy and PyTorch, on drawn geometries, layouts and
bad arguments."""

import tracemalloc
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn.backends.numpy import columns
from portacnn.errors import ArgumentError, ArrayError, ShapeError, StateError
from portacnn.ops import avg_pool2d, conv2d, conv2d_backward, conv_transpose2d, max_pool2d
from portacnn.ops.windows import Windows
from support import oracles
from support.checks import (
    DTYPES,
    LAYOUTS,
    agree,
    gradient_agrees,
    laid_out,
    mixtures,
    normal,
    pieces_of,
    refuses,
    refuses_integers_and_lists,
    refuses_mixed,
    untouched,
    with_each_kernel,
)
from support.matrix import Here, backends, needs


@dataclass(frozen=True)
class Case:
    """One convolution: sizes, and the options as a caller writes them."""

    n: int
    cg: int  # channels in a group
    og: int  # outputs of a group
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1
    bias: bool = True

    def options(self) -> dict[str, Any]:
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    def plain(self) -> tuple:
        """(stride, pads, dilation, groups), every one written out for both axes."""
        stride, dilation = (
            v if isinstance(v, tuple) else (v, v) for v in (self.stride, self.dilation)
        )
        return (
            stride,
            oracles.pads_of(self.padding, self.size, self.kernel, stride, dilation),
            dilation,
            self.groups,
        )

    def arrays(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        weight = normal(self.og * self.groups, self.cg, *self.kernel, seed=seed + 1)
        bias = normal(len(weight), seed=seed + 2) if self.bias else None
        return normal(self.n, self.cg * self.groups, *self.size, seed=seed), weight, bias


CASES = {
    "plain": Case(2, 2, 3, (5, 6), (3, 3)),
    "1x1": Case(2, 3, 2, (3, 4), (1, 1)),
    "5x5, as SimpleConvNet": Case(2, 1, 3, (7, 7), (5, 5)),
    "even kernel, same": Case(1, 2, 2, (5, 4), (2, 4), padding="same"),
    "stride runs past the end": Case(2, 1, 2, (6, 8), (3, 3), stride=(2, 3)),
    "stride, pads per axis": Case(2, 2, 1, (5, 5), (3, 2), stride=2, padding=(1, 2)),
    "asymmetric pads": Case(2, 2, 2, (4, 5), (3, 3), padding=((0, 2), (3, 1))),
    "same with stride": Case(1, 2, 2, (5, 6), (3, 3), stride=2, padding="same"),
    "dilation": Case(2, 1, 2, (7, 8), (3, 2), dilation=(2, 3), padding=1),
    "groups": Case(2, 2, 1, (4, 4), (2, 2), groups=3),
    "depthwise, no bias": Case(2, 1, 2, (5, 5), (3, 3), padding=1, groups=3, bias=False),
    "padding wider than the input": Case(1, 1, 1, (1, 2), (2, 2), padding=3),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@st.composite
def drawn(draw: st.DrawFn) -> Case:
    both = lambda low, high: st.integers(low, high) | st.tuples(*[st.integers(low, high)] * 2)  # noqa: E731
    kernel = draw(st.tuples(*[st.integers(1, 3)] * 2))
    stride, dilation = draw(both(1, 3)), draw(both(1, 2))
    pair = st.tuples(st.integers(0, 2), st.integers(0, 2))
    padding = draw(both(0, 2) | st.tuples(pair, pair) | st.sampled_from(["valid", "same"]))
    spread = dilation if isinstance(dilation, tuple) else (dilation, dilation)
    pads = ((0, 0), (0, 0)) if padding == "same" else oracles.pads_of(padding, (), kernel, (), ())
    size = []
    for k, d, (before, after) in zip(kernel, spread, pads, strict=True):
        least = 1 if padding == "same" else max(1, d * (k - 1) + 1 - before - after)
        size.append(draw(st.integers(least, least + 4)))
    n, cg, og, groups = (draw(st.integers(1, high)) for high in (2, 2, 2, 3))
    return Case(
        n, cg, og, tuple(size), kernel, stride, padding, dilation, groups, draw(st.booleans())
    )


def check(here: Here, case: Case, dtype: str, layouts: tuple[str, str, str], seed: int = 0) -> None:
    """Values and gradients against the loops; arrays left alone; library, device and dtype as they
    came."""
    x, weight, bias = case.arrays(seed)
    expected = oracles.conv(x, weight, bias, *case.plain())
    dy = normal(*expected.shape, seed=seed + 3)
    gradients = oracles.conv_gradients(x, weight, dy, *case.plain())
    xs, ws, dys = (
        laid_out(here, a, dtype, layout) for a, layout in zip((x, weight, dy), layouts, strict=True)
    )
    bs = None if bias is None else here.array(bias, dtype)
    with untouched(here, xs, ws, bs, dys):
        y, cache = conv2d(xs, ws, bs, **case.options())
        dx, dweight, dbias = conv2d_backward(dys, cache)
    agree(here, y, expected, xs)
    agree(here, dx, gradients[0], xs)
    agree(here, dweight, gradients[1], xs)
    if bs is None:
        assert dbias is None
    else:
        agree(here, dbias, gradients[2], xs)


@pytest.mark.parametrize("dtype", DTYPES)
@cases
@with_each_kernel
def test_values_and_gradients_are_correct(backend: Here, case: Case, dtype: str):
    check(backend, case, dtype, ("packed",) * 3)


@settings(max_examples=25)
@given(
    case=drawn(), dtype=st.sampled_from(DTYPES), layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3)
)
@with_each_kernel
def test_drawn_arguments_agree_with_the_reference(
    backend: Here, case: Case, dtype: str, layouts: tuple[str, str, str]
):
    check(backend, case, dtype, layouts, seed=5)


@pytest.mark.slow
@settings(max_examples=300)
@given(
    case=drawn(), dtype=st.sampled_from(DTYPES), layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3)
)
@with_each_kernel
def test_many_drawn_arguments_agree_with_the_reference(
    backend: Here, case: Case, dtype: str, layouts: tuple[str, str, str]
):
    check(backend, case, dtype, layouts, seed=7)


def by_scipy(
    case: Case, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, dy: np.ndarray
) -> list:
    """Values only: correlate the padded image with the spread kernel, then take every stride-th."""
    signal = pytest.importorskip("scipy.signal", reason="SciPy is the oracle")
    stride, pads, dilation, groups = case.plain()
    spread = np.zeros(
        (*weight.shape[:2], *(d * (k - 1) + 1 for d, k in zip(dilation, case.kernel, strict=True)))
    )
    spread[:, :, :: dilation[0], :: dilation[1]] = weight
    padded, y = np.pad(x, ((0, 0), (0, 0), *pads)), np.zeros(dy.shape)
    for n, o in np.ndindex(dy.shape[:2]):
        first = o // (len(weight) // groups) * weight.shape[1]
        for c in range(weight.shape[1]):
            whole = signal.correlate2d(padded[n, first + c], spread[o, c], mode="valid")
            y[n, o] += whole[:: stride[0], :: stride[1]]
    return [y if bias is None else y + bias[:, None, None]]


def by_torch(
    case: Case, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, dy: np.ndarray
) -> list:
    """Values and, by autograd, gradients."""
    import torch

    stride, ((top, bottom), (left, right)), dilation, groups = case.plain()
    leaves = [None if a is None else torch.tensor(a, requires_grad=True) for a in (x, weight, bias)]
    padded = torch.nn.functional.pad(leaves[0], (left, right, top, bottom))
    y = torch.nn.functional.conv2d(padded, leaves[1], leaves[2], stride, 0, dilation, groups)
    y.backward(torch.tensor(dy))
    return [y.detach().numpy(), *(leaf.grad.numpy() for leaf in leaves if leaf is not None)]


@pytest.mark.parametrize("oracle", [by_scipy, pytest.param(by_torch, marks=needs("torch"))])
@cases
@with_each_kernel
def test_other_peoples_convolution(backend: Here, case: Case, oracle: Any):
    arrays = case.arrays(11)
    x, weight, bias = (None if a is None else backend.array(a) for a in arrays)
    y, cache = conv2d(x, weight, bias, **case.options())
    dy = normal(*y.shape, seed=12)
    results = [y, *conv2d_backward(backend.array(dy), cache)]
    for got, expected in zip(results, oracle(case, *arrays, dy), strict=False):
        agree(backend, got, expected, x)


@pytest.mark.parametrize("name", ["plain", "asymmetric pads", "dilation", "groups"])
@with_each_kernel
def test_gradients_agree_with_numerical_gradients(backend: Here, name: str):
    case = CASES[name]
    hosts = [a[:1] if i == 0 else a for i, a in enumerate(case.arrays(21))]
    arrays = [backend.array(a) for a in hosts]
    y, cache = conv2d(*arrays, **case.options())
    dy = backend.array(normal(*y.shape, seed=22))
    for i, gradient in enumerate(conv2d_backward(dy, cache)):

        def loss(a, i=i):
            changed = [*arrays[:i], a, *arrays[i + 1 :]]
            return backend.xp.sum(conv2d(*changed, **case.options(), keep=False)[0] * dy)

        gradient_agrees(backend, gradient, loss, hosts[i])


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("name", ["plain", "1x1", "asymmetric pads", "groups"])
@with_each_kernel
def test_any_memory_layout_is_accepted(backend: Here, name: str, layout: str):
    for layouts in mixtures(layout):
        check(backend, CASES[name], "float64", layouts, seed=31)


@pytest.mark.parametrize("room", [1, 1500, 6000])
@backends("numpy", "numpy-readonly")
@with_each_kernel
def test_convolutions_in_pieces_agree_with_whole_ones(backend: Here, room: int):
    """Of one output row, and of a few that do not divide the output; real ones would hold all these
    cases at once."""
    with pieces_of(room):
        for case in CASES.values():
            check(backend, case, "float64", ("packed", "batch_last", "stepped"), seed=41)


@pytest.mark.parametrize("text", ["0", "-1", "half", "1.5"])
def test_the_room_for_a_tile_is_a_variable(text: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PORTACNN_TILE_KIB", text)
    columns.tile_bytes.cache_clear()
    refuses(
        ArgumentError,
        "PORTACNN_TILE_KIB",
        "whole number above 0",
        repr(text),
        call=columns.tile_bytes,
    )
    monkeypatch.setenv("PORTACNN_TILE_KIB", "3")
    assert columns.tile_bytes() == 3072
    monkeypatch.delenv("PORTACNN_TILE_KIB")
    columns.tile_bytes.cache_clear()
    assert columns.tile_bytes() == 512 << 10
    columns.tile_bytes.cache_clear()


@with_each_kernel
def test_a_gradient_that_is_one_number_broadcast(backend: Here):
    x, weight = (laid_out(backend, a) for a in (normal(2, 2, 4, 4), normal(3, 2, 3, 3)))
    y, cache = conv2d(x, weight)
    one = backend.array(np.ones((1, 1, 1, 1)))
    dx, dweight, _ = conv2d_backward(backend.xp.broadcast_to(one, y.shape), cache)
    dx2, dweight2, _ = conv2d_backward(backend.array(np.ones(y.shape)), cache)
    agree(backend, dx, backend.host(dx2), x)
    agree(backend, dweight, backend.host(dweight2), x)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("name", ["plain", "asymmetric pads", "groups"])
@with_each_kernel
def test_batches_of_one_and_of_none_are_accepted(backend: Here, name: str, n: int):
    case = CASES[name]
    x, weight, bias = (backend.array(a, "float32") for a in case.arrays())
    y, cache = conv2d(x[:n, ...], weight, bias, **case.options())
    whole, _ = conv2d(x, weight, bias, **case.options())
    agree(backend, y, backend.host(whole)[:n], x)
    dx, dweight, dbias = conv2d_backward(y, cache)
    assert tuple(dx.shape) == (n, *x.shape[1:])
    assert (tuple(dweight.shape), tuple(dbias.shape)) == (tuple(weight.shape), tuple(bias.shape))
    if n == 0:
        agree(backend, dweight, np.zeros(weight.shape), x)
        agree(backend, dbias, np.zeros(bias.shape), x)


@pytest.mark.parametrize("size", [(4, 7), (5, 6), (1, 1)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_same_gives_the_size_over_the_stride(backend: Here, size: tuple[int, int], stride: int):
    x, weight = backend.array(normal(1, 1, *size)), backend.array(normal(1, 1, 3, 2))
    y, _ = conv2d(x, weight, stride=stride, padding="same")
    assert tuple(y.shape[2:]) == tuple(-(-n // stride) for n in size)


@with_each_kernel
def test_numbers_may_be_numpys_and_sequences_lists(backend: Here):
    x, weight = backend.array(normal(1, 1, 5, 6)), backend.array(normal(1, 1, 2, 2))
    y, _ = conv2d(
        x, weight, stride=[np.int64(2), 1], padding=[[1, 2], [0, 1]], dilation=np.int64(1)
    )
    expected, _ = conv2d(x, weight, stride=(2, 1), padding=((1, 2), (0, 1)))
    agree(backend, y, backend.host(expected), x)


@with_each_kernel
def test_what_is_not_needed_is_not_made(backend: Here):
    x, weight, bias = (backend.array(a) for a in CASES["plain"].arrays())
    y, cache = conv2d(x, weight, bias)
    quick, nothing = conv2d(x, weight, bias, keep=False)
    assert nothing is None
    agree(backend, quick, backend.host(y), x)
    dx, dweight, dbias = conv2d_backward(y, cache, need_dx=False)
    _, dweight2, dbias2 = conv2d_backward(y, cache)
    assert dx is None
    agree(backend, dweight, backend.host(dweight2), x)
    agree(backend, dbias, backend.host(dbias2), x)


def test_a_backward_wants_its_own_cache(backend: Here):
    x = backend.array(normal(1, 1, 3, 3))
    y, cache = avg_pool2d(x, 1)
    refuses(StateError, "keep=True", call=lambda: conv2d_backward(y, None))
    refuses(StateError, "conv", "avg_pool", call=lambda: conv2d_backward(y, cache))


X, W = normal(2, 4, 5, 6), normal(6, 4, 3, 3)


@pytest.mark.parametrize(
    ("kind", "words", "x", "weight", "bias", "options"),
    [
        (ShapeError, ("height x width", "got 3 axes", "4x5x6"), X[0], W, None, {}),
        (ShapeError, ("(O, C/groups, height x width)", "(4, 3, 3)"), X, W[0], None, {}),
        (ShapeError, ("expected 3 input channels", "got 4"), X, W[:, :3], None, {}),
        (ShapeError, ("expected 8 input channels", "got 4"), X, W, None, {"groups": 2}),
        (ShapeError, ("6 output channels", "4 groups"), X, W[:, :1], None, {"groups": 4}),
        (ShapeError, ("bias of shape (6,)", "(5,)"), X, W, normal(5), {}),
        (ShapeError, ("kernel 3x3", "input 2x6"), X[:, :, :2], W, None, {}),
        (
            ShapeError,
            ("kernel 3x3", "input 1x2", "padded to 2x4"),
            X[:, :, :1, :2],
            W,
            None,
            {"padding": ((0, 1), (1, 1))},
        ),
        (ShapeError, ("kernel 3x3", "7x7", "input 5x6"), X, W, None, {"dilation": 3}),
        (ShapeError, ("input 0x6",), X[:, :, :0], W, None, {"padding": 3}),
        (ArgumentError, ("stride", "at least 1", "-1"), X, W, None, {"stride": -1}),
        (ArgumentError, ("stride", "at least 1", "(1, 0)"), X, W, None, {"stride": (1, 0)}),
        (ArgumentError, ("stride", "2 of them", "(1, 1, 1)"), X, W, None, {"stride": (1, 1, 1)}),
        (ArgumentError, ("stride", "whole", "1.5"), X, W, None, {"stride": 1.5}),
        (ArgumentError, ("dilation", "at least 1", "0"), X, W, None, {"dilation": 0}),
        (ArgumentError, ("padding", "at least 0", "-2"), X, W, None, {"padding": -2}),
        (
            ArgumentError,
            ("padding", "at least 0", "(0, -1)"),
            X,
            W,
            None,
            {"padding": ((1, 1), (0, -1))},
        ),
        (
            ArgumentError,
            ("padding", '"valid"', '"same"', "'full'"),
            X,
            W,
            None,
            {"padding": "full"},
        ),
    ],
)
def test_wrong_arguments_are_refused(backend: Here, kind, words, x, weight, bias, options):
    x, weight, bias = (None if a is None else backend.array(a) for a in (x, weight, bias))
    refuses(kind, "conv2d: ", *words, call=lambda: conv2d(x, weight, bias, **options))


@pytest.mark.parametrize("groups", [0, -1, 1.5])
def test_a_group_count_without_a_meaning(backend: Here, groups: Any):
    x, weight = backend.array(X), backend.array(W)
    refuses(ArgumentError, "groups", str(groups), call=lambda: conv2d(x, weight, groups=groups))


def test_an_error_does_not_depend_on_earlier_calls(backend: Here):
    x, weight = backend.array(X), backend.array(W)
    conv2d(x, weight, stride=2)
    refuses(ArgumentError, "stride", "2.0", call=lambda: conv2d(x, weight, stride=2.0))


def test_mixed_arrays_are_refused(backend: Here):
    refuses_mixed(backend, "conv2d: ", conv2d, X, W)
    weight = backend.array(W, "float32")
    refuses_mixed(backend, "conv2d: ", lambda x, bias: conv2d(x, weight, bias), X, normal(6))


def test_integers_and_lists(backend: Here):
    weight = backend.array(W, "float32")
    refuses_integers_and_lists(backend, "conv2d: ", lambda x: conv2d(x, weight), X)
    x = backend.array(X, "float32")
    refuses(ArrayError, "expected an array", "list", call=lambda: conv2d(x, W.tolist()))
    refuses(ArrayError, "expected an array", "list", call=lambda: conv2d(x, weight, [0.0] * 6))


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"stride": 10**7}, {"stride": 3 * 10**9}, {"stride": 2**62}, {"stride": 10**6,
    "padding": 10**6},
     {"dilation": 10**5, "padding": 10**5, "stride": 10**5}],
)  # fmt: skip
@with_each_kernel
def test_long_strides_take_no_memory(backend: Here, options: dict[str, int]):
    """Of ones under a kernel of ones: as many as the windows see, and all of it with less than a
    MiB."""
    x, weight = (
        backend.array(np.ones((2, 1, 10, 10)), "float32"),
        backend.array(np.ones((1, 1, 3, 3)), "float32"),
    )
    pad, stride, dilation = options.get("padding", 0), options["stride"], options.get("dilation", 1)
    out = (10 + 2 * pad - 2 * dilation - 1) // stride + 1
    seen = [sum(0 <= o * stride + k * dilation - pad < 10 for k in range(3)) for o in range(out)]
    # what is compiled, and remembered, is no part of it
    conv2d_backward(*conv2d(x, weight))
    avg_pool2d(x, 3, divisor_override=1)
    max_pool2d(x, 3)
    conv_transpose2d(x[:, :, :1, :1], weight)
    tracemalloc.start()
    try:
        y, cache = conv2d(x, weight, **options)
        dx, dweight, _ = conv2d_backward(y, cache)
        mean, _ = avg_pool2d(x, 3, stride=stride, divisor_override=1)
        best, _ = max_pool2d(x, 3, stride=stride)
        back, _ = conv_transpose2d(x[:, :, :1, :1], weight, stride=stride)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 1 << 20
    agree(backend, y, np.tile(np.outer(seen, seen), (2, 1, 1, 1)), x)
    assert backend.host(dx).sum() == pytest.approx((backend.host(y) * np.outer(seen, seen)).sum())
    assert backend.host(dweight).sum() == pytest.approx(
        (backend.host(y) * np.outer(seen, seen)).sum()
    )
    agree(backend, mean, np.full((2, 1, 1, 1), 9.0), x)
    agree(backend, best, np.ones((2, 1, 1, 1)), x)
    agree(backend, back, np.ones((2, 1, 3, 3)), x)


@with_each_kernel
def test_more_numbers_than_32_bits_count(backend: Here):
    """They take no memory here, and those that no window sees are not to be copied."""
    if backend.backend.name == "array_api_strict":
        return  # its arrays may be copied at each step
    one = backend.xp.ones((1, 1, 1, 1), dtype=backend.xp.float32, device=backend.backend.device)
    x = backend.xp.broadcast_to(one, (1, 1, 1, 2**31))
    y, cache = conv2d(x, backend.array(np.ones((1, 1, 1, 2)), "float32"), stride=2**27)
    agree(backend, y, np.full((1, 1, 1, 16), 2.0), x)
    _, dweight, _ = conv2d_backward(y, cache, need_dx=False)
    agree(backend, dweight, np.full((1, 1, 1, 2), 32.0), x)
    agree(backend, max_pool2d(x, (1, 2), stride=2**27, keep=False)[0], np.ones((1, 1, 1, 16)), x)
    agree(backend, avg_pool2d(x, (1, 2), stride=2**27, keep=False)[0], np.ones((1, 1, 1, 16)), x)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: conv2d(x, w, padding=10**15),
        lambda x, w: conv_transpose2d(x, w, stride=3 * 10**9),
    ],
)
def test_more_than_any_memory_holds(backend: Here, call: Any):
    x, weight = (
        backend.array(np.ones((1, 1, 5, 5)), "float32"),
        backend.array(np.ones((1, 1, 3, 3)), "float32"),
    )
    refuses(ArgumentError, "conv", "memory", call=lambda: call(x, weight))


def test_shapes_are_worked_out_without_listing_taps():
    windows = Windows.of((4000, 4000), 2000, 2000, 1000)
    assert windows.out == (3, 3)
    assert not windows.covers
    assert not windows.blind
    assert "taps" not in vars(windows)  # four million of them
