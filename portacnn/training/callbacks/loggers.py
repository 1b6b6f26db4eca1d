"""``CSVLogger`` and ``JSONLogger``: each epoch's figures as a line of a text file.

The lines are made from ``Trainer.history``. A training run that resumes from a checkpoint first
writes the lines of earlier epochs, so the file is the same as without an interruption.
"""

import csv
import io
import json
import os
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar

from portacnn.files import file_path, make_folder, write_atomically
from portacnn.training.callbacks.base import Callback

if TYPE_CHECKING:
    from portacnn.training.trainer import Trainer


class _Lines(Callback):
    """Base of the loggers."""

    every_rank: ClassVar[bool] = False

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = file_path(path, "a log").absolute()
        make_folder(self.path.parent, "the log", "path")

    def on_train_begin(self, trainer: "Trainer") -> None:
        epochs = (
            {name: values[epoch] for name, values in trainer.history.items()}
            for epoch in range(trainer.epoch)
        )
        lines = [self._line(number, figures) for number, figures in enumerate(epochs, start=1)]
        write_atomically(self.path, "".join([self._head(trainer), *lines]).encode())

    def on_epoch_end(self, trainer: "Trainer", figures: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(self._line(trainer.epoch, figures))

    def _head(self, trainer: "Trainer") -> str:
        return ""

    def _line(self, epoch: int, figures: dict[str, Any]) -> str:
        raise NotImplementedError


class CSVLogger(_Lines):
    """Write each epoch's figures to a CSV file with a header. A metric of several values is JSON in
    its cell.

    Args:
        path: the file. Its folder is created. An existing file is replaced when ``train()`` begins.

    Raises:
        ArgumentError: if ``path`` is not a path.
        OSError: if the folder cannot be created or written to.
    """

    def _head(self, trainer: "Trainer") -> str:
        return _row(["epoch", *trainer.history])

    def _line(self, epoch: int, figures: dict[str, Any]) -> str:
        cells = (json.dumps(v) if isinstance(v, list) else v for v in figures.values())
        return _row([epoch, *cells])


class JSONLogger(_Lines):
    """Write each epoch's figures as one JSON object a line. NaN and infinity are null, as JSON has
    neither.

    Args:
        path: the file. Its folder is created. An existing file is replaced when ``train()`` begins.

    Raises:
        ArgumentError: if ``path`` is not a path.
        OSError: if the folder cannot be created or written to.
    """

    def _line(self, epoch: int, figures: dict[str, Any]) -> str:
        return json.dumps(_finite({"epoch": epoch, **figures}), allow_nan=False) + "\n"


def _row(cells: list[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _finite(value: Any) -> Any:
    """Return figures with None for NaN and infinity."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value
