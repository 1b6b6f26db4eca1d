"""``Evaluating``: what a Trainer does at the end of an epoch: it evaluates the sets, records the
figures, and keeps the best weights."""

import time
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from portacnn.losses import Loss
from portacnn.models.evaluation import evaluate
from portacnn.models.info import last_figures, range_of
from portacnn.runtime import HostArray
from portacnn.training.callbacks.running import Callbacks
from portacnn.training.early_stopping import EarlyStopping
from portacnn.training.feed import Samples
from portacnn.training.history import History
from portacnn.training.ranks import Ranks
from portacnn.training.results import Results


class Evaluating(Results):
    """The part of ``Trainer`` that evaluates after each epoch."""

    ranks: Ranks
    callbacks: Callbacks
    early_stopping: EarlyStopping | None
    evaluate_sample_num_per_epoch: int | None
    batch: int
    stopped_early: bool
    batch_sizes: list[int]
    _last_lr: float
    _history: History
    _range: tuple[float, ...] | None
    _best_weights: dict[str, HostArray] | None

    def as_evaluated(self) -> AbstractContextManager[None]:
        """Return a context in which the model has the weights that are evaluated after each epoch:
        with an ``EMA`` the averages, otherwise its own."""
        return self.callbacks.evaluating(self)

    def _take_best(self) -> None:
        """Load the weights of the best epoch into the model, if they were kept."""
        if self._best_weights is not None:
            self.model.load_state_dict(self._best_weights)
            if self.early_stopping is not None:
                watched = self.history[f"test_{self.early_stopping.monitor}"]
                self._tell_model(self.early_stopping.best_epoch(watched))

    def _tell_model(self, epoch: int) -> None:
        """Make the model know its task, and its figures after this epoch."""
        info = self.model.info
        figures = {**info.figures, **last_figures(self.history, epoch)}
        if self._range is None:
            with self.backend.active():
                self._range = range_of(self.x_train)
        names = info.class_names or self._sets.class_names
        self.model.info = replace(
            info,
            class_names=names if len(names) in self.model.output_shape[:1] else (),
            task=self.loss.task,
            figures=figures,
            input_range=self._range,
        )

    def _end_epoch(self, began: float, count: int) -> None:
        """Append the epoch's figures to the lists, and check whether it was the best or the last
        one.

        Args:
            began: when its first step began, or the first one after it was resumed.
            count: number of images trained on since.
        """
        sizes, trained = self.batch_sizes, time.perf_counter()
        step_losses = self.train_loss_list[-len(sizes) :]
        figures: dict[str, Any] = {
            "train_loss": sum(n * loss for n, loss in zip(sizes, step_losses, strict=True))
            / sum(sizes),
            "lr": self._last_lr,
        }
        with self.as_evaluated():
            train = self._evaluate(self._sets.train, None)
            test = {} if self._sets.test is None else self._evaluate(self._sets.test, self.loss)
        for which, values in (("train", train), ("test", test)):
            figures |= {f"{which}_{name}": value for name, value in values.items()}
        figures |= {
            "seconds": time.perf_counter() - began,
            "images_per_second": count / (trained - began),
        }
        self._history.end_epoch(self.ranks.share(figures))
        self.epoch, self.batch = self.epoch + 1, 0
        self._tell_model(self.epoch)
        stopping = self.early_stopping
        if stopping is not None:
            watched = self.history[f"test_{stopping.monitor}"]
            if stopping.restore_best and stopping.best_epoch(watched) == self.epoch:
                with self.as_evaluated():
                    self._best_weights = self.model.state_dict()
            self.stopped_early = stopping.is_over(watched)

    def _evaluate(self, samples: Samples, loss: Loss | None) -> dict[str, Any]:
        """Return loss and metrics over the first samples of a set, as many as requested."""
        samples, model = samples.first(self.evaluate_sample_num_per_epoch), self.model
        least = max(layer.least_predicted for layer in model.walk())
        first, last = self.ranks.part(int(samples.images.shape[0]), least)
        own = samples.part(first, last).images
        batches = model.outputs(own) if last > first else ()
        return evaluate(
            self.backend,
            ((first + i, first + j, y) for i, j, y in batches),
            samples.targets,
            None if loss is None else loss.for_evaluation(),
            self.metrics,
            samples.weights,
            model.dtype,
            None if self.ranks.alone else self.ranks,
        )
