"""The masks of dropout on NumPy. See ``portacnn.ops.masks`` for the hash."""

from typing import Any

import numpy as np

from portacnn.ops.masks import LAST_SHIFT, ROUNDS, WORD
from portacnn.runtime import Kernel

_PIECE = 1 << 15  # values of a mask per piece; intermediate results stay in the cache


def kept(
    like: np.ndarray, length: int, first: np.ndarray, second: np.ndarray, threshold: int
) -> Any:
    """Compute ``kept`` with the same hash in uint32, whose products wrap to 32 bits."""
    if not 0 < threshold <= WORD:
        return NotImplemented
    first, second = first.astype(np.uint32), second.astype(np.uint32)
    mask = np.empty((length, first.size), dtype=np.bool_)
    rows = max(_PIECE // max(first.size, 1), 1)
    x = np.empty((rows, first.size), dtype=np.uint32)
    shifted = np.empty_like(x)
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        x, shifted = x[: stop - start], shifted[: stop - start]
        np.bitwise_xor(np.arange(start, stop, dtype=np.uint32)[:, None], first, out=x)
        for number, (shift, factor) in enumerate(ROUNDS):
            np.right_shift(x, shift, out=shifted)
            x ^= shifted
            x *= np.uint32(factor & WORD)
            if number == 0:
                x ^= second
        np.right_shift(x, LAST_SHIFT, out=shifted)
        x ^= shifted
        np.greater_equal(x, np.uint32(threshold), out=mask[start:stop])
    return mask.T


KERNELS = {"kept": Kernel(kept)}
