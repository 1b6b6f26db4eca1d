"""Softmax along an axis, and its logarithm. Shapes and memory order stay what they are."""

from collections.abc import Callable
from typing import Any

from portacnn.arguments import as_int
from portacnn.errors import ArgumentError
from portacnn.ops.dispatch import check_arrays, op
from portacnn.runtime import Array, backend_of, describe


def _check(name: str) -> Callable[..., None]:
    def check(x: Array, dim: int, *, keep: bool = True) -> None:
        check_arrays(name, x=x)
        if (number := as_int(dim)) is None or not -x.ndim <= number < x.ndim:
            raise ArgumentError(
                f"dim must be a whole number in {-x.ndim}..{x.ndim - 1}, got {dim!r} "
                f"({describe(x)})",
                name,
            )

    return check


@op(_check("softmax"))
def softmax(x: Array, dim: int, *, keep: bool = True) -> tuple[Array, Any]:
    """exp(x) / sum(exp(x)), the sum along the axis ``dim``. x: any shape, floating point. Large
    values do not overflow."""
    y = x
    if 0 not in x.shape:
        xp = backend_of(x).xp
        y = xp.exp(x - xp.max(x, axis=dim, keepdims=True))
        y = y / xp.sum(y, axis=dim, keepdims=True)
    return y, (y, dim) if keep else None


@softmax.backward
def softmax_backward(dy: Array, saved: tuple) -> Array:
    """dx = y * (dy - sum(dy * y))."""
    y, dim = saved
    return y * (dy - backend_of(dy).xp.sum(dy * y, axis=dim, keepdims=True))


@op(_check("log_softmax"))
def log_softmax(x: Array, dim: int, *, keep: bool = True) -> tuple[Array, Any]:
    """x - log(sum(exp(x))), the sum along the axis ``dim``. x: any shape, floating point. Large
    values do not overflow."""
    y = x
    if 0 not in x.shape:
        xp = backend_of(x).xp
        shifted = x - xp.max(x, axis=dim, keepdims=True)
        y = shifted - xp.log(xp.sum(xp.exp(shifted), axis=dim, keepdims=True))
    return y, (y, dim) if keep else None


@log_softmax.backward
def log_softmax_backward(dy: Array, saved: tuple) -> Array:
    """dx = dy - softmax(x) * sum(dy)."""
    y, dim = saved
    xp = backend_of(dy).xp
    return dy - xp.exp(y) * xp.sum(dy, axis=dim, keepdims=True)
