"""Convolution on NumPy, with ReLU and max pooling where they follow: columns for a few output rows at a time.

As many rows as fit into the cache next to the matrix product that reads them, and next to what becomes of its result: all columns at
once would go out to memory and come back, and a product with few rows over that many columns is bound by just that. So the room
that it takes does not grow with the image, the columns are laid out again on the way back, and bias, pooling and ReLU see
each tile while it is near. Tiles go to threads, in each of which BLAS has one.

Notation as in ops/conv.py: C in-channels, O out-channels, T taps, N batch, S/OUT the spatial axes in/out.
"""

import os
from functools import cache, lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

from portacnn.backends.numpy_pool import keep_where, pool_into, unpool_into
from portacnn.backends.threads import in_pieces, one_blas_thread, pieces
from portacnn.errors import ArgumentError
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import Windows
from portacnn.ops.workspace import empty, scratch

VARIABLE = "PORTACNN_TILE_KIB"
_PER_ELEMENT = 16  # multiply-adds that take about as long as one element of other loops


@cache
def tile_bytes() -> int:
    """Room for a thread's columns: ``PORTACNN_TILE_KIB``, or 512 KiB. Raises ArgumentError where it is no whole number above 0."""
    text = os.environ.get(VARIABLE, "").strip() or "512"
    if not (text.isdecimal() and int(text) > 0):
        raise ArgumentError(f"{VARIABLE} must be a whole number above 0 (KiB), got {text!r}")
    return int(text) << 10


class Tile(NamedTuple):
    """Some rows of outputs: ``rows`` of the first spatial axis, and the windows that are theirs."""

    rows: slice
    windows: Windows


@lru_cache(maxsize=1024)
def _tiles(windows: Windows, row_bytes: int, whole: int) -> list[Tile]:
    """The windows in parts of a few output rows, a multiple of ``whole`` in each but the last; one row takes ``row_bytes``."""
    rows = max(whole, tile_bytes() // max(row_bytes, 1) // whole * whole)
    ends = [(first, min(first + rows, windows.out[0])) for first in range(0, windows.out[0], rows)]
    return [Tile(slice(first, last), windows.part(first, last)) for first, last in ends]


def _fill(columns: np.ndarray, x: np.ndarray, windows: Windows) -> np.ndarray:
    """Lay the columns (C*T, OUT*N) of one tile out in the buffer."""
    shape = (x.shape[0], prod(windows.kernel), *windows.out, x.shape[-1])
    columns = columns[: prod(shape)].reshape(shape)
    if not windows.covers:
        columns[...] = 0
    for tap in windows.taps:
        columns[:, tap.index][tap.reaches] = x[tap.reads]
    return columns.reshape(shape[0] * shape[1], -1)


class _Job(NamedTuple):
    """One pass over all tiles: the tiles, some of them for each thread, and each thread's room for columns and for outputs."""

    tiles: list[Tile]
    shares: list[slice]
    columns: np.ndarray
    outputs: np.ndarray
    work: int

    def run(self, each: Any) -> None:
        """``each(thread, tiles)`` for every thread's share."""

        def share(some: slice) -> None:
            for i in range(some.start, some.stop):
                each(i, self.tiles[self.shares[i]])

        with one_blas_thread():
            in_pieces(share, len(self.shares), self.work)


def _job(x: np.ndarray, outputs: int, windows: Windows, whole: int) -> _Job:
    """x (C, *S, N) -> outputs (O, *OUT, N), or the way back."""
    n, depth = x.shape[-1], x.shape[0] * prod(windows.kernel)
    cells = prod(windows.out[1:]) * n
    tiles = _tiles(windows, depth * cells * x.itemsize, whole)
    work = outputs * depth * cells * windows.out[0] // _PER_ELEMENT
    shares = pieces(len(tiles), work)
    rows = tiles[0].windows.out[0]  # the first is the largest
    columns = scratch(np.empty, (len(shares), depth * rows * cells), x.dtype)
    return _Job(tiles, shares, columns, scratch(np.empty, (len(shares), outputs * rows * cells), x.dtype, 1), work)


class _Saved(NamedTuple):
    """What a forward keeps: the input (C, *S, N); after ReLU, the output or, where it was pooled, the taps that won."""

    x: np.ndarray
    weight: np.ndarray
    with_bias: bool
    windows: Windows
    y: np.ndarray | None
    pool: Windows | None
    winner: np.ndarray | None


def _pooled_rows(tile: Tile, pool: Windows) -> tuple[slice, Windows] | None:
    """The rows of the pooled output that are made of a tile's, and the pooling of the tile alone; None where there are none."""
    (kernel, *_), (stride, *_) = pool.kernel, pool.stride
    first = tile.rows.start // stride
    last = min((tile.rows.stop - kernel) // stride + 1, pool.out[0])
    if last <= first:
        return None
    size = (tile.rows.stop - tile.rows.start, *pool.size[1:])
    return slice(first, last), Windows.of(size, pool.kernel, pool.stride)


def pools_in_place(pool: Windows) -> bool:
    """Whether the windows neither overlap nor hang over the edge: then each row of them belongs to rows of its own."""
    return (
        pool.covers and max(pool.dilation) == 1 and all(s >= k for s, k in zip(pool.stride, pool.kernel, strict=True))
    )


def _forward(
    x: np.ndarray,
    weight: np.ndarray,
    bias: Any,
    windows: Windows,
    groups: int,
    pool: Windows | None,
    relu: bool,
    keep: bool,
) -> Any:
    if groups != 1 or x.dtype.itemsize not in (4, 8) or (pool is not None and not pools_in_place(pool)):
        return NotImplemented
    xt = np.ascontiguousarray(batch_last(x))  # (C, *S, N)
    o, n = weight.shape[0], xt.shape[-1]
    job = _job(xt, o, windows, 1 if pool is None else pool.stride[0])
    matrix = weight.reshape(o, -1)  # (O, C*T)
    shape = (o, *(windows.out if pool is None else pool.out), n)
    y = empty(np.empty, shape, x.dtype)
    winner = empty(np.empty, shape, np.dtype(np.int8)) if keep and pool is not None else None
    column = None if bias is None else bias.reshape(o, *(1,) * (len(shape) - 1))

    def each(thread: int, tiles: list[Tile]) -> None:
        for tile in tiles:
            columns = _fill(job.columns[thread], xt, tile.windows)
            out = job.outputs[thread][: o * columns.shape[1]].reshape(o, -1)
            np.matmul(matrix, columns, out=out)
            out = out.reshape(o, *tile.windows.out, n)
            rows = tile.rows
            if pool is not None:
                pooled = _pooled_rows(tile, pool)
                if pooled is None:
                    continue
                rows, own = pooled
                pool_into(out, y[:, rows], None if winner is None else winner[:, rows], own)
                out = y[:, rows]
            into = y[:, rows]
            if column is not None:
                out = np.add(out, column, out=into)
            if relu:
                np.maximum(out, 0.0, out=into)
            elif out is not into:
                into[...] = out
            if winner is not None:
                winner[:, rows] *= (into > 0).view(np.int8)

    job.run(each)
    saved = _Saved(xt, weight, bias is not None, windows, y if relu and pool is None else None, pool, winner)
    return batch_first(y), saved if keep else None


def conv(x: np.ndarray, weight: np.ndarray, bias: Any, windows: Windows, groups: int, *, keep: bool) -> Any:
    return _forward(x, weight, bias, windows, groups, None, False, keep)


def conv_relu(
    x: np.ndarray, weight: np.ndarray, bias: Any, windows: Windows, groups: int, pool: Windows | None, *, keep: bool
) -> Any:
    return _forward(x, weight, bias, windows, groups, pool, True, keep)


def conv_backward(dy: np.ndarray, saved: _Saved, *, need_dx: bool = True) -> Any:
    xt, weight, with_bias, windows, y, pool, winner = saved
    o, n = weight.shape[0], xt.shape[-1]
    dyt = batch_last(dy)
    plain = y is None and pool is None
    if plain:
        dyt = np.ascontiguousarray(dyt)
    job = _job(xt, o, windows, 1 if pool is None else pool.stride[0])
    whole = dyt if plain else empty(np.empty, (o, *windows.out, n), dy.dtype) if need_dx else None
    dmatrices = np.zeros((len(job.shares), o, prod(weight.shape[1:])), dtype=weight.dtype)
    dbiases = np.zeros((len(job.shares), o), dtype=weight.dtype)

    def each(thread: int, tiles: list[Tile]) -> None:
        for tile in tiles:
            shape = (o, *tile.windows.out, n)
            dz = whole[:, tile.rows] if whole is not None else job.outputs[thread][: prod(shape)].reshape(shape)
            if y is not None:
                keep_where(y[:, tile.rows] > 0, dyt[:, tile.rows], dz)
            elif pool is not None and winner is not None:
                pooled = _pooled_rows(tile, pool)
                if pooled is None:
                    dz[...] = 0
                    continue
                unpool_into(dyt[:, pooled[0]], winner[:, pooled[0]], dz, pooled[1])
            columns = _fill(job.columns[thread], xt, tile.windows)
            rows = dz.reshape(o, -1)
            dmatrices[thread] += rows @ columns.T
            if with_bias:
                dbiases[thread] += rows.sum(axis=1)

    job.run(each)
    dx = None
    if need_dx and whole is not None:
        dx = batch_first(_lead_back(whole, xt, weight, windows))
    return dx, dmatrices.sum(axis=0).reshape(weight.shape), dbiases.sum(axis=0) if with_bias else None


conv_relu_backward = conv_backward


def _lead_back(dz: np.ndarray, xt: np.ndarray, weight: np.ndarray, windows: Windows) -> np.ndarray:
    """The input's gradient (C, *S, N) from that of the output."""
    adjoint = _adjoint(windows)
    if adjoint is not None:  # a convolution with the kernel turned round: what it reads is only copied
        turned = np.flip(weight, axis=tuple(range(2, weight.ndim))).swapaxes(0, 1)
        dx, _ = _forward(batch_first(dz), np.ascontiguousarray(turned), None, adjoint, 1, None, False, False)
        return batch_last(dx)
    dx = empty(np.empty, xt.shape, xt.dtype)
    dx[...] = 0
    matrix = weight.reshape(weight.shape[0], -1)
    row = matrix.shape[1] * prod(windows.out[1:]) * xt.shape[-1] * xt.itemsize
    for tile in _tiles(windows, row, 1):
        part = dz[:, tile.rows].reshape(dz.shape[0], -1)
        dcolumns = (matrix.T @ part).reshape(xt.shape[0], prod(windows.kernel), *tile.windows.out, xt.shape[-1])
        for tap in tile.windows.taps:
            dx[tap.reads] += dcolumns[:, tap.index][tap.reaches]
    return dx


def _adjoint(windows: Windows) -> Windows | None:
    """The convolution that leads the gradient back, where it is a plain one: of stride 1, its padding not negative."""
    if max(windows.stride) > 1:
        return None
    pads = tuple(
        (d * (k - 1) - before, d * (k - 1) - after)
        for k, d, (before, after) in zip(windows.kernel, windows.dilation, windows.pads, strict=True)
    )
    if min(min(pair) for pair in pads) < 0:
        return None
    return Windows.of(windows.out, windows.kernel, 1, pads, windows.dilation)
