"""Convolution on NumPy: columns for a few output rows at a time.

As many rows as fit into the cache next to the matrix product that reads them. All columns at once would go out to memory and
come back, and a product with few rows over that many columns is bound by just that.

Notation as in ops/conv.py: C in-channels, O out-channels, T taps, N batch, S/OUT the spatial axes in/out.
"""

from math import prod
from typing import Any

import numpy as np

from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import Windows
from portacnn.ops.workspace import empty

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
    y = empty(np.empty, (weight.shape[0], *windows.out, xt.shape[-1]), x.dtype)
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
    dx = None
    if need_dx:
        dx = empty(np.empty, xt.shape, xt.dtype)
        dx[...] = 0
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
