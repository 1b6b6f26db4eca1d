"""What launchers say in the environment, devices by local rank, threads by host."""

import sys

import pytest

from portacnn.backends import threads as pool
from portacnn.distributed import SingleProcess, device_for, launch
from portacnn.distributed.launchers import check_size
from portacnn.distributed.threads import OTHERS, divide_threads, share_of
from portacnn.errors import BackendError
from support import fake_cupy

ENVIRONMENTS = {
    "Open MPI's mpiexec": {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"},
    "MPICH's or Intel MPI's mpiexec": {"PMI_SIZE": "4", "PMI_RANK": "2"},
    "MVAPICH's mpiexec": {"MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_RANK": "2"},
    "SLURM's srun": {"SLURM_NTASKS": "9", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"},
    "torchrun": {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "RANK": "2"},
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_launchers(name: str):
    assert launch(ENVIRONMENTS[name]) == (name, 4, 2)
    check_size(4, "MPI", ENVIRONMENTS[name])
    with pytest.raises(BackendError, match="started 4 processes, but MPI sees 1: they belong"):
        check_size(1, "MPI", ENVIRONMENTS[name])


def test_what_is_no_launcher():
    assert (
        launch({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None
    )  # a batch script, which runs once
    assert launch({"WORLD_SIZE": "4"}) is None
    check_size(1, "MPI", {})
    # mpiexec has started its helpers, one per host, by srun
    assert launch(ENVIRONMENTS["SLURM's srun"] | {"PMI_SIZE": "8", "PMI_RANK": "5"})[1:] == (8, 5)


def test_the_fix_is_that_of_the_launcher():
    for name, fix in {
        "torchrun": "mpiexec -n 4 python",
        "SLURM's srun": "srun --mpi=list",
        "MPICH's or Intel MPI's mpiexec": r"portacnn\[mpich\]",
    }.items():
        with pytest.raises(BackendError, match=fix):
            check_size(1, "MPI", ENVIRONMENTS[name])


def test_devices_of_ranks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PORTACNN_BACKEND", raising=False)
    assert [device_for(word, 1) for word in (None, "cpu", "torch", "cuda:3")] == [
        *(None, "cpu", "torch", "cuda:3")
    ]
    with fake_cupy.installed():  # two GPUs
        assert device_for("cuda", 1) == device_for("cupy", 3) == "cupy:cuda:1"
        assert device_for("auto", 0) == "cupy:cuda:0"
        monkeypatch.setenv("PORTACNN_BACKEND", "cupy")
        assert device_for(None, 1) == "cupy:cuda:1"


@pytest.mark.parametrize(
    ("cores", "ranks", "threads"),
    [
        ([0, 1, 2, 3], [[0, 1, 2, 3]] * 2, 2),
        ([0, 1, 2, 3], [[0, 1, 2, 3]] * 3, 1),
        ([0, 1], [[0, 1]] * 4, 1),
        ([2, 3], [[0, 1], [2, 3]], 2),  # bound to cores of their own
        ([0, 1, 2, 3], [[0, 1, 2, 3]], 4),
    ],
)
def test_cores_are_shared(cores: list[int], ranks: list[list[int]], threads: int):
    assert share_of(cores, ranks) == threads


class Pair(SingleProcess):
    """Two ranks on this host, with the same cores."""

    size = local_size = 2

    def gather(self, value):
        return [value, value]


@pytest.mark.parametrize(
    ("given", "own", "others"),
    [
        ({}, "4", "4"),
        ({"PORTACNN_NUM_THREADS": "3"}, "3", "3"),
        ({"OMP_NUM_THREADS": "1"}, "1", None),
        ({"MKL_NUM_THREADS": "2", "PORTACNN_NUM_THREADS": "3"}, "3", None),
    ],
)
def test_threads_of_ranks(monkeypatch: pytest.MonkeyPatch, given: dict, own: str, others: str):
    """On a host with 8 cores."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("threadpoolctl.threadpool_limits", limits := [].append)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(pool, "granted", lambda _: None)
    monkeypatch.setattr("os.environ", environment := dict(given))
    pool.thread_count.cache_clear()
    try:
        divide_threads(Pair(), environment)
        assert pool.thread_count() == int(own)
    finally:
        pool.thread_count.cache_clear()
    assert environment["PORTACNN_NUM_THREADS"] == own
    for name in OTHERS:
        assert environment.get(name) == (given.get(name) if others is None else others)
    assert limits.__self__ == ([] if others is None else [int(others)])
