"""scripts/train.py stopped by a signal, and resumed."""

import re
import shlex
import signal
import subprocess
import sys

import pytest

from support.digits import ROOT, write_digits
from support.processes import without_settings
from support.train_script import one_line


@pytest.fixture
def begin(train, digits):
    """The script as a running process, to be sent signals. It is in its first epoch when this
    returns."""

    def run(*arguments):
        environment = without_settings()
        command = [
            sys.executable,
            ROOT / "scripts" / "train.py",
            "--data",
            digits,
            "--batch-size",
            "4",
            *arguments,
        ]
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=train.here,
            env={
                **environment,
                "OMP_NUM_THREADS": "1",
                "PORTACNN_KERNELS": "native",
                "PYTHONUNBUFFERED": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        seen = []
        for line in process.stdout:
            seen.append(line)
            if line.startswith("epoch 2"):  # by now the handlers stand
                return process
        pytest.fail(f"it ended: {seen}")

    return run


@pytest.mark.parametrize(
    ("number", "status", "where"),
    [(signal.SIGTERM, 143, []), (signal.SIGINT, 130, ["--checkpoint-dir", "ck"])],
    ids=["SIGTERM", "SIGINT, a folder for checkpoints"],
)
def test_a_signal_ends_in_good_order_and_resumes_to_the_same_end(
    train, inside, begin, number, status, where
):
    """It says where it was saved, and ends as one that nobody stopped."""
    long = ["--epochs", "2000", "--out", "out", "--seed", "3"]
    with begin(*long, *where) as process:
        process.send_signal(number)
        printed = process.stdout.read()
    assert process.returncode == status
    step = int(re.search(r"^stopped  after step (\d+) \(epoch \d+\)$", printed, re.M)[1])
    saved = re.search(r"^saved    (.*)$", printed, re.M)[1]
    go_on = re.search(r"^resume   (.*)$", printed, re.M)[1]
    assert re.fullmatch(rf"--resume {re.escape(saved)} --out out --data \S+", go_on)
    assert (train.here / saved).parent == train.here / (where[1] if where else "out/checkpoints")
    assert f"-step-{step}-" in saved
    epochs = str(step // 10 + 2)  # 40 images by 4
    bare = {"seed": None, "without": ("--batch-size",), "PORTACNN_KERNELS": "native"}
    run = inside if where else train  # bits are those of the same kind of process
    again = run(*shlex.split(go_on), "--epochs", epochs, **bare)
    assert again.returncode == 0, again.stderr
    assert re.search(rf"49,890 parameters, {step:,} steps done, seed 3$", again.stdout, re.M)
    if where:
        return
    numpy = {"PORTACNN_KERNELS": "native"}
    whole = train("--out", "whole", "--epochs", epochs, "--batch-size", "4", seed="3", **numpy)
    assert whole.returncode == 0, whole.stderr
    for name in ("accuracy.csv", "params.safetensors"):
        assert (train.here / "out" / name).read_bytes() == (
            train.here / "whole" / name
        ).read_bytes()


def test_resume_without_a_path_takes_the_newest_and_keeps_as_many_as_told(train, inside):
    assert inside("--out", "out", "--checkpoint-every", "1").returncode == 0
    files = list((train.here / "out" / "checkpoints").glob("checkpoint-*"))
    assert len(files) == 2
    words = ("--out", "out", "--epochs", "2", "--resume", "--keep", "1")
    again = inside(*words, seed=None, without=("--batch-size",))
    assert again.returncode == 0, again.stderr
    assert re.search(r"^trained  1 epochs", again.stdout, re.M)
    (file,) = (train.here / "out" / "checkpoints").glob("checkpoint-*")
    assert "-step-4-" in file.name


def test_resume_from_what_is_no_checkpoint_of_these_data(train, inside, tmp_path):
    bare = {"seed": None, "without": ("--batch-size",)}
    one_line(
        inside("--resume", **bare),
        "no checkpoint to resume from",
        "runs",
        "checkpoints",
        "--resume PATH",
    )
    (train.here / "file").write_text("no checkpoint")
    one_line(inside("--resume", "file", **bare), "file is not an intact safetensors file")
    one_line(
        inside("--resume", "file", "--lr", "0.1", **bare),
        "--resume takes --lr from the checkpoint; omit it",
    )
    one_line(
        inside("--resume", "file", blocked=("safetensors",), **bare), "checkpoints need safetensors"
    )
    assert inside("--out", "out", "--checkpoint-dir", "ck").returncode == 0
    other = write_digits(tmp_path / "other", train=41)
    one_line(
        inside("--resume", "ck", data=other, **bare),
        "the data differ from those of",
        "expected x_train of shape [40, 1, 12, 12], got [41",
    )
