"""Supply batches, either from a set that is on the device or from one that is sent there batch by
batch.

A set keeps its dtype, uint8 if possible, and is converted to floats batch by batch
(``Model.batch``). It is copied to the device once if it needs at most half of the free memory
there; the network needs the rest. Otherwise it stays on the host, and the next batch is transferred
while the device works on the current one.

Notation: N images in the set, B in a batch.
"""

from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import chain
from math import prod
from typing import Any

from portacnn.errors import ArgumentError, NotFiniteError
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


class Resident:
    """A set on the model's device: images as ``Model.accept`` returns them, labels int64 (N,).

    A batch is given by the indices of its images.
    """

    def __init__(self, model: Model, images: Array, labels: Array) -> None:
        self.model, self.images, self.labels = model, images, labels

    def epoch(self, order: HostArray, size: int) -> Iterator[tuple[Array]]:
        """Yield the indices of each batch of an epoch. They are sent to the device once, all
        together."""
        indices = self.model.home.asarray(order)
        for begin in range(0, len(order), size):
            yield (indices[begin : min(begin + size, len(order))],)

    def batch(self, chosen: Array) -> tuple[Array, Array]:
        """Return preprocessed images and labels for indices from ``epoch``. Nothing is copied to
        the device."""
        return self.model.batch(self.images, chosen), self.model.home.xp.take(
            self.labels, chosen, axis=0
        )


class Streamed:
    """A set on the host, as NumPy arrays: images (N, *S) in the dtype that the model keeps, labels
    int64 (N,)."""

    def __init__(self, model: Model, images: HostArray, labels: HostArray) -> None:
        self.model, self.images, self.labels = model, images, labels
        self._uploader = model.home.uploader()

    def epoch(self, order: HostArray, size: int) -> Iterator[tuple[Array, Array]]:
        """Yield the batches of an epoch on the device. Each is sent before the previous one is
        yielded."""
        waiting = None
        for begin in chain(range(0, len(order), size), (None,)):
            sent = None
            if begin is not None:
                chosen = order[begin : begin + size]
                sent = self._uploader.send(self.images[chosen], self.labels[chosen])
            if waiting is not None:
                yield self._uploader.receive(waiting)
            waiting = sent

    def batch(self, images: Array, labels: Array) -> tuple[Array, Array]:
        """Return preprocessed images and labels for a batch from ``epoch``."""
        return self.model.batch(images), labels


def take_set(model: Model, x: Array, t: Array, what: str) -> tuple[Array, Array]:
    """Check images and labels once, on the host; copy them to the model's device if they fit.

    Returns:
        Images as ``Model.accept`` returns them, on the device, or NumPy arrays of the same dtype;
        labels on the device. Arrays that are on the device already are not copied.
    """
    x, home = model.received(x, f"x_{what}"), model.home
    source = backend_of(x)
    if x.ndim == 0 or x.shape[0] == 0:
        raise ArgumentError(f"x_{what} must have at least one image, got shape {tuple(x.shape)}")
    dtype = model.kept_as(x)
    labels = model.labels(t, x.shape[0], f"t_{what}")
    if is_float(source.xp, x.dtype) and not bool(
        source.to_host(source.xp.all(source.xp.isfinite(x)))
    ):
        raise NotFiniteError(
            f"x_{what} contains NaN or infinity ({describe(x)}); clean the data first"
        )
    try:
        if source.name == "numpy" != home.name and not fits(
            nbytes_of(x.shape, dtype), home.free_memory()
        ):
            return source.contiguous(model.cast(x)), labels
        with home.active():
            return home.contiguous(model.accept(x)), labels  # a gather reads whole images
    except NotFiniteError as error:
        raise error.at(f"x_{what}", over=True)


def make_feed(model: Model, images: Array, labels: Array) -> Resident | Streamed:
    """Return the feed for a set that ``take_set`` returned."""
    home = model.home
    if backend_of(images).name == home.name:
        return Resident(model, images, labels)
    return Streamed(model, images, home.to_host(labels))


def fingerprint(images: Array, labels: Array) -> dict[str, Any]:
    """Return hashes that identify a set from ``take_set``, the same on every backend: all labels,
    and the images."""
    count, each = images.shape[0], nbytes_of(images.shape[1:], dtype_name(images))
    stride = max(1, -(-count * each // _LOOKED_AT))
    home, seen = backend_of(images), sha256()
    step = stride * max(1, _CHUNK // max(each, 1))
    for first in range(0, count, step):
        seen.update(home.to_host(images[first : min(first + step, count) : stride, ...]).tobytes())
    return {
        "shape": list(images.shape),
        "dtype": dtype_name(images),
        "labels": sha256(backend_of(labels).to_host(labels).tobytes()).hexdigest(),
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
