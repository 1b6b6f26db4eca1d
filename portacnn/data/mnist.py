"""Load MNIST and data sets like it: four IDX files become two pairs of images and labels.

    # Notation: N images, H/W their height and width, K classes.

All loaders return ``((x_train, t_train), (x_test, t_test))`` and share three switches, named as in
the book "Deep Learning from Scratch". :func:`load_mnist_sample` reads 5,000 digits that come with
portacnn, :func:`load_mnist` finds or downloads all 70,000, :func:`load_idx_folder` reads any folder
of that form.
"""

import contextlib
import importlib.resources
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from portacnn.arguments import answering_keywords, whole
from portacnn.cache import cache_folder
from portacnn.data.download import download
from portacnn.data.idx import MAX_BYTES, parse_idx, read_idx
from portacnn.errors import ArgumentError, DataFormatError

Pair = tuple[NDArray[Any], NDArray[Any]]
Split = tuple[Pair, Pair]


TRAIN_IMAGES = "train-images-idx3-ubyte"
TRAIN_LABELS = "train-labels-idx1-ubyte"
TEST_IMAGES = "t10k-images-idx3-ubyte"
TEST_LABELS = "t10k-labels-idx1-ubyte"
FILE_NAMES = (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)

MD5 = {
    f"{TRAIN_IMAGES}.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    f"{TRAIN_LABELS}.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    f"{TEST_IMAGES}.gz": "9fb629c4189551a2d022fa330f9573f3",
    f"{TEST_LABELS}.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
"""The published checksums of MNIST's files, packed."""
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_WITHOUT_NETWORK = "load_mnist_sample() returns 5,000 of the digits without a network"

_MAX_CLASSES = 1 << 16  # larger values are not labels


@answering_keywords("load_mnist")
def load_mnist(
    normalize: bool = True,
    flatten: bool = False,
    one_hot_label: bool = False,
    *,
    root: str | os.PathLike[str] | None = None,
) -> Split:
    """Return MNIST: 60,000 training and 10,000 test images of handwritten digits, 28 x 28, 0 is
    black.

    If ``root`` is given, the four files are searched there only. Otherwise they are searched in the
    folder of the environment variable ``PORTACNN_DATA`` or ``mnist/`` below it, then in ``mnist/``
    in the user's cache folder (see :func:`portacnn.data.cache_folder`). Missing files are
    downloaded to the cache folder with pooch (``pip install "portacnn[data]"``) and checked against
    MNIST's published checksums. Each file may be gzipped or not, and be named ``-idx3-ubyte`` or
    ``.idx3-ubyte``.

    Args:
        normalize: return float32 images in [0, 1]; otherwise uint8 as stored, which a model with a
            ``preprocess`` takes.
        flatten: return images (N, 784); otherwise (N, 1, 28, 28).
        one_hot_label: return labels as float32 (N, 10); otherwise int64 (N,).
        root: the only folder to search; nothing is downloaded.

    Returns:
        ``((x_train, t_train), (x_test, t_test))``.

    Raises:
        FileNotFoundError: if the files are not found and cannot be downloaded. The message lists
            every place and says which files to put where.
        DependencyError: if they are not found and pooch is not installed, with the same message.
        DataFormatError: if a file is damaged or is not MNIST's kind: images not 28 x 28, labels not
            0 to 9, counts that contradict each other.
    """
    options = _Options(normalize, flatten, one_hot_label)
    if root is not None:
        return _load_mnist_folder(Path(root), _find_all(Path(root)), options)

    looked_in = []
    if configured := os.environ.get("PORTACNN_DATA"):
        base = Path(configured).expanduser()
        for folder in (base, base / "mnist"):
            looked_in.append(folder)
            if len(found := _find(folder)) == len(FILE_NAMES):
                return _load_mnist_folder(folder, found, options)

    cache = cache_folder() / "mnist"
    looked_in.append(cache)
    present = _find(cache)
    missing = {f"{name}.gz": MD5[f"{name}.gz"] for name in FILE_NAMES if name not in present}
    download("MNIST", missing, MIRRORS, cache, looked_in, _WITHOUT_NETWORK)
    try:
        return _load_mnist_folder(cache, _find_all(cache), options)
    except DataFormatError as error:
        raise DataFormatError(f"{error}. Delete that file to have it downloaded again.") from error


@answering_keywords("load_mnist_sample")
def load_mnist_sample(
    normalize: bool = True, flatten: bool = False, one_hot_label: bool = False
) -> Split:
    """Return 5,000 of MNIST's training digits, bundled with portacnn: 4,000 for training, 1,000 for
    testing.

    Every digit occurs 400 times in the first part and 100 times in the second, in a fixed shuffled
    order. No network is needed. For results to compare with others', use :func:`load_mnist`.

        >>> (x_train, t_train), (x_test, t_test) = load_mnist_sample()
        >>> x_train.shape, x_train.dtype, t_test.shape, t_test.dtype
        ((4000, 1, 28, 28), dtype('float32'), (1000,), dtype('int64'))

    Args:
        normalize: return float32 images in [0, 1]; otherwise uint8 as stored, which a model with a
            ``preprocess`` takes.
        flatten: return images (N, 784); otherwise (N, 1, 28, 28).
        one_hot_label: return labels as float32 (N, 10); otherwise int64 (N,).

    Returns:
        ``((x_train, t_train), (x_test, t_test))``.

    Raises:
        FileNotFoundError, DataFormatError: if portacnn's installation is damaged.
    """
    folder = importlib.resources.files("portacnn.data") / "mnist_sample"
    arrays = {}
    for name in FILE_NAMES:
        with (folder / f"{name}.gz").open("rb") as file:
            arrays[name] = parse_idx(file, f"portacnn.data/mnist_sample/{name}.gz")
    return _split(
        arrays, "portacnn's MNIST sample", _Options(normalize, flatten, one_hot_label), _MNIST
    )


@answering_keywords("load_idx_folder")
def load_idx_folder(
    path: str | os.PathLike[str],
    normalize: bool = True,
    flatten: bool = False,
    one_hot_label: bool = False,
    *,
    name: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> Split:
    """Return a data set in MNIST's form (Fashion-MNIST, KMNIST, EMNIST, QMNIST, your own) from a
    folder.

    The folder contains ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``,
    ``t10k-images-idx3-ubyte`` and ``t10k-labels-idx1-ubyte``. Each may be gzipped or not, with or
    without ``.gz`` in its name, and with a dot or a dash before ``idx``. ``test`` may replace
    ``t10k``, and names may start with the name of the set and a dash, as in
    ``emnist-letters-train-images-idx3-ubyte``. Images are uint8 (N, H, W) of any H and W, labels
    are integers (N,) of 0 or more. From QMNIST's labels (N, 8), in
    ``qmnist-train-labels-idx2-int``, the first column is used, which is the digit.

    Images are returned as they are stored. EMNIST's are transposed: use ``x.swapaxes(2, 3)``.

    Args:
        path: the folder.
        name: the name of the set, if the folder holds several, such as "emnist-letters".
        max_bytes: the largest size of one file in bytes, unpacked.
        normalize: return float32 images in [0, 1]; otherwise uint8 as stored, which a model with a
            ``preprocess`` takes.
        flatten: return images (N, H * W); otherwise (N, 1, H, W).
        one_hot_label: return labels as float32 (N, K), with K the largest label in either part + 1;
            otherwise int64 (N,).

    Returns:
        ``((x_train, t_train), (x_test, t_test))``.

    Raises:
        FileNotFoundError: if the folder or one of its four files is missing.
        ArgumentError: if there are several sets in it and no ``name``.
        DataFormatError: if a file is damaged or larger than ``max_bytes``, or the four do not
            match.
    """
    folder = Path(path)
    options = _Options(normalize, flatten, one_hot_label)
    found = _find_all(folder, only_set(folder) if name is None else name)
    return _split(
        _read_all(found, whole("max_bytes", max_bytes, 1)), str(folder), options, _Expected()
    )


# From four arrays to what the caller wants


class _Options(NamedTuple):
    normalize: bool
    flatten: bool
    one_hot_label: bool


class _Expected(NamedTuple):
    image_shape: tuple[int, int] | None = None  # (H, W); None: whatever the training images have
    classes: int | None = None  # K; None: the largest label + 1


_MNIST = _Expected(image_shape=(28, 28), classes=10)


def _load_mnist_folder(folder: Path, found: Mapping[str, Path], options: _Options) -> Split:
    return _split(_read_all(found), str(folder), options, _MNIST)


def _read_all(found: Mapping[str, Path], max_bytes: int = MAX_BYTES) -> dict[str, NDArray[Any]]:
    arrays = {name: read_idx(found[name], max_bytes=max_bytes) for name in FILE_NAMES}
    for name in (TRAIN_LABELS, TEST_LABELS):
        if "-idx2-int" in found[name].name and arrays[name].ndim == 2 and arrays[name].shape[1]:
            # QMNIST: class, then writer and origin
            arrays[name] = arrays[name][:, 0]
    return arrays


def _split(
    arrays: Mapping[str, NDArray[Any]], where: str, options: _Options, expected: _Expected
) -> Split:
    """Check that the four arrays form a data set, and convert them as ``options`` request."""
    image_shape = expected.image_shape or arrays[TRAIN_IMAGES].shape[1:]
    for images, labels in ((TRAIN_IMAGES, TRAIN_LABELS), (TEST_IMAGES, TEST_LABELS)):
        _check_images(arrays[images], f"{where}: {images}", image_shape)
        _check_labels(
            arrays[labels],
            f"{where}: {labels}",
            len(arrays[images]),
            expected.classes or _MAX_CLASSES,
        )
    classes = expected.classes or 1 + max(
        int(arrays[TRAIN_LABELS].max()), int(arrays[TEST_LABELS].max())
    )
    return (
        (_images(arrays[TRAIN_IMAGES], options), _labels(arrays[TRAIN_LABELS], options, classes)),
        (_images(arrays[TEST_IMAGES], options), _labels(arrays[TEST_LABELS], options, classes)),
    )


def _check_images(images: NDArray[Any], name: str, shape: tuple[int, ...]) -> None:
    if images.dtype != np.uint8 or images.ndim != 3:
        raise DataFormatError(
            f"{name}: expected uint8 images (N, H, W); got {images.dtype} of shape {images.shape}"
        )
    if images.size == 0:
        raise DataFormatError(f"{name}: expected at least one image; got shape {images.shape}")
    if images.shape[1:] != shape:
        came = " x ".join(map(str, images.shape[1:]))
        raise DataFormatError(
            f"{name}: expected images of {' x '.join(map(str, shape))} pixels; got {came}"
        )


def _check_labels(labels: NDArray[Any], name: str, count: int, classes: int) -> None:
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataFormatError(
            f"{name}: expected integer labels (N,); got {labels.dtype} of shape {labels.shape}"
        )
    if len(labels) != count:
        raise DataFormatError(
            f"{name}: expected {count} labels, one for each image; got {len(labels)}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataFormatError(
            f"{name}: expected labels from 0 to {classes - 1}; got {low} to {high}"
        )


def _images(images: NDArray[Any], options: _Options) -> NDArray[Any]:
    n, h, w = images.shape
    images = images.reshape((n, h * w) if options.flatten else (n, 1, h, w))
    if options.normalize:
        images = images.astype(np.float32)
        images /= np.float32(255)
    return images


def _labels(labels: NDArray[Any], options: _Options, classes: int) -> NDArray[Any]:
    labels = labels.astype(np.int64)
    if not options.one_hot_label:
        return labels
    one_hot = np.zeros((len(labels), classes), np.float32)
    one_hot[np.arange(len(labels)), labels] = 1
    return one_hot


# Finding files


_NAME = re.compile(
    r"(?:(.+)-)?(train|t10k|test)-(images|labels)([-.])idx\d-(?:ubyte|int)(\.gz)?", re.ASCII
)


def idx_sets(folder: Path) -> dict[str, dict[str, Path]]:
    """Return the paths of a folder's files by the name of their set; MNIST's own names are the set
    ""."""
    names = []
    with contextlib.suppress(OSError):
        names = [
            (match, entry) for entry in folder.iterdir() if (match := _NAME.fullmatch(entry.name))
        ]
    found: dict[str, dict[str, Path]] = {}
    # The first of several for the same thing: with a dash, unpacked, t10k.
    for match, entry in sorted(
        names, key=lambda one: (one[0][4] != "-", bool(one[0][5]), one[0][2] == "test")
    ):
        part = "train" if match[2] == "train" else "t10k"
        own = found.setdefault(match[1] or "", {})
        name = next(name for name in FILE_NAMES if name.startswith(f"{part}-{match[3]}"))
        if name not in own and entry.is_file():
            own[name] = entry
    return found


def only_set(folder: Path) -> str:
    """Return the name of the folder's only complete set; "" for MNIST's own names.

    Raises:
        ArgumentError: if there are several other sets.
    """
    found = idx_sets(folder)
    whole_ones = [name for name, files in found.items() if len(files) == len(FILE_NAMES)] or list(
        found
    )
    if len(whole_ones) > 1 and "" not in whole_ones:
        raise ArgumentError(
            f"{folder} holds several sets: {', '.join(sorted(whole_ones))}; say which: "
            f'load_idx_folder(..., name="{min(whole_ones)}")'
        )
    return whole_ones[0] if len(whole_ones) == 1 else ""


def _find(folder: Path, name: str = "") -> dict[str, Path]:
    """Return the paths of those of the four files that the folder contains, under any of their
    names."""
    return idx_sets(folder).get(name, {})


def _find_all(folder: Path, set_name: str = "") -> dict[str, Path]:
    found = _find(folder, set_name)
    if len(found) == len(FILE_NAMES):
        return found
    if not folder.is_dir():
        there = "there is no such folder"
    else:
        entries = sorted(entry.name for entry in folder.iterdir())
        there = ", ".join(entries[:20]) + (
            f" and {len(entries) - 20} more" if len(entries) > 20 else ""
        )
        there = f"the folder holds: {there or 'nothing'}"
    before = f"{set_name}-" if set_name else ""
    expected = ", ".join(before + name for name in FILE_NAMES)
    missing = ", ".join(before + name for name in FILE_NAMES if name not in found)
    raise FileNotFoundError(
        f"{folder}: expected the four files {expected}, each gzipped with .gz at the end or not; "
        f"missing: {missing}; {there}"
    )
