"""The loss for multi-label and binary targets, and for one-channel masks: ``BCEWithLogits``."""

from dataclasses import dataclass
from typing import Any, ClassVar

from portacnn import ops
from portacnn.data.targets import on_or_off
from portacnn.errors import ShapeError
from portacnn.losses.base import Loss, Shape, check_outputs
from portacnn.losses.constants import along_outputs, numbers, on_device
from portacnn.runtime import Array, HostArray, backend_of


def as_floats(t: Array, y: Array) -> Array:
    """Return targets of 0 and 1 in y's dtype; they may be stored as bytes."""
    return t if t.dtype == y.dtype else backend_of(t).xp.astype(t, y.dtype)


@dataclass(frozen=True)
class BCEWithLogits(Loss):
    """Binary cross-entropy of the sigmoid of each output, the mean over samples and outputs, as
    torch.nn.BCEWithLogitsLoss.

    Args:
        pos_weight: the weight of positive targets, one for each output (C,) or one number; None
            means 1.
    """

    pos_weight: tuple[float, ...] | None = None

    task: ClassVar[Any] = "multilabel"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1")
    soft_targets: ClassVar[bool] = True  # type: ignore[misc]

    def __post_init__(self) -> None:
        object.__setattr__(self, "pos_weight", numbers("pos_weight", self.pos_weight))

    def forward(self, y: Array, t: Array, weight: Array | None = None) -> tuple[Array, Any]:
        check_outputs(y, "BCEWithLogits")
        pos_weight = None
        if self.pos_weight is not None:
            pos_weight = along_outputs(on_device(self.pos_weight, y), y.ndim)
        return ops.binary_cross_entropy_with_logits(
            y,
            as_floats(t, y),
            weight=None if weight is None else self.weighted(weight, y),
            pos_weight=pos_weight,
        )

    def backward(self, cache: Any, dloss: Array | float = 1.0) -> Array:
        return ops.binary_cross_entropy_with_logits_backward(dloss, cache)

    def _checked(self, t: HostArray, shape: Shape, dtype: str) -> HostArray:
        if self.pos_weight is not None and len(self.pos_weight) not in (1, shape[0]):
            raise ShapeError(
                f"expected pos_weight for {shape[0]} outputs, got {len(self.pos_weight)}"
            )
        return on_or_off(t, shape, dtype=dtype)
