"""Training: the ``Trainer``, and when it stops early."""

from portacnn.training.early_stopping import EarlyStopping
from portacnn.training.trainer import StepState, Trainer

__all__ = ["EarlyStopping", "StepState", "Trainer"]
