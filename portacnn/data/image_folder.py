"""``ImageFolder``: a folder of images for each class becomes a ``Dataset``."""

import hashlib
import logging
import os
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from portacnn.arguments import one_of, whole
from portacnn.cache import cache_folder
from portacnn.data.dataset import Dataset, split_off
from portacnn.data.decoding import RULE, decode, pillow
from portacnn.data.folders import Found, find_images, parts_of
from portacnn.data.image_cache import open_cache, write_cache
from portacnn.data.prefetch import cores, in_order
from portacnn.errors import DataFormatError
from portacnn.files import beginning
from portacnn.runtime import HostArray

_log = logging.getLogger("portacnn")
_CHANNELS = {"RGB": 3, "L": 1}
_LARGEST = 4096  # image_size

MAX_PIXELS = 1 << 26
"""Largest number of pixels of an image that is decoded, 8192 x 8192."""


class ImageFolder(Dataset):
    """Images from a folder for each class: ``root/cat/1.jpg``, ``root/dog/2.png``, ...

    Needs Pillow (``pip install "portacnn[data]"``). Images are decoded once, by threads, into a
    cache file of uint8 (N, C, image_size, image_size), which is then memory-mapped.

        photos = portacnn.data.ImageFolder("photos", image_size=64)
        train, test = photos.split(0.2)

    Args:
        root: the folder.
        image_size: height and width of the result. The short side of an image is resized to it, and
            the centre is cropped.
        mode: "RGB" (3 channels) or "L" (one, grey).
        cache: folder of the cache file. None is ``images/`` in ``cache_folder()``; False decodes
            into memory.
        threads: number of threads that decode. None is the number of cores.
        on_error: "raise" an error that names a file that cannot be decoded, or "skip" such files
            with a warning that counts them.
        max_pixels: largest number of pixels of an image; larger ones are refused before they are
            decoded.
        class_names: names of the class folders, in the order of the labels. None takes all folders,
            sorted by name. Folders that are missing are classes without images.

    Attributes:
        images, labels, class_names, files: as of ``Dataset``; files are paths below ``root``.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        image_size: int = 64,
        *,
        mode: Literal["RGB", "L"] = "RGB",
        cache: str | os.PathLike[str] | Literal[False] | None = None,
        threads: int | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        max_pixels: int = MAX_PIXELS,
        class_names: Sequence[str] | None = None,
    ) -> None:
        one_of("mode", mode, *_CHANNELS)
        one_of("on_error", on_error, "raise", "skip")
        size = whole("image_size", image_size, 1, _LARGEST)
        most = whole("max_pixels", max_pixels, 1)
        workers = cores() if threads is None else whole("threads", threads, 1)
        folder = Path(root)
        pillow()
        names, found = find_images(folder, class_names)
        rows = partial(_rows, folder, found, size, mode, most, workers, on_error)
        images, skipped = (
            _in_memory(len(found), (_CHANNELS[mode], size, size), rows())
            if cache is False
            else _cached(folder, found, size, mode, most, cache, rows, on_error)
        )
        if skipped:
            kept = set(range(len(found))) - set(skipped)
            _warn(folder, found, skipped)
            found = [found[number] for number in sorted(kept)]
            _check_left(folder, names, found, class_names is not None)
        labels = np.asarray([file.label for file in found], np.int64)
        super().__init__(images, labels, names, [file.name for file in found])

    @classmethod
    def train_and_test(
        cls,
        root: str | os.PathLike[str],
        image_size: int = 64,
        *,
        test_share: float = 0.2,
        seed: int = 0,
        mode: Literal["RGB", "L"] = "RGB",
        cache: str | os.PathLike[str] | Literal[False] | None = None,
        threads: int | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        max_pixels: int = MAX_PIXELS,
    ) -> tuple[Dataset, Dataset]:
        """Return the training set and the test set of a folder.

        If ``root`` has ``train/`` and one of ``test/``, ``val/``, ``valid/`` and ``validation/``,
        these are the sets, with the classes of ``train/``. Otherwise ``test_share`` of the images
        of each class is split off by ``seed``.
        """
        parts = parts_of(Path(root))

        def folder(path: str | os.PathLike[str], names: Sequence[str] | None) -> "ImageFolder":
            return cls(
                path,
                image_size,
                mode=mode,
                cache=cache,
                threads=threads,
                on_error=on_error,
                max_pixels=max_pixels,
                class_names=names,
            )

        if parts is None:
            return split_off(folder(root, None), test_share, seed)
        train = folder(parts[0], None)
        return train, folder(parts[1], train.class_names)


def _rows(
    root: Path,
    found: list[Found],
    size: int,
    mode: str,
    max_pixels: int,
    threads: int,
    on_error: str,
) -> Generator[HostArray | None, None, None]:
    """Yield the decoded images in the order of the files; None for one that is skipped."""

    def row(file: Found) -> HostArray | None:
        path = root / file.name
        try:
            return decode(path, str(path), (size, size), mode, max_pixels)
        except DataFormatError:
            if on_error == "raise":
                raise
            return None

    from tqdm import tqdm

    made = in_order(row, found, threads, 4 * threads)
    bar = tqdm(made, "decoding", len(found), leave=False, disable=None, delay=1.0, unit=" images")
    with closing(made):
        yield from bar


def _in_memory(
    count: int, sample: tuple[int, ...], rows: Generator[HostArray | None, None, None]
) -> tuple[HostArray, list[int]]:
    """Return the images, and the numbers of the files that are skipped."""
    images, skipped = np.empty((count, *sample), np.uint8), []
    for number, image in enumerate(rows):
        if image is None:
            skipped.append(number)
        else:
            images[number - len(skipped)] = image
    return images[: count - len(skipped)], skipped


def _cached(
    root: Path,
    found: list[Found],
    size: int,
    mode: str,
    max_pixels: int,
    cache: str | os.PathLike[str] | None,
    rows: partial[Generator[HostArray | None, None, None]],
    on_error: str,
) -> tuple[HostArray, list[int]]:
    """Return the images as a memory map of the cache, which is written if there is none, and the
    numbers of the files that are skipped."""
    sample = (_CHANNELS[mode], size, size)
    place = cache_folder() / "images" if cache is None else Path(cache)
    key = _key(root, found, repr((RULE, size, mode, max_pixels)))
    readable = "".join(c if c.isalnum() else "-" for c in root.resolve().name)
    path = place / f"{beginning(readable, 40)}-{key[:16]}.images"
    kept = open_cache(path, key, sample)
    # with "raise", a file that was skipped before is decoded again, for its error
    if kept is None or (kept[1] and on_error == "raise"):
        nbytes = len(found) * sample[0] * size * size
        _log.info("decoding %d images of %s into %s", len(found), root, path)
        made = rows()
        with closing(made):
            write_cache(path, key, made, nbytes)
        kept = open_cache(path, key, sample)
    if kept is None:
        raise OSError(
            f"the cache of images {path} was damaged as soon as it was written; choose another "
            "folder: cache=..., or decode into memory: cache=False"
        )
    return kept


def _key(root: Path, found: list[Found], how: str) -> str:
    """Return what a cache is for: the folder, the rule, and each file's name, size and time."""
    hashed = hashlib.sha256(how.encode() + os.fsencode(root.resolve()))
    for file in found:
        hashed.update(os.fsencode(file.name) + f"\0{file.size} {file.mtime}\0".encode())
    return hashed.hexdigest()


def _warn(root: Path, found: list[Found], skipped: list[int]) -> None:
    _log.warning(
        "%s: %d of %d images could not be decoded and were left out, the first is %s",
        root,
        len(skipped),
        len(found),
        found[skipped[0]].name,
    )


def _check_left(root: Path, names: list[str], found: list[Found], partial_set: bool) -> None:
    """Raise DataFormatError if skipping left a class without images."""
    left = {file.label for file in found}
    empty = [name for label, name in enumerate(names) if label not in left]
    if not found or (empty and not partial_set):
        raise DataFormatError(
            f"{root}: no image of the classes {', '.join(empty[:8])} could be decoded"
        )
