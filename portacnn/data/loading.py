"""``load``: a data set by its name or from a path, as the command's ``--data`` takes it."""

import logging
import os
from pathlib import Path
from typing import Literal

import numpy as np

from portacnn.arguments import fraction
from portacnn.data.arrays import load_npy_folder, load_npz, npy_names
from portacnn.data.cifar import find_cifar, load_cifar
from portacnn.data.dataset import Dataset, split_off
from portacnn.data.folders import class_folders
from portacnn.data.image_folder import ImageFolder
from portacnn.data.mnist import FILE_NAMES, idx_sets, only_set
from portacnn.data.named import NAMES, emnist_or_idx, load_named
from portacnn.errors import ArgumentError, DataFormatError
from portacnn.file_kinds import FIRST, kind_of
from portacnn.files import file_path
from portacnn.text import listed, shown

_log = logging.getLogger("portacnn")


def load(
    name_or_path: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    mode: Literal["RGB", "L"] | None = None,
    test_share: float = 0.2,
    seed: int = 0,
    cache: str | os.PathLike[str] | Literal[False] | None = None,
    threads: int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> tuple[Dataset, Dataset]:
    """Return the training set and the test set of a named data set, or of a file or folder.

        >>> train, test = load("mnist-sample")
        >>> train, len(train.class_names)
        (Dataset(4000x1x28x28 uint8, 10 classes), 10)

    Args:
        name_or_path: one of ``NAMES``, or a path:

            - a folder with MNIST's four IDX files (``load_idx_folder``), or with the files of
              CIFAR-10 or CIFAR-100 (binary or python version), or one of their archives;
            - a folder of images per class, or ``train/`` and ``test/`` with such folders
              (``ImageFolder``);
            - an ``.npz`` file, or a folder of ``.npy`` files, with ``x_train, t_train, x_test,
              t_test``, or with ``images, labels``, which are split. ``.npy`` files are
              memory-mapped.

            A name is not taken for a path: write ``./mnist`` for a folder of that name.
        image_size: height and width, for a folder of images. None is 64. Other sets have their own;
            they refuse another one.
        mode: "RGB" or "L", for a folder of images. None is "RGB".
        test_share, seed: how a set without a test set is split.
        cache, threads, on_error: see ``ImageFolder``.

    Returns:
        Two ``Dataset`` objects with uint8 images (N, C, H, W), or what the file has.

    Raises:
        FileNotFoundError: if there is no such file or folder, or a named set is not on this machine
            and cannot be downloaded. The message says which file to put where.
        DataFormatError: if files are damaged, or do not form a data set.
        DependencyError: if Pillow or pooch is needed and missing.
        ArgumentError: if the arguments do not fit the data.
    """
    test_share = fraction("test_share", test_share)
    if isinstance(name_or_path, str) and name_or_path in NAMES:
        train, test = load_named(name_or_path)
    else:
        path = file_path(name_or_path, "a data set")
        if _is_image_folder(path):
            return ImageFolder.train_and_test(
                path,
                64 if image_size is None else image_size,
                test_share=test_share,
                seed=seed,
                mode="RGB" if mode is None else mode,
                cache=cache,
                threads=threads,
                on_error=on_error,
            )
        train, only = _from_path(path)
        train, test = split_off(train, test_share, seed) if only is None else (train, only)
        _warn_of_gaps(train, path)
    _check_size(train, image_size, mode, name_or_path)
    return train, test


def _is_image_folder(path: Path) -> bool:
    """Return whether to look for images: a folder without files of the other kinds."""
    if not path.is_dir() or idx_sets(path) or npy_names(path) or find_cifar(path) is not None:
        return False
    if class_folders(path):
        return True
    entries = sorted(entry.name for entry in path.iterdir())
    raise DataFormatError(
        f"{shown(path)}: expected a folder of images for each class, or train/ and test/ with such "
        f"folders, or the four files {listed(FILE_NAMES)}, or CIFAR's files, or .npy files; the "
        f"folder holds: {listed(entries) or 'nothing'}"
    )


def _from_path(path: Path) -> tuple[Dataset, Dataset | None]:
    """Return the training set and the test set, None if there is none, of what is not images."""
    if not path.exists():
        raise FileNotFoundError(
            f"there is no file or folder {shown(path)}; the data sets known by name are "
            f"{', '.join(NAMES)}"
        )
    if path.is_dir() and idx_sets(path):
        return emnist_or_idx(path, only_set(path))
    if (found := find_cifar(path)) is not None:
        return load_cifar(found)
    if path.is_dir():
        return load_npy_folder(path)
    if path.suffix.lower() == ".npz":
        return load_npz(path)
    with path.open("rb") as file:
        kind = kind_of(file.read(FIRST))
    kind = kind and kind.partition(". ")[0]  # what follows is about models
    raise DataFormatError(
        f"{shown(path)}: expected an .npz file, an archive of CIFAR, or a folder"
        f"{f'; it looks like {kind}' if kind else ''}"
    )


def _warn_of_gaps(train: Dataset, path: Path) -> None:
    """Warn if classes have no image: the network gets outputs for them all the same."""
    labels = train.labels
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels) or labels.min() < 0:
        return
    there, most = np.unique(labels), int(labels.max())
    if len(there) <= most:
        absent = np.setdiff1d(np.arange(min(most, 1 << 16)), there)
        _log.warning(
            "%s: labels go to %d, but %d of them have no training image (%s); the network has an "
            "output for each",
            path,
            most,
            most + 1 - len(there),
            listed(absent.tolist(), 8),
        )


def _check_size(
    train: Dataset, image_size: int | None, mode: str | None, what: str | os.PathLike[str]
) -> None:
    shape = tuple(train.images.shape[1:])
    if image_size is not None and shape[1:] != (image_size, image_size):
        raise ArgumentError(
            f"image_size={image_size} is for folders of images; {shown(what)} has images of shape "
            f"{shape}, leave image_size out"
        )
    if mode is not None and shape[0] != {"RGB": 3, "L": 1}.get(mode):
        raise ArgumentError(
            f'mode="{mode}" is for folders of images; {shown(what)} has images of shape {shape}, '
            "leave mode out"
        )
