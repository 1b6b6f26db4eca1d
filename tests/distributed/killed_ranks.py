"""A training one of whose ranks is killed after a step: run by ``test_killed_ranks.py`` under
mpiexec. It goes on from the checkpoints in the folder, if there are any."""

import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np

from portacnn import SimpleConvNet, Trainer
from portacnn.callbacks import Callback

folder, victim, step, delay = Path(sys.argv[1]), *map(float, sys.argv[2:5])
draw = np.random.default_rng(0)
x, t = draw.random((60, 1, 12, 12)), np.arange(60) % 10
EPOCHS = 20


class Kill(Callback):
    """Kill this process a while after the step has begun."""

    every_step = True
    every_rank = True

    def on_step_end(self, trainer: Trainer, *_: object) -> None:
        if (trainer.ranks.rank, trainer.steps_done) == (victim, step):
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()


saved = list(folder.glob("checkpoint-*.safetensors"))
more = {"callbacks": [Kill()], "verbose": False, "distributed": "auto"}
if saved:
    trainer = Trainer.resume(folder, x, t, x, t, **more)
else:
    model = SimpleConvNet((1, 12, 12), {"filter_num": 4, "filter_size": 3}, dtype="float64", seed=0)
    more |= {"epochs": EPOCHS, "batch_size": 20, "checkpoint_dir": folder, "checkpoint_every": 1}
    trainer = Trainer(model, x, t, x, t, keep=2, **more)
first = trainer.steps_done
trainer.train()
if trainer.ranks.is_first:
    print(first, *trainer.train_loss_list)
