"""Convolution, batch norm, a sum, limits and pooling as one op of inference: against loops."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn.errors import ArgumentError, ArrayError, ShapeError
from portacnn.ops.fused import ConvNorm, conv_unit
from support import oracles
from support.checks import (
    DTYPES,
    LAYOUTS,
    agree,
    laid_out,
    normal,
    refuses,
    untouched,
    with_each_kernel,
)
from support.fused_cases import CASES, TWO, Case, Pool
from support.matrix import Here

LIMITS = {"none": (None, None), "relu": (0.0, None), "relu6": (0.0, 6.0), "above": (None, 0.25)}
EPS = 1e-3


def norm_of(channels: int, affine: bool) -> list[np.ndarray | None]:
    """Mean, variance, weight and bias."""
    mean, weight, bias = (normal(channels, seed=seed) for seed in (11, 12, 13))
    var = 0.5 + np.abs(normal(channels, seed=14))
    return [mean, var, weight if affine else None, bias if affine else None]


def by_loops(
    case: Case, norm: list[Any] | None, residual: np.ndarray | None, low: Any, high: Any
) -> np.ndarray:
    y = oracles.conv(*case.arrays(), *case.plain).copy()
    if norm is not None:
        mean, var, weight, bias = (
            given if a is None else a
            for a, given in zip(
                norm, (0, 0, np.ones(y.shape[1]), np.zeros(y.shape[1])), strict=True
            )
        )
        for n, o in np.ndindex(y.shape[:2]):
            y[n, o] = (y[n, o] - mean[o]) / np.sqrt(var[o] + EPS) * weight[o] + bias[o]
    if residual is not None:
        y = y + residual
    y = np.clip(y, low, high) if (low, high) != (None, None) else y
    if case.pool is not None:
        w = case.pool.windows(y.shape[2:])
        y, _ = oracles.max_pool(y, w.out, w.kernel, w.stride, w.pads, w.dilation)
    return y


def check(
    here: Here,
    case: Case,
    limits: tuple[Any, Any],
    norm: bool | None,
    residual: bool,
    dtype: str,
    layouts: tuple[str, str] = ("packed", "packed"),
) -> None:
    """The op and its prepared function, whose arrays get other values after it was made.

    Args:
        norm: whether its weight and bias are there, or None without a norm.
    """
    x, weight, bias = case.arrays()
    windows, groups, pool = case.arguments()
    of_norm = None if norm is None else norm_of(len(weight), norm)
    rest = normal(len(x), len(weight), *windows.out, seed=15) if residual else None
    expected = by_loops(case, of_norm, rest, *limits)
    own: Any = lambda a: None if a is None else here.backend.asarray(a, dtype)  # noqa: E731
    hosts = [x] if rest is None else [x, rest]
    parts = [laid_out(here, a, dtype, kind) for a, kind in zip(hosts, layouts, strict=False)]
    ws, bs, ns = own(weight), own(bias), [own(a) for a in of_norm or []]
    arguments = (
        *(ws, bs, windows, groups, ConvNorm(*ns, EPS) if ns else None),
        *(*limits, pool),
    )
    with untouched(here, *parts, ws, bs, *ns):
        y = conv_unit(parts, *arguments)
    agree(here, y, expected, parts[0])
    for array in (ws, *ns):
        if array is not None:
            array[...] = here.array(np.ones(array.shape), dtype)
    function = conv_unit.prepare(parts, *arguments)
    for array, host in zip((ws, *ns), (weight, *(of_norm or [])), strict=True):
        if array is not None:
            array[...] = here.array(host, dtype)
    nines = [np.full(a.shape, 9.0) for a in hosts]
    function([laid_out(here, a, dtype, k) for a, k in zip(nines, layouts, strict=False)])
    agree(here, function(parts), expected, parts[0])


@pytest.mark.parametrize("name", CASES)
@with_each_kernel
def test_against_loops(backend: Here, name: str):
    """Every case in one of the combinations of norm, residual and limits."""
    number = list(CASES).index(name)
    check(
        backend,
        CASES[name],
        list(LIMITS.values())[number % 4],
        (None, True, False)[number % 3],
        number % 5 > 1,
        DTYPES[number % 2],
        (LAYOUTS[number % len(LAYOUTS)], LAYOUTS[number // 2 % len(LAYOUTS)]),
    )


@pytest.mark.parametrize("limits", LIMITS)
@with_each_kernel
def test_every_combination(backend: Here, limits: str):
    depthwise = Case(2, 1, 1, (5, 6), (3, 3), pads=((1, 1), (1, 1)), groups=4, bias=False)
    for case in (CASES["1x1, no bias"], CASES["plain"], depthwise):
        for norm in (None, True):
            for residual in (False, True):
                for pool in (None, TWO if min(case.windows.out) > 1 else None):
                    check(
                        backend, replace(case, pool=pool), LIMITS[limits], norm, residual, "float64"
                    )


@given(data=st.data())
@settings(max_examples=20)
@with_each_kernel
def test_drawn(backend: Here, data: st.DataObject):
    whole = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    axes = whole(1, 2)
    case = Case(
        whole(1, 9),
        whole(1, 3),
        whole(1, 3),
        tuple(whole(3, 7) for _ in range(axes)),
        tuple(whole(1, 3) for _ in range(axes)),
        tuple(whole(1, 2) for _ in range(axes)),
        tuple((whole(0, 2), whole(0, 2)) for _ in range(axes)),
        (1,) * axes,
        whole(1, 3),
        data.draw(st.booleans()),
    )
    if min(case.windows.out) > 1 and data.draw(st.booleans()):
        case = replace(case, pool=Pool((2,) * axes, (whole(1, 2),) * axes))
    check(
        backend,
        case,
        data.draw(st.sampled_from(list(LIMITS.values()))),
        data.draw(st.sampled_from([None, True, False])),
        data.draw(st.booleans()),
        data.draw(st.sampled_from(DTYPES)),
    )


@with_each_kernel
def test_nan_and_infinity_stay(backend: Here):
    """An element that is NaN or infinite reaches every output that it takes part in, and no
    other; the limits do not hide NaN."""
    case = Case(2, 2, 3, (4, 4), (1, 1))
    x, weight, bias = case.arrays()
    windows, groups, _ = case.arguments()
    x[0, 0, 1, 2], x[1, 1, 3, 3] = np.nan, np.inf
    weight = np.abs(weight)
    rest = np.zeros((2, 3, 4, 4))
    rest[0, 2, 0, 0], rest[1, 0, 0, 1] = np.nan, -np.inf
    norm = [np.zeros(3), np.ones(3), np.ones(3), np.zeros(3)]
    for limits in LIMITS.values():
        for residual in (None, rest):
            hosts = [x] if residual is None else [x, residual]
            parts = [backend.array(a, "float32") for a in hosts]
            own = [backend.backend.asarray(a, "float32") for a in (weight, bias, *norm)]
            y = conv_unit(parts, *own[:2], windows, groups, ConvNorm(*own[2:], 1e-5), *limits, None)
            host = backend.host(y)
            nans = np.zeros(host.shape, bool)
            nans[0, :, 1, 2] = True
            if residual is not None:
                nans[0, 2, 0, 0] = True
                assert (host[1, 0, 0, 1] == (-np.inf if limits[0] is None else limits[0])).all()
            np.testing.assert_array_equal(np.isnan(host), nans)
            assert (host[1, :, 3, 3] == (np.inf if limits[1] is None else limits[1])).all()


def test_what_does_not_fit_is_refused(backend: Here):
    case = Case(2, 2, 3, (4, 4), (3, 3))
    windows, groups, _ = case.arguments()
    x, weight, bias = (backend.array(a, "float32") for a in case.arrays())
    one, three = (backend.array(np.ones(n), "float32") for n in (1, 3))
    norm = ConvNorm(three, three, None, three, 1e-5)

    def run(parts: Any = None, low: Any = None, norm: Any = norm) -> Any:
        return conv_unit(parts or [x], weight, bias, windows, groups, norm, low, None, None)

    assert tuple(run().shape) == (2, 3, 2, 2)
    refuses(ShapeError, "conv_unit", "residual", "(2, 3, 2, 2)", call=lambda: run([x, x]))
    refuses(ShapeError, "conv_unit", "[x, residual]", call=lambda: run([x, run(), run()]))
    refuses(
        ShapeError,
        "norm.running_var",
        "(3,)",
        "(1,)",
        call=lambda: run(norm=norm._replace(running_var=one)),
    )
    wide = backend.array(np.ones(3), "float64")
    refuses(ArrayError, "dtype", "norm.bias", call=lambda: run(norm=norm._replace(bias=wide)))
    refuses(ArgumentError, "conv_unit", "min", call=lambda: run(low=float("nan")))
