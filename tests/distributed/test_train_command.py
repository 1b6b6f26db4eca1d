"""``portacnn train --distributed`` on several ranks."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support.matrix import needs
from support.mpi import command, environment, mpiexec, on_ranks, stop

pytestmark = [needs("mpi4py"), pytest.mark.slow]
pytest.importorskip("safetensors")
TRAIN = ("-m", "portacnn", "train", "--distributed")
SMALL = ("--seed", "3", "--batch-size", "24", "--metrics", "accuracy")
STEPS = 10  # of an epoch


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file of 240 images, of which no two ranks have the same."""
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (300, 1, 28, 28), dtype="uint8")
    labels = np.arange(300) % 10
    images[np.arange(300), 0, labels] //= 4
    names = ("x_train", "x_test", "t_train", "t_test")
    parts = (images[:240], images[240:], labels[:240], labels[240:])
    np.savez(tmp_path / "data.npz", **dict(zip(names, parts, strict=True)))
    return tmp_path / "data.npz"


def figures(folder: Path) -> dict:
    return json.loads((folder / "history.json").read_text())


def test_the_first_rank_speaks_and_writes(tmp_path: Path, data: Path):
    found = {}
    for size in (1, 2):
        out = tmp_path / str(size)
        done = on_ranks(size, *TRAIN, *SMALL, "--data", data, "--epochs", "1", "--out", out)
        assert (done.returncode, done.stderr) == (0, "")
        said = re.sub(r"\d+\.\d s|\S*/\d/", "", done.stdout)
        assert said.count("backend  ") == said.count("epoch 1: ") == said.count("weights  ") == 1
        found[size] = figures(out)["step_losses"], said
    (one, words), (two, same_words) = found.values()
    assert two == pytest.approx(one, rel=1e-4)
    assert "backend  numpy on cpu\n" in words
    assert same_words.replace(", 2 ranks by mpi", "", 1) == words
    assert "backend  numpy on cpu, 2 ranks by mpi\n" in same_words


def test_sigterm_writes_one_checkpoint_which_another_number_of_ranks_resumes(
    tmp_path: Path, data: Path
):
    """As a scheduler does at a job's time limit: to the processes, here to one of them."""
    out = tmp_path / "run"
    more = ("--data", data, "--augment", "random_crop=2", "--out")
    with subprocess.Popen(
        command(2, *TRAIN, *SMALL, *more, out, "--epochs", "200"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as job:
        try:
            for line in job.stdout:
                if line.startswith("epoch 3:"):
                    break
            ranks = subprocess.run(
                ["pgrep", "-f", str(out)], capture_output=True, text=True
            ).stdout.split()
            os.kill(max(int(number) for number in ranks), signal.SIGTERM)
            said, error = job.communicate(timeout=20)
        finally:
            stop(job)
    assert (job.returncode, error) == (143, ""), said
    (file,) = (out / "checkpoints").glob("*.safetensors")
    assert f"saved    {file}" in said
    assert "--distributed auto" in said
    steps = int(re.search(r"stopped  after step (\d+)", said)[1])
    again = ("--resume", out / "checkpoints", "--data", data, "--out", tmp_path / "again")
    last = str(steps // STEPS + 2)
    done = on_ranks(3, *TRAIN, *again, "--epochs", last)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{steps} steps done" in done.stdout
    losses = figures(tmp_path / "again")["step_losses"]
    whole = on_ranks(1, *TRAIN, *SMALL, *more, tmp_path / "w", "--epochs", last)
    assert whole.returncode == 0
    assert losses == pytest.approx(figures(tmp_path / "w")["step_losses"], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message", "status"),
    [
        (["--epochs", "-3"], "error: --epochs must be a whole number of at least 0, got -3\n", 2),
        (["--data", "nowhere"], "error: there is no file or folder nowhere; ", 1),
    ],
)
def test_an_error_of_all_ranks_is_printed_once(
    tmp_path: Path, options: list[str], message: str, status: int
):
    done = on_ranks(2, *TRAIN, *options, "--out", tmp_path)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_ranks_with_other_options(tmp_path: Path):
    one, other = ([sys.executable, *TRAIN, "--epochs", n, "--out", tmp_path] for n in "12")
    done = subprocess.run(
        [mpiexec(), "-n", "1", *one, ":", "-n", "1", *other],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    wanted = "error: the ranks of a job must train the same: epochs is 1 on rank 0, 2 on rank 1\n"
    assert (done.returncode, done.stderr) == (2, wanted)


def test_ranks_that_do_not_know_of_each_other_are_told(tmp_path: Path):
    done = on_ranks(2, "-m", "portacnn", "train", "--epochs", "0", "--out", tmp_path / "o")
    assert done.returncode == 0
    assert "mpiexec has started 2 processes, and each trains alone into the same" in done.stderr
    alone = on_ranks(1, *TRAIN, "--out", tmp_path, OMPI_COMM_WORLD_SIZE="4")
    assert alone.returncode == 2
    assert "Open MPI's mpiexec started 4 processes, but mpi4py (MPICH" in alone.stderr


@pytest.mark.parametrize(
    ("blocked", "message"),
    [
        ("out", "error: cannot create the folder {out} for the results: it is a file; choose"),
        ("out/history.json/file", "error: {out}/history.json: "),
        ("out/checkpoints/latest/file", "error: the checkpoint of step "),
    ],
)
def test_a_file_that_the_first_rank_cannot_write_is_an_ordinary_error(
    tmp_path: Path, data: Path, blocked: str, message: str
):
    """Other ranks do not see the error themselves."""
    file, out = tmp_path / blocked, tmp_path / "out"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    more = ["--data", data, "--epochs", "1", "--out", out]
    if "latest" in blocked:
        more += ["--checkpoint-every", "5"]
    done = on_ranks(2, *TRAIN, *SMALL, *more)
    assert done.returncode == 1
    assert done.stderr.startswith(message.format(out=out))
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--device=array_api_strict:nowhere", "nowhere"),
        ("--resume=nowhere", "FileNotFoundError: no checkpoint to resume from: nowhere does not"),
    ],
)
def test_what_one_rank_lacks_ends_the_job(tmp_path: Path, option: str, message: str):
    """As on a host without a GPU, or one that does not share the folder of checkpoints."""
    one = [sys.executable, *TRAIN, "--epochs", "1", "--out", tmp_path]
    with subprocess.Popen(
        [mpiexec(), "-n", "1", *one, ":", "-n", "1", *one, option],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        try:
            said, _ = job.communicate(timeout=20)
        finally:
            stop(job)
    assert job.returncode == 1
    assert "rank 1 of 2 on " in said
    assert message in said
