"""Training: the ``Trainer``, its checkpoints, callbacks, and stopping on signals."""

from portacnn.training.early_stopping import EarlyStopping
from portacnn.training.signals import stopping_on_signals
from portacnn.training.step import StepState
from portacnn.training.trainer import Trainer

__all__ = ["EarlyStopping", "StepState", "Trainer", "stopping_on_signals"]
