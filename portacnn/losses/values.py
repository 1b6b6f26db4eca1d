"""Losses for regression: ``MSE``, ``L1``, ``Huber``, ``SmoothL1``.

Each is the mean of a function of y - t over samples and outputs.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from portacnn import ops
from portacnn.arguments import positive
from portacnn.data.targets import values
from portacnn.losses.base import Loss, Shape, check_outputs
from portacnn.runtime import Array, HostArray


class _Values(Loss):
    task: ClassVar[Any] = "regression"
    metrics: ClassVar[tuple[str, ...]] = ("mae", "r2")
    soft_targets: ClassVar[bool] = True  # type: ignore[misc]

    def _checked(self, t: HostArray, shape: Shape, dtype: str) -> HostArray:
        return values(t, shape, dtype=dtype, loss=type(self).__name__)

    def _factors(self, weight: Array | None, y: Array) -> Any:
        check_outputs(y, type(self).__name__)
        return None if weight is None else self.weighted(weight, y)


@dataclass(frozen=True)
class MSE(_Values):
    """The mean of (y - t)^2, as torch.nn.MSELoss."""

    def forward(self, y: Array, t: Array, weight: Array | None = None) -> tuple[Array, Any]:
        return ops.mse_loss(y, t, weight=self._factors(weight, y))

    def backward(self, cache: Any, dloss: Array | float = 1.0) -> Array:
        return ops.mse_loss_backward(dloss, cache)


@dataclass(frozen=True)
class L1(_Values):
    """The mean of |y - t|, as torch.nn.L1Loss."""

    def forward(self, y: Array, t: Array, weight: Array | None = None) -> tuple[Array, Any]:
        return ops.l1_loss(y, t, weight=self._factors(weight, y))

    def backward(self, cache: Any, dloss: Array | float = 1.0) -> Array:
        return ops.l1_loss_backward(dloss, cache)


@dataclass(frozen=True)
class Huber(_Values):
    """The mean of 0.5 * (y - t)^2 if |y - t| <= ``delta``, else a line of slope ``delta``, as
    torch.nn.HuberLoss."""

    delta: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "delta", positive("delta", self.delta))

    def forward(self, y: Array, t: Array, weight: Array | None = None) -> tuple[Array, Any]:
        return ops.huber_loss(y, t, delta=self.delta, weight=self._factors(weight, y))

    def backward(self, cache: Any, dloss: Array | float = 1.0) -> Array:
        return ops.huber_loss_backward(dloss, cache)


@dataclass(frozen=True)
class SmoothL1(_Values):
    """The Huber loss with delta ``beta``, divided by ``beta``, as torch.nn.SmoothL1Loss."""

    beta: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", positive("beta", self.beta))

    def forward(self, y: Array, t: Array, weight: Array | None = None) -> tuple[Array, Any]:
        loss, cache = ops.huber_loss(y, t, delta=self.beta, weight=self._factors(weight, y))
        return loss / self.beta, cache

    def backward(self, cache: Any, dloss: Array | float = 1.0) -> Array:
        return ops.huber_loss_backward(dloss / self.beta, cache)
