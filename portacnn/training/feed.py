"""Where the batches come from: a set that lies on the device whole, or one that is sent there batch
by batch.

A set stays as it came, in bytes where it can, and becomes floats batch by batch (``Model.batch``).
It goes to the device once where it takes no more than half of the memory that is free there, since
the network needs the rest; else it waits on the host, and the next batch is on its way while the
device is busy with the last.

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
"""Of how many bytes of images a fingerprint is taken at most: of all of a smaller set, else of
images spread over it."""


_CHUNK = 1 << 24  # bytes that are fetched from the device at a time


def fits(nbytes: int, free: int | None) -> bool:
    """Whether a set of so many bytes goes to a device with so many free; None stands for the host's
    own memory."""
    return free is None or nbytes <= free // 2


class Resident:
    """A set on the model's device: images as ``Model.accept`` gives them, labels int64 (N,). A
    batch is named by its indices."""

    def __init__(self, model: Model, images: Array, labels: Array) -> None:
        self.model, self.images, self.labels = model, images, labels

    def epoch(self, order: HostArray, size: int) -> Iterator[tuple[Array]]:
        """The batches of an epoch: for each, the indices of its images. They are sent once, all
        together."""
        indices = self.model.home.asarray(order)
        for begin in range(0, len(order), size):
            yield (indices[begin : min(begin + size, len(order))],)

    def batch(self, chosen: Array) -> tuple[Array, Array]:
        """Images, preprocessed, and labels of what ``epoch`` gave: on the device, nothing is
        sent."""
        return self.model.batch(self.images, chosen), self.model.home.xp.take(
            self.labels, chosen, axis=0
        )


class Streamed:
    """A set on the host: images (N, *S) of the dtype that the model keeps them in, labels int64
    (N,), both NumPy arrays."""

    def __init__(self, model: Model, images: HostArray, labels: HostArray) -> None:
        self.model, self.images, self.labels = model, images, labels
        self._uploader = model.home.uploader()

    def epoch(self, order: HostArray, size: int) -> Iterator[tuple[Array, Array]]:
        """The batches of an epoch, on the device: each is sent before the one ahead of it is handed
        out."""
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
        """Images, preprocessed, and labels of what ``epoch`` gave."""
        return self.model.batch(images), labels


def take_set(model: Model, x: Array, t: Array, what: str) -> tuple[Array, Array]:
    """Check one set of images and labels, once and on the host; bring it to the model's device
    where there is room.

    Returns:
        Images as ``Model.accept`` gives them, on the device, or NumPy's of the same dtype; labels
        on the device. What lies there already is not copied.
    """
    x, home = model.received(x, f"x_{what}"), model.home
    source = backend_of(x)
    if x.ndim == 0 or x.shape[0] == 0:
        raise ArgumentError(f"x_{what} has no images")
    dtype = model.kept_as(x)
    labels = model.labels(t, x.shape[0], f"t_{what}")
    if is_float(source.xp, x.dtype) and not bool(
        source.to_host(source.xp.all(source.xp.isfinite(x)))
    ):
        raise NotFiniteError(
            f"x_{what} holds NaN or infinity ({describe(x)}); clean the data first"
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
    """The feed for a set as ``take_set`` gives it."""
    home = model.home
    if backend_of(images).name == home.name:
        return Resident(model, images, labels)
    return Streamed(model, images, home.to_host(labels))


def fingerprint(images: Array, labels: Array) -> dict[str, Any]:
    """What tells a set, as ``take_set`` gives it, from another, the same on every backend: all
    labels, and the images."""
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
    """How many bytes images take, of a dtype as ``Model.kept_as`` gives it."""
    return prod(shape) * (1 if dtype == "uint8" else int(dtype.removeprefix("float")) // 8)


def batch_sizes(count: int, size: int, drop_last: bool) -> list[int]:
    """How many images each batch of an epoch has: the last one the rest, unless that is left
    out."""
    rest = [] if drop_last or not count % size else [count % size]
    return [size] * (count // size) + rest


def part_sizes(count: int, most: int) -> list[int]:
    """``count`` images in as few parts of at most ``most`` as there can be, alike in size but for
    one image."""
    parts = -(-count // most)
    size, larger = divmod(count, parts)
    return [size + 1] * larger + [size] * (parts - larger)
