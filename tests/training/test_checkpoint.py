"""Checkpoints: when they are written, which are kept, and what is in them."""

import logging
import os

import numpy as np
import pytest

import portacnn
from portacnn.errors import ArgumentError, CheckpointError, ModelFormatError, NotFiniteError
from portacnn.training import folder
from portacnn.training import trainer as trainer_module
from support.nets import small_net
from support.trainings import STEPS, make, names, outcome, resumed, rewrite, stopped, uninterrupted

# --- the folder -----------------------------------------------------------------------------------


def test_by_default_a_checkpoint_each_epoch_and_three_are_kept(tmp_path):
    trainer = make(checkpoint_dir=tmp_path / "a" / "b", epochs=5)
    trainer.train()
    run = trainer.run
    kept = [f"checkpoint-{n:06d}-step-{n * STEPS}-{run}.safetensors" for n in (3, 4, 5)]
    assert names(tmp_path / "a" / "b") == [*kept, "latest"]
    assert (tmp_path / "a" / "b" / "latest").read_text() == f"{kept[-1]}\n"
    assert trainer.last_checkpoint.name == kept[-1]
    assert resumed(tmp_path / "a" / "b" / "latest").finished


def test_older_ones_go_only_when_the_new_one_is_safe(tmp_path, monkeypatch):
    trainer = make(checkpoint_dir=tmp_path, keep=1)
    seen = []
    save = trainer_module.save_tensors
    monkeypatch.setattr(
        trainer_module,
        "save_tensors",
        lambda *args: (seen.append(names(tmp_path)), save(*args), seen.append(names(tmp_path))),
    )
    trainer.train()
    counts = [len([name for name in there if name.startswith("checkpoint")]) for there in seen]
    assert counts == [0, 1, 1, 2, 1, 2]
    assert len(folder.checkpoints(tmp_path)) == 1


def test_another_trainings_files_are_left_alone(tmp_path):
    first, second = make(checkpoint_dir=tmp_path), make(checkpoint_dir=tmp_path, keep=1)
    first.train()
    second.train()
    runs = [found.run for found in folder.checkpoints(tmp_path)]
    assert runs == [first.run] * 3 + [second.run]
    assert resumed(tmp_path).run == second.run  # the newest


def test_a_resumed_training_removes_its_temporary_files(tmp_path):
    trainer = stopped(tmp_path, 3, keep=1)
    left_over = (
        tmp_path / f".checkpoint-000009-step-1-{trainer.run}.safetensors.0123456789abcdef.tmp"
    )
    others = [
        tmp_path / ".checkpoint-000009-step-1-ffffff.safetensors.0123456789abcdef.tmp",
        tmp_path / "notes.txt",
    ]
    for file in (left_over, *others):
        file.write_bytes(b"half")
    again = resumed(tmp_path)
    assert left_over.exists()
    again.train()
    assert len(folder.checkpoints(tmp_path)) == again.keep == 1
    assert not left_over.exists()
    assert all(file.exists() for file in others)


def test_a_resumed_training_writes_to_the_same_folder_by_default(tmp_path):
    trainer = stopped(tmp_path / "one", 3)
    assert resumed(tmp_path / "one").checkpoint_dir == tmp_path / "one"
    assert resumed(trainer.last_checkpoint).checkpoint_dir == tmp_path / "one"
    again = resumed(tmp_path / "one", checkpoint_dir=tmp_path / "two", checkpoint_every=2, keep=9)
    again.train()
    assert len(names(tmp_path / "one")) == 2
    steps = [int(found.path.name.split("-")[3]) for found in folder.checkpoints(tmp_path / "two")]
    assert steps == [6, 8, 10, 12, 14, 16, 18, 20, 21]


def test_the_newest_checkpoint_is_the_last_written_not_the_one_of_most_steps(tmp_path):
    """Gone on from an older checkpoint on purpose: what is written then is newer than later steps
    of before."""
    make(checkpoint_dir=tmp_path, keep=9).train()
    older = folder.checkpoints(tmp_path)[0].path
    again = resumed(older, checkpoint_every=1)
    again.stop_after = 1
    again.train()
    assert resumed(tmp_path).steps_done == STEPS + 1


def test_resume_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        resumed(tmp_path)
    with pytest.raises(FileNotFoundError):
        resumed(tmp_path / "missing")


def test_a_broken_checkpoint_is_skipped(tmp_path, caplog):
    make(checkpoint_dir=tmp_path).train()
    *_, middle, last = [found.path for found in folder.checkpoints(tmp_path)]
    last.write_bytes(last.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING, "portacnn"):
        trainer = resumed(tmp_path)
    assert trainer.steps_done == 2 * STEPS
    assert "skipped a broken checkpoint" in caplog.text
    assert last.name in caplog.text
    assert f"resuming from {middle}" in caplog.text
    for found in folder.checkpoints(tmp_path):
        found.path.write_bytes(b"")
    with pytest.raises(ModelFormatError, match=last.name):
        resumed(tmp_path)


def test_invalid_numbers_are_refused(tmp_path):
    for options in ({"checkpoint_every": 0}, {"keep": 0}, {"checkpoint_every": 1.5}):
        with pytest.raises(ArgumentError, match=next(iter(options))):
            make(checkpoint_dir=tmp_path, **options)
    with pytest.raises(ArgumentError, match="there is no checkpoint_dir"):
        make().checkpoint()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot create the folder .* for checkpoints"):
        make(checkpoint_dir=tmp_path / "file")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_training_gone_wrong_writes_none(tmp_path):
    wild = {"optimizer": "sgd", "optimizer_param": {"lr": 1e30}}
    trainer = make(net=small_net, **wild, checkpoint_dir=tmp_path, checkpoint_every=1)
    with pytest.raises(NotFiniteError):
        trainer.train()
    files = folder.checkpoints(tmp_path)
    assert all(
        np.isfinite(value).all()
        for found in files
        for value in portacnn.load(found.path).state_dict().values()
    )


# --- what is in the file --------------------------------------------------------------------------


def test_the_rewriting_of_these_tests_is_right(tmp_path):
    path = stopped(tmp_path, 3).last_checkpoint
    before = path.read_bytes()
    rewrite(path, lambda header: None)
    assert resumed(path).steps_done == 3
    assert path.read_bytes()[-500:] == before[-500:]


def test_a_checkpoint_is_a_safetensors_file_that_others_can_read(tmp_path):
    from safetensors.numpy import load_file

    trainer = stopped(tmp_path, 9, early_stopping=2)
    tensors = load_file(trainer.last_checkpoint)
    assert tensors["steps.loss"].tolist() == trainer.train_loss_list
    assert tensors["history.test_accuracy"].tolist() == trainer.test_acc_list
    np.testing.assert_array_equal(
        tensors["model.fc.weight"], trainer.model.state_dict()["fc.weight"]
    )
    assert {name.split(".")[0] for name in tensors} == {
        *("model", "optimizer", "best", "history", "steps")
    }


def test_a_model_is_no_checkpoint(tmp_path):
    small_net().save(tmp_path / "net")
    with pytest.raises(ModelFormatError, match="net: it is not a checkpoint"):
        resumed(tmp_path / "net")


def test_a_disk_that_is_full_stops_training_and_no_more(tmp_path, monkeypatch):
    whole = uninterrupted()
    trainer = make(checkpoint_dir=tmp_path, checkpoint_every=4)
    good = os.replace
    calls = []

    def replace(source, target):
        calls.append(target)
        # three files are given their names at a checkpoint: this is the second one's first
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        good(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(
        CheckpointError, match=r"checkpoint of step 8 could not be written to .*No space left"
    ) as caught:
        trainer.train()
    assert caught.value.errno == 28
    assert isinstance(caught.value, OSError)
    assert "free some disk space and call train() to continue" in str(caught.value)
    assert [name.split("-")[3] for name in names(tmp_path) if name != "latest"] == ["4"]
    assert resumed(tmp_path).steps_done == 4
    trainer.train()
    assert outcome(trainer) == outcome(whole)


def test_keep_holds_in_a_training_that_is_resumed(tmp_path):
    stopped(tmp_path, 3, keep=5)
    resumed(tmp_path, checkpoint_every=1, keep=2).train()
    assert len([name for name in names(tmp_path) if name.startswith("checkpoint-")]) == 2
