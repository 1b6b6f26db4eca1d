"""Max pooling over one or two axes compiled by numba: one pass over the input, without intermediate
arrays.

With the batch last, the samples of one pixel are a run. With fewer samples than a vector, the rows
of a window are reduced first, as one run over a whole row of the input.

Notation: C channels, H, W/OH, OW input and output, N batch, KH, KW the kernel.
"""

from typing import Any, NamedTuple

import numpy as np

from portacnn.backends.numba.compile import compiled, read
from portacnn.backends.numba.emit import WIDTH
from portacnn.backends.numba.runs import window_run
from portacnn.backends.numpy.memory import empty
from portacnn.backends.threads import in_pieces
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import Plane, Windows
from portacnn.runtime import Kernel

_MOST = 127  # taps, whose number fits into a byte


@compiled
def _seen(o, stride, before, dilation, kernel, size):
    """Return the first tap of an output that reads the input, and the number of taps that do."""
    start = o * stride - before
    first = 0 if start >= 0 else (-start + dilation - 1) // dilation
    last = min(kernel, (size - 1 - start) // dilation + 1)
    return first, last - first


@compiled
def _forward(x, y, winner, keep, p, first, last, line):
    _, h, w, _, oh, ow, kh, kw, sh, sw, top, left, dh, dw, n = p
    number = x.dtype.type
    for c in range(first, last):
        for o in range(oh):
            row, rows = _seen(o, sh, top, dh, kh, h)
            at = (c * h + o * sh - top + row * dh) * w
            if rows <= 0:
                for i in range(ow * n):
                    y[(c * oh + o) * ow * n + i] = number(-np.inf)
                    if keep:
                        winner[(c * oh + o) * ow * n + i] = 0
                continue
            if line.size:
                window_run(
                    x, at * n, dh * w * n, 0, rows, 1, line, winner, 0, 0, 0, False, w * n
                )  # fmt: skip
            for q in range(ow):
                column, columns = _seen(q, sw, left, dw, kw, w)
                to = ((c * oh + o) * ow + q) * n
                come = (q * sw - left + column * dw) * n
                if columns <= 0:
                    for i in range(n):
                        y[to + i] = number(-np.inf)
                        if keep:
                            winner[to + i] = 0
                elif line.size:
                    for i in range(n):
                        best = line[come + i]
                        for j in range(1, columns):
                            value = line[come + j * dw * n + i]
                            best = value if (value > best) | (value != value) else best
                        y[to + i] = best
                else:
                    window_run(
                        x, at * n + come, dh * w * n, dw * n, rows, columns, y, winner, to,
                        row * kw + column, kw, keep, n,
                    )  # fmt: skip


@compiled
def _backward(dy, winner, dx, p, first, last):
    _, h, w, _, oh, ow, kh, kw, sh, sw, top, left, dh, dw, n = p
    offsets = np.empty(kh * kw, dtype=np.int64)
    for tap in range(kh * kw):
        offsets[tap] = (tap // kw * dh * w + tap % kw * dw) * n
    for c in range(first, last):
        for o in range(oh):
            rows = _seen(o, sh, top, dh, kh, h)[1]
            for q in range(ow):
                if rows <= 0 or _seen(q, sw, left, dw, kw, w)[1] <= 0:
                    continue
                at, to = (
                    ((c * oh + o) * ow + q) * n,
                    ((c * h + o * sh - top) * w + q * sw - left) * n,
                )
                for i in range(n):
                    dx[to + offsets[winner[at + i]] + i] += dy[at + i]


class _Saved(NamedTuple):
    """What the forward pass stores: the number of the tap of each maximum."""

    winner: np.ndarray
    shape: tuple[int, ...]  # (C, *S, N)
    plane: Plane


def max_pool(x: np.ndarray, windows: Windows, *, keep: bool) -> Any:
    """Compute ``max_pool``. Declines three axes, kernels of more than 127 taps, and sparse
    windows.
    """
    taps = int(np.prod(windows.kernel))
    if len(windows.size) > 2 or x.dtype.itemsize not in (4, 8) or taps > _MOST or windows.sparse:
        return NotImplemented
    if not x.size:
        return NotImplemented
    xt = np.ascontiguousarray(batch_last(x))
    p = Plane.of(windows, len(xt), len(xt), x.shape[0])
    y = empty((len(xt), *windows.out, p.n), x.dtype)
    winner = empty(y.shape if keep else (0,), np.dtype(np.int8))
    source, out, won = read(xt), y.reshape(-1), winner.reshape(-1)
    short = not keep and p.n < WIDTH // x.itemsize

    def share(some: slice) -> None:
        line = np.empty(p.w * p.n if short else 0, x.dtype)
        _forward(source, out, won, keep, tuple(p), some.start, some.stop, line)

    in_pieces(share, p.c, max(xt.size, y.size))
    return batch_first(y), _Saved(winner, xt.shape, p) if keep else None


def max_pool_backward(dy: np.ndarray, saved: _Saved) -> np.ndarray:
    winner, shape, p = saved
    dyt = np.ascontiguousarray(batch_last(dy))
    dx = empty(shape, dy.dtype)
    given, won, out = read(dyt), read(winner), dx.reshape(-1)

    def share(some: slice) -> None:
        dx[some] = 0
        _backward(given, won, out, tuple(p), some.start, some.stop)

    in_pieces(share, p.c, dx.size)
    return batch_first(dx)


KERNELS = {"max_pool": Kernel(max_pool, max_pool_backward)}
