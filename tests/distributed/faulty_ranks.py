"""Ranks that fail, or disagree: run by ``test_faults.py`` under mpiexec."""

import os
import signal
import sys

from portacnn import distributed

ours, what = distributed.connect("mpi"), sys.argv[1]
first = ours.rank == 1
if what == "one raises":
    with distributed.taking_down(ours):
        if first:
            raise ValueError("broken on one rank")
        ours.barrier()
elif what == "all raise":
    try:
        with distributed.taking_down(ours):
            raise ValueError("broken on all")
    except ValueError:
        ours.barrier()  # the job goes on
        print("handled")
elif what == "one raises in training":
    import numpy as np

    from portacnn import SimpleConvNet, Trainer
    from portacnn.callbacks import Callback

    class Breaks(Callback):
        def on_update(self, trainer: Trainer, ok: object) -> None:
            if first and trainer.steps_done == 3:
                raise ValueError("broken in a callback")

    x, t = np.zeros((60, 1, 12, 12), "float32"), np.arange(60) % 10
    model = SimpleConvNet((1, 12, 12), {"filter_num": 4, "filter_size": 3}, seed=0)
    more = {"batch_size": 10, "callbacks": [Breaks()], "distributed": ours, "verbose": False}
    Trainer(model, x, t, **more).train()
elif what == "nobody handles":
    if first:
        raise ValueError("broken in the user's code")
    ours.barrier()
elif what == "exits":
    with distributed.taking_down(ours):
        if first:
            sys.exit(3)
        ours.barrier()
elif what == "killed":
    if first:
        os.kill(os.getpid(), signal.SIGKILL)
    ours.barrier()
elif what == "disagree":
    distributed.agree(ours, {"portacnn": "1.0", "batch_size": 100 + (ours.rank == ours.size - 1)})
elif what == "term":
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    print(f"ready {os.getpid()}\n", end="", flush=True)
    steps = 0
    while not ours.any_rank(bool(stop)):
        steps += 1
    assert len(set(ours.gather(steps))) == 1
    print("stopped together", flush=True)
