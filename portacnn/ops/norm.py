"""Normalization: subtract the mean of some of the numbers and divide by their spread, then scale
and shift by weight and bias.

    xhat = (x - mean) / sqrt(var + eps)        y = weight * xhat + bias

Batch, instance, group and layer norm differ only in which numbers share a mean. Seen batch-last,
(C, *S, N), those always lie side by side, so all four are one computation on *blocks* (A, P, Q, B):
the P*Q numbers in the middle share a mean and a variance, and a weight is for one of the A or for
one of the P.

              A     P     Q     B     weight
    batch     C     1     S*N   1     (C, 1)
    instance  C     1     S     N     (C, 1)
    group     G     C/G   S     N     (G, C/G)
    layer     L     D     1     N     (1, D)

Notation: N batch, C channels, S the spatial axes, G groups; layer norm's x is (N, *L, *D).
"""

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

from portacnn.arguments import listed, real
from portacnn.errors import ArgumentError, PortacnnError, ShapeError
from portacnn.ops.dispatch import check_arrays, op
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import per_axis
from portacnn.runtime import Array, backend_of, describe

_BLOCK = 128
RUNNING = ("running_mean", "running_var")
"""What batch and instance norm write into."""


class Normalized(NamedTuple):
    """What a normalization keeps for its backward pass."""

    shape: tuple[int, ...]  # of x
    centred: Array  # x - mean, (A, P, Q, B)
    rstd: Array  # 1 / sqrt(var + eps), (A, 1, 1, B)
    weight: Array | None
    bias: Array | None
    per: tuple[int, int]  # the weight's place along (A, P)
    own: bool  # whether mean and variance are x's own, and so change with it


# --- what all of them share -----------------------------------------------------------------------


def _normalize(
    x: Array,
    blocks: tuple[int, int, int, int],
    weight: Array | None,
    bias: Array | None,
    per: tuple[int, int],
    eps: float,
) -> tuple[Array, Normalized, Array, Array]:
    """x (N, ...) by the statistics of its own blocks (A, P, Q, B) -> y, saved, mean and variance
    (A, 1, 1, B)."""
    xp = backend_of(x).xp
    rows = xp.reshape(batch_last(x), blocks)
    if prod(blocks):
        # Two passes, and the first from one of the numbers: a constant block becomes zeros to the
        # last bit, and a mean that is large beside the spread costs no digits.
        origin = rows[:, :1, :1, :]
        centred = rows - origin
        shift = _mean(centred)
        centred -= shift
        mean, var = origin + shift, _mean(centred * centred)
    else:
        centred, mean = rows, xp.zeros((blocks[0], 1, 1, blocks[3]), dtype=x.dtype, device=x.device)
        var = xp.ones_like(mean)
    saved = Normalized(
        tuple(x.shape), centred, 1.0 / xp.sqrt(var + eps), weight, bias, per, own=prod(blocks) > 0
    )
    return _affine(saved), saved, mean, var


def _affine(saved: Normalized) -> Array:
    """y = weight * xhat + bias, back in x's shape."""
    xp = backend_of(saved.centred).xp
    y = saved.centred * _times_weight(saved.rstd, saved)
    if saved.bias is not None:
        y += xp.reshape(saved.bias, (*saved.per, 1, 1))
    return _as_input(y, saved)


def _affine_backward(
    dy: Array, saved: Normalized, need_dx: bool
) -> tuple[Array | None, Array | None, Array | None]:
    """dy shaped as x -> dx or None, dweight and dbias where there are such.

    With g = weight * dy, and means over the P*Q numbers that share one: dx = rstd * (g - mean(g) -
    xhat * mean(g * xhat)). Where mean and variance came from elsewhere, only rstd * g is left.
    """
    _, centred, rstd, weight, bias, per, own = saved
    xp = backend_of(dy).xp
    rows = xp.reshape(batch_last(dy), centred.shape)
    along_dy = _sum(rows, 2)  # (A, P, 1, B)
    along_xhat = _sum(rows * centred, 2) * rstd
    dweight = None if weight is None else xp.reshape(_sum_to(along_xhat, per), weight.shape)
    dbias = None if bias is None else xp.reshape(_sum_to(along_dy, per), bias.shape)
    if not need_dx:
        return None, dweight, dbias
    dx = rows * _times_weight(rstd, saved)
    if own:
        scale = rstd / (centred.shape[1] * centred.shape[2])
        dx -= centred * (scale * rstd * _sum(_times_weight(along_xhat, saved), 1))
        dx -= scale * _sum(_times_weight(along_dy, saved), 1)
    return _as_input(dx, saved), dweight, dbias


def _times_weight(values: Array, saved: Normalized) -> Array:
    return (
        values
        if saved.weight is None
        else values * backend_of(values).xp.reshape(saved.weight, (*saved.per, 1, 1))
    )


def _as_input(rows: Array, saved: Normalized) -> Array:
    """(A, P, Q, B) -> x's shape (N, ...)."""
    n, *rest = saved.shape
    return batch_first(backend_of(rows).xp.reshape(rows, (*rest, n)))


def _mean(rows: Array) -> Array:
    """(A, P, Q, B) -> (A, 1, 1, B)."""
    return _sum(_sum(rows, 2), 1) / (rows.shape[1] * rows.shape[2])


def _sum_to(sums: Array, per: tuple[int, int]) -> Array:
    """(A, P, 1, B) -> the weight's (A, 1, 1, 1), (A, P, 1, 1) or (1, P, 1, 1)."""
    sums = _sum(sums, 3)
    return _sum(sums, 0) if per[0] != sums.shape[0] else sums


def _sum(rows: Array, axis: int) -> Array:
    """The sum along one axis, which stays with length 1, in blocks of 128.

    Libraries add pairwise along the last axis of the memory, so that errors grow with the logarithm
    of the count; along another they add row by row, and a float32 sum over a large image would lose
    digits.
    """
    xp = backend_of(rows).xp
    shape = tuple(rows.shape)
    count = shape[axis]
    if count == 1:
        return rows
    if count <= _BLOCK or prod(shape[axis + 1 :]) == 1:
        return xp.sum(rows, axis=axis, keepdims=True)
    before = (slice(None),) * axis
    whole = count // _BLOCK * _BLOCK
    blocks = xp.reshape(
        rows[(*before, slice(0, whole), ...)],
        (*shape[:axis], whole // _BLOCK, _BLOCK, *shape[axis + 1 :]),
    )
    total = _sum(xp.sum(blocks, axis=axis + 1), axis)
    if whole < count:
        total += xp.sum(rows[(*before, slice(whole, count), ...)], axis=axis, keepdims=True)
    return total


def _check(
    name: str, x: Array, eps: float, shape: tuple[int, ...] | None, least: int, **arrays: Any
) -> None:
    """x a floating-point array of at least ``least`` axes, the others of ``shape`` ((C,) where
    None); eps a number."""
    check_arrays(name, x=x, **arrays)
    if x.ndim < least:
        raise ShapeError(
            f"expected an input (N, C, ...) of at least {least} axes, got {describe(x)}", name
        )
    shape = (x.shape[1],) if shape is None else shape
    for what, array in arrays.items():
        if array is not None and tuple(array.shape) != shape:
            raise ShapeError(
                f"expected a {what} of shape {shape}, got {tuple(array.shape)} (input "
                f"{describe(x)})",
                name,
            )
    try:
        real("eps", eps, least=0.0)
    except PortacnnError as error:
        raise error.at(name)


# --- batch norm -----------------------------------------------------------------------------------


def _check_running(
    name: str, needed: bool, momentum: Any, running_mean: Array | None, running_var: Array | None
) -> None:
    if needed and (running_mean is None or running_var is None):
        raise ArgumentError(
            "running_mean and running_var are needed where the batch's own statistics are not used",
            name,
        )
    if (running_mean is None) != (running_var is None):
        raise ArgumentError("running_mean and running_var go together: give both or neither", name)
    if running_mean is not None and tuple(getattr(momentum, "shape", ())) != ():
        raise ArgumentError(f"momentum must be one number, got {describe(momentum)}", name)
    try:
        if not hasattr(momentum, "shape"):
            real("momentum", momentum)
    except PortacnnError as error:
        raise error.at(name)


def check_batch_norm(
    name: str,
    x: Array,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    training: bool = False,
    momentum: Any = 0.1,
    eps: float = 1e-5,
    keep: bool = True,
) -> None:
    """What ``batch_norm`` and the op ``name`` that is made of it refuse."""
    _check(
        name,
        x,
        eps,
        None,
        2,
        running_mean=running_mean,
        running_var=running_var,
        weight=weight,
        bias=bias,
    )
    _check_running(name, not training, momentum, running_mean, running_var)
    if training and x.shape[0] * prod(x.shape[2:]) == 1:
        raise ShapeError(
            f"expected more than 1 value per channel when training, got input {describe(x)}; one "
            "value has no variance: "
            "use a larger batch, or training=False",
            name,
        )


@op(partial(check_batch_norm, "batch_norm"), writes=RUNNING)
def batch_norm(
    x: Array,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    training: bool = False,
    momentum: Any = 0.1,
    eps: float = 1e-5,
    keep: bool = True,
) -> tuple[Array, Normalized | None]:
    """Each channel normalized over the batch and all its pixels (Ioffe and Szegedy, 2015), as
    torch.nn.functional.batch_norm.

    In training by the batch's own mean and (biased) variance, and the running ones are moved
    towards them, in place: running = (1 - momentum) * running + momentum * batch's, with the
    unbiased variance. Else by the running ones, which then are constants to the backward pass too
    ("frozen" batch norm trains).

    Args:
        x: (N, C, ...), floating point.
        running_mean, running_var: (C,), written to in training. May be None there.
        weight, bias: (C,), or None.
        training: use the batch's own statistics.
        momentum: a number, or a 0-dimensional array on x's device (a cumulative average's 1/count,
            say).
        eps: added to the variance.
        keep: keep what ``batch_norm_backward`` needs.

    Returns:
        y, shaped as x, and the cache. An empty batch gives an empty result and leaves the running
        statistics alone.

    Raises:
        ShapeError: shapes that do not fit; one value per channel in training, which has no
            variance.
        ArgumentError, ArrayError: see the message.
    """
    xp = backend_of(x).xp
    n, c, *size = x.shape
    count = n * prod(size)
    blocks, per = (c, 1, count, 1), (c, 1)
    if training:
        y, saved, mean, var = _normalize(x, blocks, weight, bias, per, eps)
        if running_mean is not None and count:
            move_towards(running_mean, xp.reshape(mean, (c,)), momentum)
            move_towards(running_var, xp.reshape(var, (c,)) * (count / (count - 1)), momentum)
    else:
        centred = xp.reshape(batch_last(x), blocks) - xp.reshape(running_mean, (c, 1, 1, 1))
        rstd = 1.0 / xp.sqrt(xp.reshape(running_var, (c, 1, 1, 1)) + eps)
        saved = Normalized(tuple(x.shape), centred, rstd, weight, bias, per, own=False)
        y = _affine(saved)
    return y, saved if keep else None


@batch_norm.backward
def batch_norm_backward(
    dy: Array, saved: Normalized, *, need_dx: bool = True
) -> tuple[Array | None, Array | None, Array | None]:
    """dy (N, C, ...) -> dx or None without ``need_dx``; dweight and dbias (C,), None where there
    was none."""
    return _affine_backward(dy, saved, need_dx)


def move_towards(running: Any, new: Array, momentum: Any) -> None:
    """A running statistic towards a batch's, in place."""
    running[...] = (1.0 - momentum) * running + momentum * new


# --- instance norm --------------------------------------------------------------------------------


def _check_instance_norm(
    x: Array,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    use_input_stats: bool = True,
    momentum: Any = 0.1,
    eps: float = 1e-5,
    keep: bool = True,
) -> None:
    name = "instance_norm"
    _check(
        name,
        x,
        eps,
        None,
        3,
        running_mean=running_mean,
        running_var=running_var,
        weight=weight,
        bias=bias,
    )
    _check_running(name, not use_input_stats, momentum, running_mean, running_var)
    if use_input_stats and prod(x.shape[2:]) == 1:
        raise ShapeError(
            f"expected more than 1 spatial element, got input {describe(x)}; one value has no "
            "variance",
            name,
        )


@op(_check_instance_norm, writes=RUNNING)
def instance_norm(
    x: Array,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    use_input_stats: bool = True,
    momentum: Any = 0.1,
    eps: float = 1e-5,
    keep: bool = True,
) -> tuple[Array, Normalized | None]:
    """Each channel of each sample normalized over its pixels (Ulyanov et al., 2016), as
    torch.nn.functional.instance_norm.

    Args:
        x: (N, C, *S), floating point, at least one spatial axis.
        running_mean, running_var: (C,) or None; moved, in place, towards the batch's mean of its
            samples' statistics.
        weight, bias: (C,), or None.
        use_input_stats: if not, the running statistics are used, as in ``batch_norm``.
        momentum, eps, keep: as for ``batch_norm``.

    Returns:
        y, shaped as x, and the cache.

    Raises:
        ShapeError: shapes that do not fit; a single pixel, which has no variance.
        ArgumentError, ArrayError: see the message.
    """
    if not use_input_stats:
        return batch_norm.forward(x, running_mean, running_var, weight, bias, eps=eps, keep=keep)
    xp = backend_of(x).xp
    n, c, *size = x.shape
    pixels = prod(size)
    y, saved, mean, var = _normalize(x, (c, 1, pixels, n), weight, bias, (c, 1), eps)
    if running_mean is not None and n * pixels:
        move_towards(running_mean, xp.reshape(_sum(mean, 3), (c,)) / n, momentum)
        move_towards(
            running_var, xp.reshape(_sum(var, 3), (c,)) * (pixels / (pixels - 1) / n), momentum
        )
    return y, saved if keep else None


@instance_norm.backward
def instance_norm_backward(
    dy: Array, saved: Normalized, *, need_dx: bool = True
) -> tuple[Array | None, Array | None, Array | None]:
    """dy (N, C, *S) -> dx or None without ``need_dx``; dweight and dbias (C,), None where there was
    none."""
    return _affine_backward(dy, saved, need_dx)


# --- group norm -----------------------------------------------------------------------------------


def _check_group_norm(
    x: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    keep: bool = True,
) -> None:
    name = "group_norm"
    _check(name, x, eps, None, 2, weight=weight, bias=bias)
    try:
        per_axis("num_groups", num_groups, 1, 1)
    except PortacnnError as error:
        raise error.at(name)
    n, c, *size = x.shape
    if c % num_groups:
        raise ShapeError(
            f"{c} channels do not split into {num_groups} groups (input {describe(x)})", name
        )
    if n * (c // num_groups) * prod(size) == 1:
        raise ShapeError(
            f"expected more than 1 value per group, got input {describe(x)} in {num_groups} groups",
            name,
        )


@op(_check_group_norm)
def group_norm(
    x: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    keep: bool = True,
) -> tuple[Array, Normalized | None]:
    """Each group of channels of each sample normalized (Wu and He, 2018), as
    torch.nn.functional.group_norm.

    Args:
        x: (N, C, ...), floating point.
        num_groups: G, which divides C.
        weight, bias: (C,), or None.
        eps: added to the variance.
        keep: keep what ``group_norm_backward`` needs.

    Returns:
        y, shaped as x, and the cache.

    Raises:
        ShapeError: shapes that do not fit; a batch with one value per group.
        ArgumentError, ArrayError: see the message.
    """
    n, c, *size = x.shape
    per = (int(num_groups), c // num_groups)
    y, saved, _, _ = _normalize(x, (*per, prod(size), n), weight, bias, per, eps)
    return y, saved if keep else None


@group_norm.backward
def group_norm_backward(
    dy: Array, saved: Normalized, *, need_dx: bool = True
) -> tuple[Array | None, Array | None, Array | None]:
    """dy (N, C, ...) -> dx or None without ``need_dx``; dweight and dbias (C,), None where there
    was none."""
    return _affine_backward(dy, saved, need_dx)


# --- layer norm -----------------------------------------------------------------------------------


def trailing(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    """``normalized_shape`` as a tuple of positive numbers. Raises ArgumentError."""
    shape = listed(normalized_shape)
    shape = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    return per_axis("normalized_shape", shape, max(len(shape), 1), 1)


def _check_layer_norm(
    x: Array,
    normalized_shape: int | Sequence[int],
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    keep: bool = True,
) -> None:
    name = "layer_norm"
    try:
        shape = trailing(normalized_shape)
    except PortacnnError as error:
        raise error.at(name)
    _check(name, x, eps, shape, 0, weight=weight, bias=bias)
    if tuple(x.shape[max(x.ndim - len(shape), 0) :]) != shape:
        raise ShapeError(f"expected an input whose last axes are {shape}, got {describe(x)}", name)


@op(_check_layer_norm)
def layer_norm(
    x: Array,
    normalized_shape: int | Sequence[int],
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    keep: bool = True,
) -> tuple[Array, tuple | None]:
    """Each sample normalized over its last axes (Ba et al., 2016), as
    torch.nn.functional.layer_norm.

    Args:
        x: (..., *normalized_shape), floating point.
        normalized_shape: the extent of the last axes, or a number for the last one.
        weight, bias: of ``normalized_shape``, or None.
        eps: added to the variance.
        keep: keep what ``layer_norm_backward`` needs.

    Returns:
        y, shaped as x, and the cache.

    Raises:
        ShapeError, ArgumentError, ArrayError: see the message.
    """
    xp = backend_of(x).xp
    shape = trailing(normalized_shape)
    lead = x.shape[: x.ndim - len(shape)]
    rows = x if lead else xp.expand_dims(x, axis=0)
    blocks = (prod(lead[1:]), prod(shape), 1, rows.shape[0])
    y, saved, _, _ = _normalize(rows, blocks, weight, bias, (1, prod(shape)), eps)
    return xp.reshape(y, x.shape), (saved, tuple(x.shape)) if keep else None


@layer_norm.backward
def layer_norm_backward(
    dy: Array, saved: tuple, *, need_dx: bool = True
) -> tuple[Array | None, Array | None, Array | None]:
    """dy shaped as x -> dx or None without ``need_dx``; dweight and dbias of ``normalized_shape``,
    None where there was none."""
    normalized, shape = saved
    xp = backend_of(dy).xp
    dx, dweight, dbias = _affine_backward(xp.reshape(dy, normalized.shape), normalized, need_dx)
    return None if dx is None else xp.reshape(dx, shape), dweight, dbias
