"""Metrics per class: ``Precision``, ``Recall``, ``F1``, ``BalancedAccuracy``, ``MeanIoU``,
``DiceScore``.

All are computed from four counts per class: true positives (hits), predicted, true, and all
predictions. 0/0 is 0, as in scikit-learn. An output of NaN predicts no class, so it misses the true
class; for multilabel outputs it counts as the wrong value.
"""

from dataclasses import dataclass
from math import nan
from typing import Any

from portacnn.arguments import one_of
from portacnn.metrics.base import Counting, tally
from portacnn.runtime import Array, HostArray, backend_of

Counts = tuple[int, int, int, int]
AVERAGES = ("macro", "micro", "binary", "none")


@dataclass
class _ByClass(Counting):
    def _counted(self, y: Array, t: Array) -> Array:
        """Return int64 (4, C): hits, predicted, true, all."""
        xp = backend_of(y).xp
        predicted, t = self._judged(y, t)
        if self._task == "multilabel":
            on = (predicted == 1) | ((predicted < 0) & (t == 0))
            counts = [on & (t == 1), on, t == 1, t == t]
            return xp.stack([xp.sum(xp.astype(each, xp.int64), axis=0) for each in counts])
        classes = y.shape[1]
        hits = tally(xp.where(predicted == t, t, -1), classes)
        total = xp.sum(xp.astype(t >= 0, xp.int64)) + xp.zeros_like(hits)
        return xp.stack([hits, tally(predicted, classes), tally(t, classes), total])

    def _by_class(self, counts: HostArray) -> list[Counts]:
        return [tuple(column) for column in counts.T.tolist()]

    def _seen(self, counts: list[Counts]) -> list[Counts]:
        """Return the classes to average over: all labels (multilabel), or the classes that occur
        among targets or predictions."""
        if self._task == "multilabel":
            return counts
        return [each for each in counts if each[1] or each[2]]


def _over(a: float, b: float) -> float:
    return a / b if b else 0.0


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else nan


@dataclass
class _Averaged(_ByClass):
    """Base class: a ratio for each class, and their average.

    Args:
        average: "macro": the mean over the classes that occur among targets or predictions
            (multilabel: over all labels); "micro": the ratio of the summed counts; "binary": the
            ratio of class 1, or of a single label; "none": a list with one ratio for each class.
    """

    average: str = "macro"

    @staticmethod
    def ratio(counts: Counts) -> float:
        """Return the ratio of one class, or of summed counts."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        one_of("average", self.average, *AVERAGES)
        super().__post_init__()

    @property
    def is_number(self) -> bool:
        return self.average != "none"

    def _value(self, counts: HostArray) -> Any:
        ratio, by_class = self.ratio, self._by_class(counts)
        if self.average == "none":
            return [ratio(each) for each in by_class]
        if self.average == "binary":
            return ratio(by_class[min(1, len(by_class) - 1)])
        if self.average == "micro":
            hits, predicted, true, total = (sum(column) for column in zip(*by_class, strict=True))
            return ratio((hits, predicted, true, total))
        return _mean([ratio(each) for each in self._seen(by_class)])


@dataclass
class Precision(_Averaged):
    """True positives / predicted: scikit-learn's ``precision_score``."""

    @staticmethod
    def ratio(counts: Counts) -> float:
        return _over(counts[0], counts[1])


@dataclass
class Recall(_Averaged):
    """True positives / true: scikit-learn's ``recall_score``."""

    @staticmethod
    def ratio(counts: Counts) -> float:
        return _over(counts[0], counts[2])


@dataclass
class F1(_Averaged):
    """The harmonic mean of precision and recall: scikit-learn's ``f1_score``."""

    @staticmethod
    def ratio(counts: Counts) -> float:
        return _over(2 * counts[0], counts[1] + counts[2])


@dataclass
class DiceScore(F1):
    """The F1 score of pixels over the whole set: twice the intersection of predicted and true
    pixels over the sum of both."""


@dataclass
class MeanIoU(_Averaged):
    """The intersection of predicted and true pixels over their union, over the whole set:
    scikit-learn's ``jaccard_score``."""

    @staticmethod
    def ratio(counts: Counts) -> float:
        return _over(counts[0], counts[1] + counts[2] - counts[0])


@dataclass
class BalancedAccuracy(_ByClass):
    """The mean recall of the classes that occur: scikit-learn's ``balanced_accuracy_score``. For
    multilabel, the mean over the labels' own balanced accuracies."""

    def _value(self, counts: HostArray) -> float:
        by_class = self._by_class(counts)
        if self._task == "multiclass":
            return _mean([hits / true for hits, _, true, _ in by_class if true])
        each = []
        for hits, predicted, true, total in by_class:
            rejected = total - true - (predicted - hits)
            sides = [(hits, true), (rejected, total - true)]
            each.append(_mean([right / n for right, n in sides if n]))
        return _mean(each)
