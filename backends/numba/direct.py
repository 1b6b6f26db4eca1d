"""Direct convolution: runs the compiled loops of ``panels.py`` in pieces, distributed over threads.

Notation as in panels.py.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from portacnn.backends.numba.compile import read
from portacnn.backends.numba.emit import WIDTH
from portacnn.backends.numba.epilogue import Full
from portacnn.backends.numba.panels import (
    Panel,
    forward_pieces,
    gradient_places,
    pack_gradient,
    panel_of,
    pool_out,
    taps_of,
    weight_pieces,
)
from portacnn.backends.numba.tiles import ROWS
from portacnn.backends.numpy.epilogue import Epilogue
from portacnn.backends.numpy.memory import empty, reserve, temporaries
from portacnn.backends.numpy.pool import pools_in_place
from portacnn.backends.threads import PER_ELEMENT, in_parts, in_pieces, pieces
from portacnn.ops.layout import batch_first
from portacnn.ops.windows import Plane, Windows

NO_POOL = (0, 1, 1, 1, 1, 1)
_NOTHING = (0,) * len(Plane._fields)
NO_TAPS = np.empty(0, dtype=np.int8)


def none(like: np.ndarray) -> np.ndarray:
    """Return an empty array of this dtype, for a kernel's argument that is not used."""
    return np.empty(0, dtype=like.dtype)


def declines(x: np.ndarray, weight: np.ndarray, windows: Windows) -> bool:
    """Return whether these kernels decline. They support one or two axes, float32 and float64, and
    int32 sizes.
    """
    if len(windows.size) > 2 or x.dtype.itemsize not in (4, 8) or windows.sparse:
        return True
    return not 0 < x.size < 2**30 or weight.size >= 2**31


@lru_cache(maxsize=1024)
def fits(p: Plane, itemsize: int, whole: int) -> bool:
    """Return whether the tap offsets in all panels, forward and backward, fit into int32."""
    for plane, lines in ((p, whole), (p, 1), (p.adjoint(), 1)):
        panel = panel_of(plane, itemsize, lines)
        if plane.c * panel.rows * plane.sw * panel.columns * panel.samples >= 2**31:
            return False
    return True


def pools_of(pool: Windows) -> tuple[int, ...] | None:
    """Return PH, PW, QH, QW, RH, RW, or None if ``pools_in_place`` is False."""
    if not pools_in_place(pool):
        return None
    one = (1,) * (2 - len(pool.size))
    return one + pool.out + one + pool.kernel + one + pool.stride


def _cut(p: Plane, x: np.ndarray, whole: int) -> tuple[Panel, int, int]:
    """Return the blocking, the number of pieces, and the estimated work."""
    panel = panel_of(p, x.itemsize, whole)
    work = p.n * p.o * p.oh * p.ow * p.c * p.kh * p.kw // PER_ELEMENT
    return panel, -(-p.oh // panel.lines) * -(-p.n // panel.samples), work


def _both_taps(
    p: Plane, panel: Panel, steps: tuple[int, int], turned: bool
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the taps of a full panel and of the panel of the last samples, and their number."""
    last = p.n - (p.n - 1) // panel.samples * panel.samples
    taps = taps_of(p, panel, panel.samples, steps, turned)
    return taps.places, taps_of(p, panel, last, steps, turned).places, taps.count


def _convolve(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, p: Plane, steps: tuple[int, int],
    step: int, y: np.ndarray, epilogue: Epilogue,
    *, pool: tuple[int, ...] = NO_POOL, winner: np.ndarray | None = None, back: Any = None,
) -> None:  # fmt: skip
    """Run ``forward_pieces`` with its pieces in parallel. ``back``, for an input gradient: y,
    winner and the plane of the forward pass.
    """
    panel, count, work = _cut(p, x, pool[4] if back is None else 1)
    given, won, through = (none(x), NO_TAPS, _NOTHING) if back is None else back
    apart = (through[8], through[9])
    taps = _both_taps(p, panel, steps, back is not None)
    parts = pieces(count, work)
    size = p.c * panel.rows * p.sw * panel.columns * panel.samples
    out_size = ROWS * panel.lines * panel.pitch
    panels, size = buffers(len(parts), size, x.dtype)
    outs, out_size = buffers(len(parts), out_size, x.dtype)
    arguments = (
        read(x),
        read(given),
        read(won),
        tuple(through),
        apart,
        tuple(p),
        tuple(panel),
        pool,
        *taps,
    )
    factors = read(weight), step, read(bias), *Full.of(epilogue, p.o, y.dtype)
    results = y.reshape(-1), NO_TAPS if winner is None else winner.reshape(-1), winner is not None

    def run(i: int) -> None:
        forward_pieces(
            *arguments, *factors, panels, i * size, outs, i * out_size, *results, parts[i].start,
            parts[i].stop,
        )  # fmt: skip

    in_parts(run, len(parts), work)


def buffers(count: int, size: int, dtype: Any) -> tuple[np.ndarray, int]:
    """Return a buffer for ``count`` threads, each part aligned to a vector, and the distance of the
    parts.
    """
    lanes = WIDTH // dtype.itemsize
    size = -(-size // lanes) * lanes
    buffer = empty((count * size + lanes,), dtype)
    return buffer[-buffer.ctypes.data // dtype.itemsize % lanes :], size


class Saved(NamedTuple):
    """What a forward pass stores: the input (C, H, W, N); after ReLU the output; after pooling the
    winning taps.
    """

    x: np.ndarray
    weight: np.ndarray
    with_bias: bool
    windows: Windows
    plane: Plane
    pool: tuple[int, ...]
    y: np.ndarray
    winner: np.ndarray


def weight_gradient(dyt: np.ndarray, saved: Saved) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradients of the weight, (O*C*T,), and of the bias, (O,)."""
    x, weight, _, _, p, pool, y, winner = saved
    panel, count, work = _cut(p, x, 1)
    parts = pieces(count, work)
    taps = _both_taps(p, panel, (p.kh * p.kw, 1), False)
    size, grad_size = (
        p.c * panel.rows * p.sw * panel.columns * panel.samples,
        p.o * panel.lines * p.ow * panel.samples,
    )
    panels, size = buffers(len(parts), size, x.dtype)
    grads, grad_size = buffers(len(parts), grad_size, x.dtype)
    dweights = empty((len(parts), weight.size), x.dtype)
    dbiases = np.empty((len(parts), p.o), dtype=x.dtype)
    arguments = read(x), read(dyt), read(y), read(winner), tuple(p), tuple(panel), pool, *taps

    def run(i: int) -> None:
        results = dweights[i], dbiases[i], parts[i].start, parts[i].stop
        weight_pieces(*arguments, panels, i * size, grads, i * grad_size, *results)

    in_parts(run, len(parts), work)
    return dweights.sum(axis=0), dbiases.sum(axis=0)


def forward(
    xt: np.ndarray,
    weight: np.ndarray,
    bias: Any,
    p: Plane,
    y: np.ndarray,
    epilogue: Epilogue,
    pool: tuple[int, ...] = NO_POOL,
    winner: np.ndarray | None = None,
) -> None:
    """Compute y (O, OH, OW, N), or its maxima after ReLU (O, PH, PW, N), for xt (C, H, W, N)."""
    biases = np.zeros(p.o, dtype=xt.dtype) if bias is None else np.ascontiguousarray(bias)
    steps, step = (p.kh * p.kw, 1), p.c * p.kh * p.kw
    _convolve(xt, weight, biases, p, steps, step, y, epilogue, pool=pool, winner=winner)


def input_gradient(dyt: np.ndarray, saved: Saved) -> np.ndarray:
    """Return dx (C, H, W, N) for the gradient after pooling and ReLU."""
    x, weight, _, _, p, pool, y, winner = saved
    dx, biases = empty(x.shape, x.dtype), np.zeros(p.c, dtype=x.dtype)
    steps, step = (p.c * p.kh * p.kw, 1), p.kh * p.kw
    back = (y, winner, p)
    _convolve(dyt, weight, biases, p.adjoint(), steps, step, dx, Epilogue(), pool=pool, back=back)
    return dx


def before(dyt: np.ndarray, saved: Saved) -> np.ndarray:
    """Return the gradient (O, *OUT, N) before pooling and ReLU."""
    _, _, _, windows, p, pool, y, winner = saved
    if not (y.size or winner.size):
        return dyt
    dz = empty((p.o, *windows.out, p.n), dyt.dtype)
    heights = gradient_places(p.oh, 1, pool[0], pool[2], pool[4], 0, p.oh)
    widths = gradient_places(p.ow, 1, pool[1] if pool[0] else 0, pool[3], pool[5], 0, p.ow)

    def share(some: slice) -> None:
        own = p._replace(o=some.stop - some.start)
        pack_gradient(
            read(dyt[some]), read(y[some] if y.size else y),
            read(winner[some] if winner.size else winner), tuple(own), pool,
            dz[some].reshape(-1), heights, 0, p.oh, widths, 0, p.n,
        )  # fmt: skip

    in_pieces(share, p.o, dz.size)
    return dz


def pooled(
    z: np.ndarray, p: Plane, pool: tuple[int, ...], y: np.ndarray, winner: np.ndarray | None
) -> None:
    """Write the maxima of z (O, OH, OW, N) after ReLU to y (O, PH, PW, N)."""
    keep, pitch = winner is not None, p.ow * p.n

    def share(some: slice) -> None:
        for c in range(some.start, some.stop):
            pool_out(
                z[c].reshape(-1), 1, p.oh, p.oh, pitch, tuple(p), pool, y[c].reshape(-1),
                NO_TAPS if winner is None else winner[c].reshape(-1), keep, 0, 0, 0, p.n,
            )  # fmt: skip

    in_pieces(share, p.o, z.size)


def prepared(
    x: np.ndarray, weight: np.ndarray, bias: Any, windows: Windows, pool: Windows | None, relu: bool
) -> Any:
    """Do everything in ``conv`` or ``conv_relu`` that does not depend on the values of x once."""
    pools = NO_POOL if pool is None else pools_of(pool)
    apart = [
        array for array in (weight, bias) if array is not None and not array.flags.c_contiguous
    ]
    # a copy would not see later updates of the parameters
    if declines(x, weight, windows) or pools is None or apart:
        return NotImplemented
    p = Plane.of(windows, x.shape[1], weight.shape[0], x.shape[0])
    panel, count, work = _cut(p, x, pools[4])
    if not fits(p, x.itemsize, pools[4]) or len(pieces(count, work)) > 1:
        return NotImplemented
    empty_one, flat = read(none(x)), read(weight)
    y = reserve((p.o, *(windows.out if pool is None else pool.out), p.n), x.dtype)
    result, out = batch_first(y), y.reshape(-1)
    sizes = (
        p.c * panel.rows * p.sw * panel.columns * panel.samples,
        ROWS * panel.lines * panel.pitch,
    )
    buffer, outs = temporaries(*((size,) for size in sizes), dtype=x.dtype)
    taps = _both_taps(p, panel, (p.kh * p.kw, 1), False)
    through = empty_one, read(NO_TAPS), _NOTHING, (1, 1), tuple(p), tuple(panel), pools, *taps
    full = Full.of(Epilogue(low=0.0 if relu else None), p.o, x.dtype)
    biases = read(np.zeros(p.o, dtype=x.dtype) if bias is None else bias)
    factors = flat, p.c * p.kh * p.kw, biases, *full

    last = (*range(1, x.ndim), 0)

    def run(x: np.ndarray) -> np.ndarray:
        xt = read(np.ascontiguousarray(x.transpose(last)))
        forward_pieces(xt, *through, *factors, buffer, 0, outs, 0, out, NO_TAPS, False, 0, count)
        return result

    return run
