"""Batch norm on CUDA, optionally with ReLU (cuda/norm.cu): two launches in training, one in
inference, two for the gradient.

The backward pass uses x itself and five values per channel. Notation: rows (C, P) are x with the
batch last, P = S*N.
"""

from typing import Any, NamedTuple

import numpy as np

from portacnn.backends.cupy.memory import FULL, THREADS, at_or_value, can, or_null
from portacnn.backends.cupy.nvrtc import Variant, kernel
from portacnn.ops.layout import batch_first, batch_last
from portacnn.runtime import Array, Kernel, backend_of, dtype_name

FILE = "norm.cu"
VARIANTS: list[Variant] = [(FILE, {})]
# elements of a part; with fewer, combining parts takes longer than reading them
_LEAST = 4 * THREADS
_MOST_PARTS = 128  # a block combines them, one per thread
_MOST_CHANNELS = 65535  # limit of a grid dimension


class _Saved(NamedTuple):
    x: Array  # (C, *S, N), contiguous
    statistics: Array  # (5, C); see cuda/norm.cu
    weight: bool
    bias: bool
    own: bool
    relu: bool


def cut(channels: int, count: int) -> tuple[int, int]:
    """Return the number of parts of a channel's ``count`` elements, and the size of each but the
    last.
    """
    parts = max(1, min(-(-FULL // channels), count // _LEAST, _MOST_PARTS))
    each = -(-count // (parts * 32)) * 32  # whole cache lines
    return -(-count // each), each


def _forward(
    relu: bool,
    x: Array,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None,
    bias: Array | None,
    training: bool,
    momentum: Any,
    eps: float,
    keep: bool,
) -> Any:
    import cupy as cp

    running = [] if running_mean is None or running_var is None else [running_mean, running_var]
    if not can(x) or x.shape[1] > _MOST_CHANNELS or not all(a.flags.c_contiguous for a in running):
        return NotImplemented
    backend = backend_of(x)
    channels, dtype = x.shape[1], dtype_name(x)
    xt = backend.contiguous(batch_last(x))
    count = xt.size // channels
    splits, each = cut(channels, count)
    grid, sizes = (splits, channels), (np.int32(count), np.int32(each))
    partials = None
    if training:
        partials = cp.empty((3, channels, splits), dtype=x.dtype)
        kernel(FILE, "norm_partials", dtype)(grid, (THREADS,), (xt, partials, *sizes))
    y = cp.empty(xt.shape, dtype=x.dtype)
    statistics = cp.empty((5, channels), dtype=x.dtype) if keep else None
    weight, bias = (
        None if array is None else backend.contiguous(array) for array in (weight, bias)
    )
    momentum_at, momentum = at_or_value(momentum, dtype)
    arrays = (
        xt,
        or_null(partials),
        or_null(weight),
        or_null(bias),
        or_null(running_mean),
        or_null(running_var),
    )
    numbers = (
        momentum_at,
        np.float64(momentum),
        np.float64(eps),
        or_null(statistics),
        y,
        np.int32(relu),
    )
    kernel(FILE, "norm_forward", dtype)(grid, (THREADS,), (*arrays, *numbers, *sizes))
    saved = (
        _Saved(xt, statistics, weight is not None, bias is not None, training, relu)
        if keep
        else None
    )
    return batch_first(y), saved


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
) -> Any:
    return _forward(
        False, x, running_mean, running_var, weight, bias, training, momentum, eps, keep
    )


def batch_norm_relu(
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
) -> Any:
    return _forward(True, x, running_mean, running_var, weight, bias, training, momentum, eps, keep)


def batch_norm_backward(
    dy: Array,
    saved: _Saved,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> tuple[Array | None, Array | None, Array | None]:
    import cupy as cp

    xt, statistics, weight, bias, own, relu = saved
    dyt = backend_of(dy).contiguous(batch_last(dy))
    channels, dtype = xt.shape[0], dtype_name(xt)
    count = xt.size // channels
    need_dweight, need_dbias = need_dweight and weight, need_dbias and bias
    splits, each = cut(channels, count)
    sizes = np.int32(count), np.int32(each)
    partials = cp.empty((2, channels, splits), dtype=xt.dtype)
    arrays = dyt, xt, statistics, partials
    if need_dweight or need_dbias or (own and need_dx):
        kernel(FILE, "norm_sums", dtype)(
            (splits, channels), (THREADS,), (*arrays, np.int32(relu), *sizes)
        )
    dweight = cp.empty((channels,), dtype=xt.dtype) if need_dweight else None
    dbias = cp.empty((channels,), dtype=xt.dtype) if need_dbias else None
    dx = cp.empty(xt.shape, dtype=xt.dtype) if need_dx else None
    results = or_null(dweight), or_null(dbias), or_null(dx)
    numbers = np.int32(relu), np.int32(own), np.int32(splits), *sizes
    grid = (splits if need_dx else 1, channels)
    kernel(FILE, "norm_backward", dtype)(grid, (THREADS,), (*arrays, *results, *numbers))
    return None if dx is None else batch_first(dx), dweight, dbias


KERNELS = {
    "batch_norm": Kernel(batch_norm, batch_norm_backward),
    "batch_norm_relu": Kernel(batch_norm_relu, batch_norm_backward),
}
