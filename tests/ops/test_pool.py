"""Pooling and its gradients against loops and PyTorch: ties, padding, windows of any geometry."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from portacnn.errors import ArgumentError, ShapeError, StateError
from portacnn.ops import (
    adaptive_max_pool2d,
    adaptive_max_pool2d_backward,
    avg_pool2d,
    avg_pool2d_backward,
    max_pool2d,
    max_pool2d_backward,
)
from support import oracles
from support.checks import (
    DTYPES,
    LAYOUTS,
    agree,
    distinct,
    gradient_agrees,
    laid_out,
    mixtures,
    normal,
    refuses,
    refuses_integers_and_lists,
    untouched,
    with_each_kernel,
)
from support.matrix import Here, needs


@dataclass(frozen=True)
class Case:
    """One pooling: the shape, and the options as a caller writes them. ``dilation`` is for the
    maximum only."""

    shape: tuple[int, int, int, int]
    kernel: Any
    stride: Any = None
    padding: Any = 0
    dilation: Any = 1
    ceil_mode: bool = False
    count_include_pad: bool = True

    def plain(self) -> tuple:
        """(kernel, stride, pads, dilation, (OH, OW)), every one written out for both axes."""
        stride = self.kernel if self.stride is None else self.stride
        kernel, stride, dilation = (
            v if isinstance(v, tuple) else (v, v) for v in (self.kernel, stride, self.dilation)
        )
        pads = oracles.pads_of(self.padding, self.shape[2:], kernel, stride, dilation)
        out = tuple(
            oracles.output_count(*axis, self.ceil_mode)
            for axis in zip(self.shape[2:], kernel, stride, pads, dilation, strict=True)
        )
        return kernel, stride, pads, dilation, out

    def maximum(self, x: Any, **more: Any) -> tuple:
        options = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return max_pool2d(x, self.kernel, **options, ceil_mode=self.ceil_mode, **more)

    def mean(self, x: Any, **more: Any) -> tuple:
        options = {
            "stride": self.stride,
            "padding": self.padding,
            "count_include_pad": self.count_include_pad,
        }
        return avg_pool2d(x, self.kernel, **options, ceil_mode=self.ceil_mode, **more)


CASES = {
    "2x2, as SimpleConvNet": Case((2, 3, 4, 6), 2),
    "does not divide": Case((2, 1, 7, 5), 3),
    "does not divide, ceil": Case((2, 1, 7, 5), 3, ceil_mode=True),
    "overlapping": Case((1, 2, 6, 5), 3, 1),
    "gaps between windows": Case((1, 2, 7, 7), 2, 3),
    "padded": Case((2, 1, 5, 5), 3, 2, padding=1),
    "padded, not counted": Case((2, 1, 5, 5), 3, 2, padding=1, count_include_pad=False),
    "per axis": Case((1, 2, 6, 7), (3, 2), (2, 3), padding=(1, 0)),
    "asymmetric pads": Case((1, 2, 5, 5), 3, 2, padding=((1, 0), (0, 1)), count_include_pad=False),
    "asymmetric pads, ceil": Case((1, 2, 5, 6), 3, 3, padding=((1, 0), (0, 1)), ceil_mode=True),
    "same": Case((1, 1, 5, 6), (2, 3), 2, padding="same"),
    "ceil over the padding's end": Case((1, 1, 6, 6), 3, 2, padding=1, ceil_mode=True),
    "ceil over the padding's end, not counted": Case(
        (1, 1, 6, 6), 3, 2, padding=1, ceil_mode=True, count_include_pad=False
    ),
    "a last window that would start in the padding": Case(
        (1, 1, 4, 4), 2, 3, padding=1, ceil_mode=True
    ),
    "dilation": Case((1, 2, 7, 8), (3, 2), 2, dilation=(2, 3), padding=(1, 0)),
    "the whole image": Case((2, 2, 3, 4), (3, 4)),
    "more taps than an int8 counts": Case((1, 1, 13, 12), (12, 11), 1),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@st.composite
def drawn(draw: st.DrawFn, dilations: int = 1) -> Case:
    both = lambda low, high: st.integers(low, high) | st.tuples(*[st.integers(low, high)] * 2)  # noqa: E731
    kernel, dilation = draw(st.tuples(*[st.integers(1, 4)] * 2)), draw(both(1, dilations))
    spread = dilation if isinstance(dilation, tuple) else (dilation, dilation)
    half = [k // 2 for k in kernel]
    alike = st.integers(0, min(half)) | st.tuples(*(st.integers(0, most) for most in half))
    pairs = st.tuples(*(st.tuples(st.integers(0, most), st.integers(0, most)) for most in half))
    padding = draw(alike | pairs | st.sampled_from(["valid", "same"]))
    pads = ((0, 0), (0, 0)) if padding == "same" else oracles.pads_of(padding, (), kernel, (), ())
    size = []
    for k, d, (before, after) in zip(kernel, spread, pads, strict=True):
        least = 1 if padding == "same" else max(1, d * (k - 1) + 1 - before - after)
        size.append(draw(st.integers(least, least + 5)))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 2)), *size)
    return Case(
        shape,
        kernel,
        draw(st.none() | both(1, 4)),
        padding,
        dilation,
        draw(st.booleans()),
        draw(st.booleans()),
    )


def sees_the_input(case: Case) -> bool:
    """No window of which every tap lies in the padding: such a one has no maximum."""
    kernel, stride, pads, dilation, out = case.plain()
    return all(
        any(0 <= i * s + a * d - before < n for a in range(k))
        for n, k, s, (before, _), d, o in zip(
            case.shape[2:], kernel, stride, pads, dilation, out, strict=True
        )
        for i in range(o)
    )


def check_maximum(
    here: Here, case: Case, x: np.ndarray, dtype: str, layouts: tuple[str, str]
) -> None:
    kernel, stride, pads, dilation, out = case.plain()
    expected, chosen = oracles.max_pool(x, out, kernel, stride, pads, dilation)
    dy = normal(*expected.shape, seed=1)
    xs, dys = (laid_out(here, a, dtype, layout) for a, layout in zip((x, dy), layouts, strict=True))
    with untouched(here, xs, dys):
        y, cache = case.maximum(xs)
        dx = max_pool2d_backward(dys, cache)
    agree(here, y, expected, xs, tolerance=1e-6)  # a choice: what was rounded is the input
    agree(here, dx, oracles.routed(x.shape, chosen, dy), xs)


def check_mean(here: Here, case: Case, x: np.ndarray, dtype: str, layouts: tuple[str, str]) -> None:
    kernel, stride, pads, _, out = case.plain()
    dy = normal(*x.shape[:2], *out, seed=1)
    expected, shares = oracles.avg_pool(x, out, kernel, stride, pads, case.count_include_pad, None)
    xs, dys = (laid_out(here, a, dtype, layout) for a, layout in zip((x, dy), layouts, strict=True))
    with untouched(here, xs, dys):
        y, cache = case.mean(xs)
        dx = avg_pool2d_backward(dys, cache)
    agree(here, y, expected, xs)
    agree(here, dx, oracles.shared(x.shape, shares, dy), xs)


def without_dilation(case: Case) -> bool:
    return case.dilation == 1


@pytest.mark.parametrize("dtype", DTYPES)
@cases
@with_each_kernel
def test_values_and_gradients_are_correct(backend: Here, case: Case, dtype: str):
    check_maximum(backend, case, normal(*case.shape), dtype, ("packed", "packed"))
    if without_dilation(case):
        check_mean(backend, case, normal(*case.shape), dtype, ("packed", "packed"))


layouts_drawn = st.tuples(*[st.sampled_from(LAYOUTS)] * 2)


@settings(max_examples=25)
@given(
    case=drawn(dilations=3),
    dtype=st.sampled_from(DTYPES),
    layouts=layouts_drawn,
    levels=st.integers(1, 6),
)
@with_each_kernel
def test_maximum_drawn(
    backend: Here, case: Case, dtype: str, layouts: tuple[str, str], levels: int
):
    """With few levels there are many ties."""
    assume(sees_the_input(case))
    check_maximum(backend, case, np.floor(normal(*case.shape, seed=3) * levels), dtype, layouts)


@settings(max_examples=25)
@given(case=drawn(), dtype=st.sampled_from(DTYPES), layouts=layouts_drawn)
@with_each_kernel
def test_mean_drawn(backend: Here, case: Case, dtype: str, layouts: tuple[str, str]):
    check_mean(backend, case, normal(*case.shape, seed=3), dtype, layouts)


@pytest.mark.slow
@settings(max_examples=300)
@given(case=drawn(dilations=3), dtype=st.sampled_from(DTYPES), layouts=layouts_drawn)
@with_each_kernel
def test_many_drawn_arguments_agree_with_the_reference(
    backend: Here, case: Case, dtype: str, layouts: tuple[str, str]
):
    assume(sees_the_input(case))
    x = np.round(normal(*case.shape, seed=5) * 3)
    check_maximum(backend, case, x, dtype, layouts)
    if without_dilation(case):
        check_mean(backend, case, x, dtype, layouts)


symmetric = lambda case: all(before == after for before, after in case.plain()[2])  # noqa: E731


@needs("torch")
@pytest.mark.parametrize("case", [*filter(symmetric, CASES.values())], ids=str)
@with_each_kernel
def test_pooling_agrees_with_pytorch(backend: Here, case: Case):
    import torch

    kernel, stride, pads, dilation, _ = case.plain()
    host = np.round(normal(*case.shape, seed=2) * 2)  # ties
    x, padding = backend.array(host), [before for before, _ in pads]
    F = torch.nn.functional
    ours = [(case.maximum, max_pool2d_backward)]
    theirs = [lambda leaf: F.max_pool2d(leaf, kernel, stride, padding, dilation, case.ceil_mode)]
    if without_dilation(case):
        ours.append((case.mean, avg_pool2d_backward))
        theirs.append(
            lambda leaf: F.avg_pool2d(
                leaf, kernel, stride, padding, case.ceil_mode, case.count_include_pad
            )
        )
    for (forward, backward), torchs in zip(ours, theirs, strict=True):
        leaf = torch.tensor(host, requires_grad=True)
        expected = torchs(leaf)
        dy = normal(*expected.shape, seed=6)
        expected.backward(torch.tensor(dy))
        y, cache = forward(x)
        agree(backend, y, expected.detach().numpy(), x)
        agree(backend, backward(backend.array(dy), cache), leaf.grad.numpy(), x)


@pytest.mark.parametrize(
    "name", ["overlapping", "asymmetric pads", "ceil over the padding's end, not counted"]
)
@with_each_kernel
def test_gradients_agree_with_numerical_gradients(backend: Here, name: str):
    case = CASES[name]
    host = distinct(1, 1, *case.shape[2:])
    for forward, backward in (
        (case.maximum, max_pool2d_backward),
        (case.mean, avg_pool2d_backward),
    ):
        y, cache = forward(backend.array(host))
        dy = backend.array(normal(*y.shape, seed=4))
        dx = backward(dy, cache)
        gradient_agrees(
            backend, dx, lambda a, f=forward, dy=dy: backend.xp.sum(f(a, keep=False)[0] * dy), host
        )


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize(
    "name", ["2x2, as SimpleConvNet", "padded, not counted", "asymmetric pads, ceil"]
)
@with_each_kernel
def test_any_memory_layout_is_accepted(backend: Here, name: str, layout: str):
    x = np.round(normal(*CASES[name].shape, seed=8) * 2)
    for layouts in mixtures(layout, 2):
        check_maximum(backend, CASES[name], x, "float64", layouts)
        check_mean(backend, CASES[name], x, "float64", layouts)


@with_each_kernel
def test_of_equal_maxima_the_first_takes_the_gradient(backend: Here):
    x = backend.array(np.ones((1, 1, 4, 4)))
    _, cache = max_pool2d(x, 3, stride=1)
    dx = max_pool2d_backward(backend.array([[[[1.0, 10.0], [100.0, 1000.0]]]]), cache)
    expected = np.zeros((1, 1, 4, 4))
    expected[0, 0, :2, :2] = [[1, 10], [100, 1000]]
    agree(backend, dx, expected, x, tolerance=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [1, ((1, 0), (0, 1)), "same"])
@with_each_kernel
def test_padding_is_nobodys_maximum(backend: Here, padding: Any, dtype: str):
    least = -3e38 if dtype == "float32" else -1e308
    for case in (
        Case((1, 1, 4, 5), 3, 2, padding),
        Case((1, 1, 4, 5), 3, 2, padding, ceil_mode=True),
    ):
        check_maximum(backend, case, np.full(case.shape, least), dtype, ("packed", "packed"))
        y, _ = case.maximum(backend.array(np.full(case.shape, -np.inf), dtype))
        assert np.all(backend.host(y) == -np.inf)


@pytest.mark.parametrize("dtype", DTYPES)
@with_each_kernel
def test_one_maximum_of_minus_infinity(backend: Here, dtype: str):
    x = np.full((1, 1, 4, 4), -np.inf)
    check_maximum(backend, Case(x.shape, 2), x, dtype, ("packed", "packed"))


@with_each_kernel
def test_the_gradient_of_minus_infinity_stays_inside(backend: Here):
    x = np.full((1, 1, 2, 2), -np.inf)
    check_maximum(backend, Case(x.shape, 2, 2, padding=1), x, "float64", ("packed", "packed"))


@with_each_kernel
def test_nan_comes_through(backend: Here):
    host = normal(1, 1, 4, 4)
    host[0, 0, 1, 2] = np.nan
    x = backend.array(host)
    seen = np.array([[[[False, True], [False, False]]]])
    for op in (max_pool2d, avg_pool2d):
        np.testing.assert_array_equal(np.isnan(backend.host(op(x, 2)[0])), seen)


@pytest.mark.parametrize("kernel", [2, 3, (2, 3)])
@with_each_kernel
def test_a_cache_can_be_used_again(backend: Here, kernel: Any):
    """Pairs too, whose winners are masks."""
    x = backend.array(normal(2, 3, 12, 12))
    for pool, back in ((max_pool2d, max_pool2d_backward), (avg_pool2d, avg_pool2d_backward)):
        y, cache = pool(x, kernel)
        first = backend.host(back(y, cache))
        agree(backend, back(y, cache), first, x)


@with_each_kernel
def test_of_several_nan_the_last_takes_the_gradient(backend: Here):
    host = np.arange(16.0).reshape(1, 1, 2, 8)
    host[0, 0, 0, 1] = host[0, 0, 1, 0] = host[0, 0, 0, 4] = np.nan
    host[0, 0, :, 6:] = np.nan
    expected = np.zeros(host.shape)
    expected[0, 0, [1, 1, 0, 1], [0, 3, 4, 7]] = [1.0, 2.0, 3.0, 4.0]
    x, dy = backend.array(host), backend.array(np.array([[[[1.0, 2.0, 3.0, 4.0]]]]))
    for pool, back, size in (
        (max_pool2d, max_pool2d_backward, 2),
        (adaptive_max_pool2d, adaptive_max_pool2d_backward, (1, 4)),
    ):
        agree(backend, back(dy, pool(x, size)[1]), expected, x)


@with_each_kernel
def test_padding_up_to_half_of_the_dilated_kernel(backend: Here):
    case = Case((1, 1, 7, 7), 3, 1, padding=2, dilation=2)
    check_maximum(backend, case, normal(*case.shape), "float64", ("packed", "packed"))


def test_no_window_sees_nothing_but_padding(backend: Here):
    x = backend.array(np.ones((1, 1, 1, 1)))
    refuses(
        ArgumentError,
        "max_pool2d: ",
        "padding",
        "3",
        call=lambda: max_pool2d(x, 2, stride=1, dilation=5, padding=3),
    )


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize(
    "name", ["2x2, as SimpleConvNet", "padded, not counted", "asymmetric pads, ceil"]
)
@with_each_kernel
def test_batches_of_one_and_of_none_are_accepted(backend: Here, name: str, n: int):
    case = CASES[name]
    x = backend.array(normal(3, *case.shape[1:]), "float32")
    for forward, backward in (
        (case.maximum, max_pool2d_backward),
        (case.mean, avg_pool2d_backward),
    ):
        whole, whole_cache = forward(x)
        y, cache = forward(x[:n, ...])
        agree(backend, y, backend.host(whole)[:n], x)
        agree(backend, backward(y, cache), backend.host(backward(whole, whole_cache))[:n], x)


@with_each_kernel
def test_nothing_is_kept_unasked(backend: Here):
    x = backend.array(normal(1, 2, 5, 5))
    for op, backward, name in (
        (max_pool2d, max_pool2d_backward, "max"),
        (avg_pool2d, avg_pool2d_backward, "avg"),
    ):
        other = {"max": avg_pool2d, "avg": max_pool2d}[name]
        y, cache = op(x, 3, stride=2, padding=1, keep=False)
        assert cache is None
        agree(backend, y, backend.host(op(x, 3, stride=2, padding=1)[0]), x)
        refuses(StateError, "keep=True", call=lambda b=backward, y=y: b(y, None))
        refuses(
            StateError,
            "max_pool",
            "avg_pool",
            call=lambda b=backward, y=y, other=other: b(y, other(x, 3)[1]),
        )


@pytest.mark.parametrize(
    ("kind", "words", "shape", "kernel", "options"),
    [
        (ShapeError, ("height x width", "got 3 axes", "2x5x6"), (2, 5, 6), 2, {}),
        (ShapeError, ("kernel 6x6", "input 5x6"), (1, 2, 5, 6), 6, {}),
        (
            ShapeError,
            ("kernel 6x6", "input 5x6"),
            (1, 2, 5, 6),
            6,
            {"ceil_mode": True, "stride": 1},
        ),
        (ShapeError, ("kernel 4x4", "input 1x1", "padded to 3x3"), (1, 2, 1, 1), 4, {"padding": 1}),
        (ArgumentError, ("kernel_size", "at least 1", "0"), (1, 2, 5, 6), 0, {}),
        (ArgumentError, ("kernel_size", "2 of them", "(2, 2, 2)"), (1, 2, 5, 6), (2, 2, 2), {}),
        (ArgumentError, ("stride", "at least 1", "-2"), (1, 2, 5, 6), 2, {"stride": -2}),
        (ArgumentError, ("padding", "at least 0", "-1"), (1, 2, 5, 6), 2, {"padding": -1}),
        (
            ArgumentError,
            ("(2, 2)", "half of the kernel 3"),
            (1, 2, 5, 6),
            3,
            {"padding": 2},
        ),
        (
            ArgumentError,
            ("(0, 2)", "half of the kernel 2"),
            (1, 2, 5, 6),
            2,
            {"padding": ((0, 0), (0, 2))},
        ),
    ],
)
def test_wrong_arguments_are_refused(backend: Here, kind, words, shape, kernel, options):
    x = backend.array(normal(*shape))
    refuses(kind, "max_pool2d: ", *words, call=lambda: max_pool2d(x, kernel, **options))
    refuses(kind, "avg_pool2d: ", *words, call=lambda: avg_pool2d(x, kernel, **options))


def test_integers_and_lists(backend: Here):
    refuses_integers_and_lists(
        backend, "max_pool2d: ", lambda x: max_pool2d(x, 2), normal(1, 1, 2, 2)
    )
    refuses_integers_and_lists(
        backend, "avg_pool2d: ", lambda x: avg_pool2d(x, 2), normal(1, 1, 2, 2)
    )


@needs("torch")
@settings(derandomize=True, max_examples=12)
@given(data=st.data())
@with_each_kernel
def test_the_gradient_goes_to_nan_as_in_pytorch(backend: Here, data: st.DataObject):
    """To the last of several in a window; of ordinary equals to the first."""
    import torch

    functional = torch.nn.functional
    size, kernel = (
        data.draw(st.tuples(*[st.integers(3, 8)] * 2)),
        data.draw(st.tuples(*[st.integers(1, 3)] * 2)),
    )
    stride = data.draw(st.just(kernel) | st.tuples(*[st.integers(1, 3)] * 2))
    padding, ceil_mode = data.draw(st.integers(0, min(kernel) // 2)), data.draw(st.booleans())
    output = data.draw(st.tuples(*[st.integers(1, 3)] * 2))
    host = np.round(
        normal(data.draw(st.sampled_from([1, 3, 9])), 2, *size, seed=data.draw(st.integers(0, 99)))
    )
    host[
        np.random.default_rng(data.draw(st.integers(0, 99))).random(host.shape)
        < data.draw(st.sampled_from([0.05, 0.5, 1]))
    ] = np.nan
    window = {"stride": stride, "padding": padding, "ceil_mode": ceil_mode}
    x = backend.array(host, "float32")
    for ours, backward, theirs in (
        (
            lambda x: max_pool2d(x, kernel, **window),
            max_pool2d_backward,
            lambda x: functional.max_pool2d(x, kernel, **window),
        ),
        (
            lambda x: adaptive_max_pool2d(x, output),
            adaptive_max_pool2d_backward,
            lambda x: functional.adaptive_max_pool2d(x, output),
        ),
    ):
        leaf = torch.tensor(host, dtype=torch.float32, requires_grad=True)
        expected = theirs(leaf)
        dy = normal(*expected.shape, seed=5)
        expected.backward(torch.tensor(dy, dtype=torch.float32))
        y, cache = ours(x)
        agree(backend, y, expected.detach().numpy(), x)
        agree(backend, backward(backend.array(dy, "float32"), cache), leaf.grad.numpy(), x)
