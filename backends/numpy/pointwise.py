"""Convolution with a kernel of one tap (1x1) and without padding: one matrix product, no columns.

With the batch last, the input is the matrix (C, T) already:  y (O, T) = weight (O, C) @ x (C, T).
With a stride, the inputs that are read are copied first. Both gradients are products too:

    dweight (O, C) = dy @ x.T,    dx (C, T) = weight.T @ dy

The products run in blocks of outputs, distributed over threads. The epilogue of a block runs while
the block is in the cache.

Notation as in ops/conv.py: C in-channels, O out-channels, N batch, T outputs per channel.
"""

import itertools
from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

from portacnn.backends.numpy.epilogue import Bind, End, Epilogue, Start
from portacnn.backends.numpy.memory import empty
from portacnn.backends.numpy.pool import clear_where
from portacnn.backends.threads import (
    PER_ELEMENT,
    in_parts,
    in_pieces,
    on_one_blas_thread,
    pieces,
    products_in_pieces,
)
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import Windows

_BLOCK = 1 << 18  # elements of a block of outputs: 1 MiB, a core's L2 cache
_FEWEST, _MOST = 256, 2048  # columns of a block; BLAS packs the whole weight for each


def suits(windows: Windows) -> bool:
    """Return whether the kernel has one tap and reads no padding."""
    return all(k == 1 for k in windows.kernel) and not any(
        before or after for before, after in windows.pads
    )


@lru_cache(maxsize=1024)
def _blocks(o: int, t: int, threads: int) -> tuple[list[tuple[slice, slice]], list[slice]]:
    """Return blocks (rows, columns) that cover (O, T), and the blocks of each thread."""
    if threads > 1 and t < _FEWEST * threads:  # by rows: each thread reads half of the weight
        cuts = [o * i // threads for i in range(threads + 1)]
        blocks = [(slice(a, b), slice(0, t)) for a, b in itertools.pairwise(cuts)]
        return blocks, [slice(i, i + 1) for i in range(threads)]
    wide = min(max(_BLOCK // o, _FEWEST), _MOST)
    count = -(-t // wide)
    count = -(-count // threads) * threads
    # whole vectors, so that blocks share no cache lines
    step = -(-t // count // 16) * 16 if t >= 16 * count else -(-t // count)
    blocks = [(slice(0, o), slice(at, min(at + step, t))) for at in range(0, t, step)]
    cuts = [len(blocks) * i // threads for i in range(threads + 1)]
    return blocks, [slice(a, b) for a, b in itertools.pairwise(cuts)]


def product(
    matrix: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    end: End | None = None,
) -> None:
    """Compute y (O, T) = matrix (O, C) @ x (C, T), then the epilogue."""
    o, t = y.shape
    work = o * t * matrix.shape[1] // PER_ELEMENT
    threads = len(pieces(max(o, t), work))
    blocks, shares = _blocks(o, t, threads)

    def run(number: int) -> None:
        for rows, columns in blocks[shares[number]]:
            np.matmul(matrix[rows], x[:, columns], out=y[rows, columns])
            if end is not None:
                end(y, rows, columns)

    on_one_blas_thread(in_parts, run, len(shares), work)


def outer_product(dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return dy (O, T) @ x.T (T, C), distributed over threads along its longer side."""
    y = empty((len(dy), len(x)), x.dtype)
    work = y.size * x.shape[1]
    if len(dy) >= len(x):
        products_in_pieces(lambda s: np.matmul(dy[s], x.T, out=y[s]), len(dy), work)
    else:
        products_in_pieces(lambda s: np.matmul(dy, x[s].T, out=y[:, s]), len(x), work)
    return y


class Saved(NamedTuple):
    """What a forward pass stores: the inputs that were read (C, *OUT, N); after ReLU, the
    output.
    """

    x: np.ndarray
    weight: np.ndarray
    with_bias: bool
    windows: Windows
    y: np.ndarray | None


def inputs(x: np.ndarray, windows: Windows) -> np.ndarray:
    """Return the inputs that are read, contiguous: (C, *OUT, N)."""
    xt = batch_last(x)
    if any(stride > 1 for stride in windows.stride):
        xt = xt[(slice(None), *(slice(None, None, stride) for stride in windows.stride))]
    if xt.flags.c_contiguous:
        return xt
    into = empty(xt.shape, xt.dtype)
    rows = into.reshape(len(into), -1)
    in_pieces(lambda s: np.copyto(into[s], xt[s]), len(rows), into.size)
    return into


def unit(
    x: np.ndarray, weight: np.ndarray, windows: Windows, epilogue: Epilogue, bind: Bind
) -> tuple[np.ndarray, np.ndarray]:
    """Return y (O, *OUT, N) after the epilogue, and the inputs that were read."""
    read = inputs(x, windows)
    y = empty((len(weight), *windows.out, x.shape[0]), x.dtype)
    product(
        weight.reshape(len(weight), -1),
        read.reshape(len(read), -1),
        y.reshape(len(y), -1),
        None if epilogue.is_empty else bind(epilogue, weight),
    )
    return y, read


def conv(
    x: np.ndarray,
    weight: np.ndarray,
    bias: Any,
    windows: Windows,
    bind: Bind,
    *,
    relu: bool,
    keep: bool,
) -> Any:
    """Compute ``conv``, or ``conv_relu`` without pooling."""
    epilogue = Epilogue(shift=bias, low=0.0 if relu else None)
    y, read = unit(x, weight, windows, epilogue, bind)
    saved = Saved(read, weight, bias is not None, windows, y if relu else None)
    return batch_first(y), saved if keep else None


def conv_backward(
    dy: np.ndarray,
    saved: Saved,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> Any:
    x, weight, with_bias, windows, y = saved
    o, c = weight.shape[:2]
    dz = np.ascontiguousarray(batch_last(dy))
    if y is not None:
        dz, given = empty(y.shape, y.dtype), dz
        in_pieces(lambda s: clear_where(y[s] <= 0, given[s], dz[s]), o, dz.size)
    dz = dz.reshape(o, -1)
    dweight = outer_product(dz, x.reshape(c, -1)).reshape(weight.shape) if need_dweight else None
    dbias = dz.sum(axis=1) if with_bias and need_dbias else None
    if not need_dx:
        return None, dweight, dbias
    read = empty(x.shape, x.dtype)
    product(weight.reshape(o, c).T, dz, read.reshape(c, -1))
    if all(stride == 1 for stride in windows.stride):
        return batch_first(read), dweight, dbias
    dx = empty((c, *windows.size, x.shape[-1]), x.dtype)
    taken = (slice(None), *(slice(None, None, stride) for stride in windows.stride))

    def spread(some: slice) -> None:
        own = dx[some]
        own[...] = 0
        own[taken] = read[some]

    in_pieces(spread, c, dx.size)
    return batch_first(dx), dweight, dbias


def prepare_unit(
    parts: list[np.ndarray], weight: np.ndarray, windows: Windows, start: Start
) -> Callable[[list[np.ndarray]], np.ndarray]:
    """Do everything in ``unit`` that does not depend on the values once."""
    x, o, n = parts[0], len(weight), parts[0].shape[0]
    matrix, shape = weight.reshape(o, -1), (o, *windows.out, n)
    width, dtype = prod(windows.out) * n, x.dtype
    work = o * width * matrix.shape[1] // PER_ELEMENT
    blocks, shares = _blocks(o, width, len(pieces(max(o, width), work)))
    matmul, factors = np.matmul, [matrix[rows] for rows, _ in blocks]
    order, axes = (*range(1, x.ndim), 0), (x.ndim - 1, *range(x.ndim - 1))
    strided = any(stride > 1 for stride in windows.stride)

    def run(parts: list[np.ndarray]) -> np.ndarray:
        xt = inputs(parts[0], windows) if strided else parts[0].transpose(order)
        read = np.ascontiguousarray(xt).reshape(-1, width)
        y = empty(shape, dtype)
        table = y.reshape(o, width)
        added = np.ascontiguousarray(parts[1].transpose(order)) if len(parts) > 1 else None
        end = start(added)

        def share(number: int) -> None:
            for j in range(shares[number].start, shares[number].stop):
                rows, columns = blocks[j]
                matmul(factors[j], read[:, columns], out=table[rows, columns])
                end(table, rows, columns)

        on_one_blas_thread(in_parts, share, len(shares), work)
        return y.transpose(axes)

    return run
