"""Products whose depth is split over blocks: a buffer for the partial sums, and the kernel that
adds them in a fixed order.
"""

from typing import Any

import numpy as np

from portacnn.backends.cupy.memory import THREADS, or_null
from portacnn.backends.cupy.nvrtc import Variant, kernel
from portacnn.runtime import Array, dtype_name

FILE = "split.cu"
VARIANTS: list[Variant] = [(FILE, {})]


def empty_partials(splits: int, rows: int, columns: int, dtype: Any) -> Array | None:
    """Allocate (splits, rows, columns), or return None if there is one split."""
    import cupy as cp

    return cp.empty((splits, rows, columns), dtype=dtype) if splits > 1 else None


def sum_partials(
    partials: Array,
    splits: int,
    rows: int,
    columns: int,
    y: Array,
    ones: Array | None = None,
    bias: Array | None = None,
    relu: bool = False,
) -> None:
    """Write y (rows, columns) = the sum over splits, plus bias (rows,), and ReLU. An extra column
    goes to ``ones`` (rows,).
    """
    arrays = partials, or_null(bias), y, or_null(ones)
    numbers = np.int32(splits), np.int32(rows), np.int32(columns), np.int32(relu)
    grid = (-(-rows * (columns + (ones is not None)) // 32),)
    kernel(FILE, "sum_partials", dtype_name(y))(grid, (THREADS,), (*arrays, *numbers))
