"""Ranks that SIGKILL ends at random moments: the job ends, the checkpoints are whole."""

import random
import time
from pathlib import Path

import numpy as np
import pytest

from portacnn import Trainer
from portacnn.callbacks import Callback
from support.matrix import needs
from support.mpi import on_ranks

pytestmark = [needs("mpi4py"), pytest.mark.slow]
pytest.importorskip("safetensors")
PROGRAM = Path(__file__).with_name("killed_ranks.py")
STEPS = 60


class Kill(Callback):
    """That of the program, which kills nobody here."""


def losses(printed: str) -> list[float]:
    return [float(word) for word in printed.split()[1:]]


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_rank_ends_the_job_and_spoils_no_checkpoint(tmp_path: Path, seed: int):
    """Five jobs in a row, each of which resumes the one before, on two or three ranks."""
    draw, begun, folder = random.Random(seed), 0, tmp_path / "checkpoints"
    for _ in range(5):
        size = draw.choice([2, 3])
        step = draw.randint(begun + 1, begun + 10)
        moment = step, draw.uniform(0, 0.02)
        begin = time.monotonic()
        done = on_ranks(
            size, PROGRAM, folder, *map(str, (draw.randrange(size), *moment)), timeout=30
        )
        assert done.returncode == 9, (moment, done.stdout, done.stderr)
        assert "KILLED" in done.stdout + done.stderr or "Killed" in done.stdout + done.stderr
        assert time.monotonic() - begin < 20
        assert "Traceback" not in done.stderr
        before, begun = begun, _newest(folder)
        assert begun >= max(before, step - 1)  # the checkpoint of a step may not be finished
    done = on_ranks(2, PROGRAM, folder, "-1", "0", "0")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) == begun
    whole = on_ranks(1, PROGRAM, tmp_path / "whole", "-1", "0", "0")
    assert losses(done.stdout) == pytest.approx(losses(whole.stdout), rel=1e-9)
    assert len(losses(whole.stdout)) == STEPS


def _newest(folder: Path) -> int:
    """The steps done of the newest checkpoint, which must be intact."""
    x, t = np.random.default_rng(0).random((60, 1, 12, 12)), np.arange(60) % 10
    newest = max(folder.glob("checkpoint-*.safetensors"), key=lambda path: path.name)
    return Trainer.resume(newest, x, t, x, t, callbacks=[Kill()], verbose=False).steps_done
