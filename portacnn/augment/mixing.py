"""Transforms that mix each image and its target with the previous image in the batch:
``MixUp`` and ``CutMix``. The first image of a batch is mixed with the last.

Class indices become class probabilities: (N, C), or for masks (N, C, H, W). Other targets are mixed
like the images. The loss must take such targets (``Loss.soft_targets``). Sample weights are mixed
in the same way.

Notation: N images, C classes, H/W the size of images; lam (N,) the share of an image's own target.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from typing import Any, ClassVar

from portacnn.arguments import real
from portacnn.augment.base import STEPS, Batch, Draw, Transform, check_p, per_sample
from portacnn.augment.maps import BITS, ONE
from portacnn.augment.pixels import rectangle
from portacnn.errors import ArgumentError
from portacnn.ops.layout import batch_first, batch_last
from portacnn.runtime import Array, backend_of, is_float


@dataclass(frozen=True)
class MixUp(Transform):
    """Add two images, and their targets, with shares lam and 1 - lam (Zhang et al., 2018).

    Args:
        alpha: lam is drawn from Beta(alpha, alpha), for each image. Small values mix little.
        p: the share of images that are changed.
    """

    alpha: float = 0.2
    p: float = 1.0

    draws: ClassVar[int] = 1
    looks_back: ClassVar[int] = 1
    images_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_p(self)
        object.__setattr__(self, "alpha", _alpha(self.alpha))

    def apply(self, batch: Batch, draw: Draw) -> None:
        _refuse_boxes(batch, self)
        lam = draw.of(1, beta_quantiles(self.alpha), batch.images.dtype)
        applied = draw.applied(self.p)
        if applied is not None:
            lam = draw.xp.where(applied, lam, 1.0)
        batch.images = _blended(batch.images, lam)
        _blend_targets(batch, lam)


@dataclass(frozen=True)
class CutMix(Transform):
    """Replace a rectangle of each image by that of another (Yun et al., 2019). Targets are mixed by
    the areas; masks are replaced in the rectangle.

    Args:
        alpha: the rectangle's share of the image is drawn from Beta(alpha, alpha), before parts
            that lie outside are cut off.
        p: the share of images that are changed.
    """

    alpha: float = 1.0
    p: float = 1.0

    draws: ClassVar[int] = 3
    looks_back: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_p(self)
        object.__setattr__(self, "alpha", _alpha(self.alpha))

    def apply(self, batch: Batch, draw: Draw) -> None:
        _refuse_boxes(batch, self)
        x, xp = batch.images, draw.xp
        side = draw.of(1, _sides(self.alpha))
        applied = draw.applied(self.p)
        if applied is not None:
            side = xp.where(applied, side, 0)
        ends = []
        for k, n in enumerate(x.shape[2:], 2):
            length = (side * n + (ONE >> 1)) >> BITS
            first = draw.whole(k, 0, n - 1) - (length >> 1)
            ends.append((xp.maximum(first, 0), xp.minimum(first + length, n)))
        (top, bottom), (left, right) = ends
        area = (bottom - top) * (right - left)
        lam = 1.0 - xp.astype(area, x.dtype) * (1.0 / (x.shape[2] * x.shape[3]))
        inside = rectangle(x, *ends)
        t = batch.targets
        batch.images = xp.where(inside, rolled(x), x)
        if t is not None and batch.has_masks:
            batch.targets = xp.where(inside[:, 0, ...] if t.ndim == 3 else inside, rolled(t), t)
            if batch.weights is not None:
                batch.weights = _blended(batch.weights, lam)
        else:
            _blend_targets(batch, lam)


def _alpha(value: Any) -> float:
    number = real("alpha", value, above=0.0)
    if not 0.01 <= number <= 100.0:
        raise ArgumentError(f"alpha must be in 0.01..100, got {number:g}")
    return number


def _refuse_boxes(batch: Batch, transform: Transform) -> None:
    if batch.boxes is not None:
        raise ArgumentError(
            f"{type(transform).__name__} does not mix boxes; leave it out of the list"
        )


def rolled(x: Array) -> Array:
    """Return x (N, ...) with sample i - 1 in place i and the last one first, in new memory, in the
    layout of the backend."""
    backend, n = backend_of(x), x.shape[0]
    last = backend.layout == "batch_last" and x.ndim >= 3
    inner = batch_last(x) if last else x
    made = backend.xp.empty(inner.shape, dtype=x.dtype, device=x.device)
    if last:
        made[..., :1] = inner[..., n - 1 :]
        if n > 1:
            made[..., 1:] = inner[..., : n - 1]
        return batch_first(made)
    made[:1, ...] = inner[n - 1 :, ...]
    if n > 1:
        made[1:, ...] = inner[: n - 1, ...]
    return made


def _blended(x: Array, lam: Array) -> Array:
    """Return lam * x + (1 - lam) * the sample before. Samples with lam 1 keep their bits."""
    y = rolled(x)
    y -= x
    y *= per_sample(1.0 - lam, x)
    y += x
    return y


def _blend_targets(batch: Batch, lam: Array) -> None:
    t, dtype = batch.targets, batch.images.dtype
    if t is not None:
        xp = backend_of(t).xp
        if is_float(xp, t.dtype):
            pass
        elif batch.classes is not None:
            t = shares(t, batch.classes, dtype)
        else:
            t = xp.astype(t, dtype)
        batch.targets = _blended(t, lam)
    if batch.weights is not None:
        batch.weights = _blended(batch.weights, lam)


def shares(t: Array, classes: int, dtype: Any) -> Array:
    """Return class indices (N, *S) as shares of classes (N, C, *S): 1 and 0."""
    xp = backend_of(t).xp
    t = xp.astype(t, xp.int64)
    every = xp.arange(classes, dtype=xp.int64, device=t.device)
    every = xp.reshape(every, (1, classes, *(1,) * (t.ndim - 1)))
    return xp.astype(t[:, None, ...] == every, dtype)


@lru_cache(maxsize=64)
def beta_quantiles(alpha: float) -> tuple[float, ...]:
    """Return values that stand for Beta(alpha, alpha): its quantiles at (k + 1/2) / STEPS.

    The density is integrated over x, or if alpha is below 1 over v = x^alpha, in which it is
    bounded. It is symmetric, so half of it is enough.
    """
    fine = 4 * STEPS
    below = alpha < 1.0
    end = 0.5**alpha if below else 0.5

    def density(at: float) -> float:
        if below:
            return float((1.0 - at ** (1.0 / alpha)) ** (alpha - 1.0))
        return float((at * (1.0 - at)) ** (alpha - 1.0))

    summed = [0.0]
    for k in range(fine):
        summed.append(summed[-1] + density(end * (k + 0.5) / fine))
    values, cell = [], 0
    for k in range(STEPS // 2):
        wanted = summed[-1] * (2 * k + 1) / STEPS
        while summed[cell + 1] < wanted:
            cell += 1
        part = (wanted - summed[cell]) / (summed[cell + 1] - summed[cell])
        at = end * (cell + part) / fine
        values.append(at ** (1.0 / alpha) if below else at)
    return (*values, *(1.0 - value for value in reversed(values)))


@lru_cache(maxsize=64)
def _sides(alpha: float) -> tuple[int, ...]:
    """Return the sides of rectangles, as shares of the image's, times 2^16."""
    return tuple(round(sqrt(part) * ONE) for part in beta_quantiles(alpha))
