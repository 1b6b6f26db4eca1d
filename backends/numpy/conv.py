"""Convolution on NumPy, optionally with ReLU and max pooling: columns are built for a few output
rows at a time.

A tile has as many rows as fit into the cache together with the matrix product that reads them. The
columns of the whole image would be written to memory and read again, and a product with few rows
over that many columns is limited by memory bandwidth. With tiles, the memory needed does not grow
with the image, the backward pass builds the columns again, and bias, pooling and ReLU process each
tile in the cache. Tiles are distributed over threads, and BLAS uses one thread in each.

Notation as in ops/conv.py: C in-channels, O out-channels, T taps, N batch, S/OUT the spatial axes
in/out.
"""

import os
from collections.abc import Callable
from functools import cache, lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

from portacnn.backends.numpy.memory import empty, reserve, temporaries
from portacnn.backends.numpy.pool import (
    clear_where,
    empty_winners,
    pool_into,
    pools_in_place,
    rows_of_winners,
    unpool_into,
    zeros_for,
)
from portacnn.backends.threads import (
    PER_ELEMENT,
    in_pieces,
    on_one_blas_thread,
    pieces,
    products_in_pieces,
)
from portacnn.errors import ArgumentError
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import Windows
from portacnn.runtime import Kernel

VARIABLE = "PORTACNN_TILE_KIB"
# bytes of all columns of a prepared convolution; more would not stay in the cache
_MOST_COLUMNS = 4 << 20
# _SMALL: elements of a small result; _FEW: multiply-adds up to which BLAS uses its kernels for
# small matrices
_SMALL, _FEW = 1024, 1 << 19


@cache
def tile_bytes() -> int:
    """Return the bytes of a thread's columns: ``PORTACNN_TILE_KIB`` KiB, default 512. Raises
    ArgumentError if it is not a positive integer.
    """
    text = os.environ.get(VARIABLE, "").strip() or "512"
    if not (text.isdecimal() and int(text) > 0):
        raise ArgumentError(f"{VARIABLE} must be a whole number above 0 (KiB), got {text!r}")
    return int(text) << 10


def _padded(xt: np.ndarray, windows: Windows) -> np.ndarray:
    """Return xt (C, *S, N) with zeros around it, or xt itself without padding. Cells that no window
    reads are left out.
    """
    if not any(before or after for before, after in windows.pads):
        return xt
    shape = (len(xt), *windows.extent, xt.shape[-1])
    padded = empty(shape, xt.dtype)
    inside: list[slice] = [slice(None)]
    read: list[slice] = [slice(None)]
    for axis, ((before, _), n) in enumerate(zip(windows.pads, windows.size, strict=True), start=1):
        stop = min(before + n, shape[axis])
        padded[(*inside, slice(0, before))] = 0
        padded[(*inside, slice(stop, None))] = 0
        inside.append(slice(before, stop))
        read.append(slice(0, stop - before))
    padded[tuple(inside)] = xt[tuple(read)]
    return padded


def _columns(padded: np.ndarray, windows: Windows) -> np.ndarray:
    """Return all columns (C, *K, *OUT, N) as a view."""
    c, *axes, n = padded.strides
    taps = [stride * d for stride, d in zip(axes, windows.dilation, strict=True)]
    outs = [stride * s for stride, s in zip(axes, windows.stride, strict=True)]
    shape = (len(padded), *windows.kernel, *windows.out, padded.shape[-1])
    return np.lib.stride_tricks.as_strided(padded, shape, (c, *taps, *outs, n), writeable=False)


@lru_cache(maxsize=1024)
def _tiles(rows: int, row_bytes: int, whole: int) -> list[slice]:
    """Split the output rows into tiles, each but the last a multiple of ``whole`` rows; one row
    takes ``row_bytes``.
    """
    size = max(whole, tile_bytes() // max(row_bytes, 1) // whole * whole)
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


def _parts(rows: int, depth: int, cells: int, n: int) -> int:
    """Return the number of parts into which a product of few rows and small depth over ``cells``
    columns is cut.

    BLAS kernels for small matrices are up to twice as fast on such shapes as those for large ones.
    """
    if rows * depth > _SMALL:
        return 1
    most = _FEW // (rows * depth)
    return next(
        (
            parts
            for parts in range(1, cells // n)
            if cells % (parts * n) == 0 and cells // parts <= most
        ),
        1,
    )


def _product(matrix: np.ndarray, columns: np.ndarray, out: np.ndarray, n: int) -> None:
    """Compute out (O, cells) = matrix (O, depth) @ columns (depth, cells)."""
    parts = _parts(*matrix.shape, columns.shape[1], n)
    cut = columns.reshape(len(columns), parts, -1).swapaxes(0, 1)
    np.matmul(matrix, cut, out=out.reshape(len(out), parts, -1).swapaxes(0, 1))


def _outer_product(rows: np.ndarray, columns: np.ndarray, n: int) -> np.ndarray:
    """Return rows (O, cells) @ columns.T (cells, depth). BLAS is fastest with the longer side
    first.
    """
    parts = _parts(len(rows), len(columns), columns.shape[1], n)
    rows, columns = (
        array.reshape(len(array), parts, -1).swapaxes(0, 1) for array in (rows, columns)
    )
    if rows.shape[1] >= columns.shape[1]:
        return np.matmul(rows, columns.swapaxes(1, 2)).sum(axis=0)
    return np.matmul(columns, rows.swapaxes(1, 2)).sum(axis=0).T


class _Job(NamedTuple):
    """One pass over all tiles: the columns, the row ranges of the tiles, the tiles of each thread,
    and each thread's buffers.
    """

    columns: np.ndarray  # (C, *K, *OUT, N)
    tiles: list[slice]
    shares: list[slice]
    laid_out: np.ndarray
    outputs: np.ndarray
    work: int

    @staticmethod
    def of(padded: np.ndarray, outputs: int, windows: Windows, whole: int) -> "_Job":
        """Prepare a pass from padded (C, *P, N) to outputs (O, *OUT, N), or its backward pass.
        Tiles have a multiple of ``whole`` rows.
        """
        depth, cells = len(padded) * prod(windows.kernel), prod(windows.out[1:]) * padded.shape[-1]
        tiles = _tiles(windows.out[0], depth * cells * padded.itemsize, whole)
        work = outputs * depth * cells * windows.out[0] // PER_ELEMENT
        shares = pieces(len(tiles), work)
        rows = tiles[0].stop
        laid_out = empty((len(shares), depth * rows * cells), padded.dtype)
        buffer = empty((len(shares), outputs * rows * cells), padded.dtype)
        return _Job(_columns(padded, windows), tiles, shares, laid_out, buffer, work)

    def run(self, each: Callable[[int, slice], None]) -> None:
        """Call ``each(thread, rows)`` for every tile."""

        def share(some: slice) -> None:
            for thread in range(some.start, some.stop):
                for rows in self.tiles[self.shares[thread]]:
                    each(thread, rows)

        on_one_blas_thread(in_pieces, share, len(self.shares), self.work)

    def lay_out(self, thread: int, rows: slice) -> np.ndarray:
        """Return the columns (C*T, OUT*N) of a tile, contiguous."""
        axes = (self.columns.ndim - 2) // 2
        view = self.columns[(slice(None),) * (axes + 1) + (rows,)]
        columns = self.laid_out[thread][: view.size].reshape(view.shape)
        columns[...] = view
        return columns.reshape(prod(view.shape[: axes + 1]), -1)

    def output(self, thread: int, shape: tuple[int, ...]) -> np.ndarray:
        """Return the output buffer of a tile."""
        return self.outputs[thread][: prod(shape)].reshape(shape)


class _Saved(NamedTuple):
    """What a forward pass stores: the padded input; after ReLU, the output; after pooling, the
    position of each maximum.
    """

    padded: np.ndarray
    weight: np.ndarray
    with_bias: bool
    windows: Windows
    y: np.ndarray | None
    pool: Windows | None
    winners: list[np.ndarray] | None


def _pooled_rows(rows: slice, pool: Windows) -> tuple[slice, Windows] | None:
    """Return the pooled rows that a tile produces and the pooling of the tile alone, or None if it
    produces none.
    """
    (kernel, *_), (stride, *_) = pool.kernel, pool.stride
    first = rows.start // stride
    last = min((rows.stop - kernel) // stride + 1, pool.out[0])
    if last <= first:
        return None
    size = (rows.stop - rows.start, *pool.size[1:])
    return slice(first, last), Windows.of(size, pool.kernel, pool.stride)


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
    if groups != 1 or x.dtype.itemsize not in (4, 8) or not x.size or windows.sparse:
        return NotImplemented
    if pool is not None and not pools_in_place(pool):
        return NotImplemented
    padded = _padded(np.ascontiguousarray(batch_last(x)), windows)
    o, n = len(weight), x.shape[0]
    matrix = weight.reshape(o, -1)  # (O, C*T)
    shape = (o, *(windows.out if pool is None else pool.out), n)
    # allocated before the job's buffers, which are freed and would leave a hole before the output
    y = empty(shape, x.dtype)
    winners = empty_winners(shape, pool) if keep and pool is not None else None
    job = _Job.of(padded, o, windows, 1 if pool is None else pool.stride[0])
    column = None if bias is None else bias.reshape(o, *(1,) * (len(shape) - 1))

    def each(thread: int, rows: slice) -> None:
        out = job.output(thread, (o, rows.stop - rows.start, *windows.out[1:], n))
        _product(matrix, job.lay_out(thread, rows), out.reshape(o, -1), n)
        if pool is not None:
            pooled = _pooled_rows(rows, pool)
            if pooled is None:
                return
            rows, own = pooled
            pool_into(out, y[:, rows], winners and rows_of_winners(winners, rows, pool), own)
            out = y[:, rows]
        into = y[:, rows]
        if column is not None:
            out = np.add(out, column, out=into)
        if relu:
            np.maximum(out, zeros_for(into), out=into)
        elif out is not into:
            into[...] = out

    job.run(each)
    saved = _Saved(padded, weight, bias is not None, windows, y if relu else None, pool, winners)
    return batch_first(y), saved if keep else None


def conv(
    x: np.ndarray, weight: np.ndarray, bias: Any, windows: Windows, groups: int, *, keep: bool
) -> Any:
    return _forward(x, weight, bias, windows, groups, None, False, keep)


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
    return _forward(x, weight, bias, windows, groups, pool, True, keep)


def conv_backward(
    dy: np.ndarray,
    saved: _Saved,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> Any:
    padded, weight, with_bias, windows, y, pool, winners = saved
    need_dbias = need_dbias and with_bias
    o, n = len(weight), padded.shape[-1]
    dyt = batch_last(dy)
    if y is None:
        dyt = np.ascontiguousarray(dyt)
    whole = dyt if y is None else empty((o, *windows.out, n), dy.dtype) if need_dx else None
    job = _Job.of(padded, o, windows, 1 if pool is None else pool.stride[0])
    dmatrices = np.zeros((len(job.shares), o, prod(weight.shape[1:])), dtype=weight.dtype)
    dbiases = np.zeros((len(job.shares), o), dtype=weight.dtype)

    def each(thread: int, rows: slice) -> None:
        shape = (o, rows.stop - rows.start, *windows.out[1:], n)
        dz = job.output(thread, shape) if whole is None else whole[:, rows]
        given = dz
        if y is not None and (pool is None or winners is None):
            clear_where(y[:, rows] <= 0, dyt[:, rows], dz)
        elif y is not None:
            pooled = _pooled_rows(rows, pool)
            if pooled is None:
                dz[...] = 0
                return
            given = np.empty_like(y[:, pooled[0]])  # has the sum of dz, in fewer elements
            clear_where(y[:, pooled[0]] <= 0, dyt[:, pooled[0]], given)
            unpool_into(given, rows_of_winners(winners, pooled[0], pool), dz, pooled[1])
        if need_dweight:
            dmatrices[thread] += _outer_product(dz.reshape(o, -1), job.lay_out(thread, rows), n)
        if need_dbias:
            dbiases[thread] += given.reshape(o, -1).sum(axis=1)

    if need_dweight or need_dbias or (need_dx and y is not None):  # the last fills ``whole``
        job.run(each)
    dx = None
    if need_dx and whole is not None:
        dx = batch_first(_input_gradient(whole, weight, windows))
    return (
        dx,
        dmatrices.sum(axis=0).reshape(weight.shape) if need_dweight else None,
        dbiases.sum(axis=0) if need_dbias else None,
    )


conv_relu_backward = conv_backward


def _input_gradient(dz: np.ndarray, weight: np.ndarray, windows: Windows) -> np.ndarray:
    """Return the input's gradient (C, *S, N) for the output's gradient (O, *OUT, N).

    Tap by tap: a product over the output channels, added to the inputs that the tap read. The
    channels are distributed over the threads.
    """
    channels, taps, n = weight.shape[1], prod(windows.kernel), dz.shape[-1]
    dx = empty((channels, *windows.size, n), dz.dtype)
    # (T, C, O)
    factors = np.ascontiguousarray(weight.reshape(len(weight), channels, taps).transpose(2, 1, 0))
    cells = prod(windows.out[1:]) * n
    work = dz.size * channels * taps
    shares = pieces(channels, work // PER_ELEMENT)
    most = max(share.stop - share.start for share in shares)
    tiles = _tiles(windows.out[0], most * cells * dz.itemsize, 1)
    buffer = empty((len(shares), most * tiles[0].stop * cells), dz.dtype)

    def share(i: int) -> None:
        own = dx[shares[i]]
        own[...] = 0
        for rows in tiles:
            part = dz[:, rows].reshape(len(dz), -1)
            here = windows.part(rows.start, rows.stop)
            back = buffer[i, : len(own) * part.shape[1]].reshape(len(own), -1)
            for tap in here.taps:
                _product(factors[tap.index, shares[i]], part, back, n)
                own[tap.reads] += back.reshape(len(own), *here.out, n)[tap.reaches]

    products_in_pieces(lambda s: [share(i) for i in range(s.start, s.stop)], len(shares), work)
    return dx


# --- repeated inference with few samples ----------------------------------------------------------


def _prepared(
    x: np.ndarray,
    weight: np.ndarray,
    bias: Any,
    windows: Windows,
    groups: int,
    pool: Windows | None,
    relu: bool,
) -> Any:
    """Do everything in ``_forward`` that does not depend on the values of x once: allocate arrays
    and create views.

    With few samples the contiguous runs are short. An output row is therefore computed with the
    length of a padded input row, so that all rows form one run. The elements beyond the end of each
    row are undefined and not read.
    """
    if groups != 1 or not x.size or max(windows.stride) > 1 or windows.sparse:
        return NotImplemented
    if pool is not None and not pools_in_place(pool):
        return NotImplemented
    o, n, (*before, last) = len(weight), x.shape[0], windows.extent
    matrix = weight.reshape(o, -1)
    # bytes of all columns
    most = x.shape[1] * prod(windows.kernel) * prod(before) * last * n * x.itemsize
    if most > _MOST_COLUMNS or not np.may_share_memory(matrix, weight):
        return NotImplemented  # a copy of the weights would not see later updates
    padded = reserve((x.shape[1], *before, last, n), x.dtype, zeros=True)
    starts = [pad for pad, _ in windows.pads]
    sizes = [
        min(size, e - pad)
        for size, e, pad in zip(windows.size, (*before, last), starts, strict=True)
    ]
    inside = padded[(slice(None), *(slice(a, a + b) for a, b in zip(starts, sizes, strict=True)))]
    read = (slice(None), *(slice(0, size) for size in sizes))
    steps = [stride // padded.itemsize for stride in padded.strides[1:-1]]
    run = sum((out - 1) * step for out, step in zip(windows.out, steps, strict=True)) + n
    taps = [step * d * padded.itemsize for step, d in zip(steps, windows.dilation, strict=True)]
    strides = (padded.strides[0], *taps, padded.itemsize)
    view = np.lib.stride_tricks.as_strided(
        padded, (len(padded), *windows.kernel, run), strides, writeable=False
    )
    rows = (o, windows.out[0], *before[1:], last, n) if before else (o, windows.out[0], n)
    columns, buffer = temporaries(view.shape, rows, dtype=x.dtype)
    flat = columns.reshape(-1, run)
    product = buffer.reshape(o, -1)[:, :run]
    out = buffer[(slice(None), *(slice(0, size) for size in windows.out))]
    y = reserve((o, *(windows.out if pool is None else pool.out), n), x.dtype)
    result, order = batch_first(y), (*range(1, x.ndim), 0)
    column = None if bias is None else bias.reshape(o, *(1,) * (y.ndim - 1))
    matmul, add, maximum, zeros = np.matmul, np.add, np.maximum, zeros_for(y)

    def once(x: np.ndarray) -> np.ndarray:
        inside[...] = x.transpose(order)[read]
        columns[...] = view
        on_one_blas_thread(matmul, matrix, flat, out=product)
        source = out
        if pool is not None:
            pool_into(out, y, None, pool)
            source = y
        if column is not None:
            source = add(source, column, out=y)
        if relu:
            maximum(source, zeros, out=y)
        elif source is not y:
            y[...] = source
        return result

    return once


def prepare_conv(
    x: np.ndarray, weight: np.ndarray, bias: Any, windows: Windows, groups: int
) -> Any:
    return _prepared(x, weight, bias, windows, groups, None, False)


def prepare_conv_relu(
    x: np.ndarray,
    weight: np.ndarray,
    bias: Any,
    windows: Windows,
    groups: int,
    pool: Windows | None,
) -> Any:
    return _prepared(x, weight, bias, windows, groups, pool, True)


KERNELS = {
    "conv": Kernel(conv, conv_backward, prepare_conv),
    "conv_relu": Kernel(conv_relu, conv_relu_backward, prepare_conv_relu),
}
