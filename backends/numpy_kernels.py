"""NumPy's own versions of ops where the portable one is slow there. Same results, to the bit.

``np.where`` and ``np.copyto(where=...)`` branch on every element: on masks as random as a gradient's they take some eight times as
long as arithmetic on the mask does. Multiplying by the mask would make NaN of 0 * inf, so the mask is spread over all bits of
the number instead and taken with ``&``.
"""

from math import prod
from typing import Any

import numpy as np

from portacnn.ops.dropout import LAST_SHIFT, ROUNDS, WORD
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.special import erf as portable_erf
from portacnn.ops.update import clip_factor, decayed, global_norm
from portacnn.ops.windows import Tap, Windows
from portacnn.runtime import Kernel

_BITS = {4: np.int32, 8: np.int64}  # integers as wide as the float


def _keep_where(mask: np.ndarray, values: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """``values`` where ``mask``, else 0, of float32 or float64; written into ``out`` where there is one."""
    bits = _BITS[values.dtype.itemsize]
    every_bit = np.negative(mask.view(np.int8))  # True -> -1, all bits set
    return np.bitwise_and(values.view(bits), every_bit, out=None if out is None else out.view(bits)).view(values.dtype)


# --- convolution ----------------------------------------------------------------------------------------------------
#
# Columns for a few output rows at a time: as many as fit into the cache next to the matrix product that reads them. All of
# them at once would go out to memory and come back, and a product with few rows over that many columns is bound by just that.
#
# Notation as in ops/conv.py: C in-channels, O out-channels, T taps, N batch, S/OUT the spatial axes in/out.

TILE_BYTES = 1 << 20


def _tiles(x: np.ndarray, windows: Windows) -> list[Windows]:
    """The windows in parts of a few output rows."""
    row = x.shape[0] * prod(windows.kernel) * prod(windows.out[1:]) * x.shape[-1] * x.itemsize
    rows = max(1, TILE_BYTES // max(row, 1))
    out = windows.out[0]
    return [windows.part(first, min(first + rows, out)) for first in range(0, out, rows)]


def _fill(columns: np.ndarray, x: np.ndarray, tile: Windows) -> np.ndarray:
    """Lay the columns (C*T, OUT*N) of one tile out in the buffer."""
    shape = (x.shape[0], prod(tile.kernel), *tile.out, x.shape[-1])
    columns = columns[: prod(shape)].reshape(shape)
    if not tile.covers:
        columns[...] = 0
    for tap in tile.taps:
        columns[:, tap.index][tap.reaches] = x[tap.reads]
    return columns.reshape(shape[0] * shape[1], -1)


def _buffer(x: np.ndarray, tiles: list[Windows]) -> np.ndarray:
    """Room for the columns of the largest tile, the first."""
    return np.empty(x.shape[0] * prod(tiles[0].kernel) * prod(tiles[0].out) * x.shape[-1], dtype=x.dtype)


def conv(x: np.ndarray, weight: np.ndarray, bias: Any, windows: Windows, groups: int, *, keep: bool) -> Any:
    if groups != 1:
        return NotImplemented
    xt = np.ascontiguousarray(batch_last(x))  # (C, *S, N)
    tiles = _tiles(xt, windows)
    columns = _buffer(xt, tiles)
    matrix = weight.reshape(weight.shape[0], -1)  # (O, C*T)
    y = np.empty((weight.shape[0], *windows.out, xt.shape[-1]), dtype=x.dtype)
    flat = y.reshape(weight.shape[0], -1)  # (O, OUT*N)
    end = 0
    for tile in tiles:
        start, end = end, end + prod(tile.out) * xt.shape[-1]
        part = flat[:, start:end]
        np.matmul(matrix, _fill(columns, xt, tile), out=part)
        if bias is not None:
            part += bias[:, None]
    return batch_first(y), (xt, weight, bias is not None, windows) if keep else None


def conv_backward(dy: np.ndarray, saved: Any, *, need_dx: bool = True) -> Any:
    xt, weight, with_bias, windows = saved
    tiles = _tiles(xt, windows)
    columns = _buffer(xt, tiles)
    matrix = weight.reshape(weight.shape[0], -1)
    flat = np.ascontiguousarray(batch_last(dy)).reshape(weight.shape[0], -1)  # (O, OUT*N)
    dmatrix = np.zeros_like(matrix)
    dx = np.zeros_like(xt) if need_dx else None
    end = 0
    for tile in tiles:
        start, end = end, end + prod(tile.out) * xt.shape[-1]
        part = flat[:, start:end]
        dmatrix += part @ _fill(columns, xt, tile).T
        if dx is not None:
            dcolumns = (matrix.T @ part).reshape(xt.shape[0], prod(tile.kernel), *tile.out, xt.shape[-1])
            for tap in tile.taps:
                dx[tap.reads] += dcolumns[:, tap.index][tap.reaches]
    return (
        None if dx is None else batch_first(dx),
        dmatrix.reshape(weight.shape),
        flat.sum(axis=1) if with_bias else None,
    )


# --- activation and pooling -----------------------------------------------------------------------------------------


def relu(x: np.ndarray, *, keep: bool = True) -> Any:
    if x.dtype.itemsize not in _BITS:
        return NotImplemented
    y = np.maximum(x, 0.0)
    return y, y if keep else None


def relu_backward(dy: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _keep_where(y > 0, dy)


def max_pool(x: np.ndarray, windows: Windows, *, keep: bool) -> Any:
    if x.dtype.itemsize not in _BITS or prod(windows.kernel) > 127:
        return NotImplemented
    xt = np.ascontiguousarray(batch_last(x))  # (C, *S, N)
    shape, taps = (xt.shape[0], *windows.out, xt.shape[-1]), list(reversed(windows.taps))
    winner = np.zeros(shape, dtype=np.int8) if keep else None  # the tap whose input y is, as _number has it
    if winner is not None and windows.covers:
        winner += _number(taps[0], windows)
    y = xt[taps.pop(0).reads].copy() if windows.covers else np.full(shape, -np.inf, dtype=x.dtype)
    for tap in taps:
        here, best = xt[tap.reads], y[tap.reaches]
        if winner is not None:
            won = np.less(here, best).view(np.int8)
            won -= 1  # 0 where less, every bit where not: of NaN too
            won &= _number(tap, windows)  # they rise as we go back: the largest belongs to the last that won, the first
            np.maximum(winner[tap.reaches], won, out=winner[tap.reaches])
        np.maximum(best, here, out=best)
    return batch_first(y), (xt.shape, winner, windows) if keep else None


def max_pool_backward(dy: np.ndarray, saved: Any) -> np.ndarray:
    shape, winner, windows = saved
    dy = batch_last(dy)
    apart = all(s >= d * (k - 1) + 1 for s, k, d in zip(windows.stride, windows.kernel, windows.dilation, strict=True))
    dx = np.zeros(shape, dtype=dy.dtype)
    for tap in windows.taps:
        won = winner[tap.reaches] == _number(tap, windows)
        if apart:  # each input is in one window at most: nothing to add to
            _keep_where(won, dy[tap.reaches], out=dx[tap.reads])
        else:
            dx[tap.reads] += _keep_where(won, dy[tap.reaches])
    return batch_first(dx)


def _number(tap: Tap, windows: Windows) -> np.int8:
    return np.int8(prod(windows.kernel) - tap.index)


# --- functions made of many passes ----------------------------------------------------------------------------------
#
# Functions made of dozens of passes go through an array in pieces that stay in the cache.
_PIECE = 1 << 15


def erf(x: np.ndarray) -> Any:
    if x.size <= _PIECE:
        return NotImplemented
    xt = np.ascontiguousarray(batch_last(x))
    y = np.empty_like(xt)
    flat, out = xt.reshape(-1), y.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        out[start : start + _PIECE] = portable_erf.forward(flat[start : start + _PIECE])
    return batch_first(y)


def kept(like: np.ndarray, length: int, first: np.ndarray, second: np.ndarray, threshold: int) -> Any:
    """The same hash in uint32, whose products are cut to 32 bits by themselves."""
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


# --- updates --------------------------------------------------------------------------------------------------------
#
# They write where the portable ones allocate, and a step that is not ok is not computed at all: reading ``ok`` costs
# nothing here.


def sgd_update(params: list[Any], grads: list[Any], *, lr: Any, weight_decay: float = 0.0, ok: Any = None) -> None:
    if ok is None or ok:
        for p, g in zip(params, grads, strict=True):
            p -= lr * decayed(p, g, weight_decay)


def momentum_update(
    params: list[Any],
    grads: list[Any],
    velocity: list[Any],
    *,
    lr: Any,
    momentum: float,
    dampening: float = 0.0,
    nesterov: bool = False,
    first: bool = False,
    weight_decay: float = 0.0,
    ok: Any = None,
) -> None:
    if ok is not None and not ok:
        return
    intake = 1.0 if first else 1.0 - dampening
    for p, g, v in zip(params, grads, velocity, strict=True):
        g = decayed(p, g, weight_decay)
        v *= momentum
        v += g if intake == 1.0 else intake * g
        p -= lr * (g + momentum * v if nesterov else v)


def adagrad_update(
    params: list[Any],
    grads: list[Any],
    square_sum: list[Any],
    *,
    lr: Any,
    eps: float,
    weight_decay: float = 0.0,
    ok: Any = None,
) -> None:
    if ok is not None and not ok:
        return
    for p, g, s in zip(params, grads, square_sum, strict=True):
        g = decayed(p, g, weight_decay)
        change = np.multiply(g, g, out=np.empty_like(p))
        s += change
        np.sqrt(s, out=change)
        change += eps
        np.divide(g, change, out=change)
        change *= lr
        p -= change


def rmsprop_update(
    params: list[Any],
    grads: list[Any],
    mean_square: list[Any],
    mean: list[Any] | None = None,
    velocity: list[Any] | None = None,
    *,
    lr: Any,
    alpha: float,
    eps: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    ok: Any = None,
) -> None:
    if ok is not None and not ok:
        return
    for i, (p, g, s) in enumerate(zip(params, grads, mean_square, strict=True)):
        g = decayed(p, g, weight_decay)
        change = np.multiply(g, g, out=np.empty_like(p))
        change *= 1.0 - alpha
        s *= alpha
        s += change
        if mean is None:
            np.sqrt(s, out=change)
        else:
            mean[i] *= alpha
            mean[i] += (1.0 - alpha) * g
            np.multiply(mean[i], mean[i], out=change)
            np.subtract(s, change, out=change)
            np.maximum(change, 0.0, out=change)
            np.sqrt(change, out=change)
        change += eps
        np.divide(g, change, out=change)
        if velocity is not None:
            velocity[i] *= momentum
            velocity[i] += change
            change[...] = velocity[i]
        change *= lr
        p -= change


def adam_update(
    params: list[Any],
    grads: list[Any],
    mean: list[Any],
    mean_square: list[Any],
    *,
    lr: Any,
    beta1: float,
    beta2: float,
    eps: float,
    step: Any,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    ok: Any = None,
) -> None:
    if ok is not None and not ok:
        return
    step_size = lr / (1.0 - beta1**step)
    spread = (1.0 - beta2**step) ** 0.5
    for p, g, m, v in zip(params, grads, mean, mean_square, strict=True):
        if decoupled and weight_decay:
            p *= 1.0 - lr * weight_decay
        elif weight_decay:
            g = decayed(p, g, weight_decay)
        m *= beta1
        m += (1.0 - beta1) * g
        change = np.multiply(g, g, out=np.empty_like(p))
        change *= 1.0 - beta2
        v *= beta2
        v += change
        np.sqrt(v, out=change)
        change /= spread
        change += eps
        np.divide(m, change, out=change)
        change *= step_size
        p -= change


def clip_by_global_norm(grads: list[Any], max_norm: Any) -> Any:
    norm = global_norm(grads)
    factor = clip_factor(norm, max_norm)
    if factor != 1.0:  # mostly it is 1, and looking costs nothing here (NaN is not 1 either)
        for g in grads:
            g *= factor
    return norm


KERNELS = {
    "conv": Kernel(conv, conv_backward),
    "relu": Kernel(relu, relu_backward),
    "erf": Kernel(erf),
    "kept": Kernel(kept),
    "max_pool": Kernel(max_pool, max_pool_backward),
    "sgd_update": Kernel(sgd_update),
    "momentum_update": Kernel(momentum_update),
    "adagrad_update": Kernel(adagrad_update),
    "rmsprop_update": Kernel(rmsprop_update),
    "adam_update": Kernel(adam_update),
    "clip_by_global_norm": Kernel(clip_by_global_norm),
}
