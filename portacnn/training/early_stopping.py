"""Decide when to end a training that no longer improves: ``EarlyStopping``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from portacnn.arguments import AnswersKeywords, flag, not_negative, whole
from portacnn.errors import ArgumentError


@dataclass(frozen=True)
class EarlyStopping(AnswersKeywords):
    """Stop after ``patience`` epochs in a row without improvement on the test images.

    It holds no state: it looks at the figures of all epochs so far.

        >>> stopping = EarlyStopping(patience=2)
        >>> stopping.is_over([0.8, 0.9, 0.9]), stopping.is_over([0.8, 0.9, 0.9, 0.85])
        (False, True)

    Args:
        patience: number of epochs to wait, at least 1.
        monitor: "accuracy" or "loss", both over the test images.
        min_delta: an improvement must be larger than this.
        restore_best: when training ends, early or not, load the weights of the best epoch.

    Raises:
        ArgumentError: if an argument is out of range.
    """

    patience: int = 5
    monitor: Literal["accuracy", "loss"] = "accuracy"
    min_delta: float = 0.0
    restore_best: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "patience", whole("patience", self.patience, 1))
        object.__setattr__(self, "min_delta", not_negative("min_delta", self.min_delta))
        object.__setattr__(self, "restore_best", flag("restore_best", self.restore_best))
        if self.monitor not in ("accuracy", "loss"):
            raise ArgumentError(f'monitor must be "accuracy" or "loss", got {self.monitor!r}')

    def best_epoch(self, figures: Sequence[float]) -> int:
        """Return the best epoch, from 1, given one figure per epoch; 0 if there is none. NaN is
        never best."""
        sign = 1.0 if self.monitor == "accuracy" else -1.0
        best, record = 0, -float("inf")
        for epoch, figure in enumerate(figures, start=1):
            if sign * figure > record + (self.min_delta if best else 0.0):
                best, record = epoch, sign * figure
        return best

    def is_over(self, figures: Sequence[float]) -> bool:
        """Return whether the last ``patience`` of these epochs brought no improvement."""
        return len(figures) - self.best_epoch(figures) >= self.patience


def make_early_stopping(what: EarlyStopping | int | None) -> EarlyStopping | None:
    """Return an ``EarlyStopping``: a number is its patience, None stays None."""
    if what is None or isinstance(what, EarlyStopping):
        return what
    return EarlyStopping(patience=whole("early_stopping (a number is its patience)", what, 1))
