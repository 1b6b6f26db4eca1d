"""Download the files of a data set with pooch: checksums, mirrors in turn, and a download that was
interrupted is resumed."""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from portacnn.errors import DependencyError
from portacnn.files import make_folder

_log = logging.getLogger("portacnn")
TIMEOUT = 20.0  # seconds without data from a mirror
_CHUNK = 1 << 18
_MOST = 1 << 30
"""Largest number of bytes of a file. EMNIST's archive has 562 MB."""


class _MirrorError(Exception):
    """What a mirror did wrong, unlike an error of this machine's disk."""


def download(
    what: str,
    files: Mapping[str, str],
    mirrors: Sequence[str],
    folder: Path,
    looked_in: Iterable[Path],
    advice: str = "",
) -> None:
    """Download files into a folder. Each appears there when it is complete and its checksum is
    right; one that is there is not downloaded.

    Args:
        what: the data set's name, for messages.
        files: MD5 by file name.
        mirrors: addresses that a file's name is added to, tried in this order.
        looked_in: folders that were searched before, for the message.
        advice: another way, for the message.

    Raises:
        FileNotFoundError: if no mirror has a file. The message says which files to put where.
        DependencyError: if pooch is not installed, with the same message.
        OSError: if the folder cannot be written, or the disk is full.
    """
    wanted = {name: md5 for name, md5 in files.items() if not (folder / name).is_file()}
    if not wanted:
        return
    by_hand = _by_hand(wanted, mirrors, folder, advice)
    looked = f"{what} is not on this machine (looked in {', '.join(map(str, looked_in))})"
    try:
        import pooch
    except ImportError as error:
        raise DependencyError(
            f'{looked}. Downloading it needs pooch: pip install "portacnn[data]". {by_hand}'
        ) from error
    make_folder(folder, "data sets", "one with the environment variable PORTACNN_CACHE")
    for name, md5 in wanted.items():
        failures = []
        for mirror in mirrors:
            _log.info("downloading %s%s to %s", mirror, name, folder)
            try:
                _retrieve(pooch, f"{mirror}{name}", md5, folder, name)
                break
            except (_MirrorError, ValueError) as error:  # pooch's ValueError: another checksum
                failures.append(f"{mirror}{name}: {error}")
        else:
            raise FileNotFoundError(
                f"{looked} and could not be downloaded ({'; '.join(failures)}). {by_hand}"
            )


def _retrieve(pooch: Any, url: str, md5: str, folder: Path, name: str) -> None:
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel(logging.WARNING)  # what it says is said above
    part = folder / f".{name}.part"
    try:
        resumed = part.exists()
        try:
            pooch.retrieve(url, f"md5:{md5}", name, folder, downloader=_Resuming(part))
        except ValueError:
            if not resumed:
                raise
            # what was there before may have been wrong; now it is gone
            pooch.retrieve(url, f"md5:{md5}", name, folder, downloader=_Resuming(part))
    finally:
        logger.setLevel(level)


class _Resuming:
    """A downloader for pooch. What has arrived stays in ``part`` if the connection breaks."""

    def __init__(self, part: Path) -> None:
        self.part = part

    def __call__(self, url: str, output: str, pooch: Any) -> None:
        # here, as they take longer to import than a data set that is there takes to read
        import http.client
        import urllib.error
        import urllib.request

        have = self.part.stat().st_size if self.part.exists() else 0
        request = urllib.request.Request(url)
        if have:
            request.add_header("Range", f"bytes={have}-")
        try:
            response = urllib.request.urlopen(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the part is as long as the file, or longer
                os.replace(self.part, output)
                return
            raise _MirrorError(str(error)) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise _MirrorError(str(error) or type(error).__name__) from error
        with response:
            if response.status != 206:
                have = 0  # the mirror sends the whole file
            try:
                with open(self.part, "ab" if have else "wb") as file:
                    self._receive(response, file, have)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:  # this machine's: the disk is full, perhaps
                self.part.unlink(missing_ok=True)
                raise
        os.replace(self.part, output)

    def _receive(self, response: Any, file: IO[bytes], have: int) -> None:
        import http.client

        from tqdm import tqdm

        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdigit() else None
        with tqdm(
            desc=self.part.name[1:-5],
            total=total,
            initial=have,
            unit="B",
            unit_scale=True,
            leave=False,
            disable=None,
            delay=1.0,
        ) as bar:
            while True:
                try:
                    content = response.read(_CHUNK)
                except (OSError, ValueError, http.client.HTTPException) as error:
                    raise _MirrorError(str(error) or type(error).__name__) from error
                if not content:
                    break
                have += file.write(content)
                bar.update(len(content))
                if have > _MOST:
                    raise _MirrorError(f"it sends more than {_MOST} bytes")
        if total is not None and have < total:
            raise _MirrorError(f"the connection broke after {have} of {total} bytes")


def _by_hand(files: Iterable[str], mirrors: Sequence[str], folder: Path, advice: str) -> str:
    return (
        f"To do it by hand, download {', '.join(files)} from {' or '.join(mirrors)} and put them "
        f"into the folder {folder}{f'; {advice}' if advice else ''}"
    )
