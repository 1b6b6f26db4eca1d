"""Training: the ``Trainer``, its checkpoints, callbacks, and stopping on signals."""

from portacnn.training.early_stopping import EarlyStopping
from portacnn.training.signals import stopping_on_signals
from portacnn.training.trainer import StepState, Trainer

__all__ = ["EarlyStopping", "StepState", "Trainer", "stopping_on_signals"]
