"""When to end a training that no longer gets better: ``EarlyStopping``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from portacnn.arguments import AnswersKeywords, flag, not_negative, whole
from portacnn.errors import ArgumentError


@dataclass(frozen=True)
class EarlyStopping(AnswersKeywords):
    """Stop after ``patience`` epochs in a row that brought nothing better on the test images.

    It holds no state: it looks at the figures of all epochs so far.

    Args:
        patience: how many epochs to wait, from 1.
        monitor: "accuracy" or "loss", both over the test images.
        min_delta: what is better must be better by more than this.
        restore_best: when training ends, early or not, the model gets the weights of its best
            epoch.
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
        """The epoch, from 1, with the best of these figures, one an epoch; 0 where there is none
        (NaN is never good)."""
        sign = 1.0 if self.monitor == "accuracy" else -1.0
        best, record = 0, -float("inf")
        for epoch, figure in enumerate(figures, start=1):
            if sign * figure > record + (self.min_delta if best else 0.0):
                best, record = epoch, sign * figure
        return best

    def is_over(self, figures: Sequence[float]) -> bool:
        """Whether patience is at its end after these epochs."""
        return len(figures) - self.best_epoch(figures) >= self.patience


def make_early_stopping(what: EarlyStopping | int | None) -> EarlyStopping | None:
    """A number is a patience; None is none."""
    if what is None or isinstance(what, EarlyStopping):
        return what
    return EarlyStopping(patience=whole("early_stopping (a number is its patience)", what, 1))
