"""Convolution compiled by numba: straight from the input, without columns, with ReLU and max pooling where they follow.

With the batch last in memory, what one tap of the kernel reads for a row of outputs is a run of contiguous numbers (OW*N of them
at stride 1, N otherwise). So a row of outputs is a sum of runs, each times one weight, and stays in registers while all
taps of all channels are added (``jit_tiles.outer_tile``). Likewise, the gradient of a weight is the product of two runs, summed.
At the edges some taps see padding: the columns there are runs of their own, with the taps that see something.

Notation as in ops/conv.py: C in-channels, O out-channels, N batch, H, W/OH, OW the input and the output, KH, KW the kernel,
SH, SW the stride; PH, PW the pooled output; T taps.
"""

from functools import lru_cache
from itertools import product
from math import prod
from typing import Any, NamedTuple

import numpy as np

from portacnn.backends.jit import compiled
from portacnn.backends.jit_tiles import GRADS, ROWS, SPAN, TAPS, WIDTH, fetch, inner_tile, outer_edge, outer_tile
from portacnn.backends.threads import in_pieces, pieces
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import Windows
from portacnn.ops.workspace import empty, scratch

_NEAR = 400 << 10  # bytes that stay in a core's second-level cache beside other things
_PER_ELEMENT = 16  # multiply-adds that take about as long as one element of other loops


# --- geometry: which runs make up a row ------------------------------------------------------------------------------


class Plane(NamedTuple):
    """The geometry of a convolution over one or two axes, as one over two."""

    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    pads: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]
    out: tuple[int, int]

    @staticmethod
    def of(windows: Windows) -> "Plane | None":
        """None where there are more than two axes."""
        if len(windows.size) > 2:
            return None
        w, one = windows, len(windows.size) == 1
        return Plane(
            *(((1,) * one + axes) for axes in (w.size, w.kernel, w.stride)),  # type: ignore[arg-type]
            ((0, 0),) * one + w.pads,  # type: ignore[arg-type]
            (1,) * one + w.dilation,
            (1,) * one + w.out,
        )

    def spread(self) -> tuple[int, int]:
        """The extent of the output's gradient with SH-1 and SW-1 zeros between its numbers."""
        return tuple((o - 1) * s + 1 for o, s in zip(self.out, self.stride, strict=True))  # type: ignore[return-value]

    def adjoint(self) -> "Plane | None":
        """The convolution that leads the gradient back: of stride 1, over ``spread``. None where its padding is not one."""
        pads = []
        for n, k, d, given, (before, _) in zip(
            self.size, self.kernel, self.dilation, self.spread(), self.pads, strict=True
        ):
            reach = d * (k - 1)
            pads.append((reach - before, n + before - given))
        if min(min(pair) for pair in pads) < 0:
            return None
        return Plane(self.spread(), self.kernel, (1, 1), tuple(pads), self.dilation, self.size)  # type: ignore[arg-type]


class Runs(NamedTuple):
    """A convolution's rows as runs. Places are counted in elements from the input's first on, with the batch last.

    Attributes:
        rows: int64 (OH, 2): where the input's row under the output's begins; the class of the taps that see something.
        runs: int64 (R, 4): of a row of outputs: where in it; where in the input's row; how long; its class.
        taps: int32 (classes, C*T, 2): for each row's and run's class, the taps' places in the input and in the weight.
        counts: int64 (classes,): how many of them. The rest, up to a multiple of TAPS, repeat the last.
    """

    rows: np.ndarray
    runs: np.ndarray
    taps: np.ndarray
    counts: np.ndarray


def _axis(n: int, k: int, s: int, before: int, d: int, out: int) -> tuple[list[tuple[int, int]], list[int]]:
    """On one axis: the classes (first tap, tap after the last), and each output's class."""
    classes: list[tuple[int, int]] = []
    mine = []
    for o in range(out):
        seen = [t for t in range(k) if 0 <= o * s - before + t * d < n]
        ends = (seen[0], seen[-1] + 1) if seen else (0, 0)
        if ends not in classes:
            classes.append(ends)
        mine.append(classes.index(ends))
    return classes, mine


@lru_cache(maxsize=256)
def runs_of(plane: Plane, channels: int, n: int, steps: tuple[int, int], flipped: bool) -> Runs:
    """Work the runs out.

    Args:
        channels: of the input.
        n: the batch.
        steps: how far two channels' weights and two taps' lie apart for one output channel.
        flipped: the kernel's last tap comes first, as it does on the way back.
    """
    (h, w), (kh, kw), (sh, sw), ((top, _), (left, _)), (dh, dw), (oh, ow) = plane
    row_classes, of_row = _axis(h, kh, sh, top, dh, oh)
    run_classes, of_column = _axis(w, kw, sw, left, dw, ow)
    rows = np.array([((r * sh - top) * w * n, c * len(run_classes)) for r, c in enumerate(of_row)], dtype=np.int64)
    runs: list[list[int]] = []
    for column, kind in enumerate(of_column):
        if sw == 1 and runs and runs[-1][3] == kind:
            runs[-1][2] += n
        else:
            runs.append([column * n, (column * sw - left) * n, n, kind])
    tables = []
    for (top_tap, bottom_tap), (left_tap, right_tap) in product(row_classes, run_classes):
        tables.append(
            [
                (((c * h + i * dh) * w + j * dw) * n, c * steps[0] + steps[1] * _tap(i * kw + j, kh * kw, flipped))
                for c in range(channels)
                for i in range(top_tap, bottom_tap)
                for j in range(left_tap, right_tap)
            ]
        )
    taps = np.zeros((len(tables), -(-channels * kh * kw // TAPS) * TAPS, 2), dtype=np.int32)
    for table, places in zip(tables, taps, strict=True):
        if table:
            places[: len(table)] = table
            places[len(table) :] = table[-1]
    return Runs(rows, np.array(runs, dtype=np.int64), taps, np.array([len(t) for t in tables], dtype=np.int64))


def _tap(tap: int, taps: int, flipped: bool) -> int:
    return taps - 1 - tap if flipped else tap


# --- compiled --------------------------------------------------------------------------------------------------------


@compiled
def _row(x, rows, runs, taps, counts, weight, step_weight, bias, floor, row, channel, valid, y, at_y, step_y):
    """Outputs of one row, of ``valid`` channels from ``channel`` on, to y."""
    lanes = WIDTH // x.itemsize
    span = SPAN // x.itemsize
    for run in range(runs.shape[0]):
        kind = rows[row, 1] + runs[run, 3]
        at_x = rows[row, 0] + runs[run, 1]
        at_taps = kind * taps.shape[1] * 2
        start = at_y + runs[run, 0]
        length = runs[run, 2]
        i = 0
        while i + span <= length:
            outer_tile(
                x, at_x + i, taps, at_taps, counts[kind], weight, channel * step_weight, step_weight, bias, channel,
                floor, y, start + i, step_y, valid, 0,
            )  # fmt: skip
            i += span
        while i < length:
            outer_edge(
                x, at_x + i, taps, at_taps, counts[kind], weight, channel * step_weight, step_weight, bias, channel,
                floor, y, start + i, step_y, valid, length - i,
            )  # fmt: skip
            i += lanes


@compiled
def _fetch_row(x, rows, runs, taps, counts, row):
    """Ask for the input under a row of outputs that comes soon: runs of that many channels lie too far apart to be foreseen."""
    for run in range(runs.shape[0]):
        kind = rows[row, 1] + runs[run, 3]
        before = -1
        for tap in range(counts[kind]):
            place = taps[kind, tap, 0]
            if place - before > runs[run, 2] or before < 0:  # else it overlaps the one before
                fetch(x, rows[row, 0] + runs[run, 1] + place, runs[run, 2])
                before = place


@compiled
def _rows(x, rows, runs, taps, counts, weight, step_weight, bias, floor, y, width, channels, first, last):
    """A convolution's rows, in pieces of ROWS channels: those from ``first`` to ``last``, counted through."""
    blocks = (channels + ROWS - 1) // ROWS
    area = rows.shape[0] * width
    for piece in range(first, last):
        row, channel = piece // blocks, piece % blocks * ROWS
        valid = min(ROWS, channels - channel)
        at_y = channel * area + row * width
        if channel == 0 and row + 1 < rows.shape[0]:
            _fetch_row(x, rows, runs, taps, counts, row + 1)
        _row(x, rows, runs, taps, counts, weight, step_weight, bias, floor, row, channel, valid, y, at_y, area)


@compiled
def _pooled_rows(
    x, rows, runs, taps, counts, weight, step_weight, bias, width, channels, n,
    height, across, pool_height, pool_width, down, over, room, at_room, y, winner, keep, first, last,
):  # fmt: skip
    """The same with ReLU and max pooling: ``height`` rows of ``across`` outputs, windows ``down`` and ``over`` apart.

    ``winner`` takes the tap whose input the maximum is, or -1 where ReLU lets nothing through; room for one run, if it is not
    to ``keep``.
    """
    blocks = (channels + ROWS - 1) // ROWS
    step = pool_height * width
    none = y.dtype.type(-np.inf)
    for piece in range(first, last):
        out, channel = piece // blocks, piece % blocks * ROWS
        valid = min(ROWS, channels - channel)
        for i in range(pool_height):
            at = at_room + i * width
            _row(x, rows, runs, taps, counts, weight, step_weight, bias, none, out * down + i, channel, valid, room, at, step)
        for c in range(valid):
            for o in range(across):
                source = at_room + c * step + o * over * n
                place = (((channel + c) * height + out) * across + o) * n
                best = y[place : place + n]
                won = winner[place : place + n] if keep else winner
                best[:] = room[source : source + n]
                won[:n] = 0
                for i in range(pool_height):
                    for j in range(pool_width):
                        if i + j > 0:
                            at = source + i * width + j * n
                            _take(room[at : at + n], np.int8(i * pool_width + j), best, won)
                _rectify(best, won)


@compiled
def _rectify(best, won):
    """ReLU, where won is -1 if nothing goes through."""
    zero = best.dtype.type(0)
    for k in range(best.size):
        value, tap = best[k], won[k]
        won[k] = tap if value > zero else np.int8(-1)
        best[k] = zero if value < zero else value


@compiled
def _weight_lines(x, rows, runs, taps, counts, dy, at_dy, step_dy, row, lines, width, channels, sums, dweight):
    """Add to dweight what some rows of outputs, from ``row`` on, give; dy has all channels of them. All are of one class."""
    step = dweight.size // channels
    line_x = rows[row + 1, 0] - rows[row, 0] if lines > 1 else 0
    for channel in range(0, channels, GRADS):
        valid = min(GRADS, channels - channel)
        for run in range(runs.shape[0]):
            kind = rows[row, 1] + runs[run, 3]
            for tap in range(0, counts[kind], TAPS):
                inner_tile(
                    dy, at_dy + channel * step_dy + runs[run, 0], step_dy, valid, x, rows[row, 0] + runs[run, 1],
                    taps, (kind * taps.shape[1] + tap) * 2, runs[run, 2], lines, width, line_x, sums,
                )  # fmt: skip
                for c in range(valid):
                    for k in range(min(TAPS, counts[kind] - tap)):
                        dweight[(channel + c) * step + taps[kind, tap + k, 1]] += sums[c * TAPS + k]


@compiled
def _weight_rows(x, rows, runs, taps, counts, dy, at_dy, step_dy, width, channels, sums, dweight, first, last):
    """The same for rows of any classes, as many at a time as may stay in the cache; dy begins with the row ``first``."""
    most = max(1, _NEAR // ((GRADS + 2) * width * x.itemsize))
    row = first
    while row < last:
        lines = 1
        while lines < most and row + lines < last and rows[row + lines, 1] == rows[row, 1]:
            lines += 1
        at = at_dy + (row - first) * width
        _weight_lines(x, rows, runs, taps, counts, dy, at, step_dy, row, lines, width, channels, sums, dweight)
        row += lines


@compiled
def _gradients(x, rows, runs, taps, counts, dy, width, channels, dweight, dbias, first, last):
    """The gradients of weight and bias, over some rows."""
    dweight[:] = 0
    sums = np.empty(GRADS * TAPS, dtype=x.dtype)
    area = rows.shape[0] * width
    _weight_rows(x, rows, runs, taps, counts, dy, first * width, area, width, channels, sums, dweight, first, last)
    dbias[:] = 0
    for channel in range(channels):
        for row in range(first, last):
            dbias[channel] += _sum(dy[channel * area + row * width : channel * area + row * width + width])


@compiled
def _sum(run):
    total = run.dtype.type(0)
    for i in range(run.size):  # by its number: vectors are made of no other loop
        total += run[i]
    return total


@compiled
def _masked(dy, y, dz):
    """dz = dy where y > 0, else 0."""
    zero = dy.dtype.type(0)
    for i in range(dz.size):
        given = dy[i]
        dz[i] = given if y[i] > zero else zero


@compiled
def _unpool_rows(dy, winner, dz, at_dz, step_dz, width, channels, n, height, across, pool_height, pool_width, down, over,
                 row, count, dbias):  # fmt: skip
    """``count`` rows of the gradient before pooling and ReLU, those of the pooled row ``row``; and the bias's part."""
    zero = dy.dtype.type(0)
    for channel in range(channels):
        target = at_dz + channel * step_dz
        if count > pool_height or over > pool_width or across * over * n < width:
            dz[target : target + count * width] = zero
        total = dbias[channel]
        for o in range(across):
            place = ((channel * height + row) * across + o) * n
            given = dy[place : place + n]
            won = winner[place : place + n]
            for k in range(n):
                total += given[k] * (won[k] >= 0)
            for i in range(min(pool_height, count)):
                for j in range(pool_width):
                    at = target + i * width + (o * over + j) * n
                    _give(given, won, np.int8(i * pool_width + j), dz[at : at + n])
        dbias[channel] = total


@compiled
def _give(given, won, tap, into):
    """into = given where won is this tap, else 0."""
    zero = given.dtype.type(0)
    for k in range(into.size):
        value = given[k]
        into[k] = value if won[k] == tap else zero


@compiled
def _take(here, tap, best, won):
    """best = the larger one of best and here (NaN if there is one), and won says whose it is."""
    for k in range(best.size):
        new, old, number = here[k], best[k], won[k]
        wins = (new > old) | (new != new)
        best[k] = new if wins else old
        won[k] = tap if wins else number


@compiled
def _pooled_weight_rows(
    x, rows, runs, taps, counts, dy, winner, dz, step_dz, whole, width, channels, n,
    height, across, pool_height, pool_width, down, over, dweight, dbias, first, last,
):  # fmt: skip
    """The gradients of weight and bias through pooling and ReLU, over some pooled rows.

    Where dz is ``whole`` it takes all rows and is kept; else it has room for those under one pooled row.
    """
    dweight[:] = 0
    dbias[:] = 0
    sums = np.empty(GRADS * TAPS, dtype=x.dtype)
    for out in range(first, last):
        end = rows.shape[0] if out == height - 1 and whole else (out + 1) * down
        count = min(end, rows.shape[0]) - out * down
        if not whole:
            count = min(count, pool_height)
        at = out * down * width if whole else 0
        _unpool_rows(dy, winner, dz, at, step_dz, width, channels, n, height, across, pool_height, pool_width, down, over,
                     out, count, dbias)  # fmt: skip
        top = out * down
        bottom = top + min(count, pool_height)
        _weight_rows(x, rows, runs, taps, counts, dz, at, step_dz, width, channels, sums, dweight, top, bottom)


# --- the kernels -----------------------------------------------------------------------------------------------------


def _planes(x: np.ndarray, windows: Windows, groups: int) -> tuple[Plane, Plane] | None:
    """The convolution and its adjoint, where these kernels do them: over one or two axes, in float32 or float64."""
    plane = Plane.of(windows) if groups == 1 and x.dtype.itemsize in (4, 8) and 0 < x.size < 2**31 else None
    adjoint = plane and plane.adjoint()
    return (plane, adjoint) if plane and adjoint else None


def _steps(weight: np.ndarray) -> tuple[int, int]:
    """How far two channels and two output channels lie apart in the weight (O, C, *K)."""
    taps = prod(weight.shape[2:])
    return taps, taps * weight.shape[1]


def _bias(bias: np.ndarray | None, weight: np.ndarray) -> np.ndarray:
    return np.zeros(weight.shape[0], dtype=weight.dtype) if bias is None else np.ascontiguousarray(bias)


def _convolve(
    xt: np.ndarray, weight: np.ndarray, bias: np.ndarray, floor: float, y: np.ndarray, runs: Runs, step: int
) -> None:
    """xt (C, H, W, N) -> y (O, OH, OW, N), both in one piece; ``step``: how far two output channels' weights lie apart."""
    channels, height = y.shape[0], runs.rows.shape[0]
    width = y.size // (channels * height)
    floor = y.dtype.type(floor)
    arguments = xt.reshape(-1), *runs, weight.reshape(-1), step, bias, floor, y.reshape(-1), width, channels
    work = y.size * int(runs.counts.max())
    in_pieces(lambda s: _rows(*arguments, s.start, s.stop), height * -(-channels // ROWS), work // _PER_ELEMENT)


def _empty_out(x: np.ndarray, channels: int, out: tuple[int, ...]) -> np.ndarray:
    return empty(np.empty, (channels, *out, x.shape[0]), x.dtype)


def conv(x: np.ndarray, weight: np.ndarray, bias: Any, windows: Windows, groups: int, *, keep: bool) -> Any:
    planes = _planes(x, windows, groups)
    if planes is None:
        return NotImplemented
    return _forward(x, weight, bias, windows, planes, -np.inf, keep)


def _forward(
    x: np.ndarray, weight: np.ndarray, bias: Any, windows: Windows, planes: tuple[Plane, Plane], floor: float, keep: bool
) -> tuple[np.ndarray, Any]:
    xt, weight = np.ascontiguousarray(batch_last(x)), np.ascontiguousarray(weight)
    between, step = _steps(weight)
    y = _empty_out(x, weight.shape[0], windows.out)
    runs = runs_of(planes[0], x.shape[1], x.shape[0], (between, 1), False)
    _convolve(xt, weight, _bias(bias, weight), floor, y, runs, step)
    return batch_first(y), (xt, weight, bias is not None, windows, planes) if keep else None


def conv_backward(dy: np.ndarray, saved: Any, *, need_dx: bool = True) -> Any:
    xt, weight, with_bias, windows, (plane, adjoint) = saved
    dyt = np.ascontiguousarray(batch_last(dy))
    n, width = xt.shape[-1], plane.out[1] * xt.shape[-1]
    between, step = _steps(weight)
    runs = runs_of(plane, xt.shape[0], n, (between, 1), False)
    arguments = xt.reshape(-1), *runs, dyt.reshape(-1), width, weight.shape[0]
    work = dyt.size * prod(weight.shape[1:])
    dweight, dbias = _summed(lambda dw, db, s: _gradients(*arguments, dw, db, s.start, s.stop), plane.out[0], work, weight)
    dx = _lead_back(dyt, xt, weight, plane, adjoint) if need_dx else None
    return dx, dweight, dbias if with_bias else None


def _summed(work: Any, rows: int, size: int, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of weight and bias from every thread's, added in the order of the rows."""
    parts = pieces(rows, size // _PER_ELEMENT)
    dweights = scratch(np.empty, (len(parts), weight.size), weight.dtype)
    dbiases = np.empty((len(parts), weight.shape[0]), dtype=weight.dtype)
    in_pieces(lambda s: [work(dweights[i], dbiases[i], parts[i]) for i in range(s.start, s.stop)], len(parts), size // _PER_ELEMENT)
    return dweights.sum(axis=0).reshape(weight.shape), dbiases.sum(axis=0)


def _lead_back(dz: np.ndarray, xt: np.ndarray, weight: np.ndarray, plane: Plane, adjoint: Plane) -> np.ndarray:
    """The input's gradient: a convolution of dz (O, OH, OW, N) with the kernel turned round."""
    n, (sh, sw) = xt.shape[-1], plane.stride
    if (sh, sw) != (1, 1):
        spread = empty(np.empty, (dz.shape[0], *adjoint.size, n), dz.dtype)
        spread[...] = 0
        spread[:, ::sh, ::sw] = dz.reshape(dz.shape[0], *plane.out, n)
        dz = spread
    between, step = _steps(weight)
    dx = empty(np.empty, xt.shape, xt.dtype)
    runs = runs_of(adjoint, dz.shape[0], n, (step, 1), True)
    _convolve(dz, weight, np.zeros(xt.shape[0], dtype=xt.dtype), -np.inf, dx, runs, between)
    return batch_first(dx)


def _pools_in_place(pool: Windows) -> bool:
    """Whether the windows neither overlap nor hang over the edge: then each row of them belongs to rows of its own."""
    return pool.covers and max(pool.dilation) == 1 and all(s >= k for s, k in zip(pool.stride, pool.kernel, strict=True))


def conv_relu(
    x: np.ndarray, weight: np.ndarray, bias: Any, windows: Windows, groups: int, pool: Windows | None, *, keep: bool
) -> Any:
    planes = _planes(x, windows, groups)
    if planes is None or (pool is not None and (not _pools_in_place(pool) or prod(pool.kernel) > 127)):
        return NotImplemented
    if pool is None:
        y, saved = _forward(x, weight, bias, windows, planes, 0.0, keep)
        return y, (*saved, None, batch_last(y), None) if keep else None
    xt, weight = np.ascontiguousarray(batch_last(x)), np.ascontiguousarray(weight)
    between, step = _steps(weight)
    n, channels = x.shape[0], weight.shape[0]
    runs = runs_of(planes[0], x.shape[1], n, (between, 1), False)
    y = _empty_out(x, channels, pool.out)
    winner = empty(np.empty, y.shape, np.dtype(np.int8)) if keep else np.empty(n, dtype=np.int8)
    (kh, kw), (sh, sw), (ph, pw) = _pooling(pool)
    width = planes[0].out[1] * n
    items, work = ph * -(-channels // ROWS), channels * kh * ph * width * prod(weight.shape[1:]) // _PER_ELEMENT
    parts = pieces(items, work)
    room = scratch(np.empty, (len(parts) * ROWS * kh * width,), x.dtype)
    arguments = xt.reshape(-1), *runs, weight.reshape(-1), step, _bias(bias, weight), width, channels, n
    geometry = ph, pw, kh, kw, sh, sw

    def run(s: slice) -> None:
        for i in range(s.start, s.stop):
            at, ends = i * ROWS * kh * width, (parts[i].start, parts[i].stop)
            _pooled_rows(*arguments, *geometry, room, at, y.reshape(-1), winner.reshape(-1), keep, *ends)

    in_pieces(run, len(parts), work)
    return batch_first(y), (xt, weight, bias is not None, windows, planes, pool, y, winner) if keep else None


def _pooling(pool: Windows) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Kernel, stride and output of pooling, over two axes."""
    plane = Plane.of(pool)
    assert plane is not None  # as the convolution's was not
    return plane.kernel, plane.stride, plane.out


def conv_relu_backward(dy: np.ndarray, saved: Any, *, need_dx: bool = True) -> Any:
    xt, weight, with_bias, windows, (plane, adjoint), pool, y, winner = saved
    dyt = np.ascontiguousarray(batch_last(dy))
    channels, n = weight.shape[0], xt.shape[-1]
    if pool is None:
        dz = empty(np.empty, y.shape, y.dtype)
        flat = dyt.reshape(-1), y.reshape(-1), dz.reshape(-1)
        in_pieces(lambda s: _masked(*(array[s] for array in flat)), y.size, y.size)
        return conv_backward(batch_first(dz), (xt, weight, with_bias, windows, (plane, adjoint)), need_dx=need_dx)
    (kh, kw), (sh, sw), (ph, pw) = _pooling(pool)
    width = plane.out[1] * n
    between, _ = _steps(weight)
    runs = runs_of(plane, xt.shape[0], n, (between, 1), False)
    work = channels * kh * ph * width * prod(weight.shape[1:])
    height = plane.out[0] if need_dx else kh
    parts = len(pieces(ph, work // _PER_ELEMENT))
    dz = (
        empty(np.empty, (channels, *plane.out, n), dy.dtype)
        if need_dx
        else scratch(np.empty, (parts, channels, kh * width), dy.dtype, 1)
    )
    arguments = xt.reshape(-1), *runs, dyt.reshape(-1), winner.reshape(-1)
    sizes = height * width, need_dx, width, channels, n, ph, pw, kh, kw, sh, sw

    def run(dweight: np.ndarray, dbias: np.ndarray, s: slice, room: np.ndarray) -> None:
        _pooled_weight_rows(*arguments, room.reshape(-1), *sizes, dweight, dbias, s.start, s.stop)

    rooms = iter([dz] * parts if need_dx else dz)
    dweight, dbias = _summed(lambda dw, db, s: run(dw, db, s, next(rooms)), ph, work, weight)
    dx = _lead_back(dz, xt, weight, plane, adjoint) if need_dx else None
    return dx, dweight, dbias if with_bias else None
