"""Small trainings that are stopped and resumed: what the tests of checkpoints share."""

import json
from functools import cache

from portacnn import Model, Trainer
from portacnn.layers import BatchNorm2d, Conv2d, Dropout, Flatten, Linear, ReLU
from support.nets import bits, patches

TRAIN, TEST = 50, 20
EPOCHS, SIZE = 3, 8
STEPS = 7  # an epoch: six whole batches and one of two
HISTORY = (
    "train_loss_list",
    "epoch_loss_list",
    "train_acc_list",
    "test_acc_list",
    "test_loss_list",
)


def data(dtype="float32"):
    return *patches(TRAIN, dtype=dtype), *patches(TEST, seed=1, dtype=dtype)


def drawing_net(device, dtype="float32", seed=3):
    """One with running statistics and with masks that are drawn anew at each step."""
    net = Model(
        conv=Conv2d(1, 3, 3, bias=False),
        bn=BatchNorm2d(3),
        relu=ReLU(),
        drop=Dropout(0.4),
        flatten=Flatten(),
        fc=Linear(None, 4),
    )
    return net.build((1, 8, 8), device=device, dtype=dtype, seed=seed)


class Watched(Trainer):
    """Stops after a given step, and keeps the batches that its steps were given."""

    stop_after = 0

    def __init__(self, *args, **options):
        self.batches = []
        super().__init__(*args, **options)

    def step(self, x, t, state):
        self.batches.append((self.backend.to_host(x), self.backend.to_host(t)))
        if len(self.batches) == self.stop_after:
            self.stop()
        return super().step(x, t, state)


def make(device="numpy", net=drawing_net, dtype="float32", kind=Watched, **options):
    standard = {
        "epochs": EPOCHS,
        "mini_batch_size": SIZE,
        "optimizer_param": {"lr": 0.01},
        "verbose": False,
        "seed": 5,
    }
    return kind(net(device, dtype=dtype), *data(dtype), **{**standard, **options})


def outcome(trainer):
    """All that a training leaves, to the bit."""
    return (
        bits(trainer.model),
        {name: getattr(trainer, name) for name in HISTORY},
        trainer.epoch,
        trainer.stopped_early,
    )


@cache
def uninterrupted(device="numpy", epochs=EPOCHS, **options):
    """A training that ran to its end: what others are compared with. Nobody may change it."""
    trainer = make(device, epochs=epochs, **options)
    trainer.train()
    return trainer


def stopped(path, step, **options):
    """A training that was stopped after so many steps, with one checkpoint of that moment."""
    trainer = make(checkpoint_dir=path, checkpoint_every=10**9, **options)
    trainer.stop_after = step
    trainer.train()
    assert trainer.steps_done == step
    return trainer


def resumed(path, dtype="float32", kind=Watched, **options):
    return kind.resume(path, *data(dtype), **options)


def names(path):
    return sorted(file.name for file in path.iterdir())


def rewrite(path, change):
    """Change a checkpoint's header, and give it the checksum that belongs to it. Shares no code
    with portacnn."""
    import struct
    import zlib

    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    outer, tensors = json.loads(content[8 : 8 + length]), content[8 + length :]
    header = json.loads(outer["__metadata__"]["portacnn"])
    changed = change(header)
    header = header if changed is None else changed
    if isinstance(header, dict):
        header = {
            "checksum": "0" * 8,
            **{key: value for key, value in header.items() if key != "checksum"},
        }
    outer["__metadata__"]["portacnn"] = json.dumps(header)
    text = json.dumps(outer).encode()
    text += b" " * (-len(text) % 8)
    content = struct.pack("<Q", len(text)) + text + tensors
    digits = f"{zlib.crc32(content):08x}".encode()
    path.write_bytes(content.replace(b'checksum\\": \\"00000000', b'checksum\\": \\"' + digits, 1))
