"""Arithmetic and comparisons of two arrays, with NumPy's broadcasting, a choice between two arrays,
and functions of one array; each with its gradient.

The gradient of an array that was broadcast is summed over the new or stretched axes:
``unbroadcast``. Truth values are 1 and 0 in the dtype of the arrays; any other value than 0 is
true. They have no gradient.
"""

from collections.abc import Callable
from math import pi, sqrt
from typing import Any, NamedTuple

from portacnn.arguments import one_of
from portacnn.errors import PortacnnError, ShapeError
from portacnn.ops.dispatch import check_arrays, op
from portacnn.ops.special import erf, logistic
from portacnn.runtime import Array, backend_of, describe


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

_Slope = Callable[[Any, Array, Array, Array, Array], Array] | None


class _Pair(NamedTuple):
    """A function of (xp, a, b), and the gradients of a and b as functions of (xp, dy, a, b, y);
    None for no gradient."""

    y: Callable[[Any, Array, Array], Array]
    da: _Slope = None
    db: _Slope = None


def _share(xp: Any, dy: Array, own: Array, y: Array, other: Array) -> Array:
    """Return the gradient of a maximum or minimum for its input ``own``."""
    return xp.where(own == other, 0.5 * dy, xp.where(own == y, dy, 0.0 * dy))


def _to_exponent(xp: Any, dy: Array, a: Array, b: Array, y: Array) -> Array:
    return dy * y * xp.log(xp.where(a == 0, xp.ones_like(a), a))


def _extreme(function: str) -> _Pair:
    return _Pair(
        lambda xp, a, b: getattr(xp, function)(a, b),
        lambda xp, dy, a, b, y: _share(xp, dy, a, y, b),
        lambda xp, dy, a, b, y: _share(xp, dy, b, y, a),
    )


def _truth(function: Callable[[Array, Array], Array]) -> _Pair:
    return _Pair(lambda xp, a, b: xp.astype(function(a, b), a.dtype))


ARITHMETIC: dict[str, _Pair] = {
    "add": _Pair(lambda xp, a, b: a + b, lambda xp, dy, *_: dy, lambda xp, dy, *_: dy),
    "subtract": _Pair(lambda xp, a, b: a - b, lambda xp, dy, *_: dy, lambda xp, dy, *_: -dy),
    "multiply": _Pair(
        lambda xp, a, b: a * b,
        lambda xp, dy, a, b, y: dy * b,
        lambda xp, dy, a, b, y: dy * a,
    ),
    "divide": _Pair(
        lambda xp, a, b: a / b,
        lambda xp, dy, a, b, y: dy / b,
        lambda xp, dy, a, b, y: -dy * (y / b),
    ),
    "power": _Pair(
        lambda xp, a, b: a**b,
        lambda xp, dy, a, b, y: dy * xp.where(b == 0, 0.0 * y, b * a ** (b - 1.0)),
        _to_exponent,
    ),
    "maximum": _extreme("maximum"),
    "minimum": _extreme("minimum"),
    # the remainder has the sign of a
    "fmod": _Pair(
        lambda xp, a, b: xp.sign(a) * xp.remainder(xp.abs(a), xp.abs(b)),
        lambda xp, dy, *_: dy,
        lambda xp, dy, a, b, y: -dy * xp.round((a - y) / b),
    ),
    "equal": _truth(lambda a, b: a == b),
    "not_equal": _truth(lambda a, b: a != b),
    "greater": _truth(lambda a, b: a > b),
    "greater_equal": _truth(lambda a, b: a >= b),
    "less": _truth(lambda a, b: a < b),
    "less_equal": _truth(lambda a, b: a <= b),
    "logical_and": _truth(lambda a, b: (a != 0) & (b != 0)),
    "logical_or": _truth(lambda a, b: (a != 0) | (b != 0)),
    "logical_xor": _truth(lambda a, b: (a != 0) ^ (b != 0)),
}
"""The kinds of ``arithmetic``, by name."""


def _check(a: Array, b: Array, kind: str, *, keep: bool = True) -> None:
    check_arrays("arithmetic", a=a, b=b)
    try:
        one_of("kind", kind, *ARITHMETIC)
    except PortacnnError as error:
        raise error.at("arithmetic")
    _check_shapes("arithmetic", a, b)


def _check_shapes(name: str, *arrays: Array) -> None:
    """Raise ShapeError if the shapes do not broadcast."""
    shape: tuple[int, ...] = ()
    for array in arrays:
        other, least = tuple(array.shape), max(len(shape), array.ndim)
        rows = [(1,) * (least - len(row)) + row for row in (shape, other)]
        if any(n != m and 1 not in (n, m) for n, m in zip(*rows, strict=True)):
            described = " and ".join(map(describe, arrays))
            raise ShapeError(f"{described} cannot be broadcast to one shape", name)
        shape = tuple(m if n == 1 else n for n, m in zip(*rows, strict=True))


@op(_check)
def arithmetic(a: Array, b: Array, kind: str, *, keep: bool = True) -> tuple[Array, tuple | None]:
    """Combine a and b element by element, broadcast to one shape.

    Args:
        a, b: floating-point arrays whose shapes broadcast.
        kind: a key of ``ARITHMETIC``: "add", "subtract", "multiply", "divide", "power", "maximum",
            "minimum", "fmod"; "equal", "not_equal", "greater", "greater_equal", "less",
            "less_equal"; "logical_and", "logical_or", "logical_xor".
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
    y = ARITHMETIC[kind].y(backend_of(a).xp, a, b)
    return y, (a, b, y, kind) if keep else None


@arithmetic.backward
def arithmetic_backward(
    dy: Array, saved: tuple, *, need: tuple[bool, bool] = (True, True)
) -> tuple[Array | None, Array | None]:
    """Return da and db, each with the shape of its input; None if ``need`` is False for it.

    If the inputs of a maximum or minimum are equal, each receives half of the gradient, as in
    PyTorch. The gradient of the exponent of a power uses 0 as the logarithm of 0, as in PyTorch.
    Comparisons have a gradient of zeros.
    """
    a, b, y, kind = saved
    xp, pair = backend_of(dy).xp, ARITHMETIC[kind]

    def gradient(slope: _Slope, own: Array) -> Array:
        if slope is None:
            return xp.zeros_like(own)
        return unbroadcast(slope(xp, dy, a, b, y), tuple(own.shape))

    return (
        gradient(pair.da, a) if need[0] else None,
        gradient(pair.db, b) if need[1] else None,
    )


# --- a choice -------------------------------------------------------------------------------------


def _check_choice(condition: Array, a: Array, b: Array, *, keep: bool = True) -> None:
    check_arrays("select", condition=condition, a=a, b=b)
    _check_shapes("select", condition, a, b)


@op(_check_choice)
def select(
    condition: Array, a: Array, b: Array, *, keep: bool = True
) -> tuple[Array, tuple | None]:
    """Take a where the condition is not 0, else b, as torch.where; all are broadcast to one shape.

    Args:
        condition, a, b: floating-point arrays whose shapes broadcast.
        keep: store what ``select_backward`` needs.

    Returns:
        The result, of the broadcast shape, and the cache.

    Raises:
        ShapeError: if the shapes do not broadcast.
        ArrayError: if the arrays are integers, or differ in library, device or dtype.

    Example:
        >>> y, cache = ops.select(np.array([1.0, 0.0]), np.array([5.0, 6.0]), np.array([0.5]))
        >>> y
        array([5. , 0.5])
        >>> [gradient.tolist() for gradient in ops.select_backward(np.ones(2), cache)]
        [[1.0, 0.0], [1.0]]
    """
    shapes = tuple(a.shape), tuple(b.shape)
    y = backend_of(a).xp.where(condition != 0, a, b)
    return y, (condition, shapes) if keep else None


@select.backward
def select_backward(dy: Array, saved: tuple) -> tuple[Array, Array]:
    """Return the gradients of a and b. The condition has none."""
    condition, (a, b) = saved
    xp = backend_of(dy).xp
    none = 0.0 * dy
    return (
        unbroadcast(xp.where(condition != 0, dy, none), a),
        unbroadcast(xp.where(condition != 0, none, dy), b),
    )


# --- one array ------------------------------------------------------------------------------------

_Rule = tuple[Callable[[Any, Array], Array], Callable[[Any, Array, Array], Array]]


def _softplus(xp: Any, x: Array) -> Array:
    return xp.maximum(x, 0.0) + xp.log1p(xp.exp(-xp.abs(x)))


def _mish_slope(xp: Any, x: Array, y: Array) -> Array:
    t = xp.tanh(_softplus(xp, x))
    return t + x * (1.0 - t * t) * logistic(x)


def _zero(xp: Any, x: Array, y: Array) -> Array:
    return xp.zeros_like(x)


def _step(function: str) -> _Rule:
    """A function that is constant between steps."""
    return lambda xp, x: getattr(xp, function)(x), _zero


def _plain(function: str, slope: Callable[[Any, Array, Array], Array]) -> _Rule:
    return lambda xp, x: getattr(xp, function)(x), slope


FUNCTIONS: dict[str, _Rule] = {
    "abs": _plain("abs", lambda xp, x, y: xp.sign(x)),
    "acos": _plain("acos", lambda xp, x, y: -1.0 / xp.sqrt(1.0 - x * x)),
    "acosh": _plain("acosh", lambda xp, x, y: 1.0 / xp.sqrt(x * x - 1.0)),
    "asin": _plain("asin", lambda xp, x, y: 1.0 / xp.sqrt(1.0 - x * x)),
    "asinh": _plain("asinh", lambda xp, x, y: 1.0 / xp.sqrt(x * x + 1.0)),
    "atan": _plain("atan", lambda xp, x, y: 1.0 / (1.0 + x * x)),
    "atanh": _plain("atanh", lambda xp, x, y: 1.0 / (1.0 - x * x)),
    "ceil": _step("ceil"),
    "cos": _plain("cos", lambda xp, x, y: -xp.sin(x)),
    "cosh": _plain("cosh", lambda xp, x, y: xp.sinh(x)),
    "erf": (lambda xp, x: erf(x), lambda xp, x, y: 2.0 / sqrt(pi) * xp.exp(-x * x)),
    "exp": _plain("exp", lambda xp, x, y: y),
    "floor": _step("floor"),
    "log": _plain("log", lambda xp, x, y: 1.0 / x),
    "logical_not": (lambda xp, x: xp.astype(x == 0, x.dtype), _zero),
    "mish": (lambda xp, x: x * xp.tanh(_softplus(xp, x)), _mish_slope),
    "negative": (lambda xp, x: -x, lambda xp, x, y: -xp.ones_like(x)),
    "nonzero": (lambda xp, x: xp.astype(x != 0, x.dtype), _zero),
    "reciprocal": (lambda xp, x: 1.0 / x, lambda xp, x, y: -y * y),
    "round": _step("round"),
    "sign": _step("sign"),
    "sin": _plain("sin", lambda xp, x, y: xp.cos(x)),
    "sinh": _plain("sinh", lambda xp, x, y: xp.cosh(x)),
    "softsign": (
        lambda xp, x: x / (1.0 + xp.abs(x)),
        lambda xp, x, y: 1.0 / (1.0 + xp.abs(x)) ** 2,
    ),
    "sqrt": _plain("sqrt", lambda xp, x, y: 0.5 / y),
    "tan": _plain("tan", lambda xp, x, y: 1.0 + y * y),
}
"""Per name: the function of (xp, x), and its derivative as a function of (xp, x, y)."""


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

    ``function`` is a name in ``FUNCTIONS``: abs, acos, acosh, asin, asinh, atan, atanh, ceil, cos,
    cosh, erf, exp, floor, log, logical_not, mish, negative, nonzero, reciprocal, round, sign, sin,
    sinh, softsign, sqrt or tan; round takes half to even. Returns y with the shape of x, and the
    cache. Raises ArgumentError if the name is unknown, ArrayError if x is not floating point.

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
