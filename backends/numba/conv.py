"""Convolution on NumPy arrays with the help of numba: which algorithm computes which case.

- 1x1 kernels: one matrix product (``numpy/pointwise.py``) with a compiled epilogue.
- 3x3 kernels with stride 1 and enough channels: Winograd's algorithm (``winograd.py``).
- Other kernels over one or two axes: compiled, direct, without columns (``direct.py``). Gradients
  of many weights and of strided convolutions: products with deep blocks of columns
  (``numpy/columns.py``).

Notation as in ops/conv.py: C in-channels, O out-channels, N batch, T taps.
"""

from typing import Any

import numpy as np

from portacnn.backends.numba import direct, winograd
from portacnn.backends.numba.direct import NO_POOL, NO_TAPS, Saved
from portacnn.backends.numba.epilogue import Full, bind, prepared
from portacnn.backends.numpy import columns, pointwise
from portacnn.backends.numpy import conv as native
from portacnn.backends.numpy.epilogue import Epilogue
from portacnn.backends.numpy.memory import empty
from portacnn.ops.fused import ConvNorm
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import Plane, Windows
from portacnn.runtime import Kernel

_MANY = 1 << 16  # weights; their gradients are then products of deep blocks
_SAMPLES = 8  # with fewer, runs are short, and products of columns are faster
_WORTH = 1 << 12  # C * O from which Winograd's algorithm makes up for a pooling pass of its own


def _run(
    x: np.ndarray,
    weight: np.ndarray,
    bias: Any,
    windows: Windows,
    groups: int,
    pool: Windows | None,
    relu: bool,
    keep: bool,
) -> Any:
    pools = NO_POOL if pool is None else direct.pools_of(pool)
    if groups != 1 or direct.declines(x, weight, windows) or pools is None:
        return NotImplemented
    if pool is None and pointwise.suits(windows):
        return pointwise.conv(x, weight, bias, windows, bind, relu=relu, keep=keep)
    p = Plane.of(windows, x.shape[1], weight.shape[0], x.shape[0])
    if not direct.fits(p, x.itemsize, pools[4]):
        return NotImplemented
    xt, weight = np.ascontiguousarray(batch_last(x)), np.ascontiguousarray(weight)
    epilogue = Epilogue(shift=bias, low=0.0 if relu else None)
    winner = None
    if pool is None:
        y = _computed(xt, weight, windows, p, epilogue)
    else:
        y = empty((p.o, *pool.out, p.n), x.dtype)
        winner = empty(y.shape, np.dtype(np.int8)) if keep else None
        if winograd.suits(p) and p.c * p.o >= _WORTH:
            z = _computed(xt, weight, windows, p, epilogue)
            direct.pooled(z, p, pools, y, winner)
        else:
            direct.forward(xt, weight, bias, p, y, Epilogue(), pools, winner)
    if not keep:
        return batch_first(y), None
    above = y if relu and pool is None else direct.none(y)
    won = NO_TAPS if winner is None else winner
    return batch_first(y), Saved(xt, weight, bias is not None, windows, p, pools, above, won)


def _computed(
    xt: np.ndarray, weight: np.ndarray, windows: Windows, p: Plane, epilogue: Epilogue
) -> np.ndarray:
    """Return y (O, *OUT, N) after the epilogue, by the algorithm that is fastest."""
    if not winograd.suits(p) and p.n < _SAMPLES <= p.c:
        return native.by_columns(xt, weight, windows, epilogue, bind)[0]
    y = empty((p.o, *windows.out, p.n), xt.dtype)
    if winograd.suits(p):
        full = Full.of(epilogue, p.o, y.dtype)
        winograd.convolve(xt, winograd.factors(weight), y, (p.top, p.left), full)
    else:
        direct.forward(xt, weight, None, p, y, epilogue)
    return y


def conv(
    x: np.ndarray, weight: np.ndarray, bias: Any, windows: Windows, groups: int, *, keep: bool
) -> Any:
    return _run(x, weight, bias, windows, groups, None, False, keep)


def conv_relu(
    x: np.ndarray,
    weight: np.ndarray,
    bias: Any,
    windows: Windows,
    groups: int,
    pool: Windows | None,
    *,
    keep: bool,
) -> Any:
    return _run(x, weight, bias, windows, groups, pool, True, keep)


def conv_unit(
    parts: list[np.ndarray],
    weight: np.ndarray,
    bias: Any,
    windows: Windows,
    groups: int,
    norm: ConvNorm | None,
    low: float | None,
    high: float | None,
    pool: Windows | None,
) -> Any:
    """Compute ``conv_unit``."""
    x, *residual = parts
    if pool is not None:
        return native.pooled_unit(
            parts, weight, bias, windows, groups, norm, low, high, pool, conv_unit, conv_relu
        )
    if groups != 1 or direct.declines(x, weight, windows):
        return NotImplemented
    added = np.ascontiguousarray(batch_last(residual[0])) if residual else None
    epilogue = Epilogue.of(norm, bias, added, low, high)
    if pointwise.suits(windows):
        return batch_first(pointwise.unit(x, weight, windows, epilogue, bind)[0])
    p = Plane.of(windows, x.shape[1], weight.shape[0], x.shape[0])
    if not direct.fits(p, x.itemsize, 1):
        return NotImplemented
    xt, weight = np.ascontiguousarray(batch_last(x)), np.ascontiguousarray(weight)
    return batch_first(_computed(xt, weight, windows, p, epilogue))


def conv_backward(
    dy: np.ndarray,
    saved: Any,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> Any:
    if isinstance(saved, pointwise.Saved):
        return pointwise.conv_backward(
            dy, saved, need_dx=need_dx, need_dweight=need_dweight, need_dbias=need_dbias
        )
    x, weight, with_bias, windows, p, *_ = saved
    need_dbias = with_bias and need_dbias
    dyt = np.ascontiguousarray(batch_last(dy))
    fast, fast_weights = winograd.suits(p), winograd.suits(p, gradient=True)
    deep = weight.size > _MANY
    by_columns = deep or max(windows.stride) > 1
    dz = dyt
    if fast or fast_weights or deep or (need_dx and by_columns):
        dz = direct.before(dyt, saved)
    dx = dweight = dbias = None
    if fast_weights or deep:
        if need_dbias:
            dbias = dz.reshape(p.o, -1).sum(axis=1)
        if need_dweight and fast_weights:
            dweight = winograd.weight_gradient(x, dz, (p.top, p.left))
        elif need_dweight:
            dweight = columns.weight_gradient(dz, columns.padded(x, windows), windows)
    elif need_dweight or need_dbias:
        dweight, dbias = direct.weight_gradient(dyt, saved)
    if need_dx and fast:
        dx = empty(x.shape, x.dtype)
        turned = winograd.factors(weight).turned()
        full = Full.of(Epilogue(), p.c, x.dtype)
        winograd.convolve(dz, turned, dx, (2 - p.top, 2 - p.left), full)
    elif need_dx and by_columns:
        dx = columns.input_gradient(dz, weight, windows)
    elif need_dx:
        dx = direct.input_gradient(dyt, saved)
    return (
        None if dx is None else batch_first(dx),
        dweight.reshape(weight.shape) if need_dweight and dweight is not None else None,
        dbias if need_dbias else None,
    )


conv_relu_backward = conv_backward


def prepare_conv(
    x: np.ndarray, weight: np.ndarray, bias: Any, windows: Windows, groups: int
) -> Any:
    return direct.prepared(x, weight, bias, windows, None, False) if groups == 1 else NotImplemented


def prepare_conv_relu(
    x: np.ndarray,
    weight: np.ndarray,
    bias: Any,
    windows: Windows,
    groups: int,
    pool: Windows | None,
) -> Any:
    return direct.prepared(x, weight, bias, windows, pool, True) if groups == 1 else NotImplemented


def prepare_conv_unit(
    parts: list[np.ndarray],
    weight: np.ndarray,
    bias: Any,
    windows: Windows,
    groups: int,
    norm: ConvNorm | None,
    low: float | None,
    high: float | None,
    pool: Windows | None,
) -> Any:
    return native.prepare_unit(parts, weight, bias, windows, groups, norm, low, high, pool, _OWN)


_OWN = native.Preparing(prepare_conv, prepare_conv_relu, conv_unit, prepared)


KERNELS = {
    "conv": Kernel(conv, conv_backward, prepare_conv),
    "conv_relu": Kernel(conv_relu, conv_relu_backward, prepare_conv_relu),
    "conv_unit": Kernel(conv_unit, None, prepare_conv_unit),
}
