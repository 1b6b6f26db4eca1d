"""Ranks that fail take the job down, in seconds and with their own message."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from portacnn import distributed
from portacnn.distributed import SingleProcess
from portacnn.distributed.faults import GRACE
from portacnn.errors import ArgumentError
from support.matrix import needs
from support.mpi import command, environment, on_ranks, stop

HERE = Path(__file__).parent
PROGRAM = HERE / "faulty_ranks.py"


class Ranks(SingleProcess):
    """Ranks of which this one is the last; ``told``: what the others gather."""

    def __init__(self, *told: dict) -> None:
        self.told, self.size, self.rank = told, len(told) + 1, len(told)
        self.aborted: list[int] = []

    def gather(self, value):
        return [*self.told, value]

    def meets(self, seconds):
        return not self.told

    def abort(self, code=1):
        self.aborted.append(code)


def test_agreement():
    distributed.agree(Ranks({"a": 1}, {"a": 1}), {"a": 1})
    for theirs, message in {
        (("a", 1), ("b", 2)): "b is 2 on rank 0, 3 on rank 1",
        (("a", 1),): "b is missing on rank 0, 3 on rank 1",
        (("a", 1), ("b", 3), ("c", None)): "c is None on rank 0, missing on rank 1",
    }.items():
        with pytest.raises(ArgumentError, match=f"must train the same: {message}$"):
            distributed.agree(Ranks(dict(theirs)), {"a": 1, "b": 3})


def test_an_error_of_one_rank_aborts_and_is_printed_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("portacnn.distributed.faults.sleep", lambda _: None)
    for ranks, aborted in ((Ranks({}), [1]), (Ranks(), [])):
        with pytest.raises(KeyError), distributed.taking_down(ranks):
            raise KeyError("a name")
        assert ranks.aborted == aborted
    told = capsys.readouterr().err
    assert re.match(r"rank 1 of 2 on .+ failed and ends the job:\nTraceback", told)
    assert told.endswith("KeyError: 'a name'\n")


@needs("mpi4py")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "message", "status"),
    [
        ("one raises", "rank 1 of 3 on .* failed and ends the job:\nTraceback.*\n"
         "ValueError: broken on one rank\n", 1),
        ("one raises in training", "rank 1 of 3 .*ValueError: broken in a callback\n", 1),
        ("nobody handles", "rank 1 of 3 .*ValueError: broken in the user's code\n", 1),
        ("exits", "rank 1 of 3 .*SystemExit: 3\n", 1),
        ("killed", "KILLED|Killed", 9),
        ("disagree", "^Traceback.*batch_size is 100 on rank 0, 101 on rank 2\n$", 1),
    ],
)  # fmt: skip
def test_a_failure_ends_the_job(what: str, message: str, status: int):
    done = on_ranks(3, PROGRAM, what, timeout=GRACE + 20)  # with the start of Python
    assert re.search(message, done.stdout + done.stderr, re.DOTALL), done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("Traceback") <= 1
    assert done.returncode == status


@needs("mpi4py")
@pytest.mark.slow
def test_an_error_of_all_ranks_can_be_handled():
    done = on_ranks(3, PROGRAM, "all raise", timeout=20)
    assert (done.returncode, done.stdout.count("handled"), done.stderr) == (0, 3, "")


@needs("mpi4py")
@pytest.mark.slow
@pytest.mark.parametrize("to", ["job", "rank"])
def test_all_ranks_hear_of_sigterm_in_the_same_step(to: str):
    with subprocess.Popen(
        command(3, PROGRAM, "term"), env=environment(), stdout=subprocess.PIPE, text=True
    ) as job:
        try:
            ready = ""
            while len(ids := re.findall(r"\d+", ready)) < 3:  # lines of ranks may mix
                ready += job.stdout.readline()
            if to == "job":
                job.send_signal(signal.SIGTERM)
            else:
                os.kill(int(ids[1]), signal.SIGTERM)
            out, _ = job.communicate(timeout=20)
        finally:
            stop(job)
    assert out.count("stopped together") == 3
