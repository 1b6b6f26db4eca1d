"""The losses for embeddings: ``NTXent``, ``Triplet``. Samples of one class get embeddings near each
other.

Targets (N,) are whole numbers, equal for samples of one class or views of one image. Each sample is
compared with the others in its batch. With gradient accumulation (``accumulate``), and with several
processes, it is compared within its part of the batch only, as for batch statistics.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from portacnn import ops
from portacnn.arguments import not_negative, one_of, positive
from portacnn.data.targets import kinds
from portacnn.errors import ShapeError
from portacnn.losses.base import Loss, Shape, check_outputs, check_weight
from portacnn.ops.triplet import TRIPLETS
from portacnn.runtime import Array, HostArray


class _Embeddings(Loss):
    """What they share: targets, and that outputs are embeddings.

    Attributes:
        apart: whether the loss needs samples of two kinds.
    """

    apart: ClassVar[bool] = False

    task: ClassVar[Any] = "embedding"

    def _checked(self, t: HostArray, shape: Shape, dtype: str) -> HostArray:
        name = type(self).__name__
        if len(shape) != 1:
            raise ShapeError(
                f"{name} expects embeddings (D,), the outputs are {shape}; add Flatten() and a "
                "Linear layer"
            )
        return kinds(t, loss=name, apart=self.apart)

    def num_outputs(self, t: Any) -> int | None:
        return None


@dataclass(frozen=True)
class NTXent(_Embeddings):
    """SimCLR's loss; for more than two samples of a class, the supervised contrastive loss
    (``ops.nt_xent_loss``).

    Args:
        temperature: greater than 0; smaller values increase the weight of the nearest samples.
            SimCLR uses 0.1 to 0.5.
    """

    temperature: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", positive("temperature", self.temperature))

    def forward(self, y: Array, t: Array, weight: Array | None = None) -> tuple[Array, Any]:
        check_outputs(y, "NTXent")
        if weight is not None:
            check_weight(weight, y)
        return ops.nt_xent_loss(y, t, temperature=self.temperature, weight=weight)

    def backward(self, cache: Any, dloss: Array | float = 1.0) -> Array:
        return ops.nt_xent_loss_backward(dloss, cache)


@dataclass(frozen=True)
class Triplet(_Embeddings):
    """Triplet margin loss, as torch.nn.TripletMarginLoss with p=2 (``ops.triplet_loss``). It is
    zero if each sample is nearer to the samples of its class than to others, by ``margin``.

    The triplets are formed within a batch: each sample is an anchor if the batch has another sample
    of its class (a positive) and a sample of another class (a negative). So a batch needs several
    samples per class: with many classes, use large batches. The loss of a batch without a triplet
    is 0.

    Args:
        margin: the required difference of the distances.
        triplets: "semihard" uses each pair of an anchor and a positive, with the nearest negative
            that is farther away than the positive. "hardest" uses one triplet per anchor, with its
            farthest positive and its nearest negative (batch hard). From random weights all
            embeddings may become equal, so use it for networks that are trained already. "all" uses
            all triplets (batch all), which is more robust to wrong labels; the loss of many of them
            is soon 0.
        eps: added to each coordinate of a difference, as in PyTorch.
    """

    margin: float = 1.0
    triplets: str = "semihard"
    eps: float = 1e-6

    apart: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "margin", not_negative("margin", self.margin))
        one_of("triplets", self.triplets, *TRIPLETS)
        object.__setattr__(self, "eps", not_negative("eps", self.eps))

    def forward(self, y: Array, t: Array, weight: Array | None = None) -> tuple[Array, Any]:
        check_outputs(y, "Triplet")
        if weight is not None:
            check_weight(weight, y)
        return ops.triplet_loss(
            y, t, margin=self.margin, triplets=self.triplets, eps=self.eps, weight=weight
        )

    def backward(self, cache: Any, dloss: Array | float = 1.0) -> Array:
        return ops.triplet_loss_backward(dloss, cache)
