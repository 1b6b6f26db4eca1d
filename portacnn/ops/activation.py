"""Activations: functions of each element. Shapes and memory order stay what they are."""

from typing import Any

from portacnn.ops.dispatch import check_arrays, op
from portacnn.runtime import Array, backend_of


def _check(x: Array, **_: Any) -> None:
    check_arrays("activation", x=x)


@op(_check)
def relu(x: Array, *, keep: bool = True) -> tuple[Array, Any]:
    """max(x, 0) of each element of x (any shape, floating point). NaN stays NaN."""
    y = backend_of(x).xp.maximum(x, 0.0)
    return y, y if keep else None


@relu.backward
def relu_backward(dy: Array, y: Array) -> Array:
    """dx = dy where the output was above zero, else 0 (at zero too, as in PyTorch)."""
    return backend_of(y).xp.where(y > 0, dy, 0.0)


@op(_check)
def sigmoid(x: Array, *, keep: bool = True) -> tuple[Array, Any]:
    """1 / (1 + exp(-x)) of each element of x (any shape, floating point), with no overflow on either side."""
    xp = backend_of(x).xp
    e = xp.exp(-xp.abs(x))
    y = xp.where(x >= 0, 1.0, e) / (1.0 + e)
    return y, y if keep else None


@sigmoid.backward
def sigmoid_backward(dy: Array, y: Array) -> Array:
    """dx = dy * y * (1 - y)."""
    return dy * (y * (1.0 - y))
