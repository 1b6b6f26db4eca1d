"""``TensorBoard``: write figures to an event file, with TensorBoard's own writer."""

import os
import time
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from portacnn.errors import DependencyError
from portacnn.files import file_path, make_folder
from portacnn.training.callbacks.base import Callback

if TYPE_CHECKING:
    from portacnn.training.trainer import Trainer


class TensorBoard(Callback):
    """Write each epoch's figures for TensorBoard, and the loss of each of its steps.

    The horizontal axis counts steps. A metric of several values becomes a curve for each of them.
    View the curves with ``tensorboard --logdir folder``. A training run that resumes writes a new
    file, which tells TensorBoard to discard later steps of earlier files.

    Args:
        folder: of the event files; use one for each training run. It is created.

    Raises:
        DependencyError: if neither tensorboard nor tensorboardX is installed.
        ArgumentError: if ``folder`` is not a path.
        OSError: if the folder cannot be created or written to.
    """

    every_rank: ClassVar[bool] = False

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._writers()
        self.folder = make_folder(file_path(folder, "a folder"), "event files").absolute()
        self._writer: Any = None

    def on_train_begin(self, trainer: "Trainer") -> None:
        writer, event, session, _ = self._writers()
        self._writer = writer(str(self.folder))
        first = trainer.epoch * trainer.steps_per_epoch + 1
        self._add(event, first, session_log=session(status=session.START))

    def on_epoch_end(self, trainer: "Trainer", figures: dict[str, Any]) -> None:
        _, event, _, summary = self._writers()
        first = trainer.steps_done - trainer.steps_per_epoch
        curves = [
            (step, "loss", loss)
            for step, loss in enumerate(trainer.train_loss_list[first:], start=first + 1)
        ]
        curves += [
            (trainer.steps_done, tag, number)
            for name, value in figures.items()
            for tag, number in _numbers(name, value)
        ]
        for step, tag, number in curves:
            value = summary.Value(tag=tag, simple_value=number)
            self._add(event, step, summary=summary(value=[value]))
        self._writer.flush()

    def on_train_end(self, trainer: "Trainer") -> None:
        self._writer.close()
        self._writer = None

    def _add(self, event: Any, step: int, **content: Any) -> None:
        self._writer.add_event(event(wall_time=time.time(), step=step, **content))

    @staticmethod
    def _writers() -> tuple[Any, Any, Any, Any]:
        """Return the classes of the writer and of its messages. Raises DependencyError if
        TensorBoard is not installed."""
        for library, protos, writer in (
            ("tensorboard", "compat.proto", "summary.writer.event_file_writer"),
            ("tensorboardX", "proto", "event_file_writer"),
        ):
            try:
                events = import_module(f"{library}.{protos}.event_pb2")
                summaries = import_module(f"{library}.{protos}.summary_pb2")
                files = import_module(f"{library}.{writer}")
            except ImportError:
                continue
            return files.EventFileWriter, events.Event, events.SessionLog, summaries.Summary
        raise DependencyError(
            "TensorBoard's writer is not installed: pip install tensorboard (or tensorboardX)"
        )


def _numbers(tag: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yield a figure's numbers, each with its tag."""
    if isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _numbers(f"{tag}/{index}", inner)
    else:
        yield tag, float(value)
