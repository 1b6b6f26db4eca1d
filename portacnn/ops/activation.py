"""Activations: functions of each element. Shapes and memory order stay what they are.

Softmax and log-softmax, which look at a whole axis, are in ``softmax``.
"""

from collections.abc import Callable
from math import pi, sqrt
from typing import Any

from portacnn.arguments import one_of, real
from portacnn.errors import PortacnnError, ShapeError
from portacnn.ops.dispatch import check_arrays, op
from portacnn.ops.pointwise import unbroadcast
from portacnn.ops.special import erf, logistic
from portacnn.runtime import Array, backend_of, describe


def _check(name: str, check_options: Callable[..., None] | None = None) -> Callable[..., None]:
    """What an activation's input is checked by, before its forward; ``check_options`` looks at the
    numbers."""

    def check(x: Array, *numbers: Any, keep: bool = True, **options: Any) -> None:
        check_arrays(name, x=x)
        if check_options is not None:
            try:
                check_options(*numbers, **options)
            except PortacnnError as error:
                raise error.at(name)

    return check


@op(_check("relu"))
def relu(x: Array, *, keep: bool = True) -> tuple[Array, Any]:
    """max(x, 0) of each element of x (any shape, floating point). NaN stays NaN."""
    y = backend_of(x).xp.maximum(x, 0.0)
    return y, y if keep else None


@relu.backward
def relu_backward(dy: Array, y: Array) -> Array:
    """dx = 0 where the output was at most zero, else dy. NaN passes dy on, as in PyTorch."""
    return backend_of(y).xp.where(y <= 0, 0.0, dy)


def check_leaky_relu(negative_slope: float = 0.01) -> None:
    real("negative_slope", negative_slope)


@op(_check("leaky_relu", check_leaky_relu))
def leaky_relu(x: Array, negative_slope: float = 0.01, *, keep: bool = True) -> tuple[Array, Any]:
    """x above zero, negative_slope * x below (Maas et al., 2013), of each element of x (any shape,
    floating point)."""
    xp = backend_of(x).xp
    y = xp.maximum(x, 0.0) + negative_slope * xp.minimum(x, 0.0)
    return y, (x > 0, negative_slope) if keep else None


@leaky_relu.backward
def leaky_relu_backward(dy: Array, saved: tuple) -> Array:
    """dx = dy where the input was above zero, else negative_slope * dy."""
    above, negative_slope = saved
    return backend_of(dy).xp.where(above, dy, negative_slope * dy)


def check_elu(alpha: float = 1.0) -> None:
    real("alpha", alpha)


@op(_check("elu", check_elu))
def elu(x: Array, alpha: float = 1.0, *, keep: bool = True) -> tuple[Array, Any]:
    """x above zero, alpha * (exp(x) - 1) below (Clevert et al., 2016), of each element of x (any
    shape, floating point)."""
    xp = backend_of(x).xp
    y = xp.where(x > 0, x, alpha * xp.expm1(xp.minimum(x, 0.0)))
    return y, (x, alpha) if keep else None


@elu.backward
def elu_backward(dy: Array, saved: tuple) -> Array:
    """dx = dy where the input was above zero, else dy * alpha * exp(x)."""
    x, alpha = saved
    xp = backend_of(dy).xp
    return dy * xp.where(x > 0, 1.0, alpha * xp.exp(xp.minimum(x, 0.0)))


@op(_check("sigmoid"))
def sigmoid(x: Array, *, keep: bool = True) -> tuple[Array, Any]:
    """1 / (1 + exp(-x)) of each element of x (any shape, floating point), with no overflow on
    either side."""
    y = logistic(x)
    return y, y if keep else None


@sigmoid.backward
def sigmoid_backward(dy: Array, y: Array) -> Array:
    """dx = dy * y * (1 - y)."""
    return dy * (y * (1.0 - y))


@op(_check("tanh"))
def tanh(x: Array, *, keep: bool = True) -> tuple[Array, Any]:
    """The hyperbolic tangent of each element of x (any shape, floating point)."""
    y = backend_of(x).xp.tanh(x)
    return y, y if keep else None


@tanh.backward
def tanh_backward(dy: Array, y: Array) -> Array:
    """dx = dy * (1 - y^2)."""
    return dy * ((1.0 - y) * (1.0 + y))


@op(_check("silu"))
def silu(x: Array, *, keep: bool = True) -> tuple[Array, Any]:
    """x * sigmoid(x), also called swish, of each element of x (any shape, floating point)."""
    gate = logistic(x)
    return x * gate, (x, gate) if keep else None


@silu.backward
def silu_backward(dy: Array, saved: tuple) -> Array:
    """dx = dy * s * (1 + x * (1 - s)), where s = sigmoid(x)."""
    x, gate = saved
    return dy * (gate * (1.0 + x * (1.0 - gate)))


def check_gelu(approximate: str = "none") -> None:
    one_of("approximate", approximate, "none", "tanh")


_A, _B = sqrt(2.0 / pi), 0.044715


@op(_check("gelu", check_gelu))
def gelu(x: Array, *, approximate: str = "none", keep: bool = True) -> tuple[Array, Any]:
    """x * P(X <= x) for a standard normal X (Hendrycks and Gimpel, 2016), of each element of x (any
    shape, floating point).

    That is x/2 * (1 + erf(x / sqrt(2))), or with ``approximate="tanh"`` x/2 * (1 + tanh(sqrt(2/pi)
    * (x + 0.044715 x^3))).
    """
    # from -1 to 1
    rising = erf(x * sqrt(0.5)) if approximate == "none" else backend_of(x).xp.tanh(_bent(x)[0])
    below = 0.5 * (1.0 + rising)
    return x * below, (x, below, approximate) if keep else None


@gelu.backward
def gelu_backward(dy: Array, saved: tuple) -> Array:
    """dx = dy * (P + x * dP/dx): for "none" dP/dx is the normal density, for "tanh" the derivative
    of what stands for P."""
    x, below, approximate = saved
    xp = backend_of(dy).xp
    if approximate == "none":
        # where the density is 0 in any precision, x^2 could overflow
        near = xp.clip(x, -40.0, 40.0)
        density = xp.exp(-0.5 * near * near) * (1.0 / sqrt(2.0 * pi))
        return dy * (below + near * density)
    _, slope, near = _bent(x)
    return dy * (below + near * slope * (2.0 * below * (1.0 - below)))


def _bent(x: Array) -> tuple[Array, Array, Array]:
    """sqrt(2/pi) * (x + 0.044715 x^3), its derivative, and x itself, held to where the tanh of it
    is not yet 1 or -1."""
    near = backend_of(x).xp.clip(x, -40.0, 40.0)
    square = near * near
    return _A * near * (1.0 + _B * square), _A * (1.0 + 3.0 * _B * square), near


def check_softplus(beta: float = 1.0, threshold: float = 20.0) -> None:
    real("beta", beta, above=0.0)
    real("threshold", threshold)


@op(_check("softplus", check_softplus))
def softplus(
    x: Array, beta: float = 1.0, threshold: float = 20.0, *, keep: bool = True
) -> tuple[Array, Any]:
    """log(1 + exp(beta * x)) / beta of each element of x (any shape, floating point); x itself
    where beta * x > threshold."""
    xp = backend_of(x).xp
    z = beta * x
    y = xp.where(z > threshold, x, (xp.maximum(z, 0.0) + xp.log1p(xp.exp(-xp.abs(z)))) / beta)
    return y, (z, threshold) if keep else None


@softplus.backward
def softplus_backward(dy: Array, saved: tuple) -> Array:
    """dx = dy * sigmoid(beta * x); dy where beta * x > threshold."""
    z, threshold = saved
    return backend_of(dy).xp.where(z > threshold, dy, dy * logistic(z))


# --- with straight pieces, or numbers to be learnt ------------------------------------------------


def _check_numbers(**numbers: float) -> None:
    for name, value in numbers.items():
        real(name, value)


def check_clip(min: float | None = None, max: float | None = None) -> None:
    """Raise ArgumentError for bounds that are no numbers."""
    _check_numbers(
        **{name: value for name, value in (("min", min), ("max", max)) if value is not None}
    )


def check_scaled_elu(alpha: float = 1.0, beta: float = 1.0, gamma: float = 1.0) -> None:
    """Raise ArgumentError for what is no number."""
    _check_numbers(alpha=alpha, beta=beta, gamma=gamma)


def check_hard_sigmoid(alpha: float = 1.0 / 6.0, beta: float = 0.5) -> None:
    """Raise ArgumentError for what is no number."""
    _check_numbers(alpha=alpha, beta=beta)


@op(_check("scaled_elu", check_scaled_elu))
def scaled_elu(
    x: Array, *, alpha: float = 1.0, beta: float = 1.0, gamma: float = 1.0, keep: bool = True
) -> tuple[Array, tuple | None]:
    """gamma * x above zero, gamma * alpha * (exp(beta * x) - 1) below: what SELU and CELU are made
    of."""
    xp = backend_of(x).xp
    y = gamma * xp.where(x > 0, x, alpha * xp.expm1(beta * xp.minimum(x, 0.0)))
    return y, (x, alpha, beta, gamma) if keep else None


@scaled_elu.backward
def scaled_elu_backward(dy: Array, saved: tuple) -> Array:
    """dx = gamma * dy above zero, gamma * alpha * beta * exp(beta * x) * dy below."""
    x, alpha, beta, gamma = saved
    xp = backend_of(dy).xp
    return gamma * dy * xp.where(x > 0, 1.0, alpha * beta * xp.exp(beta * xp.minimum(x, 0.0)))


@op(_check("hard_sigmoid", check_hard_sigmoid))
def hard_sigmoid(
    x: Array, *, alpha: float = 1.0 / 6.0, beta: float = 0.5, keep: bool = True
) -> tuple[Array, tuple | None]:
    """max(0, min(1, alpha * x + beta)) of each element of x (any shape, floating point)."""
    xp = backend_of(x).xp
    line = alpha * x + beta
    return xp.clip(line, 0.0, 1.0), ((line > 0) & (line < 1), alpha) if keep else None


@hard_sigmoid.backward
def hard_sigmoid_backward(dy: Array, saved: tuple) -> Array:
    """dx = alpha * dy on the slope, else 0."""
    slope, alpha = saved
    return backend_of(dy).xp.where(slope, alpha * dy, 0.0)


@op(_check("hard_swish"))
def hard_swish(x: Array, *, keep: bool = True) -> tuple[Array, Any]:
    """x * max(0, min(1, x / 6 + 1/2)) of each element of x (any shape, floating point; Howard et
    al., 2019)."""
    return x * backend_of(x).xp.clip(x / 6.0 + 0.5, 0.0, 1.0), x if keep else None


@hard_swish.backward
def hard_swish_backward(dy: Array, x: Array) -> Array:
    """dx = 0 below -3, dy above 3, dy * (x / 3 + 1/2) between."""
    xp = backend_of(dy).xp
    return dy * xp.where(x <= -3, 0.0, xp.where(x >= 3, 1.0, x / 3.0 + 0.5))


@op(_check("clip", check_clip))
def clip(
    x: Array, *, min: float | None = None, max: float | None = None, keep: bool = True
) -> tuple[Array, tuple | None]:
    """x kept between ``min`` and ``max``, either of which may be None (any shape, floating point);
    max where min is above it."""
    xp = backend_of(x).xp
    y = x if min is None else xp.maximum(x, float(min))
    y = y if max is None else xp.minimum(y, float(max))
    return (xp.asarray(y, copy=True) if y is x else y), (x, min, max) if keep else None


@clip.backward
def clip_backward(dy: Array, saved: tuple) -> Array:
    """dx = dy where x lies within the bounds, or on one, else 0."""
    x, least, most = saved
    xp = backend_of(dy).xp
    dx = dy if least is None else xp.where(x >= float(least), dy, 0.0)
    return dx if most is None else xp.where(x <= float(most), dx, 0.0)


def _check_prelu(x: Array, slope: Array, *, keep: bool = True) -> None:
    check_arrays("prelu", x=x, slope=slope)
    check_spread(tuple(slope.shape), tuple(x.shape), "prelu", describe(x))


def check_spread(
    small: tuple[int, ...], wide: tuple[int, ...], where: str | None, what: str
) -> None:
    """Raise ShapeError unless ``small`` can be broadcast to ``wide``, and so leaves it as it is."""
    if len(small) > len(wide) or any(
        n not in (1, m) for n, m in zip(reversed(small), reversed(wide), strict=False)
    ):
        raise ShapeError(f"a shape {small} cannot be spread over {what}", where)


@op(_check_prelu)
def prelu(x: Array, slope: Array, *, keep: bool = True) -> tuple[Array, tuple | None]:
    """x above zero, slope * x below (He et al., 2015); ``slope`` is broadcast to x, (C, 1, 1) has
    one for each channel."""
    return backend_of(x).xp.where(x > 0, x, slope * x), (x, slope) if keep else None


@prelu.backward
def prelu_backward(dy: Array, saved: tuple, *, need_dx: bool = True) -> tuple[Array | None, Array]:
    """dy -> dx or None, dslope."""
    x, slope = saved
    xp = backend_of(dy).xp
    dslope = unbroadcast(xp.where(x > 0, 0.0, x * dy), tuple(slope.shape))
    return xp.where(x > 0, dy, slope * dy) if need_dx else None, dslope
