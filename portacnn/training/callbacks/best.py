"""``KeepBest``: a file with the weights of the best epoch so far."""

import os
from typing import TYPE_CHECKING, Any, ClassVar

from portacnn.files import file_path, make_folder
from portacnn.training.callbacks.base import Callback
from portacnn.training.early_stopping import EarlyStopping, make_early_stopping

if TYPE_CHECKING:
    from portacnn.training.trainer import Trainer


class KeepBest(Callback):
    """Save the model (``Model.save``) after each epoch with the best test figure so far.

    It saves the weights that were evaluated; with an ``EMA`` these are the averages. For
    checkpoints to resume a training run from, see ``Trainer(checkpoint_dir=...)``.

    Args:
        path: the file. Its folder is created.
        monitor: the figure to watch, as in ``EarlyStopping``.

    Raises:
        ArgumentError: if ``path`` is not a path; when ``train()`` begins, if there is no such
            figure.
        OSError: if the file cannot be written.
    """

    every_rank: ClassVar[bool] = False

    def __init__(self, path: str | os.PathLike[str], monitor: str | None = None) -> None:
        self.path = file_path(path, "a model").absolute()
        make_folder(self.path.parent, "the model", "path")
        self._watch = EarlyStopping(monitor=monitor)

    def on_train_begin(self, trainer: "Trainer") -> None:
        tested = trainer.x_test is not None
        made = make_early_stopping(self._watch, trainer.metrics, tested, "KeepBest")
        assert made is not None
        self._watch = made

    def on_epoch_end(self, trainer: "Trainer", figures: dict[str, Any]) -> None:
        watched = trainer.history[f"test_{self._watch.monitor}"]
        if self._watch.best_epoch(watched) == trainer.epoch:
            with trainer.as_evaluated():
                trainer.model.save(self.path)
