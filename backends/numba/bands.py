"""The blocking of ``depthwise``: bands of output rows, the panel of the input rows that a band
reads, and what each tap reads there. Plain numbers; offsets are counted in elements.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from portacnn.backends.numba.rows import DOTS, LINES
from portacnn.ops.windows import Plane

_NEAR = 96 << 10  # bytes of a panel


class Band(NamedTuple):
    """The blocking: the output rows per panel, and the panel of the input rows that they read."""

    lines: int
    rows: int
    columns: int  # per phase of the stride
    size: int  # elements of a panel


@lru_cache(maxsize=1024)
def band_of(p: Plane, itemsize: int) -> Band:
    """Return the blocking for planes with p.c inputs and p.o outputs in a group."""
    columns = -(-((p.ow - 1) * p.sw + (p.kw - 1) * p.dw + 1) // p.sw)
    row = p.sw * columns * p.n

    def rows(lines: int) -> int:
        # whole blocks of LINES, of which the last lines may be undefined
        return (-(-lines // LINES) * LINES - 1) * p.sh + (p.kh - 1) * p.dh + 1

    lines = max(LINES, (_NEAR // (row * itemsize) - (p.kh - 1) * p.dh) // p.sh)
    each = -(-p.oh // -(-p.oh // lines))  # of equal bands
    lines = min(-(-each // LINES) * LINES, p.oh)
    return Band(lines, rows(lines), columns, rows(lines) * row)


def _places(p: Plane, band: Band) -> list[tuple[int, int]]:
    """Return, for every tap, the offset of its run in a panel, and its index in the weight."""
    row = p.sw * band.columns
    return [
        ((i * p.dh * row + j * p.dw % p.sw * band.columns + j * p.dw // p.sw) * p.n, i * p.kw + j)
        for i in range(p.kh)
        for j in range(p.kw)
    ]


@lru_cache(maxsize=1024)
def taps_of(p: Plane, band: Band) -> np.ndarray:
    """Return the taps as int32 (T, 2), padded with copies of the last one to a multiple of DOTS."""
    places = _places(p, band)
    taps = np.array(places + places[-1:] * (-len(places) % DOTS), dtype=np.int32)
    taps.flags.writeable = False
    return taps


class Phases(NamedTuple):
    """The taps of an input gradient with a stride, by phase of the input's rows and columns."""

    plane: Plane  # the copy of dy to a panel
    band: Band
    taps: np.ndarray  # int32 (count, 2): the offset in the panel, and in the weight
    starts: np.ndarray  # int64 (SH*SW + 1): where the taps of a phase begin
    first: int  # the first row that a tap reads, relative to that of an input


@lru_cache(maxsize=1024)
def phases_of(p: Plane, itemsize: int, step: int) -> Phases:
    """Return the taps. ``step``: the distance of the weights of two channels of dy, in kernels."""
    across = [  # (phase, tap, shift)
        (b, j, (b + p.left - j * p.dw) // p.sw)
        for b in range(min(p.sw, p.w))
        for j in range(p.kw)
        if (b + p.left - j * p.dw) % p.sw == 0
    ]
    down = [
        (a, i, (a - i * p.dh) // p.sh)
        for a in range(p.sh)
        for i in range(p.kh)
        if (a - i * p.dh) % p.sh == 0
    ]
    lowest = min((shift for *_, shift in across), default=0)
    reach = (-(-(p.w - b) // p.sw) + shift for b, _, shift in across)
    columns = max(reach, default=1) - lowest
    first = min(shift for *_, shift in down)
    row = columns * p.n

    def rows(lines: int) -> int:
        return (lines + p.sh - 2) // p.sh - first + 1

    lines = max(1, (_NEAR // (row * itemsize * p.o) + first - 1) * p.sh)
    lines = -(-p.h // -(-p.h // lines))
    taps, starts = [], [0]
    for a in range(p.sh):
        for b in range(p.sw):
            taps += [
                (
                    ((o * rows(lines) + below - first) * columns + beside - lowest) * p.n,
                    o * step * p.kh * p.kw + i * p.kw + j,
                )
                for o in range(p.o)
                for c, i, below in down
                if c == a
                for d, j, beside in across
                if d == b
            ]
            starts.append(len(taps))
    plane = p._replace(h=p.oh, w=p.ow, sh=1, sw=1, left=-lowest)
    band = Band(lines, rows(lines), columns, p.o * rows(lines) * row)
    table = np.array(taps or [(0, 0)], dtype=np.int32), np.array(starts, dtype=np.int64)
    for array in table:
        array.flags.writeable = False
    return Phases(plane, band, *table, first)
