"""Find the images of a folder that has a folder for each class.

The rule: names that begin with a dot, ``__MACOSX`` and files whose names do not end like an image's
(``SUFFIXES``) are left out. Folders within a class's folder belong to the class. Symbolic links are
followed; each folder is visited once. Classes and files are sorted by name, character by character:
"10" comes before "2".
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from portacnn.data.decoding import SUFFIXES
from portacnn.errors import ArgumentError, DataFormatError
from portacnn.text import listed, quoted, shown

TRAIN = ("train", "training")
TEST = ("val", "valid", "validation", "test", "testing")
"""Names of the folders of a test set. The first that is there is taken."""

_LONGEST = 200  # characters of a class's name, as in ModelInfo


class Found(NamedTuple):
    """A file: its path below the root, with slashes; its size and time, -1 for a broken link."""

    name: str
    label: int
    size: int
    mtime: int


def find_images(root: Path, class_names: Sequence[str] | None) -> tuple[list[str], list[Found]]:
    """Return the names of the classes, and the files of all images, sorted by class and name.

    Args:
        class_names: the classes in the order of their labels; folders may be missing. None takes
            all folders.

    Raises:
        FileNotFoundError, NotADirectoryError: if the root is not a folder.
        DataFormatError: if it has no folders of classes, only one, or one without images.
    """
    folders = class_folders(root)
    if class_names is None:
        _check_classes(root, folders)
        names = sorted(folders)
    else:
        names = list(class_names)
        if unknown := sorted(set(folders) - set(names)):
            raise DataFormatError(
                f"{shown(root)}: the folders {listed(unknown)} are not among the "
                f"{len(names)} classes {listed(names)}"
            )
    found, empty = [], []
    for label, name in enumerate(names):
        own = sorted(_files(folders[name], name, label)) if name in folders else []
        found.extend(own)
        if name in folders and not own:
            empty.append(name)
    if empty:
        raise DataFormatError(
            f"{shown(root)}: the class folders {listed(empty)} have no images (files ending in "
            f"{', '.join(sorted(SUFFIXES))}); add some, or remove the folder"
        )
    if not found:
        raise DataFormatError(f"{shown(root)}: there are no images of the classes {listed(names)}")
    return names, found


def images_below(root: Path) -> list[str]:
    """Return the paths of all images below a folder, with slashes, sorted. They need not be in
    folders of classes."""
    return sorted(found.name.removeprefix("/") for found in _files(root, "", 0))


def parts_of(root: Path) -> tuple[Path, Path] | None:
    """Return the folders of the training set and of the test set; None if the root has no such
    pair."""
    folders = {name.lower(): path for name, path in class_folders(root).items()}
    train = next((folders[name] for name in TRAIN if name in folders), None)
    test = next((folders[name] for name in TEST if name in folders), None)
    if train is None or test is None or not class_folders(train):
        return None
    return train, test


def class_folders(root: Path) -> dict[str, Path]:
    """Return the folders in a folder by name, hidden ones left out."""
    if not root.exists():
        raise FileNotFoundError(f"there is no folder {shown(root)}")
    if not root.is_dir():
        raise NotADirectoryError(
            f"expected a folder with a folder of images for each class, but {shown(root)} is a "
            "file; unpack it if it is an archive"
        )
    return {
        entry.name: Path(entry.path)
        for entry in os.scandir(root)
        if not _left_out(entry.name) and entry.is_dir()
    }


def _check_classes(root: Path, folders: dict[str, Path]) -> None:
    if parts_of(root) is not None:
        raise ArgumentError(
            f"{shown(root)} has the folders {listed(sorted(folders))}, which look like a training "
            "set and a test set, not like classes; use ImageFolder.train_and_test, or one of them"
        )
    if len(folders) < 2:
        direct = sum(_is_image(entry.name) for entry in os.scandir(root))
        there = f"one folder, {quoted(*folders)}" if folders else "none"
        raise DataFormatError(
            f"{shown(root)}: expected a folder of images for each of at least two classes; found "
            f"{there}{f', and {direct} images outside of folders' if direct else ''}"
        )
    for name in folders:
        if not name.isprintable() or len(name) > _LONGEST:
            raise DataFormatError(
                f"{shown(root)}: the name of a class must be printable text of at most {_LONGEST} "
                f"characters, got {quoted(name)}; rename the folder"
            )


def _files(folder: Path, below: str, label: int) -> Iterator[Found]:
    waiting, visited = [(os.fspath(folder), below)], set()
    while waiting:
        path, below = waiting.pop()
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(path) as entries:
            for entry in entries:
                name = f"{below}/{entry.name}"
                if _left_out(entry.name):
                    continue
                if entry.is_dir():
                    waiting.append((entry.path, name))
                elif _is_image(entry.name):
                    try:
                        status = entry.stat()
                        yield Found(name, label, status.st_size, status.st_mtime_ns)
                    except OSError:  # a broken link: an error when it is decoded
                        yield Found(name, label, -1, -1)


def _left_out(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_image(name: str) -> bool:
    return not _left_out(name) and os.path.splitext(name)[1].lower() in SUFFIXES
