"""Losses for classification and segmentation: ``CrossEntropy``, ``Focal``, ``Dice``.

Targets are class indices (N, *S) of any integer dtype. ``Focal`` and ``Dice`` also support
multi-label targets (``multilabel=True``).
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

from portacnn import ops
from portacnn.arguments import as_int, flag, not_negative, positive, share
from portacnn.data.targets import classes_or_shares, on_host, on_or_off
from portacnn.errors import ArgumentError, ShapeError
from portacnn.losses.base import Loss, Shape, along_batch, check_outputs, check_weight, name_of
from portacnn.losses.constants import numbers, on_device
from portacnn.losses.labels import as_floats
from portacnn.runtime import Array, HostArray, backend_of, is_float

_NONE = -100
"""The ops' ``ignore_index`` if nothing is ignored. Checked targets never have this value."""


def _index(value: Any) -> int | None:
    number = None if value is None else as_int(value)
    if value is not None and number is None:
        raise ArgumentError(f"ignore_index must be a whole number or None, got {value!r}")
    return number


def _indices_imply(t: Any, ignore_index: int | None) -> int | None:
    """Return the minimum number of classes for class indices (N, ...)."""
    host = on_host(t)
    counted = host if ignore_index is None else host[host != ignore_index]
    return int(counted.max()) + 1 if counted.size else None


class _Classes(Loss):
    """Base class of ``CrossEntropy`` and ``Focal``: one term per label, with weights."""

    weight: tuple[float, ...] | None

    def _counted(self, t: Array, dtype: Any, class_weight: bool) -> Array | float:
        """Return the weight of each label, (N, *S): 0 if ignored, else its class weight if
        ``class_weight``. Returns 1.0 if all labels have weight 1."""
        xp = backend_of(t).xp
        by_class = class_weight and self.weight is not None
        if is_float(xp, t.dtype) or (self.ignore_index is None and not by_class):
            return 1.0
        labels = xp.astype(t, xp.int64)
        counted: Any = 1.0
        if by_class and self.weight is not None:
            # not clip, which transfers its bounds to the device in each step
            inside = xp.maximum(xp.minimum(labels, len(self.weight) - 1), 0)
            weights = on_device(self.weight, t, dtype)
            counted = xp.reshape(xp.take(weights, xp.reshape(inside, (-1,)), axis=0), t.shape)
        if self.ignore_index is not None:
            zero = xp.zeros((), dtype=dtype, device=t.device)
            counted = xp.where(labels != self.ignore_index, zero + counted, zero)
        return counted

    def _count(self, t: Array, weight: Array | None, dtype: str, class_weight: bool) -> Any:
        xp = backend_of(t).xp
        shares = is_float(xp, t.dtype)  # (N, C, *S)
        shape = (t.shape[0], *t.shape[2:]) if shares else tuple(t.shape)
        counted = self._counted(t, getattr(xp, dtype), class_weight)
        if weight is None:
            return xp.sum(counted) if hasattr(counted, "shape") else prod(shape)
        if not hasattr(counted, "shape"):
            return xp.sum(weight) * float(prod(shape[1:]))
        return xp.sum(counted * along_batch(weight, len(shape)))


@dataclass(frozen=True)
class CrossEntropy(_Classes):
    """Softmax and cross-entropy, as torch.nn.CrossEntropyLoss.

    Args:
        weight: class weights (C,), or None. The sum is divided by the sum of the labels' weights
            (for class probabilities, as in PyTorch, by the number of labels).
        ignore_index: the label to ignore, or None (PyTorch's default is -100).
        label_smoothing: the probability that is spread over all classes, 0 to 1.

    Targets are class indices, one-hot vectors, or class probabilities that sum to 1. For outputs
    (N, C, H, W) they are (N, H, W) or (N, C, H, W).
    """

    weight: tuple[float, ...] | None = None
    ignore_index: int | None = None
    label_smoothing: float = 0.0

    task: ClassVar[Any] = "multiclass"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", numbers("weight", self.weight))
        object.__setattr__(self, "ignore_index", _index(self.ignore_index))
        smoothing = share("label_smoothing", self.label_smoothing)
        object.__setattr__(self, "label_smoothing", smoothing)

    @property
    def soft_targets(self) -> bool:  # type: ignore[override]
        return self.ignore_index is None

    def forward(self, y: Array, t: Array, weight: Array | None = None) -> tuple[Array, Any]:
        check_outputs(y, "CrossEntropy")
        xp = backend_of(y).xp
        options: dict[str, Any] = {
            "weight": None if self.weight is None else on_device(self.weight, y),
            "ignore_index": _NONE if self.ignore_index is None else self.ignore_index,
            "label_smoothing": self.label_smoothing,
        }
        if t.ndim == y.ndim:
            options["ignore_index"] = _NONE
        if weight is None:
            mean, cache = ops.softmax_cross_entropy(y, t, **options)
            if self.ignore_index is not None or 0.0 in (self.weight or ()):
                count = self._count(t, None, name_of(y), True)
                mean = xp.where(count == 0, 0.0, mean) if hasattr(count, "shape") else mean
            return mean, (cache, None)
        check_weight(weight, y)
        losses, cache = ops.softmax_cross_entropy(y, t, reduction="none", **options)
        factors = xp.broadcast_to(along_batch(weight, losses.ndim), losses.shape)
        factors = factors * _inverse(self._count(t, weight, name_of(y), True))
        return xp.sum(factors * losses), (cache, factors)

    def backward(self, cache: Any, dloss: Array | float = 1.0) -> Array:
        kept, factors = cache
        return ops.softmax_cross_entropy_backward(
            dloss if factors is None else factors * dloss, kept
        )

    def count(self, t: Array, weight: Array | None = None, dtype: str = "float32") -> Any:
        return self._count(t, weight, dtype, class_weight=True)

    def for_evaluation(self) -> Loss:
        return replace(self, label_smoothing=0.0) if self.label_smoothing else self

    def _checked(self, t: HostArray, shape: Shape, dtype: str) -> HostArray:
        _check_classes(self.weight, shape)
        return classes_or_shares(t, shape, dtype=dtype, ignore_index=self.ignore_index)

    def num_outputs(self, t: Any) -> int | None:
        host = on_host(t)
        if host.ndim == 2 or host.dtype.kind == "f":
            return int(host.shape[1]) if host.ndim > 1 else None
        return _indices_imply(host, self.ignore_index)


@dataclass(frozen=True)
class Focal(_Classes):
    """Focal loss (Lin et al., 2017): cross-entropy times (1 - p)^gamma, with p the probability of
    the target. Easy samples have less weight.

    Args:
        gamma: 0 or more; 0 is cross-entropy, 2 the paper's value.
        alpha: class weights (C,), or None; with ``multilabel`` one number, the weight of positive
            labels (0.25 in the paper), or None.
        ignore_index: the label to ignore, or None; not with ``multilabel``.
        multilabel: use a sigmoid of each output (torchvision.ops.sigmoid_focal_loss) instead of a
            softmax.

    The sum is divided by the number of labels that are not ignored, not by their weights.
    """

    gamma: float = 2.0
    alpha: tuple[float, ...] | float | None = None
    ignore_index: int | None = None
    multilabel: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "gamma", not_negative("gamma", self.gamma))
        object.__setattr__(self, "ignore_index", _index(self.ignore_index))
        object.__setattr__(self, "multilabel", flag("multilabel", self.multilabel))
        _no_index_for_masks(self.multilabel, self.ignore_index)
        alpha = self.alpha
        if self.multilabel:
            alpha = None if alpha is None else share("alpha", alpha)
        else:
            alpha = numbers("alpha", alpha)
        object.__setattr__(self, "alpha", alpha)

    @property
    def weight(self) -> tuple[float, ...] | None:  # type: ignore[override]
        return self.alpha if isinstance(self.alpha, tuple) else None

    @property
    def task(self) -> Any:
        return "multilabel" if self.multilabel else "multiclass"

    @property
    def metrics(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("accuracy", "f1") if self.multilabel else ("accuracy",)

    @property
    def soft_targets(self) -> bool:  # type: ignore[override]
        return self.multilabel

    def forward(self, y: Array, t: Array, weight: Array | None = None) -> tuple[Array, Any]:
        check_outputs(y, "Focal")
        xp = backend_of(y).xp
        if self.multilabel:
            alpha = self.alpha if isinstance(self.alpha, float) else None
            mean, cache = ops.sigmoid_focal_loss(
                y,
                as_floats(t, y),
                gamma=self.gamma,
                alpha=alpha,
                weight=None if weight is None else self.weighted(weight, y),
            )
            return mean, (cache, None)
        options: dict[str, Any] = {
            "gamma": self.gamma,
            "weight": None if self.weight is None else on_device(self.weight, y),
            "ignore_index": _NONE if self.ignore_index is None else self.ignore_index,
        }
        if weight is None:
            mean, cache = ops.focal_loss(y, t, **options)
            if self.ignore_index is not None:
                mean = xp.where(self.count(t, None, name_of(y)) == 0, 0.0, mean)
            return mean, (cache, None)
        check_weight(weight, y)
        losses, cache = ops.focal_loss(y, t, reduction="none", **options)
        factors = xp.broadcast_to(along_batch(weight, losses.ndim), losses.shape)
        factors = factors * _inverse(self.count(t, weight, name_of(y)))
        return xp.sum(factors * losses), (cache, factors)

    def backward(self, cache: Any, dloss: Array | float = 1.0) -> Array:
        kept, factors = cache
        if self.multilabel:
            return ops.sigmoid_focal_loss_backward(dloss, kept)
        return ops.focal_loss_backward(dloss if factors is None else factors * dloss, kept)

    def count(self, t: Array, weight: Array | None = None, dtype: str = "float32") -> Any:
        if self.multilabel:
            return Loss.count(self, t, weight, dtype)
        return self._count(t, weight, dtype, class_weight=False)

    def _checked(self, t: HostArray, shape: Shape, dtype: str) -> HostArray:
        if self.multilabel:
            return on_or_off(t, shape, dtype=dtype, loss="Focal(multilabel=True)")
        _check_classes(self.weight, shape)
        return classes_or_shares(
            t, shape, dtype=dtype, ignore_index=self.ignore_index, loss="Focal", soft=False
        )

    def num_outputs(self, t: Any) -> int | None:
        host = on_host(t)
        if self.multilabel or host.ndim == 2:
            return Loss.num_outputs(self, host)
        return _indices_imply(host, self.ignore_index)


@dataclass(frozen=True)
class Dice(Loss):
    """1 - the Dice coefficient of predicted and true masks, for each image and class; the mean over
    both (``ops.dice_loss``).

    Args:
        smooth: added to numerator and denominator, greater than 0.
        ignore_index: the label of pixels to ignore, or None; not with ``multilabel``.
        multilabel: use a sigmoid of each output channel instead of a softmax over the channels.
            Networks with one output channel need it.
    """

    smooth: float = 1.0
    ignore_index: int | None = None
    multilabel: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "smooth", positive("smooth", self.smooth))
        object.__setattr__(self, "ignore_index", _index(self.ignore_index))
        object.__setattr__(self, "multilabel", flag("multilabel", self.multilabel))
        _no_index_for_masks(self.multilabel, self.ignore_index)

    @property
    def task(self) -> Any:
        return "multilabel" if self.multilabel else "multiclass"

    metrics: ClassVar[tuple[str, ...]] = ("dice", "mean_iou")

    def forward(self, y: Array, t: Array, weight: Array | None = None) -> tuple[Array, Any]:
        check_outputs(y, "Dice")
        factors = None
        if weight is not None:
            factors = backend_of(y).xp.reshape(self.weighted(weight, y), (y.shape[0],))
        p, before = ops.sigmoid(y) if self.multilabel else ops.softmax(y, 1)
        ignored = _NONE if self.ignore_index is None else self.ignore_index
        mean, cache = ops.dice_loss(p, t, smooth=self.smooth, weight=factors, ignore_index=ignored)
        return mean, (before, cache)

    def backward(self, cache: Any, dloss: Array | float = 1.0) -> Array:
        before, kept = cache
        dp = ops.dice_loss_backward(dloss, kept)
        return (
            ops.sigmoid_backward(dp, before)
            if self.multilabel
            else ops.softmax_backward(dp, before)
        )

    def _checked(self, t: HostArray, shape: Shape, dtype: str) -> HostArray:
        if len(shape) < 2:
            raise ShapeError(
                f"Dice expects outputs (C, *S) with spatial axes, got {shape}; for one class a "
                'sample use loss="cross_entropy"'
            )
        if self.multilabel:
            return on_or_off(t, shape, dtype=dtype, loss="Dice(multilabel=True)", soft=False)
        if shape[0] == 1:
            raise ShapeError(
                "the network has one output channel, and a softmax over it is always 1; use "
                "Dice(multilabel=True)"
            )
        return classes_or_shares(
            t, shape, dtype=dtype, ignore_index=self.ignore_index, loss="Dice", soft=False
        )

    def num_outputs(self, t: Any) -> int | None:
        host = on_host(t)
        return (
            Loss.num_outputs(self, host)
            if self.multilabel
            else _indices_imply(host, self.ignore_index)
        )


def _no_index_for_masks(multilabel: bool, ignore_index: int | None) -> None:
    if multilabel and ignore_index is not None:
        raise ArgumentError("ignore_index is not supported with multilabel=True")


def _inverse(count: Any) -> Any:
    """Return 1 / count, or 0 if count is 0. ``count`` is a 0-dimensional array on the device."""
    xp = backend_of(count).xp
    return xp.where(count == 0, 0.0, 1.0 / xp.where(count == 0, 1.0, count))


def _check_classes(weight: tuple[float, ...] | None, shape: Shape) -> None:
    if weight is not None and len(weight) != shape[0]:
        raise ShapeError(f"expected class weights for {shape[0]} outputs, got {len(weight)}")
