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

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import numpy as np

from portacnn.backends.numpy import pointwise
from portacnn.backends.numpy.columns import (
    input_gradient,
    padded,
    product,
    tiles,
    view,
    weight_gradient,
    whole,
)
from portacnn.backends.numpy.epilogue import Bind, Epilogue, bind, prepared
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
    in_parts,
    in_pieces,
    on_one_blas_thread,
    pieces,
)
from portacnn.ops.fused import ConvNorm
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.pool import max_pool
from portacnn.ops.windows import Windows
from portacnn.runtime import Kernel

# bytes of all columns of a prepared convolution; more would not stay in the cache
_MOST_COLUMNS = 4 << 20
_AT_ONCE = 8 << 20  # bytes of all columns, up to which they are built before the product
_FEWEST = 256  # columns of a tile; BLAS packs the whole weight for each


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
    def of(around: np.ndarray, outputs: int, windows: Windows, pool: Windows | None) -> "_Job":
        """Prepare a pass from the padded input (C, *P, N) to outputs (O, *OUT, N). With pooling,
        tiles have whole windows, and each thread has a buffer for a tile of outputs.
        """
        depth, cells = len(around) * prod(windows.kernel), prod(windows.out[1:]) * around.shape[-1]
        lines = 1 if pool is None else pool.stride[0]
        least = -(-_FEWEST // cells)
        cuts = tiles(windows.out[0], depth * cells * around.itemsize, lines, least)
        work = outputs * depth * cells * windows.out[0] // PER_ELEMENT
        shares = pieces(len(cuts), work)
        rows = cuts[0].stop
        laid_out = empty((len(shares), depth * rows * cells), around.dtype)
        size = 0 if pool is None else outputs * rows * cells
        buffer = empty((len(shares), size), around.dtype)
        return _Job(view(around, windows), cuts, shares, laid_out, buffer, work)

    def run(self, each: Callable[[int, slice], None]) -> None:
        """Call ``each(thread, rows)`` for every tile."""

        def share(thread: int) -> None:
            for rows in self.tiles[self.shares[thread]]:
                each(thread, rows)

        on_one_blas_thread(in_parts, share, len(self.shares), self.work)

    def lay_out(self, thread: int, rows: slice) -> np.ndarray:
        """Return the columns (C*T, OUT*N) of a tile, contiguous."""
        axes = (self.columns.ndim - 2) // 2
        source = self.columns[(slice(None),) * (axes + 1) + (rows,)]
        columns = self.laid_out[thread][: source.size].reshape(source.shape)
        columns[...] = source
        return columns.reshape(prod(source.shape[: axes + 1]), -1)

    def output(self, thread: int, shape: tuple[int, ...]) -> np.ndarray:
        """Return the output buffer of a tile."""
        return self.outputs[thread][: prod(shape)].reshape(shape)


class _Saved(NamedTuple):
    """What a forward pass stores: the padded input; after ReLU, the output; after pooling, the
    position of each maximum.
    """

    around: np.ndarray
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


def _declines(x: np.ndarray, windows: Windows, groups: int, pool: Windows | None) -> bool:
    if groups != 1 or x.dtype.itemsize not in (4, 8) or not x.size or windows.sparse:
        return True
    return pool is not None and not pools_in_place(pool)


def by_columns(
    xt: np.ndarray, weight: np.ndarray, windows: Windows, epilogue: Epilogue, bind: Bind
) -> tuple[np.ndarray, np.ndarray]:
    """Return y (O, *OUT, N) after the epilogue, and the padded input, for xt (C, *S, N)."""
    around = padded(xt, windows)
    o, n = len(weight), xt.shape[-1]
    matrix = weight.reshape(o, -1)  # (O, C*T)
    # allocated before the job's buffers, which are freed and would leave a hole before the output
    y = empty((o, *windows.out, n), xt.dtype)
    flat, cells = y.reshape(o, -1), prod(windows.out[1:]) * n
    end = None if epilogue.is_empty else bind(epilogue, weight)
    if matrix.shape[1] * flat.shape[1] * xt.itemsize <= _AT_ONCE:
        columns = whole(around, windows)
        pointwise.product(matrix, columns, flat, end)
        return y, around
    job = _Job.of(around, o, windows, None)

    def each(thread: int, rows: slice) -> None:
        columns = slice(rows.start * cells, rows.stop * cells)
        product(matrix, job.lay_out(thread, rows), flat[:, columns], n)
        if end is not None:
            end(flat, slice(0, o), columns)

    job.run(each)
    return y, around


def _by_pooled_tiles(
    x: np.ndarray,
    weight: np.ndarray,
    bias: Any,
    windows: Windows,
    pool: Windows,
    keep: bool,
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray] | None]:
    """Return the maxima (O, *POOLED, N) after bias and ReLU, the padded input, and the winners."""
    around = padded(np.ascontiguousarray(batch_last(x)), windows)
    o, n = len(weight), x.shape[0]
    matrix = weight.reshape(o, -1)  # (O, C*T)
    shape = (o, *pool.out, n)
    y = empty(shape, x.dtype)
    winners = empty_winners(shape, pool) if keep else None
    job = _Job.of(around, o, windows, pool)
    column = None if bias is None else bias.reshape(o, *(1,) * (len(shape) - 1))

    def each(thread: int, rows: slice) -> None:
        out = job.output(thread, (o, rows.stop - rows.start, *windows.out[1:], n))
        product(matrix, job.lay_out(thread, rows), out.reshape(o, -1), n)
        pooled = _pooled_rows(rows, pool)
        if pooled is None:
            return
        rows, own = pooled
        into = y[:, rows]
        pool_into(out, into, winners and rows_of_winners(winners, rows, pool), own)
        if column is not None:
            np.add(into, column, out=into)
        np.maximum(into, zeros_for(into), out=into)

    job.run(each)
    return y, around, winners


def conv(
    x: np.ndarray, weight: np.ndarray, bias: Any, windows: Windows, groups: int, *, keep: bool
) -> Any:
    return _conv(x, weight, bias, windows, groups, False, keep)


def _conv(
    x: np.ndarray,
    weight: np.ndarray,
    bias: Any,
    windows: Windows,
    groups: int,
    relu: bool,
    keep: bool,
) -> Any:
    if _declines(x, windows, groups, None):
        return NotImplemented
    if pointwise.suits(windows):
        return pointwise.conv(x, weight, bias, windows, bind, relu=relu, keep=keep)
    epilogue = Epilogue(shift=bias, low=0.0 if relu else None)
    xt = np.ascontiguousarray(batch_last(x))
    y, around = by_columns(xt, weight, windows, epilogue, bind)
    saved = _Saved(around, weight, bias is not None, windows, y if relu else None, None, None)
    return batch_first(y), saved if keep else None


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
    if pool is None:
        return _conv(x, weight, bias, windows, groups, True, keep)
    if _declines(x, windows, groups, pool):
        return NotImplemented
    y, around, winners = _by_pooled_tiles(x, weight, bias, windows, pool, keep)
    saved = _Saved(around, weight, bias is not None, windows, y, pool, winners)
    return batch_first(y), saved if keep else None


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
        return pooled_unit(
            parts, weight, bias, windows, groups, norm, low, high, pool, conv_unit, conv_relu
        )
    if _declines(x, windows, groups, None):
        return NotImplemented
    added = np.ascontiguousarray(batch_last(residual[0])) if residual else None
    epilogue = Epilogue.of(norm, bias, added, low, high)
    if pointwise.suits(windows):
        y, _ = pointwise.unit(x, weight, windows, epilogue, bind)
    else:
        xt = np.ascontiguousarray(batch_last(x))
        y, _ = by_columns(xt, weight, windows, epilogue, bind)
    return batch_first(y)


def pooled_unit(
    parts: list[np.ndarray],
    weight: np.ndarray,
    bias: Any,
    windows: Windows,
    groups: int,
    norm: ConvNorm | None,
    low: float | None,
    high: float | None,
    pool: Windows,
    conv_unit: Callable[..., Any],
    conv_relu: Callable[..., Any],
) -> Any:
    """Compute ``conv_unit`` with pooling by the kernel ``conv_relu`` if that is the same, with the
    norm in the weights; else by the kernel ``conv_unit``, and pool its result.
    """
    if len(parts) == 1 and low == 0.0 and high is None and pools_in_place(pool):
        folded, shift = (weight, bias) if norm is None else norm.folded(weight, bias)
        result = conv_relu(parts[0], folded, shift, windows, groups, pool, keep=False)
        if result is not NotImplemented:
            return result[0]
    y = conv_unit(parts, weight, bias, windows, groups, norm, low, high, None)
    return y if y is NotImplemented else max_pool(y, pool, keep=False)[0]


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
    around, weight, with_bias, windows, y, pool, winners = saved
    dz = _before(np.ascontiguousarray(batch_last(dy)), y, windows, pool, winners)
    dweight = None
    if need_dweight:
        dweight = weight_gradient(dz, around, windows).reshape(weight.shape)
    dbias = dz.reshape(len(weight), -1).sum(axis=1) if with_bias and need_dbias else None
    dx = batch_first(input_gradient(dz, weight, windows)) if need_dx else None
    return dx, dweight, dbias


conv_relu_backward = conv_backward


def _before(
    dyt: np.ndarray,
    y: np.ndarray | None,
    windows: Windows,
    pool: Windows | None,
    winners: list[np.ndarray] | None,
) -> np.ndarray:
    """Return the gradient (O, *OUT, N) before pooling and ReLU."""
    if y is None:
        return dyt
    dz = empty((len(y), *windows.out, y.shape[-1]), y.dtype)

    def share(some: slice) -> None:
        if pool is None or winners is None:
            clear_where(y[some] <= 0, dyt[some], dz[some])
            return
        given = np.empty_like(y[some])
        clear_where(y[some] <= 0, dyt[some], given)
        unpool_into(given, [one[some] for one in winners], dz[some], pool)

    in_pieces(share, len(y), dz.size)
    return dz


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
    around = reserve((x.shape[1], *before, last, n), x.dtype, zeros=True)
    starts = [pad for pad, _ in windows.pads]
    sizes = [
        min(size, e - pad)
        for size, e, pad in zip(windows.size, (*before, last), starts, strict=True)
    ]
    inside = around[(slice(None), *(slice(a, a + b) for a, b in zip(starts, sizes, strict=True)))]
    read = (slice(None), *(slice(0, size) for size in sizes))
    steps = [stride // around.itemsize for stride in around.strides[1:-1]]
    run = sum((out - 1) * step for out, step in zip(windows.out, steps, strict=True)) + n
    taps = [step * d * around.itemsize for step, d in zip(steps, windows.dilation, strict=True)]
    strides = (around.strides[0], *taps, around.itemsize)
    runs = np.lib.stride_tricks.as_strided(
        around, (len(around), *windows.kernel, run), strides, writeable=False
    )
    rows = (o, windows.out[0], *before[1:], last, n) if before else (o, windows.out[0], n)
    columns, buffer = temporaries(runs.shape, rows, dtype=x.dtype)
    flat = columns.reshape(-1, run)
    product = buffer.reshape(o, -1)[:, :run]
    out = buffer[(slice(None), *(slice(0, size) for size in windows.out))]
    y = reserve((o, *(windows.out if pool is None else pool.out), n), x.dtype)
    result, order = batch_first(y), (*range(1, x.ndim), 0)
    column = None if bias is None else bias.reshape(o, *(1,) * (y.ndim - 1))
    matmul, add, maximum, zeros = np.matmul, np.add, np.maximum, zeros_for(y)

    def once(x: np.ndarray) -> np.ndarray:
        inside[...] = x.transpose(order)[read]
        columns[...] = runs
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
    return prepare_unit(parts, weight, bias, windows, groups, norm, low, high, pool, _OWN)


def prepare_unit(
    parts: list[np.ndarray],
    weight: np.ndarray,
    bias: Any,
    windows: Windows,
    groups: int,
    norm: ConvNorm | None,
    low: float | None,
    high: float | None,
    pool: Windows | None,
    kernels: "Preparing",
) -> Any:
    """Prepare ``conv_unit`` with the functions of a kernel set."""
    x = parts[0]
    if groups != 1 or x.dtype.itemsize not in (4, 8) or not x.size or windows.sparse:
        return NotImplemented
    if len(parts) == 1 and norm is None and high is None and low in (None, 0.0):
        run = NotImplemented
        if low == 0.0:
            run = kernels.conv_relu(x, weight, bias, windows, groups, pool)
        elif pool is None:
            run = kernels.conv(x, weight, bias, windows, groups)
        if run is not NotImplemented:
            return lambda parts: run(parts[0])
    if pool is None and pointwise.suits(windows) and weight.flags.c_contiguous:
        start = kernels.epilogue(norm, bias, low, high, weight)
        if start is not NotImplemented:
            return pointwise.prepare_unit(parts, weight, windows, start)
    result = kernels.unit(parts, weight, bias, windows, groups, norm, low, high, pool)
    if result is NotImplemented:
        return NotImplemented
    return lambda parts: kernels.unit(parts, weight, bias, windows, groups, norm, low, high, pool)


class Preparing(NamedTuple):
    """The functions of a kernel set that ``prepare_unit`` chooses from."""

    conv: Callable[..., Any]
    conv_relu: Callable[..., Any]
    unit: Callable[..., Any]
    epilogue: Callable[..., Any]


_OWN = Preparing(prepare_conv, prepare_conv_relu, conv_unit, prepared)


KERNELS = {
    "conv": Kernel(conv, conv_backward, prepare_conv),
    "conv_relu": Kernel(conv_relu, conv_relu_backward, prepare_conv_relu),
    "conv_unit": Kernel(conv_unit, None, prepare_conv_unit),
}
