"""``Metric``: the base class of all metrics, and the accumulation of counts and sums.

Counts are int64 on the device of the outputs. Sums of each batch are float64 if the device supports
it. ``compute`` adds the batches' sums on the host in float64, so the result does not depend on the
batch size.

Notation: N samples, C classes or labels, K values, S the spatial axes.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal, Self

from portacnn.arguments import AnswersKeywords, fraction, one_of
from portacnn.errors import ArgumentError, ShapeError
from portacnn.losses import Loss
from portacnn.losses.outputs import NO_PREDICTION, predictions
from portacnn.runtime import Array, HostArray, backend_of, describe, is_float, where


@dataclass
class Metric(AnswersKeywords):
    """Base class of all metrics: one number (or a list, or a matrix) for outputs and targets, batch
    by batch.

    Attributes:
        better: "higher" or "lower": which values are better.
        adds_up: how the ``pieces`` of several parts of a set become those of the set: they are
            added, or else joined along their first axis.
    """

    better: ClassVar[Literal["higher", "lower"]] = "higher"
    adds_up: ClassVar[bool] = False

    @property
    def is_number(self) -> bool:
        """Return whether the value is one number, not a list or a matrix."""
        return True

    def update(self, y: Array, t: Array) -> None:
        """Add a batch: a network's outputs and the targets in the loss's form. Transfers nothing to
        the host."""
        with where(y):
            self._take(y, t)

    def compute(self) -> Any:
        """Return the value over all batches since ``reset``: a float, NaN without batches. Waits
        for the device."""
        raise NotImplementedError

    def reset(self) -> None:
        """Drop all batches."""
        raise NotImplementedError

    def pieces(self) -> tuple[Array, ...]:
        """Return what the batches since ``reset`` have left, as arrays on the device; () before the
        first one. A training run on several processes needs it, which evaluate a part of a set
        each."""
        raise NotImplementedError

    def put(self, pieces: tuple[Array, ...]) -> None:
        """Replace all batches by ``pieces``, of several parts of a set."""
        raise NotImplementedError

    def for_loss(self, loss: Loss) -> Self:
        """Return a new metric with the same options for the outputs of ``loss``. Raises
        ArgumentError if the metric does not support the loss's task."""
        return replace(self)

    def _take(self, y: Array, t: Array) -> None:
        raise NotImplementedError


@dataclass
class Judged(Metric):
    """Base class: a metric of predicted classes or labels.

    Args:
        task: "multiclass" or "multilabel" (see ``losses.outputs``); None takes the loss's, and
            without a loss "multiclass".
        ignore_index: the target value to ignore; None takes the loss's.
        threshold: a label is 1 if its probability is above it (multilabel).
    """

    task: str | None = None
    ignore_index: int | None = None
    threshold: float = 0.5

    tasks: ClassVar[tuple[str, ...]] = ("multiclass", "multilabel")

    def __post_init__(self) -> None:
        if self.task is not None:
            one_of("task", self.task, *self.tasks)
        self.threshold = fraction("threshold", self.threshold)
        self.reset()

    def for_loss(self, loss: Loss) -> Self:
        return replace(
            self,
            task=self.task or task_of(loss, self),
            ignore_index=loss.ignore_index if self.ignore_index is None else self.ignore_index,
        )

    @property
    def _task(self) -> str:
        return self.task or self.tasks[0]

    def _judged(self, y: Array, t: Array) -> tuple[Array, Array]:
        """Return predictions and targets, int64: classes (M,), both -1 if the target is ignored, or
        labels (M, C)."""
        xp = backend_of(y).xp
        y = _floats(y)
        _check(y, t, self)
        predicted = predictions(y, self._task, self.threshold)
        if self._task == "multilabel":
            t = xp.astype(xp.astype(xp.reshape(t, y.shape), y.dtype) >= 0.5, xp.int64)
            return rows(predicted), rows(t)
        if t.ndim == y.ndim:  # class probabilities
            t = xp.argmax(t, axis=1)
        t = xp.astype(t, xp.int64)
        if self.ignore_index is not None:
            counted = t != self.ignore_index
            t = xp.where(counted, t, NO_PREDICTION)
            predicted = xp.where(counted, predicted, NO_PREDICTION)
        return xp.reshape(predicted, (-1,)), xp.reshape(t, (-1,))


@dataclass
class Counting(Judged):
    """Base class: a metric computed from counts in one array."""

    adds_up: ClassVar[bool] = True

    _counts: Any = field(default=None, init=False, repr=False, compare=False)

    def reset(self) -> None:
        self._counts = None

    def pieces(self) -> tuple[Array, ...]:
        return () if self._counts is None else (self._counts,)

    def put(self, pieces: tuple[Array, ...]) -> None:
        self._counts = pieces[0]

    def _take(self, y: Array, t: Array) -> None:
        counts = self._counted(y, t)
        self._counts = counts if self._counts is None else self._counts + counts

    def compute(self) -> Any:
        if self._counts is None:
            return float("nan")
        return self._value(backend_of(self._counts).to_host(self._counts))

    def _counted(self, y: Array, t: Array) -> Array:
        """Return the counts of one batch, int64."""
        raise NotImplementedError

    def _value(self, counts: HostArray) -> Any:
        raise NotImplementedError


def task_of(loss: Loss, metric: Any) -> str:
    """Return the loss's task. Raises ArgumentError if the metric is not for it."""
    if loss.task not in metric.tasks:
        from portacnn.metrics.named import METRICS

        fitting = [
            word for word, made in METRICS.items() if loss.task in getattr(made, "tasks", ())
        ]
        raise ArgumentError(
            f"{type(metric).__name__} is for {' and '.join(metric.tasks)} outputs, the outputs of "
            f"{type(loss).__name__} are {loss.task}; its metrics are "
            f"{', '.join(fitting) or 'your own'}"
        )
    return str(loss.task)


def _check(y: Array, t: Array, metric: Judged) -> None:
    """Raise ShapeError unless t has a shape that the loss of this task takes."""
    n, *rest = y.shape
    shapes = [tuple(y.shape)]
    if metric._task == "multiclass" or rest[:1] in ([], [1]):
        shapes.append((n, *rest[1:]))
    if y.ndim < 2 or tuple(t.shape) not in shapes:
        raise ShapeError(
            f"expected outputs (N, C, ...) and their targets, got {describe(y)} and "
            f"{tuple(t.shape)}",
            type(metric).__name__,
        )


def _floats(y: Array) -> Array:
    """Return y as float32 if it has half precision."""
    xp = backend_of(y).xp
    half = is_float(xp, y.dtype) and "16" in str(y.dtype)
    return xp.astype(y, xp.float32) if half else y


def rows(y: Array) -> Array:
    """Return (N, C, *S) as (N * S, C): one row per pixel."""
    xp = backend_of(y).xp
    if y.ndim == 2:
        return y
    return xp.reshape(xp.permute_dims(y, (0, *range(2, y.ndim), 1)), (-1, y.shape[1]))


def tally(numbers: Array, count: int) -> Array:
    """Return the number of occurrences of 0..count-1 among integers (M,), int64 (count,). Other
    values are ignored.

    It sorts the numbers and searches the boundaries: the standard has no bincount, and one-hot
    matrices would take ``count`` times the memory.
    """
    xp = backend_of(numbers).xp
    edges = xp.arange(count + 1, dtype=numbers.dtype, device=numbers.device)
    ends = xp.astype(xp.searchsorted(xp.sort(numbers), edges), xp.int64)
    return ends[1:] - ends[:-1]


@lru_cache(maxsize=64)
def _has_float64(xp: Any, device: Any) -> bool:
    return "float64" in xp.__array_namespace_info__().dtypes(device=device)


def widest(y: Array) -> Array:
    """Return y in the widest float dtype that its device supports (Apple's GPU has no float64)."""
    xp = backend_of(y).xp
    wide = xp.float64 if _has_float64(xp, y.device) else xp.float32
    return y if y.dtype == wide else xp.astype(y, wide)


class Pieces:
    """Small arrays of one shape, one per batch, on the device. They are transferred together,
    once."""

    _MOST = 256  # single arrays, before they are joined

    def __init__(self) -> None:
        self._blocks: list[Array] = []
        self._single: list[Array] = []

    def add(self, piece: Array) -> None:
        self._single.append(piece)
        if len(self._single) == self._MOST:
            self._close()

    def _close(self) -> None:
        if self._single:
            self._blocks.append(backend_of(self._single[0]).xp.stack(self._single))
            self._single = []

    def joined(self) -> Array | None:
        """Return all arrays, stacked (batches, ...), on the device; None if there are none."""
        self._close()
        if len(self._blocks) > 1:
            self._blocks = [backend_of(self._blocks[0]).xp.concat(self._blocks, axis=0)]
        return self._blocks[0] if self._blocks else None

    def put(self, joined: Array) -> None:
        """Replace all arrays by those of ``joined``, (batches, ...)."""
        self._blocks, self._single = [joined], []

    def read(self) -> HostArray | None:
        """Return all arrays, stacked (batches, ...), on the host; None if there are none."""
        joined = self.joined()
        return None if joined is None else backend_of(joined).to_host(joined)
