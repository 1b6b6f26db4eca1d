"""``Dataset``: images, their labels, the names of classes and files; split by seed."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from portacnn.arguments import AnswersKeywords, fraction, told, whole
from portacnn.data.rows import Rows, is_mapped
from portacnn.errors import ArgumentError, ArrayError, LabelError
from portacnn.runtime import Array, HostArray, backend_of
from portacnn.seeds import check_seed, generator


class Dataset(AnswersKeywords):
    """Images with their labels, in memory or read batch by batch.

        >>> import numpy as np
        >>> data = Dataset(np.zeros((6, 1, 4, 4), "uint8"), [0, 0, 0, 1, 1, 1], ["cat", "dog"])
        >>> train, test = data.split(1 / 3)
        >>> len(train), test.labels.tolist()
        (4, [0, 1])

        Trainer(model, train, None, test, None)

    Args:
        images: one of

            - an array (N, C, H, W) of any library that has a backend;
            - a memory map of NumPy, of any dtype and strides (a transposed view of channels-last
              images, for example): it is read batch by batch;
            - any object with ``__len__`` and ``__getitem__`` whose items are images (C, H, W) or
              pairs of an image and its label. It is called by several threads at once.
        labels: (N,) or (N, ...), in the order of the images. None takes them from the pairs, which
            reads every image once.
        class_names: a name for each class, or None.
        files: the name of each image's file, or None.
        threads: number of threads that read ahead. None is the number of cores for objects, 1 for
            memory maps. Give 1 for an object that only one thread may use at a time.

    Attributes:
        images: the array, or ``Rows`` if they are read batch by batch.
        labels: NumPy array (N, ...); labels of other libraries stay as they are.
        class_names: tuple of str, empty if they are not known.
        files: tuple of str, or None.

    Raises:
        LabelError: if there is not one label for each image, or a label has no class name.
        ArgumentError: if images have no length, or there are not as many files as images.
    """

    def __init__(
        self,
        images: Any,
        labels: Any = None,
        class_names: Sequence[str] | None = None,
        files: Sequence[str] | None = None,
        *,
        threads: int | None = None,
    ) -> None:
        names = None if files is None else tuple(map(str, files))
        workers = None if threads is None else whole("threads", threads, 1)
        self.images: Any = _taken(images, names, workers)
        count = self._count()
        if names is not None and len(names) != count:
            raise ArgumentError(f"expected {count} files, one for each image, got {len(names)}")
        if labels is None:
            if not isinstance(self.images, Rows):
                raise ArgumentError("labels are missing; only pairs (image, label) have their own")
            labels = self.images.labels()
        self.labels: Any = labels if _is_array(labels) else np.asarray(labels)
        self.class_names = () if class_names is None else tuple(map(str, class_names))
        self.files = names
        self._check_labels(count)

    def _count(self) -> int:
        return int(self.images.shape[0]) if self.images.ndim else 0

    def _check_labels(self, count: int) -> None:
        shape = tuple(self.labels.shape)
        if not shape or shape[0] != count:
            raise LabelError(f"expected a label for each of {count} images, got shape {shape}")
        classes = len(self.class_names)
        if not classes or not isinstance(self.labels, np.ndarray) or self.labels.ndim != 1:
            return
        if self.labels.dtype.kind in "iu" and count:
            least, most = int(self.labels.min()), int(self.labels.max())
            if least < 0 or most >= classes:
                raise LabelError(
                    f"label {least if least < 0 else most} has no name: there are {classes} class "
                    f"names, for labels 0..{classes - 1}"
                )

    def __len__(self) -> int:
        return self._count()

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.images.shape))
        classes = f", {len(self.class_names)} classes" if self.class_names else ""
        return f"{type(self).__name__}({shape} {self.images.dtype}{classes})"

    def __getitem__(self, indices: Any) -> tuple[Array, Any]:
        """Return images and labels at indices: one image for an int, (B, ...) for a slice or
        several indices."""
        number = np.asarray(indices) if not isinstance(indices, slice | int) else indices
        if isinstance(number, np.ndarray) and number.dtype.kind == "b":
            number = np.flatnonzero(number)
        if isinstance(number, int | slice):
            return self.images[number, ...], self.labels[number, ...]
        places = np.arange(len(self))[number]
        return _rows(self.images, places), _rows(self.labels, places)

    def subset(self, indices: Any) -> "Dataset":
        """Return the samples at these indices, in their order. Arrays in memory are copied; what is
        read batch by batch stays where it is.

        Args:
            indices: whole numbers (M,), or booleans (N,).

        Raises:
            ArgumentError: if an index is outside 0..N-1.
        """
        given = np.asarray(indices)
        if given.dtype.kind == "b" and given.shape == (len(self),):
            given = np.flatnonzero(given)
        if given.size == 0:
            given = given.astype(np.int64)
        if given.ndim != 1 or given.dtype.kind not in "iu":
            raise ArgumentError(f"indices must be whole numbers (M,), got {told(indices)}")
        if given.size and (given.min() < 0 or given.max() >= len(self)):
            raise ArgumentError(
                f"indices must lie in 0..{len(self) - 1}, got {given.min()}..{given.max()}"
            )
        places = given.astype(np.int64)
        part = Dataset.__new__(Dataset)
        part.images = (
            self.images.subset(places)
            if isinstance(self.images, Rows)
            else Rows(self.images, self.files).subset(places)
            if is_mapped(self.images)
            else _rows(self.images, places)
        )
        part.labels = _rows(self.labels, places)
        part.class_names = self.class_names
        part.files = None if self.files is None else tuple(self.files[i] for i in places.tolist())
        return part

    def split(self, share: float, seed: int = 0) -> tuple["Dataset", "Dataset"]:
        """Return two parts: the training set and the test set, each in the order of this one.

        The split is stratified for integer labels (N,): each class has the same share in both
        parts, rounded by the largest remainders. A class with one image stays in the first part.

        Args:
            share: share of the second part, greater than 0 and below 1.
            seed: chooses the samples.

        Raises:
            ArgumentError: if a part would be empty.
        """
        share, seed = fraction("share", share), check_seed(seed)
        count = len(self)
        host = backend_of(self.labels).to_host(self.labels)
        strata = host if host.ndim == 1 and host.dtype.kind in "iu" else np.zeros(count, np.int64)
        second = np.zeros(count, bool)
        classes, sizes = np.unique(strata, return_counts=True)
        for which, taken in zip(classes.tolist(), _quotas(sizes, share).tolist(), strict=True):
            members = np.flatnonzero(strata == which)
            order = generator(seed, "split", which).permutation(len(members))
            second[members[order[:taken]]] = True
        if not second.any() or second.all():
            raise ArgumentError(
                f"{share:g} of {count} images would leave {int(second.sum())} for the second "
                f"part and {count - int(second.sum())} for the first; both need at least one"
            )
        return self.subset(np.flatnonzero(~second)), self.subset(np.flatnonzero(second))


def split_off(data: Dataset, test_share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Return ``data.split(test_share, seed)``; its error names ``test_share``."""
    share = fraction("test_share", test_share)
    try:
        return data.split(share, seed)
    except ArgumentError as error:
        raise error.at(f"test_share={share:g}", over=True) from None


def _quotas(sizes: HostArray, share: float) -> HostArray:
    """Return how many samples of each class the second part gets, by the largest remainders."""
    exact = share * sizes
    most = np.maximum(sizes - 1, 0) if len(sizes) > 1 else sizes
    quotas = np.minimum(np.floor(exact).astype(np.int64), most)
    missing = round(share * int(sizes.sum())) - int(quotas.sum())
    for place in np.argsort(-(exact - quotas), kind="stable"):
        if missing <= 0:
            break
        if quotas[place] < most[place]:
            quotas[place] += 1
            missing -= 1
    return quotas


def _is_array(value: Any) -> bool:
    try:
        backend_of(value)
    except ArrayError:
        return False
    return True


def _taken(images: Any, files: Sequence[str] | None, threads: int | None) -> Any:
    """Return images as an array, or as ``Rows``."""
    if isinstance(images, Rows) or _is_array(images):
        return images
    if not hasattr(images, "__len__") or not hasattr(images, "__getitem__"):
        raise ArgumentError(
            "images must be an array, or an object with __len__ and __getitem__; got "
            f"{type(images).__name__} (portacnn.data.Stream takes generators)"
        )
    return Rows(images, files, threads)


def _rows(array: Any, places: HostArray) -> Any:
    """Return the elements of an array of any library, or of ``Rows``, at these places."""
    if isinstance(array, Rows):
        return array[places]
    if isinstance(array, np.ndarray):
        taken = np.ascontiguousarray(array[places])
        return taken.astype(taken.dtype.newbyteorder("="), copy=False)
    home = backend_of(array)
    indices = home.xp.asarray(places, dtype=home.xp.int64, device=array.device)
    return home.xp.take(array, indices, axis=0)
