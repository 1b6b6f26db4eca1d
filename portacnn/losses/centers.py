"""``CenterDetection``: the loss of a one-stage detector with centres (``portacnn.detection``).

Notation: N images, C classes, H/W height and width of the map.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from portacnn import ops
from portacnn.arguments import not_negative
from portacnn.data.targets import center_maps
from portacnn.errors import ShapeError
from portacnn.losses.base import Loss, Shape, along_batch, check_outputs, check_weight, name_of
from portacnn.runtime import Array, HostArray, backend_of


@dataclass(frozen=True)
class CenterDetection(Loss):
    """Cross-entropy of the class of each cell, plus ``box_weight`` times the mean absolute error of
    the four distances of each cell that has an object.

    Both are summed over the cells and divided by the number of cells that have an object, at least
    1 (FCOS, Tian et al., 2019): most cells are background, and a mean over all would make the few
    others count little.

    Outputs are (N, 1 + C + 4, H, W), targets those of ``detection.center_targets``, (N, 5, H, W).
    ``detection.center_decode`` makes boxes of outputs; ``metrics.AveragePrecision`` takes those.

    Args:
        box_weight: 0 or more. Distances are in cells.
    """

    box_weight: float = 1.0

    task: ClassVar[Any] = "detection"
    metrics: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "box_weight", not_negative("box_weight", self.box_weight))

    def forward(self, y: Array, t: Array, weight: Array | None = None) -> tuple[Array, Any]:
        check_outputs(y, "CenterDetection")
        xp = backend_of(y).xp
        classes = xp.astype(t[:, 0, ...], xp.int64)
        losses, kept = ops.softmax_cross_entropy(y[:, :-4, ...], classes, reduction="none")
        errors = y[:, -4:, ...] - t[:, 1:, ...]
        each = xp.ones_like(losses) / self.count(t, weight, name_of(y))  # weight of each cell
        if weight is not None:
            check_weight(weight, y)
            each = each * along_batch(weight, 3)
        edge = xp.where(classes > 0, each, 0.0) * (self.box_weight / 4)
        edge = xp.expand_dims(edge, axis=1)
        total = xp.sum(each * losses) + xp.sum(edge * xp.abs(errors))
        return total, (kept, each, edge * xp.sign(errors))

    def backward(self, cache: Any, dloss: Array | float = 1.0) -> Array:
        kept, each, derrors = cache
        dlogits = ops.softmax_cross_entropy_backward(each * dloss, kept)
        return backend_of(derrors).xp.concat([dlogits, derrors * dloss], axis=1)

    def count(self, t: Array, weight: Array | None = None, dtype: str = "float32") -> Any:
        return self.whole_count(self.part_count(t, weight, dtype))

    def part_count(self, t: Array, weight: Array | None = None, dtype: str = "float32") -> Any:
        xp = backend_of(t).xp
        own = xp.astype(t[:, 0, ...] > 0, getattr(xp, dtype))
        return xp.sum(own if weight is None else own * along_batch(weight, 3))

    def whole_count(self, added: Any) -> Any:
        return backend_of(added).xp.maximum(added, 1.0)

    def num_outputs(self, t: Any) -> int | None:
        return None  # the targets do not say how many classes there are

    def _checked(self, t: HostArray, shape: Shape, dtype: str) -> HostArray:
        if len(shape) != 3 or shape[0] < 6:
            raise ShapeError(
                f"CenterDetection expects outputs (1 + classes + 4, H, W), got {shape}"
            )
        return center_maps(t, shape, dtype=dtype, loss="CenterDetection")
