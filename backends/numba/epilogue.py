"""The epilogue of a convolution in one compiled pass (see ``numpy/epilogue.py``).

Notation: O out-channels, T outputs per channel.
"""

from typing import Any, NamedTuple

import numpy as np

from portacnn.backends.numba.compile import compiled, read
from portacnn.backends.numba.runs import finish_run
from portacnn.backends.numpy.epilogue import End, Epilogue, Start
from portacnn.ops.fused import ConvNorm


class Full(NamedTuple):
    """An ``Epilogue`` without None, as arguments for ``finish_run``."""

    scale: np.ndarray  # (O,)
    shift: np.ndarray  # (O,)
    residual: np.ndarray  # flat
    adds: bool
    low: Any
    high: Any

    @staticmethod
    def of(epilogue: Epilogue, channels: int, dtype: Any) -> "Full":
        scale, shift, residual, low, high = epilogue
        return Full(
            read(np.ones(channels, dtype) if scale is None else scale),
            read(np.zeros(channels, dtype) if shift is None else shift),
            read(_NOTHING[dtype] if residual is None else residual),
            residual is not None,
            dtype.type(-np.inf if low is None else low),
            dtype.type(np.inf if high is None else high),
        )


_NOTHING = {np.dtype(kind): np.empty(0, kind) for kind in ("float32", "float64")}


@compiled
def _finish(y, t, first, last, start, stop, scale, shift, residual, adds, low, high):
    for row in range(first, last):
        at = row * t + start
        finish_run(
            y, at, y, at, scale[row], shift[row], residual, at, adds, low, high, stop - start
        )


def bind(epilogue: Epilogue, weight: np.ndarray) -> End:
    """Return the epilogue as one compiled pass."""
    return _end(Full.of(epilogue, len(weight), weight.dtype))


def _end(full: Full) -> End:
    def end(y: np.ndarray, rows: slice, columns: slice) -> None:
        _finish(
            y.reshape(-1), y.shape[1], rows.start, rows.stop, columns.start, columns.stop, *full
        )

    return end


# --- repeated inference ---------------------------------------------------------------------------


@compiled
def _affine(mean, var, weight, bias, before, eps, scale, shift):
    """Write the scale and the shift of a batch norm after a convolution with bias ``before``."""
    for i in range(mean.size):
        scale[i] = weight[i] / np.sqrt(var[i] + eps)
        shift[i] = bias[i] + (before[i] - mean[i]) * scale[i]


def prepared(
    norm: ConvNorm | None, bias: Any, low: float | None, high: float | None, weight: np.ndarray
) -> Start | Any:
    """Return an epilogue whose arrays may change between calls; decline parameters that are not
    contiguous.
    """
    channels, dtype = len(weight), weight.dtype
    ones, zeros = np.ones(channels, dtype), np.zeros(channels, dtype)
    parts = norm or (zeros, ones, None, None, 0.0)
    given = [*parts[:4], bias]
    if any(part is not None and not part.flags.c_contiguous for part in given):
        return NotImplemented
    mean, var, factor, offset, before = (
        read(default if part is None else part)
        for part, default in zip(given, (zeros, ones, ones, zeros, zeros), strict=True)
    )
    eps = dtype.type(parts[4])
    scale, shift = np.ones(channels, dtype), np.zeros(channels, dtype)
    limits = Epilogue(scale, shift, None, low, high)

    def start(residual: np.ndarray | None) -> End:
        _affine(mean, var, factor, offset, before, eps, scale, shift)
        return _end(Full.of(limits._replace(residual=residual), channels, dtype))

    return start
