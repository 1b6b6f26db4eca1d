"""ReLU and max pooling on NumPy: mask arithmetic, several cores, reused memory. Results are equal
to the portable ops bit by bit.

``np.where`` and ``np.copyto(where=...)`` branch on every element. On masks as random as those of a
gradient they take about eight times as long as arithmetic on the mask. Multiplying by the mask
would turn 0 * inf into NaN, so the mask is extended to all bits of the value and applied with
``&``.
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
    """Write ``values`` where ``mask`` is true, else 0, to out (float32 or float64). Overwrites the
    mask.
    """
    bits = BITS[values.dtype.itemsize]
    every_bit = np.negative(mask.view(np.int8), out=mask.view(np.int8))  # True -> -1, all bits set
    np.bitwise_and(values.view(bits), every_bit, out=out.view(bits))


def clear_where(mask: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
    """Write 0 where ``mask`` is true, else ``values``, to out (float32 or float64). Overwrites the
    mask."""
    bits = BITS[values.dtype.itemsize]
    own = mask.view(np.int8)
    every_bit = np.subtract(own, 1, out=own)  # False -> -1, all bits set
    np.bitwise_and(values.view(bits), every_bit, out=out.view(bits))


def in_memory_order(x: np.ndarray) -> list[int]:
    """Return the axes of x from the largest stride to the smallest."""
    return sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))


def empty_like(x: np.ndarray) -> np.ndarray:
    """Return an uninitialized array with the memory layout of x."""
    order = in_memory_order(x)
    return empty(tuple(x.shape[axis] for axis in order), x.dtype).transpose(np.argsort(order))


def zeros_for(x: np.ndarray) -> np.ndarray:
    """Return zeros for ``np.maximum``, which is three times as fast on two arrays as on an array
    and a scalar.

    They have as many of the last axes as hold at most 65536 elements, and broadcast over the
    others.
    """
    shape = x.shape
    while prod(shape) > _ZEROS:
        shape = shape[1:]
    return _zeros(shape, x.dtype)


@lru_cache(maxsize=64)
def _zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return a cached view: the cache is keyed by shape and must not allocate memory per shape."""
    return _all_zeros(dtype)[: prod(shape)].reshape(shape)


@cache
def _all_zeros(dtype: Any) -> np.ndarray:
    return np.zeros(_ZEROS, dtype=dtype)


def relu(x: np.ndarray, *, keep: bool = True) -> Any:
    """Compute ``relu``. Declines dtypes other than float32 and float64, and 0-dimensional
    arrays.
    """
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
    """Compute dx = dy where y > 0, else 0."""
    dx = empty_like(y)
    axis = in_memory_order(y)[0]
    rows_dy, rows_y, rows_dx = (np.moveaxis(array, axis, 0) for array in (dy, y, dx))
    in_pieces(lambda s: clear_where(rows_y[s] <= 0, rows_dy[s], rows_dx[s]), y.shape[axis], y.size)
    return dx


def max_pool(x: np.ndarray, windows: Windows, *, keep: bool) -> Any:
    """Compute ``max_pool``. Declines kernels of more than 127 taps and sparse windows."""
    if x.dtype.itemsize not in BITS or not numbered(windows) or windows.sparse:
        return NotImplemented
    xt = np.ascontiguousarray(batch_last(x))  # (C, *S, N)
    y = empty((xt.shape[0], *windows.out, xt.shape[-1]), x.dtype)
    winners = empty_winners(y.shape, windows) if keep else None
    in_pieces(
        lambda s: pool_into(
            xt[s], y[s], None if winners is None else [w[s] for w in winners], windows
        ),
        xt.shape[0],
        max(xt.size, y.size),
    )
    return batch_first(y), (xt.shape, winners, windows) if keep else None


def max_pool_backward(dy: np.ndarray, saved: Any) -> np.ndarray:
    """Compute the gradient of ``max_pool`` from the stored winners."""
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
    """Return whether the windows are adjacent pairs along each axis. Then pooling runs axis by
    axis, the last one first.
    """
    return (
        windows.covers
        and set(windows.kernel) == set(windows.stride) == {2}
        and max(windows.dilation) == 1
    )


def numbered(windows: Windows) -> bool:
    """Return whether the taps can be numbered in int8, which all CPU kernels of max pooling use:
    see ``_number``.
    """
    return prod(windows.kernel) <= 127


def pools_in_place(pool: Windows) -> bool:
    """Return whether max pooling can be fused: the taps are ``numbered``, and windows neither
    overlap nor extend beyond the edge.

    Then each row of windows has its own rows of the input.
    """
    apart = max(pool.dilation) == 1 and all(
        s >= k for s, k in zip(pool.stride, pool.kernel, strict=True)
    )
    return apart and numbered(pool) and pool.covers


def empty_winners(shape: tuple[int, ...], windows: Windows) -> list[np.ndarray]:
    """Allocate what the backward pass needs, for an output (C, *OUT, N).

    For windows in pairs, one mask per axis: whether the second of the pair is the maximum.
    Otherwise the tap of the maximum, numbered by ``_number``.
    """
    if not in_pairs(windows):
        return [empty(shape, np.dtype(np.int8))]
    c, *out, n = shape
    return [
        empty((c, *(2 * o for o in out[:axis]), *out[axis:], n), np.dtype(np.bool_))
        for axis in range(len(out))
    ]


def rows_of_winners(winners: list[np.ndarray], rows: slice, windows: Windows) -> list[np.ndarray]:
    """Return the winners of some rows of the output."""
    if not in_pairs(windows):
        return [winners[0][:, rows]]
    first, *rest = winners
    return [first[:, rows], *(mask[:, 2 * rows.start : 2 * rows.stop] for mask in rest)]


def _pairs(x: np.ndarray, axis: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and the second elements of the pairs along a spatial axis."""
    before = (slice(None),) * (axis + 1)
    return x[(*before, slice(0, 2 * count, 2))], x[(*before, slice(1, 2 * count, 2))]


def pool_into(
    xt: np.ndarray, y: np.ndarray, winners: list[np.ndarray] | None, windows: Windows
) -> None:
    """Write the maxima and their winners for some channels (C, *S, N).

    The first of equal maxima in reading order wins, and the last of several NaN. NaN is rare, so it
    is looked for in the maxima only.
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
    """Pool pairs axis by axis. ``wins(second, first, out=...)`` marks where the second of a pair is
    larger.
    """
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
            won -= 1  # 0 where less, else all bits set (also for NaN)
            # numbers rise as taps fall, so the maximum is the last winner, the first tap
            won &= _number(tap, windows)
            np.maximum(winner[tap.reaches], won, out=winner[tap.reaches])
        np.maximum(best, here, out=best)
    if winner is not None and _has_nan(y):
        for tap in windows.taps:
            np.copyto(winner[tap.reaches], _number(tap, windows), where=np.isnan(xt[tap.reads]))


def unpool_into(
    dy: np.ndarray, winners: list[np.ndarray], dx: np.ndarray, windows: Windows
) -> None:
    """Write each gradient to the position of its maximum, for some channels."""
    tiled = windows.covers and all(
        s == k and o * s == n
        for s, k, o, n in zip(
            windows.stride, windows.kernel, windows.out, windows.size, strict=True
        )
    )
    if not tiled:  # some inputs are in no window, so their gradient is 0
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
        # where the first of the pair is the maximum
        np.bitwise_xor(given.view(bits), second.view(bits), out=first.view(bits))
        given = into


def _unpool_taps(dy: np.ndarray, winner: np.ndarray, dx: np.ndarray, windows: Windows) -> None:
    apart = all(
        s >= d * (k - 1) + 1
        for s, k, d in zip(windows.stride, windows.kernel, windows.dilation, strict=True)
    )
    for tap in windows.taps:
        won = winner[tap.reaches] == _number(tap, windows)
        if apart:  # each input is in at most one window
            keep_where(won, dy[tap.reaches], dx[tap.reads])
        else:
            part = np.empty_like(dy[tap.reaches])
            keep_where(won, dy[tap.reaches], part)
            dx[tap.reads] += part


def _number(tap: Tap, windows: Windows) -> np.int8:
    return np.int8(prod(windows.kernel) - tap.index)


KERNELS = {"max_pool": Kernel(max_pool, max_pool_backward), "relu": Kernel(relu, relu_backward)}
