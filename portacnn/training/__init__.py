"""Training: the ``Trainer``."""

from portacnn.training.trainer import Trainer

__all__ = ["Trainer"]
