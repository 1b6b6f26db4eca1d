"""Callbacks that watch a training, and trainings with callbacks."""

from portacnn import Trainer
from portacnn.callbacks import Callback
from support.trainings import make


def train(device="numpy", callbacks=(), **options):
    trainer = make(device, kind=Trainer, callbacks=callbacks, **options)
    trainer.train()
    return trainer


class EachStep(Callback):
    every_step = True

    def __init__(self):
        self.losses = []

    def on_step_end(self, trainer, loss):
        self.losses.append(loss)


class Weights(Callback):
    """Keeps the weights after each step, on the host."""

    every_step = True

    def __init__(self):
        self.after = []

    def on_train_begin(self, trainer):
        self.after.append(trainer.model.state_dict())

    def on_step_end(self, trainer, loss):
        self.after.append(trainer.model.state_dict())
