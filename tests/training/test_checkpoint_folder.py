"""The folder of checkpoints: who may write to it, which is the newest that can be read, where it
is."""

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from portacnn import Trainer
from portacnn.errors import ArgumentError, CheckpointError
from portacnn.training import folder
from portacnn.training.lock import locked
from support.trainings import (
    STEPS,
    Watched,
    data,
    make,
    names,
    outcome,
    resumed,
    stopped,
    uninterrupted,
)

# --- one at a time --------------------------------------------------------------------------------

HOLDER = """
import os, sys, time
from pathlib import Path
from portacnn.training.lock import locked
with locked(Path(sys.argv[1])):
    if os.fork() == 0:  # a child that outlives its parent, such as a data loader's worker
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def test_one_run_resumed_twice_into_one_folder(tmp_path):
    """The second is refused before its first step, and goes on once the first has ended; in another
    folder it may at once."""
    stopped(tmp_path, 3)
    first, second = resumed(tmp_path, checkpoint_every=1), resumed(tmp_path)
    refusals = []

    class Other(threading.Thread):
        def run(self):
            try:
                second.train()
            except CheckpointError as error:
                refusals.append(str(error))

    original = first.step

    def step(x, t, state):
        if not refusals:
            other = Other()
            other.start()
            other.join()
        return original(x, t, state)

    first.step = step
    first.train()
    (message,) = refusals
    assert "this run is already being trained" in message
    assert str(tmp_path) in message
    assert "checkpoint_dir=" in message
    assert second.steps_done == 3
    assert second.batches == []
    whole = uninterrupted()
    assert outcome(first) == outcome(whole)
    second.train()
    assert outcome(second) == outcome(whole)
    assert not [name for name in names(tmp_path) if "lock" in name]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_killed_process_leaves_no_lock(tmp_path):
    trainer = stopped(tmp_path, 3)
    lock = tmp_path / f".lock-{trainer.run}"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True
    ) as holder:
        child = int(holder.stdout.readline())
        try:
            for refused in (trainer.train, trainer.checkpoint):
                with pytest.raises(CheckpointError, match="already being trained"):
                    refused()
            assert lock.exists()
            holder.kill()
            holder.wait()
            trainer.train()
        finally:
            os.kill(child, 9)
    assert trainer.finished
    assert not lock.exists()


def test_other_runs_and_other_folders_are_free(tmp_path):
    trainer = stopped(tmp_path / "one", 3)
    with locked(tmp_path / "one" / f".lock-{trainer.run}"):
        trainer.checkpoint(tmp_path / "elsewhere")
        resumed(tmp_path / "one", checkpoint_dir=tmp_path / "two").train()
        make(checkpoint_dir=tmp_path / "one").train()


def test_a_lock_is_for_one(tmp_path):
    path = tmp_path / "lock"
    for _ in range(2):
        with locked(path):
            with pytest.raises(BlockingIOError), locked(path):
                pytest.fail("two are within")
            assert path.exists()
        assert not path.exists()
    with locked(tmp_path / "no" / "folder"):  # where none can be made, work goes on without
        pass


def test_two_trainings_in_one_folder_the_second_shorter(tmp_path):
    first, second = make(checkpoint_dir=tmp_path, epochs=3), make(checkpoint_dir=tmp_path, epochs=1)
    first.train()
    second.train()
    again = resumed(tmp_path)
    assert (again.run, again.steps_done) == (second.run, STEPS)
    assert (tmp_path / "latest").read_text().strip() == second.last_checkpoint.name
    assert len(folder.checkpoints(tmp_path)) == 4


# --- the newest that can be read ------------------------------------------------------------------


def directory(path):
    path.mkdir()


def dangling(path):
    path.symlink_to("nowhere")


def circle(path):
    path.symlink_to(path.name)


def pipe(path):
    os.mkfifo(path)


def empty(path):
    path.touch()


@pytest.mark.parametrize(
    "make_one", [directory, dangling, circle, pipe, empty], ids=lambda f: f.__name__
)
def test_what_is_no_whole_file_is_passed_over(tmp_path, caplog, make_one):
    trainer = stopped(tmp_path, 3, keep=2)
    strange = tmp_path / f"checkpoint-000009-step-9-{trainer.run}.safetensors"
    make_one(strange)
    with caplog.at_level(logging.WARNING, "portacnn"):
        again = resumed(tmp_path)
    assert again.steps_done == 3
    assert "skipped a broken checkpoint" in caplog.text
    assert strange.name in caplog.text
    again.train()
    assert len([found for found in folder.checkpoints(tmp_path) if found.path.is_file()]) == 2
    assert resumed(tmp_path).finished


def test_where_none_can_be_read_the_newest_says_why(tmp_path):
    trainer = stopped(tmp_path, 3)
    trainer.last_checkpoint.unlink()
    for number in (1, 2):
        (tmp_path / f"checkpoint-00000{number}-step-9-{trainer.run}.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"checkpoint-000002.* it is not a file"):
        resumed(tmp_path)


def test_one_that_may_not_be_read_is_passed_over_too(tmp_path, caplog):
    for number in (1, 2, 3):
        (tmp_path / f"checkpoint-00000{number}-step-9-abcdef.safetensors").touch()

    def read(path):
        if path.name.startswith("checkpoint-000001"):
            return "content"
        raise PermissionError(13, "Permission denied", str(path))

    assert folder.newest(tmp_path, read)[1] == "content"
    assert caplog.text.count("Permission denied") == 2
    (tmp_path / "checkpoint-000001-step-9-abcdef.safetensors").unlink()
    with pytest.raises(PermissionError, match="000003"):
        folder.newest(tmp_path, read)


def test_files_that_go_while_they_are_read(tmp_path, monkeypatch):
    """A training that is going on with keep=1 puts another in the place of the only one."""
    trainer = stopped(tmp_path, 3, keep=1)
    listed = folder.checkpoints
    calls = []

    def checkpoints(path):
        found = listed(path)
        calls.append(found)
        if len(calls) == 1:
            trainer.checkpoint()
        return found

    monkeypatch.setattr(folder, "checkpoints", checkpoints)
    file, steps = folder.newest(tmp_path, lambda path: path.stat() and int(path.name.split("-")[3]))
    assert (file, steps) == (trainer.last_checkpoint, 3)


# --- where it is ----------------------------------------------------------------------------------


def test_a_relative_folder_is_the_one_that_was_tried(tmp_path, monkeypatch):
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path)
    trainer = make(checkpoint_dir="ck")
    monkeypatch.chdir("away")
    trainer.train()
    assert trainer.last_checkpoint.parent == tmp_path / "ck"
    assert names(tmp_path / "away") == []
    monkeypatch.chdir(tmp_path)
    again = resumed("ck")
    other = resumed("ck", checkpoint_dir="other")
    monkeypatch.chdir("away")
    assert again.checkpoint().parent == tmp_path / "ck"
    assert other.checkpoint().parent == tmp_path / "other"
    assert trainer.checkpoint("mine") == trainer.last_checkpoint == tmp_path / "away" / "mine"
    monkeypatch.chdir(tmp_path)
    assert trainer.last_checkpoint.is_file()


def test_a_relative_cache_folder_stays_where_it_was(tmp_path, monkeypatch):
    from portacnn import data

    monkeypatch.setenv("PORTACNN_CACHE", "cache")
    monkeypatch.chdir(tmp_path)
    kept = data.cache_folder()
    assert kept == Path(tmp_path / "cache")


# --- the data -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1, 64, 65, 130, 149])
def test_one_changed_image_is_noticed_wherever_it_is(tmp_path, place):
    (x, t), (v, u) = (data()[:2]), (data()[2:])
    x, t = np.concatenate([x, x, x]), np.concatenate([t, t, t])
    trainer = Trainer(make().model, x, t, v, u, epochs=1, mini_batch_size=50, verbose=False)
    trainer.checkpoint(tmp_path / "one")
    Watched.resume(tmp_path / "one", x.copy(), t, v, u)
    x[place, 0, 7, 7] += 0.5
    with pytest.raises(ArgumentError, match="x_train has other images"):
        Watched.resume(tmp_path / "one", x, t, v, u)


def test_of_a_large_set_spread_images_are_looked_at(backend, monkeypatch):
    """Within a limit of bytes, and in pieces: the same whatever their size."""
    from portacnn.training import feed

    images, labels = np.arange(4000, dtype="float32").reshape(100, 1, 5, 8), np.arange(100)

    def printed(x, array=backend.array):
        return feed.fingerprint(feed.Samples(array(x), array(labels)))

    whole = printed(images)
    monkeypatch.setattr(feed, "_CHUNK", 333)
    assert printed(images) == printed(images, np.asarray) == whole
    for limit, places in ((1600, {0: True, 90: True, 95: False}), (1599, {90: False, 99: True})):
        monkeypatch.setattr(feed, "_LOOKED_AT", limit)  # ten images of 160 bytes; one byte less
        spread = printed(images)["images"]
        for place, seen in places.items():
            other = images.copy()
            other[place] += 1
            assert (printed(other)["images"] != spread) is seen
