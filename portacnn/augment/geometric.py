"""Transforms that move pixels: each draws an affine map (``maps.Map``) for each image. Masks and
boxes go along.

Notation: N images, H/W their size, h/w the size after a crop.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import cos, exp, log, radians, sin, sqrt, tan
from typing import Any, ClassVar

from portacnn.arguments import listed, pair, positive, real, share, told
from portacnn.augment.base import Batch, Draw, Transform, check_p, spaced, span
from portacnn.augment.maps import BITS, ONE, Map, mapped_boxes, warp
from portacnn.errors import ArgumentError, ShapeError
from portacnn.runtime import backend_of, is_float

Size = tuple[int, int]
_ZOOM = 16.0  # the strongest, either way


class Geometric(Transform):
    """Base class of transforms that move pixels. A subclass is a frozen dataclass with ``map``.

    Consecutive ones are applied in one warp; ``apply`` is that of one alone.

    Attributes:
        fill: the brightness of pixels from outside the image, 0 (black) to 1 (white). None
            continues the edge, for transforms that only interpolate with it.
    """

    p: float
    fill: float | None = None

    def __post_init__(self) -> None:
        check_p(self)
        if self.fill is not None:
            object.__setattr__(self, "fill", share("fill", self.fill))

    def map(self, draw: Draw, size: Size) -> Map:
        """Return the map of each image, for images of ``size`` (H, W)."""
        raise NotImplementedError

    def size(self, size: Size) -> Size:
        """Return the size of the images after this transform. Raises ShapeError."""
        return size

    def apply(self, batch: Batch, draw: Draw) -> None:
        _, _, height, width = batch.images.shape
        warp_batch(batch, self.drawn_map(draw, (height, width)), self.fill)

    def drawn_map(self, draw: Draw, size: Size) -> Map:
        """Return the map of each image: the identity for those that are not changed."""
        return self.map(draw, size).where(draw.applied(self.p))


def warp_batch(batch: Batch, map_: Map, fill: float | None) -> None:
    """Warp images, masks and boxes. Masks of floating point are interpolated as the images, others
    take the nearest pixel."""
    x, t = batch.images, batch.targets
    if t is not None and batch.has_masks:
        xp = backend_of(t).xp
        grouped = xp.reshape(t, (t.shape[0], -1, *t.shape[-2:]))
        float_ = is_float(xp, t.dtype)
        outside = None if fill is None else 0 if float_ else batch.fill
        made = warp(grouped, map_, outside, nearest=not float_)
        batch.targets = xp.reshape(made, (*t.shape[:-2], *map_.size))
    if batch.boxes is not None:
        batch.boxes = mapped_boxes(batch.boxes, map_, (x.shape[2], x.shape[3]))
    batch.images = warp(x, map_, None if fill is None else batch.level(fill))


@dataclass(frozen=True)
class Shift(Geometric):
    """Move images by whole pixels: by -``pixels`` to ``pixels`` along each axis.

    Args:
        pixels: one number, or (rows, columns).
        p: the share of images that are changed.
        fill: the brightness of pixels from outside the image, 0 (black) to 1 (white).
    """

    pixels: int | tuple[int, int] = 2
    p: float = 1.0
    fill: float = 0.0

    draws: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "pixels", pair("pixels", self.pixels, 0))

    def map(self, draw: Draw, size: Size) -> Map:
        return _moves(draw, 1, two(self.pixels), size)


@dataclass(frozen=True)
class HorizontalFlip(Geometric):
    """Mirror images left to right, with probability ``p``."""

    p: float = 0.5

    def map(self, draw: Draw, size: Size) -> Map:
        return Map(ONE, 0, 0, 0, -ONE, 0, size, whole=True)


@dataclass(frozen=True)
class VerticalFlip(Geometric):
    """Mirror images top to bottom, with probability ``p``."""

    p: float = 0.5

    def map(self, draw: Draw, size: Size) -> Map:
        return Map(-ONE, 0, 0, 0, ONE, 0, size, whole=True)


@dataclass(frozen=True)
class RandomCrop(Geometric):
    """Cut out a part at a random place, after adding a border.

    Args:
        padding: pixels of the border, one number, or (rows, columns).
        output_size: (h, w) of the part, or one number. None means the size of the images.
        p: the share of images that are changed. Below 1 only for parts of the images' own size.
        fill: the brightness of the border, 0 (black) to 1 (white).
    """

    padding: int | tuple[int, int] = 0
    output_size: int | tuple[int, int] | None = None
    p: float = 1.0
    fill: float = 0.0

    draws: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "padding", pair("padding", self.padding, 0))
        if self.output_size is not None:
            object.__setattr__(self, "output_size", pair("output_size", self.output_size, 1))
        _whole_batches(self, self.output_size)

    def size(self, size: Size) -> Size:
        if self.output_size is None:
            return size
        made, border = two(self.output_size), two(self.padding)
        if any(m > n + 2 * b for m, n, b in zip(made, size, border, strict=True)):
            raise ShapeError(
                f"RandomCrop: images {size} with padding {border} are smaller than "
                f"output_size={made}; use a larger padding"
            )
        return made

    def map(self, draw: Draw, size: Size) -> Map:
        made = self.size(size)
        offsets = []
        for k, (n, m, border) in enumerate(zip(size, made, two(self.padding), strict=True), 1):
            most = n + 2 * border - m
            # of the centres, doubled: at the first place the part begins at -border
            offsets.append((draw.whole(k, 0, most) * 2 + (m - n - 2 * border)) * ONE)
        shift = max(
            n + 2 * border - m for n, m, border in zip(size, made, two(self.padding), strict=True)
        )
        return Map(ONE, 0, offsets[0], 0, ONE, offsets[1], made, 1.0, float(shift), whole=True)


@dataclass(frozen=True)
class RandomResizedCrop(Geometric):
    """Cut out a part of random size, aspect ratio and place, and resize it.

    As torchvision's, but a part that would not fit is cut to the image's side. Reductions are not
    smoothed.

    Args:
        area: the part's share of the image: (low, high).
        ratio: how much the aspect ratio changes: (low, high); width over height.
        output_size: (h, w) of the result, or one number. None means the size of the images.
        p: the share of images that are changed. Below 1 only for the images' own size.
    """

    area: tuple[float, float] = (0.25, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    output_size: int | tuple[int, int] | None = None
    p: float = 1.0

    draws: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("area", "ratio"):
            low, high = span(name, getattr(self, name))
            positive(f"{name}[0]", low)
            object.__setattr__(self, name, (low, high))
        share("area[1]", self.area[1])
        if self.area[0] < _ZOOM**-2 or not 1 / _ZOOM <= self.ratio[0] <= self.ratio[1] <= _ZOOM:
            raise ArgumentError(
                f"area must be at least {_ZOOM**-2:g} and ratio in {1 / _ZOOM:g}..{_ZOOM:g}, got "
                f"area={self.area}, ratio={self.ratio}"
            )
        if self.output_size is not None:
            object.__setattr__(self, "output_size", pair("output_size", self.output_size, 1))
        _whole_batches(self, self.output_size)

    def size(self, size: Size) -> Size:
        return size if self.output_size is None else two(self.output_size)

    def map(self, draw: Draw, size: Size) -> Map:
        xp, made = draw.xp, self.size(size)
        root = draw.of(1, _fixed(tuple(sqrt(a) for a in spaced(*self.area))))
        wider, higher = (draw.of(2, table) for table in _aspects(*self.ratio))
        entries, offsets = [], []
        for k, factor in ((0, higher), (1, wider)):
            part = xp.minimum((root * factor) >> BITS, ONE)  # of the side
            rest = (ONE - part) * size[k]  # the centre's way to either side, doubled
            offsets.append((((draw.word(3 + k) >> 8) * (2 * rest + 1)) >> 24) - rest)
            entries.append((part * size[k]) // made[k])
        gain = max(n / m for n, m in zip(size, made, strict=True))
        shift = float(max(size))
        return Map(entries[0], 0, offsets[0], 0, entries[1], offsets[1], made, gain, shift)


@dataclass(frozen=True)
class Rotation(Geometric):
    """Rotate images about their centre.

    Args:
        degrees: largest angle either way, or (low, high); counterclockwise is positive.
        p: the share of images that are changed.
        fill: the brightness of pixels from outside the image, 0 (black) to 1 (white).
    """

    degrees: float | tuple[float, float] = 10.0
    p: float = 1.0
    fill: float = 0.0

    draws: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "degrees", _angles("degrees", self.degrees, 360.0))

    def map(self, draw: Draw, size: Size) -> Map:
        return _rotation(draw, 1, self.degrees, size)


@dataclass(frozen=True)
class Scale(Geometric):
    """Enlarge or reduce images about their centre; their size in pixels stays the same.

    Args:
        factor: (low, high): 2 shows everything twice as large. Factors are drawn evenly on a
            logarithmic scale.
        p: the share of images that are changed.
        fill: the brightness of the border of reduced images, 0 (black) to 1 (white).
    """

    factor: tuple[float, float] = (0.9, 1.1)
    p: float = 1.0
    fill: float = 0.0

    draws: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "factor", _factors("factor", self.factor))

    def map(self, draw: Draw, size: Size) -> Map:
        return _scaling(draw, 1, self.factor, size)


@dataclass(frozen=True)
class Affine(Geometric):
    """Scale, shear, rotate and move images, in this order.

    Args:
        degrees: of rotation: largest angle either way, or (low, high).
        translate: largest move along each axis, as a share of the image's side; whole pixels.
        scale: (low, high), as ``Scale``'s factor.
        shear: angle in degrees by which vertical lines lean: largest either way, or (low, high).
        p: the share of images that are changed.
        fill: the brightness of pixels from outside the image, 0 (black) to 1 (white).
    """

    degrees: float | tuple[float, float] = 10.0
    translate: float | tuple[float, float] = 0.1
    scale: tuple[float, float] = (0.9, 1.1)
    shear: float | tuple[float, float] = 0.0
    p: float = 1.0
    fill: float = 0.0

    draws: ClassVar[int] = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "degrees", _angles("degrees", self.degrees, 360.0))
        object.__setattr__(self, "shear", _angles("shear", self.shear, 60.0))
        object.__setattr__(self, "scale", _factors("scale", self.scale))
        given = listed(self.translate)
        rows, columns = given if isinstance(given, list | tuple) else (given, given)
        shares = share("translate", rows), share("translate", columns)
        object.__setattr__(self, "translate", shares)

    def map(self, draw: Draw, size: Size) -> Map:
        made = _scaling(draw, 1, self.scale, size)
        low, high = span("shear", self.shear)
        if (low, high) != (0.0, 0.0):
            table = _fixed(tuple(tan(radians(angle)) for angle in spaced(low, high)))
            gain = 1.0 + tan(radians(max(abs(low), abs(high))))
            lean = draw.of(2, table)
            made = Map(ONE, 0, 0, lean, ONE, 0, size, gain).after(made)
        if self.degrees != (0.0, 0.0):
            made = _rotation(draw, 3, self.degrees, size).after(made)
        rows, columns = (
            round(part * n) for part, n in zip(_shares(self.translate), size, strict=True)
        )
        return _moves(draw, 4, (rows, columns), size).after(made)


# --- parts ----------------------------------------------------------------------------------------


def two(value: Any) -> tuple[int, int]:
    """Return a field that ``pair`` has made (rows, columns), with its type."""
    return value


def _shares(value: Any) -> tuple[float, float]:
    return value  # checked by the constructor


def _whole_batches(transform: Any, output_size: Any) -> None:
    if output_size is not None and transform.p < 1.0:
        raise ArgumentError(
            f"{type(transform).__name__}: with output_size all images are changed, so p must be "
            f"1, got {transform.p:g}"
        )


def _angles(name: str, value: Any, most: float) -> tuple[float, float]:
    low, high = span(name, value)
    return real(name, low, least=-most, most=most), real(name, high, least=-most, most=most)


def _factors(name: str, value: Any) -> tuple[float, float]:
    value = listed(value)
    if not isinstance(value, list | tuple):
        raise ArgumentError(f"{name} must be (low, high), such as (0.9, 1.1), got {told(value)}")
    low, high = span(name, value)
    least = 1.0 / _ZOOM
    return real(name, low, least=least, most=_ZOOM), real(name, high, least=least, most=_ZOOM)


@lru_cache(maxsize=256)
def _fixed(values: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(round(value * ONE) for value in values)


@lru_cache(maxsize=256)
def _turns(low: float, high: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the cosines and sines of angles in degrees, times 2^16."""
    angles = [radians(angle) for angle in spaced(low, high)]
    return _fixed(tuple(map(cos, angles))), _fixed(tuple(map(sin, angles)))


@lru_cache(maxsize=256)
def _aspects(low: float, high: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the roots of aspect ratios and their inverses, times 2^16; even on a logarithmic
    scale."""
    halves = [log_ / 2 for log_ in spaced(log(low), log(high))]
    return _fixed(tuple(map(exp, halves))), _fixed(tuple(exp(-half) for half in halves))


@lru_cache(maxsize=256)
def _reductions(low: float, high: float) -> tuple[int, ...]:
    return _fixed(tuple(exp(-log_) for log_ in spaced(log(low), log(high))))


def _moves(draw: Draw, k: int, most: tuple[int, int], size: Size) -> Map:
    """Return moves by up to ``most`` (rows, columns), whole pixels, of the numbers k and k + 1."""
    rows, columns = most
    ty = draw.whole(k, -rows, rows) * (2 * ONE)
    tx = draw.whole(k + 1, -columns, columns) * (2 * ONE)
    return Map(ONE, 0, ty, 0, ONE, tx, size, 1.0, 2.0 * max(rows, columns), whole=True)


def _rotation(draw: Draw, k: int, degrees: Any, size: Size) -> Map:
    cosines, sines = _turns(*degrees)
    c, s = draw.of(k, cosines), draw.of(k, sines)
    # rows grow downwards: a counterclockwise turn of the picture reads clockwise
    return Map(c, s, 0, -s, c, 0, size, sqrt(2.0))


def _scaling(draw: Draw, k: int, factor: Any, size: Size) -> Map:
    low, _ = factor
    over = draw.of(k, _reductions(*factor))
    return Map(over, 0, 0, 0, over, 0, size, 1.0 / low)
