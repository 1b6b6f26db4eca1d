"""Transposed convolution on NumPy: the gradients of a convolution in blocks of columns, used as
forward and backward passes (see ops/conv_transpose.py).

Notation as there: C in-channels, O out-channels, S/OUT the spatial axes in/out. ``windows`` is the
geometry of the convolution from OUT to S, whose weight (C, O, *K) has C outputs.
"""

from typing import Any, NamedTuple

import numpy as np

from portacnn.backends.numpy import pointwise
from portacnn.backends.numpy.columns import input_gradient, padded, weight_gradient
from portacnn.backends.numpy.conv import by_columns
from portacnn.backends.numpy.epilogue import Epilogue, bind
from portacnn.backends.threads import in_pieces
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import Windows
from portacnn.runtime import Kernel


class _Saved(NamedTuple):
    """What a forward pass stores: the input (C, *S, N)."""

    x: np.ndarray
    weight: np.ndarray
    with_bias: bool
    windows: Windows


def conv_transpose(
    x: np.ndarray, weight: np.ndarray, bias: Any, windows: Windows, groups: int, *, keep: bool
) -> Any:
    """Compute ``conv_transpose``. Declines groups, sparse windows and empty arrays."""
    if groups != 1 or x.dtype.itemsize not in (4, 8) or windows.sparse:
        return NotImplemented
    if not x.size or not weight.size:
        return NotImplemented
    xt, weight = np.ascontiguousarray(batch_last(x)), np.ascontiguousarray(weight)
    y = input_gradient(xt, weight, windows)
    if bias is not None:
        flat = y.reshape(len(y), -1)
        end, everything = bind(Epilogue(shift=bias), flat), slice(0, flat.shape[1])
        in_pieces(lambda s: end(flat, s, everything), len(flat), flat.size)
    return batch_first(y), _Saved(xt, weight, bias is not None, windows) if keep else None


def conv_transpose_backward(
    dy: np.ndarray,
    saved: _Saved,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> Any:
    x, weight, with_bias, windows = saved
    dyt = np.ascontiguousarray(batch_last(dy))
    dx = dweight = dbias = None
    if need_dx and pointwise.suits(windows):
        dx, _ = pointwise.unit(batch_first(dyt), weight, windows, Epilogue(), bind)
    elif need_dx:
        dx, _ = by_columns(dyt, weight, windows, Epilogue(), bind)
    if need_dweight:
        dweight = weight_gradient(x, padded(dyt, windows), windows).reshape(weight.shape)
    if with_bias and need_dbias:
        dbias = dyt.reshape(len(dyt), -1).sum(axis=1)
    return None if dx is None else batch_first(dx), dweight, dbias


KERNELS = {"conv_transpose": Kernel(conv_transpose, conv_transpose_backward)}
