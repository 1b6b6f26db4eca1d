"""Adaptive pooling: a fixed number of outputs, each the mean or maximum of its share of the input.

Notation: N batch, C channels, S/OUT the spatial axes in/out. On an axis of n cells, output o of m
reads the cells from floor(o*n / m) up to ceil((o+1)*n / m), as in PyTorch. The shares are of nearly
equal size and overlap if m does not divide n. Global pooling is the case of one output.

A share is a box, so both poolings run axis by axis, the last one first. The mean of means over
equally many values is the mean. The first row that holds the maximum, at its first position there,
is the first maximum in reading order. Working axis by axis also keeps the sums short: summed in one
go, a large image would lose precision, because in batch-last order its cells are added one after
the other.
"""

from collections.abc import Sequence
from typing import Any

from portacnn.arguments import listed
from portacnn.errors import PortacnnError, ShapeError
from portacnn.ops.complex_parts import part_by_part
from portacnn.ops.dispatch import Cache, op
from portacnn.ops.faces import check_input, faces
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import per_axis
from portacnn.runtime import Array, backend_of, describe

Size = tuple[int, ...]


def shares_of(n: int, m: int) -> list[tuple[int, int]]:
    """Return the (start, end) of the input cells that each of m outputs reads, of n."""
    return [(o * n // m, -(-(o + 1) * n // m)) for o in range(m)]


def _along(axis: int, start: int, end: int) -> Any:
    return (slice(None),) * axis + (slice(start, end), ...)


@op()
def adaptive_avg_pool(x: Array, size: Size, *, keep: bool) -> tuple[Array, tuple | None]:
    """Return the mean of each share: x (N, C, *S) -> y (N, C, *OUT), OUT = ``size``."""
    xp = backend_of(x).xp
    y = batch_last(x)  # (C, *S, N)
    for axis in range(len(size), 0, -1):
        shares = shares_of(y.shape[axis], size[axis - 1])
        y = xp.concat(
            [xp.mean(y[_along(axis, *share)], axis=axis, keepdims=True) for share in shares],
            axis=axis,
        )
    return batch_first(y), (tuple(x.shape[2:]), size) if keep else None


@adaptive_avg_pool.backward
def adaptive_avg_pool_backward(dy: Array, saved: tuple) -> Array:
    """Return the gradient of adaptive and global average pooling: dy (N, C, *OUT) -> dx (N, C, *S).

    The gradient of an output is spread evenly over its share.
    """
    inputs, size = saved
    xp = backend_of(dy).xp
    dx = batch_last(dy)
    for axis in range(1, len(size) + 1):
        n, dy = inputs[axis - 1], dx
        dx = xp.zeros(
            (*dy.shape[:axis], n, *dy.shape[axis + 1 :]), dtype=dy.dtype, device=dy.device
        )
        for o, (start, end) in enumerate(shares_of(n, size[axis - 1])):
            dx[_along(axis, start, end)] += dy[_along(axis, o, o + 1)] / (end - start)
    return batch_first(dx)


part_by_part(adaptive_avg_pool, adaptive_avg_pool_backward)


@op()
def adaptive_max_pool(x: Array, size: Size, *, keep: bool) -> tuple[Array, tuple | None]:
    """Return the maximum of each share: x (N, C, *S) -> y (N, C, *OUT), OUT = ``size``. A share
    with a NaN returns NaN.
    """
    xp = backend_of(x).xp
    # winners: per axis, for each output, the index of the maximum in its share
    y, winners = batch_last(x), []
    for axis in range(len(size), 0, -1):
        parts = [y[_along(axis, *share)] for share in shares_of(y.shape[axis], size[axis - 1])]
        if keep:
            winners.append(xp.concat([_place_of_max(part, axis) for part in parts], axis=axis))
        y = xp.concat([xp.max(part, axis=axis, keepdims=True) for part in parts], axis=axis)
    return batch_first(y), (tuple(x.shape[2:]), size, winners) if keep else None


@adaptive_max_pool.backward
def adaptive_max_pool_backward(dy: Array, saved: tuple) -> Array:
    """Return the gradient of adaptive and global max pooling: dy (N, C, *OUT) -> dx (N, C, *S).

    The whole gradient goes to the first of equal maxima in reading order, or to the last of several
    NaN, as in PyTorch.
    """
    inputs, size, winners = saved
    xp = backend_of(dy).xp
    dx = batch_last(dy)
    for axis, winner in zip(range(1, len(size) + 1), reversed(winners), strict=True):
        n, dy = inputs[axis - 1], dx
        dx = xp.zeros(
            (*dy.shape[:axis], n, *dy.shape[axis + 1 :]), dtype=dy.dtype, device=dy.device
        )
        for o, (start, end) in enumerate(shares_of(n, size[axis - 1])):
            here = _along(axis, o, o + 1)
            places = xp.arange(end - start, dtype=winner.dtype, device=dy.device)
            places = xp.reshape(places, (end - start,) + (1,) * (dy.ndim - axis - 1))
            dx[_along(axis, start, end)] += xp.where(winner[here] == places, dy[here], 0.0)
    return batch_first(dx)


def _place_of_max(part: Array, axis: int) -> Array:
    """Return the index of the first of equal maxima along an axis, or of the last NaN. The axis
    stays, with length 1.
    """
    xp = backend_of(part).xp
    unlike = part != part
    last = (
        part.shape[axis]
        - 1
        - xp.argmax(xp.astype(xp.flip(unlike, axis=axis), xp.int8), axis=axis, keepdims=True)
    )
    return xp.where(
        xp.any(unlike, axis=axis, keepdims=True), last, xp.argmax(part, axis=axis, keepdims=True)
    )


# --- the public functions -------------------------------------------------------------------------


def output_of(output_size: int | Sequence[int | None] | None, size: Sequence[int]) -> Size:
    """Return ``output_size`` as a tuple for an input of this spatial size; None means the input's
    size. Raises ArgumentError.
    """
    output_size = listed(output_size)
    wanted = tuple(output_size) if isinstance(output_size, Sequence) else (output_size,) * len(size)
    if len(wanted) == len(size):
        wanted = tuple(n if m is None else m for n, m in zip(size, wanted, strict=True))
    return per_axis("output_size", wanted, len(size), 1)


def _checked(
    name: str,
    axes: int | None,
    x: Array,
    output_size: int | Sequence[int | None] | None,
    linear: bool = False,
) -> Size:
    check_input(name, axes, x, linear=linear)
    if 0 in x.shape[2:]:
        raise ShapeError(f"expected at least one cell on every axis, got {describe(x)}", name)
    try:
        return output_of(output_size, x.shape[2:])
    except PortacnnError as error:
        raise error.at(name)


def _adaptive_avg_pool(
    axes: int, x: Array, output_size: int | Sequence[int | None] | None, *, keep: bool = True
) -> tuple[Array, Cache | None]:
    """Average over a fixed number of shares, as torch.nn.functional.adaptive_avg_pool1d, 2d and 3d.

    Args:
        x: (N, C, *S), floating point or complex; S is W, (H, W) or (D, H, W).
        output_size: the number of outputs, one integer or one per spatial axis. None means the size
            of the input on that axis.
        keep: store what the backward function needs.

    Returns:
        y (N, C, *output_size) and the cache.

    Raises:
        ShapeError, ArgumentError, ArrayError: as for ``conv2d``.

    Example:
        >>> x = np.arange(16.0).reshape(1, 1, 4, 4)
        >>> y, cache = ops.adaptive_avg_pool2d(x, 2)
        >>> y[0, 0]
        array([[ 2.5,  4.5],
               [10.5, 12.5]])
        >>> ops.adaptive_avg_pool2d_backward(np.ones_like(y), cache)[0, 0, 0]
        array([0.25, 0.25, 0.25, 0.25])
    """
    return adaptive_avg_pool(
        x, _checked(f"adaptive_avg_pool{axes}d", axes, x, output_size, linear=True), keep=keep
    )


def _adaptive_max_pool(
    axes: int, x: Array, output_size: int | Sequence[int | None] | None, *, keep: bool = True
) -> tuple[Array, Cache | None]:
    """Take the maximum of a fixed number of shares, as torch.nn.functional.adaptive_max_pool1d, 2d
    and 3d.

    Arguments, results and errors are those of ``adaptive_avg_pool2d``.

    >>> x = np.arange(16.0).reshape(1, 1, 4, 4)
    >>> y, cache = ops.adaptive_max_pool2d(x, 2)
    >>> y[0, 0]
    array([[ 5.,  7.],
           [13., 15.]])
    >>> ops.adaptive_max_pool2d_backward(np.ones_like(y), cache)[0, 0, 1]
    array([0., 1., 0., 1.])
    """
    return adaptive_max_pool(
        x, _checked(f"adaptive_max_pool{axes}d", axes, x, output_size), keep=keep
    )


def global_avg_pool(x: Array, *, keep: bool = True) -> tuple[Array, Cache | None]:
    """Average over all spatial axes: x (N, C, *S) -> y (N, C, 1, ...), and the cache.

    x: floating point, any number of spatial axes. Errors as for ``conv2d``.

    >>> y, cache = ops.global_avg_pool(np.arange(4.0).reshape(1, 1, 2, 2))
    >>> y
    array([[[[1.5]]]])
    >>> ops.global_avg_pool_backward(y, cache)[0, 0]
    array([[0.375, 0.375],
           [0.375, 0.375]])
    """
    return adaptive_avg_pool(x, _checked("global_avg_pool", None, x, 1, linear=True), keep=keep)


def global_max_pool(x: Array, *, keep: bool = True) -> tuple[Array, Cache | None]:
    """Take the maximum over all spatial axes: x (N, C, *S) -> y (N, C, 1, ...), and the cache.

    x: floating point, any number of spatial axes. Errors as for ``conv2d``.

    >>> y, cache = ops.global_max_pool(np.arange(4.0).reshape(1, 1, 2, 2))
    >>> y
    array([[[[3.]]]])
    >>> ops.global_max_pool_backward(y, cache)[0, 0]
    array([[0., 0.],
           [0., 3.]])
    """
    return adaptive_max_pool(x, _checked("global_max_pool", None, x, 1), keep=keep)


adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d = faces(
    "adaptive_avg_pool", _adaptive_avg_pool
)
adaptive_avg_pool1d_backward = adaptive_avg_pool2d_backward = adaptive_avg_pool_backward
adaptive_avg_pool3d_backward = global_avg_pool_backward = adaptive_avg_pool_backward
adaptive_max_pool1d, adaptive_max_pool2d, adaptive_max_pool3d = faces(
    "adaptive_max_pool", _adaptive_max_pool
)
adaptive_max_pool1d_backward = adaptive_max_pool2d_backward = adaptive_max_pool_backward
adaptive_max_pool3d_backward = global_max_pool_backward = adaptive_max_pool_backward
