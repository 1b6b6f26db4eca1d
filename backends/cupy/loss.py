"""Softmax cross-entropy on CUDA (cuda/loss.cu), for integer labels and the mean: one launch for
small batches, else two.

The forward pass also computes the gradient. If the gradient of the loss is 1.0, the backward pass
needs no launch.
"""

from typing import Any

import numpy as np

from portacnn.backends.cupy.memory import FULL, THREADS, can, or_null
from portacnn.backends.cupy.nvrtc import Variant, kernel
from portacnn.runtime import Array, Kernel, backend_of, dtype_name

FILE = "loss.cu"
VARIANTS: list[Variant] = [(FILE, {})]
_EACH = 8  # classes per thread
# rounds of samples that one block may process; more take longer than a second launch
_ROUNDS = 4


def _plan(n: int, classes: int) -> tuple[int, int]:
    """Return the number of threads per sample and of blocks."""
    lanes = 1
    while lanes * _EACH < classes and lanes < THREADS:
        lanes *= 2
    together = THREADS // lanes
    rounds = -(-n // together)
    return lanes, 1 if rounds <= _ROUNDS else min(rounds, FULL)


def softmax_cross_entropy(
    logits: Array,
    target: Array,
    *,
    weight: Array | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    keep: bool = True,
) -> Any:
    import cupy as cp

    by_label = logits.ndim == 2 and target.ndim == 1 and target.dtype.kind in "iu"
    if (
        not (by_label and weight is None and reduction == "mean" and can(logits))
        or not -(2**63) <= ignore_index < 2**63
    ):
        return NotImplemented
    contiguous = backend_of(logits).contiguous
    n, classes = logits.shape
    last = not logits.flags.c_contiguous
    memory = contiguous(logits.T if last else logits)
    labels = contiguous(target.astype("int64", copy=False))
    lanes, blocks = _plan(n, classes)
    rows = cp.empty((2, n), dtype=logits.dtype)
    partials = cp.empty((2, blocks), dtype="float64") if blocks > 1 else None
    loss = cp.empty((), dtype=logits.dtype)
    dlogits = cp.empty(memory.shape, dtype=logits.dtype) if keep else None
    steps = (1, n) if last else (classes, 1)
    sizes = tuple(np.int32(number) for number in (lanes, n, classes, *steps))
    numbers = *sizes, np.int64(ignore_index), logits.dtype.type(label_smoothing)
    dtype = dtype_name(logits)
    arrays = memory, labels, rows, or_null(partials), loss, or_null(dlogits)
    kernel(FILE, "softmax_loss", dtype)((blocks,), (THREADS,), (*arrays, *numbers))
    if blocks > 1:
        grid = (blocks if keep else 1,)
        kernel(FILE, "softmax_gradient", dtype)(
            grid, (THREADS,), (*arrays, np.int32(blocks), *numbers)
        )
    if dlogits is None:
        return loss, None
    return loss, dlogits.T if last else dlogits


def softmax_cross_entropy_backward(dy: Array | float, saved: Array) -> Array:
    return saved if isinstance(dy, float) and dy == 1.0 else saved * dy


KERNELS = {"softmax_cross_entropy": Kernel(softmax_cross_entropy, softmax_cross_entropy_backward)}
