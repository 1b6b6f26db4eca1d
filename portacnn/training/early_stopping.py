"""Decide when to end a training run that no longer improves: ``EarlyStopping``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from portacnn.arguments import AnswersKeywords, flag, not_negative, one_of, whole
from portacnn.errors import ArgumentError
from portacnn.metrics import Metric


@dataclass(frozen=True)
class EarlyStopping(AnswersKeywords):
    """Stop after ``patience`` epochs in a row without improvement on the test images.

    It holds no state: it looks at the figures of all epochs so far.

        >>> stopping = EarlyStopping(patience=2)
        >>> stopping.is_over([0.8, 0.9, 0.9]), stopping.is_over([0.8, 0.9, 0.9, 0.85])
        (False, True)

    Args:
        patience: number of epochs to wait, at least 1.
        monitor: the figure over the test images to watch: "loss" or the name of a metric. The
            default is "accuracy" if it is among the metrics, otherwise "loss".
        min_delta: an improvement must be larger than this.
        better: whether a "higher" or a "lower" figure is better. The default follows from the
            metric; it is lower for "loss", "mae" and "rmse", and higher for others.
        restore_best: when training ends, early or not, load the weights of the best epoch.

    Raises:
        ArgumentError: if an argument is out of range.
    """

    patience: int = 5
    monitor: str | None = None
    min_delta: float = 0.0
    restore_best: bool = True
    better: Literal["higher", "lower"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "patience", whole("patience", self.patience, 1))
        object.__setattr__(self, "min_delta", not_negative("min_delta", self.min_delta))
        object.__setattr__(self, "restore_best", flag("restore_best", self.restore_best))
        if self.monitor is not None and not isinstance(self.monitor, str):
            raise ArgumentError(
                f'monitor must be "loss" or the name of a metric, got {self.monitor!r}'
            )
        if self.better is not None:
            one_of("better", self.better, "higher", "lower")
        elif (self.monitor or "").removeprefix("test_") in ("loss", "mae", "rmse"):
            object.__setattr__(self, "better", "lower")

    def best_epoch(self, figures: Sequence[float]) -> int:
        """Return the best epoch, from 1, given one figure per epoch; 0 if there is none. NaN is
        never best."""
        sign = -1.0 if self.better == "lower" else 1.0
        best, record = 0, -float("inf")
        for epoch, figure in enumerate(figures, start=1):
            if sign * figure > record + (self.min_delta if best else 0.0):
                best, record = epoch, sign * figure
        return best

    def is_over(self, figures: Sequence[float]) -> bool:
        """Return whether the last ``patience`` of these epochs brought no improvement."""
        return len(figures) - self.best_epoch(figures) >= self.patience


def make_early_stopping(
    what: EarlyStopping | int | None,
    metrics: Mapping[str, Metric],
    tested: bool,
    who: str = "early_stopping",
) -> EarlyStopping | None:
    """Return an ``EarlyStopping`` that watches a figure that there is: a number is its patience,
    None stays None.

    Args:
        metrics: those of the training run, by name.
        tested: whether there is a test set.
        who: what watches, for the message.

    Raises:
        ArgumentError: if there is nothing to watch.
    """
    if what is None:
        return None
    if not isinstance(what, EarlyStopping):
        what = EarlyStopping(patience=whole("early_stopping (a number is its patience)", what, 1))
    if not tested:
        raise ArgumentError(
            f"{who} needs a test set; pass x_test and t_test, or validation_split=0.1"
        )
    name = what.monitor
    if name is None:
        name = "accuracy" if "accuracy" in metrics else "loss"
        return replace(what, monitor=name)
    name = name.removeprefix("test_")
    if name not in ("loss", *metrics):
        raise ArgumentError(
            f"{who} monitors {what.monitor!r}, but the figures are "
            f"{', '.join(('loss', *metrics))}; add it to metrics"
        )
    better = what.better
    if name != "loss":
        if not metrics[name].is_number:
            raise ArgumentError(
                f"{who} monitors {what.monitor!r}, which is not one number; choose another figure"
            )
        if better is None and metrics[name].better == "lower":
            better = "lower"
    return replace(what, monitor=name, better=better)
