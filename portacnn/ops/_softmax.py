"""Softmax and log-softmax along one axis. Shape and memory order of the result are those of the
input.
"""

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
    """Return exp(x) / sum(exp(x)), with the sum along the axis ``dim``. Large values do not
    overflow.

    Args:
        x: any shape, floating point.
        dim: the axis, -x.ndim to x.ndim - 1.
        keep: store what ``softmax_backward`` needs.

    Returns:
        y, with the shape of x, and the cache.

    Raises:
        ArgumentError: if dim is not an axis of x.
        ArrayError: if x is not floating point.

    Example:
        >>> y, cache = ops.softmax(np.array([[0.0, 0.0, 0.0, 0.0]]), 1)
        >>> y
        array([[0.25, 0.25, 0.25, 0.25]])
        >>> ops.softmax_backward(np.array([[1.0, 0.0, 0.0, 0.0]]), cache)
        array([[ 0.1875, -0.0625, -0.0625, -0.0625]])
    """
    y = x
    if 0 not in x.shape:
        xp = backend_of(x).xp
        y = xp.exp(x - xp.max(x, axis=dim, keepdims=True))
        y = y / xp.sum(y, axis=dim, keepdims=True)
    return y, (y, dim) if keep else None


@softmax.backward
def softmax_backward(dy: Array, saved: tuple) -> Array:
    """Return dx = y * (dy - sum(dy * y)), with the shape of x."""
    y, dim = saved
    return y * (dy - backend_of(dy).xp.sum(dy * y, axis=dim, keepdims=True))


@op(_check("log_softmax"))
def log_softmax(x: Array, dim: int, *, keep: bool = True) -> tuple[Array, Any]:
    """Return x - log(sum(exp(x))), with the sum along the axis ``dim``. Large values do not
    overflow.

    Arguments, results and errors are those of ``softmax``.

    >>> y, cache = ops.log_softmax(np.array([[0.0, 0.0]]), 1)
    >>> np.round(y, 4)
    array([[-0.6931, -0.6931]])
    >>> ops.log_softmax_backward(np.array([[1.0, 0.0]]), cache)
    array([[ 0.5, -0.5]])
    """
    y = x
    if 0 not in x.shape:
        xp = backend_of(x).xp
        shifted = x - xp.max(x, axis=dim, keepdims=True)
        y = shifted - xp.log(xp.sum(xp.exp(shifted), axis=dim, keepdims=True))
    return y, (y, dim) if keep else None


@log_softmax.backward
def log_softmax_backward(dy: Array, saved: tuple) -> Array:
    """Return dx = dy - softmax(x) * sum(dy), with the shape of x."""
    y, dim = saved
    xp = backend_of(dy).xp
    return dy - xp.exp(y) * xp.sum(dy, axis=dim, keepdims=True)
