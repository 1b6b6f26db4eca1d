"""``Results``: what a Trainer says about its training, its data and its model."""

from collections.abc import Mapping
from typing import Any

from portacnn.errors import ArgumentError
from portacnn.losses import Loss
from portacnn.metrics import Metric
from portacnn.models import Model
from portacnn.optim import Optimizer
from portacnn.runtime import Array, Backend
from portacnn.training.history import View
from portacnn.training.notebook import page
from portacnn.training.sets import Sets


class Results:
    """The part of ``Trainer`` that changes nothing: figures, data, evaluation and predictions."""

    model: Model
    backend: Backend
    metrics: Mapping[str, Metric]
    epochs: int
    epoch: int
    batch_size: int
    _sets: Sets

    loss = View[Loss]("updater", "loss")
    optimizer = View[Optimizer]("updater", "optimizer")
    train_loss_list = View[list[float]]("_history", "steps")
    history = View[dict[str, list[float]]]("_history", "epochs")

    def evaluate(self, x: Array, t: Array, batch_size: int | None = None) -> dict[str, Any]:
        """Return the loss and the metrics of images x with targets t, by name; see
        ``Model.evaluate``. Each process that calls it evaluates all of x."""
        loss = self.loss.for_evaluation()
        return self.model.evaluate(x, t, loss=loss, metrics=self.metrics, batch_size=batch_size)

    def predict_proba(self, x: Array, batch_size: int | None = None) -> Array:
        """Return probabilities for images x, (N, C, ...): the softmax or sigmoid of the outputs,
        as the loss has it. Outputs of a regression are returned as they are."""
        return self.loss.scores(self.model.predict(x, batch_size))

    def predict_classes(self, x: Array, batch_size: int | None = None) -> Array:
        """Return predictions for images x: the class of each (N, ...) int64, or for multi-label
        losses 0 or 1 for each label (N, C). -1 where an output is NaN.

        Raises:
            ArgumentError: if the loss is not one of classes.
        """
        if self.loss.task not in ("multiclass", "multilabel"):
            raise ArgumentError(
                f"{type(self.loss).__name__} has no classes; use model.predict(x) for the values"
            )
        return self.loss.predictions(self.model.predict(x, batch_size))

    def __repr__(self) -> str:
        done = f"{self.epoch} of {self.epochs} epochs done"
        figures = ", ".join(
            f"{name} {each[-1]:.4g}"
            for name, each in self.history.items()
            if each and name.startswith(("train_", "test_")) and isinstance(each[-1], float)
        )
        return (
            f"Trainer({type(self.model).__name__} on {self.backend}, "
            f"{type(self.loss).__name__}, "
            f"{type(self.optimizer).__name__}(lr={self.optimizer.lr:g}), "
            f"{self._sets.train.count} training images, batch_size={self.batch_size}, {done}"
            f"{', ' if figures else ''}{figures})"
        )

    def _repr_html_(self) -> str:
        """Return settings, curves and the last epochs as HTML for a notebook."""
        return page(repr(self), self.history)

    @property
    def x_train(self) -> Array:
        """The training images, checked."""
        return self._sets.train.images

    @property
    def t_train(self) -> Array:
        """The training targets, checked."""
        return self._sets.train.targets

    @property
    def x_test(self) -> Array | None:
        """The test images, checked; None if there are none."""
        return None if self._sets.test is None else self._sets.test.images

    @property
    def t_test(self) -> Array | None:
        """The test targets, checked; None if there are none."""
        return None if self._sets.test is None else self._sets.test.targets

    @property
    def epoch_loss_list(self) -> list[float]:
        """``history["train_loss"]``: the mean loss of every epoch's batches."""
        return self.history["train_loss"]

    @property
    def test_loss_list(self) -> list[float]:
        """``history["test_loss"]``; empty without a test set."""
        return self.history.get("test_loss", [])

    @property
    def train_acc_list(self) -> list[float]:
        """``history["train_accuracy"]``; empty if accuracy is not among the metrics."""
        return self.history.get("train_accuracy", [])

    @property
    def test_acc_list(self) -> list[float]:
        """``history["test_accuracy"]``; empty if there is none."""
        return self.history.get("test_accuracy", [])
