"""Where the batches come from: a set that lies on the device whole, or one that is sent there batch by batch.

A set stays as it came, in bytes where it can, and becomes floats batch by batch (``Model.batch``). It goes to the device once where
it takes no more than half of the memory that is free there, since the network needs the rest; else it waits on the host, and
the next batch is on its way while the device is busy with the last.

Notation: N images in the set, B in a batch.
"""

from collections.abc import Iterator
from itertools import chain

from portacnn.models import Model
from portacnn.runtime import Array, HostArray


def fits(nbytes: int, free: int | None) -> bool:
    """Whether a set of so many bytes goes to a device with so many free; None stands for the host's own memory."""
    return free is None or nbytes <= free // 2


class Resident:
    """A set on the model's device: images as ``Model.accept`` gives them, labels int64 (N,). A batch is named by its indices."""

    def __init__(self, model: Model, images: Array, labels: Array) -> None:
        self.model, self.images, self.labels = model, images, labels

    def epoch(self, order: HostArray, size: int) -> Iterator[tuple[Array]]:
        """The batches of an epoch: for each, the indices of its images. They are sent once, all together."""
        indices = self.model._home().asarray(order)
        for begin in range(0, len(order), size):
            yield (indices[begin : min(begin + size, len(order))],)

    def batch(self, chosen: Array) -> tuple[Array, Array]:
        """Images, preprocessed, and labels of what ``epoch`` gave: on the device, nothing is sent."""
        return self.model.batch(self.images, chosen), self.model._home().xp.take(self.labels, chosen, axis=0)


class Streamed:
    """A set on the host: images (N, *S) of the dtype that the model keeps them in, labels int64 (N,), both NumPy arrays."""

    def __init__(self, model: Model, images: HostArray, labels: HostArray) -> None:
        self.model, self.images, self.labels = model, images, labels
        self._uploader = model._home().uploader()

    def epoch(self, order: HostArray, size: int) -> Iterator[tuple[Array, Array]]:
        """The batches of an epoch, on the device: each is sent before the one ahead of it is handed out."""
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
