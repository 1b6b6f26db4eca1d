"""Metrics by name, and as JSON for files."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

from portacnn.arguments import plain, told
from portacnn.errors import ArgumentError, ModelFormatError
from portacnn.losses import Loss
from portacnn.metrics.agreement import (
    F1,
    BalancedAccuracy,
    DiceScore,
    MeanIoU,
    Precision,
    Recall,
)
from portacnn.metrics.base import Metric
from portacnn.metrics.boxes import AveragePrecision
from portacnn.metrics.hits import Accuracy, ConfusionMatrix, TopK
from portacnn.metrics.ranking import RocAuc
from portacnn.metrics.values import MAE, R2, RMSE

METRICS: dict[str, Callable[[], Metric]] = {
    "accuracy": Accuracy,
    "pixel_accuracy": Accuracy,
    "top5": TopK,
    "balanced_accuracy": BalancedAccuracy,
    "precision": Precision,
    "recall": Recall,
    "f1": F1,
    "confusion_matrix": ConfusionMatrix,
    "roc_auc": RocAuc,
    "mean_iou": MeanIoU,
    "dice": DiceScore,
    "mae": MAE,
    "rmse": RMSE,
    "r2": R2,
}
"""The metrics by name, with their default arguments. "top" with a number is a ``TopK``."""

_KINDS: dict[str, type[Metric]] = {
    kind.__name__: kind
    for kind in (
        *(Accuracy, TopK, ConfusionMatrix, BalancedAccuracy, Precision, Recall, F1, MeanIoU),
        *(DiceScore, RocAuc, MAE, RMSE, R2, AveragePrecision),
    )
}


def named(what: str | Metric, loss: Loss | None = None) -> Metric:
    """Return an empty metric by name, or a copy of the given metric without its batches, for the
    outputs of ``loss``.

    Raises:
        ArgumentError: the name is unknown, or the metric does not support the loss's task.
    """
    if isinstance(what, Metric):
        metric = what
    elif isinstance(what, str) and what in METRICS:
        metric = METRICS[what]()
    elif isinstance(what, str) and (number := re.fullmatch(r"top([1-9]\d{0,8})", what)):
        metric = TopK(k=int(number[1]))
    elif isinstance(what, type) and issubclass(what, Metric):
        raise ArgumentError(f"expected a metric, got its class; write {what.__name__}(...)")
    else:
        raise ArgumentError(
            f"unknown metric {told(what)}; known are {', '.join(METRICS)}, or a "
            "portacnn.metrics.Metric"
        )
    return metric if loss is None else metric.for_loss(loss)


def metrics_for(
    loss: Loss, metrics: Iterable[str | Metric] | Mapping[str, str | Metric] | None = None
) -> dict[str, Metric]:
    """Return metrics by name, for the outputs of ``loss``.

    Args:
        metrics: names or metrics; a mapping sets their names. None: the loss's default metrics.

    Raises:
        ArgumentError: a name is unknown or occurs twice, or a metric does not support the loss's
            task.
    """
    if isinstance(metrics, str | Metric | type):
        metrics = (metrics,)
    if metrics is None:
        metrics = loss.metrics
    if isinstance(metrics, Mapping):
        pairs = [(str(name), what) for name, what in metrics.items()]
    elif isinstance(metrics, Iterable):
        pairs = [(what if isinstance(what, str) else _name_of(what), what) for what in metrics]
    else:
        raise ArgumentError(f"metrics must be a list of names or metrics, got {told(metrics)}")
    found: dict[str, Metric] = {}
    for name, what in pairs:
        if name == "loss":
            raise ArgumentError('the name "loss" is reserved; choose another name for the metric')
        if name in found:
            raise ArgumentError(
                f"there are two metrics called {name}; pass a mapping: metrics={{'mine': ...}}"
            )
        found[name] = named(what, loss)
    return found


def _name_of(metric: Metric) -> str:
    """Return the name of the metric's class; for a custom metric, the class name in snake case."""
    kind = type(metric)
    for word, made in METRICS.items():
        if made is kind:
            return f"top{metric.k}" if isinstance(metric, TopK) else word
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", kind.__name__).lower()


def describe_metric(metric: Metric) -> dict[str, Any]:
    """Return a metric's class and options as JSON values. Raises ArgumentError for a custom
    metric."""
    kind = type(metric)
    if _KINDS.get(kind.__name__) is not kind:
        raise ArgumentError(
            f"a file can store the metrics {', '.join(_KINDS)}, got {kind.__qualname__}"
        )
    options = {field.name: getattr(metric, field.name) for field in fields(metric) if field.init}
    return {"class": kind.__name__, "arguments": plain(options)}


def rebuild_metric(described: Any) -> Metric:
    """Return the metric described by ``describe_metric``. Raises the constructor's errors."""
    if described["class"] not in _KINDS:
        raise ModelFormatError(f"unknown metric {told(described['class'])}; upgrade portacnn")
    return _KINDS[described["class"]](**described["arguments"])
