"""Transforms that change the values of pixels: brightness, contrast and holes.

Notation: N images, C channels, H/W their size.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from portacnn.arguments import pair, share
from portacnn.augment.base import Batch, Draw, Transform, check_p, per_sample, span
from portacnn.augment.geometric import two
from portacnn.errors import ArgumentError
from portacnn.runtime import Array, backend_of


@dataclass(frozen=True)
class _Scaling(Transform):
    """Base class of transforms that multiply the distance from a centre by a random factor."""

    factor: float | tuple[float, float] = 0.2
    p: float = 1.0

    draws: ClassVar[int] = 1
    images_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_p(self)
        object.__setattr__(self, "factor", _positive_span("factor", self.factor))


@dataclass(frozen=True)
class Brightness(_Scaling):
    """Multiply the brightness of images, from black, by a factor; clip to black and white.

    Args:
        factor: 0.2 draws factors from 0.8 to 1.2; or (low, high).
        p: the share of images that are changed.
    """

    def apply(self, batch: Batch, draw: Draw) -> None:
        batch.images = _scaled(batch, draw, self, batch.black)


@dataclass(frozen=True)
class Contrast(_Scaling):
    """Multiply the differences from the mean of each image by a factor; clip to black and white.

    The mean is over all channels.

    Args:
        factor: 0.2 draws factors from 0.8 to 1.2; or (low, high).
        p: the share of images that are changed.
    """

    def apply(self, batch: Batch, draw: Draw) -> None:
        batch.images = _scaled(batch, draw, self, _means(batch.images))


@dataclass(frozen=True)
class CutOut(Transform):
    """Fill a rectangle at a random place (DeVries and Taylor, 2017). Its centre is any pixel, so
    a part may lie outside.

    Args:
        size: (rows, columns) of the rectangle, or one number.
        p: the share of images that are changed.
        fill: the brightness inside, 0 (black) to 1 (white).
    """

    size: int | tuple[int, int] = 8
    p: float = 1.0
    fill: float = 0.0

    draws: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_p(self)
        object.__setattr__(self, "fill", share("fill", self.fill))
        object.__setattr__(self, "size", pair("size", self.size, 1))

    def apply(self, batch: Batch, draw: Draw) -> None:
        x, xp = batch.images, draw.xp
        ends = []
        for k, (n, length) in enumerate(zip(x.shape[2:], two(self.size), strict=True), 1):
            first = draw.whole(k, 0, n - 1) - length // 2
            ends.append((first, first + length))
        inside = rectangle(x, *ends)
        applied = draw.applied(self.p)
        if applied is not None:
            inside = inside & per_sample(applied, x)
        fill = batch.level(self.fill)
        if not hasattr(fill, "shape"):
            fill = xp.full((), fill, dtype=x.dtype, device=x.device)
        batch.images = xp.where(inside, fill, x)


def rectangle(x: Array, rows: tuple[Array, Array], columns: tuple[Array, Array]) -> Array:
    """Return which pixels of images x (N, C, H, W) lie in a rectangle: bool (N, 1, H, W), in the
    memory layout of the backend.

    Args:
        rows, columns: the first ones, and those behind the last: int64 (N,).
    """
    backend = backend_of(x)
    xp, last = backend.xp, backend.layout == "batch_last"
    sides = []
    for axis, (first, end) in ((0, rows), (1, columns)):
        at = xp.arange(x.shape[2 + axis], dtype=xp.int64, device=x.device)
        if last:
            at, first, end = at[:, None], first[None, :], end[None, :]
        else:
            at, first, end = at[None, :], first[:, None], end[:, None]
        sides.append((at >= first) & (at < end))
    down, across = sides
    if last:
        both = down[:, None, :] & across[None, :, :]
        return xp.permute_dims(both[None, ...], (3, 0, 1, 2))
    return (down[:, :, None] & across[:, None, :])[:, None, ...]


def _positive_span(name: str, value: Any) -> tuple[float, float]:
    low, high = span(name, value, 1.0)
    if low < 0.0:
        raise ArgumentError(f"{name} must be factors of 0 or more, got {low:g} to {high:g}")
    return low, high


def _scaled(batch: Batch, draw: Draw, transform: Any, center: Any) -> Array:
    """Return center + factor * (x - center), between black and white. Images that are not changed
    keep their bits."""
    x, xp = batch.images, draw.xp
    factor = per_sample(draw.value(1, *transform.factor), x)
    black, white = batch.black, batch.white
    applied = draw.applied(transform.p)
    if applied is not None:
        applied = per_sample(applied, x)
        one = xp.ones((), dtype=x.dtype, device=x.device)
        factor = xp.where(applied, factor, one)
        black = xp.where(applied, one * black, -xp.inf)
        white = xp.where(applied, one * white, xp.inf)
    y = x * factor
    y += center * (1.0 - factor)
    return xp.maximum(xp.minimum(y, white), black)


def _means(x: Array) -> Array:
    """Return the mean of each image, (N, 1, ...). Summed axis by axis, as one long sum in float32
    would round too much."""
    xp = backend_of(x).xp
    for axis in range(1, x.ndim):
        x = xp.mean(x, axis=axis, keepdims=True)
    return x
