"""Communicators: MPI on several ranks, NCCL on stand-ins, a single process."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from portacnn import distributed
from portacnn.distributed import SingleProcess
from portacnn.distributed.compression import decode, encode
from portacnn.distributed.mpi import MpiCommunicator, cuda_aware
from portacnn.distributed.nccl import NcclCommunicator
from portacnn.errors import ArgumentError, BackendError, DependencyError
from portacnn.runtime import BackendInfo, resolve
from support import fake_cupy, nccl_stub
from support.gpu_rig import ranks, tools
from support.matrix import needs
from support.mpi import on_ranks

HERE = Path(__file__).parent


@needs("mpi4py")
@pytest.mark.parametrize(
    ("size", "backends"),
    [
        (2, ["numpy", "array_api_strict", "array_api_strict:device1"]),
        pytest.param(2, ["torch"], marks=[needs("torch"), pytest.mark.slow]),
        pytest.param(2, ["jax"], marks=[needs("jax"), pytest.mark.slow]),
        *(pytest.param(n, ["numpy"], marks=pytest.mark.slow) for n in (1, 3, 4)),
    ],
)
def test_mpi(size: int, backends: list[str]):
    done = on_ranks(size, HERE / "mpi_on_ranks.py", str(size), *backends)
    assert (done.stdout, done.returncode) == ("passed\n", 0), done.stderr


@needs("mpi4py")
@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_nccl_on_stand_ins(size: int):
    done = on_ranks(size, HERE / "nccl_on_ranks.py")
    assert (done.stdout.count("passed"), done.returncode) == (size, 0), done.stderr


def test_a_single_process():
    ours = distributed.connect("auto")
    assert isinstance(ours, SingleProcess)
    assert distributed.connect(None).name == "single"
    assert distributed.connect(ours) is ours
    array = np.arange(3.0)
    ours.all_reduce(array)
    ours.start_all_reduce(array, compress="bfloat16").wait()
    ours.broadcast(array)
    ours.barrier()
    assert array.tolist() == [0, 1, 2]
    assert (ours.rank, ours.size, ours.local_rank, ours.local_size) == (0, 1, 0, 1)
    assert ours.gather((1, "a")) == [[1, "a"]] == [ours.share((1, "a"))]
    assert ours.any_rank(True)
    assert not ours.any_rank(False)
    assert ours.meets(0)


def test_arguments():
    with pytest.raises(ArgumentError, match="distributed must be one of auto, mpi, nccl, None"):
        distributed.connect("gloo")
    ours = distributed.connect(None)
    with pytest.raises(ArgumentError, match="compress must be 'bfloat16', 'float16' or None; got"):
        ours.all_reduce(np.ones(3), compress="int8")
    for array, op in ((np.ones(3), "max"), (np.ones(3, int), "sum")):
        with pytest.raises(ArgumentError, match=r"is for sums of floats; got (max|sum) of "):
            ours.all_reduce(array, op, compress="float16")


@pytest.mark.parametrize(
    ("kinds", "variable", "aware"),
    [
        *((None, None, False), ("mpi,system", "0", False)),
        *(("mpi,cuda:device", None, True), (None, "1", True)),
    ],
)
def test_mpi_that_says_that_it_takes_cuda(
    monkeypatch: pytest.MonkeyPatch, kinds: str | None, variable: str | None, aware: bool
):
    """By MPI 4.1's info key, or by Cray's variable."""
    name = "MPICH_GPU_SUPPORT_ENABLED"
    monkeypatch.setenv(name, variable) if variable else monkeypatch.delenv(name, raising=False)
    info = SimpleNamespace(Get={"mpi_memory_alloc_kinds": kinds}.get, Free=lambda: None)
    world = SimpleNamespace(Get_info=lambda: info)
    assert cuda_aware.__wrapped__(SimpleNamespace(COMM_WORLD=world)) is aware


def test_engines_that_are_not_there(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(BackendError, match=r"CUDA device for each rank; got numpy on cpu"):
        NcclCommunicator(resolve("numpy"), SingleProcess())
    with fake_cupy.installed():
        nccl_stub.install(available=False)
        with pytest.raises(DependencyError, match="CuPy finds no NCCL: pip install nvidia-nccl"):
            NcclCommunicator(resolve("cupy"), SingleProcess())
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(DependencyError, match=r"does not load: .*; pip install .portacnn\[mpi\]"):
        MpiCommunicator()
    broken = ModuleType("mpi4py")
    broken.__getattr__ = no_library
    monkeypatch.setitem(sys.modules, "mpi4py", broken)
    with pytest.raises(DependencyError, match="installed, but cannot load MPI library; pip"):
        MpiCommunicator()


def no_library(name: str) -> None:
    """As mpi4py's wheel, whose first line says what, and the others where it has looked."""
    raise RuntimeError("cannot load MPI library\nlibmpi.so: cannot open shared object file")


def test_bfloat16_is_rounded_to_nearest_and_ties_to_even():
    bits = [0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0xFF800000]
    bits += [0x7FFFFFFF, 0xFF800001, 0x00000001, 0x80000000, 0xBF80FFFF]
    codes = [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0x7F80, 0x7F80, 0xFF80]
    codes += [0x7FC0, 0x7FC0, 0x0000, 0x8000, 0xBF81]
    array = np.array(bits, "uint32").view("float32")
    assert [hex(c) for c in encode(array, "bfloat16")] == [hex(c) for c in codes]
    back = decode(encode(array, "bfloat16"), "bfloat16").view("uint32")
    assert [hex(b) for b in back] == [hex(c << 16) for c in codes]
    assert encode(np.array([1 + 2**-8, 1 + 3 * 2**-8]), "bfloat16").tolist() == [0x3F80, 0x3F82]


@pytest.mark.parametrize("fault", [False, True])
def test_the_section_of_gpu_check(monkeypatch: pytest.MonkeyPatch, fault: bool):
    """And it sees a result that is not there when it has been waited for."""
    with fake_cupy.installed():
        nccl_stub.install()
        section = tools.Section("nccl", seconds=30.0, quick=True)
        monkeypatch.setattr(ranks, "Gpu", lambda device: SimpleNamespace(home=resolve("cupy")))
        monkeypatch.setattr(ranks, "backend_info", lambda _: BackendInfo("torch", None, ()))
        if fault:
            monkeypatch.setattr("portacnn.distributed.nccl._OnStream.wait", lambda self: None)
        found = section.run(ranks.nccl)
    assert found["status"] == ("red" if fault else "green"), found
