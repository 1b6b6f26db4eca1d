"""``Stream``: samples that come one after the other, from a generator for each epoch."""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from itertools import chain, islice
from typing import Any

import numpy as np

from portacnn.arguments import AnswersKeywords, whole
from portacnn.data.rows import as_image
from portacnn.errors import ArgumentError, DataFormatError
from portacnn.runtime import HostArray

_HEAD = 1000


class Stream(AnswersKeywords):
    """Training samples that a generator makes, epoch by epoch, in its own order.

        >>> import numpy as np
        >>> def noise(epoch):
        ...     random = np.random.default_rng(epoch)
        ...     while True:
        ...         yield random.random((1, 8, 8), dtype="float32"), random.integers(2)
        >>> stream = Stream(noise, count=100)
        >>> images, labels = stream.head(5)
        >>> images.shape, labels.shape
        ((5, 1, 8, 8), (5,))

    A ``Trainer`` takes it for ``x_train``. A thread runs the generator while the model trains on
    the batches before. A training run that is resumed repeats the samples of its epoch that were
    trained on, so that it continues with the next one; it is exact if ``make`` returns the same
    samples for the same epoch.

    Args:
        make: function of the epoch, from 0, that returns an iterable of pairs (image, label), or of
            batches (images, labels) of any size.
        count: number of samples of an epoch. An iterable that ends earlier is an error; what comes
            after is left out.
        evaluated: number of samples, the first of epoch 0, that are kept in memory: the figures of
            the training set are computed on them.
        class_names: a name for each class, or None.

    Raises:
        ArgumentError: if ``make`` is not a function or ``count`` not a whole number above 0.
    """

    def __init__(
        self,
        make: Callable[[int], Iterable[tuple[Any, Any]]],
        count: int,
        *,
        evaluated: int = _HEAD,
        class_names: Sequence[str] | None = None,
    ) -> None:
        if not callable(make):
            raise ArgumentError(
                "make must be a function of the epoch that returns a generator, got "
                f"{type(make).__name__}; a generator itself ends after one epoch"
            )
        self.make, self.count = make, whole("count", count, 1)
        self.evaluated = min(self.count, whole("evaluated", evaluated, 1))
        self.class_names = () if class_names is None else tuple(map(str, class_names))

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return f"Stream({self.count} samples an epoch)"

    def head(self, count: int, rank: int | None = None) -> tuple[HostArray, HostArray]:
        """Return the first samples of epoch 0: images (count, ...) and labels (count, ...)."""
        with closing(self.batches(0, count, 0, rank, count)) as made:
            return next(made)

    def batches(
        self,
        epoch: int,
        size: int,
        first: int = 0,
        rank: int | None = None,
        last: int | None = None,
    ) -> Generator[tuple[HostArray, HostArray], None, None]:
        """Yield the batches of an epoch.

        Args:
            epoch: from 0.
            size: samples in a batch; the last may have fewer.
            first, last: the samples before ``first`` and from ``last`` are left out.
            rank: number of axes of one image; items with one more are batches. None takes items of
                3 axes for images.

        Raises:
            DataFormatError: if there are too few samples, or an item is not a pair.
            Whatever the generator raises.
        """
        last = self.count if last is None else last
        begins = range(first, last, size)
        return self.chosen(epoch, [range(b, min(b + size, last)) for b in begins], rank)

    def chosen(
        self, epoch: int, batches: Sequence[Sequence[int]], rank: int | None = None
    ) -> Generator[tuple[HostArray, HostArray], None, None]:
        """Yield batches of an epoch, of samples by their numbers.

        Args:
            epoch, rank: see ``batches``.
            batches: numbers of samples, from 0, in any order. All of a batch are above those of the
                batches before.

        Raises:
            As ``batches``.
        """
        made = self.make(epoch)
        samples = chain.from_iterable(
            map(lambda item: _samples(item, 3 if rank is None else rank), made)
        )
        done = 0
        try:
            for numbers in batches:
                for _ in islice(samples, min(numbers) - done):
                    pass
                done, last = min(numbers), max(numbers) + 1
                pairs = list(islice(samples, last - done))
                if len(pairs) < last - done:
                    raise DataFormatError(
                        f"the stream of epoch {epoch} ended after {done + len(pairs)} of "
                        f"{self.count} samples; pass a smaller count, or yield more samples"
                    )
                images, labels = zip(*(pairs[number - done] for number in numbers), strict=True)
                done = last
                yield np.stack(images), np.stack(labels)
        finally:
            if hasattr(made, "close"):
                made.close()


def _samples(item: Any, rank: int) -> list[tuple[HostArray, HostArray]]:
    """Return the samples of an item: one, or those of a batch."""
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise DataFormatError(
            f"a stream must yield pairs (image, label) or (images, labels), got "
            f"{type(item).__name__}"
        )
    images, labels = as_image(item[0]), np.asarray(item[1])
    if images.ndim == rank:
        return [(images, labels)]
    if images.ndim != rank + 1 or labels.ndim < 1 or len(labels) != len(images):
        raise DataFormatError(
            f"a stream must yield an image of {rank} axes and its label, or a batch of both; got "
            f"shapes {images.shape} and {labels.shape}"
        )
    return list(zip(images, labels, strict=True))
