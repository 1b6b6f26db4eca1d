"""Callbacks: objects that a ``Trainer`` calls between its steps."""

from portacnn.training.callbacks.base import Callback
from portacnn.training.callbacks.best import KeepBest
from portacnn.training.callbacks.ema import EMA
from portacnn.training.callbacks.loggers import CSVLogger, JSONLogger
from portacnn.training.callbacks.range_test import LearningRates, lr_range_test
from portacnn.training.callbacks.tensorboard import TensorBoard
from portacnn.training.early_stopping import EarlyStopping

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
