"""Convolution on CUDA with few channels per group, such as depthwise (cuda/groups.cu). Launched by
conv.py.

Notation as in conv.py: arrays in memory order, xt (C, *S, N), yt and dyt (O, *OUT, N), of all
groups.
"""

from typing import Any

import numpy as np

from portacnn.backends.cupy.geometry import Plan
from portacnn.backends.cupy.memory import THREADS, or_null, vector
from portacnn.backends.cupy.nvrtc import Variant, kernel
from portacnn.backends.cupy.plan import ENOUGH, VEC
from portacnn.backends.cupy.split import empty_partials, sum_partials
from portacnn.runtime import Array, dtype_name

FILE = "groups.cu"
TAPS = 4  # of cuda/groups.cu
_VECTORS = (1, *VEC.values())
VARIANTS: list[Variant] = [
    *((FILE, {"FORWARD": 1, "VEC": vec}) for vec in _VECTORS),
    *(
        (FILE, {kind: 1, "FROM": by, "VEC": vec})
        for kind in ("INPUT", "WEIGHT")
        for by in (0, 1)
        for vec in _VECTORS
    ),
]


def _blocks(count: int, vec: int) -> int:
    return -(-count // (THREADS * vec))


def convolve(
    plan: Plan, xt: Array, weight: Array, bias: Array | None, y: Array, low: float, high: float
) -> None:
    """Write y (O, *OUT, N), limited to the range from ``low`` to ``high``."""
    vec = vector(plan.sizes.n, xt, y)
    run = kernel(FILE, "group_forward", dtype_name(xt), FORWARD=1, VEC=vec)
    number = np.float32 if y.dtype.itemsize == 4 else np.float64
    arguments = xt, weight, or_null(bias), y, number(low), number(high), *plan.numbers
    run((_blocks(plan.cells, vec), y.shape[0]), (THREADS,), arguments)


def input_gradient(
    plan: Plan, dyt: Array, y: Array | None, weight: Array, bias: Array | None, dx: Array
) -> None:
    """Write dx (C, *S, N), plus bias (C,). If y is given, dyt counts as 0 where y is not
    above 0.
    """
    vec = vector(plan.sizes.n, dyt, y, dx)
    run = kernel(
        FILE, "group_input_gradient", dtype_name(dyt), INPUT=1, FROM=int(y is not None), VEC=vec
    )
    arrays = dyt, or_null(y), weight, or_null(bias), dx
    run((_blocks(dx.size // dx.shape[0], vec), dx.shape[0]), (THREADS,), (*arrays, *plan.numbers))


def weight_gradient(
    plan: Plan, xt: Array, dyt: Array, y: Array | None, dweight: Array, dbias: Array | None
) -> None:
    """Write dweight (O, C, *K) and dbias (O,)."""
    sizes, rows, columns = plan.sizes, dyt.shape[0], plan.sizes.c * plan.taps
    vec = vector(sizes.n, xt, dyt, y)
    pieces = sizes.c * sizes.kh * -(-sizes.kw // TAPS)
    # Enough parts of the cells to fill a GPU, each with several rounds of a block's threads.
    splits = max(1, min(-(-ENOUGH // (rows * pieces)), plan.cells // (8 * THREADS)))
    each = _blocks(-(-plan.cells // splits), vec) * THREADS * vec
    splits = -(-plan.cells // each)
    partials = empty_partials(splits, rows, columns + (dbias is not None), xt.dtype)
    run = kernel(
        FILE, "group_weight_gradient", dtype_name(xt), WEIGHT=1, FROM=int(y is not None), VEC=vec
    )
    arrays: tuple[Any, ...] = xt, dyt, or_null(y), dweight, or_null(dbias), or_null(partials)
    run((splits, pieces, rows), (THREADS,), (*arrays, np.int32(each), *plan.numbers))
    if partials is not None:
        sum_partials(partials, splits, rows, columns, dweight, dbias)
