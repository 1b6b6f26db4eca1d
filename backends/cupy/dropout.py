"""Dropout on CUDA (cuda/dropout.cu), with the bits of the portable masks: one launch per pass.

No mask is stored. The backward pass computes the hash again from two words per sample that the
forward pass stored, so the step number may have changed by then.
"""

from math import prod
from typing import Any, NamedTuple

import numpy as np

from portacnn.backends.cupy.memory import at_or_value, can, or_null
from portacnn.backends.cupy.nvrtc import Variant, kernel
from portacnn.ops.layout import batch_first, batch_last
from portacnn.runtime import Array, Kernel, backend_of, dtype_name

FILE = "dropout.cu"
VARIANTS: list[Variant] = [(FILE, {})]
_ACROSS, _LONG = 32, 64  # samples per block, and elements of each
_MOST_STRETCHES = 65535  # limit of a grid dimension


class _Saved(NamedTuple):
    words: Array  # (2, N)
    threshold: int
    scale: float
    inner: int


def _launch(
    x: Array,
    words: Array | None,
    given: bool,
    key: tuple[int, int],
    step: Any,
    first: Any,
    how: Any,
) -> Array:
    """Return x (N, C, *S) with elements dropped."""
    import cupy as cp

    threshold, scale, inner = how
    xt = backend_of(x).contiguous(batch_last(x))
    y = cp.empty(xt.shape, dtype=x.dtype)
    n = xt.shape[-1]
    length = xt.size // n
    counters = []
    for number in (step, first):
        at, value = at_or_value(number, "int64")
        counters += [at, np.int64(value)]
    words_and_keys = or_null(words), np.bool_(given), np.uint32(key[0]), np.uint32(key[1])
    numbers = (
        np.uint64(threshold),
        x.dtype.type(scale),
        np.int32(length),
        np.int32(n),
        np.int32(inner),
    )
    grid = (-(-n // _ACROSS), -(-length // _LONG))
    kernel(FILE, "drop", dtype_name(x))(grid, (256,), (xt, y, *words_and_keys, *counters, *numbers))
    return batch_first(y)


def drop(
    x: Array, p: float, length: int, key: tuple[int, int], step: Any, first: Any, *, keep: bool
) -> Any:
    import cupy as cp

    if not can(x) or x.size // x.shape[0] > _LONG * _MOST_STRETCHES:
        return NotImplemented
    words = cp.empty((2, x.shape[0]), dtype="uint32") if keep else None
    how = round(p * 2**32), 1.0 / (1.0 - p) if p < 1.0 else 0.0, prod(x.shape[1:]) // length
    y = _launch(x, words, False, key, step, first, how)
    return y, _Saved(words, *how) if keep else None


def drop_backward(dy: Array, saved: _Saved) -> Array:
    return _launch(dy, saved.words, True, (0, 0), 0, 0, saved[1:])


KERNELS = {"drop": Kernel(drop, drop_backward)}
