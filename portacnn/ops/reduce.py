"""Sums, means, products, extremes and norms over some axes, each with its gradient.

Notation: in the table, x is the input and y the result with the reduced axes kept, of length 1.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

from portacnn.arguments import one_of, wholes
from portacnn.errors import ArgumentError, PortacnnError, ShapeError
from portacnn.ops.dispatch import check_arrays, op
from portacnn.runtime import Array, backend_of, describe

Axes = tuple[int, ...]


class _Reduction(NamedTuple):
    """y as a function of (xp, x, axes), and the gradient of x as one of (xp, dy, x, y, axes). None:
    it is dy for each element, so x need not be kept."""

    y: Callable[[Any, Array, Axes], Array]
    dx: Callable[[Any, Array, Array, Array, Axes], Array] | None = None


def _sum(xp: Any, x: Array, axes: Axes) -> Array:
    return xp.sum(x, axis=axes, keepdims=True)


def _share(xp: Any, dy: Array, x: Array, y: Array, axes: Axes) -> Array:
    """Return the gradient of an extreme: equal elements share it, as in torch.amax."""
    chosen = xp.astype(x == y, x.dtype)
    return chosen * (dy / _sum(xp, chosen, axes))


def _product_slope(xp: Any, dy: Array, x: Array, y: Array, axes: Axes) -> Array:
    """Return dy times the product of the other elements, also where one is 0."""
    zero = x == 0
    filled = xp.where(zero, xp.ones_like(x), x)
    others = xp.prod(filled, axis=axes, keepdims=True)  # of those that are not 0
    zeros = _sum(xp, xp.astype(zero, x.dtype), axes)
    alone = xp.where(zero & (zeros == 1), others, xp.zeros_like(x))
    return dy * xp.where(zeros == 0, y / filled, alone)


def _length_slope(xp: Any, dy: Array, x: Array, y: Array, axes: Axes) -> Array:
    """Return 0 where all elements are 0, as in PyTorch."""
    return xp.where(y == 0, 0.0 * x, x * (dy / xp.where(y == 0, xp.ones_like(y), y)))


def _log_sum_exp(xp: Any, x: Array, axes: Axes) -> Array:
    top = xp.max(x, axis=axes, keepdims=True)
    top = xp.where(xp.isfinite(top), top, xp.zeros_like(top))
    return top + xp.log(_sum(xp, xp.exp(x - top), axes))


REDUCTIONS: dict[str, _Reduction] = {
    "sum": _Reduction(_sum),
    "mean": _Reduction(lambda xp, x, axes: xp.mean(x, axis=axes, keepdims=True)),
    "max": _Reduction(lambda xp, x, axes: xp.max(x, axis=axes, keepdims=True), _share),
    "min": _Reduction(lambda xp, x, axes: xp.min(x, axis=axes, keepdims=True), _share),
    "prod": _Reduction(lambda xp, x, axes: xp.prod(x, axis=axes, keepdims=True), _product_slope),
    "l1": _Reduction(
        lambda xp, x, axes: _sum(xp, xp.abs(x), axes),
        lambda xp, dy, x, y, axes: dy * xp.sign(x),
    ),
    "l2": _Reduction(lambda xp, x, axes: xp.sqrt(_sum(xp, x * x, axes)), _length_slope),
    "sum_square": _Reduction(
        lambda xp, x, axes: _sum(xp, x * x, axes), lambda xp, dy, x, y, axes: 2.0 * dy * x
    ),
    "log_sum": _Reduction(
        lambda xp, x, axes: xp.log(_sum(xp, x, axes)),
        lambda xp, dy, x, y, axes: dy / _sum(xp, x, axes) + 0.0 * x,
    ),
    "log_sum_exp": _Reduction(_log_sum_exp, lambda xp, dy, x, y, axes: dy * xp.exp(x - y)),
}
"""The kinds of ``reduce``, by name."""


def check_reduction(kind: str, axes: Sequence[int]) -> None:
    """Raise ArgumentError if the kind is unknown, or the axes are not different numbers."""
    one_of("kind", kind, *REDUCTIONS)
    if not axes or len(set(wholes("axes", axes, 0))) != len(axes):
        raise ArgumentError(f"expected one or more different axes, got {axes!r}")


def _check(
    x: Array, kind: str, axes: Sequence[int], keepdims: bool = False, *, keep: bool = True
) -> None:
    check_arrays("reduce", x=x)
    try:
        check_reduction(kind, axes)
    except PortacnnError as error:
        raise error.at("reduce")
    if max(axes) >= x.ndim:
        raise ShapeError(f"axis {max(axes)} is out of range (input {describe(x)})", "reduce")


@op(_check)
def reduce(
    x: Array, kind: str, axes: Sequence[int], keepdims: bool = False, *, keep: bool = True
) -> tuple[Array, tuple | None]:
    """Reduce some axes of x to one number.

    Args:
        x: any shape, floating point.
        kind: a key of ``REDUCTIONS``: "sum", "mean", "max", "min", "prod", "l1" (the sum of
            absolute values), "l2" (the square root of the sum of squares), "sum_square", "log_sum"
            or "log_sum_exp".
        axes: the axes to reduce, counted from 0.
        keepdims: keep them with length 1.
        keep: store what ``reduce_backward`` needs.

    Returns:
        The result and the cache.

    Raises:
        ArgumentError: if the kind is unknown, or an axis is given twice.
        ShapeError: if an axis is out of range.
        ArrayError: if x is not floating point.

    Example:
        >>> y, cache = ops.reduce(np.array([[1.0, 3.0], [2.0, 2.0]]), "max", [1])
        >>> y
        array([3., 2.])
        >>> ops.reduce_backward(np.ones(2), cache).tolist()
        [[0.0, 1.0], [0.5, 0.5]]
    """
    axes, xp, shape = tuple(axes), backend_of(x).xp, tuple(x.shape)
    y = REDUCTIONS[kind].y(xp, x, axes)
    kept = (None, None) if REDUCTIONS[kind].dx is None else (x, y)
    saved = (*kept, kind, axes, shape) if keep else None
    if keepdims:
        return y, saved
    return xp.reshape(y, tuple(n for i, n in enumerate(shape) if i not in axes)), saved


@reduce.backward
def reduce_backward(dy: Array, saved: tuple) -> Array:
    """Return dx. Equal extremes share the gradient."""
    x, y, kind, axes, shape = saved
    xp, slope = backend_of(dy).xp, REDUCTIONS[kind].dx
    dy = xp.reshape(dy, tuple(1 if axis in axes else n for axis, n in enumerate(shape)))
    if slope is not None:
        return slope(xp, dy, x, y, axes)
    if kind == "mean":
        dy = dy / prod(shape[axis] for axis in axes)
    # broadcast into a new array
    return dy + xp.zeros(shape, dtype=dy.dtype, device=dy.device)
