"""Metrics of regression: ``MAE``, ``RMSE``, ``R2``.

For outputs (N, K) they return the mean over the K outputs' values, as scikit-learn does. If an
output is NaN, the result is NaN.
"""

from dataclasses import dataclass, field
from math import nan, sqrt
from typing import Any, ClassVar, Literal, Self

from portacnn.errors import ShapeError
from portacnn.losses import Loss
from portacnn.metrics.base import Metric, Pieces, rows, task_of, widest
from portacnn.runtime import Array, backend_of, describe


@dataclass
class _Values(Metric):
    _sums: Any = field(default=None, init=False, repr=False, compare=False)

    better: ClassVar[Literal["higher", "lower"]] = "lower"
    tasks: ClassVar[tuple[str, ...]] = ("regression",)

    def __post_init__(self) -> None:
        self.reset()

    def for_loss(self, loss: Loss) -> Self:
        task_of(loss, self)
        return super().for_loss(loss)

    def reset(self) -> None:
        self._sums, self._counts = Pieces(), list[int]()

    def pieces(self) -> tuple[Array, ...]:
        sums = self._sums.joined()
        if sums is None:
            return ()
        xp = backend_of(sums).xp
        return sums, xp.asarray(self._counts, dtype=xp.int64, device=sums.device)

    def put(self, pieces: tuple[Array, ...]) -> None:
        sums, counts = pieces
        self._sums.put(sums)
        self._counts = backend_of(counts).to_host(counts).tolist()

    def _take(self, y: Array, t: Array) -> None:
        xp = backend_of(y).xp
        alike = {tuple(y.shape), (*y.shape, 1), tuple(y.shape[:1]) if y.shape[1:] == (1,) else ()}
        if y.ndim == 0 or tuple(t.shape) not in alike:
            raise ShapeError(
                f"expected outputs and targets of one shape, got {describe(y)} and "
                f"{tuple(t.shape)}",
                type(self).__name__,
            )
        if y.ndim == 1:
            y = xp.expand_dims(y, axis=1)
        y, t = rows(widest(y)), rows(widest(xp.reshape(t, y.shape)))
        if y.shape[0]:
            self._sums.add(self._summed(y, t))
            self._counts.append(int(y.shape[0]))

    def compute(self) -> float:
        read = self._sums.read()
        if read is None:
            return nan
        # (batches, sums, K) -> for each output, its sums by batch
        outputs = read.astype("float64").transpose(2, 0, 1).tolist()
        values = [self._value(sums, self._counts) for sums in outputs]
        return sum(values) / len(values)

    def _summed(self, y: Array, t: Array) -> Array:
        """Return the sums of a batch (M, K), as (sums, K)."""
        raise NotImplementedError

    def _value(self, sums: list[list[float]], counts: list[int]) -> float:
        """Return the value of one output, from its sums and the number of values of each batch."""
        raise NotImplementedError


@dataclass
class MAE(_Values):
    """The mean of |y - t|: scikit-learn's ``mean_absolute_error``."""

    def _summed(self, y: Array, t: Array) -> Array:
        xp = backend_of(y).xp
        return xp.sum(xp.abs(y - t), axis=0, keepdims=True)

    def _value(self, sums: list[list[float]], counts: list[int]) -> float:
        return sum(total for (total,) in sums) / sum(counts)


@dataclass
class RMSE(_Values):
    """The square root of the mean of (y - t)^2: scikit-learn's ``root_mean_squared_error``."""

    def _summed(self, y: Array, t: Array) -> Array:
        xp = backend_of(y).xp
        return xp.sum((y - t) ** 2.0, axis=0, keepdims=True)

    def _value(self, sums: list[list[float]], counts: list[int]) -> float:
        return sqrt(sum(total for (total,) in sums) / sum(counts))


@dataclass
class R2(_Values):
    """The fraction of the targets' variance that the outputs explain: scikit-learn's ``r2_score``.

    1 is perfect, 0 is no better than the mean. For constant targets it is 1 or 0. It is NaN for
    fewer than two values.
    """

    better: ClassVar[Literal["higher", "lower"]] = "higher"

    def _summed(self, y: Array, t: Array) -> Array:
        xp = backend_of(y).xp
        mean = xp.mean(t, axis=0)
        return xp.stack([mean, xp.sum((t - mean) ** 2.0, axis=0), xp.sum((y - t) ** 2.0, axis=0)])

    def _value(self, sums: list[list[float]], counts: list[int]) -> float:
        """Return 1 - error / spread of one output.

        The batches' squared deviations are combined as in Chan et al., 1979: plain sums of squares
        would lose all digits if the mean is large.
        """
        total, mean, spread, error = 0, 0.0, 0.0, 0.0
        for (here, own, off), count in zip(sums, counts, strict=True):
            apart = here - mean
            both = total + count
            spread += own + apart * apart * total * count / both
            mean += apart * count / both
            total, error = both, error + off
        if total < 2:
            return nan
        if spread == 0.0:
            return 1.0 if error == 0.0 else nan if error != error else 0.0
        return 1.0 - error / spread
