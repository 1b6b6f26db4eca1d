"""Affine maps of images in whole numbers, and the warp that reads an image through one.

A map says for each pixel of the output where to read in the input. Coordinates are doubled and
relative to the centre, so that centres of pixels are whole numbers: row i of H is 2i - (H - 1).
Entries of a matrix are multiples of 2^-16, stored as int64. Thus all backends compute the same
coordinates to the bit, and read the same pixels.

    source row    = yy * row + yx * column + ty
    source column = xy * row + xx * column + tx

Maps that follow each other become one map and one warp, which is quicker, interpolates once, and
loses nothing at the edges in between.

The warp gathers with ``take`` from images with a border of the fill colour. Four pixels around the
source are read and weighted by distance (bilinear); or if a map moves whole pixels, one, which
changes no bits.

Notation: N images, C channels, H/W the input's size, h/w the output's.
"""

from dataclasses import dataclass
from typing import Any

from portacnn.ops.layout import batch_first, batch_last
from portacnn.runtime import Array, backend_of

BITS = 16
ONE = 1 << BITS
_LARGEST = 1 << 31
_BLOCK = 1 << 17
"""The number of pixels of a channel that are warped at a time, so that what is in between fits the
cache of a CPU."""


@dataclass(frozen=True)
class Map:
    """An affine map for each of N images. Entries are int64 (N,) or ints.

    Attributes:
        yy, yx, ty, xy, xx, tx: see the head of this file, times 2^16.
        size: (h, w) of the output.
        gain, shift: no source coordinate is larger than gain * largest output coordinate + shift.
        whole: whether it moves whole pixels: no fraction is ever read.
    """

    yy: Any
    yx: Any
    ty: Any
    xy: Any
    xx: Any
    tx: Any
    size: tuple[int, int]
    gain: float = 1.0
    shift: float = 0.0
    whole: bool = False

    def where(self, applied: Array | None) -> "Map":
        """Return this map for the samples that are changed, the identity for the others."""
        if applied is None:
            return self
        xp = backend_of(applied).xp

        def chosen(entry: Any, other: int) -> Any:
            if not hasattr(entry, "shape"):
                if entry == other:
                    return entry
                entry = xp.full(applied.shape, entry, dtype=xp.int64, device=applied.device)
            return xp.where(applied, entry, other)

        return Map(
            chosen(self.yy, ONE),
            chosen(self.yx, 0),
            chosen(self.ty, 0),
            chosen(self.xy, 0),
            chosen(self.xx, ONE),
            chosen(self.tx, 0),
            self.size,
            max(self.gain, 1.0),
            self.shift,
            self.whole,
        )

    def after(self, first: "Map | None") -> "Map":
        """Return the map of ``first`` and then this one: what this one reads, ``first`` made."""
        if first is None:
            return self
        a, b = first, self
        return Map(
            _sum(a.yy, b.yy, a.yx, b.xy),
            _sum(a.yy, b.yx, a.yx, b.xx),
            _sum(a.yy, b.ty, a.yx, b.tx) + a.ty,
            _sum(a.xy, b.yy, a.xx, b.xy),
            _sum(a.xy, b.yx, a.xx, b.xx),
            _sum(a.xy, b.ty, a.xx, b.tx) + a.tx,
            b.size,
            a.gain * b.gain,
            a.gain * b.shift + a.shift,
            a.whole and b.whole,
        )


def _sum(a: Any, b: Any, c: Any, d: Any) -> Any:
    """Return (a * b + c * d) / 2^16, rounded."""
    return (_times(a, b) + _times(c, d) + (ONE >> 1)) >> BITS


def _times(a: Any, b: Any) -> Any:
    for one, other in ((a, b), (b, a)):
        if not hasattr(one, "shape"):
            if one == 0:
                return 0
            if one == ONE and hasattr(other, "shape"):
                return other << BITS
    return a * b


class _Plane:
    """Arrays that broadcast to one channel, (h, w, N) or (N, h, w) as the backend prefers."""

    def __init__(self, like: Array) -> None:
        backend = backend_of(like)
        self.xp, self.last, self.device = backend.xp, backend.layout == "batch_last", like.device
        self.count = like.shape[0]

    def shaped(self, values: Any, axis: str) -> Any:
        """Return values (N,), (h,) or (w,) shaped to broadcast; ``axis``: n, h or w. Numbers are
        returned unchanged."""
        if not hasattr(values, "shape"):
            return values
        order = "hwn" if self.last else "nhw"
        return self.xp.reshape(values, tuple(-1 if letter == axis else 1 for letter in order))


def _sources(map_: Map, plane: _Plane, rows: tuple[int, int], dtype: Any) -> tuple[Any, Any]:
    """Return the doubled source coordinates of some output rows, relative to the centre: rows and
    columns, times 2^16; or if the map is whole, not times that."""
    xp, (h, w) = plane.xp, map_.size
    i = plane.shaped(xp.arange(*rows, dtype=dtype, device=plane.device) * 2 - (h - 1), "h")
    j = plane.shaped(xp.arange(w, dtype=dtype, device=plane.device) * 2 - (w - 1), "w")

    def entry(value: Any) -> Any:
        if map_.whole:
            value = value >> BITS
        if not hasattr(value, "shape"):
            return value
        return plane.shaped(xp.astype(value, dtype), "n")

    def total(along_rows: Any, along_columns: Any, offset: Any) -> Any:
        terms = [
            term * axis
            for term, axis in ((entry(along_rows), i), (entry(along_columns), j))
            if hasattr(term, "shape") or term != 0
        ]
        offset = entry(offset)
        if not terms:
            return i * 0 + offset
        first, *others = terms
        first = first + offset  # with the smaller of both: a row or a column
        return first + others[0] if others else first

    return total(map_.yy, map_.yx, map_.ty), total(map_.xy, map_.xx, map_.tx)


def warp(x: Array, map_: Map, fill: Any, nearest: bool = False) -> Array:
    """Return images (N, C, h, w) read from x (N, C, H, W) through the map, in the layout of the
    backend.

    Args:
        fill: the value outside the image: a number, or (1, C, 1, 1). None continues its edge.
        nearest: read the nearest pixel, without interpolation; x may have any dtype.
    """
    xp, plane = backend_of(x).xp, _Plane(x)
    n, channels, height, width = x.shape
    h, w = map_.size
    one = nearest or map_.whole
    source, (padded_h, padded_w) = _bordered(x, 0 if fill is None else fill, plane, 1 if one else 2)
    beyond = 0 if fill is None else 1  # pixels that may be read before and behind the image
    length = max(height, width)
    reach = max(map_.gain * max(h, w) + map_.shift, length) + length + 4
    scale = 1 if map_.whole else ONE
    small = reach * scale < _LARGEST and padded_h * padded_w * n < _LARGEST
    dtype = xp.int32 if small else xp.int64
    step = n if plane.last else 1  # from a pixel to the next in a row of the bordered image
    image = xp.arange(n, dtype=dtype, device=x.device)
    image = plane.shaped(image if plane.last else image * (padded_h * padded_w), "n")
    out = (channels, h, w, n) if plane.last else (n, channels, h, w)
    y = xp.empty(out, dtype=x.dtype, device=x.device)
    per_block = max(1, _BLOCK // max(w * n, 1))
    for top in range(0, h, per_block):
        rows = (top, min(top + per_block, h))
        block = (rows[1] - rows[0], w, n) if plane.last else (n, rows[1] - rows[0], w)
        sy, sx = _sources(map_, plane, rows, dtype)
        bits = 1 if map_.whole else BITS + 1
        half = 0 if map_.whole else ONE
        y0, dy = _cell(xp, sy, (-beyond, height - 1 + beyond), height, bits, half, one)
        x0, dx = _cell(xp, sx, (-beyond, width - 1 + beyond), width, bits, half, one)
        index = (y0 * padded_w + x0) * step + image
        index = xp.reshape(xp.broadcast_to(xp.astype(index, xp.int64), block), (-1,))
        if not one:
            dy, dx = (xp.astype(d, x.dtype) * (1.0 / (1 << bits)) for d in (dy, dx))
        for channel in range(channels):
            flat = xp.reshape(source[channel, ...], (-1,))

            def read(offset: int, flat: Array = flat, index: Array = index) -> Array:
                return xp.reshape(xp.take(flat[offset:], index, axis=0), block)  # noqa: B023

            if one:
                made = read(0)
            else:
                upper = _between(read(0), read(step), dx)
                lower = _between(read(padded_w * step), read((padded_w + 1) * step), dx)
                made = _between(upper, lower, dy)
            if plane.last:
                y[channel, rows[0] : rows[1], ...] = made
            else:
                y[:, channel, rows[0] : rows[1], :] = made
    return batch_first(y) if plane.last else y


def _cell(
    xp: Any, source: Any, ends: tuple[int, int], size: int, bits: int, half: int, one: bool
) -> tuple[Any, Any]:
    """Return the pixel to read in the bordered image, and the fraction beyond it times 2^bits.

    Args:
        source: doubled coordinates times 2^(bits - 1).
        ends: the first and the last pixel that may be read, counted from the image's first.
    """
    first, last = ends
    unit = 1 << (bits - 1)
    source = source + (size - 1) * unit  # from the first pixel
    if one:
        cell = (source + half) >> bits
        return xp.maximum(xp.minimum(cell, last), first) + 1, None
    source = xp.maximum(xp.minimum(source, last << bits), first * (1 << bits))
    return (source >> bits) + 1, source & ((1 << bits) - 1)


def _between(a: Array, b: Array, share: Array) -> Array:
    """Return a + share * (b - a), in b's memory."""
    b -= a
    b *= share
    b += a
    return b


def _bordered(x: Array, fill: Any, plane: _Plane, after: int) -> tuple[Array, tuple[int, int]]:
    """Return (C, H', W', N) or (C, N, H', W'): the images with one pixel of ``fill`` before each
    axis and ``after`` behind it; and (H', W')."""
    xp = plane.xp
    n, channels, height, width = x.shape
    high, wide = height + 1 + after, width + 1 + after
    inside = slice(1, height + 1), slice(1, width + 1)
    before: tuple[slice, ...]
    if plane.last:
        shape, before, inner = (channels, high, wide, n), (slice(None),), batch_last(x)
    else:
        shape, before = (channels, n, high, wide), (slice(None), slice(None))
        inner = xp.permute_dims(x, (1, 0, 2, 3))
    if hasattr(fill, "shape"):
        fill = xp.reshape(fill, (channels, 1, 1, 1))
    made = xp.empty(shape, dtype=x.dtype, device=x.device)
    made[(*before, slice(0, 1), ...)] = fill
    made[(*before, slice(height + 1, high), ...)] = fill
    made[(*before, inside[0], slice(0, 1), ...)] = fill
    made[(*before, inside[0], slice(width + 1, wide), ...)] = fill
    made[(*before, *inside, ...)] = inner
    return made, (high, wide)


def mapped_boxes(boxes: Array, map_: Map, size: tuple[int, int]) -> Array:
    """Return boxes (N, K, 4) as the warped images show them: the smallest upright boxes around
    them, cut off at the edges.

    Args:
        size: (H, W) of the images that the boxes are given for.
    """
    xp = backend_of(boxes).xp
    n = boxes.shape[0]

    def entry(value: Any) -> Any:
        if not hasattr(value, "shape"):
            return value / ONE
        return xp.reshape(xp.astype(value, boxes.dtype), (n, 1)) * (1.0 / ONE)

    yy, yx, ty, xy, xx, tx = map(entry, (map_.yy, map_.yx, map_.ty, map_.xy, map_.xx, map_.tx))
    (height, width), (h, w) = size, map_.size
    left, top, right, bottom = (boxes[:, :, i] for i in range(4))
    left, right = (side * 2.0 - width - tx for side in (left, right))
    top, bottom = (side * 2.0 - height - ty for side in (top, bottom))
    over = 1.0 / (yy * xx - yx * xy)
    rows, columns = [], []
    for row in (top, bottom):
        for column in (left, right):
            rows.append((xx * row - yx * column) * over)
            columns.append((yy * column - xy * row) * over)

    def edge(values: list[Array], length: int, outer: Any) -> Array:
        found = outer(outer(values[0], values[1]), outer(values[2], values[3]))
        return xp.maximum(xp.minimum((found + length) * 0.5, float(length)), 0.0)

    sides = (
        edge(columns, w, xp.minimum),
        edge(rows, h, xp.minimum),
        edge(columns, w, xp.maximum),
        edge(rows, h, xp.maximum),
    )
    return xp.stack(sides, axis=2)
