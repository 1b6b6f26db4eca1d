"""``Rows``: images that are read a batch at a time, from a memory map or from any object with
``__len__`` and ``__getitem__``. They are never copied as a whole.

Notation: N images in a set, B in a batch.
"""

from collections.abc import Iterator, Sequence
from mmap import mmap
from typing import Any

import numpy as np

from portacnn.errors import ArgumentError, DataFormatError, NotFiniteError, ShapeError
from portacnn.runtime import HostArray

_BLOCK = 1 << 26
"""Bytes of images that are read at a time, where all of them are looked at."""


class Rows:
    """Images (N, ...) whose batches are read when they are needed.

    Args:
        source: an array or a memory map, or any object with ``__len__`` and ``__getitem__``. Such
            an object is called with Python ints, possibly by several threads at once, and returns
            an image, or a pair of an image and its label.
        chosen: indices into the source, int64 (N,). None takes all.
        files: the name of each image's file, for messages; or None.
    """

    def __init__(
        self,
        source: Any,
        chosen: HostArray | None = None,
        files: Sequence[str] | None = None,
        *,
        like: "Rows | None" = None,
    ) -> None:
        self.source, self.chosen, self.files = source, chosen, files
        self._mapped = isinstance(source, np.ndarray)
        count = len(source) if chosen is None else len(chosen)
        if self._mapped:
            shape, dtype = source.shape[1:], source.dtype
        elif like is not None:
            shape, dtype = like.shape[1:], like.dtype
        elif count:
            first = as_image(self._item(0))
            shape, dtype = first.shape, first.dtype
        else:
            raise ArgumentError("expected at least one image, got none")
        self.shape: tuple[int, ...] = (count, *shape)
        self.dtype: np.dtype = np.dtype(dtype)

    @property
    def ndim(self) -> int:
        """The number of axes, N's included."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> HostArray:
        """Return images as a new array: of a slice or of several indices (B, ...), or one image."""
        if isinstance(key, tuple) and len(key) == 2 and key[1] is Ellipsis:
            key = key[0]
        numbers = np.arange(len(self))[key]
        return self.read(numbers) if numbers.ndim else self.read(numbers[None])[0]

    def subset(self, indices: HostArray) -> "Rows":
        """Return the images at these indices, int64 (M,), to be read when they are needed."""
        chosen = indices if self.chosen is None else self.chosen[indices]
        return Rows(self.source, chosen, self.files, like=self)

    def read(self, indices: HostArray) -> HostArray:
        """Return the images at these indices, (B, ...), contiguous and in the machine's byte order.

        Raises:
            ShapeError: if the source returns an image of another shape than its first.
            Whatever the source raises, with a note that says which image it was.
        """
        places = indices if self.chosen is None else self.chosen[indices]
        if self._mapped:
            images = np.ascontiguousarray(self.source[places])
        else:
            images = np.empty((len(places), *self.shape[1:]), self.dtype)
            for at, index in enumerate(indices.tolist()):
                image = as_image(self._item(index))
                if image.shape != self.shape[1:]:
                    raise ShapeError(
                        f"{self.name(index)}: expected an image of shape {self.shape[1:]} like "
                        f"the first, got {image.shape}; resize images to one size"
                    )
                images[at] = image
        return images.astype(images.dtype.newbyteorder("="), copy=False)

    def labels(self) -> HostArray:
        """Return the labels of all images, from the pairs that the source returns. Every image is
        read for it, one at a time."""
        found = []
        for index in range(len(self)):
            item = self._item(index)
            if not _is_pair(item):
                raise ArgumentError(
                    f"{self.name(index)}: expected a pair (image, label), got "
                    f"{type(item).__name__}; return pairs, or give the labels"
                )
            found.append(np.asarray(item[1]))
        return np.stack(found)

    def name(self, index: int) -> str:
        """Return what to call an image in a message: the name of its file, or its index."""
        place = index if self.chosen is None else int(self.chosen[index])
        return f"image {index}" if self.files is None else str(self.files[place])

    def blocks(self) -> Iterator[tuple[int, HostArray]]:
        """Yield all images in blocks, each with the index of its first image."""
        each = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        size = max(1, _BLOCK // max(each, 1))
        for first in range(0, len(self), size):
            yield first, self.read(np.arange(first, min(first + size, len(self))))

    def check_finite(self, what: str) -> None:
        """Raise NotFiniteError if an image of a memory map has NaN or infinity.

        Images of other objects are made when they are read, so each batch is checked then.
        """
        if self.dtype.kind == "f" and self._mapped:
            for first, images in self.blocks():
                self.check_batch(images, np.arange(first, first + len(images)), what)

    def check_batch(self, images: HostArray, indices: HostArray, what: str) -> None:
        """Raise NotFiniteError if an image has NaN or infinity; it names the image."""
        if images.dtype.kind != "f":
            return
        fine = np.isfinite(images).all(axis=tuple(range(1, images.ndim)))
        if not fine.all():
            name = self.name(int(indices[int(np.argmin(fine))]))
            raise NotFiniteError(f"{what}: {name} contains NaN or infinity; clean the data first")

    def _item(self, index: int) -> Any:
        place = index if self.chosen is None else int(self.chosen[index])
        try:
            return self.source[place]
        except Exception as error:
            error.add_note(f"raised while {self.name(index)} was read (source[{place}])")
            raise


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2


def as_image(item: Any) -> HostArray:
    """Return what a source returned for one image as a NumPy array: (C, H, W) for Pillow's images,
    any shape for arrays. Raises DataFormatError."""
    image = item[0] if _is_pair(item) else item
    array = np.asarray(image)
    if array.dtype.kind not in "uif":
        raise DataFormatError(
            f"expected an image of numbers, got {type(image).__name__} of {array.dtype}"
        )
    if hasattr(image, "getbands"):  # Pillow's have their channels last
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return array


def is_mapped(array: Any) -> bool:
    """Return whether the memory of a NumPy array is that of a memory map."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap):
            return True
        array = array.base
    return isinstance(array.obj if isinstance(array, memoryview) else array, mmap)
