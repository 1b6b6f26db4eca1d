"""Supply batches, either from a set that is on the device or from one that is sent there batch by
batch: from the host's memory, from ``Rows`` that threads read ahead, or from a ``Stream``.

A set keeps its dtype, uint8 if possible, and is converted to floats batch by batch
(``Model.batch``). It is copied to the device once if it needs at most half of the free memory
there; the network needs the rest. Otherwise it stays on the host, and the next batch is transferred
while the device works on the current one.

Notation: N images in the set, B in a batch.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import accumulate, chain, pairwise
from math import prod
from typing import Any

from portacnn.data.prefetch import in_order
from portacnn.data.rows import Rows, form, is_mapped
from portacnn.data.stream import Stream
from portacnn.data.targets import sample_weights
from portacnn.errors import ArgumentError, NotFiniteError, ShapeError
from portacnn.losses import Loss
from portacnn.models import Model
from portacnn.runtime import Array, HostArray, backend_of, describe, dtype_name, is_float
from portacnn.seeds import identity, permutation

_LOOKED_AT = 1 << 28
"""Largest number of bytes of images that a fingerprint covers: all of a smaller set, else images
spread over the set."""


_READ = 256  # images that a fingerprint reads from an object that may make them
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
            dtype if they do not fit there, or ``Rows`` of that dtype, which are read batch by
            batch.
        targets: (N, ...) as ``Loss.check_targets`` returns them, on the device.
        weights: (N,) of the model's dtype, on the device, or None.
        stream: what to train on instead; the images are then its first ones, for evaluation.
    """

    images: Array
    targets: Array
    weights: Array | None = None
    stream: Stream | None = None

    @property
    def parts(self) -> tuple[Array, ...]:
        """The arrays besides the images."""
        return (self.targets,) if self.weights is None else (self.targets, self.weights)

    @property
    def count(self) -> int:
        """The number of images in an epoch."""
        return int(self.images.shape[0]) if self.stream is None else self.stream.count

    def order(self, seed: int, epoch: int) -> HostArray:
        """Return the order of the images in an epoch, int64 (N,): by seed, or the stream's own."""
        if self.stream is None:
            return permutation(seed, epoch, self.count)
        return identity(self.count)

    def first(self, count: int | None) -> "Samples":
        """Return the first ``count`` samples; None returns all."""
        return self if count is None else self.part(0, count)

    def part(self, first: int, last: int) -> "Samples":
        """Return the samples from ``first`` up to ``last``, exclusive."""
        if first == 0 and last >= int(self.images.shape[0]):
            return self
        weights = None if self.weights is None else self.weights[first:last]
        if isinstance(self.images, Rows):  # read later
            images = self.images.subset(range(first, min(last, len(self.images))))
        else:
            images = self.images[first:last, ...]
        return Samples(images, self.targets[first:last, ...], weights)

    def labels_hash(self) -> str:
        """Return a hash of all targets and weights, the same on every backend."""
        labels = sha256()
        for part in self.parts:
            labels.update(backend_of(part).to_host(part).tobytes())
        return labels.hexdigest()


class Resident:
    """A set on the model's device. A batch is given by the indices of its images."""

    def __init__(self, model: Model, samples: Samples) -> None:
        self.model, self.samples = model, samples

    def epoch(
        self, order: HostArray, sizes: Sequence[int], number: int = 0
    ) -> Generator[tuple[Array], None, None]:
        """Yield the indices of each batch of an epoch. They are sent to the device once, all
        together."""
        indices = self.model.home.asarray(order)
        for first, last in _bounds(sizes):
            yield (indices[first:last],)

    def batch(self, chosen: Array) -> tuple[Array, ...]:
        """Return preprocessed images, targets, weights (if there are any) and the indices for
        indices from ``epoch``. Nothing is copied to the device."""
        xp = self.model.home.xp
        parts = (xp.take(part, chosen, axis=0) for part in self.samples.parts)
        return self.model.batch(self.samples.images, chosen), *parts, chosen


class Streamed:
    """A set on the host: NumPy arrays, or images that are read batch by batch."""

    def __init__(self, model: Model, samples: Samples, loss: Loss | None = None) -> None:
        home = model.home
        self.model, self.samples, self._loss = model, samples, loss
        self._parts = tuple(home.to_host(part) for part in samples.parts)
        self._uploader = home.uploader()

    def epoch(
        self, order: HostArray, sizes: Sequence[int], number: int = 0
    ) -> Generator[tuple[Array, ...], None, None]:
        """Yield the batches of an epoch on the device: images, targets, weights and indices. Each
        is sent before the previous one is yielded.

        Args:
            order: indices of the images that are left of the epoch, of one batch after the other.
            sizes: the number of images of each batch.
            number: of the epoch, from 0.
        """
        waiting = None
        chosen = [order[first:last] for first, last in _bounds(sizes)]
        with closing(self._read(chosen, number)) as read:  # its threads end with the loop
            for arrays, indices in zip(chain(read, (None,)), (*chosen, None), strict=True):
                sent = None
                if arrays is not None:
                    sent = self._uploader.send(*arrays, indices)
                if waiting is not None:
                    yield self._uploader.receive(waiting)
                waiting = sent

    def _read(
        self, chosen: Sequence[HostArray], number: int
    ) -> Generator[tuple[HostArray, ...], None, None]:
        """Yield the batches of an epoch as NumPy arrays: images, targets and weights."""
        images = self.samples.images
        read = images.batches(chosen) if isinstance(images, Rows) else (images[c] for c in chosen)
        with closing(read):
            for batch, indices in zip(read, chosen, strict=True):
                yield batch, *(part[indices] for part in self._parts)

    def batch(self, images: Array, *parts: Array) -> tuple[Array, ...]:
        """Return preprocessed images, targets, weights and indices for a batch from ``epoch``."""
        return self.model.batch(images), *parts


class Flowing(Streamed):
    """A ``Stream``: batches that are checked as they come."""

    def _read(
        self, chosen: Sequence[HostArray], number: int
    ) -> Generator[tuple[HostArray, ...], None, None]:
        stream, images = self.samples.stream, self.samples.images
        loss = self._loss
        assert stream is not None
        assert loss is not None
        made = stream.chosen(number, [each.tolist() for each in chosen], images.ndim - 1)

        def checked(_: int) -> tuple[HostArray, ...]:  # by one thread
            x, t = next(made)
            if x.shape[1:] != tuple(images.shape[1:]):
                raise ShapeError(
                    f"epoch {number}: expected images of shape {tuple(images.shape[1:])} like the "
                    f"first, got {x.shape[1:]}"
                )
            self.model.kept_as(x)
            rows = Rows(x).cast(dtype_name(images))
            targets = loss.check_targets(
                t, self.model.output_shape, count=len(x), dtype=self.model.dtype, what="t_train"
            )
            return rows[:], targets

        with closing(made), closing(in_order(checked, range(len(chosen)), 1, 2)) as read:
            yield from read


def _bounds(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Return the places, from and to, of each batch in an order."""
    return pairwise(accumulate(sizes, initial=0))


def take_stream(model: Model, loss: Loss, stream: Stream) -> Samples:
    """Check the first samples of a stream, and return them with it."""
    images, targets = stream.head(stream.evaluated, len(model.input_shape))
    return replace(take_samples(model, loss, images, targets, "train"), stream=stream)


def take_samples(
    model: Model,
    loss: Loss,
    x: Array,
    t: Any,
    what: str,
    weights: Any = None,
    part: tuple[int, int] = (0, 1),
) -> Samples:
    """Check images, targets and weights once, on the host; copy them to the model's device if they
    fit. Arrays that are on the device already are not copied.

    Args:
        t: targets for ``loss``.
        what: "train" or "test", for messages.
        weights: (N,) finite numbers of at least 0, or None.
        part: (k, n) looks for NaN in the k-th of n parts of a memory map only.
    """
    x, home = model.received(x, f"x_{what}"), model.home
    source = backend_of(form(x))
    if x.ndim == 0 or x.shape[0] == 0:
        raise ArgumentError(f"x_{what} must have at least one image, got shape {tuple(x.shape)}")
    dtype, count = model.kept_as(x), x.shape[0]
    t = model.received_targets(t, f"t_{what}")
    targets = loss.check_targets(
        t, model.output_shape, count=count, dtype=model.dtype, what=f"t_{what}"
    )
    checked = None if weights is None else sample_weights(weights, count, dtype=model.dtype)
    try:
        with home.active():
            on_device = home.asarray(targets)
            weights = None if checked is None else home.asarray(checked)
        stays = source.name == "numpy" != home.name and not fits(
            nbytes_of(x.shape, dtype), home.free_memory()
        )
        rows = _as_rows(x, dtype, stays)
        if rows is not None:
            rows.check_finite(*part)
            return Samples(rows, on_device, weights)
        _check_finite(x, what)
        if stays:
            return Samples(source.contiguous(model.cast(x)), on_device, weights)
        with home.active():  # a gather reads whole images
            return Samples(home.contiguous(model.accept(x)), on_device, weights)
    except NotFiniteError as error:
        raise error.at(f"x_{what}", over=True)


def _as_rows(x: Array, dtype: str, stays: bool) -> Rows | None:
    """Return images that are to be read batch by batch: ``Rows``, and memory maps that would have
    to be copied or converted as a whole. None for others.

    Args:
        stays: whether they do not fit on the device.
    """
    if isinstance(x, Rows):
        return x.cast(dtype)
    if is_mapped(x) and (stays or str(x.dtype) != dtype or not x.flags.c_contiguous):
        return Rows(x).cast(dtype)
    return None


def _check_finite(x: Array, what: str) -> None:
    """Raise NotFiniteError if images have NaN or infinity. Those on the host are looked at block by
    block."""
    source = backend_of(x)
    if not is_float(source.xp, x.dtype):
        return
    count, xp = x.shape[0], source.xp
    step = count
    if source.name == "numpy":
        step = max(1, _CHUNK // max(1, nbytes_of(x.shape[1:], dtype_name(x))))
    for first in range(0, count, step):
        part = x if step >= count else x[first : first + step, ...]
        if not bool(source.to_host(xp.all(xp.isfinite(part)))):
            raise NotFiniteError(
                f"x_{what} contains NaN or infinity ({describe(x)}); clean the data first"
            )


def make_feed(model: Model, samples: Samples, loss: Loss) -> Resident | Streamed:
    """Return the feed for a set that ``take_samples`` or ``take_stream`` returned."""
    if samples.stream is not None:
        return Flowing(model, samples, loss)
    images = samples.images
    on_device = not isinstance(images, Rows) and backend_of(images).name == model.home.name
    return Resident(model, samples) if on_device else Streamed(model, samples)


def fingerprint(samples: Samples) -> dict[str, Any]:
    """Return hashes that identify a set from ``take_samples``, the same on every backend: of the
    images, and of all targets and weights."""
    images = samples.images
    count, each = images.shape[0], nbytes_of(images.shape[1:], dtype_name(images))
    stride = max(1, -(-count * each // _LOOKED_AT))
    if isinstance(images, Rows) and not images.mapped:
        stride = max(stride, -(-count // _READ))
    home, seen = backend_of(form(images)), sha256()
    step = stride * max(1, _CHUNK // max(each, 1))
    for first in range(0, count, step):
        seen.update(home.to_host(images[first : min(first + step, count) : stride, ...]).tobytes())
    return {
        "shape": [samples.count, *images.shape[1:]],
        "dtype": dtype_name(images),
        "labels": samples.labels_hash(),
        "images": seen.hexdigest(),
    }


def nbytes_of(shape: Sequence[int], dtype: str) -> int:
    """Return the number of bytes of images, for a dtype that ``Model.kept_as`` returned."""
    return prod(shape) * (1 if dtype == "uint8" else int(dtype.removeprefix("float")) // 8)
