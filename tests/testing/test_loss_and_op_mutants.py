"""Planted faults of a loss and of an op, each found by the check that is named for it; and
portacnn's own losses, which pass."""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import pytest

from portacnn import losses, ops
from portacnn.errors import ArgumentError
from portacnn.losses import CenterDetection, Loss
from portacnn.runtime import backend_of
from portacnn.testing import check_loss, check_op

DEVICES = ["array_api_strict:device1"]


@dataclass(frozen=True)
class LogCosh(Loss):
    """The example of ``portacnn.losses.base``."""

    def forward(self, y, t, weight=None):
        xp = backend_of(y).xp
        return xp.mean(self.weighted(weight, y) * xp.log(xp.cosh(y - t))), (y, t, weight)

    def backward(self, cache, dloss=1.0):
        y, t, weight = cache
        slope = self.weighted(weight, y) * backend_of(y).xp.tanh(y - t)
        return slope * (dloss / max(prod(y.shape), 1))


class TransposedGradient(LogCosh):
    def backward(self, cache, dloss=1.0):
        return backend_of(cache[0]).xp.flip(super().backward(cache, dloss), axis=1)


class WithoutDloss(LogCosh):
    def backward(self, cache, dloss=1.0):
        return super().backward(cache)


class SumOfSquares(LogCosh):
    """A sum, not a mean."""

    def forward(self, y, t, weight=None):
        return backend_of(y).xp.sum((y - t) ** 2), (y, t, weight)

    def backward(self, cache, dloss=1.0):
        y, t, _ = cache
        return 2.0 * (y - t) * dloss


class Float64(LogCosh):
    def forward(self, y, t, weight=None):
        loss, cache = super().forward(y, t, weight)
        return backend_of(y).xp.astype(loss, backend_of(y).xp.float64), cache


class ATransfer(LogCosh):
    def forward(self, y, t, weight=None):
        loss, cache = super().forward(y, t, weight)
        return backend_of(y).xp.asarray(float(loss), dtype=y.dtype, device=y.device), cache


class WritesIntoOutputs(LogCosh):
    def backward(self, cache, dloss=1.0):
        dy = super().backward(cache, dloss)
        cache[0][...] = dy
        return dy


OF_LOSSES = {
    TransposedGradient: ("gradient", "its slope along a direction"),
    WithoutDloss: ("gradient times dloss", "gradient times 2.5"),
    SumOfSquares: ("weights", "the loss with weights 2 and 0"),
    Float64: ("dtypes", "the loss of float32 outputs is float64"),
    ATransfer: ("device array_api_strict:device1", "a transfer to the host: __float__"),
    WritesIntoOutputs: ("inputs unchanged", "it has changed its input y"),
}


@pytest.mark.parametrize("kind", OF_LOSSES, ids=lambda kind: kind.__name__)
def test_a_mutant_of_a_loss_is_found_by_its_name(kind: type[Loss]):
    check, words = OF_LOSSES[kind]
    report = check_loss(kind(), devices=DEVICES, only=check)
    assert report[check].status == "wrong", report
    assert words in report[check].message, report


@pytest.mark.parametrize(
    "loss",
    [LogCosh(), *(make() for name, make in losses.LOSSES.items() if name != "dice")],
    ids=lambda loss: type(loss).__name__,
)
def test_losses_pass(loss: Loss):
    check_loss(loss, devices=DEVICES).raise_if_wrong()


def test_losses_of_maps():
    check_loss(losses.Dice(), (3, 4, 4), devices=[]).raise_if_wrong()
    with pytest.raises(ArgumentError, match="pass output_shape and targets"):
        check_loss(CenterDetection(2))


# --- ops ------------------------------------------------------------------------------------------

X = {"x": np.linspace(-2.0, 2.0, 24).reshape(3, 2, 4)}


def cube(x: Any, *, keep: bool = True) -> tuple[Any, Any]:
    return x * x * x, x if keep else None


def cube_backward(dy: Any, x: Any) -> Any:
    return 3.0 * x * x * dy


def test_ops_pass():
    check_op(cube, cube_backward, X, expected=lambda x: x**3, devices=DEVICES).raise_if_wrong()
    arguments = {"x": np.linspace(0, 1, 12).reshape(3, 4), "weight": np.ones((2, 4)), "bias": None}
    check_op(
        ops.linear,
        lambda dy, cache: ops.linear_backward(dy, cache)[:2],
        arguments,
        differentiable=("x", "weight"),
        devices=[],
    ).raise_if_wrong()


def wrong_backward(dy, x):
    return cube_backward(dy, x)[::-1]


def used_up(dy, x):
    dx = cube_backward(dy, x)
    x[...] = 0.0
    return dx


def leaking(x, *, keep=True):
    return x * backend_of(x).xp.asarray(1.0) ** 3, x if keep else None


def transferring(x, *, keep=True):
    return cube(x, keep=keep) if bool(backend_of(x).xp.any(x > 0)) else (x, None)


def contiguous_only(x, *, keep=True):
    if isinstance(x, np.ndarray):
        x = x.ravel(order="K").reshape(x.shape)
    return cube(x, keep=keep)


last: list[Any] = []


def keeping(x, *, keep=True):
    last[:] = [x]
    return cube(x)


OF_OPS = {
    "gradient": (cube, wrong_backward, "gradient", "its slope along a direction"),
    "cache": (
        lambda x, *, keep=True: cube(x + 0.0, keep=keep),
        used_up,
        "two calls at once",
        "of two calls at once",
    ),
    "kept": (keeping, cube_backward, "without a cache", "keep=False returns a cache"),
    "shared": (
        keeping,
        lambda dy, x: cube_backward(dy, last[0]),
        "two calls at once",
        "gradient of x, of two calls",
    ),
    "input": (cube, used_up, "inputs unchanged", "read-only"),
    "strides": (contiguous_only, cube_backward, "memory layouts", "result, batch_last"),
    "float64": (leaking, lambda dy, x: dy, "dtypes", "float32 is float64"),
    "transfer": (transferring, cube_backward, f"device {DEVICES[0]}", "__bool__ of Array"),
}


@pytest.mark.parametrize("name", OF_OPS)
def test_a_mutant_of_an_op_is_found_by_its_name(name: str):
    forward, backward, check, words = OF_OPS[name]
    report = check_op(forward, backward, X, devices=DEVICES, only=check)
    assert report[check].status == "wrong", report
    assert words in report[check].message, report
