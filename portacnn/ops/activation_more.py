"""Activations with straight pieces or with numbers to be learnt. Shapes and memory order stay what they are."""

from collections.abc import Callable
from functools import partial
from typing import Any

from portacnn.arguments import real
from portacnn.errors import PortacnnError, ShapeError
from portacnn.ops.arithmetic import unbroadcast
from portacnn.ops.dispatch import check_arrays, op
from portacnn.runtime import Array, backend_of, describe


def _check(name: str, check_options: Callable[..., None], x: Array, **options: Any) -> None:
    options.pop("keep", None)
    check_arrays(name, x=x)
    try:
        check_options(**options)
    except PortacnnError as error:
        raise error.at(name)


def _check_numbers(**numbers: float) -> None:
    for name, value in numbers.items():
        real(name, value)


def check_clip(min: float | None = None, max: float | None = None) -> None:
    """Raise ArgumentError for bounds that are no numbers."""
    _check_numbers(**{name: value for name, value in (("min", min), ("max", max)) if value is not None})


def check_scaled_elu(alpha: float = 1.0, beta: float = 1.0, gamma: float = 1.0) -> None:
    """Raise ArgumentError for what is no number."""
    _check_numbers(alpha=alpha, beta=beta, gamma=gamma)


def check_hard_sigmoid(alpha: float = 1.0 / 6.0, beta: float = 0.5) -> None:
    """Raise ArgumentError for what is no number."""
    _check_numbers(alpha=alpha, beta=beta)


@op(partial(_check, "scaled_elu", check_scaled_elu))
def scaled_elu(
    x: Array, *, alpha: float = 1.0, beta: float = 1.0, gamma: float = 1.0, keep: bool = True
) -> tuple[Array, tuple | None]:
    """gamma * x above zero, gamma * alpha * (exp(beta * x) - 1) below: what SELU and CELU are made of."""
    xp = backend_of(x).xp
    y = gamma * xp.where(x > 0, x, alpha * xp.expm1(beta * xp.minimum(x, 0.0)))
    return y, (x, alpha, beta, gamma) if keep else None


@scaled_elu.backward
def scaled_elu_backward(dy: Array, saved: tuple) -> Array:
    """dx = gamma * dy above zero, gamma * alpha * beta * exp(beta * x) * dy below."""
    x, alpha, beta, gamma = saved
    xp = backend_of(dy).xp
    return gamma * dy * xp.where(x > 0, 1.0, alpha * beta * xp.exp(beta * xp.minimum(x, 0.0)))


@op(partial(_check, "hard_sigmoid", check_hard_sigmoid))
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


@op(partial(_check, "hard_swish", _check_numbers))
def hard_swish(x: Array, *, keep: bool = True) -> tuple[Array, Any]:
    """x * max(0, min(1, x / 6 + 1/2)) of each element of x (any shape, floating point; Howard et al., 2019)."""
    return x * backend_of(x).xp.clip(x / 6.0 + 0.5, 0.0, 1.0), x if keep else None


@hard_swish.backward
def hard_swish_backward(dy: Array, x: Array) -> Array:
    """dx = 0 below -3, dy above 3, dy * (x / 3 + 1/2) between."""
    xp = backend_of(dy).xp
    return dy * xp.where(x <= -3, 0.0, xp.where(x >= 3, 1.0, x / 3.0 + 0.5))


@op(partial(_check, "clip", check_clip))
def clip(
    x: Array, *, min: float | None = None, max: float | None = None, keep: bool = True
) -> tuple[Array, tuple | None]:
    """x kept between ``min`` and ``max``, either of which may be None (any shape, floating point); max where min is above it."""
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


def check_spread(small: tuple[int, ...], wide: tuple[int, ...], where: str | None, what: str) -> None:
    """Raise ShapeError unless ``small`` can be broadcast to ``wide``, and so leaves it as it is."""
    if len(small) > len(wide) or any(n not in (1, m) for n, m in zip(reversed(small), reversed(wide), strict=False)):
        raise ShapeError(f"a shape {small} cannot be spread over {what}", where)


@op(_check_prelu)
def prelu(x: Array, slope: Array, *, keep: bool = True) -> tuple[Array, tuple | None]:
    """x above zero, slope * x below (He et al., 2015); ``slope`` is broadcast to x, (C, 1, 1) has one for each channel."""
    return backend_of(x).xp.where(x > 0, x, slope * x), (x, slope) if keep else None


@prelu.backward
def prelu_backward(dy: Array, saved: tuple, *, need_dx: bool = True) -> tuple[Array | None, Array]:
    """dy -> dx or None, dslope."""
    x, slope = saved
    xp = backend_of(dy).xp
    dslope = unbroadcast(xp.where(x > 0, 0.0, x * dy), tuple(slope.shape))
    return xp.where(x > 0, dy, slope * dy) if need_dx else None, dslope
