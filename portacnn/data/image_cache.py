"""The cache of decoded images: one file, written atomically, that is memory-mapped.

    offset  size         meaning
    0       N * C*H*W    pixels, uint8
    ...     N * 4        CRC-32 of each image's pixels, little-endian
    ...     K * 8        numbers of the K files that could not be decoded, little-endian
    -256    256          JSON: format, key, N, K, CRC-32 of the two tables; spaces

Everything that describes the pixels follows them, so the file is written from its beginning to its
end while the images are decoded. A file that is short, damaged or of another key is as good as
none.
"""

import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from portacnn.errors import DataFormatError
from portacnn.files import make_folder, write_atomically
from portacnn.runtime import HostArray

_FORMAT = 1
_END = 256  # bytes of the JSON
_LOOKED_AT = 1 << 28
"""Largest number of bytes of pixels whose checksums are compared when a cache is opened: all of a
smaller one, else images spread over it."""
_STALE = 24 * 3600.0  # seconds after which an unfinished file of another process is removed


def open_cache(path: Path, key: str, sample: tuple[int, ...]) -> tuple[HostArray, list[int]] | None:
    """Return the images of a cache file, a memory map (N, *sample), and the numbers of the files
    that could not be decoded; None if there is no such cache, or it is damaged."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - _END))
            end = json.loads(file.read(_END))
            count, skipped = int(end["count"]), int(end["skipped"])
            begin = count * prod(sample)
            if end["format"] != _FORMAT or end["key"] != key or count < 1 or skipped < 0:
                return None
            if size != begin + 4 * count + 8 * skipped + _END:
                return None
            file.seek(begin)
            tables = file.read(4 * count + 8 * skipped)
        if zlib.crc32(tables) != end["crc"]:
            return None
        images = np.memmap(path, np.uint8, "r", shape=(count, *sample))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    sums = np.frombuffer(tables[: 4 * count], "<u4")
    for index in range(0, count, max(1, -(-begin // _LOOKED_AT))):
        if zlib.crc32(images[index]) != sums[index]:
            return None
    return images, np.frombuffer(tables[4 * count :], "<i8").tolist()


def write_cache(path: Path, key: str, images: Iterable[HostArray | None], nbytes: int) -> None:
    """Write a cache file from decoded images; None stands for a file that could not be decoded.

    Args:
        nbytes: of all images, for the message.

    Raises:
        OSError: if the folder or the file cannot be written, or the disk is full. No part of the
            file is left behind. What decoding raises is raised as it is.
    """
    advice = "folder for the cache: PORTACNN_CACHE or cache=..., or decode into memory: cache=False"
    folder = make_folder(path.parent, "the cache of images", advice)
    _remove_stale(folder)
    try:
        write_atomically(path, _content(key, images))
    except OSError as error:
        failed = OSError(
            f"the cache of images could not be written to {path}: {error.strerror or error}; it "
            f"needs {nbytes / 1e6:,.1f} MB. Free some disk space, or choose another {advice}"
        )
        failed.errno = error.errno
        raise failed from error


def _content(key: str, images: Iterable[HostArray | None]) -> Iterator[bytes | memoryview]:
    sums, skipped = [], []
    for number, image in enumerate(images):
        if image is None:
            skipped.append(number)
            continue
        sums.append(zlib.crc32(image))
        yield memoryview(image).cast("B")
    if not sums:
        raise DataFormatError(f"none of the {len(skipped)} images could be decoded")
    tables = np.asarray(sums, "<u4").tobytes() + np.asarray(skipped, "<i8").tobytes()
    end: dict[str, Any] = {"format": _FORMAT, "key": key, "crc": zlib.crc32(tables)}
    text = json.dumps(end | {"count": len(sums), "skipped": len(skipped)})
    yield tables + text.encode().ljust(_END)


def _remove_stale(folder: Path) -> None:
    """Remove what a process that was killed left unfinished. One that still writes is younger."""
    try:
        for entry in folder.glob(".*.images.*.tmp"):
            if time.time() - entry.stat().st_mtime > _STALE:
                os.unlink(entry)
    except OSError:
        pass  # another process was faster, or may not
