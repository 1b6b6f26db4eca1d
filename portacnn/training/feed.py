"""Supply batches, either from a set that is on the device or from one that is sent there batch by
batch.

A set keeps its dtype, uint8 if possible, and is converted to floats batch by batch
(``Model.batch``). It is copied to the device once if it needs at most half of the free memory
there; the network needs the rest. Otherwise it stays on the host, and the next batch is transferred
while the device works on the current one.

Notation: N images in the set, B in a batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from math import prod
from typing import Any

from portacnn.data.targets import sample_weights
from portacnn.errors import ArgumentError, NotFiniteError
from portacnn.losses import Loss
from portacnn.models import Model
from portacnn.runtime import Array, HostArray, backend_of, describe, dtype_name, is_float

_LOOKED_AT = 1 << 28
"""Largest number of bytes of images that a fingerprint covers: all of a smaller set, else images
spread over the set."""


_CHUNK = 1 << 24  # bytes that are fetched from the device at a time


def fits(nbytes: int, free: int | None) -> bool:
    """Return whether a set of ``nbytes`` goes to a device with ``free`` bytes. None means the
    host's own memory."""
    return free is None or nbytes <= free // 2


@dataclass(frozen=True)
class Samples:
    """A checked set of images, their targets, and a weight for each of them.

    Attributes:
        images: as ``Model.accept`` returns them, on the model's device, or NumPy arrays of the same
            dtype if they do not fit there.
        targets: (N, ...) as ``Loss.check_targets`` returns them, on the device.
        weights: (N,) of the model's dtype, on the device, or None.
    """

    images: Array
    targets: Array
    weights: Array | None = None

    @property
    def parts(self) -> tuple[Array, ...]:
        """The arrays besides the images."""
        return (self.targets,) if self.weights is None else (self.targets, self.weights)

    @property
    def count(self) -> int:
        """The number of images."""
        return int(self.images.shape[0])

    def first(self, count: int | None) -> "Samples":
        """Return the first ``count`` samples; None returns all."""
        if count is None or count >= self.count:
            return self
        weights = None if self.weights is None else self.weights[:count]
        return Samples(self.images[:count, ...], self.targets[:count, ...], weights)


class Resident:
    """A set on the model's device. A batch is given by the indices of its images."""

    def __init__(self, model: Model, samples: Samples) -> None:
        self.model, self.samples = model, samples

    def epoch(self, order: HostArray, size: int) -> Iterator[tuple[Array]]:
        """Yield the indices of each batch of an epoch. They are sent to the device once, all
        together."""
        indices = self.model.home.asarray(order)
        for begin in range(0, len(order), size):
            yield (indices[begin : min(begin + size, len(order))],)

    def batch(self, chosen: Array) -> tuple[Array, ...]:
        """Return preprocessed images, targets and weights (if there are any) for indices from
        ``epoch``. Nothing is copied to the device."""
        xp = self.model.home.xp
        parts = (xp.take(part, chosen, axis=0) for part in self.samples.parts)
        return self.model.batch(self.samples.images, chosen), *parts


class Streamed:
    """A set on the host, as NumPy arrays."""

    def __init__(self, model: Model, samples: Samples) -> None:
        home = model.home
        self.model, self.samples = model, samples
        self._arrays = (samples.images, *(home.to_host(part) for part in samples.parts))
        self._uploader = home.uploader()

    def epoch(self, order: HostArray, size: int) -> Iterator[tuple[Array, ...]]:
        """Yield the batches of an epoch on the device. Each is sent before the previous one is
        yielded."""
        waiting = None
        for begin in chain(range(0, len(order), size), (None,)):
            sent = None
            if begin is not None:
                chosen = order[begin : begin + size]
                sent = self._uploader.send(*(array[chosen] for array in self._arrays))
            if waiting is not None:
                yield self._uploader.receive(waiting)
            waiting = sent

    def batch(self, images: Array, *parts: Array) -> tuple[Array, ...]:
        """Return preprocessed images, targets and weights for a batch from ``epoch``."""
        return self.model.batch(images), *parts


def take_samples(
    model: Model, loss: Loss, x: Array, t: Any, what: str, weights: Any = None
) -> Samples:
    """Check images, targets and weights once, on the host; copy them to the model's device if they
    fit. Arrays that are on the device already are not copied.

    Args:
        t: targets for ``loss``.
        what: "train" or "test", for messages.
        weights: (N,) finite numbers of at least 0, or None.
    """
    x, home = model.received(x, f"x_{what}"), model.home
    source = backend_of(x)
    if x.ndim == 0 or x.shape[0] == 0:
        raise ArgumentError(f"x_{what} must have at least one image, got shape {tuple(x.shape)}")
    dtype, count = model.kept_as(x), x.shape[0]
    t = model.received_targets(t, f"t_{what}")
    targets = loss.check_targets(
        t, model.output_shape, count=count, dtype=model.dtype, what=f"t_{what}"
    )
    checked = None if weights is None else sample_weights(weights, count, dtype=model.dtype)
    if is_float(source.xp, x.dtype) and not bool(
        source.to_host(source.xp.all(source.xp.isfinite(x)))
    ):
        raise NotFiniteError(
            f"x_{what} contains NaN or infinity ({describe(x)}); clean the data first"
        )
    try:
        with home.active():
            on_device = home.asarray(targets)
            weights = None if checked is None else home.asarray(checked)
        if source.name == "numpy" != home.name and not fits(
            nbytes_of(x.shape, dtype), home.free_memory()
        ):
            return Samples(source.contiguous(model.cast(x)), on_device, weights)
        with home.active():  # a gather reads whole images
            return Samples(home.contiguous(model.accept(x)), on_device, weights)
    except NotFiniteError as error:
        raise error.at(f"x_{what}", over=True)


def make_feed(model: Model, samples: Samples) -> Resident | Streamed:
    """Return the feed for a set that ``take_samples`` returned."""
    on_device = backend_of(samples.images).name == model.home.name
    return Resident(model, samples) if on_device else Streamed(model, samples)


def fingerprint(samples: Samples) -> dict[str, Any]:
    """Return hashes that identify a set from ``take_samples``, the same on every backend: of the
    images, and of all targets and weights."""
    images = samples.images
    count, each = images.shape[0], nbytes_of(images.shape[1:], dtype_name(images))
    stride = max(1, -(-count * each // _LOOKED_AT))
    home, seen, labels = backend_of(images), sha256(), sha256()
    step = stride * max(1, _CHUNK // max(each, 1))
    for first in range(0, count, step):
        seen.update(home.to_host(images[first : min(first + step, count) : stride, ...]).tobytes())
    for part in samples.parts:
        labels.update(backend_of(part).to_host(part).tobytes())
    return {
        "shape": list(images.shape),
        "dtype": dtype_name(images),
        "labels": labels.hexdigest(),
        "images": seen.hexdigest(),
    }


def nbytes_of(shape: Sequence[int], dtype: str) -> int:
    """Return the number of bytes of images, for a dtype that ``Model.kept_as`` returned."""
    return prod(shape) * (1 if dtype == "uint8" else int(dtype.removeprefix("float")) // 8)


def batch_sizes(count: int, size: int, drop_last: bool) -> list[int]:
    """Return the size of each batch of an epoch. The last holds the rest, unless dropped."""
    rest = [] if drop_last or not count % size else [count % size]
    return [size] * (count // size) + rest


def part_sizes(count: int, most: int) -> list[int]:
    """Split ``count`` images into the fewest parts of at most ``most``; sizes differ by one image
    at most."""
    parts = -(-count // most)
    size, larger = divmod(count, parts)
    return [size + 1] * larger + [size] * (parts - larger)
