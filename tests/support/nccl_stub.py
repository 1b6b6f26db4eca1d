"""A stand-in for ``cupyx.distributed`` over the stand-in for CuPy, for tests alone: the functions
of NCCLBackend's documented interface that portacnn calls, with CuPy 14's own checks.

Arrays travel by MPI. The work is submitted to the stream that was asked for, so that an access that
nothing orders raises ``RaceError``. ``calls`` lists what was called.
"""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

from support.fake_cupy import machine
from support.fake_cupy.array import ndarray

DTYPES = "bBiIlLqQefdFD"
calls: list[tuple[Any, ...]] = []


class Alone:
    """One rank, without MPI."""

    rank, size = 0, 1

    def Allreduce(self, source: Any, target: Any, op: Any) -> None:  # noqa: N802
        if source is not None:
            target[...] = source

    def Bcast(self, array: Any, root: int) -> None:  # noqa: N802
        assert root == 0

    def Allgather(self, source: Any, target: Any) -> None:  # noqa: N802
        target[...] = source.reshape(target.shape)

    Alltoall = Allgather


class NCCLBackend:
    def __init__(self, n_devices: int, rank: int, use_mpi: bool) -> None:
        if use_mpi:
            from mpi4py import MPI

            self._mpi, self._world = MPI, MPI.COMM_WORLD.Dup()
        else:
            self._mpi, self._world = SimpleNamespace(SUM=0, MAX=0, MIN=0, IN_PLACE=None), Alone()
        assert (n_devices, rank) == (self._world.size, self._world.rank)
        assert use_mpi or n_devices == 1
        self.rank, self._device = rank, machine.Device().id
        calls.append(("init", n_devices, rank, self._device))

    def stop(self) -> None:
        """Ends the server of a group that is started without MPI."""

    def all_reduce(self, in_array: Any, out_array: Any, op: str = "sum", stream: Any = None):
        reduce = {"sum": self._mpi.SUM, "max": self._mpi.MAX, "min": self._mpi.MIN}[op]
        self._do(
            ("all_reduce", op),
            lambda source, target: self._world.Allreduce(
                self._mpi.IN_PLACE if source is target else source, target, reduce
            ),
            in_array,
            out_array,
            stream,
        )

    def broadcast(self, in_out_array: Any, root: int = 0, stream: Any = None):
        self._do(
            ("broadcast", root),
            lambda source, _: self._world.Bcast(source, root),
            in_out_array,
            in_out_array,
            stream,
        )

    def all_gather(self, in_array: Any, out_array: Any, count: int, stream: Any = None):
        assert count * self._world.size == out_array.size
        assert count == in_array.size
        self._do(("all_gather",), self._world.Allgather, in_array, out_array, stream)

    def all_to_all(self, in_array: Any, out_array: Any, stream: Any = None):
        assert in_array.shape[0] == out_array.shape[0] == self._world.size
        self._do(("all_to_all",), self._world.Alltoall, in_array, out_array, stream)

    def _do(self, call: tuple[Any, ...], work: Any, source: Any, target: Any, stream: Any) -> None:
        for array in (source, target):
            assert isinstance(array, ndarray)
            if array.dtype.char not in DTYPES:
                raise TypeError(f"Unknown dtype {array.dtype} for NCCL")
            if not array.flags.c_contiguous and not array.flags.f_contiguous:
                raise RuntimeError("NCCL requires arrays to be either c- or f-contiguous")
            assert array.device.id == self._device == machine.Device().id
        calls.append((*call, str(source.dtype), source.shape, stream))
        with stream or machine.get_current_stream():
            machine.submit(
                machine.Work(
                    call[0],
                    lambda: work(source._a, target._a),
                    [source._memory.block],
                    [target._memory.block],
                )
            )


def init_process_group(
    n_devices: int,
    rank: int,
    *,
    backend: str = "nccl",
    host: str | None = None,
    port: int | None = None,
    use_mpi: bool = False,
) -> NCCLBackend:
    assert backend == "nccl"
    return NCCLBackend(n_devices, rank, use_mpi)


def install(available: bool = True) -> None:
    """Make ``import cupyx.distributed`` and ``cupy.cuda.nccl`` give the stand-ins, beside that of
    CuPy, which must be installed."""
    module = ModuleType("cupyx.distributed")
    module.init_process_group = init_process_group  # type: ignore[attr-defined]
    sys.modules["cupyx.distributed"] = module
    sys.modules["cupyx"].__path__ = []  # type: ignore[attr-defined]
    nccl = ModuleType("cupy.cuda.nccl")
    nccl.available = available  # type: ignore[attr-defined]
    sys.modules["cupy.cuda.nccl"] = sys.modules["cupy.cuda"].nccl = nccl  # type: ignore[attr-defined]
