"""Convolution compiled by numba: direct, without columns, optionally with ReLU and max pooling.

With the batch last in memory, the inputs that one tap of the kernel reads for a row of outputs are
a contiguous run. A row of outputs is therefore a sum of runs, each times one weight. It stays in
registers while all taps of all channels are added (``tiles.outer_tile``). Likewise, the gradient of
a weight is the dot product of two runs (``inner_tile``).

To make all runs contiguous, the input is copied to a *panel*: a few of its rows for some samples,
with zeros for the padding. With a stride, the columns that one tap reads are adjacent. A panel
stays in the L2 cache while every output channel reads it. The backward pass uses a panel too. It
holds the output's gradient before pooling and ReLU, which is therefore never written to memory.

Notation as in ops/conv.py: C in-channels, O out-channels, N batch, H, W/OH, OW the input and the
output, KH, KW the kernel, SH, SW the stride, DH, DW the dilation; PH, PW the pooled output, QH, QW
the pooling kernel, RH, RW its stride.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from portacnn.backends.numba.compile import compiled
from portacnn.backends.numba.emit import WIDTH
from portacnn.backends.numba.runs import clear, copy_run, finish_run, move_where, pool_run
from portacnn.backends.numba.tiles import (
    GRADS,
    ROWS,
    SPAN,
    TAPS,
    inner_tile,
    outer_edge,
    outer_tile,
)
from portacnn.ops.windows import Plane

_NEAR = 256 << 10  # bytes of a panel, which stays in a core's L2 cache with other data
# the most samples in a panel, whole vectors; neighbouring taps then share lines of the L1 cache
_SAMPLES = 32
_FEW = 8  # below so many samples, they are pooled one by one


class Panel(NamedTuple):
    """The blocking of a convolution: ``lines`` output rows of ``samples`` of the batch at a time,
    and their panel.
    """

    lines: int
    samples: int
    rows: int  # input rows of these lines
    columns: int  # columns per phase of the stride
    # the distance of two lines in the output buffer; if it is that of the panel, one run covers all
    # lines
    pitch: int


class Taps(NamedTuple):
    """int32 (C*KH*KW, 2), for a panel of this many samples: the offset of each tap in the panel and
    in one output channel's weights.

    Padded with copies of the last tap to a multiple of TAPS.
    """

    places: np.ndarray
    count: int


@lru_cache(maxsize=1024)
def panel_of(p: Plane, itemsize: int, whole: int) -> Panel:
    """Return the blocking: at most ``_NEAR`` bytes, lines a multiple of ``whole``."""
    lanes = WIDTH // itemsize
    columns = -(-((p.ow - 1) * p.sw + (p.kw - 1) * p.dw + 1) // p.sw)

    def rows(lines: int) -> int:
        return (lines - 1) * p.sh + (p.kh - 1) * p.dh + 1

    def panel_bytes(lines: int, samples: int) -> int:
        return p.c * rows(lines) * p.sw * columns * samples * itemsize

    samples = min(p.n, _SAMPLES)
    while samples > lanes and panel_bytes(whole, samples) > _NEAR:
        samples //= 2
    most = -(-p.oh // whole)
    groups = next(
        (g for g in range(1, most) if panel_bytes(-(-most // g) * whole, samples) <= _NEAR), most
    )
    lines = -(-most // groups) * whole
    flows = p.sh == p.sw == 1 and p.ow * samples * itemsize < 2 * SPAN
    return Panel(lines, samples, rows(lines), columns, (columns if flows else p.ow) * samples)


@lru_cache(maxsize=1024)
def taps_of(p: Plane, panel: Panel, samples: int, steps: tuple[int, int], turned: bool) -> Taps:
    """Return the taps of a panel that holds ``samples``.

    Args:
        steps: the stride of the weights along the input channels, and along the taps.
        turned: order the taps from last to first, as in the backward pass.
    """
    row = p.sw * panel.columns
    places = [
        (
            ((c * panel.rows + i * p.dh) * row + j * p.dw % p.sw * panel.columns + j * p.dw // p.sw)
            * samples,
            c * steps[0]
            + steps[1] * (p.kh * p.kw - 1 - (i * p.kw + j) if turned else i * p.kw + j),
        )
        for c in range(p.c)
        for i in range(p.kh)
        for j in range(p.kw)
    ]
    return Taps(np.array(places + places[-1:] * (-len(places) % TAPS), dtype=np.int32), len(places))


# --- compiled: panels -----------------------------------------------------------------------------


@compiled
def _pack(x, p, panel, rows, columns, first, start, samples):
    """Fill the panel with input rows from ``first`` on, for ``samples`` from ``start`` on."""
    c, h, w, _, _, _, _, _, _, sw, _, left, _, _, n = p
    at = 0
    seen = min(columns - left, w)
    for channel in range(c):
        for row in range(first, first + rows):
            if not 0 <= row < h:
                clear(panel, at, sw * columns * samples)
                at += sw * columns * samples
                continue
            line = (channel * h + row) * w
            if sw == 1 and samples == n:  # all columns are one run
                clear(panel, at, left * n)
                copy_run(panel, at + left * n, x, line * n, seen * n)
                clear(panel, at + (left + seen) * n, (columns - left - seen) * n)
                at += columns * n
                continue
            for phase in range(sw):
                for column in range(columns):
                    come = column * sw + phase - left
                    if 0 <= come < w:
                        copy_run(panel, at, x, (line + come) * n + start, samples)
                    else:
                        clear(panel, at, samples)
                    at += samples


@compiled
def gradient_places(size, apart, given, kernel, stride, first, count):
    """Return, for ``count`` positions of a panel from ``first`` on along one axis, the index in dy
    (-1: none) and the tap.

    Args:
        size: of the output before pooling; apart: the distance of its elements in the panel.
        given: size of the pooled output, or 0 without pooling; kernel, stride: those of pooling.
    """
    places = np.full((count, 2), -1, dtype=np.int64)
    for i in range(count):
        place = first + i
        if place < 0 or place % apart or place // apart >= size:
            continue
        place //= apart
        if given == 0:
            places[i, 0], places[i, 1] = place, 0
        elif place // stride < given and place % stride < kernel:
            places[i, 0], places[i, 1] = place // stride, place % stride
    return places


@compiled
def _run_of_places(places):
    """Return the start and the length of the positions with an index; length 0 if there are
    gaps.
    """
    before = 0
    while before < places.shape[0] and places[before, 0] < 0:
        before += 1
    seen = 0
    while before + seen < places.shape[0] and places[before + seen, 0] >= 0:
        seen += 1
    for i in range(before + seen, places.shape[0]):
        if places[i, 0] >= 0:
            return before, 0
    return before, seen


@compiled
def pack_gradient(dy, y, winner, p, pool, panel, rows, first, count, columns, start, samples):
    """Fill the panel with the output's gradient before pooling and ReLU.

    Args:
        dy: the gradient after them; y: the output, or winner: the winning taps of pooling; either
            may be empty.
        p: the convolution of the forward pass; pool: PH, PW, QH, QW, RH, RW, with PH = 0 if there
            is none.
        rows, columns: the results of ``gradient_places``; ``count`` of the rows from ``first`` on.
    """
    _, _, _, o, oh, ow, _, _, _, _, _, _, _, _, n = p
    height, width = (pool[0], pool[1]) if pool[0] else (oh, ow)
    at, zero = 0, dy.dtype.type(0)
    before, seen = _run_of_places(columns)
    one_run = pool[0] == 0 and samples == n and seen > 0
    for channel in range(o):
        for row in range(first, first + count):
            if rows[row, 0] < 0:
                clear(panel, at, columns.shape[0] * samples)
                at += columns.shape[0] * samples
                continue
            line = (channel * height + rows[row, 0]) * width
            if one_run:
                source = (line + columns[before, 0]) * n
                clear(panel, at, before * n)
                if y.size:
                    move_where(panel, at + before * n, dy, y, source, zero, seen * n)
                else:
                    copy_run(panel, at + before * n, dy, source, seen * n)
                clear(panel, at + (before + seen) * n, (columns.shape[0] - before - seen) * n)
                at += columns.shape[0] * n
                continue
            for column in range(columns.shape[0]):
                if columns[column, 0] < 0:
                    clear(panel, at, samples)
                else:
                    source = (line + columns[column, 0]) * n + start
                    if pool[0]:
                        tap = np.int8(rows[row, 1] * pool[3] + columns[column, 1])
                        move_where(panel, at, dy, winner, source, tap, samples)
                    elif y.size:
                        move_where(panel, at, dy, y, source, zero, samples)
                    else:
                        copy_run(panel, at, dy, source, samples)
                at += samples


# --- compiled: from panels to results -------------------------------------------------------------


@compiled
def _lines(
    panel,
    rows,
    taps,
    count,
    weight,
    step_weight,
    bias,
    channel,
    valid,
    lines,
    step,
    run,
    out,
    pitch,
):
    """Compute ``lines`` output rows of ``valid`` channels from ``channel`` on and write them to
    ``out`` channel by channel.
    """
    lanes, span = WIDTH // panel.itemsize, SPAN // panel.itemsize
    step_out = lines * pitch
    if step == pitch:  # the lines are one run, with undefined elements between them
        run += (lines - 1) * pitch
        lines = 1
    for line in range(lines):
        i = 0
        while i < run:
            if i + span <= run:
                outer_tile(
                    panel, line * step + i, taps, 0, count, weight, channel * step_weight,
                    step_weight, bias, channel,
                    out, line * pitch + i, step_out, valid, 0,
                )  # fmt: skip
                i += span
            else:
                outer_edge(
                    panel, line * step + i, taps, 0, count, weight, channel * step_weight,
                    step_weight, bias, channel,
                    out, line * pitch + i, step_out, valid, min(lanes, run - i),
                )  # fmt: skip
                i += lanes


@compiled
def _write_out(
    out, valid, lines, height, pitch, p, y, channel, row, start, samples, scale, shift, residual,
    adds, low, high,
):  # fmt: skip
    """Write y (O, OH, OW, N) after the epilogue."""
    _, _, _, _, oh, ow, _, _, _, _, _, _, _, _, n = p
    for c in range(valid):
        factor, offset = scale[channel + c], shift[channel + c]
        for line in range(lines):
            to, at = ((channel + c) * oh + row + line) * ow * n, (c * height + line) * pitch
            if samples == n:
                finish_run(y, to, out, at, factor, offset, residual, to, adds, low, high, ow * n)
                continue
            for column in range(ow):
                there = to + column * n + start
                finish_run(
                    y, there, out, at + column * samples, factor, offset, residual, there, adds,
                    low, high, samples,
                )  # fmt: skip


@compiled
def pool_out(
    out, valid, lines, height, pitch, p, pool, y, winner, keep, channel, row, start, samples
):
    """Write the maxima after ReLU to y (O, PH, PW, N). ``winner`` receives the tap of each maximum,
    or -1 if ReLU returns 0.
    """
    n = p[14]
    ph, pw, qh, qw, rh, rw = pool
    for c in range(valid):
        for group in range(row // rh, min((row + lines - qh) // rh + 1, ph)):
            at = (c * height + group * rh - row) * pitch
            to = ((channel + c) * ph + group) * pw * n + start
            if samples == n < _FEW and not keep:
                _pool_few(out, at, pitch, samples, pw, qh, qw, rw, y, winner, to)
                continue
            for o in range(pw):
                here = at + o * rw * samples
                pool_run(out, here, pitch, samples, qh, qw, y, winner, to + o * n, keep, samples)


@compiled
def _pool_few(out, at, pitch, samples, pw, qh, qw, rw, y, winner, to):
    """Pool one row of a whole batch of fewer samples than a vector: first over its rows, as one
    run, then over its columns.
    """
    length = ((pw - 1) * rw + qw) * samples
    pool_run(out, at, pitch, 0, qh, 1, out, winner, at, False, length)
    row = out[at : at + length]
    into = y[to : to + pw * samples]
    for o in range(pw):
        for k in range(samples):
            best = row[o * rw * samples + k]
            for j in range(1, qw):
                value = row[(o * rw + j) * samples + k]
                best = value if (value > best) | (value != value) else best
            into[o * samples + k] = best


@compiled
def _piece(piece, p, cut):
    """Return the first row, number of lines, first sample and number of samples of a piece."""
    lines, samples = cut[0], cut[1]
    blocks = (p[14] + samples - 1) // samples
    # neighbouring pieces share cache lines
    row, start = piece // blocks * lines, piece % blocks * samples
    return row, min(lines, p[4] - row), start, min(samples, p[14] - start)


@compiled
def forward_pieces(
    x, given, won, back, apart, p, cut, pool, taps, taps_last, count, weight, step_weight, bias,
    scale, shift, residual, adds, low, high,
    panel, at_panel, out, at_out, y, winner, keep, first, last,
):  # fmt: skip
    """Compute the pieces from ``first`` to ``last`` of a convolution; with ``back``, of the input
    gradient of that convolution.
    """
    _, _, _, o, _, ow, _, _, sh, sw, top, left, _, _, _ = p
    _, full, rows, columns, pitch = cut
    panel, out = panel[at_panel:], out[at_out:]
    heights = gradient_places(back[4], apart[0], pool[0], pool[2], pool[4], -top, p[4] + rows)
    widths = gradient_places(
        back[5], apart[1], pool[1] if pool[0] else 0, pool[3], pool[5], -left, columns
    )
    for piece in range(first, last):
        row, lines, start, samples = _piece(piece, p, cut)
        under = rows - (cut[0] - lines) * sh
        if back[0]:
            pack_gradient(
                x, given, won, back, pool, panel, heights, row, rows, widths, start, samples
            )
        else:
            _pack(x, p, panel, rows, columns, row * sh - top, start, samples)
        places = taps if samples == full else taps_last
        step = sh * sw * columns * samples
        line = pitch // full * samples
        for channel in range(0, o, ROWS):
            valid = min(ROWS, o - channel)
            _lines(
                panel,
                under,
                places,
                count,
                weight,
                step_weight,
                bias,
                channel,
                valid,
                lines,
                step,
                ow * samples,
                out,
                line,
            )
            if pool[0] and not back[0]:
                pool_out(
                    out,
                    valid,
                    lines,
                    lines,
                    line,
                    p,
                    pool,
                    y,
                    winner,
                    keep,
                    channel,
                    row,
                    start,
                    samples,
                )
            else:
                _write_out(
                    out, valid, lines, lines, line, p, y, channel, row, start, samples, scale,
                    shift, residual, adds, low, high,
                )  # fmt: skip


@compiled
def weight_pieces(
    x, dy, y, winner, p, cut, pool, taps, taps_last, count, panel, at_panel, grad, at_grad,
    dweight, dbias, first, last
):  # fmt: skip
    """Compute the gradients of weight and bias from the pieces ``first`` to ``last``."""
    _, _, _, o, _, ow, _, _, sh, sw, top, _, _, _, _ = p
    _, full, rows, columns, _ = cut
    panel, grad = panel[at_panel:], grad[at_grad:]
    chunks = (count + TAPS - 1) // TAPS
    sums = np.zeros((o + GRADS - 1) // GRADS * chunks * GRADS * TAPS, dtype=x.dtype)
    dbias[:] = 0
    heights = gradient_places(p[4], 1, pool[0], pool[2], pool[4], 0, p[4])
    widths = gradient_places(ow, 1, pool[1] if pool[0] else 0, pool[3], pool[5], 0, ow)
    for piece in range(first, last):
        row, lines, start, samples = _piece(piece, p, cut)
        _pack(x, p, panel, rows, columns, row * sh - top, start, samples)
        pack_gradient(dy, y, winner, p, pool, grad, heights, row, lines, widths, start, samples)
        places = taps if samples == full else taps_last
        run = ow * samples
        step = lines * run
        for channel in range(0, o, GRADS):
            valid = min(GRADS, o - channel)
            for chunk in range(chunks):
                inner_tile(
                    grad, channel * step, step, valid, panel, 0, places, chunk * TAPS * 2, run,
                    lines, run,
                    sh * sw * columns * samples, sums,
                    (channel // GRADS * chunks + chunk) * GRADS * TAPS,
                )  # fmt: skip
        for channel in range(o):
            dbias[channel] += sum_of(grad[channel * step : channel * step + step])
    for channel in range(o):
        for tap in range(count):
            block = channel // GRADS * chunks + tap // TAPS
            dweight[channel * (dweight.size // o) + taps[tap, 1]] = sums[
                block * GRADS * TAPS + channel % GRADS * TAPS + tap % TAPS
            ]


@compiled
def sum_of(run):
    """Return the sum of a run."""
    total = run.dtype.type(0)
    for i in range(run.size):  # the form of loop that numba vectorizes
        total += run[i]
    return total
