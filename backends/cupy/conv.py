"""Convolution on CUDA with portacnn's own kernels (cuda/conv.cu), for one and two axes, without
columns in memory.

With few channels per group, groups.py computes it, in float32 for any ``use_precision``. Large
convolutions may use cuDNN if requested (cudnn.py).

Notation as in ops/conv.py: N batch, C in-channels, O out-channels, G groups, K the kernel, S/OUT
the spatial axes in/out. These kernels decline three axes, dtypes other than float32 and float64,
and arrays of 2**31 elements or more; the portable op then runs.
"""

from math import inf
from typing import Any, NamedTuple

import numpy as np

from portacnn.backends.cupy import cudnn as cupy_cudnn
from portacnn.backends.cupy import groups as cupy_groups
from portacnn.backends.cupy.geometry import BY_TAP, VALUE_BY_VALUE, WHOLE_STEPS, Plan, plan_of
from portacnn.backends.cupy.memory import THREADS, or_null, reachable, vector
from portacnn.backends.cupy.nvrtc import (
    Launcher,
    Variant,
    kernel,
    rounding,
    supported,
    with_rounding,
)
from portacnn.backends.cupy.plan import SPLIT_TILES, VEC, WIDE_TILES, Tile
from portacnn.backends.cupy.split import empty_partials, sum_partials
from portacnn.ops.fused import ConvNorm, unit_in_sequence
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.pool import max_pool, max_pool_backward
from portacnn.ops.windows import Windows
from portacnn.runtime import Array, Kernel, backend_of, dtype_name

FILE = "conv.cu"
# the kind of dy: FROM of cuda/conv.cu
PLAIN, AFTER_RELU, AFTER_POOL = 0, 1, 2


def _vectors(tile: Tile) -> list[int]:
    """Return the values of VEC of cuda/conv.cu: one element, or 16 bytes of the dtypes that the
    tile supports.
    """
    return [1, *(vec for itemsize, vec in VEC.items() if tile.takes(itemsize))]


VARIANTS: list[Variant] = with_rounding(
    [
        *(
            (FILE, {"FORWARD": 1, "POOL": pool, "BY_TAP": walk, "VEC": vec, **tile.defines})
            for tile in WIDE_TILES
            for pool in (0, 1)
            for walk in (VALUE_BY_VALUE, BY_TAP, WHOLE_STEPS)[: 3 if tile.slices == 1 else 2]
            for vec in _vectors(tile)
        ),
        *(
            (
                FILE,
                {
                    "INPUT": 1,
                    "FROM": by,
                    "STRIDED": strided,
                    "BY_TAP": walk,
                    "VEC": vec,
                    **tile.defines,
                },
            )
            for tile in WIDE_TILES
            for strided in (0, 1)
            for by in (PLAIN, AFTER_RELU, AFTER_POOL)
            for walk in (BY_TAP, WHOLE_STEPS)[: 2 if tile.slices == 1 else 1]
            for vec in _vectors(tile)
        ),
        *(
            (FILE, {"WEIGHT": 1, "FROM": by, "VEC": vec, **tile.defines})
            for tile in SPLIT_TILES
            for by in (PLAIN, AFTER_RELU, AFTER_POOL)
            for vec in _vectors(tile)
        ),
    ]
)


def _plan(x: Array, o: int, windows: Windows, groups: int, pooled: bool = False) -> Plan | None:
    """Return the plan for x (N, C, *S) as the input, or None if the kernels do not support
    the case.
    """
    if (
        len(windows.size) > 2
        or not supported(dtype_name(x))
        or not x.size
        or not reachable(windows)
    ):
        return None
    return plan_of(windows, x.shape[1], o, groups, x.shape[0], pooled, x.itemsize)


def _pools_in_pairs(pool: Windows, axes: int) -> bool:
    """Return whether the forward kernel supports this pooling: 2x2 with stride 2, no window beyond
    the edge.
    """
    return (
        axes == 2
        and pool.kernel == pool.stride == (2, 2)
        and pool.dilation == (1, 1)
        and not any(before for before, _ in pool.pads)
        and pool.out == (pool.size[0] // 2, pool.size[1] // 2)
    )


class _Saved(NamedTuple):
    """What a forward pass stores, in memory order: x (C, *S, N); after ReLU y, or with fused
    pooling the winners.
    """

    x: Array
    weight: Array
    with_bias: bool
    windows: Windows
    plan: Plan
    y: Array | None
    winner: Array | None
    pool_cache: Any  # of the op max_pool, if pooling was not fused


def _forward(
    x: Array,
    weight: Array,
    bias: Array | None,
    windows: Windows,
    groups: int,
    pool: Windows | None,
    relu: bool,
    keep: bool,
) -> Any:
    o = weight.shape[0]
    pairs = pool is not None and _pools_in_pairs(pool, len(windows.size))
    plan = _plan(x, o, windows, groups, pairs)
    if plan is None:
        return NotImplemented
    pairs = pairs and not plan.few
    backend = backend_of(x)
    xt, weight = backend.contiguous(batch_last(x)), backend.contiguous(weight)
    bias = None if bias is None else backend.contiguous(bias)
    y, winner = (
        cupy_cudnn.forward(plan, xt, weight, bias, relu) if cupy_cudnn.takes(plan) else None,
        None,
    )
    if y is None:
        y, winner = _convolve(
            plan, xt, weight, bias, (pool if pairs and pool else windows).out, relu, pairs, keep
        )
    else:
        y, pairs = y.reshape(y.shape[0], *windows.out, y.shape[-1]), False
    result, pool_cache = batch_first(y), None
    if pool is not None and not pairs:
        result, pool_cache = max_pool(result, pool, keep=keep)
    if not keep:
        return result, None
    kept = y if relu and not pairs else None
    return result, _Saved(xt, weight, bias is not None, windows, plan, kept, winner, pool_cache)


def _kernel(name: str, array: Array, tile: Tile, **defines: int) -> Launcher:
    dtype = dtype_name(array)
    return kernel(FILE, name, dtype, **defines, **tile.defines, **rounding(dtype))


def _convolve(
    plan: Plan,
    xt: Array,
    weight: Array,
    bias: Array | None,
    out: tuple[int, ...],
    relu: bool,
    pairs: bool,
    keep: bool,
) -> tuple[Array, Array | None]:
    """Return y (O, *OUT, N) for xt (C, *S, N), and with ``pairs`` the winners, uint8 of the same
    shape.
    """
    import cupy as cp

    sizes, tile = plan.sizes, plan.wide
    y = cp.empty((plan.groups * sizes.o, *out, sizes.n), dtype=xt.dtype)
    if plan.few:
        cupy_groups.convolve(plan, xt, weight, bias, y, 0.0 if relu else -inf, inf)
        return y, None
    winner = cp.empty(y.shape, dtype=np.uint8) if pairs and keep else None
    columns = y.size // y.shape[0]
    grid = (
        -(-columns * (4 if pairs else 1) // tile.columns),
        -(-sizes.o // tile.rows),
        plan.groups,
    )
    vec = vector(sizes.n, xt, y)
    run = _kernel(
        "conv_forward", xt, tile, FORWARD=1, POOL=int(pairs), BY_TAP=plan.forward_walk, VEC=vec
    )
    run(
        grid,
        (THREADS,),
        (xt, weight, or_null(bias), y, or_null(winner), np.int32(relu), *plan.numbers),
    )
    return y, winner


def _input_gradient(
    plan: Plan,
    dyt: Array,
    y: Array | None,
    winner: Array | None,
    weight: Array,
    bias: Array | None,
    shape: tuple[int, ...],
) -> Array:
    """Return dx (C, *S, N), plus bias (C,), for dyt (O, *OUT, N) after ReLU and pooling."""
    import cupy as cp

    sizes, tile = plan.sizes, plan.back
    dx = cp.empty(shape, dtype=dyt.dtype)
    if plan.few:
        cupy_groups.input_gradient(plan, dyt, y, weight, bias, dx)
        return dx
    cells = -(-sizes.h // sizes.sh) * -(-sizes.w // sizes.sw) * sizes.n
    grid = (-(-cells // tile.columns), -(-sizes.c // tile.rows), plan.groups * sizes.sh * sizes.sw)
    vec = vector(sizes.n, dyt, y, winner, dx)
    strided = int(sizes.sh * sizes.sw > 1)
    walk = {"STRIDED": strided, "BY_TAP": plan.input_walk, "VEC": vec}
    run = _kernel("conv_input_gradient", dyt, tile, INPUT=1, FROM=_from(y, winner), **walk)
    given = np.int32(dyt.size // dyt.shape[0])
    run(
        grid,
        (THREADS,),
        (dyt, or_null(y), or_null(winner), weight, or_null(bias), dx, given, *plan.numbers),
    )
    return dx


def _weight_gradient(
    plan: Plan,
    xt: Array,
    dyt: Array,
    y: Array | None,
    winner: Array | None,
    shape: tuple[int, ...],
    with_bias: bool,
) -> tuple[Array, Array | None]:
    """Return dweight and dbias (O,) for xt (C, *S, N) and dyt (O, *OUT, N) after ReLU and
    pooling.
    """
    import cupy as cp

    sizes, (tile, splits, each) = plan.sizes, plan.split
    rows, columns = plan.groups * sizes.o, sizes.c * plan.taps
    dweight = cp.empty(shape, dtype=xt.dtype)
    dbias = cp.empty((rows,), dtype=xt.dtype) if with_bias else None
    if plan.few:
        cupy_groups.weight_gradient(plan, xt, dyt, y, dweight, dbias)
        return dweight, dbias
    partials = empty_partials(splits, rows, columns + with_bias, xt.dtype)
    grid = (
        -(-(columns + with_bias) // tile.columns),
        -(-sizes.o // tile.rows),
        plan.groups * splits,
    )
    vec = vector(sizes.n, xt, dyt, y, winner)
    run = _kernel("conv_weight_gradient", xt, tile, WEIGHT=1, FROM=_from(y, winner), VEC=vec)
    cut = np.int32(splits), np.int32(each), np.int32(dyt.size // dyt.shape[0])
    arrays = xt, dyt, or_null(y), or_null(winner), dweight, or_null(dbias), or_null(partials)
    run(grid, (THREADS,), (*arrays, *cut, *plan.numbers))
    if partials is not None:
        sum_partials(partials, splits, rows, columns, dweight, dbias)
    return dweight, dbias


def _from(y: Array | None, winner: Array | None) -> int:
    return AFTER_POOL if winner is not None else AFTER_RELU if y is not None else PLAIN


# --- the ops --------------------------------------------------------------------------------------


def conv(
    x: Array, weight: Array, bias: Array | None, windows: Windows, groups: int, *, keep: bool
) -> Any:
    return _forward(x, weight, bias, windows, groups, None, False, keep)


def conv_relu(
    x: Array,
    weight: Array,
    bias: Array | None,
    windows: Windows,
    groups: int,
    pool: Windows | None,
    *,
    keep: bool,
) -> Any:
    return _forward(x, weight, bias, windows, groups, pool, True, keep)


def conv_unit(
    parts: list[Array],
    weight: Array,
    bias: Array | None,
    windows: Windows,
    groups: int,
    norm: ConvNorm | None,
    low: float | None,
    high: float | None,
    pool: Windows | None,
) -> Any:
    """Compute ``conv_unit`` in one launch if there are few channels per group and neither a sum nor
    pooling. Otherwise the kernels run in sequence: scaling large weights takes several launches,
    and the norm one.
    """
    x, *residual = parts
    plan = None if residual or pool is not None else _plan(x, weight.shape[0], windows, groups)
    if plan is None or not plan.few:
        return unit_in_sequence(parts, weight, bias, windows, groups, norm, low, high, pool)
    import cupy as cp

    if norm is not None:
        weight, bias = norm.folded(weight, bias)
    backend = backend_of(x)
    xt, weight = backend.contiguous(batch_last(x)), backend.contiguous(weight)
    bias = None if bias is None else backend.contiguous(bias)
    y = cp.empty((weight.shape[0], *windows.out, x.shape[0]), dtype=x.dtype)
    limits = -inf if low is None else low, inf if high is None else high
    cupy_groups.convolve(plan, xt, weight, bias, y, *limits)
    return batch_first(y)


def conv_backward(
    dy: Array,
    saved: _Saved,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> tuple[Array | None, Array | None, Array | None]:
    xt, weight, with_bias, _, plan, y, winner, pool_cache = saved
    if pool_cache is not None:
        dy = max_pool_backward(dy, pool_cache)
    dyt = backend_of(dy).contiguous(batch_last(dy))
    if winner is None and cupy_cudnn.takes(plan):
        need = need_dx, need_dweight, with_bias and need_dbias
        done = cupy_cudnn.gradients(plan, xt, dyt, y, weight, need)
        if done is not None:
            dxt, dweight, dbias = done
            return None if dxt is None else batch_first(dxt), dweight, dbias
    dweight = dbias = None
    if need_dweight or (with_bias and need_dbias):
        dweight, dbias = _weight_gradient(plan, xt, dyt, y, winner, weight.shape, with_bias)
        dweight, dbias = dweight if need_dweight else None, dbias if need_dbias else None
    if not need_dx:
        return None, dweight, dbias
    return (
        batch_first(_input_gradient(plan, dyt, y, winner, weight, None, xt.shape)),
        dweight,
        dbias,
    )


def conv_transpose(
    x: Array, weight: Array, bias: Array | None, windows: Windows, groups: int, *, keep: bool
) -> Any:
    """Compute the input gradient of ``conv`` as a forward pass. ``windows`` is the geometry from
    OUT to S; x takes the place of dy.
    """
    channels = weight.shape[1] * groups
    if (
        len(windows.size) > 2
        or not supported(dtype_name(x))
        or not x.size
        or not reachable(windows)
    ):
        return NotImplemented
    plan = plan_of(windows, channels, x.shape[1], groups, x.shape[0], False, x.itemsize)
    if plan is None:
        return NotImplemented
    backend = backend_of(x)
    xt, weight = backend.contiguous(batch_last(x)), backend.contiguous(weight)
    bias = None if bias is None else backend.contiguous(bias)
    y = _input_gradient(plan, xt, None, None, weight, bias, (channels, *windows.size, x.shape[0]))
    saved = _Saved(xt, weight, bias is not None, windows, plan, None, None, None) if keep else None
    return batch_first(y), saved


def conv_transpose_backward(
    dy: Array,
    saved: _Saved,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> tuple[Array | None, Array | None, Array | None]:
    xt, weight, with_bias, windows, plan, *_ = saved
    dyt = backend_of(dy).contiguous(batch_last(dy))
    dweight = None
    if need_dweight:
        dweight, _ = _weight_gradient(plan, dyt, xt, None, None, weight.shape, False)
    dbias = None
    if with_bias and need_dbias:
        dbias = dyt.reshape(dyt.shape[0], -1).sum(axis=1)
    if not need_dx:
        return None, dweight, dbias
    dx, _ = _convolve(plan, dyt, weight, None, windows.out, False, False, False)
    return batch_first(dx), dweight, dbias


KERNELS = {
    "conv": Kernel(conv, conv_backward),
    "conv_relu": Kernel(conv_relu, conv_backward),
    "conv_unit": Kernel(conv_unit),
    "conv_transpose": Kernel(conv_transpose, conv_transpose_backward),
}
