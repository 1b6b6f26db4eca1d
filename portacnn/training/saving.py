"""``Saver``: where and when a training run writes its checkpoints."""

import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from portacnn.errors import ArgumentError, CheckpointError
from portacnn.training import folder


class Saver:
    """The checkpoints of one training run.

    Attributes:
        run: six hexadecimal digits that the names of its files hold.
        folder, every, keep, last: the Trainer's ``checkpoint_dir``, ``checkpoint_every``, ``keep``
            and ``last_checkpoint``.
    """

    def __init__(self, every: int | None, keep: int) -> None:
        self.run = secrets.token_hex(3)
        self.every, self.keep = every, keep
        self.folder: Path | None = None
        self.last: Path | None = None
        # the folder locked against other Trainers of this run
        self._sole_in: Path | None = None

    def is_due(self, steps: int) -> bool:
        """Return whether ``every`` requires a checkpoint after this many steps."""
        return self.folder is not None and self.every is not None and steps % self.every == 0

    def place(self, path: str | os.PathLike[str] | None) -> Path:
        """Return where a checkpoint goes: ``path``, or the folder if it is None. Raises
        ArgumentError if there is neither."""
        place = self.folder if path is None else Path(path).absolute()
        if place is None:
            raise ArgumentError("there is no checkpoint_dir; pass a path: checkpoint(path)")
        return place

    def save(
        self, path: str | os.PathLike[str] | None, steps: int, write: Callable[[Path], None]
    ) -> Path:
        """Write the checkpoint of so many steps to ``path``, or into the folder; return its path.

        Args:
            write: writes it to a file.

        Raises:
            CheckpointError: see ``Trainer.checkpoint``.
        """
        place = self.place(path)
        try:
            if path is not None:
                write(place)
            else:
                with self.sole():
                    place = folder.add(place, self.run, steps, self.keep, write)
        except CheckpointError:
            raise
        except OSError as error:
            failed = CheckpointError(
                f"the checkpoint of step {steps} could not be written to {place}: "
                f"{error}. Earlier checkpoints are unchanged, and the training run is intact in "
                "memory: free some disk space and call train() to continue, or write elsewhere "
                "with checkpoint(path)"
            )
            failed.errno = error.errno or errno.EIO
            raise failed from error
        self.last = place
        return place

    @contextmanager
    def sole(self) -> Iterator[None]:
        """Lock this run's checkpoints in the folder against other Trainers.

        Raises:
            CheckpointError: if another Trainer holds the lock.
        """
        place, before = self.folder, self._sole_in
        if place is None or place == before:
            yield
            return
        with folder.sole(place, self.run):
            self._sole_in = place
            try:
                yield
            finally:
                self._sole_in = before
