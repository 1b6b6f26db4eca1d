"""Winograd's convolution F(2x2, 3x3): 16 multiplications for a tile of 2x2 outputs instead of 36.

A 3x3 convolution with stride 1 is computed in tiles of 2x2 outputs, from 4x4 inputs. Input, kernel
and result are transformed, and between the transforms there is one matrix product per element of
the 4x4 tile:

    V[p] (C, T) = B^T d B,   U[p] (O, C) = G g G^T,   M[p] = U[p] @ V[p],   y = A^T M A

The same products, transposed, give the gradients: dx is a convolution of dy with the turned kernel,
and dU[p] = dM[p] @ V[p]^T with dM = A dy A^T, dg = G^T dU G. The transforms only add and halve, so
the rounding error is that of a few more additions.

The products take nearly all the time. Everything runs on chunks of tiles that stay in the cache.

Source: Lavin and Gray, 2015, "Fast algorithms for convolutional neural networks".

Notation as in ops/conv.py: C in-channels, O out-channels, N batch, H, W/OH, OW input and output;
T tiles times samples in a chunk; P, Q rows and columns of tiles.
"""

import itertools
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from portacnn.backends.numba.compile import compiled, read
from portacnn.backends.numba.emit import WIDTH
from portacnn.backends.numba.epilogue import Full
from portacnn.backends.numba.parity import (
    GROUPS,
    merge_by_1,
    merge_by_2,
    merge_by_4,
    merge_by_8,
    split_by_1,
    split_by_2,
    split_by_4,
    split_by_8,
)
from portacnn.backends.numba.runs import clear, copy_run, finish_run
from portacnn.backends.numba.tiles import ROWS, SPAN, outer_edge, outer_tile
from portacnn.backends.numba.transforms import (
    gradient_tiles,
    input_tiles,
    kernel_tiles,
    output_tiles,
)
from portacnn.backends.numpy.memory import empty
from portacnn.backends.threads import (
    PER_ELEMENT,
    in_parts,
    in_pieces,
    on_one_blas_thread,
    pieces,
    thread_count,
)
from portacnn.ops.windows import Plane

_CHUNK = 1 << 17  # elements of one of the 16 products' factor and result, on a thread
_COLUMNS = 512  # the most columns of a product
_PAGE, _OFF = 4096, 832  # bytes; see ``_apart``
# estimates, in multiplications of a product: the transforms of one element; of one kernel; and the
# sums of one kernel's gradient over threads
_TRANSFORMS, _KERNELS, _SUMS = 12, 512, 3000


@lru_cache(maxsize=1024)
def suits(p: Plane, *, gradient: bool = False) -> bool:
    """Return whether this convolution, or the gradient of its weights, is computed here: a 3x3
    kernel without stride and dilation, and enough channels and tiles to make up for the transforms.
    """
    if (p.kh, p.kw, p.sh, p.sw, p.dh, p.dw) != (3, 3, 1, 1, 1, 1):
        return False
    tiles = -(-p.oh // 2) * -(-p.ow // 2) * p.n
    direct = 9 * p.o * p.c * p.oh * p.ow * p.n
    products = 16 * p.o * p.c * tiles
    around = 16 * _TRANSFORMS * (p.o + p.c) * tiles
    around += (_SUMS if gradient else _KERNELS) * p.o * p.c
    return products + around < 0.8 * direct


# --- compiled -------------------------------------------------------------------------------------


@compiled
def _row(x, row, h, w, n, left, pairs, start, samples, group, line, panel, at, phase):
    """Write one row of x from column -left on to the panel: its even columns at ``at``, its odd
    ones at ``at + phase``. Rows and columns outside are 0.

    Args:
        row: the channel times H, plus the row, or -1 for a row outside.
        left: zeros before the row; negative to skip columns.
        pairs: number of pairs of columns.
    """
    if row < 0:
        clear(panel, at, pairs * samples)
        clear(panel, at + phase, pairs * samples)
        return
    if group:
        before, skipped = min(max(left, 0), 2 * pairs), max(-left, 0)
        seen = max(min(w - skipped, 2 * pairs - before), 0)
        clear(line, 0, before * n)
        copy_run(line, before * n, x, (row * w + skipped) * n, seen * n)
        clear(line, (before + seen) * n, (2 * pairs - before - seen) * n)
        length = pairs * n
        if group == 1:
            split_by_1(panel, at, length, at + phase, length, line, 0, 2 * length)
        elif group == 2:
            split_by_2(panel, at, length, at + phase, length, line, 0, 2 * length)
        elif group == 4:
            split_by_4(panel, at, length, at + phase, length, line, 0, 2 * length)
        else:
            split_by_8(panel, at, length, at + phase, length, line, 0, 2 * length)
        return
    for pair in range(pairs):
        for odd in range(2):
            column, to = 2 * pair + odd - left, at + odd * phase + pair * samples
            if 0 <= column < w:
                copy_run(panel, to, x, (row * w + column) * n + start, samples)
            else:
                clear(panel, to, samples)


@compiled
def _input(x, shape, pad, piece, group, line, panel, phase, v, place):
    """Transform the inputs of a chunk, for all channels: v (16, C, T)."""
    channels, h, w, n = shape
    first, rows, start, samples, columns = piece
    step = columns * samples
    for c in range(channels):
        for i in range(2 * rows + 2):
            row = 2 * first - pad[0] + i
            row = c * h + row if 0 <= row < h else -1
            at = i * 2 * phase
            _row(
                x, row, h, w, n, pad[1], columns + 1, start, samples, group, line, panel, at, phase
            )
        for i in range(rows):
            input_tiles(
                panel, 4 * i * phase, 2 * phase, phase, samples, v, (c * rows + i) * step, place,
                step,
            )  # fmt: skip


@compiled
def _gradient(dy, shape, piece, group, line, panel, phase, v, place):
    """Transform the output's gradients of a chunk, for all channels: v (16, O, T)."""
    channels, h, w, n = shape
    first, rows, start, samples, columns = piece
    step = columns * samples
    for c in range(channels):
        for i in range(2 * rows):
            row = c * h + 2 * first + i if 2 * first + i < h else -1
            at = i * 2 * phase
            _row(dy, row, h, w, n, 0, columns, start, samples, group, line, panel, at, phase)
        for i in range(rows):
            gradient_tiles(
                panel, 4 * i * phase, 2 * phase, phase, v, (c * rows + i) * step, place, step
            )


@compiled
def _output(
    m, place, shape, piece, group, line, panel, phase, y, scale, shift, residual, adds, low, high
):
    """Transform the results of a chunk back, for all channels, and write them to y (O, OH, OW, N)
    after the epilogue.
    """
    channels, h, w, n = shape
    first, rows, start, samples, columns = piece
    step = columns * samples
    for c in range(channels):
        factor, offset = scale[c], shift[c]
        for i in range(rows):
            output_tiles(m, (c * rows + i) * step, place, panel, 0, 2 * phase, phase, step)
            for odd in range(min(2, h - 2 * (first + i))):
                to = (c * h + 2 * (first + i) + odd) * w * n
                at = odd * 2 * phase
                if group:
                    if group == 1:
                        merge_by_1(panel, at, phase, line, 0, step)
                    elif group == 2:
                        merge_by_2(panel, at, phase, line, 0, step)
                    elif group == 4:
                        merge_by_4(panel, at, phase, line, 0, step)
                    else:
                        merge_by_8(panel, at, phase, line, 0, step)
                    finish_run(y, to, line, 0, factor, offset, residual, to, adds, low, high, w * n)
                    continue
                for column in range(w):
                    come = at + column % 2 * phase + column // 2 * samples
                    there = to + column * n + start
                    finish_run(
                        y, there, panel, come, factor, offset, residual, there, adds, low, high,
                        samples,
                    )  # fmt: skip


@compiled
def _kernels(weight, u, place, first, last):
    """Transform the kernels ``first`` to ``last`` of weight (O*C*9,): u (16, O*C)."""
    kernel_tiles(weight, first * 9, u, first, place, last - first)


@compiled
def _kernel_gradients(du, dweight, first, last):
    """Write dweight (O*C, 9) = G^T du G for the kernels ``first`` to ``last`` of du (16, O*C)."""
    half = du.dtype.type(0.5)
    block = np.empty((3, 4), dtype=du.dtype)
    for i in range(first, last):
        for b in range(4):
            middle, apart = du[4 + b, i] + du[8 + b, i], du[4 + b, i] - du[8 + b, i]
            block[0, b] = du[b, i] + half * middle
            block[1, b] = half * apart
            block[2, b] = half * middle + du[12 + b, i]
        for a in range(3):
            middle, apart = block[a, 1] + block[a, 2], block[a, 1] - block[a, 2]
            dweight[i, 3 * a] = block[a, 0] + half * middle
            dweight[i, 3 * a + 1] = half * apart
            dweight[i, 3 * a + 2] = half * middle + block[a, 3]


@compiled
def _products(u, at, row, column, order, v, of_v, m, of_m, c, o, t, taps, nothing):
    """Compute the 16 products m[p] (O, T) = u[p] (O, C) @ v[p] (C, T)."""
    lanes, span = WIDTH // v.itemsize, SPAN // v.itemsize
    for k in range(c):
        taps[k, 0], taps[k, 1] = k * t, k * column
    for p in range(16):
        for first in range(0, o, ROWS):
            valid = min(ROWS, o - first)
            factor, to = order[p] * at + first * row, p * of_m + first * t
            i = 0
            while i < t:
                if i + span <= t:
                    outer_tile(
                        v, p * of_v + i, taps, 0, c, u, factor, row, nothing, 0, m, to + i, t,
                        valid, 0,
                    )  # fmt: skip
                    i += span
                else:
                    outer_edge(
                        v, p * of_v + i, taps, 0, c, u, factor, row, nothing, 0, m, to + i, t,
                        valid, min(lanes, t - i),
                    )  # fmt: skip
                    i += lanes


@compiled
def _chunk(
    x, shape_x, pad, piece, group, line, panel, phase, v, of_v, m, of_m, factors, taps, nothing, y,
    shape_y, scale, shift, residual, adds, low, high,
):  # fmt: skip
    """Compute the outputs of a chunk."""
    u, at, row, column, order = factors
    _input(x, shape_x, pad, piece, group, line, panel, phase, v, of_v)
    t = piece[1] * piece[3] * piece[4]
    _products(
        u, at, row, column, order, v, of_v, m, of_m, shape_x[0], shape_y[0], t, taps, nothing
    )  # fmt: skip
    _output(
        m, of_m, shape_y, piece, group, line, panel, phase, y, scale, shift, residual, adds, low,
        high,
    )  # fmt: skip


# --- chunks ---------------------------------------------------------------------------------------

_Piece = tuple[int, int, int, int, int]
"""First row of tiles, number of rows, first sample, number of samples, columns of tiles."""


@lru_cache(maxsize=1024)
def _chunks(oh: int, ow: int, n: int, channels: int) -> list[_Piece]:
    """Return the chunks of tiles of an output. ``channels`` is C + O."""
    rows, columns = -(-oh // 2), -(-ow // 2)
    most = min(_COLUMNS, max(_CHUNK // channels, 64))
    parts = 1 if n < 32 else min(n // 16, max(1, columns * n // most))
    cuts = [n * i // parts for i in range(parts + 1)]
    width = columns * (n // parts)
    wanted = max(-(-rows * width // most), -(-thread_count() // parts), 1)
    count = min(rows, -(-wanted // thread_count()) * thread_count() if parts == 1 else wanted)
    lines = [rows * i // count for i in range(count + 1)]
    return [
        (first, last - first, start, stop - start, columns)
        for first, last in itertools.pairwise(lines)
        for start, stop in itertools.pairwise(cuts)
    ]


def _apart(elements: int, itemsize: int) -> int:
    """Return the distance of the 16 parts of a transform, in elements.

    Distances of a multiple of a page map all parts to the same lines of the L1 cache.
    """
    return (-(-elements * itemsize // _PAGE) * _PAGE + _OFF) // itemsize


class _Buffers(NamedTuple):
    """The memory of one thread: a row, a panel of rows whose parities are ``phase`` apart, and two
    transforms, of whose parts one ``place`` is the distance.
    """

    line: np.ndarray
    panel: np.ndarray
    phase: int
    left: np.ndarray
    of_left: int
    right: np.ndarray
    of_right: int


def _buffers(
    threads: int, chunks: list[_Piece], left: int, right: int, dtype: Any
) -> list[_Buffers]:
    """Return the memory of each thread, for transforms of ``left`` and ``right`` channels.

    It is allocated in the calling thread, where the workspace is.
    """
    lanes = WIDTH // dtype.itemsize
    columns = max((piece[4] + 1) * piece[3] for piece in chunks)
    rows = max(2 * piece[1] + 2 for piece in chunks)
    most = max(rows * columns * samples for _, rows, _, samples, columns in chunks)
    phase = -(-columns // lanes) * lanes + lanes
    places = [_apart(channels * most, dtype.itemsize) for channels in (left, right)]
    sizes = [2 * phase + 2 * lanes, rows * 2 * phase + 2 * lanes, *(16 * n for n in places)]
    buffer = empty((threads, sum(sizes)), dtype)
    ends = [sum(sizes[:i]) for i in range(5)]
    parts = [[own[start:stop] for start, stop in pairwise(ends)] for own in buffer]
    return [_Buffers(line, panel, phase, v, places[0], m, places[1]) for line, panel, v, m in parts]


def _group(n: int, samples: int, itemsize: int) -> int:
    """Return n if rows are split in whole vectors, else 0."""
    return n if samples == n and n in GROUPS and n < WIDTH // itemsize else 0


def _parts(buffer: np.ndarray, place: int, rows: int, columns: int) -> list[np.ndarray]:
    """Return the 16 matrices (rows, columns) in a buffer."""
    return [
        buffer[p * place : p * place + rows * columns].reshape(rows, columns) for p in range(16)
    ]


def _on_threads(
    chunks: list[_Piece], shares: list[slice], work: int, each: Callable[[int, _Piece], None]
) -> None:
    """Call ``each(thread, chunk)`` for every chunk of every thread's share."""

    def run(thread: int) -> None:
        for chunk in chunks[shares[thread]]:
            each(thread, chunk)

    in_parts(run, len(shares), work)


# --- the three convolutions -----------------------------------------------------------------------


class Factors(NamedTuple):
    """Transformed kernels U: 16 matrices in a buffer.

    Attributes:
        at, row, column: the distances of two matrices, of their rows and of their columns.
        order: the matrix of each place.
    """

    buffer: np.ndarray
    at: int
    row: int
    column: int
    order: np.ndarray

    def turned(self) -> "Factors":
        """Return the factors that compute dx from dy: kernels turned by 180 degrees, the matrices
        transposed.
        """
        return Factors(self.buffer, self.at, self.column, self.row, _TURNED)


_STRAIGHT = np.arange(16)
# the rows and columns of the transform of a turned kernel
_TURNED = np.array([4 * i + j for i in (3, 1, 2, 0) for j in (3, 1, 2, 0)])


def factors(weight: np.ndarray) -> Factors:
    """Return the transformed kernels of weight (O, C, 3, 3)."""
    o, c = weight.shape[:2]
    place = _apart(o * c, weight.itemsize)
    buffer = empty((16 * place,), weight.dtype)
    flat = read(weight)
    in_pieces(lambda some: _kernels(flat, buffer, place, some.start, some.stop), o * c, o * c * 16)
    return Factors(buffer, place, c, 1, _STRAIGHT)


def convolve(
    x: np.ndarray, kernels: Factors, y: np.ndarray, pad: tuple[int, int], epilogue: Full
) -> None:
    """Compute y (O, OH, OW, N) for x (C, H, W, N).

    Args:
        pad: zeros above and to the left of x; negative to skip rows or columns.
    """
    (c, _, _, n), (o, oh, ow, _) = x.shape, y.shape
    chunks = _chunks(oh, ow, n, c + o)
    work = _work(c, o, chunks)
    shares = pieces(len(chunks), work)
    buffers = _buffers(len(shares), chunks, c, o, x.dtype)
    flat, shape_x, shape_y = read(x), tuple(x.shape), tuple(y.shape)
    taps, nothing = np.empty((len(shares), c, 2), np.int32), np.zeros(o, x.dtype)
    out, rest = y.reshape(-1), tuple(epilogue)

    def each(thread: int, piece: _Piece) -> None:
        group = _group(n, piece[3], x.itemsize)
        _chunk(
            flat, shape_x, pad, piece, group, *buffers[thread], tuple(kernels), taps[thread],
            nothing, out, shape_y, *rest,
        )  # fmt: skip

    _on_threads(chunks, shares, work, each)


def weight_gradient(x: np.ndarray, dy: np.ndarray, pad: tuple[int, int]) -> np.ndarray:
    """Return dweight (O, C, 3, 3) for x (C, H, W, N) and dy (O, OH, OW, N)."""
    (c, _, _, n), (o, oh, ow, _) = x.shape, dy.shape
    chunks = _chunks(oh, ow, n, c + o)
    work = _work(c, o, chunks)
    shares = pieces(len(chunks), work)
    dweight = np.empty((o * c, 9), x.dtype)
    buffers = _buffers(len(shares), chunks, c, o, x.dtype)
    totals = empty((len(shares), 16, o, c), x.dtype)
    spare = empty((len(shares), o, c), x.dtype)
    flat_x, flat_dy, shape_x, shape_y = read(x), read(dy), tuple(x.shape), tuple(dy.shape)
    begun: set[int] = set()

    def each(thread: int, piece: _Piece) -> None:
        line, panel, phase, v, of_v, g, of_g = buffers[thread]
        group = _group(n, piece[3], x.itemsize)
        _input(flat_x, shape_x, pad, piece, group, line, panel, phase, v, of_v)
        _gradient(flat_dy, shape_y, piece, group, line, panel, phase, g, of_g)
        t = piece[1] * piece[3] * piece[4]
        for total, left, right in zip(
            totals[thread], _parts(g, of_g, o, t), _parts(v, of_v, c, t), strict=True
        ):
            if thread in begun:
                total += np.matmul(left, right.T, out=spare[thread])
            else:
                np.matmul(left, right.T, out=total)
        begun.add(thread)

    on_one_blas_thread(_on_threads, chunks, shares, work, each)
    for more in totals[1:]:
        totals[0] += more
    du = totals[0].reshape(16, o * c)
    in_pieces(lambda s: _kernel_gradients(du, dweight, s.start, s.stop), o * c, o * c * 16)
    return dweight.reshape(o, c, 3, 3)


def _work(c: int, o: int, chunks: list[_Piece]) -> int:
    """Return the work of the 16 products, for ``in_pieces``."""
    tiles = sum(rows * samples * columns for _, rows, _, samples, columns in chunks)
    return 16 * c * o * tiles // PER_ELEMENT
