"""Arithmetic on numbers that contain the number of samples: a + b * N, with N unknown, at least 1.

A shape that a file computes contains N. Any arithmetic whose result is of this form again is
supported, in any dtype: 2 * N, N * C * H / C, and comparisons that have one answer for every N.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np

from portacnn.runtime import HostArray


class Unknown(Exception):  # noqa: N818 (the caller raises the error, with the node's name)
    """The result depends on N in another way."""


class Count(NamedTuple):
    """Numbers a + b * N, elementwise."""

    a: HostArray
    b: HostArray


def _require(condition: HostArray) -> None:
    if not np.all(condition):
        raise Unknown


def _add(x: Count, y: Count) -> Count:
    return Count(x.a + y.a, x.b + y.b)


def _subtract(x: Count, y: Count) -> Count:
    return Count(x.a - y.a, x.b - y.b)


def _multiply(x: Count, y: Count) -> Count:
    _require((x.b == 0) | (y.b == 0))
    return Count(x.a * y.a, x.a * y.b + x.b * y.a)


def _divide(x: Count, y: Count) -> Count:
    """Divide by numbers without N, or by a divisor of both parts: 6 * N / (2 * N) = 3."""
    if x.a.dtype.kind == "f":
        _require(y.b == 0)
        return Count(x.a / y.a, x.b / y.a)
    shape = np.broadcast_shapes(x.a.shape, y.a.shape)
    a, b, c, d = (np.broadcast_to(part, shape) for part in (*x, *y))
    _require((c != 0) | (d != 0))
    # by c where the divisor has no N, else the quotient of the factors of N
    divisor = np.where(d == 0, c, d)
    quotient = np.where(d == 0, a, b) // divisor
    _require(np.where(d == 0, (b == 0) | ((a % divisor == 0) & (b % divisor == 0)), True))
    _require(np.where(d == 0, True, (quotient * d == b) & (quotient * c == a)))
    plain = (d == 0) & (b == 0)
    quotient = np.where(plain, np.trunc(a / divisor).astype(a.dtype), quotient)
    return Count(quotient, np.where(d == 0, b // divisor, 0).astype(a.dtype))


def _sign(x: Count) -> HostArray:
    """Return the sign of a + b * N for every N of at least 1."""
    first = x.a + x.b
    _require((x.b == 0) | ((x.b > 0) & (first > 0)) | ((x.b < 0) & (first < 0)))
    return np.sign(first)


def _at_least(x: Count, y: Count) -> HostArray:
    """Return x >= y for every N of at least 1."""
    a, b = _subtract(x, y)
    first = a + b
    _require((b == 0) | ((b > 0) & (first >= 0)) | ((b < 0) & (first < 0)))
    return first >= 0


def _larger(x: Count, y: Count) -> Count:
    """Return the larger one: the same one for every N, but they may be equal for N = 1."""
    a, b = _subtract(x, y)
    first = a + b
    _require((b == 0) | ((b > 0) & (first >= 0)) | ((b < 0) & (first <= 0)))
    return _choose(np.where(b == 0, a >= 0, b > 0), x, y)


def _smaller(x: Count, y: Count) -> Count:
    return _negative(_larger(_negative(x), _negative(y)))


def _negative(x: Count) -> Count:
    return Count(-x.a, -x.b)


def _choose(condition: HostArray, x: Count, y: Count) -> Count:
    return Count(np.where(condition, x.a, y.a), np.where(condition, x.b, y.b))


def _rounded(function: Callable[[HostArray], HostArray]) -> Callable[[Count], Count]:
    def run(x: Count) -> Count:
        _require(x.b == np.floor(x.b))
        return Count(function(x.a), x.b)

    return run


def _absolute(x: Count) -> Count:
    sign = _sign(x)
    return Count(x.a * sign, x.b * sign)


def _known(truth: HostArray) -> Count:
    return Count(truth, np.zeros(truth.shape, truth.dtype))


FUNCTIONS: dict[str, Callable[..., Count]] = {
    "Abs": _absolute,
    "Add": _add,
    "Ceil": _rounded(np.ceil),
    "Div": _divide,
    "Equal": lambda x, y: _known(_sign(_subtract(x, y)) == 0),
    "Floor": _rounded(np.floor),
    "Greater": lambda x, y: _known(_sign(_subtract(x, y)) > 0),
    "GreaterOrEqual": lambda x, y: _known(_at_least(x, y)),
    "Less": lambda x, y: _known(_sign(_subtract(x, y)) < 0),
    "LessOrEqual": lambda x, y: _known(_at_least(y, x)),
    "Max": lambda *all_: reduce(_larger, all_),
    "Min": lambda *all_: reduce(_smaller, all_),
    "Mul": _multiply,
    "Neg": _negative,
    "Round": _rounded(np.round),
    "Sub": _subtract,
    "Sum": lambda *all_: reduce(_add, all_),
}
"""By operator. Each raises ``Unknown`` if the result is not a + b * N."""


def product(x: Count, axes: Sequence[int], keepdims: bool) -> Count:
    """Return the product over some axes; one factor at most may contain N."""
    axes = tuple(axes)
    _require(np.sum(x.b != 0, axis=axes) <= 1)
    alone = np.prod(x.a, axis=axes, keepdims=keepdims)
    with_n = np.prod(np.where(x.b != 0, x.b, x.a), axis=axes, keepdims=keepdims)
    some = np.any(x.b != 0, axis=axes, keepdims=keepdims)
    return Count(alone, np.where(some, with_n, 0))


def cast(x: Count, dtype: np.dtype) -> Count:
    """Return the numbers in another dtype: truncated to integers, or whether they are not 0."""
    if dtype.kind == "b":
        return _known(_sign(x) != 0)
    if dtype.kind in "iu" and x.a.dtype.kind == "f":
        _require((x.b == np.floor(x.b)) & ((x.a == np.floor(x.a)) | (x.b == 0)))
    return Count(x.a.astype(dtype), x.b.astype(dtype))
