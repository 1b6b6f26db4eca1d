"""Metrics of ranking: ``RocAuc``. Scores stay on the device until ``compute`` ranks them on the
host."""

from dataclasses import dataclass, field
from math import nan
from typing import Any

import numpy as np

from portacnn.arguments import one_of
from portacnn.losses.outputs import scores
from portacnn.metrics.base import Judged, rows
from portacnn.runtime import Array, HostArray, backend_of


def area(score: HostArray, positive: HostArray) -> float:
    """Return the area under the ROC curve: the fraction of (positive, negative) pairs in which the
    positive has the higher score; ties count half. Returns NaN if positives or negatives are
    missing. A score of NaN ranks as the worst.

    Args:
        score: floats (N,). positive: booleans (N,).
    """
    unknown = np.isnan(score)
    on = np.where(unknown, -np.inf, score)[positive]
    off = np.sort(np.where(unknown, np.inf, score)[~positive])
    if not len(on) or not len(off):
        return nan
    below, up_to = np.searchsorted(off, on, "left"), np.searchsorted(off, on, "right")
    return (int(below.sum()) + int(up_to.sum())) / (2 * len(on) * len(off))


@dataclass
class RocAuc(Judged):
    """The area under the ROC curve: scikit-learn's ``roc_auc_score``.

    For two classes, the area of the second. For more classes, each against the rest, by the softmax
    (``multi_class="ovr"``). For labels, each label. Areas are averaged over the classes or labels
    that have both positive and negative samples.

    Args:
        average: "macro", or "none" for a list.
    """

    average: str = "macro"
    _pieces: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        one_of("average", self.average, "macro", "none")
        super().__post_init__()

    @property
    def is_number(self) -> bool:
        return self.average != "none"

    def reset(self) -> None:
        self._pieces = []

    def pieces(self) -> tuple[Array, ...]:
        if not self._pieces:
            return ()
        return (backend_of(self._pieces[0]).xp.concat(self._pieces, axis=0),)

    def put(self, pieces: tuple[Array, ...]) -> None:
        self._pieces = [*pieces]

    def _take(self, y: Array, t: Array) -> None:
        xp = backend_of(y).xp
        _, t = self._judged(y, t)
        y = rows(y)
        if self._task == "multiclass":
            # two classes: the logits' difference, which ranks like the softmax but does not
            # saturate
            y = y[:, 1:2] - y[:, 0:1] if y.shape[1] == 2 else scores(y, "multiclass")
            t = xp.expand_dims(t, axis=1)
        self._pieces.append(xp.concat([y, xp.astype(t, y.dtype)], axis=1))

    def compute(self) -> Any:
        if not self._pieces:
            return nan
        backend = backend_of(self._pieces[0])
        host = backend.to_host(backend.xp.concat(self._pieces, axis=0))
        if self._task == "multilabel":
            score, labels = np.split(host, 2, axis=1)
            each = [area(score[:, k], labels[:, k] == 1) for k in range(score.shape[1])]
        else:
            host = host[host[:, -1] >= 0]
            score, labels = host[:, :-1], host[:, -1]
            first = 1 if score.shape[1] == 1 else 0
            each = [area(score[:, k], labels == k + first) for k in range(score.shape[1])]
        if self.average == "none":
            return each
        known = [value for value in each if value == value]
        return sum(known) / len(known) if known else nan
