"""Affine maps on CUDA, optionally with ReLU, with portacnn's own matrix product (cuda/gemm.cu),
which can be captured.

Notation as in ops/_linear.py: N batch, F in-features, O out-features; x.T (F, N) and y.T (O, N) are
contiguous. With a batch of 100, 4320 features and 100 outputs, there are few results and a large
depth, so the depth is split over blocks.
"""

from typing import Any, NamedTuple

import numpy as np

from portacnn.backends.cupy.memory import THREADS, or_null
from portacnn.backends.cupy.nvrtc import Variant, kernel, rounding, supported, with_rounding
from portacnn.backends.cupy.plan import SPLIT_TILES, split_tile
from portacnn.backends.cupy.split import empty_partials, sum_partials
from portacnn.runtime import Array, Kernel, backend_of, dtype_name

FILE = "gemm.cu"
VARIANTS: list[Variant] = with_rounding(
    [
        (FILE, {"A_DEEP": a, "B_DEEP": b, "A_MASK": a_mask, "B_MASK": b_mask, **tile.defines})
        for tile in SPLIT_TILES
        for a in (0, 1)
        for b in (0, 1)
        for a_mask, b_mask in ((0, 0), (0, 1), (1, 0))
    ]
)
_MOST = 2**31 - 1


class _Factor(NamedTuple):
    """A matrix (lines, depth) in memory order. ``deep``: elements along the depth are adjacent."""

    array: Array
    deep: bool
    step: np.int32  # stride of the other axis
    mask: Array | None  # same layout; elements count as 0 where it is not above 0


def _factor(array: Array, mask: Array | None = None) -> _Factor:
    """Return the factor of a matrix (lines, depth). Copies if no axis is contiguous, or the mask
    has other strides.
    """
    size, (line, deep), (lines, depth) = array.itemsize, array.strides, array.shape
    if deep == size or depth == 1:
        is_deep, step, count = True, line // size, lines
    else:
        is_deep, step, count = False, deep // size if line == size or lines == 1 else 0, depth
    if (mask is not None and mask.strides != array.strides) or (
        count > 1 and not 0 < step * count <= _MOST
    ):
        backend = backend_of(array)
        array, mask = backend.contiguous(array), None if mask is None else backend.contiguous(mask)
        is_deep, step = True, depth
    return _Factor(array, is_deep, np.int32(step if step * count <= _MOST else 0), mask)


def _product(
    a: _Factor, b: _Factor, bias: Array | None = None, relu: bool = False, with_ones: bool = False
) -> tuple[Array, Array | None]:
    """Return a @ b.T (M, N) of a (M, K) and b (N, K), plus bias (M,), and ReLU; and with
    ``with_ones`` the sums of a's rows (M,).
    """
    import cupy as cp

    (m, depth), n = a.array.shape, b.array.shape[0]
    tile, splits, each = split_tile(m, n + with_ones, depth, 1)
    z = cp.empty((m, n), dtype=a.array.dtype)
    ones = cp.empty((m,), dtype=z.dtype) if with_ones else None
    partials = empty_partials(splits, m, n + with_ones, z.dtype)
    defines: dict[str, str | int] = {
        "A_DEEP": int(a.deep),
        "B_DEEP": int(b.deep),
        "A_MASK": int(a.mask is not None),
    }
    defines |= {"B_MASK": int(b.mask is not None), **tile.defines, **rounding(dtype_name(z))}
    run = kernel(FILE, "gemm", dtype_name(z), **defines)
    own_bias, own_relu = (bias, relu) if partials is None else (None, False)
    arrays = a.array, a.mask, b.array, b.mask, own_bias, z, ones, partials
    numbers = (
        np.int32(own_relu),
        np.int32(m),
        np.int32(n),
        np.int32(depth),
        a.step,
        b.step,
        np.int32(each),
    )
    grid = (-(-(n + with_ones) // tile.columns), -(-m // tile.rows), splits)
    run(grid, (THREADS,), (*map(or_null, arrays), *numbers))
    if partials is not None:
        sum_partials(partials, splits, m, n, z, ones, bias, relu)
    return z, ones


def _map(x: Array, weight: Array, bias: Array | None, relu: bool, keep: bool) -> Any:
    if not _can(x, weight):
        return NotImplemented
    bias = None if bias is None else backend_of(x).contiguous(bias)
    yt, _ = _product(_factor(weight), _factor(x), bias, relu)
    return yt.T, (x, weight, bias is not None, yt if relu else None) if keep else None


def _can(x: Array, weight: Array) -> bool:
    largest = max(x.size, weight.size, x.shape[0] * weight.shape[0])
    return supported(dtype_name(x)) and x.size > 0 and weight.size > 0 and 0 < largest <= _MOST // 2


def linear(x: Array, weight: Array, bias: Array | None = None, *, keep: bool = True) -> Any:
    return _map(x, weight, bias, False, keep)


def linear_relu(x: Array, weight: Array, bias: Array | None = None, *, keep: bool = True) -> Any:
    return _map(x, weight, bias, True, keep)


def linear_backward(
    dy: Array,
    saved: Any,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> tuple[Array | None, Array | None, Array | None]:
    x, weight, with_bias, yt = saved
    dyt, y = dy.T, None if yt is None else yt.T
    dweight = dbias = None
    if need_dweight or (with_bias and need_dbias):
        dweight, dbias = _product(_factor(dyt, yt), _factor(x.T), with_ones=with_bias)
        dweight, dbias = dweight if need_dweight else None, dbias if need_dbias else None
    if not need_dx:
        return None, dweight, dbias
    dx, _ = _product(_factor(weight.T), _factor(dy, y))
    return dx.T, dweight, dbias


KERNELS = {
    "linear": Kernel(linear, linear_backward),
    "linear_relu": Kernel(linear_relu, linear_backward),
}
