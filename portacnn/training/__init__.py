"""Training: the ``Trainer``, its checkpoints, callbacks, and stopping on signals."""

from typing import TYPE_CHECKING

from portacnn.lazy import lazily

if TYPE_CHECKING:
    from portacnn.training.early_stopping import EarlyStopping
    from portacnn.training.signals import stopping_on_signals
    from portacnn.training.step import StepState
    from portacnn.training.trainer import Trainer
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "portacnn.training.early_stopping": ("EarlyStopping",),
            "portacnn.training.signals": ("stopping_on_signals",),
            "portacnn.training.step": ("StepState",),
            "portacnn.training.trainer": ("Trainer",),
        },
    )

__all__ = ["EarlyStopping", "StepState", "Trainer", "stopping_on_signals"]
