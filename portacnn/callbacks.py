"""The callbacks of ``portacnn.training.callbacks``, under a shorter name."""

from portacnn.training.callbacks import (
    EMA,
    Callback,
    CSVLogger,
    EarlyStopping,
    JSONLogger,
    KeepBest,
    LearningRates,
    TensorBoard,
    lr_range_test,
)

__all__ = [
    "EMA",
    "CSVLogger",
    "Callback",
    "EarlyStopping",
    "JSONLogger",
    "KeepBest",
    "LearningRates",
    "TensorBoard",
    "lr_range_test",
]
