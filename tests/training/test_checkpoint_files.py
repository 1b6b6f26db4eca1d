"""Checkpoints and what happens to files: a process killed at any moment, a full disk, damage, files
made to harm."""

import contextlib
import json
import os
import random
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from portacnn import Trainer
from portacnn.errors import ArgumentError, CheckpointError, ModelFormatError
from portacnn.files import write_atomically
from portacnn.ops import use_kernels
from portacnn.training import folder
from support.nets import bits
from support.trainings import (
    Watched,
    data,
    make,
    names,
    outcome,
    resumed,
    rewrite,
    stopped,
    uninterrupted,
)
from support.trees import plain_json, replaced

ROOT = Path(__file__).resolve().parents[2]
fuzz = settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


# --- kill -9 --------------------------------------------------------------------------------------

RUN = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from support.trainings import make
from portacnn import Trainer
trainer = make(kind=Trainer, checkpoint_dir=sys.argv[1], checkpoint_every=1, keep=2, epochs=6,
    early_stopping=9)
step = trainer.step

def told(*arguments):
    print("step", flush=True)  # the checkpoint of the step before has been written
    return step(*arguments)

trainer.step = told
trainer.train()
"""


@pytest.fixture
def start(monkeypatch):
    """Begin a training in a process of its own: one checkpoint a step, most of its time goes into
    writing them.

    There and here with the same kernels, as bits are compared.
    """
    monkeypatch.setenv("PORTACNN_KERNELS", "native")
    monkeypatch.setenv("PORTACNN_NUM_THREADS", "1")
    script = RUN.format(root=str(ROOT), tests=str(ROOT / "tests"))

    def run(path):
        return subprocess.Popen(
            [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
        )

    with use_kernels("native"):
        yield run


@pytest.mark.parametrize("times", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_moment(tmp_path, start, times):
    with start(tmp_path / "whole") as process:
        assert process.stdout.readline() == "step\n"
        began = time.perf_counter()
        count = 1 + len(process.stdout.readlines())
        a_step = (time.perf_counter() - began) / count
    whole = make(epochs=6, early_stopping=9)
    whole.train()
    assert outcome(resumed(tmp_path / "whole")) == outcome(whole)  # it is the same in this process
    draws, steps = random.Random(0), []
    for number in range(times):
        path = tmp_path / str(number)
        with start(path) as process:
            for _ in range(draws.randint(1, count)):
                assert process.stdout.readline() == "step\n"
            time.sleep(draws.uniform(0, a_step))
            process.kill()
        latest = path / folder.LATEST
        if latest.exists():
            assert (path / latest.read_text().strip()).is_file()
        found = folder.checkpoints(path)
        if not found:
            assert not latest.exists()
            continue
        # any that is broken would be warned of, but there is none:
        again = resumed(path, verbose=False)
        assert again.steps_done == int(found[-1].path.name.split("-")[3])
        steps.append(again.steps_done)
        again.train()
        assert outcome(again) == outcome(whole)
        assert not [name for name in names(path) if name.endswith(".tmp")]
    assert len(set(steps)) > times // 4, steps


# --- a full disk ----------------------------------------------------------------------------------


@contextlib.contextmanager
def files_of_at_most(size):
    """The system writes no more than so many bytes to a file, as it does on a disk that fills up on
    the way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_at_any_byte(tmp_path):
    trainer = stopped(tmp_path, 3)
    size = trainer.last_checkpoint.stat().st_size
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for room in (0, 1, 7, 8, 9, 100, size // 3, size // 2, size - 1):
        with files_of_at_most(room), pytest.raises(CheckpointError, match="could not be written"):
            trainer.checkpoint()
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert resumed(tmp_path).steps_done == 3
    whole = uninterrupted()
    trainer.train()
    assert outcome(trainer) == outcome(whole)


def test_a_small_disk(tmp_path):
    """The real thing: a file system of 256 KiB, which its owner's other files fill."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    try:
        trainer = make(checkpoint_dir=disk, checkpoint_every=1, keep=2)
        trainer.stop_after = 4
        trainer.train()
        kept = {found.path: found.path.read_bytes() for found in folder.checkpoints(disk)}
        with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(1024))
        with pytest.raises(
            CheckpointError,
            match=r"step 5 could not be written .*No space "
            r"left",
        ) as caught:
            trainer.train()
        assert caught.value.errno == 28
        assert {found.path: found.path.read_bytes() for found in folder.checkpoints(disk)} == kept
        assert not [name for name in names(disk) if name.endswith(".tmp")]
        assert resumed(disk).steps_done == 4
        (disk / "filler").unlink()
        trainer.train()
        whole = uninterrupted()
        assert outcome(trainer) == outcome(whole)
        assert outcome(resumed(disk)) == outcome(whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_folder_is_flushed_too(tmp_path, monkeypatch):
    """The file's bytes first, then its name, then the folder that holds the name."""
    events = []
    fsync, replace = os.fsync, os.replace

    def flushed(handle):
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("name"), replace(*paths)))
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc to see with what is flushed")
    write_atomically(tmp_path / "file", [b"ab", memoryview(b"cd")])
    assert events == ["file", "name", "folder"]
    assert (tmp_path / "file").read_bytes() == b"abcd"


# --- damage ---------------------------------------------------------------------------------------


class Content(bytes):
    """Bytes that are not printed where a test fails."""

    def __repr__(self):
        return f"<{len(self)} bytes>"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint with everything in it."""
    trainer = stopped(
        tmp_path_factory.mktemp("good"),
        9,
        early_stopping=4,
        schedule="warmup_cosine",
        optimizer="adamw",
        clip_norm=1.0,
    )
    return Content(trainer.last_checkpoint.read_bytes())


def only_format_errors(path):
    """A file gives a Trainer or a ModelFormatError, or it says plausibly that it is of other
    data."""
    try:
        assert isinstance(resumed(path, device="numpy", verbose=False), Trainer)
    except ModelFormatError:
        pass
    except ArgumentError as error:
        assert "the data differ from those of" in str(error)  # noqa: PT017


def refused(path, content):
    path.write_bytes(content)
    with pytest.raises(ModelFormatError):
        resumed(path, device="numpy")


def test_cut_short_anywhere(good, tmp_path):
    (header,) = struct.unpack("<Q", good[:8])
    cuts = {*range(40), *range(0, len(good), 211), *range(header, header + 16), len(good) - 1}
    for cut in sorted(cuts):
        refused(tmp_path / "cut", good[:cut])
    refused(tmp_path / "cut", good + b"\0")


def test_a_flipped_bit_is_found_wherever_it_is(good, tmp_path):
    """In the length, the header, its checksum, and in every array."""
    (header,) = struct.unpack("<Q", good[:8])
    digits = good.index(b"checksum")
    places = {*range(8), *range(8, header, 61), *range(digits, digits + 24)}
    places |= {*range(8 + header, len(good), 41), len(good) - 1}
    for number, place in enumerate(sorted(places)):
        spoilt = bytearray(good)
        spoilt[place] ^= 1 << number % 8
        refused(tmp_path / "flipped", bytes(spoilt))


def test_one_without_a_checksum_is_refused(good, tmp_path):
    """It may be a checkpoint that something else has written anew, or a damaged one."""
    (length,) = struct.unpack("<Q", good[:8])
    header = json.loads(good[8 : 8 + length])
    own = json.loads(header["__metadata__"]["portacnn"])
    del own["checksum"]
    header["__metadata__"]["portacnn"] = json.dumps(own)
    text = json.dumps(header).encode()
    path = tmp_path / "bare"
    path.write_bytes(struct.pack("<Q", len(text)) + text + good[8 + length :])
    with pytest.raises(ModelFormatError, match="it has no checksum"):
        resumed(path, device="numpy")


@pytest.mark.slow
def test_every_flipped_bit_of_the_header_is_found(good, tmp_path):
    for place in range(8 + struct.unpack("<Q", good[:8])[0]):
        spoilt = bytearray(good)
        spoilt[place] ^= 1 << place % 8
        refused(tmp_path / "flipped", bytes(spoilt))


@fuzz
@given(junk=st.binary(max_size=300))
def test_random_bytes(tmp_path, junk):
    refused(tmp_path / "junk", junk)
    refused(tmp_path / "junk", struct.pack("<Q", len(junk)) + junk)


# --- files made to harm: with the checksum that belongs to them -----------------------------------

ABSURD = st.sampled_from(
    [
        -1,
        0,
        2**31,
        10**30,
        -(10**30),
        1e308,
        float("nan"),
        float("inf"),
        "",
        "../x",
        [],
        {},
        None,
        True,
    ]
)


@fuzz
@given(data=st.data())
def test_a_header_with_a_part_exchanged(good, tmp_path, data):
    path = tmp_path / "made"
    path.write_bytes(good)

    def change(header):
        _, count = replaced(header, -1, None)
        place, new = data.draw(st.integers(0, count - 1)), data.draw(ABSURD | plain_json)
        return replaced(header, place, new)[0]

    rewrite(path, change)
    only_format_errors(path)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("position", "epoch"), 10**9),
        (("position", "epoch"), -1),
        (("position", "batch"), 7),
        (("position", "batch"), 1.5),
        (("options", "batch_size"), 10**12),
        (("options", "accumulate"), 10**12),
        (("options", "epochs"), 0.5),
        (("options", "epochs"), "many"),
        (("options", "seed"), "x"),
        (("options", "keep"), 0),
        (("options", "schedule_unit"), "week"),
        (("loss", "arguments", "label_smoothing"), 2),
        (("loss", "class"), "os.system"),
        (("loss",), None),
        (("metrics",), {"accuracy": {"class": "Path", "arguments": {}}}),
        (("metrics",), {"x" * 1000: {"class": "Accuracy", "arguments": {}}}),
        (("options", "validation_split"), 7),
        (("optimizer", "class"), "Model"),
        (("optimizer", "class"), "os.system"),
        (("optimizer", "arguments"), {"lr": float("nan")}),
        (("optimizer", "arguments"), {"command": "rm"}),
        (("optimizer", "no_decay"), {"paths": 3}),
        (("optimizer", "state", "steps"), -4),
        (("optimizer", "state", "counts"), {"fc.weight": 10**30, "nobody": 1}),
        (
            ("schedule",),
            {"class": "SequentialLR", "arguments": {"schedules": [], "milestones": []}},
        ),
        (("schedule",), {"class": "ExponentialLR", "arguments": {"gamma": 1e300}}),
        (("schedule",), {"class": "StepLR", "arguments": {"step_size": 1, "gamma": 3}}),
        (("schedule",), {"class": "ExponentialLR", "arguments": {"gamma": 10**400}}),
        (("schedule",), {"class": "ExponentialLR", "arguments": {"gamma": True}}),
        (("schedule",), {"class": "OneCycleLR", "arguments": {"total_steps": 10**30}}),
        (
            ("schedule",),
            {"class": "OneCycleLR", "arguments": {"total_steps": 10**12, "three_phase": "yes"}},
        ),
        (
            ("schedule",),
            {"class": "PerEpoch", "arguments": {"schedule": "cosine", "steps_per_epoch": 1}},
        ),
        (("schedule",), {"class": "MultiStepLR", "arguments": {"milestones": 5}}),
        (("optimizer", "arguments", "eps"), 10**400),
        (("optimizer", "state", "lr"), 10**400),
        (("optimizer", "state", "steps"), 8),
        (("options", "clip_norm"), 10**400),
        (("options", "epochs"), 10**30),
        (("early_stopping", "restore_best"), "no"),
        (("schedule", "class"), "Thread"),
        (("early_stopping",), {"patience": 0}),
        (("early_stopping",), {"monitor": "nothing"}),
        (("run",), "../../etc"),
        (("run",), None),
        (("place",), 7),
        (("place",), "../numpy"),
        (("model_seed",), "x"),
        (("model", "input_shape"), [1, 10**6, 10**6]),
        (("data",), {}),
        (("checkpoint",), 2),
        (("checkpoint",), 4),
        (("checkpoint",), None),
        (("best",), None),
    ],
)
def test_invalid_values_in_the_header_are_refused(good, tmp_path, keys, value):
    path = tmp_path / "made"
    path.write_bytes(good)

    def change(header):
        inner = header
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        if keys == ("schedule",):
            header["options"]["epochs"] = 10**9  # the powers of a whole number would never end

    rewrite(path, change)
    if keys == ("best",):  # the arrays tell
        assert resumed(path)._best_weights
        return
    with pytest.raises(ModelFormatError, match="made"):
        Watched.resume(path, *data())


@pytest.mark.parametrize(
    "loss",
    [
        {"class": "CrossEntropy", "arguments": {"weight": 2**31}},
        {"class": "BCEWithLogits", "arguments": {"pos_weight": [1, 2]}},
        {"class": "BCEWithLogits", "arguments": {}},
    ],
)
def test_a_loss_that_does_not_fit_the_data(good, tmp_path, loss):
    path = tmp_path / "made"
    path.write_bytes(good)
    rewrite(path, lambda header: header.update(loss=loss))
    with pytest.raises(ArgumentError, match=r"the data differ from those of .*made"):
        Watched.resume(path, *data())


def test_deep_nesting(good, tmp_path):
    path = tmp_path / "made"
    path.write_bytes(good)
    deep = {"class": "ConstantLR", "arguments": {}}
    for _ in range(200):
        deep = {"class": "PerEpoch", "arguments": {"schedule": deep, "steps_per_epoch": 1}}
    rewrite(path, lambda header: header.update(schedule=deep))
    only_format_errors(path)


@fuzz
@given(data=st.data())
def test_arrays_with_a_part_exchanged(good, tmp_path, data):
    """The layout of the arrays: other names, dtypes, shapes, offsets."""
    (length,) = struct.unpack("<Q", good[:8])
    outer, tensors = json.loads(good[8 : 8 + length]), good[8 + length :]
    name = data.draw(st.sampled_from(sorted(set(outer) - {"__metadata__"})))
    entry = outer.pop(name)
    part = data.draw(st.sampled_from(["name", *entry]))
    if part == "name":
        name = data.draw(
            st.sampled_from(["model.x", "best.", "history.", "", "optimizer.a.b", "nothing"])
        )
    elif part == "dtype":
        entry["dtype"] = data.draw(
            st.sampled_from(["F64", "I64", "I32", "U32", "C64", "BF16", "BOOL", "F8_E4M3", ""])
        )
    else:
        entry[part] = data.draw(st.lists(st.sampled_from([0, 1, 3, 2**31, 2**63 - 1]), max_size=3))
    outer[name] = entry
    text = json.dumps(outer).encode()
    (tmp_path / "made").write_bytes(struct.pack("<Q", len(text)) + text + tensors)
    with contextlib.suppress(ValueError):  # this test's own reading of nonsense
        rewrite(tmp_path / "made", lambda header: None)
    only_format_errors(tmp_path / "made")


def test_the_model_is_whole_after_all_that(good, tmp_path):
    """That the file the others start from is a good one."""
    (tmp_path / "good").write_bytes(good)
    trainer = resumed(tmp_path / "good")
    assert trainer.steps_done == 9
    assert all(
        np.isfinite(np.frombuffer(raw, dtype)).all()
        for dtype, _, raw in bits(trainer.model).values()
    )
