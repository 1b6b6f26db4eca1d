"""The columns of ``ops/windows.py`` on CUDA, one launch for all taps: for im2col, col2im and
convolution of three axes.

Notation as there: C channels, T taps, S/OUT the spatial axes, N batch. Both return the bits of the
portable ops.
"""

from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from portacnn.backends.cupy.memory import THREADS, reachable
from portacnn.backends.cupy.nvrtc import Variant, kernel, supported
from portacnn.ops.windows import Windows
from portacnn.runtime import Array, Kernel, backend_of, dtype_name

FILE = "columns.cu"
VARIANTS: list[Variant] = [(FILE, {})]
_ROWS = 64  # rows of the grid; a thread loops over the others


@lru_cache(maxsize=1024)
def _numbers(windows: Windows, c: int, n: int) -> tuple[np.int32, ...]:
    """Return the geometry as kernel arguments: three axes, padded with leading axes of size 1."""
    ones, zeros = (1,) * (3 - len(windows.size)), (0,) * (3 - len(windows.size))
    before = tuple(pad for pad, _ in windows.pads)
    axes = windows.size, windows.out, windows.kernel, windows.stride
    numbers = [
        c,
        *(n for axis in axes for n in ones + axis),
        *zeros,
        *before,
        *ones,
        *windows.dilation,
        n,
    ]
    return tuple(np.int32(number) for number in numbers)


def _run(
    name: str, source: Array, shape: tuple[int, ...], windows: Windows, c: int, rows: int
) -> Any:
    import cupy as cp

    n, cells = shape[-1], prod(shape) // rows
    too_large = cells // max(n, 1) >= 2**31 - 2**24 or rows >= 2**31
    if len(windows.size) > 3 or not supported(dtype_name(source)) or not prod(shape) or too_large:
        return NotImplemented
    if not reachable(windows):
        return NotImplemented
    out = cp.empty(shape, dtype=source.dtype)
    grid = (-(-cells // 256), min(rows, _ROWS))
    given = backend_of(source).contiguous(source)
    kernel(FILE, name, dtype_name(source))(grid, (THREADS,), (given, out, *_numbers(windows, c, n)))
    return out


def gather(x: Array, windows: Windows) -> Any:
    c, taps = x.shape[0], prod(windows.kernel)
    return _run("im2col", x, (c, taps, *windows.out, x.shape[-1]), windows, c, c * taps)


def scatter(columns: Array, windows: Windows) -> Any:
    c = columns.shape[0]
    return _run("col2im", columns, (c, *windows.size, columns.shape[-1]), windows, c, c)


KERNELS = {"gather": Kernel(gather), "scatter": Kernel(scatter)}
