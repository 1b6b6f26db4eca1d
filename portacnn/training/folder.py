"""Manage a folder of checkpoints: their names, which one is the newest, and which may be deleted.

A checkpoint is called ``checkpoint-<number>-step-<steps>-<run>.safetensors``. Numbers count up in
the order of writing, across runs, so the name alone tells the newest one, without clocks.
``latest`` is a small text file with the name of the last checkpoint, because links are not
available everywhere. Files of other runs are never changed, so several runs may share a folder.
Only one process at a time may write the checkpoints of a run (``sole``).
"""

import contextlib
import errno
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from portacnn.errors import CheckpointError, ModelFormatError
from portacnn.files import write_atomically
from portacnn.training.lock import locked

LATEST = "latest"
RUN = "[0-9a-f]{6}"
"""Pattern of a run's identifier, which is part of its files' names."""
_NAME = re.compile(rf"checkpoint-(\d+)-step-(\d+)-({RUN})\.safetensors", re.ASCII)
T = TypeVar("T")
_log = logging.getLogger("portacnn")


class Found(NamedTuple):
    """A checkpoint file, described by its name."""

    number: int
    run: str
    path: Path


def checkpoints(folder: Path) -> list[Found]:
    """Return the files whose names are those of checkpoints, in the order in which they were
    written."""
    names = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted(Found(int(name[1]), name[3], path) for name, path in names if name)


@contextlib.contextmanager
def sole(folder: Path, run: str) -> Iterator[None]:
    """Lock this run's checkpoints in the folder against other writers.

    Raises:
        CheckpointError: if another writer holds the lock.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / f".lock-{run}"))
        except BlockingIOError as error:
            refused = CheckpointError(
                "this run is already being trained, in another process or by another Trainer, "
                f"which writes its checkpoints to {folder}. Wait until it ends, or choose another "
                "folder: resume(..., checkpoint_dir=...) or --checkpoint-dir"
            )
            refused.errno = errno.EAGAIN
            raise refused from error
        yield


def add(folder: Path, run: str, step: int, keep: int, write: Callable[[Path], None]) -> Path:
    """Write a checkpoint of a run, then delete the run's oldest ones so that ``keep`` remain.

    Args:
        write: writes the file, completely or not at all.

    Raises:
        OSError: if it could not be written. All other checkpoints are unchanged.
    """
    before = checkpoints(folder)
    number = 1 + max((found.number for found in before), default=0)
    path = folder / f"checkpoint-{number:06d}-step-{step}-{run}.safetensors"
    write(path)
    pointer = folder / f".{LATEST}-{run}"
    write_atomically(pointer, f"{path.name}\n".encode())
    os.replace(pointer, folder / LATEST)
    own = [found.path for found in before if found.run == run and found.path.is_file()]
    left_over = folder.glob(f".*-{run}.*.tmp")  # from a process killed while writing
    for old in [*own[: max(0, len(own) + 1 - keep)], *left_over]:
        with contextlib.suppress(
            OSError
        ):  # perhaps another process has it open; the next call retries
            old.unlink()
    return path


def newest(path: Path, read: Callable[[Path], T]) -> tuple[Path, T]:
    """Return the path of a checkpoint and ``read(path)``: of the file itself, or the newest intact
    one in a folder.

    A broken or unreadable file is skipped with a warning.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ModelFormatError, OSError: from ``read``, for the file, or for the newest one if none can be
            read.
    """
    if path.name == LATEST and path.is_file():
        path = path.parent
    if not path.is_dir():
        return path, read(path)
    errors: list[ModelFormatError | OSError] = []
    listed: list[Found] | None = None
    # repeat if a run in progress has replaced all files meanwhile
    while (found := checkpoints(path)) != listed:
        listed = found
        errors.clear()
        for _, _, file in reversed(found):
            try:
                if not file.is_file():
                    raise ModelFormatError("it is not a file", str(file))
                content = read(file)
            except (ModelFormatError, OSError) as error:
                errors.append(error)
                continue
            for broken in errors:
                _log.warning("skipped a broken checkpoint: %s; resuming from %s", broken, file)
            return file, content
    if not errors:
        raise FileNotFoundError(f"no checkpoint in {path}")
    raise errors[0]
