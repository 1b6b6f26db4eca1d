"""ReLU and max pooling on NumPy: arithmetic on masks, both cores, memory that is used again. Same
results, to the bit.

``np.where`` and ``np.copyto(where=...)`` branch on every element: on masks as random as a
gradient's they take some eight times as long as arithmetic on the mask does. Multiplying by the
mask would make NaN of 0 * inf, so the mask is spread over all bits of the number instead and taken
with ``&``.
"""

from functools import cache, lru_cache
from math import prod
from typing import Any

import numpy as np

from portacnn.backends.numpy.memory import empty
from portacnn.backends.threads import in_pieces
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import Tap, Windows
from portacnn.runtime import Kernel

_ZEROS = 1 << 16
BITS = {4: np.int32, 8: np.int64}  # integers as wide as the float


def keep_where(mask: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
    """out = ``values`` where ``mask``, else 0; of float32 or float64. The mask is used up."""
    bits = BITS[values.dtype.itemsize]
    every_bit = np.negative(mask.view(np.int8), out=mask.view(np.int8))  # True -> -1, all bits set
    np.bitwise_and(values.view(bits), every_bit, out=out.view(bits))


def clear_where(mask: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
    """out = 0 where ``mask``, else ``values``; of float32 or float64. The mask is overwritten."""
    bits = BITS[values.dtype.itemsize]
    own = mask.view(np.int8)
    every_bit = np.subtract(own, 1, out=own)  # False -> -1, all bits set
    np.bitwise_and(values.view(bits), every_bit, out=out.view(bits))


def in_memory_order(x: np.ndarray) -> list[int]:
    """The axes of x from the one with the longest steps to the one with the shortest."""
    return sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))


def empty_like(x: np.ndarray) -> np.ndarray:
    """Room for a result that lies in memory as x does."""
    order = in_memory_order(x)
    return empty(tuple(x.shape[axis] for axis in order), x.dtype).transpose(np.argsort(order))


def zeros_for(x: np.ndarray) -> np.ndarray:
    """Zeros to take the maximum with: of two arrays it takes NumPy a third of the time of an array
    and a number.

    As many of the last axes as are 65536 numbers or less; they broadcast.
    """
    shape = x.shape
    while prod(shape) > _ZEROS:
        shape = shape[1:]
    return _zeros(shape, x.dtype)


@lru_cache(maxsize=64)
def _zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A view: what is kept by shape must not take memory by shape."""
    return _all_zeros(dtype)[: prod(shape)].reshape(shape)


@cache
def _all_zeros(dtype: Any) -> np.ndarray:
    return np.zeros(_ZEROS, dtype=dtype)


def relu(x: np.ndarray, *, keep: bool = True) -> Any:
    if x.dtype.itemsize not in BITS or x.ndim == 0:
        return NotImplemented
    y = empty_like(x)
    axis = in_memory_order(x)[0]
    rows_x, rows_y = np.moveaxis(x, axis, 0), np.moveaxis(y, axis, 0)
    in_pieces(
        lambda s: np.maximum(rows_x[s], zeros_for(rows_x[s]), out=rows_y[s]), x.shape[axis], x.size
    )
    return y, y if keep else None


def relu_backward(dy: np.ndarray, y: np.ndarray) -> np.ndarray:
    dx = empty_like(y)
    axis = in_memory_order(y)[0]
    rows_dy, rows_y, rows_dx = (np.moveaxis(array, axis, 0) for array in (dy, y, dx))
    in_pieces(lambda s: clear_where(rows_y[s] <= 0, rows_dy[s], rows_dx[s]), y.shape[axis], y.size)
    return dx


def max_pool(x: np.ndarray, windows: Windows, *, keep: bool) -> Any:
    if x.dtype.itemsize not in BITS or not numbered(windows) or windows.sparse:
        return NotImplemented
    xt = np.ascontiguousarray(batch_last(x))  # (C, *S, N)
    y = empty((xt.shape[0], *windows.out, xt.shape[-1]), x.dtype)
    winners = room_for_winners(y.shape, windows) if keep else None
    in_pieces(
        lambda s: pool_into(
            xt[s], y[s], None if winners is None else [w[s] for w in winners], windows
        ),
        xt.shape[0],
        max(xt.size, y.size),
    )
    return batch_first(y), (xt.shape, winners, windows) if keep else None


def max_pool_backward(dy: np.ndarray, saved: Any) -> np.ndarray:
    shape, winners, windows = saved
    dyt = batch_last(dy)
    dx = empty(shape, dy.dtype)
    in_pieces(
        lambda s: unpool_into(dyt[s], [w[s] for w in winners], dx[s], windows),
        shape[0],
        max(dx.size, dy.size),
    )
    return batch_first(dx)


def in_pairs(windows: Windows) -> bool:
    """Whether the windows are pairs along each axis, side by side: then they are pooled axis by
    axis, the last one first."""
    return (
        windows.covers
        and set(windows.kernel) == set(windows.stride) == {2}
        and max(windows.dilation) == 1
    )


def numbered(windows: Windows) -> bool:
    """Whether the taps can be numbered in int8, as all kernels of max pooling on the CPU do: see
    ``_number``."""
    return prod(windows.kernel) <= 127


def pools_in_place(pool: Windows) -> bool:
    """Whether max pooling can be fused: its taps are ``numbered``, and its windows neither overlap
    nor hang over the edge.

    Then each row of them belongs to rows of its own.
    """
    apart = max(pool.dilation) == 1 and all(
        s >= k for s, k in zip(pool.stride, pool.kernel, strict=True)
    )
    return apart and numbered(pool) and pool.covers


def room_for_winners(shape: tuple[int, ...], windows: Windows) -> list[np.ndarray]:
    """Room for what tells the way back, for an output (C, *OUT, N).

    For windows in pairs, a mask for each axis: whether the second of the pair won. Else the tap
    that won, as ``_number`` has it.
    """
    if not in_pairs(windows):
        return [empty(shape, np.dtype(np.int8))]
    c, *out, n = shape
    return [
        empty((c, *(2 * o for o in out[:axis]), *out[axis:], n), np.dtype(np.bool_))
        for axis in range(len(out))
    ]


def rows_of_winners(winners: list[np.ndarray], rows: slice, windows: Windows) -> list[np.ndarray]:
    """Those of some rows of the output."""
    if not in_pairs(windows):
        return [winners[0][:, rows]]
    first, *rest = winners
    return [first[:, rows], *(mask[:, 2 * rows.start : 2 * rows.stop] for mask in rest)]


def _pairs(x: np.ndarray, axis: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first and the second numbers of the pairs along a spatial axis."""
    before = (slice(None),) * (axis + 1)
    return x[(*before, slice(0, 2 * count, 2))], x[(*before, slice(1, 2 * count, 2))]


def pool_into(
    xt: np.ndarray, y: np.ndarray, winners: list[np.ndarray] | None, windows: Windows
) -> None:
    """Some of the channels, (C, *S, N): write the maxima and whose they are.

    Of equals the first in reading order wins, of several NaN the last. Few have any, so NaN is
    looked for in the maxima.
    """
    if not in_pairs(windows):
        _pool_taps(xt, y, None if winners is None else winners[0], windows)
        return
    _pool_pairs(xt, y, winners, windows, np.greater)
    if winners is not None and _has_nan(y):
        _pool_pairs(xt, y, winners, windows, _greater_or_nan)


def _has_nan(y: np.ndarray) -> bool:
    return y.size > 0 and bool(np.isnan(y.max()))


def _greater_or_nan(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    np.logical_or(a > b, np.isnan(a), out=out)


def _pool_pairs(
    xt: np.ndarray, y: np.ndarray, winners: list[np.ndarray] | None, windows: Windows, wins: Any
) -> None:
    """``wins(second, first, out=...)`` tells where the second of a pair is the larger one."""
    best = xt[(slice(None), *(slice(0, 2 * o) for o in windows.out))]
    for axis in range(len(windows.out) - 1, -1, -1):
        first, second = _pairs(best, axis, windows.out[axis])
        if winners is not None:
            wins(second, first, out=winners[axis])
        best = np.maximum(first, second, out=None if axis else y)


def _pool_taps(xt: np.ndarray, y: np.ndarray, winner: np.ndarray | None, windows: Windows) -> None:
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
            # they rise as we go back: the largest belongs to the last that won, the first
            won &= _number(tap, windows)
            np.maximum(winner[tap.reaches], won, out=winner[tap.reaches])
        np.maximum(best, here, out=best)
    if winner is not None and _has_nan(y):
        for tap in windows.taps:
            np.copyto(winner[tap.reaches], _number(tap, windows), where=np.isnan(xt[tap.reads]))


def unpool_into(
    dy: np.ndarray, winners: list[np.ndarray], dx: np.ndarray, windows: Windows
) -> None:
    """Some of the channels: write each gradient where its maximum was."""
    tiled = windows.covers and all(
        s == k and o * s == n
        for s, k, o, n in zip(
            windows.stride, windows.kernel, windows.out, windows.size, strict=True
        )
    )
    if not tiled:  # some inputs are in no window
        dx[...] = 0
    if not in_pairs(windows):
        _unpool_taps(dy, winners[0], dx, windows)
        return
    given, bits = dy, BITS[dy.dtype.itemsize]
    for axis, count in enumerate(windows.out):
        if axis + 1 < len(windows.out):
            into = np.empty(
                (*given.shape[: axis + 1], 2 * count, *given.shape[axis + 2 :]), dtype=dy.dtype
            )
        else:
            into = dx[(slice(None), *(slice(0, 2 * o) for o in windows.out))]
        first, second = _pairs(into, axis, count)
        keep_where(winners[axis].copy(), given, second)
        # where the second lost
        np.bitwise_xor(given.view(bits), second.view(bits), out=first.view(bits))
        given = into


def _unpool_taps(dy: np.ndarray, winner: np.ndarray, dx: np.ndarray, windows: Windows) -> None:
    apart = all(
        s >= d * (k - 1) + 1
        for s, k, d in zip(windows.stride, windows.kernel, windows.dilation, strict=True)
    )
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


KERNELS = {"max_pool": Kernel(max_pool, max_pool_backward), "relu": Kernel(relu, relu_backward)}
