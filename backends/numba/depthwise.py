"""Convolution in groups of few channels, such as depthwise, compiled by numba.

A group has so few channels that a matrix product would be limited by its loads. Each output channel
is the sum of its input channels, one at a time (``rows``). The rows that a block of output rows
reads are copied to a *panel*, as in ``conv``: with zeros for the padding, and, with a stride,
columns that one tap reads side by side. A panel has one channel and stays in the cache of the core
while all outputs of the group read it. Groups are distributed over the threads.

The input gradient of stride 1 is the same computation with the taps turned round. With a stride,
the inputs fall into phases, each with the taps that reach it; no inserted zeros are multiplied.

Notation as in ops/conv.py and ``conv``. A, B: the channels of a group that are read and written.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from portacnn.backends.numba.bands import band_of, phases_of, taps_of
from portacnn.backends.numba.compile import compiled, read
from portacnn.backends.numba.direct import buffers, none
from portacnn.backends.numba.emit import WIDTH
from portacnn.backends.numba.panels import sum_of
from portacnn.backends.numba.parity import split_by_1, split_by_2, split_by_4, split_by_8
from portacnn.backends.numba.rows import (
    DOTS,
    LINES,
    NOTHING,
    OWN,
    RESIDUAL,
    dot_rows,
    row_of_taps,
    rows_of_3,
    rows_of_3_by_2,
    rows_of_5,
    rows_of_5_by_2,
)
from portacnn.backends.numba.runs import clear, copy_run
from portacnn.backends.numpy.memory import empty
from portacnn.backends.threads import PER_ELEMENT, in_parts, pieces
from portacnn.ops.fused import ConvNorm
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import Plane, Windows

# The most channels of a group, in and out; fewer if a row of outputs has less than _SHORT bytes,
# since its last vector is never full.
_MOST, _FEW, _SHORT = 16, 4, 96


# --- compiled -------------------------------------------------------------------------------------


@compiled
def _pack(x, p, columns, panel, channel, first, count):
    """Fill the panel with ``count`` input rows of a channel from ``first`` on. Its margins are zero
    already.
    """
    _, h, w, _, _, _, _, _, _, sw, _, left, _, _, n = p
    lanes, length = WIDTH // panel.itemsize, sw * columns * n
    skipped = max(0, -left)  # columns before the first one that is read
    for row in range(count):
        at = row * length
        if not 0 <= first + row < h:
            clear(panel, at, length)
            continue
        line = (channel * h + first + row) * w * n
        if sw == 1:
            seen = max(0, min(w - skipped, columns - max(0, left)))
            copy_run(panel, at + max(0, left) * n, x, line + skipped * n, seen * n)
            continue
        if sw == 2 and left >= 0 and (n == 1 or n == 2 or n == 4 or n == 8) and n <= lanes:
            even, odd = left // 2, (left + 1) // 2
            count_even = max(0, min((w + 1) // 2, columns - even)) * n
            count_odd = max(0, min(w // 2, columns - odd)) * n
            at_even = at + (left % 2 * columns + even) * n
            at_odd = at + ((left + 1) % 2 * columns + odd) * n
            if n == 1:
                split_by_1(panel, at_even, count_even, at_odd, count_odd, x, line, w * n)
            elif n == 2:
                split_by_2(panel, at_even, count_even, at_odd, count_odd, x, line, w * n)
            elif n == 4:
                split_by_4(panel, at_even, count_even, at_odd, count_odd, x, line, w * n)
            else:
                split_by_8(panel, at_even, count_even, at_odd, count_odd, x, line, w * n)
            continue
        for column in range(skipped, w):
            to = column + left
            if to // sw < columns:
                to = at + (to % sw * columns + to // sw) * n
                copy_run(panel, to, x, line + column * n, n)


@compiled
def _tile_of(p):
    """Return which function of ``rows`` computes this kernel: 0 is ``row_of_taps``."""
    _, _, _, _, _, _, kh, kw, sh, _, _, _, dh, _, _ = p
    if kh != kw or dh != 1 or sh > 2 or (kh != 3 and kh != 5):
        return 0
    return sh if kh == 3 else sh + 2


@compiled
def _forward(
    x, weight, shift, residual, y, p, band, group, taps, adds, low, high, panels, at_panel, first,
    last,
):  # fmt: skip
    """Compute the outputs of the groups from ``first`` to ``last``.

    Args:
        shift (O,): the first summand of each output.
        group: A, B, and the distances of the weights of two inputs and of two outputs, in kernels.
        adds: whether to add ``residual``.
    """
    _, _, _, _, oh, ow, kh, kw, sh, sw, top, _, dh, _, n = p
    lines, _, columns, size = band
    inputs, outputs, step_input, step_output = group
    panel = panels[at_panel : at_panel + size]
    clear(panel, 0, size)
    number = y.dtype.type
    row, count, tile = sw * columns * n, kh * kw, _tile_of(p)
    for g in range(first, last):
        for start in range(0, oh, lines):
            valid = min(lines, oh - start)
            for a in range(inputs):
                rows = (valid - 1) * sh + (kh - 1) * dh + 1
                _pack(x, p, columns, panel, g * inputs + a, start * sh - top, rows)
                adding = OWN if a > 0 else (RESIDUAL if adds else NOTHING)
                least = low if a == inputs - 1 else number(-np.inf)
                most = high if a == inputs - 1 else number(np.inf)
                for b in range(outputs):
                    o = g * outputs + b
                    at_weight = (g * inputs * outputs + a * step_input + b * step_output) * count
                    begin = shift[o] if a == 0 else number(0)
                    for line in range(0, valid, LINES if tile else 1):
                        at_x, at_y = line * sh * row, (o * oh + start + line) * ow * n
                        some = min(LINES, valid - line)
                        if tile == 1:
                            rows_of_3(
                                panel, at_x, row, taps, weight, at_weight, begin, y, at_y, ow * n,
                                residual, adding, least, most, some, ow * n,
                            )  # fmt: skip
                        elif tile == 2:
                            rows_of_3_by_2(
                                panel, at_x, row, taps, weight, at_weight, begin, y, at_y, ow * n,
                                residual, adding, least, most, some, ow * n,
                            )  # fmt: skip
                        elif tile == 3:
                            rows_of_5(
                                panel, at_x, row, taps, weight, at_weight, begin, y, at_y, ow * n,
                                residual, adding, least, most, some, ow * n,
                            )  # fmt: skip
                        elif tile == 4:
                            rows_of_5_by_2(
                                panel, at_x, row, taps, weight, at_weight, begin, y, at_y, ow * n,
                                residual, adding, least, most, some, ow * n,
                            )  # fmt: skip
                        else:
                            row_of_taps(
                                panel, at_x, taps, 0, count, weight, at_weight, begin, y, at_y,
                                residual, adding, least, most, ow * n,
                            )  # fmt: skip


@compiled
def _spread(
    dy, weight, dx, p, q, band, group, taps, starts, places, panels, at_panel, first, last
):  # fmt: skip
    """Compute the input gradient of the groups from ``first`` to ``last`` of a convolution with a
    stride.

    Args:
        p, q: the convolution, and the geometry of the copy of dy to a panel.
        band: the input rows per panel, the rows of a panel, its columns, its size.
        group: as for ``_forward``; A is that of dy.
        taps, starts: the taps of each phase of rows and columns, and where they begin.
        places: the first row that a tap reads, relative to an input's.
    """
    _, h, w, _, _, _, kh, kw, sh, sw, top, _, _, _, n = p
    lines, rows, columns, size = band
    inputs, outputs, _, step_output = group
    panel, line = panels[at_panel : at_panel + size], panels[at_panel + size :]
    clear(panel, 0, size)
    zero, none = dx.dtype.type(0), dx.dtype.type(np.inf)
    wide = (w + sw - 1) // sw * n
    for g in range(first, last):
        for start in range(0, h, lines):
            stop = min(start + lines, h)
            begin, end = (start + top) // sh, (stop - 1 + top) // sh
            for a in range(inputs):
                channel = panel[a * rows * columns * n :]
                _pack(
                    dy,
                    q,
                    columns,
                    channel,
                    g * inputs + a,
                    begin + places,
                    end - begin - places + 1,
                )
            for b in range(outputs):
                at_weight = (g * inputs * outputs + b * step_output) * kh * kw
                for row in range(start, stop):
                    at = ((row + top) // sh - begin) * columns * n
                    to = ((g * outputs + b) * h + row) * w * n
                    for phase in range(min(sw, w)):
                        here = (row + top) % sh * sw + phase
                        row_of_taps(
                            panel, at, taps, starts[here], starts[here + 1] - starts[here], weight,
                            at_weight, zero, line, phase * wide, panel, NOTHING, -none, none,
                            (w - phase + sw - 1) // sw * n,
                        )  # fmt: skip
                    for column in range(w):
                        copy_run(
                            dx, to + column * n, line, column % sw * wide + column // sw * n, n
                        )


@compiled
def _weights(
    x, dy, dweight, dbias, p, band, group, taps, with_bias, panels, at_panel, first, last
):  # fmt: skip
    """Compute the gradients of the weights, and with ``with_bias`` of the biases, of the groups
    from ``first`` to ``last``. group: A, B.
    """
    _, _, _, _, oh, ow, kh, kw, sh, sw, top, _, dh, _, n = p
    lines, _, columns, size = band
    inputs, outputs = group
    panel = panels[at_panel : at_panel + size]
    clear(panel, 0, size)
    row, count, padded = sw * columns * n, kh * kw, len(taps)
    sums = np.empty(inputs * outputs * padded, dtype=np.float64)
    for g in range(first, last):
        sums[:] = 0.0
        for start in range(0, oh, lines):
            valid = min(lines, oh - start)
            for a in range(inputs):
                rows = (valid - 1) * sh + (kh - 1) * dh + 1
                _pack(x, p, columns, panel, g * inputs + a, start * sh - top, rows)
                for b in range(outputs):
                    at_dy = ((g * outputs + b) * oh + start) * ow * n
                    for k in range(0, padded, DOTS):
                        dot_rows(
                            dy, at_dy, ow * n, panel, 0, sh * row, taps, k, valid, ow * n, sums,
                            (b * inputs + a) * padded + k,
                        )  # fmt: skip
        for pair in range(inputs * outputs):
            for tap in range(count):
                dweight[(g * inputs * outputs + pair) * count + tap] = sums[pair * padded + tap]
        if with_bias:
            for o in range(g * outputs, (g + 1) * outputs):
                total = 0.0
                for start in range(o * oh, (o + 1) * oh):
                    total += sum_of(dy[start * ow * n : (start + 1) * ow * n])
                dbias[o] = total


# --- the kernels ----------------------------------------------------------------------------------


class Saved(NamedTuple):
    """What a forward pass stores: x (C, *S, N)."""

    x: np.ndarray
    weight: np.ndarray
    with_bias: bool
    windows: Windows
    groups: int


def supports(x: np.ndarray, weight: np.ndarray, windows: Windows, groups: int) -> bool:
    """Return whether these kernels compute the case: one or two axes, float32 or float64, few
    channels per group, and int32 sizes.
    """
    if len(windows.size) > 2 or x.dtype.itemsize not in (4, 8) or windows.sparse:
        return False
    row = windows.out[-1] * x.shape[0] * x.itemsize
    few = max(weight.shape[1], len(weight) // groups) <= (_MOST if row >= _SHORT else _FEW)
    return few and 0 < x.size < 2**30 and weight.size < 2**30


def _in_parts(function: Callable[..., None], groups: int, work: int, size: int, dtype: Any) -> None:
    """Call ``function(panels, at_panel, first, last)`` on ranges of the groups, in parallel."""
    parts = pieces(groups, work)
    panels, size = buffers(len(parts), size, dtype)

    def run(i: int) -> None:
        function(panels, i * size, parts[i].start, parts[i].stop)

    in_parts(run, len(parts), work)


def _work(p: Plane, groups: int) -> int:
    return groups * p.n * p.o * p.oh * p.ow * p.c * p.kh * p.kw // PER_ELEMENT


def _convolve(
    x: np.ndarray, weight: np.ndarray, shift: np.ndarray, p: Plane, groups: int,
    steps: tuple[int, int], y: np.ndarray,
    *, residual: np.ndarray | None = None, low: float = -np.inf, high: float = np.inf,
) -> None:  # fmt: skip
    band, number = band_of(p, x.itemsize), y.dtype.type
    fixed = (
        read(x), read(weight), read(shift),
        read(none(x) if residual is None else residual), y.reshape(-1), tuple(p),
        tuple(band), (p.c, p.o, *steps), taps_of(p, band), residual is not None, number(low),
        number(high),
    )  # fmt: skip
    _in_parts(partial(_forward, *fixed), groups, _work(p, groups), band.size, x.dtype)


def _plane(x: np.ndarray, weight: np.ndarray, windows: Windows, groups: int) -> Plane:
    return Plane.of(windows, weight.shape[1], len(weight) // groups, x.shape[0])


def conv(
    x: np.ndarray, weight: np.ndarray, bias: Any, windows: Windows, groups: int, *, keep: bool
) -> Any:
    p = _plane(x, weight, windows, groups)
    xt, weight = np.ascontiguousarray(batch_last(x)), np.ascontiguousarray(weight)
    shift = np.zeros(len(weight), x.dtype) if bias is None else np.ascontiguousarray(bias)
    y = empty((len(weight), *windows.out, p.n), x.dtype)
    _convolve(xt, weight, shift, p, groups, (1, p.c), y)
    saved = Saved(xt, weight, bias is not None, windows, groups) if keep else None
    return batch_first(y), saved


def conv_backward(
    dy: np.ndarray,
    saved: Saved,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> Any:
    x, weight, with_bias, windows, groups = saved
    p = Plane.of(windows, weight.shape[1], len(weight) // groups, x.shape[-1])
    dyt = np.ascontiguousarray(batch_last(dy))
    dx = dweight = dbias = None
    if need_dweight or (with_bias and need_dbias):
        dweight, dbias = _weight_gradient(dyt, x, weight, p, groups, with_bias and need_dbias)
    if need_dx:
        dx = empty(x.shape, x.dtype)
        if p.sh == p.sw == 1:
            turned = np.ascontiguousarray(
                weight[(..., *(slice(None, None, -1),) * len(windows.size))]
            )
            none = np.zeros(len(x), x.dtype)
            _convolve(dyt, turned, none, p.adjoint(), groups, (p.c, 1), dx)
        else:
            _input_gradient(dyt, weight, p, groups, dx)
        dx = batch_first(dx)
    return dx, dweight if need_dweight else None, dbias


def _weight_gradient(
    dyt: np.ndarray, x: np.ndarray, weight: np.ndarray, p: Plane, groups: int, with_bias: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    band = band_of(p, x.itemsize)
    dweight, dbias = np.empty(weight.shape, x.dtype), np.empty(len(weight), x.dtype)
    fixed = (
        read(x), read(dyt), dweight.reshape(-1), dbias, tuple(p), tuple(band),
        (p.c, p.o), taps_of(p, band), with_bias,
    )  # fmt: skip
    _in_parts(partial(_weights, *fixed), groups, _work(p, groups), band.size, x.dtype)
    return dweight, dbias if with_bias else None


def _input_gradient(
    dyt: np.ndarray, weight: np.ndarray, p: Plane, groups: int, dx: np.ndarray
) -> None:
    plane, band, taps, starts, first = phases_of(p, dyt.itemsize, p.c)
    fixed = (
        read(dyt), read(weight), dx.reshape(-1), tuple(p), tuple(plane), tuple(band),
        (p.o, p.c, p.c, 1), taps, starts, first,
    )  # fmt: skip
    size = band.size + -(-p.w // p.sw) * p.sw * p.n
    _in_parts(partial(_spread, *fixed), groups, _work(p, groups), size, dyt.dtype)


def unit_into(
    y: np.ndarray,
    parts: list[np.ndarray],
    weight: np.ndarray,
    bias: Any,
    windows: Windows,
    groups: int,
    norm: ConvNorm | None,
    low: float | None,
    high: float | None,
) -> None:
    """Write the result of ``conv_unit``, without pooling, to y (O, *OUT, N)."""
    x, *residual = (np.ascontiguousarray(batch_last(part)) for part in parts)
    p = _plane(parts[0], weight, windows, groups)
    if norm is not None:
        weight, bias = norm.folded(weight, bias)
    shift = np.zeros(len(weight), weight.dtype) if bias is None else np.ascontiguousarray(bias)
    _convolve(
        x, np.ascontiguousarray(weight), shift, p, groups, (1, p.c), y,
        residual=residual[0] if residual else None,
        low=-np.inf if low is None else low, high=np.inf if high is None else high,
    )  # fmt: skip
