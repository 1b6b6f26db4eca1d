"""Callbacks that write files: CSV, JSON lines, the best model, TensorBoard."""

import csv
import json
import sys

import numpy as np
import pytest

from portacnn import Trainer
from portacnn.callbacks import EMA, CSVLogger, JSONLogger, KeepBest, TensorBoard
from portacnn.errors import ArgumentError, DependencyError
from portacnn.models import Model
from support.callbacks import train
from support.matrix import EACH_LIBRARY, needs
from support.trainings import STEPS, TEST, data

pytestmark = EACH_LIBRARY


def test_logs_hold_the_history(tmp_path, backend):
    loggers = [CSVLogger(tmp_path / "new" / "log.csv"), JSONLogger(tmp_path / "log.jsonl")]
    (tmp_path / "log.jsonl").write_text("of an earlier training\n")
    metrics = {"hits": "accuracy", "table": "confusion_matrix"}
    trainer = train(backend.device, loggers, metrics=metrics)
    with (tmp_path / "new" / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    names = ["epoch", *trainer.history]
    assert [list(row) for row in (*rows, *lines)] == [names] * 6
    for epoch, (row, line) in enumerate(zip(rows, lines, strict=True)):
        for name in trainer.history:
            value = trainer.history[name][epoch]
            assert json.loads(row[name]) == line[name] == value
        assert int(row["epoch"]) == line["epoch"] == epoch + 1
    assert np.sum(lines[0]["test_table"]) == TEST


def test_json_lines_have_no_nan(tmp_path):
    logger, nan = JSONLogger(tmp_path / "log"), float("nan")
    logger.path.touch()

    class Here:
        epoch = 1

    logger.on_epoch_end(Here(), {"a": nan, "b": [1.0, -float("inf")], "c": 0.5})
    line = json.loads(logger.path.read_text(), parse_constant=lambda word: pytest.fail(word))
    assert line == {"epoch": 1, "a": None, "b": [1.0, None], "c": 0.5}


def test_keep_best_saves_what_was_evaluated(tmp_path):
    best = KeepBest(tmp_path / "best", "loss")
    trainer = train(callbacks=[EMA(), best], epochs=6, optimizer_param={"lr": 0.15})
    figures = trainer.test_loss_list
    assert figures.index(min(figures)) < 5, "the test needs a best epoch before the last"
    loss = Model.load(tmp_path / "best", device="numpy").loss(*data()[2:])
    assert loss == pytest.approx(min(figures), rel=1e-6)
    with pytest.raises(ArgumentError, match="KeepBest monitors 'f1'"):
        train(callbacks=[KeepBest(tmp_path / "best", "f1")])


@pytest.mark.parametrize("kind", [CSVLogger, JSONLogger, KeepBest])
def test_a_path_that_is_none(kind):
    with pytest.raises(ArgumentError, match="expected the path of"):
        kind(3)


@needs("tensorboard")
def test_tensorboard_reads_it(tmp_path):
    """Two files: of a training that was killed after its checkpoint, and of the one that
    resumed."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    whole = train(epochs=3)
    path = train(callbacks=[TensorBoard(tmp_path / "a")], epochs=1).checkpoint(tmp_path / "one")
    callbacks = [TensorBoard(tmp_path / "a")]
    for epochs in (2, 3):  # the second one begins at the first epoch's end, too
        Trainer.resume(path, *data(), callbacks=callbacks, epochs=epochs).train()
    read = EventAccumulator(str(tmp_path / "a"))
    read.Reload()
    losses = [(event.step, event.value) for event in read.Scalars("loss")]
    assert [step for step, _ in losses] == list(range(1, 3 * STEPS + 1))
    np.testing.assert_allclose([loss for _, loss in losses], whole.train_loss_list, rtol=1e-6)
    tested = [(event.step, event.value) for event in read.Scalars("test_loss")]
    assert [step for step, _ in tested] == [STEPS, 2 * STEPS, 3 * STEPS]
    np.testing.assert_allclose([loss for _, loss in tested], whole.test_loss_list, rtol=1e-6)


def test_tensorboard_that_is_not_installed_is_told(tmp_path, monkeypatch):
    for name in ("tensorboard", "tensorboardX"):
        for module in [name, *(known for known in sys.modules if known.startswith(f"{name}."))]:
            monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DependencyError, match="pip install tensorboard"):
        TensorBoard(tmp_path)
