"""Mean squared error and binary cross-entropy against plain loops."""

import math
from typing import Any

import numpy as np
import pytest

from portacnn import ops
from portacnn.errors import ArgumentError, ArrayError, ShapeError
from support.checks import (
    DTYPES,
    LAYOUTS,
    agree,
    gradient_agrees,
    laid_out,
    normal,
    refuses,
    refuses_mixed,
    untouched,
)
from support.matrix import Here

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
REDUCTIONS = ("mean", "sum", "none")


def mse(x: float, t: float, w: float) -> tuple[float, float]:
    return w * (x - t) ** 2, w * 2 * (x - t)


def bce(x: float, t: float, w: float, pw: float) -> tuple[float, float]:
    """log(sigmoid(x)) and log(sigmoid(-x)) as -log1p(exp(-x)) and -log1p(exp(x)); where exp
    overflows, that is x itself."""
    minus_log_s = math.log1p(math.exp(-x)) if x > -700 else -x
    minus_log_1s = math.log1p(math.exp(x)) if x < 700 else x
    s = math.exp(-minus_log_s)
    return w * (pw * t * minus_log_s + (1 - t) * minus_log_1s), w * (
        -pw * t * math.exp(-minus_log_1s) + (1 - t) * s
    )


def expected_of(name, x, t, reduction, weight=None, pos_weight=None):
    """(loss, dx for a dy of ones)."""
    weight = np.broadcast_to(1.0 if weight is None else weight, x.shape)
    pos_weight = np.broadcast_to(1.0 if pos_weight is None else pos_weight, x.shape)
    losses, dx = np.zeros(x.shape), np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        losses[i], dx[i] = (
            mse(x[i], t[i], weight[i])
            if name == "mse_loss"
            else bce(x[i], t[i], weight[i], pos_weight[i])
        )
    if reduction == "none":
        return losses, dx
    scale = 1 / x.size if reduction == "mean" else 1.0
    return np.asarray(math.fsum(losses.ravel()) * scale), dx * scale


PAIRS = ("mse_loss", "binary_cross_entropy_with_logits")
FACTORS = [(name, factors) for name in PAIRS for factors in ((), ("weight",))]
FACTORS += [(PAIRS[1], factors) for factors in (("pos_weight",), ("weight", "pos_weight"))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("name", "factors"), FACTORS, ids=str)
def test_values_and_gradients_are_correct(
    backend: Here, name: str, factors: tuple, reduction: str, dtype: str
):
    x, t = 3 * normal(3, 4, 2), np.random.default_rng(1).random((3, 4, 2))
    x[0, 0], t[0, 0, 0], t[0, 0, 1] = (1e4, 0.0, 1.0) if name != "mse_loss" else (9, 0, 1)
    shapes = {"weight": (4, 2), "pos_weight": (4, 1)}
    given = {factor: 0.5 + normal(*shapes[factor], seed=2) ** 2 for factor in factors}
    loss, dx = expected_of(name, x, t, reduction, **given)
    dy = normal(*loss.shape, seed=3)
    arrays = {factor: backend.array(a, dtype) for factor, a in given.items()}
    for layout in LAYOUTS:
        xs, ts = laid_out(backend, x, dtype, layout), laid_out(backend, t, dtype, layout)
        with untouched(backend, xs, ts, *arrays.values()):
            got, cache = getattr(ops, name)(xs, ts, **arrays, reduction=reduction)
            back = getattr(ops, name + "_backward")
            agree(backend, backend.xp.asarray(got), loss, xs, TOLERANCE[dtype])
            agree(backend, back(backend.array(dy, dtype), cache), dy * dx, xs, TOLERANCE[dtype])
            if reduction != "none":
                agree(backend, back(1.0, cache), dx, xs, TOLERANCE[dtype])


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_agree_with_numerical_gradients(backend: Here, name: str):
    host, t = normal(3, 2), backend.array(np.random.default_rng(0).random((3, 2)))
    op = getattr(ops, name)
    options: dict[str, Any] = {"weight": backend.array(normal(2, seed=1))}
    if name != "mse_loss":
        options["pos_weight"] = backend.array(normal(2, seed=2) ** 2)
    _, cache = op(backend.array(host), t, **options)
    gradient = getattr(ops, name + "_backward")(1.0, cache)
    gradient_agrees(backend, gradient, lambda x: op(x, t, **options, keep=False)[0], host)


@pytest.mark.parametrize("name", PAIRS)
def test_far_out_and_empty(backend: Here, name: str):
    x, t = np.array([1e4, -1e4, 1e4, -1e4, 0.0]), np.array([0.0, 0.0, 1.0, 1.0, 0.5])
    xs, ts = backend.array(x, "float32"), backend.array(t, "float32")
    got, cache = getattr(ops, name)(xs, ts, reduction="none")
    losses, dx = expected_of(name, x, t, "none")
    agree(backend, got, losses, xs)
    agree(backend, getattr(ops, name + "_backward")(1.0, cache), dx, xs)
    nothing = backend.array(np.zeros((0, 3)), "float32")
    assert np.isnan(backend.host(getattr(ops, name)(nothing, nothing)[0]))
    assert backend.host(getattr(ops, name)(nothing, nothing, reduction="sum")[0]) == 0.0
    got, cache = getattr(ops, name)(nothing, nothing)
    assert tuple(getattr(ops, name + "_backward")(1.0, cache).shape) == (0, 3)


@pytest.mark.parametrize("name", PAIRS)
def test_wrong_arguments_are_refused(backend: Here, name: str):
    op = getattr(ops, name)
    x, t = normal(2, 3), np.ones((2, 3))
    refuses_mixed(backend, f"{name}: ", op, x, t)
    xs, ts = backend.array(x), backend.array(t)
    refuses_mixed(
        backend, f"{name}: ", lambda a, w: op(a, backend.array(t, "float32"), weight=w), x, t
    )
    refuses(ShapeError, name, "2x3", "3", call=lambda: op(xs, ts[0, :]))
    refuses(
        ShapeError,
        name,
        "weight (2,)",
        "broadcast",
        "2x3",
        call=lambda: op(xs, ts, weight=ts[:, 0]),
    )
    refuses(
        ShapeError,
        name,
        "weight",
        call=lambda: op(xs, ts, weight=backend.array(np.ones((1, 2, 3)))),
    )
    refuses(ArgumentError, name, "reduction", "'avg'", call=lambda: op(xs, ts, reduction="avg"))
    refuses(
        ArrayError, name, "floating", call=lambda: op(backend.array(np.ones(2, dtype="int64")), ts)
    )
