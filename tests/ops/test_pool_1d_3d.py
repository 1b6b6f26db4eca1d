"""Pooling in one and three dimensions: what max_pool2d's own tests cannot show, by loops."""

from typing import Any

import numpy as np
import pytest

from portacnn import ops
from portacnn.errors import ArgumentError, ShapeError
from support import oracles
from support.checks import (
    DTYPES,
    LAYOUTS,
    agree,
    distinct,
    face,
    laid_out,
    normal,
    refuses,
    refuses_integers_and_lists,
    untouched,
    with_each_kernel,
)
from support.matrix import Here

# x shape, OUT, options, and (kernel, stride, pads, dilation) written out
CASES = {
    "1d": ((2, 2, 7), (3,), {"kernel_size": 2}, ((2,), (2,), ((0, 0),), (1,))),
    "1d, overlapping, padded": (
        (2, 2, 6),
        (4,),
        {"kernel_size": 4, "stride": 1, "padding": ((0, 1),)},
        ((4,), (1,), ((0, 1),), (1,)),
    ),
    "1d, hanging over": (
        (1, 2, 6),
        (3,),
        {"kernel_size": 3, "stride": 2, "ceil_mode": True},
        ((3,), (2,), ((0, 0),), (1,)),
    ),
    "1d, larger than the input": (
        (1, 1, 2),
        (1,),
        {"kernel_size": 3, "ceil_mode": True},
        ((3,), (3,), ((0, 0),), (1,)),
    ),
    "2d, padded beyond half": (
        (1, 1, 3, 4),
        (5, 6),
        {"kernel_size": 3, "stride": 1, "padding": ((2, 2), (2, 2))},
        ((3, 3), (1, 1), ((2, 2), (2, 2)), (1, 1)),
    ),
    "3d": (
        (2, 2, 4, 3, 5),
        (2, 1, 2),
        {"kernel_size": 2},
        ((2,) * 3, (2,) * 3, ((0, 0),) * 3, (1,) * 3),
    ),
    "3d, padded": (
        (1, 2, 3, 4, 3),
        (2, 4, 2),
        {"kernel_size": (2, 3, 3), "stride": (2, 1, 2), "padding": (1, 1, 1)},
        ((2, 3, 3), (2, 1, 2), ((1, 1),) * 3, (1,) * 3),
    ),
}
DILATED = {
    "1d, dilated": (
        (2, 1, 8),
        (3,),
        {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2},
        ((3,), (2,), ((1, 1),), (2,)),
    ),
    "3d, dilated": (
        (1, 1, 5, 4, 3),
        (3, 3, 3),
        {"kernel_size": (2, 2, 1), "stride": 1, "dilation": (2, 1, 1)},
        ((2, 2, 1), (1, 1, 1), ((0, 0),) * 3, (2, 1, 1)),
    ),
}
MAXIMA = {**CASES, **DILATED}


def check(
    backend: Here, dtype: str, layouts: Any, op: Any, x: np.ndarray, y: np.ndarray, gradient: Any
) -> None:
    """op: the forward and backward of an array; gradient: of x, as a function of that of y."""
    dy = normal(*y.shape, seed=1)
    expected = gradient(dy)
    pool, pool_backward = op
    for layout in layouts:
        xs, dys = (laid_out(backend, host, dtype, layout) for host in (x, dy))
        with untouched(backend, xs, dys):
            got, cache = pool(xs)
            dx = pool_backward(dys, cache)
        agree(backend, got, y, xs)
        agree(backend, dx, expected, xs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MAXIMA)
@with_each_kernel
def test_max_pool(backend: Here, name: str, dtype: str):
    shape, out, options, plain = MAXIMA[name]
    pool, pool_backward = face("max_pool", len(out))
    ties = np.random.default_rng(0).integers(-1, 2, shape).astype(float)
    low = np.where(ties > -1, ties, -np.inf)
    for host in (distinct(*shape), ties, low, np.full(shape, -np.inf)):
        y, chosen = oracles.max_pool(host, out, *plain)
        check(
            backend,
            dtype,
            ("packed", "batch_last", "stepped") if host is ties else ("packed",),
            (lambda x: pool(x, **options), pool_backward),
            host,
            y,
            lambda dy, chosen=chosen: oracles.routed(shape, chosen, dy),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("name", CASES)
@with_each_kernel
def test_avg_pool(backend: Here, name: str, include: bool, dtype: str):
    shape, out, options, (kernel, stride, pads, _) = CASES[name]
    pool, pool_backward = face("avg_pool", len(out))
    host = normal(*shape)
    for divisor in (None, 5):
        y, shares = oracles.avg_pool(host, out, kernel, stride, pads, include, divisor)
        more = {**options, "count_include_pad": include, "divisor_override": divisor}
        check(
            backend,
            dtype,
            ("packed",) if divisor else LAYOUTS,
            (lambda x, more=more: pool(x, **more), pool_backward),
            host,
            y,
            lambda dy, shares=shares: oracles.shared(shape, shares, dy),
        )


@with_each_kernel
def test_an_empty_batch_is_accepted(backend: Here):
    x = backend.array(np.zeros((0, 2, 4)))
    for op, backward, arguments in [
        (ops.max_pool1d, ops.max_pool1d_backward, (2,)),
        (ops.avg_pool1d, ops.avg_pool1d_backward, (2,)),
        (ops.adaptive_avg_pool1d, ops.adaptive_avg_pool1d_backward, (2,)),
        (ops.adaptive_max_pool1d, ops.adaptive_max_pool1d_backward, (2,)),
    ]:
        y, cache = op(x, *arguments)
        assert tuple(y.shape) == (0, 2, 2)
        assert tuple(backward(y, cache).shape) == (0, 2, 4)


def test_nothing_kept(backend: Here):
    x = backend.array(normal(1, 1, 4))
    for name in ("max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d"):
        assert getattr(ops, name)(x, 2, keep=False)[1] is None


def test_wrong_arguments_are_refused(backend: Here):
    x = backend.array(normal(1, 2, 5))
    refuses(
        ShapeError,
        "max_pool1d: ",
        "length",
        "got 4 axes",
        call=lambda: ops.max_pool1d(x[None, ...], 2),
    )
    refuses(ShapeError, "avg_pool3d: ", "depth", "got 3 axes", call=lambda: ops.avg_pool3d(x, 2))
    refuses(ShapeError, "max_pool1d: ", "kernel 6", "input 5", call=lambda: ops.max_pool1d(x, 6))
    refuses(
        ShapeError,
        "kernel 7",
        "input 5",
        call=lambda: ops.max_pool1d(x, 7, stride=2, ceil_mode=True),
    )
    refuses(
        ArgumentError,
        "max_pool1d: ",
        "half of the kernel 2",
        call=lambda: ops.max_pool1d(x, 2, padding=2),
    )
    four = {"kernel_size": 2, "padding": ((0, 2),)}
    refuses(ArgumentError, "half of the kernel 2", call=lambda: ops.max_pool1d(x[:, :, :4], **four))
    two = backend.array(normal(1, 1, 2))
    blind = {"kernel_size": 2, "dilation": 3, "padding": 1}
    refuses(
        ArgumentError,
        "max_pool1d: ",
        "contain only padding",
        call=lambda: ops.max_pool1d(two, **blind),
    )
    for divisor in (0, 1.5):
        call = lambda divisor=divisor: ops.avg_pool1d(x, 2, divisor_override=divisor)  # noqa: E731
        refuses(ArgumentError, "avg_pool1d: ", "divisor_override", call=call)
    refuses(
        ArgumentError,
        "adaptive_avg_pool1d: ",
        "output_size",
        call=lambda: ops.adaptive_avg_pool1d(x, 0),
    )
    refuses(
        ArgumentError, "output_size", "1 of them", call=lambda: ops.adaptive_max_pool1d(x, (2, 2))
    )
    refuses(ShapeError, "at least one cell", call=lambda: ops.adaptive_avg_pool1d(x[:, :, :0], 2))
    refuses(ShapeError, "global_avg_pool: ", "*S", call=lambda: ops.global_avg_pool(x[:, :, 0]))
    refuses_integers_and_lists(backend, "global_max_pool: ", ops.global_max_pool, normal(1, 1, 2))
