"""The columns of a convolution, and the two gradients as products with them.

``view`` returns the columns without a copy. A block of columns is copied so that a matrix product
can read it; blocks are as large as the cache.

Notation as in ops/conv.py: C in-channels, O out-channels, T taps, N batch, S/OUT the spatial axes
in/out.
"""

import os
from collections.abc import Callable
from functools import cache, lru_cache
from math import prod

import numpy as np

from portacnn.backends.numpy.memory import empty
from portacnn.backends.threads import PER_ELEMENT, in_parts, in_pieces, on_one_blas_thread, pieces
from portacnn.errors import ArgumentError
from portacnn.ops.windows import Windows

VARIABLE = "PORTACNN_TILE_KIB"
_DEPTH = 2048  # columns of a block of the weight's gradient, the inner dimension of its product
_ROWS = 128  # rows of a block of the input's gradient
# _SMALL: elements of a small result; _FEW: multiply-adds up to which BLAS uses its kernels for
# small matrices
_SMALL, _FEW = 1024, 1 << 19
_LIGHT = 1 << 15  # weights whose gradient is added up quickly, and whose input gradient tap by tap


@cache
def tile_bytes() -> int:
    """Return the bytes of a thread's columns: ``PORTACNN_TILE_KIB`` KiB, default 512. Raises
    ArgumentError if it is not a positive integer.
    """
    text = os.environ.get(VARIABLE, "").strip() or "512"
    if not (text.isdecimal() and int(text) > 0):
        raise ArgumentError(f"{VARIABLE} must be a whole number above 0 (KiB), got {text!r}")
    return int(text) << 10


def padded(xt: np.ndarray, windows: Windows) -> np.ndarray:
    """Return xt (C, *S, N) with zeros around it, or xt itself without padding. Cells that no window
    reads are left out.
    """
    if not any(before or after for before, after in windows.pads):
        return xt
    shape = (len(xt), *windows.extent, xt.shape[-1])
    result = empty(shape, xt.dtype)
    inside: list[slice] = [slice(None)]
    read: list[slice] = [slice(None)]
    for axis, ((before, _), n) in enumerate(zip(windows.pads, windows.size, strict=True), start=1):
        stop = min(before + n, shape[axis])
        result[(*inside, slice(0, before))] = 0
        result[(*inside, slice(stop, None))] = 0
        inside.append(slice(before, stop))
        read.append(slice(0, stop - before))
    result[tuple(inside)] = xt[tuple(read)]
    return result


def view(around: np.ndarray, windows: Windows) -> np.ndarray:
    """Return all columns (C, *K, *OUT, N) of a padded input (C, *P, N) as a view."""
    c, *axes, n = around.strides
    taps = [stride * d for stride, d in zip(axes, windows.dilation, strict=True)]
    outs = [stride * s for stride, s in zip(axes, windows.stride, strict=True)]
    shape = (len(around), *windows.kernel, *windows.out, around.shape[-1])
    return np.lib.stride_tricks.as_strided(around, shape, (c, *taps, *outs, n), writeable=False)


@lru_cache(maxsize=1024)
def tiles(rows: int, row_bytes: int, whole: int, least: int = 1) -> list[slice]:
    """Split the output rows into tiles, each but the last a multiple of ``whole`` rows and at least
    ``least`` rows; one row takes ``row_bytes``.
    """
    size = max(least, tile_bytes() // max(row_bytes, 1))
    size = max(whole, -(-size // whole) * whole if size == least else size // whole * whole)
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


def whole(around: np.ndarray, windows: Windows) -> np.ndarray:
    """Return all columns (C*T, OUT*N) of a padded input, contiguous."""
    source = view(around, windows)
    columns = empty(source.shape, around.dtype)
    in_pieces(lambda s: np.copyto(columns[s], source[s]), len(columns), columns.size)
    return columns.reshape(len(source) * prod(windows.kernel), -1)


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


def product(matrix: np.ndarray, columns: np.ndarray, out: np.ndarray, n: int) -> None:
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


def _runs(count: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def weight_gradient(dz: np.ndarray, around: np.ndarray, windows: Windows) -> np.ndarray:
    """Return dweight (O, C*T) for dz (O, *OUT, N) and the padded input (C, *P, N).

    A block has the columns of some channels for some output rows. Of few weights, it has as many
    rows as fit into the cache; of many, as many as make the product deep, since each block is added
    to the result. Threads take channels, or rows if there are few channels.
    """
    o, c, taps = len(dz), len(around), prod(windows.kernel)
    cells = prod(windows.out[1:]) * dz.shape[-1]
    light = o * c * taps <= _LIGHT
    if light:
        lines = tiles(windows.out[0], c * taps * cells * dz.itemsize, 1)[0].stop
    else:
        lines = min(windows.out[0], -(-_DEPTH // cells))
    block = c if light else max(1, 2 * tile_bytes() // (taps * lines * cells * dz.itemsize))
    columns, axes = view(around, windows), len(windows.kernel)
    work = dz.size * c * taps // PER_ELEMENT
    rows = _runs(windows.out[0], lines)
    shares = pieces(max(c, len(rows)), work)
    by_channel = not light and (c >= 4 * len(shares) or len(rows) < len(shares))
    shares = pieces(c if by_channel else len(rows), work)
    totals = empty((1 if by_channel else len(shares), o, c * taps), dz.dtype)
    most = max(share.stop - share.start for share in shares) if by_channel else c
    # allocated in the calling thread, where the workspace is
    buffers = empty((len(shares), min(block, most) * taps * lines * cells), dz.dtype)

    def share(i: int) -> None:
        own = shares[i] if by_channel else slice(0, c)
        size = min(block, own.stop - own.start)
        for channels in (
            slice(own.start + s.start, own.start + s.stop)
            for s in _runs(own.stop - own.start, size)
        ):
            total = totals[0 if by_channel else i][:, channels.start * taps : channels.stop * taps]
            for number, run in enumerate(rows if by_channel else rows[shares[i]]):
                source = columns[(channels, *(slice(None),) * axes, run)]
                laid_out = buffers[i][: source.size].reshape(source.shape)
                laid_out[...] = source
                matrix = laid_out.reshape(total.shape[1], -1)
                part = dz[:, run].reshape(o, -1)
                if light and number:
                    total += _outer_product(part, matrix, dz.shape[-1])
                elif light:
                    total[...] = _outer_product(part, matrix, dz.shape[-1])
                elif number:
                    total += part @ matrix.T
                else:
                    np.matmul(part, matrix.T, out=total)

    on_one_blas_thread(in_parts, share, len(shares), work)
    return totals[0] if len(totals) == 1 else totals.sum(axis=0)


Scatter = Callable[[np.ndarray, np.ndarray, Windows, int], None]
"""(columns (C, T, rows, *OUT[1:], N), dx (C, *S, N), windows, first row): add columns to the
inputs that they were read from."""


def scatter(columns: np.ndarray, dx: np.ndarray, windows: Windows, first: int) -> None:
    """Add the gradients of columns for output rows from ``first`` on to dx."""
    here = windows.part(first, first + columns.shape[2])
    for tap in here.taps:
        dx[tap.reads] += columns[:, tap.index][tap.reaches]


def input_gradient(
    dz: np.ndarray, weight: np.ndarray, windows: Windows, add: Scatter = scatter
) -> np.ndarray:
    """Return dx (C, *S, N) for dz (O, *OUT, N) and weight (O, C, *K).

    The gradients of a block of columns are one product, which is added to the inputs that they were
    read from. A block has one tap of all channels if there are few weights, else all taps of some
    channels. Threads take channels.
    """
    o, c, taps, n = len(weight), weight.shape[1], prod(windows.kernel), dz.shape[-1]
    dx = empty((c, *windows.size, n), dz.dtype)
    light = weight.size <= _LIGHT
    matrix = weight.reshape(o, c * taps)
    # (T, C, O)
    factors = np.ascontiguousarray(weight.reshape(o, c, taps).transpose(2, 1, 0)) if light else None
    cells = prod(windows.out[1:]) * n
    work = dz.size * c * taps
    shares = pieces(c, work // PER_ELEMENT)
    most = max(share.stop - share.start for share in shares)
    if not light:
        most = min(max(1, _ROWS // taps), most)
    height = most if light else most * taps  # rows of a block
    runs = tiles(windows.out[0], height * cells * dz.itemsize, 1)
    buffers = empty((len(shares), height * runs[0].stop * cells), dz.dtype)

    def tap_by_tap(i: int, factors: np.ndarray) -> None:
        own = dx[shares[i]]
        for run in runs:
            part = dz[:, run].reshape(o, -1)
            here = windows.part(run.start, run.stop)
            back = buffers[i][: len(own) * part.shape[1]].reshape(len(own), -1)
            for tap in here.taps:
                product(factors[tap.index, shares[i]], part, back, n)
                own[tap.reads] += back.reshape(len(own), *here.out, n)[tap.reaches]

    def share(i: int) -> None:
        own = shares[i]
        dx[own] = 0
        if factors is not None:
            tap_by_tap(i, factors)
            return
        for channels in (
            slice(own.start + s.start, own.start + s.stop)
            for s in _runs(own.stop - own.start, most)
        ):
            factor = matrix[:, channels.start * taps : channels.stop * taps].T
            for run in runs:
                part = dz[:, run].reshape(o, -1)
                back = buffers[i][: len(factor) * part.shape[1]].reshape(len(factor), -1)
                np.matmul(factor, part, out=back)
                shape = (channels.stop - channels.start, taps, *dz[:, run].shape[1:])
                add(back.reshape(shape), dx[channels], windows, run.start)

    on_one_blas_thread(in_parts, share, len(shares), work // PER_ELEMENT)
    return dx
