"""Every kernel that a backend brings on the CPU against the portable op, on drawn shapes: one
table, in which each has to stand.

Float32 agrees within 1e-5 of the largest number of a result, float64 within 1e-12. Where an op has
a backward, that is compared as well, with the same gradient.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from portacnn import ops
from portacnn.ops import use_kernels
from portacnn.ops.dispatch import OPS
from portacnn.ops.fused import (
    add_relu_backward,
    batch_norm_relu_backward,
    conv_relu_backward,
    linear_relu_backward,
)
from portacnn.ops.pool import pool_windows
from portacnn.ops.windows import Windows
from portacnn.runtime import resolve
from support.checks import DTYPES, choices, pieces_for, pieces_of
from support.matrix import Here

NUMPY = resolve("numpy")
LIMIT = {"float32": 1e-5, "float64": 1e-12}

Example = tuple[tuple, dict[str, Any]]
"""The arguments of one call of an op, arrays in float64."""


def batches() -> st.SearchStrategy[int]:
    """Of one vector and of several, whole and not."""
    return st.integers(1, 40) | st.sampled_from([1, 8, 15, 16, 17, 31, 32, 33, 40])


def numbers(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


seeds = st.integers(0, 99)


@st.composite
def geometry(draw: st.DrawFn) -> Windows:
    axes = draw(st.sampled_from([2, 2, 2, 1]))

    def each(low: int, high: int) -> tuple[int, ...]:
        return draw(st.tuples(*[st.integers(low, high)] * axes))

    kernel, stride, dilation = each(1, 5), each(1, 3), each(1, 2)
    pads = tuple(zip(each(0, 3), each(0, 3), strict=True))
    least = (
        max(1, d * (k - 1) + 1 - sum(p)) for k, d, p in zip(kernel, dilation, pads, strict=True)
    )
    return Windows.of(
        tuple(n + more for n, more in zip(least, each(0, 12), strict=True)),
        kernel,
        stride,
        pads,
        dilation,
    )


@st.composite
def convolution(draw: st.DrawFn) -> tuple:
    """x, weight, bias, windows, groups."""
    windows, seed, groups = draw(geometry()), draw(seeds), draw(st.sampled_from([1, 1, 1, 1, 2]))
    n, c, o = draw(batches()), draw(st.integers(1, 20)), draw(st.integers(1, 20))
    if groups > 1:
        c, o = c * groups, o * groups
    x, weight = (
        numbers(n, c, *windows.size, seed=seed),
        numbers(o, c // groups, *windows.kernel, seed=seed + 1),
    )
    return x, weight, draw(st.sampled_from([None, numbers(o, seed=seed + 2)])), windows, groups


@st.composite
def conv(draw: st.DrawFn) -> Example:
    return draw(convolution()), {"keep": True}


@st.composite
def pooling(draw: st.DrawFn, size: tuple[int, ...]) -> Windows:
    kernel = tuple(draw(st.integers(1, min(3, n))) for n in size)
    plain = draw(st.booleans())
    stride = kernel if plain else tuple(draw(st.integers(1, 4)) for _ in size)
    padding = int(not plain and min(kernel) > 1 and draw(st.booleans()))
    return pool_windows(size, kernel, stride, padding, 1, draw(st.booleans()))


@st.composite
def conv_relu(draw: st.DrawFn) -> Example:
    arguments = draw(convolution())
    return (*arguments, draw(st.none() | pooling(arguments[3].out))), {"keep": True}


@st.composite
def linear(draw: st.DrawFn) -> Example:
    n, f, o, seed = (
        draw(batches()),
        draw(st.integers(1, 200)),
        draw(st.integers(1, 60)),
        draw(seeds),
    )
    bias = draw(st.sampled_from([None, numbers(o, seed=seed + 2)]))
    return (numbers(n, f, seed=seed), numbers(o, f, seed=seed + 1), bias), {}


@st.composite
def max_pool(draw: st.DrawFn) -> Example:
    size = tuple(draw(st.integers(1, 13)) for _ in range(draw(st.integers(1, 3))))
    n, c = draw(batches()), draw(st.integers(1, 20))
    x = numbers(n, c, *size, seed=draw(seeds))
    # rounded: equal maxima
    return (np.round(x) if draw(st.booleans()) else x, draw(pooling(size))), {"keep": True}


@st.composite
def elementwise(draw: st.DrawFn) -> Example:
    n, shape = draw(batches()), draw(st.lists(st.integers(1, 13), max_size=3))
    x = numbers(n, *shape, seed=draw(seeds))
    return (3 * np.moveaxis(x, 0, -1) if draw(st.booleans()) else 3 * x,), {}


@st.composite
def batch_norm(draw: st.DrawFn) -> Example:
    """At least eight numbers a channel, and others than the gradient's: else there is nothing left
    of dx but its rounding.

    Several channels, as their gradients are sums: a single one may come near zero.
    """
    n, c, seed = max(8, draw(batches())), draw(st.integers(4, 20)), 1000 + draw(seeds)
    size = tuple(draw(st.integers(1, 13)) for _ in range(draw(st.integers(0, 2))))
    # The square of the last is more than float32 holds.
    x = (numbers(n, c, *size, seed=seed) + draw(st.sampled_from([0.0, 3.0]))) * draw(
        st.sampled_from([1.0, 1.0, 1.0, 1e25])
    )
    running = numbers(c, seed=seed + 1), 1.0 + np.abs(numbers(c, seed=seed + 2))
    affine = draw(
        st.sampled_from([(None, None), (numbers(c, seed=seed + 3), numbers(c, seed=seed + 4))])
    )
    return (x, *running, *affine), {"training": draw(st.booleans()), "momentum": 0.3, "eps": 1e-3}


@st.composite
def summands(draw: st.DrawFn) -> Example:
    n, shape, seed = draw(batches()), draw(st.lists(st.integers(1, 13), max_size=3)), draw(seeds)
    return ([numbers(n, *shape, seed=seed + i) for i in range(draw(st.integers(1, 3)))],), {}


@st.composite
def erf(draw: st.DrawFn) -> Example:
    """Beyond one piece, too."""
    return (
        3 * numbers(draw(batches()), draw(st.sampled_from([5, 1000, 3000])), seed=draw(seeds)),
    ), {}


@st.composite
def kept(draw: st.DrawFn) -> Example:
    rows, columns = draw(batches()), draw(st.sampled_from([1, 7, 400, 40000]))
    draws = np.random.default_rng(draw(seeds))
    words = (draws.integers(0, 1 << 32, rows).astype(np.int64) for _ in range(2))
    return (np.zeros(1), columns, *words, draw(st.integers(1, (1 << 32) - 1))), {}


@st.composite
def take_batch(draw: st.DrawFn) -> Example:
    n, c, seed = draw(batches()), draw(st.integers(1, 4)), draw(seeds)
    size = tuple(draw(st.integers(1, 13)) for _ in range(draw(st.integers(0, 2))))
    draws = np.random.default_rng(seed)
    images = draws.integers(0, 256, (n, c, *size)).astype("uint8")
    indices = draw(st.sampled_from([None, draws.integers(0, n, 2 * n)]))
    std = 1.0 + draws.random((c, *(1,) * len(size)))
    return (images, indices, draw(st.sampled_from([None, 100 * std])), 50 * std), {}


def update(states: int = 0, **fixed: Any) -> st.SearchStrategy[Example]:
    """Parameters, their gradients and ``states`` lists beside them, none of which is negative."""

    @st.composite
    def one(draw: st.DrawFn) -> Example:
        seed = draw(seeds)
        shapes = draw(st.lists(st.lists(st.integers(1, 20), max_size=3), min_size=1, max_size=4))
        lists = [[numbers(*shape, seed=seed + 10 * i) for shape in shapes] for i in range(2)]
        lists += [
            [np.asarray(np.abs(numbers(*shape, seed=seed + 20 + i))) for shape in shapes]
            for i in range(states)
        ]
        options = {name: draw(value) for name, value in fixed.items()}
        ok = draw(st.sampled_from([None, np.asarray(True), np.asarray(False)]))
        decay = draw(st.sampled_from([0.0, 0.1]))
        return tuple(lists), {"lr": 0.05, "weight_decay": decay, "ok": ok, **options}

    return one()


@st.composite
def rmsprop(draw: st.DrawFn) -> Example:
    (p, g, square, mean, velocity), options = draw(
        update(3, alpha=st.just(0.9), eps=st.just(1e-3), momentum=st.just(0.5))
    )
    mean = [np.tanh(m, out=m) for m in mean]
    square = [np.add(s, 1, out=s) for s in square]  # the mean square is above the mean's square
    return (
        p,
        g,
        square,
        draw(st.sampled_from([None, mean])),
        draw(st.sampled_from([None, velocity])),
    ), options


@st.composite
def clipped(draw: st.DrawFn) -> Example:
    (_, grads), _ = draw(update())
    return (grads, draw(st.sampled_from([0.5, 1e6]))), {}


rate = st.sampled_from([0.0, 0.9])
EXAMPLES: dict[str, st.SearchStrategy[Example]] = {
    "conv": conv(),
    "conv_relu": conv_relu(),
    "linear": linear(),
    "linear_relu": linear(),
    "relu": elementwise(),
    "batch_norm": batch_norm(),
    "batch_norm_relu": batch_norm(),
    "add": summands(),
    "add_relu": summands(),
    "max_pool": max_pool(),
    "erf": erf(),
    "kept": kept(),
    "take_batch": take_batch(),
    "sgd_update": update(),
    "momentum_update": update(
        1, momentum=rate, dampening=rate, nesterov=st.booleans(), first=st.booleans()
    ),
    "adagrad_update": update(1, eps=st.just(1e-7)),
    "rmsprop_update": rmsprop(),
    "adam_update": update(
        2,
        beta1=st.just(0.9),
        beta2=st.just(0.999),
        eps=st.just(1e-8),
        step=st.integers(1, 9),
        decoupled=st.booleans(),
    ),
    "clip_by_global_norm": clipped(),
}
KERNELS = sorted({name for table in NUMPY.kernels.values() for name in table})


def test_every_kernel_is_compared():
    """Put what draws its arguments into EXAMPLES."""
    assert set(KERNELS) <= set(EXAMPLES)
    assert set(EXAMPLES) <= set(KERNELS)


def _each(value: Any, change: Callable[[np.ndarray], np.ndarray]) -> Any:
    """``value`` with its arrays of floating point changed, those in lists and tuples too; all
    others are copied."""
    if isinstance(value, np.ndarray):
        return change(value) if value.dtype.kind == "f" else value.copy()
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_each(item, change) for item in value)
    return value


def _arrays(value: Any) -> list[np.ndarray]:
    if isinstance(value, np.ndarray | np.generic):
        return [np.asarray(value)]
    return (
        [array for item in value for array in _arrays(item)]
        if isinstance(value, list | tuple)
        else []
    )


def results(name: str, example: Example, dtype: str, last: bool, seed: int) -> list[np.ndarray]:
    """What a call gives back and writes into its arguments, what its backward gives, and what the
    prepared op gives.

    ``last``: the batch lies last.
    """

    def as_given(array: np.ndarray) -> np.ndarray:
        own = array.astype(dtype)
        return (
            np.moveaxis(np.moveaxis(own, 0, -1).copy(), -1, 0) if last and array.ndim > 1 else own
        )

    arguments, options = _each(example[0], as_given), example[1]
    op = OPS[name]
    result = op(*arguments, **options)
    if op.portable_backward is None:
        return [*_arrays(result), *_arrays(arguments)]
    y, cache = result
    dy = as_given(numbers(*y.shape, seed=seed))
    found = [y, *_arrays(BACKWARDS[name](dy, cache))]
    if name in NEED_DX:
        _, cache = op(*arguments, **options)
        dx, *others = BACKWARDS[name](dy, cache, need_dx=False)
        assert dx is None
        found += _arrays(others)
    quick, nothing = op(*arguments, **{**options, "keep": False})
    assert nothing is None
    found = [*found, quick, *_arrays(arguments)]
    x, *others = arguments
    if not isinstance(x, np.ndarray):
        return found
    prepared = op.prepare(
        x, *others, **{word: value for word, value in options.items() if word != "keep"}
    )
    prepared(as_given(numbers(*x.shape, seed=seed)))  # of which nothing may be left
    return [*found, prepared(x)]


BACKWARDS = {
    "conv": ops.conv2d_backward,
    "conv_relu": conv_relu_backward,
    "linear": ops.linear_backward,
    "linear_relu": linear_relu_backward,
    "relu": ops.relu_backward,
    "batch_norm": ops.batch_norm_backward,
    "batch_norm_relu": batch_norm_relu_backward,
    "add_relu": add_relu_backward,
    "max_pool": ops.max_pool2d_backward,
}
NEED_DX = ("conv", "conv_relu", "linear", "linear_relu", "batch_norm", "batch_norm_relu")


def terms(name: str, number: int, example: Example, seed: int) -> float:
    """What the terms of a batch norm's dweight or running mean, which may cancel, add up to in
    absolute value; else 0."""
    if not name.startswith("batch_norm"):
        return 0.0
    (x, *statistics, weight, _), options = example
    axes, affine = (0, *range(2, x.ndim)), weight is not None
    if options["training"] and number == (8 if affine else 4):
        return float(options["momentum"] * np.abs(x).mean(axes).max())
    if not affine or number not in (2, 4):
        return 0.0
    mean, var = (x.mean(axes), x.var(axes)) if options["training"] else statistics
    mean, var = (a.reshape(1, -1, *(1,) * (x.ndim - 2)) for a in (mean, var))
    normal = (x - mean) / np.sqrt(var + options["eps"])
    return float(np.abs(normal * numbers(*x.shape, seed=seed)).sum(axes).max())


def compare(name: str, data: st.DataObject) -> None:
    example, dtype = data.draw(EXAMPLES[name]), data.draw(st.sampled_from(DTYPES))
    last, seed = data.draw(st.booleans()), data.draw(seeds)
    with use_kernels("reference"):
        expected = results(name, example, dtype, last, seed)
    count, room = (
        data.draw(st.sampled_from([1, 2, 3])),
        data.draw(st.sampled_from([1, 4096, 256 << 10])),
    )
    for choice in choices(Here("numpy", NUMPY))[:-1]:
        with use_kernels(choice), pieces_of(room), pieces_for(count):
            found = results(name, example, dtype, last, seed)
        assert len(found) == len(expected)
        for number, (got, right) in enumerate(zip(found, expected, strict=True)):
            where = f"result {number} of {name}, use_kernels({choice!r})"
            assert (got.dtype, got.shape) == (right.dtype, right.shape), where
            if right.dtype.kind != "f":
                np.testing.assert_array_equal(got, right, err_msg=where)
                continue
            got, right = got.astype("float64"), right.astype("float64")
            limit = LIMIT[dtype] * float(np.abs(right).max(initial=0.0))
            limit = max(limit, LIMIT[dtype] / 4 * terms(name, number, example, seed))
            np.testing.assert_allclose(got, right, rtol=0, atol=limit, err_msg=where)


quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


@pytest.mark.parametrize("name", KERNELS)
@settings(derandomize=True, max_examples=60, suppress_health_check=quiet)
@given(data=st.data())
def test_drawn(name: str, data: st.DataObject):
    compare(name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
@settings(derandomize=True, max_examples=400, suppress_health_check=quiet)
@given(data=st.data())
def test_drawn_at_length(name: str, data: st.DataObject):
    compare(name, data)
