"""A training with callbacks resumes exactly."""

import csv
import json
import shutil
from contextlib import suppress

import numpy as np
import pytest

from portacnn import EarlyStopping, Trainer
from portacnn.callbacks import EMA, Callback, CSVLogger, JSONLogger, KeepBest
from portacnn.errors import ArgumentError, ModelFormatError
from portacnn.models import Model
from support.callbacks import EachStep, train
from support.matrix import EACH_LIBRARY
from support.nets import bits
from support.trainings import STEPS, data, make, outcome, rewrite

pytestmark = EACH_LIBRARY
STOPPED_AT = (4, STEPS, 9)


class Counter(Callback):
    """One of somebody's own with a state: it changes the training by it."""

    def __init__(self):
        self.count, self.sums = 0, np.zeros(3)

    def on_epoch_end(self, trainer, figures):
        self.count += 1
        self.sums[self.count % 3] += figures["train_loss"]
        trainer.optimizer.lr = 0.01 / (1 + self.count + self.sums.sum())

    def state_dict(self):
        return {"count": self.count, "sums": self.sums}

    def load_state_dict(self, state):
        self.count, self.sums = state["count"], state["sums"].copy()


def _timeless(path):
    """A log without the figures that differ between two runs."""
    text = path.read_text()
    rows = (
        [json.loads(line) for line in text.splitlines()]
        if path.suffix == ".jsonl"
        else list(csv.DictReader(text.splitlines()))
    )
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows
    ]


def _all(folder):
    return [
        EMA(0.9),
        EMA(0.5, evaluate=False),
        CSVLogger(folder / "log.csv"),
        JSONLogger(folder / "log.jsonl"),
        KeepBest(folder / "best.safetensors", "loss"),
        Counter(),
    ]


def _stopping(folder):
    return [EarlyStopping(1, "loss"), EachStep()]


def _files(folder):
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".csv", ".jsonl"):
            found[path.name] = _timeless(path)
        else:
            found[path.name] = bits(Model.load(path, device="numpy"))
    return found


@pytest.mark.parametrize("made", [_all, _stopping])
def test_exact_resume(tmp_path, backend, made):
    """Killed later than the checkpoint: what was written after it does not count."""
    folders = [tmp_path / name for name in ("whole", "killed", *map(str, STOPPED_AT))]
    for folder in folders[:2]:
        folder.mkdir()
    whole = train(backend.device, made(folders[0]))

    class Killed(Trainer):
        def run_batch(self, *batch, **size):
            super().run_batch(*batch, **size)
            if self.steps_done == 17:
                raise KeyboardInterrupt

    killed = make(
        backend.device,
        kind=Killed,
        callbacks=made(folders[1]),
        checkpoint_dir=tmp_path,
        checkpoint_every=1,
        keep=99,
    )
    with suppress(KeyboardInterrupt):  # early stopping may come first
        killed.train()
    assert killed.stopped_early or killed.epoch == 2
    for step, folder in zip(STOPPED_AT, folders[2:], strict=True):
        shutil.copytree(folders[1], folder)
        (file,) = tmp_path.glob(f"checkpoint-*-step-{step}-*")
        again = Trainer.resume(
            file,
            *data(),
            device=backend.device,
            callbacks=made(folder),
            checkpoint_dir=tmp_path / f"more{step}",
        )
        assert again.steps_done == step
        again.train()
        assert outcome(again) == outcome(whole), step
        assert _files(folder) == _files(folders[0]), step
        for one, other in zip(again.callbacks, whole.callbacks, strict=True):
            assert one.state_dict().keys() == other.state_dict().keys()
            for name, value in one.state_dict().items():
                np.testing.assert_array_equal(value, other.state_dict()[name], err_msg=str(step))


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([], "has the callbacks EMA, got none; pass the same kinds"),
        ([EMA(), EMA()], "has the callbacks EMA, got EMA, EMA-2"),
        ([Counter()], "has the callbacks EMA, got Counter"),
        ([EMA(0.5)], "averages with decay=0.999, got 0.5"),
        ([EMA(), EarlyStopping(2)], "has no early stopping, got EarlyStopping"),
    ],
)
def test_resume_refuses_other_callbacks(tmp_path, callbacks, message):
    path = train(callbacks=[EMA()], epochs=1).checkpoint(tmp_path / "one")
    with pytest.raises(ArgumentError, match=message):
        Trainer.resume(path, *data(), callbacks=callbacks)


def test_resume_takes_the_same_early_stopping(tmp_path):
    given = {"callbacks": [EarlyStopping(2)]}
    path = train(**given, epochs=1).checkpoint(tmp_path / "one")
    assert Trainer.resume(path, *data(), **given).early_stopping.patience == 2
    with pytest.raises(ArgumentError, match=r"patience=2.*got EarlyStopping\(patience=3"):
        Trainer.resume(path, *data(), callbacks=[EarlyStopping(3)])


@pytest.mark.parametrize(
    "nonsense",
    [None, [], "EMA", {"EMA": None}, {"EMA": 3}, {"EMA": {"decay": 0.999, "warm_up": True}}],
)
def test_a_checkpoint_with_nonsense_for_callbacks(tmp_path, nonsense):
    path = train(callbacks=[EMA()], epochs=1).checkpoint(tmp_path / "one")

    def change(header):
        header["callbacks"] = nonsense

    rewrite(path, change)
    with pytest.raises(ModelFormatError):
        Trainer.resume(path, *data(), callbacks=[EMA()])


def test_a_checkpoint_with_averages_of_another_network(tmp_path):
    path = train(callbacks=[EMA()], epochs=1).checkpoint(tmp_path / "one")
    trainer = Trainer.resume(path, *data(), callbacks=[EMA()], epochs=2)
    ema = next(iter(trainer.callbacks))
    state = ema.state_dict()
    del state["average.fc.weight"]
    ema.load_state_dict(state)
    with pytest.raises(ModelFormatError, match=r"EMA: .*missing: fc\.weight"):
        trainer.train()


def test_a_state_that_a_file_cannot_hold(tmp_path):
    class Bad(Callback):
        def state_dict(self):
            return {"function": print}

    trainer = make(callbacks=[Bad()])
    with pytest.raises(ArgumentError, match="Bad: state_dict must return NumPy arrays and JSON"):
        trainer.checkpoint(tmp_path / "one")
