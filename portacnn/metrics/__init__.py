"""Metrics: what a trained network is judged by, gathered on the device over batches of any size.

    accuracy = metrics.named("accuracy", loss)
    for y, t in batches:
        accuracy.update(y, t)     # outputs and targets, on the device; nothing is read back
    accuracy.compute()            # one transfer

A metric reads outputs as its loss does (``Loss.predictions``): it has the loss's ``task`` and
``ignore_index``. Values are scikit-learn's where it has the metric, for boxes COCO's. An output of
NaN is wrong.
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
