"""Metrics from counts of right predictions: ``Accuracy``, ``TopK``, ``ConfusionMatrix``."""

from dataclasses import dataclass
from typing import Any, ClassVar

from portacnn.arguments import flag, whole
from portacnn.metrics.base import Counting, tally
from portacnn.runtime import Array, HostArray, backend_of


def _share(counts: HostArray) -> float:
    """Return right / all."""
    right, total = (int(n) for n in counts)
    return right / total if total else float("nan")


def _pair(right: Array, total: Array) -> Array:
    """Return the numbers of true elements of ``right`` and ``total``, int64 (2,)."""
    xp = backend_of(right).xp
    counts = [xp.count_nonzero(right & total), xp.count_nonzero(total)]
    return xp.stack([xp.astype(xp.asarray(n), xp.int64) for n in counts])


@dataclass
class Accuracy(Counting):
    """The fraction of right predictions: of images, of pixels (pixel accuracy), or of labels (1 -
    scikit-learn's ``hamming_loss``).

    Args:
        subset: for labels, the fraction of samples with all labels right (scikit-learn's
            ``accuracy_score``).
    """

    subset: bool = False

    def __post_init__(self) -> None:
        self.subset = flag("subset", self.subset)
        super().__post_init__()

    def _counted(self, y: Array, t: Array) -> Array:
        xp = backend_of(y).xp
        predicted, t = self._judged(y, t)
        right = predicted == t
        if self._task == "multilabel":
            right = xp.all(right, axis=1) if self.subset else xp.reshape(right, (-1,))
            return _pair(right, right | True)
        return _pair(right, t >= 0)

    def _value(self, counts: HostArray) -> float:
        return _share(counts)


@dataclass
class TopK(Counting):
    """The fraction of targets whose class is among the ``k`` largest outputs, as scikit-learn's
    ``top_k_accuracy_score``. Among equal outputs, the lower class comes first, as in
    ``Accuracy``."""

    k: int = 5

    tasks: ClassVar[tuple[str, ...]] = ("multiclass",)

    def __post_init__(self) -> None:
        self.k = whole("k", self.k, 1)
        super().__post_init__()

    def _counted(self, y: Array, t: Array) -> Array:
        xp = backend_of(y).xp
        predicted, labels = self._judged(y, t)
        along = (1, y.shape[1]) + (1,) * (y.ndim - 2)
        names = xp.reshape(xp.arange(y.shape[1], dtype=xp.int64, device=y.device), along)
        label = xp.expand_dims(xp.reshape(labels, (y.shape[0], *y.shape[2:])), axis=1)
        own = xp.sum(xp.where(names == label, y, 0.0), axis=1, keepdims=True)
        ahead = (y > own) | ((y == own) & (names < label))
        place = xp.reshape(xp.sum(xp.astype(ahead, xp.int64), axis=1), (-1,))
        return _pair((place < self.k) & (predicted >= 0), labels >= 0)

    def _value(self, counts: HostArray) -> float:
        return _share(counts)


@dataclass
class ConfusionMatrix(Counting):
    """The number of samples of class i (row) predicted as class j (column), as scikit-learn's
    ``confusion_matrix``: lists of whole numbers. A prediction of NaN is in no column."""

    tasks: ClassVar[tuple[str, ...]] = ("multiclass",)

    @property
    def is_number(self) -> bool:
        return False

    def _counted(self, y: Array, t: Array) -> Array:
        xp = backend_of(y).xp
        predicted, labels = self._judged(y, t)
        classes = y.shape[1]
        pair = xp.where((labels < 0) | (predicted < 0), -1, labels * classes + predicted)
        return xp.reshape(tally(pair, classes * classes), (classes, classes))

    def compute(self) -> Any:
        return [] if self._counts is None else super().compute()

    def _value(self, counts: HostArray) -> Any:
        return counts.tolist()
