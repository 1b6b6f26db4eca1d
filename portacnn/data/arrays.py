"""Data sets from NumPy's files: an ``.npz``, or a folder of ``.npy`` files, which are
memory-mapped."""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from portacnn.data.dataset import Dataset
from portacnn.errors import DataFormatError
from portacnn.runtime import HostArray
from portacnn.text import listed, shown

_NAMES = {
    "x_train": ("x_train", "train_images", "train_x", "train_data"),
    "t_train": ("t_train", "y_train", "train_labels", "train_y", "train_t"),
    "x_test": ("x_test", "test_images", "test_x", "test_data", "x_val", "val_images"),
    "t_test": (
        "t_test",
        "y_test",
        "test_labels",
        "test_y",
        "test_t",
        "y_val",
        "t_val",
        "val_labels",
    ),
    "images": ("images", "x", "data"),
    "labels": ("labels", "t", "y", "targets"),
    "class_names": ("class_names", "classes"),
}
"""The names of the arrays, in lower case; the first that is there is taken."""
_BROKEN = (ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error, MemoryError)


def load_npz(path: Path) -> tuple[Dataset, Dataset | None]:
    """Return the training set and the test set, None if there is none, of an ``.npz`` file."""
    try:
        # NumPy would not close the file if it is no zip archive
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            found = _roles(held.files)
            arrays = {role: held[name] for role, name in found.items()}
            there = held.files
    except _BROKEN as error:
        raise DataFormatError(
            f"{shown(path)}: expected an .npz file of arrays of numbers ({error})"
        ) from error
    return _sets(arrays, there, path)


def load_npy_folder(folder: Path) -> tuple[Dataset, Dataset | None]:
    """Return the training set and the test set of a folder of ``.npy`` files."""
    there = npy_names(folder)
    arrays = {}
    for role, name in _roles(there).items():
        path = folder / f"{name}.npy"
        try:
            arrays[role] = np.load(path, mmap_mode="r", allow_pickle=False)
        except _BROKEN as error:
            raise DataFormatError(
                f"{shown(path)}: expected an .npy file of numbers ({error})"
            ) from error
    return _sets(arrays, there, folder)


def npy_names(folder: Path) -> list[str]:
    """Return the names of the ``.npy`` files of a folder, without the end."""
    return sorted(path.stem for path in folder.glob("*.npy"))


def _roles(names: Sequence[str]) -> dict[str, str]:
    """Return the names of the arrays that are there, by what they are."""
    there = {name.lower(): name for name in names}
    return {
        role: next(there[name] for name in known if name in there)
        for role, known in _NAMES.items()
        if any(name in there for name in known)
    }


def _sets(
    arrays: Mapping[str, HostArray], there: Sequence[str], path: Path
) -> tuple[Dataset, Dataset | None]:
    names = arrays.get("class_names")
    classes = None if names is None or names.dtype.kind != "U" else names.tolist()
    for pair in (("x_train", "t_train"), ("images", "labels")):
        if all(role in arrays for role in pair):
            train = _set(arrays[pair[0]], arrays[pair[1]], classes)
            break
    else:
        raise DataFormatError(
            f"{shown(path)}: expected the arrays x_train, t_train, x_test, t_test, or images and "
            f"labels; it has {listed(there) or 'none'}"
        )
    if "x_test" not in arrays or "t_test" not in arrays:
        return train, None
    return train, _set(arrays["x_test"], arrays["t_test"], classes)


def _set(images: HostArray, labels: Any, classes: Sequence[str] | None) -> Dataset:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind in "iu" and labels.ndim == 1:
        labels = labels.astype(np.int64)
    return Dataset(channels_first(images), np.asarray(labels), classes)


def channels_first(images: HostArray) -> HostArray:
    """Return a view (N, C, H, W) of images (N, H, W), or (N, H, W, C) with 1, 3 or 4 channels; of
    other shapes the images as they are."""
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[3] in (1, 3, 4) and images.shape[1] not in (1, 3, 4):
        return images.transpose(0, 3, 1, 2)
    return images
