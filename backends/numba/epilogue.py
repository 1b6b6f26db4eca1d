"""The epilogue of a convolution in one compiled pass (see ``numpy/epilogue.py``).

Notation: O out-channels, T outputs per channel.
"""

from typing import Any, NamedTuple

import numpy as np

from portacnn.backends.numba.compile import compiled, read
from portacnn.backends.numba.runs import finish_run
from portacnn.backends.numpy.epilogue import Epilogue


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


def finish(y: np.ndarray, rows: slice, columns: slice, epilogue: Epilogue) -> None:
    """Apply the epilogue to ``y[rows, columns]`` in place."""
    full = Full.of(epilogue, len(y), y.dtype)
    _finish(
        y.reshape(-1), y.shape[1], rows.start, rows.stop, columns.start, columns.stop, *full
    )  # fmt: skip
