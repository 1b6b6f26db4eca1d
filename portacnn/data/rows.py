"""``Rows``: images that are read a batch at a time, from a memory map or from any object with
``__len__`` and ``__getitem__``. They are never copied as a whole.

Notation: N images in a set, B in a batch.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from copy import copy
from itertools import islice
from math import prod
from mmap import mmap
from typing import Any

import numpy as np

from portacnn.data.prefetch import cores, in_order
from portacnn.errors import (
    ArgumentError,
    ArrayError,
    DataFormatError,
    NotFiniteError,
    ShapeError,
)
from portacnn.runtime import HostArray

_BLOCK = 1 << 26
"""Bytes of images that are read at a time, where all of them are looked at."""


class Rows:
    """Images (N, ...) whose batches are read when they are needed.

    Args:
        source: an array or a memory map, or any object with ``__len__`` and ``__getitem__``. Such
            an object is called with Python ints, by several threads at once, and returns an image,
            or a pair of an image and its label.
        files: the name of each image's file, for messages; or None.
        threads: number of threads that read ahead. None is one for a map, which the system reads
            ahead, and the number of cores for other objects.

    Attributes:
        shape, ndim, dtype: as of an array of all images.
    """

    def __init__(
        self, source: Any, files: Sequence[str] | None = None, threads: int | None = None
    ) -> None:
        self.source, self.files = source, files
        self.mapped = isinstance(source, np.ndarray)
        self.threads = threads or (1 if self.mapped else cores())
        self._chosen: HostArray | None = None  # indices into the source
        self._checked = False  # that no value is NaN or infinite
        if self.mapped:
            shape, dtype = source.shape, source.dtype
        elif len(source):
            first = as_image(self._item(0))
            shape, dtype = (len(source), *first.shape), first.dtype
        else:
            raise ArgumentError("expected at least one image, got none")
        self.shape: tuple[int, ...] = tuple(shape)
        self.dtype: np.dtype = dtype.newbyteorder("=")

    @property
    def ndim(self) -> int:
        """The number of axes, N's included."""
        return len(self.shape)

    @property
    def form(self) -> HostArray:
        """An array of the same shape and dtype, of zeros and without memory of that size: for
        checks of both."""
        return np.broadcast_to(np.zeros((), self.dtype), self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> HostArray:
        """Return images as a new array: of a slice or of several indices (B, ...), or one image."""
        if isinstance(key, tuple) and len(key) == 2 and key[1] is Ellipsis:
            key = key[0]
        if isinstance(key, slice):
            return self.read(np.arange(*key.indices(len(self))))
        numbers = np.asarray(key)
        numbers = np.where(numbers < 0, numbers + len(self), numbers)
        return self.read(numbers) if numbers.ndim else self.read(numbers[None])[0]

    def subset(self, indices: HostArray | Sequence[int]) -> "Rows":
        """Return the images at these indices, (M,), to be read when they are needed."""
        part, indices = copy(self), np.asarray(indices, np.int64)
        part._chosen = indices if self._chosen is None else self._chosen[indices]
        part.shape = (len(indices), *self.shape[1:])
        return part

    def cast(self, dtype: str) -> "Rows":
        """Return the images in another dtype, converted when they are read."""
        part = copy(self)
        part.dtype, part._checked = np.dtype(dtype), False
        return part

    def read(self, indices: HostArray) -> HostArray:
        """Return the images at these indices, (B, ...), contiguous.

        Raises:
            ShapeError: if the source returns an image of another shape than its first.
            NotFiniteError: if an image has NaN or infinity, or a value beyond the dtype's range.
            Whatever the source raises, with a note that says which image it was.
        """
        if self.mapped:
            places = indices if self._chosen is None else self._chosen[indices]
            images = np.ascontiguousarray(self.source[places])
        else:
            images = np.stack([self._image(index) for index in indices.tolist()])
        with np.errstate(over="ignore"):
            images = images.astype(self.dtype, copy=False)
        if self.dtype.kind == "f" and not self._checked:
            self._check(images, indices)
        return images

    def batches(self, keys: Iterable[Any]) -> Generator[HostArray, None, None]:
        """Yield the images of each batch, given as a slice or indices, read ahead by threads."""
        return in_order(self.__getitem__, keys, self.threads, 2 * self.threads)

    def labels(self) -> HostArray:
        """Return the labels of all images, from the pairs that the source returns. Every image is
        read for it."""
        return np.stack(list(in_order(self._label, range(len(self)), self.threads, 64)))

    def name(self, index: int) -> str:
        """Return what to call an image in a message: the name of its file, or its index."""
        place = index if self._chosen is None else int(self._chosen[index])
        return f"image {index}" if self.files is None else str(self.files[place])

    def blocks(self) -> Iterator[slice]:
        """Yield slices of all images, blocks that fit into memory."""
        each = prod(self.shape[1:]) * self.source.itemsize if self.mapped else 1
        size = max(1, _BLOCK // max(each, 1))
        for first in range(0, len(self), size):
            yield slice(first, first + size)

    def check_finite(self, part: int = 0, parts: int = 1) -> None:
        """Raise NotFiniteError if an image of a memory map has NaN or infinity, or a value beyond
        the dtype's range. All of it is read, block by block, or one of ``parts`` of the blocks, if
        other processes read the rest.

        Images of other objects may be made when they are read, so each batch is checked then.
        """
        if self.dtype.kind == "f" and self.mapped and not self._checked:
            with closing(self.batches(islice(self.blocks(), part, None, parts))) as read:
                for _ in read:
                    pass
            self._checked = True

    def _check(self, images: HostArray, indices: HostArray) -> None:
        fine = np.isfinite(images).all(axis=tuple(range(1, images.ndim)))
        if not fine.all():
            name = self.name(int(indices[int(np.argmin(fine))]))
            raise NotFiniteError(
                f"{name} contains NaN, infinity, or values beyond the range of {self.dtype}; clean "
                "the data first"
            )

    def _image(self, index: int) -> HostArray:
        image = as_image(self._item(index))
        if image.shape != self.shape[1:]:
            raise ShapeError(
                f"{self.name(index)}: expected an image of shape {self.shape[1:]} like the first, "
                f"got {image.shape}; resize images to one size"
            )
        if (image.dtype.kind == "f") != (self.dtype.kind == "f"):
            raise ArrayError(
                f"{self.name(index)}: expected an image of {self.dtype} like the first, got "
                f"{image.dtype}"
            )
        return image

    def _label(self, index: int) -> HostArray:
        item = self._item(index)
        if not _is_pair(item):
            raise ArgumentError(
                f"{self.name(index)}: expected a pair (image, label), got {type(item).__name__}; "
                "return pairs, or pass the labels"
            )
        return np.asarray(item[1])

    def _item(self, index: int) -> Any:
        place = index if self._chosen is None else int(self._chosen[index])
        try:
            return self.source[place]
        except Exception as error:
            error.add_note(f"raised while {self.name(index)} was read (source[{place}])")
            raise


def form(x: Any) -> Any:
    """Return ``Rows.form`` of Rows; arrays are returned as they are."""
    return x.form if isinstance(x, Rows) else x


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
