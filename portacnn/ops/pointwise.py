"""Arithmetic on two arrays, with NumPy's broadcasting, and functions of one array; each with its
gradient.

The gradient of an array that was broadcast is summed over the new or stretched axes:
``unbroadcast``.
"""

from collections.abc import Callable
from math import pi, sqrt
from typing import Any

from portacnn.arguments import one_of
from portacnn.errors import PortacnnError, ShapeError
from portacnn.ops.dispatch import check_arrays, op
from portacnn.ops.special import erf, logistic
from portacnn.runtime import Array, backend_of, describe

ARITHMETIC = ("add", "subtract", "multiply", "divide", "power", "maximum", "minimum")


def unbroadcast(grad: Array, shape: tuple[int, ...]) -> Array:
    """Return the gradient of an array of this shape that was broadcast to the shape of grad: the
    sum over the broadcast axes.
    """
    if tuple(grad.shape) == shape:
        return grad
    xp, more = backend_of(grad).xp, grad.ndim - len(shape)
    spread = tuple(
        i for i in range(grad.ndim) if i < more or (shape[i - more] == 1 and grad.shape[i] != 1)
    )
    return xp.reshape(xp.sum(grad, axis=spread), shape)


# --- two arrays -----------------------------------------------------------------------------------


def _check(a: Array, b: Array, kind: str, *, keep: bool = True) -> None:
    check_arrays("arithmetic", a=a, b=b)
    try:
        one_of("kind", kind, *ARITHMETIC)
    except PortacnnError as error:
        raise error.at("arithmetic")
    for n, m in zip(reversed(a.shape), reversed(b.shape), strict=False):
        if n != m and 1 not in (n, m):
            raise ShapeError(
                f"{describe(a)} and {describe(b)} cannot be broadcast to one shape", "arithmetic"
            )


@op(_check)
def arithmetic(a: Array, b: Array, kind: str, *, keep: bool = True) -> tuple[Array, tuple | None]:
    """Combine a and b element by element, broadcast to one shape.

    Args:
        a, b: floating-point arrays whose shapes broadcast.
        kind: "add", "subtract", "multiply", "divide", "power", "maximum" or "minimum".
        keep: store what ``arithmetic_backward`` needs.

    Returns:
        The result, of the broadcast shape, and the cache.

    Raises:
        ShapeError: if the shapes do not broadcast.
        ArgumentError: if kind is unknown.
        ArrayError: if the arrays are integers, or differ in library, device or dtype.

    Example:
        >>> a, b = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([10.0, 100.0])
        >>> y, cache = ops.arithmetic(a, b, "multiply")
        >>> y
        array([[ 10., 200.],
               [ 30., 400.]])
        >>> da, db = ops.arithmetic_backward(np.ones((2, 2)), cache)
        >>> db
        array([4., 6.])
    """
    xp = backend_of(a).xp
    y = {
        "add": lambda: a + b,
        "subtract": lambda: a - b,
        "multiply": lambda: a * b,
        "divide": lambda: a / b,
        "power": lambda: a**b,
        "maximum": lambda: xp.maximum(a, b),
        "minimum": lambda: xp.minimum(a, b),
    }[kind]()
    return y, (a, b, y, kind) if keep else None


@arithmetic.backward
def arithmetic_backward(
    dy: Array, saved: tuple, *, need: tuple[bool, bool] = (True, True)
) -> tuple[Array | None, Array | None]:
    """Return da and db, each with the shape of its input; None if ``need`` is False for it.

    If the inputs of a maximum or minimum are equal, each receives half of the gradient, as in
    PyTorch. The gradient of the exponent of a power uses 0 as the logarithm of 0, as in PyTorch.
    """
    a, b, y, kind = saved
    xp = backend_of(dy).xp

    def to_a() -> Array:
        if kind in ("add", "subtract"):
            return dy
        if kind == "multiply":
            return dy * b
        if kind == "divide":
            return dy / b
        if kind == "power":
            return dy * xp.where(b == 0, 0.0 * y, b * a ** (b - 1.0))
        return _share(dy, a, y, b)

    def to_b() -> Array:
        if kind == "add":
            return dy
        if kind == "subtract":
            return -dy
        if kind == "multiply":
            return dy * a
        if kind == "divide":
            return -dy * (y / b)
        if kind == "power":
            return dy * y * xp.log(xp.where(a == 0, xp.ones_like(a), a))
        return _share(dy, b, y, a)

    return (
        unbroadcast(to_a(), tuple(a.shape)) if need[0] else None,
        unbroadcast(to_b(), tuple(b.shape)) if need[1] else None,
    )


def _share(dy: Array, own: Array, y: Array, other: Array) -> Array:
    """Return the gradient of a maximum or minimum for its input ``own``."""
    return backend_of(dy).xp.where(
        own == other, 0.5 * dy, backend_of(dy).xp.where(own == y, dy, 0.0 * dy)
    )


# --- one array ------------------------------------------------------------------------------------

_Rule = tuple[Callable[[Any, Array], Array], Callable[[Any, Array, Array], Array]]


def _softplus(xp: Any, x: Array) -> Array:
    return xp.maximum(x, 0.0) + xp.log1p(xp.exp(-xp.abs(x)))


def _mish_slope(xp: Any, x: Array, y: Array) -> Array:
    t = xp.tanh(_softplus(xp, x))
    return t + x * (1.0 - t * t) * logistic(x)


# Per name: the function of (xp, x), and its derivative as a function of (xp, x, y).
FUNCTIONS: dict[str, _Rule] = {
    "abs": (lambda xp, x: xp.abs(x), lambda xp, x, y: xp.sign(x)),
    "cos": (lambda xp, x: xp.cos(x), lambda xp, x, y: -xp.sin(x)),
    "erf": (lambda xp, x: erf(x), lambda xp, x, y: 2.0 / sqrt(pi) * xp.exp(-x * x)),
    "exp": (lambda xp, x: xp.exp(x), lambda xp, x, y: y),
    "log": (lambda xp, x: xp.log(x), lambda xp, x, y: 1.0 / x),
    "mish": (lambda xp, x: x * xp.tanh(_softplus(xp, x)), _mish_slope),
    "negative": (lambda xp, x: -x, lambda xp, x, y: -xp.ones_like(x)),
    "reciprocal": (lambda xp, x: 1.0 / x, lambda xp, x, y: -y * y),
    "sin": (lambda xp, x: xp.sin(x), lambda xp, x, y: xp.cos(x)),
    "softsign": (
        lambda xp, x: x / (1.0 + xp.abs(x)),
        lambda xp, x, y: 1.0 / (1.0 + xp.abs(x)) ** 2,
    ),
    "sqrt": (lambda xp, x: xp.sqrt(x), lambda xp, x, y: 0.5 / y),
}


def check_elementwise(function: str) -> None:
    """Raise ArgumentError if ``function`` is not a name in ``FUNCTIONS``."""
    one_of("function", function, *FUNCTIONS)


def _check_one(x: Array, function: str, *, keep: bool = True) -> None:
    check_arrays("elementwise", x=x)
    try:
        check_elementwise(function)
    except PortacnnError as error:
        raise error.at("elementwise")


@op(_check_one)
def elementwise(x: Array, function: str, *, keep: bool = True) -> tuple[Array, tuple | None]:
    """Apply a function to each element of x (any shape, floating point).

    ``function`` is a name in ``FUNCTIONS``: abs, cos, erf, exp, log, mish, negative, reciprocal,
    sin, softsign or sqrt. Returns y with the shape of x, and the cache. Raises ArgumentError if the
    name is unknown, ArrayError if x is not floating point.

    >>> y, cache = ops.elementwise(np.array([1.0, 4.0]), "sqrt")
    >>> y
    array([1., 2.])
    >>> ops.elementwise_backward(np.ones(2), cache)
    array([0.5 , 0.25])
    """
    y = FUNCTIONS[function][0](backend_of(x).xp, x)
    return y, (x, y, function) if keep else None


@elementwise.backward
def elementwise_backward(dy: Array, saved: tuple) -> Array:
    """Return dx: dy times the derivative of the function at x."""
    x, y, function = saved
    return dy * FUNCTIONS[function][1](backend_of(dy).xp, x, y)
