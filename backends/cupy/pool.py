"""Pooling on CUDA over one to three axes (cuda/pool.cu): one launch per pass. The backward pass
gathers, so it needs no atomic additions.

Notation as in ops/pool.py: N batch, C channels, S/OUT the spatial axes in/out.
"""

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

from portacnn.backends.cupy.memory import MOST, THREADS, can, or_null, reachable
from portacnn.backends.cupy.nvrtc import Variant, kernel
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import Windows
from portacnn.runtime import Array, Kernel, backend_of, dtype_name

FILE = "pool.cu"
_KNOWN = ((2, 2), (3, 3))  # window sizes that are compile-time constants
VARIANTS: list[Variant] = [
    (FILE, {}),
    (FILE, {"MANY_TAPS": 1}),
    *((FILE, {"KH_IS": h, "KW_IS": w}) for h, w in _KNOWN),
]
_MOST_STRETCHES = 65535  # limit of a grid dimension


class Geometry(NamedTuple):
    """The geometry of windows in the form of the kernels' arguments."""

    numbers: tuple[np.int32, ...]  # D, H, W, OD, ..., dilations
    after: tuple[np.int32, ...]  # the padding after each axis
    defines: dict[str, str | int]


@lru_cache(maxsize=1024)
def _geometry(windows: Windows) -> Geometry:
    missing = 3 - len(windows.size)
    ones, zeros = (1,) * missing, (0,) * missing
    before, after = zip(*windows.pads, strict=True)
    rows = (
        *(ones + row for row in (windows.size, windows.out, windows.kernel, windows.stride)),
        zeros + before,
        ones + windows.dilation,
    )
    numbers = tuple(np.int32(number) for row in rows for number in row)
    kernel_size = ones + windows.kernel
    defines: dict[str, str | int] = {}
    if kernel_size[0] == 1 and kernel_size[1:] in _KNOWN:
        defines = {"KH_IS": kernel_size[1], "KW_IS": kernel_size[2]}
    elif prod(windows.kernel) > 256:
        defines = {"MANY_TAPS": 1}
    return Geometry(numbers, tuple(np.int32(number) for number in zeros + after), defines)


def _can(x: Array, windows: Windows) -> bool:
    n, c = x.shape[:2]
    fits = (
        c * prod(windows.out) * n <= MOST
        and max(windows.size[-1], windows.out[-1]) * n <= THREADS * _MOST_STRETCHES
    )
    return len(windows.size) <= 3 and can(x) and fits and reachable(windows)


def _launch(name: str, result: Array, arguments: tuple, geometry: Geometry) -> None:
    """Launch one thread per element of ``result`` (C, *S, N); each of its rows has a row of
    blocks.
    """
    *rows, width, n = result.shape
    stretch = min(-(-width * n // 32) * 32, THREADS)
    grid = (prod(rows), -(-width * n // stretch))
    run = kernel(FILE, name, dtype_name(result), **geometry.defines)
    run(grid, (stretch,), (*arguments, np.int32(n), *geometry.numbers))


def max_pool(x: Array, windows: Windows, *, keep: bool) -> Any:
    import cupy as cp

    if not _can(x, windows):
        return NotImplemented
    geometry = _geometry(windows)
    xt = backend_of(x).contiguous(batch_last(x))
    y = cp.empty((xt.shape[0], *windows.out, xt.shape[-1]), dtype=x.dtype)
    winner = (
        cp.empty(y.shape, dtype="int32" if "MANY_TAPS" in geometry.defines else "uint8")
        if keep
        else None
    )
    _launch("max_pool", y, (xt, y, or_null(winner)), geometry)
    return batch_first(y), (xt.shape, winner, windows) if keep else None


def max_pool_backward(dy: Array, saved: tuple) -> Array:
    import cupy as cp

    shape, winner, windows = saved
    dyt = backend_of(dy).contiguous(batch_last(dy))
    dx = cp.empty(shape, dtype=dy.dtype)
    _launch("max_pool_backward", dx, (dyt, winner, dx), _geometry(windows))
    return batch_first(dx)


def _average(
    geometry: Geometry, count_include_pad: bool, divisor: int | None
) -> tuple[np.int32, ...]:
    return np.int32(divisor or 0), np.int32(count_include_pad), *geometry.after


def avg_pool(
    x: Array, windows: Windows, count_include_pad: bool, divisor: int | None, *, keep: bool
) -> Any:
    import cupy as cp

    if not _can(x, windows) or (divisor or 0) >= 2**31 or any(d != 1 for d in windows.dilation):
        return NotImplemented
    geometry = _geometry(windows)
    xt = backend_of(x).contiguous(batch_last(x))
    y = cp.empty((xt.shape[0], *windows.out, xt.shape[-1]), dtype=x.dtype)
    _launch("avg_pool", y, (xt, y, *_average(geometry, count_include_pad, divisor)), geometry)
    return batch_first(y), (xt.shape, windows, count_include_pad, divisor) if keep else None


def avg_pool_backward(dy: Array, saved: tuple) -> Array:
    import cupy as cp

    shape, windows, count_include_pad, divisor = saved
    geometry = _geometry(windows)
    dyt = backend_of(dy).contiguous(batch_last(dy))
    dx = cp.empty(shape, dtype=dy.dtype)
    average = _average(geometry, count_include_pad, divisor)
    _launch("avg_pool_backward", dx, (dyt, dx, *average), geometry)
    return batch_first(dx)


KERNELS = {
    "max_pool": Kernel(max_pool, max_pool_backward),
    "avg_pool": Kernel(avg_pool, avg_pool_backward),
}
