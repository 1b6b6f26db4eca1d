"""Activations: functions of each element. Shape and memory order of the result are those of the
input.

All of them raise ``ArrayError`` if x is not floating point, and ``ArgumentError`` if an option is
not a valid number. Softmax and log-softmax work along an axis and are in ``_softmax``.
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
    """Return the check of an activation's arguments. ``check_options`` checks the options."""

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
    """Return max(x, 0) of each element. NaN stays NaN.

    x: any shape, floating point. Returns y with the shape of x, and the cache.

    >>> y, cache = ops.relu(np.array([-1.0, 0.0, 2.0]))
    >>> np.round(y, 4)
    array([0., 0., 2.])
    >>> np.round(ops.relu_backward(np.ones(3), cache), 4)
    array([0., 0., 1.])
    """
    y = backend_of(x).xp.maximum(x, 0.0)
    return y, y if keep else None


@relu.backward
def relu_backward(dy: Array, y: Array) -> Array:
    """Return dx: 0 where the output was at most zero, else dy. NaN passes dy on, as in PyTorch."""
    return backend_of(y).xp.where(y <= 0, 0.0, dy)


def check_leaky_relu(negative_slope: float = 0.01) -> None:
    """Raise ArgumentError if the slope is not a finite number."""
    real("negative_slope", negative_slope)


@op(_check("leaky_relu", check_leaky_relu))
def leaky_relu(x: Array, negative_slope: float = 0.01, *, keep: bool = True) -> tuple[Array, Any]:
    """Return x above zero and negative_slope * x below (Maas et al., 2013).

    x: any shape, floating point. Returns y with the shape of x, and the cache.

    >>> y, cache = ops.leaky_relu(np.array([-1.0, 0.0, 2.0]), 0.1)
    >>> np.round(y, 4)
    array([-0.1,  0. ,  2. ])
    >>> np.round(ops.leaky_relu_backward(np.ones(3), cache), 4)
    array([0.1, 0.1, 1. ])
    """
    xp = backend_of(x).xp
    y = xp.maximum(x, 0.0) + negative_slope * xp.minimum(x, 0.0)
    return y, (x > 0, negative_slope) if keep else None


@leaky_relu.backward
def leaky_relu_backward(dy: Array, saved: tuple) -> Array:
    """Return dx: dy where the input was above zero, else negative_slope * dy."""
    above, negative_slope = saved
    return backend_of(dy).xp.where(above, dy, negative_slope * dy)


def check_elu(alpha: float = 1.0) -> None:
    """Raise ArgumentError if alpha is not a finite number."""
    real("alpha", alpha)


@op(_check("elu", check_elu))
def elu(x: Array, alpha: float = 1.0, *, keep: bool = True) -> tuple[Array, Any]:
    """Return x above zero and alpha * (exp(x) - 1) below (Clevert et al., 2016).

    x: any shape, floating point. Returns y with the shape of x, and the cache.

    >>> y, cache = ops.elu(np.array([-1.0, 0.0, 2.0]))
    >>> np.round(y, 4)
    array([-0.6321,  0.    ,  2.    ])
    >>> np.round(ops.elu_backward(np.ones(3), cache), 4)
    array([0.3679, 1.    , 1.    ])
    """
    xp = backend_of(x).xp
    y = xp.where(x > 0, x, alpha * xp.expm1(xp.minimum(x, 0.0)))
    return y, (x, alpha) if keep else None


@elu.backward
def elu_backward(dy: Array, saved: tuple) -> Array:
    """Return dx: dy where the input was above zero, else dy * alpha * exp(x)."""
    x, alpha = saved
    xp = backend_of(dy).xp
    return dy * xp.where(x > 0, 1.0, alpha * xp.exp(xp.minimum(x, 0.0)))


@op(_check("sigmoid"))
def sigmoid(x: Array, *, keep: bool = True) -> tuple[Array, Any]:
    """Return 1 / (1 + exp(-x)) of each element. Large values do not overflow.

    x: any shape, floating point. Returns y with the shape of x, and the cache.

    >>> y, cache = ops.sigmoid(np.array([-1.0, 0.0, 2.0]))
    >>> np.round(y, 4)
    array([0.2689, 0.5   , 0.8808])
    >>> np.round(ops.sigmoid_backward(np.ones(3), cache), 4)
    array([0.1966, 0.25  , 0.105 ])
    """
    y = logistic(x)
    return y, y if keep else None


@sigmoid.backward
def sigmoid_backward(dy: Array, y: Array) -> Array:
    """Return dx = dy * y * (1 - y)."""
    return dy * (y * (1.0 - y))


@op(_check("tanh"))
def tanh(x: Array, *, keep: bool = True) -> tuple[Array, Any]:
    """Return the hyperbolic tangent of each element.

    x: any shape, floating point. Returns y with the shape of x, and the cache.

    >>> y, cache = ops.tanh(np.array([-1.0, 0.0, 2.0]))
    >>> np.round(y, 4)
    array([-0.7616,  0.    ,  0.964 ])
    >>> np.round(ops.tanh_backward(np.ones(3), cache), 4)
    array([0.42  , 1.    , 0.0707])
    """
    y = backend_of(x).xp.tanh(x)
    return y, y if keep else None


@tanh.backward
def tanh_backward(dy: Array, y: Array) -> Array:
    """Return dx = dy * (1 - y^2)."""
    return dy * ((1.0 - y) * (1.0 + y))


@op(_check("silu"))
def silu(x: Array, *, keep: bool = True) -> tuple[Array, Any]:
    """Return x * sigmoid(x), also called swish, of each element.

    x: any shape, floating point. Returns y with the shape of x, and the cache.

    >>> y, cache = ops.silu(np.array([-1.0, 0.0, 2.0]))
    >>> np.round(y, 4)
    array([-0.2689,  0.    ,  1.7616])
    >>> np.round(ops.silu_backward(np.ones(3), cache), 4)
    array([0.0723, 0.5   , 1.0908])
    """
    gate = logistic(x)
    return x * gate, (x, gate) if keep else None


@silu.backward
def silu_backward(dy: Array, saved: tuple) -> Array:
    """Return dx = dy * s * (1 + x * (1 - s)) with s = sigmoid(x)."""
    x, gate = saved
    return dy * (gate * (1.0 + x * (1.0 - gate)))


def check_gelu(approximate: str = "none") -> None:
    """Raise ArgumentError if ``approximate`` is neither "none" nor "tanh"."""
    one_of("approximate", approximate, "none", "tanh")


_A, _B = sqrt(2.0 / pi), 0.044715


@op(_check("gelu", check_gelu))
def gelu(x: Array, *, approximate: str = "none", keep: bool = True) -> tuple[Array, Any]:
    """Return x * P(X <= x) of each element, for a standard normal X (Hendrycks and Gimpel, 2016).

    x: any shape, floating point. Returns y with the shape of x, and the cache.

    The formula is x/2 * (1 + erf(x / sqrt(2))). With ``approximate="tanh"`` it is x/2 * (1 +
    tanh(sqrt(2/pi) * (x + 0.044715 x^3))).

    >>> y, cache = ops.gelu(np.array([-1.0, 0.0, 2.0]))
    >>> np.round(y, 4)
    array([-0.1587,  0.    ,  1.9545])
    >>> np.round(ops.gelu_backward(np.ones(3), cache), 4)
    array([-0.0833,  0.5   ,  1.0852])
    """
    # the tanh or erf term, -1 to 1
    rising = erf(x * sqrt(0.5)) if approximate == "none" else backend_of(x).xp.tanh(_bent(x)[0])
    below = 0.5 * (1.0 + rising)
    return x * below, (x, below, approximate) if keep else None


@gelu.backward
def gelu_backward(dy: Array, saved: tuple) -> Array:
    """Return dx = dy * (P + x * dP/dx). dP/dx is the normal density, or with "tanh" the derivative
    of the approximation.
    """
    x, below, approximate = saved
    xp = backend_of(dy).xp
    if approximate == "none":
        # x^2 could overflow; beyond 40 the density is 0 in any precision
        near = xp.clip(x, -40.0, 40.0)
        density = xp.exp(-0.5 * near * near) * (1.0 / sqrt(2.0 * pi))
        return dy * (below + near * density)
    _, slope, near = _bent(x)
    return dy * (below + near * slope * (2.0 * below * (1.0 - below)))


def _bent(x: Array) -> tuple[Array, Array, Array]:
    """Return sqrt(2/pi) * (x + 0.044715 x^3), its derivative, and x clipped to -40..40, beyond
    which the tanh is -1 or 1.
    """
    near = backend_of(x).xp.clip(x, -40.0, 40.0)
    square = near * near
    return _A * near * (1.0 + _B * square), _A * (1.0 + 3.0 * _B * square), near


def check_softplus(beta: float = 1.0, threshold: float = 20.0) -> None:
    """Raise ArgumentError if beta is not above 0 or the threshold is not a finite number."""
    real("beta", beta, above=0.0)
    real("threshold", threshold)


@op(_check("softplus", check_softplus))
def softplus(
    x: Array, beta: float = 1.0, threshold: float = 20.0, *, keep: bool = True
) -> tuple[Array, Any]:
    """Return log(1 + exp(beta * x)) / beta of each element; x itself if beta * x > threshold.

    x: any shape, floating point. Returns y with the shape of x, and the cache.

    >>> y, cache = ops.softplus(np.array([-1.0, 0.0, 2.0]))
    >>> np.round(y, 4)
    array([0.3133, 0.6931, 2.1269])
    >>> np.round(ops.softplus_backward(np.ones(3), cache), 4)
    array([0.2689, 0.5   , 0.8808])
    """
    xp = backend_of(x).xp
    z = beta * x
    y = xp.where(z > threshold, x, (xp.maximum(z, 0.0) + xp.log1p(xp.exp(-xp.abs(z)))) / beta)
    return y, (z, threshold) if keep else None


@softplus.backward
def softplus_backward(dy: Array, saved: tuple) -> Array:
    """Return dx = dy * sigmoid(beta * x); dy where beta * x > threshold."""
    z, threshold = saved
    return backend_of(dy).xp.where(z > threshold, dy, dy * logistic(z))


# --- piecewise linear, or with parameters ---------------------------------------------------------


def _check_numbers(**numbers: float) -> None:
    for name, value in numbers.items():
        real(name, value)


def check_clip(min: float | None = None, max: float | None = None) -> None:
    """Raise ArgumentError if a bound is neither None nor a finite number."""
    _check_numbers(
        **{name: value for name, value in (("min", min), ("max", max)) if value is not None}
    )


def check_scaled_elu(alpha: float = 1.0, beta: float = 1.0, gamma: float = 1.0) -> None:
    """Raise ArgumentError if a value is not a finite number."""
    _check_numbers(alpha=alpha, beta=beta, gamma=gamma)


def check_hard_sigmoid(alpha: float = 1.0 / 6.0, beta: float = 0.5) -> None:
    """Raise ArgumentError if a value is not a finite number."""
    _check_numbers(alpha=alpha, beta=beta)


@op(_check("scaled_elu", check_scaled_elu))
def scaled_elu(
    x: Array, *, alpha: float = 1.0, beta: float = 1.0, gamma: float = 1.0, keep: bool = True
) -> tuple[Array, tuple | None]:
    """Return gamma * x above zero and gamma * alpha * (exp(beta * x) - 1) below.

    x: any shape, floating point. Returns y with the shape of x, and the cache.

    SELU and CELU are special cases.

    >>> y, cache = ops.scaled_elu(np.array([-1.0, 0.0, 2.0]), alpha=2.0)
    >>> np.round(y, 4)
    array([-1.2642,  0.    ,  2.    ])
    >>> np.round(ops.scaled_elu_backward(np.ones(3), cache), 4)
    array([0.7358, 2.    , 1.    ])
    """
    xp = backend_of(x).xp
    y = gamma * xp.where(x > 0, x, alpha * xp.expm1(beta * xp.minimum(x, 0.0)))
    return y, (x, alpha, beta, gamma) if keep else None


@scaled_elu.backward
def scaled_elu_backward(dy: Array, saved: tuple) -> Array:
    """Return dx: gamma * dy above zero, gamma * alpha * beta * exp(beta * x) * dy below."""
    x, alpha, beta, gamma = saved
    xp = backend_of(dy).xp
    return gamma * dy * xp.where(x > 0, 1.0, alpha * beta * xp.exp(beta * xp.minimum(x, 0.0)))


@op(_check("hard_sigmoid", check_hard_sigmoid))
def hard_sigmoid(
    x: Array, *, alpha: float = 1.0 / 6.0, beta: float = 0.5, keep: bool = True
) -> tuple[Array, tuple | None]:
    """Return max(0, min(1, alpha * x + beta)) of each element.

    x: any shape, floating point. Returns y with the shape of x, and the cache.

    >>> y, cache = ops.hard_sigmoid(np.array([-1.0, 0.0, 2.0]))
    >>> np.round(y, 4)
    array([0.3333, 0.5   , 0.8333])
    >>> np.round(ops.hard_sigmoid_backward(np.ones(3), cache), 4)
    array([0.1667, 0.1667, 0.1667])
    """
    xp = backend_of(x).xp
    line = alpha * x + beta
    return xp.clip(line, 0.0, 1.0), ((line > 0) & (line < 1), alpha) if keep else None


@hard_sigmoid.backward
def hard_sigmoid_backward(dy: Array, saved: tuple) -> Array:
    """Return dx: alpha * dy where 0 < y < 1, else 0."""
    slope, alpha = saved
    return backend_of(dy).xp.where(slope, alpha * dy, 0.0)


@op(_check("hard_swish"))
def hard_swish(x: Array, *, keep: bool = True) -> tuple[Array, Any]:
    """Return x * max(0, min(1, x / 6 + 1/2)) of each element (Howard et al., 2019).

    x: any shape, floating point. Returns y with the shape of x, and the cache.

    >>> y, cache = ops.hard_swish(np.array([-1.0, 0.0, 2.0]))
    >>> np.round(y, 4)
    array([-0.3333,  0.    ,  1.6667])
    >>> np.round(ops.hard_swish_backward(np.ones(3), cache), 4)
    array([0.1667, 0.5   , 1.1667])
    """
    return x * backend_of(x).xp.clip(x / 6.0 + 0.5, 0.0, 1.0), x if keep else None


@hard_swish.backward
def hard_swish_backward(dy: Array, x: Array) -> Array:
    """Return dx: 0 below -3, dy above 3, dy * (x / 3 + 1/2) between."""
    xp = backend_of(dy).xp
    return dy * xp.where(x <= -3, 0.0, xp.where(x >= 3, 1.0, x / 3.0 + 0.5))


@op(_check("clip", check_clip))
def clip(
    x: Array, *, min: float | None = None, max: float | None = None, keep: bool = True
) -> tuple[Array, tuple | None]:
    """Return x limited to the range from ``min`` to ``max``. None means no bound.

    x: any shape, floating point. Returns y with the shape of x, and the cache.

    If min is above max, every element becomes max.

    >>> y, cache = ops.clip(np.array([-1.0, 0.0, 2.0]), min=0.0, max=1.0)
    >>> np.round(y, 4)
    array([0., 0., 1.])
    >>> np.round(ops.clip_backward(np.ones(3), cache), 4)
    array([0., 1., 0.])
    """
    xp = backend_of(x).xp
    y = x if min is None else xp.maximum(x, float(min))
    y = y if max is None else xp.minimum(y, float(max))
    return (xp.asarray(y, copy=True) if y is x else y), (x, min, max) if keep else None


@clip.backward
def clip_backward(dy: Array, saved: tuple) -> Array:
    """Return dx: dy where x is within the bounds or equal to one, else 0."""
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
    """Raise ShapeError if ``small`` cannot be broadcast to ``wide`` or would change its shape."""
    if len(small) > len(wide) or any(
        n not in (1, m) for n, m in zip(reversed(small), reversed(wide), strict=False)
    ):
        raise ShapeError(f"expected a shape that broadcasts to {what}, got {small}", where)


@op(_check_prelu)
def prelu(x: Array, slope: Array, *, keep: bool = True) -> tuple[Array, tuple | None]:
    """Return x above zero and slope * x below (He et al., 2015).

    x: any shape, floating point. slope: broadcast to x; (C, 1, 1) is one value per channel of
    images. Returns y with the shape of x, and the cache.

    >>> x, slope = np.array([[-1.0, 2.0], [-4.0, 1.0]]), np.array([0.5, 0.25])
    >>> y, cache = ops.prelu(x, slope)
    >>> y
    array([[-0.5,  2. ],
           [-2. ,  1. ]])
    >>> dx, dslope = ops.prelu_backward(np.ones((2, 2)), cache)
    >>> dslope
    array([-5.,  0.])
    """
    return backend_of(x).xp.where(x > 0, x, slope * x), (x, slope) if keep else None


@prelu.backward
def prelu_backward(
    dy: Array, saved: tuple, *, need_dx: bool = True, need_dslope: bool = True
) -> tuple[Array | None, Array | None]:
    """Return dx and dslope. Each is None if its ``need`` is False."""
    x, slope = saved
    xp = backend_of(dy).xp
    dslope = None
    if need_dslope:
        dslope = unbroadcast(xp.where(x > 0, 0.0, x * dy), tuple(slope.shape))
    return xp.where(x > 0, dy, slope * dy) if need_dx else None, dslope
