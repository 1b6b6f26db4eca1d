"""Special functions that NumPy lacks."""

from typing import Any

import numpy as np

from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.special import erf as portable_erf
from portacnn.runtime import Kernel

# A function of dozens of passes is computed in pieces that stay in the cache.
_PIECE = 1 << 15


def erf(x: np.ndarray) -> Any:
    """Compute ``erf`` in pieces. Declines small arrays."""
    if x.size <= _PIECE:
        return NotImplemented
    xt = np.ascontiguousarray(batch_last(x))
    y = np.empty_like(xt)
    flat, out = xt.reshape(-1), y.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        out[start : start + _PIECE] = portable_erf.forward(flat[start : start + _PIECE])
    return batch_first(y)


KERNELS = {"erf": Kernel(erf)}
