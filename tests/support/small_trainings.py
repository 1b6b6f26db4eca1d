"""Trainings of ``small_net``, and a Trainer that keeps its batches."""

from portacnn import Trainer
from support.nets import patches


def trainer(net, train=50, test=20, kind=Trainer, **changes):
    options = {
        "epochs": 2,
        "mini_batch_size": 20,
        "optimizer_param": {"lr": 0.01},
        "verbose": False,
    }
    dtype = net.dtype
    return kind(
        net,
        *patches(train, dtype=dtype),
        *patches(test, seed=1, dtype=dtype),
        **{**options, **changes},
    )


class Recorder(Trainer):
    """Keeps what its steps were given."""

    def __init__(self, *args, **kwargs):
        self.batches = []
        super().__init__(*args, **kwargs)

    def step(self, x, t, state):
        self.batches.append((x, t))
        return super().step(x, t, state)
