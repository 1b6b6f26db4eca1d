"""The loss for embeddings: ``NTXent``. Samples of one class get embeddings near each other."""

from dataclasses import dataclass
from typing import Any, ClassVar

from portacnn import ops
from portacnn.arguments import positive
from portacnn.data.targets import kinds
from portacnn.errors import ShapeError
from portacnn.losses.base import Loss, Shape, check_outputs, check_weight
from portacnn.runtime import Array, HostArray


@dataclass(frozen=True)
class NTXent(Loss):
    """SimCLR's loss; for more than two samples of a class, the supervised contrastive loss
    (``ops.nt_xent_loss``).

    Targets (N,) are whole numbers, equal for samples of one class or views of one image. Each
    sample is compared with the others in its batch. With gradient accumulation (``accumulate``), it
    is compared within its part of the batch only, as for batch statistics.

    Args:
        temperature: greater than 0; smaller values increase the weight of the nearest samples.
            SimCLR uses 0.1 to 0.5.
    """

    temperature: float = 0.1

    task: ClassVar[Any] = "embedding"

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", positive("temperature", self.temperature))

    def forward(self, y: Array, t: Array, weight: Array | None = None) -> tuple[Array, Any]:
        check_outputs(y, "NTXent")
        if weight is not None:
            check_weight(weight, y)
        return ops.nt_xent_loss(y, t, temperature=self.temperature, weight=weight)

    def backward(self, cache: Any, dloss: Array | float = 1.0) -> Array:
        return ops.nt_xent_loss_backward(dloss, cache)

    def _checked(self, t: HostArray, shape: Shape, dtype: str) -> HostArray:
        if len(shape) != 1:
            raise ShapeError(f"NTXent expects embeddings (D,), the outputs are {shape}")
        return kinds(t)

    def num_outputs(self, t: Any) -> int | None:
        return None
