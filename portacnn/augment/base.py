"""``Transform``, the base class of all transforms; ``Draw``, the random numbers of a batch; and
``Batch``, what a transform changes.

A random number follows from (seed, epoch, index of the sample in its set) by the hash that dropout
uses (``ops.masks``), so it is the same on every backend, for any order and size of batches, and
after a training run was resumed. Nothing is stored. Transform number i of a list has the numbers
8i, ..., 8i + 7 of each sample: it draws the same if others are added after it.

Everything is array code on the device of the images. Nothing is copied to the host.

Notation: N images in the batch, C channels, H/W their size, K numbers for each.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from portacnn.arguments import AnswersKeywords, listed, real, share, told
from portacnn.errors import ArgumentError
from portacnn.losses.constants import on_device
from portacnn.ops.masks import hashed, sample_words
from portacnn.runtime import Array, backend_of

PER_TRANSFORM = 8
"""How many numbers of each sample belong to one transform. The first decides whether it applies."""
Range = tuple[tuple[float, ...], tuple[float, ...]]
"""The values of black and of white, one for all channels or one for each."""


class Transform(AnswersKeywords):
    """Base class of all transforms.

    A transform that you write is a frozen dataclass with ``apply``. Files cannot hold it, so it
    must be passed again when a training run is resumed.

        @dataclass(frozen=True)
        class Invert(Transform):
            p: float = 0.5
            def apply(self, batch, draw):
                x = batch.images
                inverted = batch.black + batch.white - x
                batch.images = draw.where_applied(self.p, inverted, x)

    Attributes:
        draws: the number of random numbers that it needs for each image, at most 7, besides the
            one that ``p`` takes.
        p: the share of images that it changes, 0 to 1.
        looks_back: how many images before an image in its batch change the result: 1 for those
            that mix each image with the one before it. A process that trains on a part of each
            batch then gets so many more.
    """

    p: float
    draws: ClassVar[int] = 0
    looks_back: ClassVar[int] = 0
    images_only: ClassVar[bool] = True
    """Whether it needs images (N, C, H, W); otherwise it takes any (N, C, ...)."""

    def apply(self, batch: "Batch", draw: "Draw") -> None:
        """Change ``batch``: replace its arrays by new ones."""
        raise NotImplementedError


class Draw:
    """The random numbers of one transform for a batch. Number k of each sample is a 32-bit word."""

    def __init__(self, like: Array, words: Array) -> None:
        self.like, self.words, self.xp = like, words, backend_of(like).xp

    def word(self, k: int) -> Array:
        """Return number k of each sample: int64 (N,) in 0..2^32 - 1."""
        return self.words[k, :]

    def applied(self, p: float) -> Array | None:
        """Return which samples are changed: bool (N,), or None for all."""
        return None if p >= 1.0 else self.word(0) < round(p * 2**32)

    def where_applied(self, p: float, changed: Array, x: Array) -> Array:
        """Return ``changed`` for the samples that are changed, and x for the others: (N, ...)."""
        applied = self.applied(p)
        return changed if applied is None else self.xp.where(per_sample(applied, x), changed, x)

    def whole(self, k: int, low: int, high: int) -> Array:
        """Return a whole number from low to high, both included: int64 (N,)."""
        return ((self.word(k) * (high - low + 1)) >> 32) + low

    def value(self, k: int, low: float, high: float) -> Array:
        """Return a number from low to high, in the dtype of the images: (N,)."""
        xp = self.xp
        return xp.astype(self.word(k) >> 8, self.like.dtype) * ((high - low) * 2.0**-24) + low

    def of(self, k: int, values: tuple[Any, ...], dtype: Any = None) -> Array:
        """Return one of ``values``, of ``dtype`` (int64): (N,). The same k gives the same place in
        tables of one length."""
        xp = self.xp
        table = on_device(values, self.like, xp.int64 if dtype is None else dtype)
        return xp.take(table, self.whole(k, 0, len(values) - 1), axis=0)


def drawn(like: Array, key: tuple[int, int], epoch: Any, indices: Array, count: int) -> list[Draw]:
    """Return the random numbers of ``count`` transforms, for samples with these indices."""
    xp = backend_of(like).xp
    first, second = sample_words(key, epoch, indices)
    numbers = xp.arange(count * PER_TRANSFORM, dtype=xp.int64, device=like.device)
    words = hashed(numbers[:, None], first[None, :], second[None, :])
    return [Draw(like, words[i * PER_TRANSFORM : (i + 1) * PER_TRANSFORM, :]) for i in range(count)]


@dataclass
class Batch:
    """A batch of images and what belongs to them.

    Attributes:
        images: (N, C, H, W), floating point.
        targets: (N, ...), or None. Arrays whose last axes are the images' H and W are masks.
        boxes: (N, K, 4) of (x1, y1, x2, y2) in pixels, floating point, or None.
        weights: (N,), or None.
        range: the values of black and white.
        classes: the number of classes, if integer targets are classes.
        fill: what a mask holds outside the image.
    """

    images: Array
    targets: Array | None = None
    boxes: Array | None = None
    weights: Array | None = None
    range: Range = ((0.0,), (1.0,))
    classes: int | None = None
    fill: int = 0

    @property
    def black(self) -> Any:
        """The value of black: a number, or (1, C, 1, ...)."""
        return self.level(0.0)

    @property
    def white(self) -> Any:
        """The value of white: a number, or (1, C, 1, ...)."""
        return self.level(1.0)

    def level(self, brightness: float) -> Any:
        """Return the value of a brightness, 0 for black to 1 for white: a number, or
        (1, C, 1, ...)."""
        black, white = self.range
        levels = tuple(b + brightness * (w - b) for b, w in zip(black, white, strict=True))
        if len(levels) == 1:
            return levels[0]
        xp, x = backend_of(self.images).xp, self.images
        return xp.reshape(on_device(levels, x), (1, len(levels), *(1,) * (x.ndim - 2)))

    @property
    def has_masks(self) -> bool:
        """Whether the targets are masks, which geometric transforms change too."""
        t, x = self.targets, self.images
        return t is not None and is_mask(tuple(t.shape), tuple(x.shape))


def is_mask(targets: tuple[int, ...], images: tuple[int, ...]) -> bool:
    """Return whether targets of this shape are masks of images of this shape."""
    return len(images) == 4 and len(targets) >= 3 and targets[-2:] == images[-2:]


def per_sample(values: Array, x: Array) -> Array:
    """Reshape (N,) to (N, 1, ...), which broadcasts to x."""
    return backend_of(values).xp.reshape(values, (values.shape[0], *(1,) * (x.ndim - 1)))


def span(name: str, value: Any, around: float = 0.0) -> tuple[float, float]:
    """Return (low, high) from a pair, or from a number a as around - a, around + a. Raises
    ArgumentError."""
    value = listed(value)
    if isinstance(value, list | tuple):
        if len(value) != 2:
            raise ArgumentError(f"{name} must be a number or (low, high), got {told(value)}")
        low, high = (real(name, number) for number in value)
        if low > high:
            raise ArgumentError(f"{name} must be (low, high) in this order, got {told(value)}")
        return low, high
    number = real(name, value, least=0.0)
    return around - number, around + number


def check_p(transform: Any) -> None:
    """Check ``transform.p``. Raises ArgumentError."""
    object.__setattr__(transform, "p", share("p", transform.p))


STEPS = 4096
"""The number of steps from the lowest to the highest value of a table."""


def spaced(low: float, high: float) -> tuple[float, ...]:
    """Return values at equal distances from low to high; one value if both are equal."""
    if low == high:
        return (low,)
    return tuple(low + (high - low) * k / STEPS for k in range(STEPS + 1))
