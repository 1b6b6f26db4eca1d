"""Trainings of every task, with every metric and callback, that SIGKILL ends at random moments.

The trainings are children of one process that has imported everything: this file as a program.
"""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from portacnn import Model, Trainer
from portacnn.callbacks import EMA, CSVLogger, EarlyStopping, JSONLogger, KeepBest, TensorBoard
from support.nets import bits
from support.tasks import TASKS, figures, made, sets_of

pytest.importorskip("safetensors")
EPOCHS = 5
ROOT = Path(__file__).resolve().parents[2]


def callbacks(folder: Path) -> list:
    names = [EarlyStopping(9, "loss"), EMA(0.9), KeepBest(folder / "best.safetensors", "loss")]
    names += [CSVLogger(folder / "log.csv"), JSONLogger(folder / "log.jsonl")]
    return [*names, *([TensorBoard(folder / "board")] if find_spec("tensorboard") else [])]


def train(task: str, folder: Path) -> Trainer:
    """Begin it, or go on with it, to the end."""
    given = {"callbacks": callbacks(folder)}
    files = folder / "checkpoints"
    files.mkdir(parents=True, exist_ok=True)
    if list(files.glob("checkpoint-*.safetensors")):
        trainer = Trainer.resume(files, *sets_of(task), verbose=False, **given)
    else:
        saving = {"checkpoint_dir": files, "checkpoint_every": 1, "keep": 2}
        trainer = made(task, epochs=EPOCHS, **saving, **given)
    if not trainer.finished:
        trainer.train()
    return trainer


def left_by(task: str, folder: Path) -> dict:
    """All that the finished training left, to the bit, but for what a clock says."""
    trainer = train(task, folder)
    assert trainer.finished
    times = {"seconds", "images_per_second"}
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    with open(folder / "log.csv", newline="") as file:
        table = list(csv.DictReader(file))
    return {
        "weights": bits(trainer.model),
        "averages": bits(Model.load(folder / "best.safetensors", device="numpy")),
        "losses": trainer.train_loss_list,
        "figures": figures(trainer),
        "rows": [{k: v for k, v in row.items() if k not in times} for row in (*rows, *table)],
    }


def child(task: str, folder: Path) -> int:
    """The process of a child that trains."""
    pid = os.fork()
    if pid == 0:
        try:
            train(task, folder)
        except BaseException as error:
            print(f"{task}: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid


def kills(task: str, folder: Path, lasted: float, draws: random.Random) -> int:
    """Kill it until it is done. Returns how often."""
    for count in range(60):
        pid = child(task, folder)
        time.sleep(draws.uniform(0, lasted * (0.4 + 0.05 * count)))  # more and more, to get on
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            return count
    pid = child(task, folder)
    assert os.waitpid(pid, 0)[1] == 0
    return 60


def main(folder: Path) -> None:
    """Print a line of JSON for each task: how often it was killed, and whether it came out
    alike."""
    draws = random.Random(0)
    train(next(iter(TASKS)), folder / "first")  # what is loaded and compiled once does not count
    for task in TASKS:
        places = [folder / task / name for name in ("whole", "killed")]
        began = time.perf_counter()
        train(task, places[0])
        count = kills(task, places[1], time.perf_counter() - began, draws)
        whole, again = (left_by(task, place) for place in places)
        differ = [name for name in whole if not _alike(whole[name], again[name])]
        print(json.dumps([task, count, differ]), flush=True)


def _alike(one: object, other: object) -> bool:
    try:
        np.testing.assert_equal(other, one)  # NaN is NaN
    except AssertionError:
        return False
    return True


@pytest.mark.slow
def test_every_task_is_killed_and_comes_out_alike(tmp_path):
    run = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "PORTACNN_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert [task for task, _, _ in found] == list(TASKS)
    assert {task: differ for task, _, differ in found if differ} == {}
    assert sum(count for _, count, _ in found) >= 2 * len(TASKS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
