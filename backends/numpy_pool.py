"""ReLU and max pooling on NumPy: arithmetic on masks, both cores, memory that is used again. Same results, to the bit.

``np.where`` and ``np.copyto(where=...)`` branch on every element: on masks as random as a gradient's they take some eight times as
long as arithmetic on the mask does. Multiplying by the mask would make NaN of 0 * inf, so the mask is spread over all bits of
the number instead and taken with ``&``.
"""

from math import prod
from typing import Any

import numpy as np

from portacnn.backends.threads import in_pieces
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import Tap, Windows
from portacnn.ops.workspace import empty

_BITS = {4: np.int32, 8: np.int64}  # integers as wide as the float


def keep_where(mask: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
    """out = ``values`` where ``mask``, else 0; of float32 or float64. The mask is used up."""
    bits = _BITS[values.dtype.itemsize]
    every_bit = np.negative(mask.view(np.int8), out=mask.view(np.int8))  # True -> -1, all bits set
    np.bitwise_and(values.view(bits), every_bit, out=out.view(bits))


def _in_memory_order(x: np.ndarray) -> list[int]:
    """The axes of x from the one with the longest steps to the one with the shortest."""
    return sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))


def _empty_like(x: np.ndarray) -> np.ndarray:
    """Room for a result that lies in memory as x does."""
    order = _in_memory_order(x)
    return empty(np.empty, tuple(x.shape[axis] for axis in order), x.dtype).transpose(np.argsort(order))


def relu(x: np.ndarray, *, keep: bool = True) -> Any:
    if x.dtype.itemsize not in _BITS or x.ndim == 0:
        return NotImplemented
    y = _empty_like(x)
    axis = _in_memory_order(x)[0]
    rows_x, rows_y = np.moveaxis(x, axis, 0), np.moveaxis(y, axis, 0)
    in_pieces(lambda s: np.maximum(rows_x[s], 0.0, out=rows_y[s]), x.shape[axis], x.size)
    return y, y if keep else None


def relu_backward(dy: np.ndarray, y: np.ndarray) -> np.ndarray:
    dx = _empty_like(y)
    axis = _in_memory_order(y)[0]
    rows_dy, rows_y, rows_dx = (np.moveaxis(array, axis, 0) for array in (dy, y, dx))
    in_pieces(lambda s: keep_where(rows_y[s] > 0, rows_dy[s], rows_dx[s]), y.shape[axis], y.size)
    return dx


def max_pool(x: np.ndarray, windows: Windows, *, keep: bool) -> Any:
    if x.dtype.itemsize not in _BITS or prod(windows.kernel) > 127:
        return NotImplemented
    xt = np.ascontiguousarray(batch_last(x))  # (C, *S, N)
    shape = (xt.shape[0], *windows.out, xt.shape[-1])
    y = empty(np.empty, shape, x.dtype)
    winner = empty(np.empty, shape, np.int8) if keep else None  # the tap whose input y is, as _number has it
    in_pieces(
        lambda s: pool_into(xt[s], y[s], None if winner is None else winner[s], windows),
        xt.shape[0],
        max(xt.size, y.size),
    )
    return batch_first(y), (xt.shape, winner, windows) if keep else None


def pool_into(xt: np.ndarray, y: np.ndarray, winner: np.ndarray | None, windows: Windows) -> None:
    """Some of the channels: write the maxima and their taps."""
    taps = list(reversed(windows.taps))
    if windows.covers:
        first = taps.pop(0)
        y[...] = xt[first.reads]
        if winner is not None:
            winner[...] = _number(first, windows)
    else:
        y[...] = -np.inf
        if winner is not None:
            winner[...] = 0
    for tap in taps:
        here, best = xt[tap.reads], y[tap.reaches]
        if winner is not None:
            won = np.less(here, best).view(np.int8)
            won -= 1  # 0 where less, every bit where not: of NaN too
            won &= _number(tap, windows)  # they rise as we go back: the largest belongs to the last that won, the first
            np.maximum(winner[tap.reaches], won, out=winner[tap.reaches])
        np.maximum(best, here, out=best)


def max_pool_backward(dy: np.ndarray, saved: Any) -> np.ndarray:
    shape, winner, windows = saved
    dyt = batch_last(dy)
    dx = empty(np.empty, shape, dy.dtype)
    in_pieces(lambda s: unpool_into(dyt[s], winner[s], dx[s], windows), shape[0], max(dx.size, dy.size))
    return batch_first(dx)


def unpool_into(dy: np.ndarray, winner: np.ndarray, dx: np.ndarray, windows: Windows) -> None:
    """Some of the channels: write each gradient where its maximum was."""
    apart = all(s >= d * (k - 1) + 1 for s, k, d in zip(windows.stride, windows.kernel, windows.dilation, strict=True))
    tiled = windows.covers and all(
        s == k and o * s == n
        for s, k, o, n in zip(windows.stride, windows.kernel, windows.out, windows.size, strict=True)
    )
    if not tiled:  # some inputs are in no window
        dx[...] = 0
    for tap in windows.taps:
        won = winner[tap.reaches] == _number(tap, windows)
        if apart:  # in one window at most: nothing to add to
            keep_where(won, dy[tap.reaches], dx[tap.reads])
        else:
            part = np.empty_like(dy[tap.reaches])
            keep_where(won, dy[tap.reaches], part)
            dx[tap.reads] += part


def _number(tap: Tap, windows: Windows) -> np.int8:
    return np.int8(prod(windows.kernel) - tap.index)
