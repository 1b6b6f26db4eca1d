"""``lr_range_test``: find a learning rate (Smith, 2017, section 3.3)."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count, islice
from math import inf
from typing import TYPE_CHECKING, Any

from portacnn.arguments import answering_keywords, positive, whole
from portacnn.errors import ArgumentError, DependencyError, NotFiniteError
from portacnn.schedules import make_schedule

if TYPE_CHECKING:
    from portacnn.training.trainer import Trainer

_DIVERGED = 4.0
"""The test stops when the moving average of the losses exceeds this multiple of its minimum."""


@dataclass(frozen=True)
class LearningRates:
    """What ``lr_range_test`` returns.

    Attributes:
        rates: the learning rates that were tried, increasing.
        losses: the loss of each step.
        smoothed: means of the losses over a tenth of the steps around each step.
        suggestion: the rate at which the loss falls fastest before its minimum, a usual choice for
            a constant or maximum learning rate. None if the loss does not fall.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    suggestion: float | None

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Return a matplotlib ``Figure`` of the losses, and save it to ``path`` if given.

        Raises:
            DependencyError: if matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise DependencyError(
                'matplotlib is not installed: pip install "portacnn[plot]"'
            ) from error
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.rates, self.losses, color="tab:blue", alpha=0.3, label="loss of each step")
        axes.plot(self.rates, self.smoothed, color="tab:blue", label="smoothed")
        low, high = min(self.smoothed), max(self.smoothed[0], *self.losses[:5])
        margin = 0.2 * (high - low) or 1.0
        axes.set_ylim(min(*self.losses, low) - 0.2 * margin, high + 2 * margin)
        if self.suggestion is not None:
            axes.axvline(
                self.suggestion,
                color="tab:orange",
                linestyle="--",
                label=f"steepest fall: {self.suggestion:.2g}",
            )
        axes.set(xscale="log", xlabel="learning rate", ylabel="training loss")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left")
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


@answering_keywords("lr_range_test")
def lr_range_test(
    trainer: "Trainer", lowest: float = 1e-6, highest: float = 1.0, steps: int = 100
) -> LearningRates:
    """Train for a few steps with a growing learning rate, and return the losses.

    The rate grows from ``lowest`` to ``highest`` by the same factor in each step. The test stops
    early if the loss diverges. Afterwards the Trainer is restored: weights, running statistics,
    optimizer and histories. Its callbacks and schedule are not used.

        result = lr_range_test(Trainer(model, x_train, t_train, ...))
        result.plot("learning_rates.png")
        trainer = Trainer(model, x_train, t_train, ..., lr=result.suggestion)

    Args:
        trainer: a Trainer with the data, loss, optimizer and batch size to test.
        lowest, highest: bounds of the learning rate.
        steps: number of steps, at least 2.

    Raises:
        ArgumentError: if an argument is out of range.
        NotFiniteError: if the loss of the first step is not finite.
    """
    lowest, highest = positive("lowest", lowest), positive("highest", highest)
    if lowest >= highest:
        raise ArgumentError(f"lowest must be below highest, got {lowest} and {highest}")
    steps = whole("steps", steps, 2)
    rates = [lowest * (highest / lowest) ** (step / (steps - 1)) for step in range(steps)]
    losses, average, least = list[float](), 0.0, inf
    with _unchanged(trainer):
        for number, (rate, batch) in enumerate(zip(rates, _batches(trainer, steps), strict=True)):
            trainer.optimizer.lr = rate
            trainer.run_batch(*batch[1], size=batch[0])
            try:
                trainer._read_losses()
            except NotFiniteError:
                if not losses:
                    raise
                break
            losses.append(trainer.train_loss_list[-1])
            average = 0.9 * average + 0.1 * losses[-1]
            corrected = average / (1 - 0.9 ** (number + 1))
            least = min(least, corrected)
            if corrected > _DIVERGED * least:
                break
    half = max(1, steps // 20)
    windows = [losses[max(0, i - half) : i + half + 1] for i in range(len(losses))]
    smoothed = [sum(window) / len(window) for window in windows]
    # up to the minimum: after it the losses rise and fall by chance
    slopes = {
        _slope(windows[i]): rates[i]
        for i in range(half, min(smoothed.index(min(smoothed)) + 1, len(losses) - half))
    }
    steepest = min(slopes, default=0.0)
    suggestion = slopes[steepest] if steepest < 0 else None
    return LearningRates(rates[: len(losses)], losses, smoothed, suggestion)


def _slope(values: list[float]) -> float:
    """Return the slope of the least-squares line through equally spaced values."""
    middle = (len(values) - 1) / 2
    return sum((i - middle) * value for i, value in enumerate(values)) / sum(
        (i - middle) ** 2 for i in range(len(values))
    )


def _batches(trainer: "Trainer", steps: int) -> Iterator[Any]:
    """Yield the batches of as many epochs as needed, each with its number of images."""
    epochs = (zip(trainer.batch_sizes, trainer.read(n), strict=True) for n in count())
    return islice(chain.from_iterable(epochs), steps)


@contextmanager
def _unchanged(trainer: "Trainer") -> Iterator[None]:
    """Restore the Trainer and its model at the end of the context."""
    model, home = trainer.model, trainer.backend
    trainer._read_losses()
    arrays = [*model.named_parameters().wholes(), *model.named_buffers().wholes()]
    with home.active():
        copies = [home.xp.asarray(array, copy=True) for array in arrays]
    before = {name: getattr(trainer, name) for name in ("updater", "schedule", "_history")}
    trainer.updater = copy.copy(trainer.updater)
    trainer.optimizer = copy.deepcopy(trainer.optimizer)
    trainer.compile_step = False
    trainer.schedule = make_schedule("constant", 1)  # the optimizer's own rate
    trainer._history = copy.deepcopy(trainer._history)
    try:
        yield
    finally:
        with home.active():
            for array, own in zip(arrays, copies, strict=True):
                array[...] = own
        vars(trainer).update(before)
        trainer.updater.release_memory()
