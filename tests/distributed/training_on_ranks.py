"""A training on several ranks: run by ``test_training.py`` under mpiexec. Rank 0 prints the losses
and whether all ranks have the same weights, bit by bit.

    deep: float64, dropout, augmentation that mixes images, synchronised batch norm
    simple: float32, the tutorials' network
    parts: accumulation, clipped gradients, batches from files, uneven last batches
"""

import json
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np

import portacnn
from portacnn import SimpleConvNet, Trainer
from portacnn.models import DeepConvNet
from portacnn.training import reducing

what, folder, *device = sys.argv[1:]
rng = np.random.default_rng(0)
x, t = rng.random((60, 1, 16, 16)), rng.integers(0, 10, 60)
options = {"epochs": 10, "batch_size": 12, "seed": 1, "verbose": False}
place = device[0] if device else "numpy"
dtype = "float32" if what == "simple" else "float64"
if what == "simple":
    model = SimpleConvNet((1, 16, 16), device=place, seed=0)
else:
    model = DeepConvNet(
        input_size=16, hidden_size=20, batch_norm=True, dtype=dtype, seed=0, device=place
    )
    options |= {"sync_batch_norm": True, "augment": ["mixup", "rotation=10", "cutmix"]}
    reducing.BUCKET = 1 << 12
data = (x.astype(dtype), t, x[:13].astype(dtype), t[:13])
if what == "parts":
    options |= {"epochs": 5, "accumulate": 2, "clip_norm": 1.0, "batch_size": 25}
    path = Path(folder) / "x.npy"
    data = (np.load(path, mmap_mode="r"), *data[1:])
trainer = Trainer(model, *data, distributed="mpi", **options)
trainer.train()

digest = sha256()
for array in trainer.model.state_dict().values():
    digest.update(array.tobytes())
digests = trainer.ranks.communicator.gather(digest.hexdigest())
if trainer.ranks.is_first:
    figures = {
        "losses": trainer.train_loss_list,
        "test": trainer.history["test_loss"] + trainer.history["test_accuracy"],
        "weights": len(set(digests)),
        "version": portacnn.__version__,
    }
    print(json.dumps(figures))
