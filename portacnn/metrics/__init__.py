"""Metrics of a network's outputs, accumulated on the device over batches of any size.

    accuracy = metrics.named("accuracy", loss)
    for y, t in batches:
        accuracy.update(y, t)     # outputs and targets on the device; no transfer
    accuracy.compute()            # one transfer

A metric has the ``task`` and ``ignore_index`` of its loss, so that both agree on predictions
(``Loss.predictions``). Values are equal to scikit-learn's, or COCO's for boxes. An output of NaN is
a wrong prediction.
"""

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
from portacnn.metrics.named import METRICS, describe_metric, metrics_for, named, rebuild_metric
from portacnn.metrics.ranking import RocAuc
from portacnn.metrics.values import MAE, R2, RMSE

__all__ = [
    "F1",
    "MAE",
    "METRICS",
    "R2",
    "RMSE",
    "Accuracy",
    "AveragePrecision",
    "BalancedAccuracy",
    "ConfusionMatrix",
    "DiceScore",
    "MeanIoU",
    "Metric",
    "Precision",
    "Recall",
    "RocAuc",
    "TopK",
    "describe_metric",
    "metrics_for",
    "named",
    "rebuild_metric",
]
