"""Programs that tests run on several ranks, by mpiexec."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.processes import without_settings

ROOT = Path(__file__).resolve().parents[2]


def mpiexec() -> str | None:
    """The mpiexec of this environment, or else one on the path."""
    beside = Path(sys.executable).with_name("mpiexec")
    return str(beside) if beside.exists() else shutil.which("mpiexec")


def environment(**variables: str) -> dict[str, str]:
    """One thread per rank, this checkout, and the MPI library that belongs to mpiexec."""
    own = without_settings()
    own |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    library = Path(mpiexec() or "").resolve().parents[1] / "lib" / "libmpi.so.12"
    return own | ({"MPI4PY_LIBMPI": str(library)} if library.exists() else {}) | variables


def command(size: int, *arguments: str | Path) -> list[str]:
    """The command line of a Python program on ``size`` ranks."""
    return [str(mpiexec()), "-n", str(size), sys.executable, *map(str, arguments)]


def on_ranks(
    size: int, *arguments: str | Path, timeout: float = 60, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Run a Python program on ``size`` ranks. One that takes longer than ``timeout`` seconds
    fails the test, and no rank is left behind."""
    with subprocess.Popen(
        command(size, *arguments),
        env=environment(**variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as job:
        try:
            out, error = job.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            stop(job)
            out, error = job.communicate()
            raise AssertionError(f"no end within {timeout} s:\n{out}\n{error}") from None
    return subprocess.CompletedProcess(job.args, job.returncode, out, error)


def stop(job: "subprocess.Popen[Any]") -> None:
    """End mpiexec and, by it, its ranks."""
    job.terminate()  # twice: the first is handed on to the ranks, which may handle it
    try:
        job.wait(1)
    except subprocess.TimeoutExpired:
        job.terminate()
        try:
            job.wait(5)
        except subprocess.TimeoutExpired:
            job.kill()
