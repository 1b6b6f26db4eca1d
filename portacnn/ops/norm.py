"""Normalization: subtract the mean, divide by the standard deviation, then scale and shift.

    xhat = (x - mean) / sqrt(var + eps)        y = weight * xhat + bias

Batch, instance, group and layer norm differ only in which elements share a mean. In batch-last
order, (C, *S, N), these elements are adjacent. All four are therefore one computation on *blocks*
(A, P, Q, B): the P*Q elements in the middle share a mean and a variance, and a weight belongs to an
index of A, of P, or of both.

              A     P     Q     B     weight
    batch     C     1     S*N   1     (C, 1)
    instance  C     1     S     N     (C, 1)
    group     G     C/G   S     N     (G, C/G)
    layer     L     D     1     N     (1, D)

Notation: N batch, C channels, S the spatial axes, G groups; the x of layer norm is (N, *L, *D).
"""

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

from portacnn.arguments import listed, real
from portacnn.errors import ArgumentError, PortacnnError, ShapeError
from portacnn.ops.dispatch import check_arrays, op
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.statistics import Total, combined, is_shared, shared_statistics
from portacnn.ops.windows import per_axis
from portacnn.runtime import Array, backend_of, describe

_BLOCK = 128
RUNNING = ("running_mean", "running_var")
"""The arguments that batch and instance norm write into."""


class Normalized(NamedTuple):
    """What a normalization stores for its backward pass."""

    shape: tuple[int, ...]  # of x
    centred: Array  # x - mean, (A, P, Q, B)
    rstd: Array  # 1 / sqrt(var + eps), (A, 1, 1, B)
    weight: Array | None
    bias: Array | None
    per: tuple[int, int]  # the shape of the weight along (A, P)
    own: bool  # whether mean and variance are functions of x
    over: "tuple[Total, Array] | None" = None  # of other processes too: their sum, and the count


# --- shared code ----------------------------------------------------------------------------------


def _normalize(
    x: Array,
    blocks: tuple[int, int, int, int],
    weight: Array | None,
    bias: Array | None,
    per: tuple[int, int],
    eps: float,
    total: Total | None = None,
) -> tuple[Array, Normalized, Array, Array]:
    """Normalize x (N, ...) by the statistics of its blocks (A, P, Q, B). Returns y, saved, mean and
    variance (A, 1, 1, B).

    Args:
        total: see ``statistics_over``: the blocks go on in other processes, with at least one value
            in each.
    """
    xp = backend_of(x).xp
    rows, over = xp.reshape(batch_last(x), blocks), None
    if prod(blocks):
        # Two passes, relative to one element of the block: a constant block becomes exactly zero,
        # and a mean that is large compared with the variance costs no precision.
        origin = rows[:, :1, :1, :]
        centred = rows - origin
        shift = _mean(centred)
        centred -= shift
        mean, var = origin + shift, _mean(centred * centred)
        if total is not None:
            mean, var, above, count = combined([origin, shift], var, blocks[1] * blocks[2], total)
            centred += above
            over = total, count
    else:
        centred, mean = rows, xp.zeros((blocks[0], 1, 1, blocks[3]), dtype=x.dtype, device=x.device)
        var = xp.ones_like(mean)
    saved = Normalized(
        tuple(x.shape),
        centred,
        1.0 / xp.sqrt(var + eps),
        weight,
        bias,
        per,
        own=prod(blocks) > 0,
        over=over,
    )
    return _affine(saved), saved, mean, var


def _affine(saved: Normalized) -> Array:
    """Return y = weight * xhat + bias in the shape of x."""
    xp = backend_of(saved.centred).xp
    y = saved.centred * _times_weight(saved.rstd, saved)
    if saved.bias is not None:
        y += xp.reshape(saved.bias, (*saved.per, 1, 1))
    return _as_input(y, saved)


def _affine_backward(
    dy: Array, saved: Normalized, need_dx: bool, need_dweight: bool, need_dbias: bool
) -> tuple[Array | None, Array | None, Array | None]:
    """Return dx, dweight and dbias for dy with the shape of x. Each is None if its ``need`` is
    False; dweight and dbias also if there is no such parameter.

    With g = weight * dy and means over the P*Q elements of a block: dx = rstd * (g - mean(g) - xhat
    * mean(g * xhat)). If mean and variance are constants (running statistics), dx = rstd * g.
    """
    _, centred, rstd, weight, bias, per, own, over = saved
    xp = backend_of(dy).xp
    rows = xp.reshape(batch_last(dy), centred.shape)
    dweight = dbias = None
    through = need_dx and own  # x also changes the mean and the variance
    if through or (need_dbias and bias is not None):
        along_dy = _sum(rows, 2)  # (A, P, 1, B)
    if through or (need_dweight and weight is not None):
        along_xhat = _sum(rows * centred, 2) * rstd
    if need_dweight and weight is not None:
        dweight = xp.reshape(_sum_to(along_xhat, per), weight.shape)
    if need_dbias and bias is not None:
        dbias = xp.reshape(_sum_to(along_dy, per), bias.shape)
    if not need_dx:
        return None, dweight, dbias
    dx = rows * _times_weight(rstd, saved)
    if own:
        if over is None:
            scale = rstd / (centred.shape[1] * centred.shape[2])
        else:
            total, count = over
            # the parameters' gradients above stay those of the own samples
            sums = xp.stack([along_dy, along_xhat])
            total(sums)
            along_dy, along_xhat = sums[0, ...], sums[1, ...]
            scale = rstd / count
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
    """Reshape (A, P, Q, B) to the shape of x (N, ...)."""
    n, *rest = saved.shape
    return batch_first(backend_of(rows).xp.reshape(rows, (*rest, n)))


def _mean(rows: Array) -> Array:
    """Return the mean over P and Q: (A, P, Q, B) -> (A, 1, 1, B)."""
    return _sum(_sum(rows, 2), 1) / (rows.shape[1] * rows.shape[2])


def _sum_to(sums: Array, per: tuple[int, int]) -> Array:
    """Sum (A, P, 1, B) to the weight's shape: (A, 1, 1, 1), (A, P, 1, 1) or (1, P, 1, 1)."""
    sums = _sum(sums, 3)
    return _sum(sums, 0) if per[0] != sums.shape[0] else sums


def _sum(rows: Array, axis: int) -> Array:
    """Return the sum along one axis, which stays with length 1, computed in blocks of 128.

    Libraries add pairwise along the last axis in memory, so that rounding errors grow with the
    logarithm of the count. Along other axes they add row by row, and a float32 sum over a large
    image would lose precision.
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
    """Check that x is a floating-point array of at least ``least`` axes, the other arrays have
    ``shape`` ((C,) if None), and eps is a number.
    """
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
            "running_mean and running_var are required if the statistics of the batch are not used",
            name,
        )
    if (running_mean is None) != (running_var is None):
        raise ArgumentError(
            "expected running_mean and running_var together, got one; pass both or neither", name
        )
    if running_mean is not None and tuple(getattr(momentum, "shape", ())) != ():
        raise ArgumentError(
            f"momentum must be a number or 0-dimensional, got {describe(momentum)}", name
        )
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
    """Check the arguments of ``batch_norm``, or of the op ``name`` that is composed of it."""
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
    if training and x.shape[0] * prod(x.shape[2:]) == 1 and not is_shared():
        raise ShapeError(
            f"expected more than 1 value per channel when training, got input {describe(x)}; one "
            "value has no variance: use a larger batch, or training=False",
            name,
        )


@op(partial(check_batch_norm, "batch_norm"), writes=RUNNING, as_written=is_shared)
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
    """Normalize each channel over the batch and its pixels, as torch.nn.functional.batch_norm.

    Ioffe and Szegedy, 2015. In training, mean and (biased) variance are those of the batch. The
    running statistics are updated in place: running = (1 - momentum) * running + momentum * batch
    statistic, with the unbiased variance. Otherwise the running statistics are used. They are
    constants to the backward pass, so a network with "frozen" batch norm can be trained.

    Within ``ops.statistics.statistics_over``, the batch is that of several processes.

    Args:
        x: (N, C, ...), floating point.
        running_mean, running_var: (C,), updated in training. May be None in training.
        weight, bias: (C,), or None.
        training: use the statistics of the batch.
        momentum: a number, or a 0-dimensional array on x's device (such as 1/count, for a
            cumulative average).
        eps: added to the variance.
        keep: store what ``batch_norm_backward`` needs.

    Returns:
        y, with the shape of x, and the cache. An empty batch returns an empty result and does not
        change the running statistics.

    Raises:
        ShapeError: if shapes do not match, or there is one value per channel in training (its
            variance is undefined).
        ArgumentError: if running statistics are missing, or momentum or eps is invalid.
        ArrayError: if the arrays are integers, or differ in library, device or dtype.

    Example:
        >>> mean, var = np.zeros(1), np.ones(1)
        >>> y, cache = ops.batch_norm(np.array([[1.0], [3.0]]), mean, var, training=True, eps=0.0)
        >>> y
        array([[-1.],
               [ 1.]])
        >>> mean, var
        (array([0.2]), array([1.1]))
        >>> dx, dweight, dbias = ops.batch_norm_backward(np.array([[1.0], [0.0]]), cache)
    """
    xp = backend_of(x).xp
    n, c, *size = x.shape
    count = n * prod(size)
    blocks, per = (c, 1, count, 1), (c, 1)
    if training:
        total = shared_statistics()
        y, saved, mean, var = _normalize(x, blocks, weight, bias, per, eps, total)
        if running_mean is not None and count:
            whole = count if saved.over is None else saved.over[1]
            move_towards(running_mean, xp.reshape(mean, (c,)), momentum)
            move_towards(running_var, xp.reshape(var, (c,)) * (whole / (whole - 1)), momentum)
    else:
        centred = xp.reshape(batch_last(x), blocks) - xp.reshape(running_mean, (c, 1, 1, 1))
        rstd = 1.0 / xp.sqrt(xp.reshape(running_var, (c, 1, 1, 1)) + eps)
        saved = Normalized(tuple(x.shape), centred, rstd, weight, bias, per, own=False)
        y = _affine(saved)
    return y, saved if keep else None


@batch_norm.backward
def batch_norm_backward(
    dy: Array,
    saved: Normalized,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> tuple[Array | None, Array | None, Array | None]:
    """Return dx, dweight and dbias, (C,). Each is None if its ``need`` is False; dweight and dbias
    also if there is no such parameter.
    """
    return _affine_backward(dy, saved, need_dx, need_dweight, need_dbias)


def move_towards(running: Any, new: Array, momentum: Any) -> None:
    """Update a running statistic in place: (1 - momentum) * running + momentum * new."""
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
            "variance: use a larger image, or use_input_stats=False",
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
    """Normalize each channel of each sample over its pixels, as torch.nn.functional.instance_norm.

    Ulyanov et al., 2016.

    Args:
        x: (N, C, *S), floating point, with at least one spatial axis.
        running_mean, running_var: (C,) or None; updated in place with the statistics of the
            samples, averaged over the batch.
        weight, bias: (C,), or None.
        use_input_stats: if False, the running statistics are used, as in ``batch_norm``.
        momentum, eps, keep: as for ``batch_norm``.

    Returns:
        y, with the shape of x, and the cache.

    Raises:
        ShapeError: if shapes do not match, or there is a single pixel (its variance is undefined).
        ArgumentError, ArrayError: as for ``batch_norm``.

    Example:
        >>> y, cache = ops.instance_norm(np.array([[[1.0, 3.0], [5.0, 9.0]]]), eps=0.0)
        >>> y
        array([[[-1.,  1.],
                [-1.,  1.]]])
        >>> dx, dweight, dbias = ops.instance_norm_backward(np.ones_like(y), cache)
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
    dy: Array,
    saved: Normalized,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> tuple[Array | None, Array | None, Array | None]:
    """Return dx, dweight and dbias, (C,). Each is None if its ``need`` is False; dweight and dbias
    also if there is no such parameter.
    """
    return _affine_backward(dy, saved, need_dx, need_dweight, need_dbias)


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
    """Normalize each group of channels of each sample, as torch.nn.functional.group_norm.

    Wu and He, 2018.

    Args:
        x: (N, C, ...), floating point.
        num_groups: G, which must divide C.
        weight, bias: (C,), or None.
        eps: added to the variance.
        keep: store what ``group_norm_backward`` needs.

    Returns:
        y, with the shape of x, and the cache.

    Raises:
        ShapeError: if shapes do not match, or the whole batch has one value per group.
        ArgumentError: if num_groups or eps is invalid.
        ArrayError: as for ``batch_norm``.

    Example:
        >>> y, cache = ops.group_norm(np.array([[1.0, 3.0, 5.0, 9.0]]), 2, eps=0.0)
        >>> y
        array([[-1.,  1., -1.,  1.]])
        >>> dx, dweight, dbias = ops.group_norm_backward(np.ones_like(y), cache)
    """
    n, c, *size = x.shape
    per = (int(num_groups), c // num_groups)
    y, saved, _, _ = _normalize(x, (*per, prod(size), n), weight, bias, per, eps)
    return y, saved if keep else None


@group_norm.backward
def group_norm_backward(
    dy: Array,
    saved: Normalized,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> tuple[Array | None, Array | None, Array | None]:
    """Return dx, dweight and dbias, (C,). Each is None if its ``need`` is False; dweight and dbias
    also if there is no such parameter.
    """
    return _affine_backward(dy, saved, need_dx, need_dweight, need_dbias)


# --- layer norm -----------------------------------------------------------------------------------


def trailing(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    """Return ``normalized_shape`` as a tuple of positive integers. Raises ArgumentError."""
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
    """Normalize each sample over its last axes, as torch.nn.functional.layer_norm.

    Ba et al., 2016.

    Args:
        x: (..., *normalized_shape), floating point.
        normalized_shape: the sizes of the last axes, or an integer for the last axis alone.
        weight, bias: of shape ``normalized_shape``, or None.
        eps: added to the variance.
        keep: store what ``layer_norm_backward`` needs.

    Returns:
        y, with the shape of x, and the cache.

    Raises:
        ShapeError: if the last axes of x, weight or bias are not ``normalized_shape``.
        ArgumentError: if normalized_shape or eps is invalid.
        ArrayError: as for ``batch_norm``.

    Example:
        >>> y, cache = ops.layer_norm(np.array([[1.0, 3.0], [5.0, 9.0]]), 2, eps=0.0)
        >>> y
        array([[-1.,  1.],
               [-1.,  1.]])
        >>> dx, dweight, dbias = ops.layer_norm_backward(np.ones_like(y), cache)
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
    dy: Array,
    saved: tuple,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> tuple[Array | None, Array | None, Array | None]:
    """Return dx, dweight and dbias, of shape ``normalized_shape``. Each is None if its ``need`` is
    False; dweight and dbias also if there is no such parameter.
    """
    normalized, shape = saved
    xp = backend_of(dy).xp
    dy = xp.reshape(dy, normalized.shape)
    dx, dweight, dbias = _affine_backward(dy, normalized, need_dx, need_dweight, need_dbias)
    return None if dx is None else xp.reshape(dx, shape), dweight, dbias
