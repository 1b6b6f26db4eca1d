"""What follows a convolution on the same elements: scale, shift, a sum, and limits.

It runs on each block of outputs directly after the block's product, in the cache.

Notation: O out-channels, T outputs per channel (OUT times N).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from portacnn.backends.numpy.pool import zeros_for
from portacnn.ops.fused import ConvNorm


class Epilogue(NamedTuple):
    """y -> min(max(y * scale + shift + residual, low), high). None leaves a part out."""

    scale: np.ndarray | None = None  # (O,)
    shift: np.ndarray | None = None  # (O,)
    residual: np.ndarray | None = None  # (O, T)
    low: float | None = None
    high: float | None = None

    @staticmethod
    def of(
        norm: ConvNorm | None,
        bias: np.ndarray | None,
        residual: np.ndarray | None,
        low: float | None,
        high: float | None,
    ) -> "Epilogue":
        """Return the epilogue of ``conv_unit``. ``residual`` has the memory layout of the output,
        (O, *OUT, N).
        """
        flat = None if residual is None else residual.reshape(len(residual), -1)
        if norm is None:
            return Epilogue(None, bias, flat, low, high)
        return Epilogue(*norm.after(bias), flat, low, high)

    @property
    def is_empty(self) -> bool:
        return all(part is None for part in self)


End = Callable[[np.ndarray, slice, slice], None]
"""(y (O, T), rows, columns): apply an epilogue to a block of y in place."""
Bind = Callable[[Epilogue, np.ndarray], End]
"""(epilogue, weight): what one pass does once for all blocks, which depends on the kernel set."""
Start = Callable[[np.ndarray | None], End]
"""(residual): what a prepared function does once in each call."""


def bind(epilogue: Epilogue, weight: np.ndarray) -> End:
    """Return the epilogue as NumPy's functions."""
    scale, shift, residual, low, high = epilogue

    def end(y: np.ndarray, rows: slice, columns: slice) -> None:
        block = y[rows, columns]
        if scale is not None:
            np.multiply(block, scale[rows, None], out=block)
        if shift is not None:
            np.add(block, shift[rows, None], out=block)
        if residual is not None:
            np.add(block, residual[rows, columns], out=block)
        if low is not None:
            np.maximum(block, _limit(low, block), out=block)
        if high is not None:
            np.minimum(block, _limit(high, block), out=block)

    return end


def _limit(value: float, like: np.ndarray) -> Any:
    if value == 0.0:
        return zeros_for(like)
    return np.full(like.shape[-1:], value, like.dtype)


def prepared(
    norm: ConvNorm | None, bias: Any, low: float | None, high: float | None, weight: np.ndarray
) -> Start:
    """Return an epilogue whose arrays may change between calls."""
    return lambda residual: bind(Epilogue.of(norm, bias, residual, low, high), weight)
