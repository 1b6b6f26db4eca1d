"""MPI through mpi4py: CPU clusters, laptops, and GPUs with a CUDA-aware MPI.

An array in host memory is reduced where it lies: NumPy's by its buffer, torch's by DLPack. An array
on a GPU is handed to a CUDA-aware MPI, else it is copied to the host and back (*staged*). So is
every other array.

MPI makes progress only during calls. Reductions that overlap with computation therefore run in a
separate thread, on a separate communicator.
"""

import ctypes
import json
import logging
import os
import sys
from functools import cache
from queue import SimpleQueue
from threading import Event, Thread
from time import monotonic, sleep
from typing import Any

from portacnn.device_runtime import Array, HostArray
from portacnn.distributed.base import Communicator, Half, Op, Pending
from portacnn.distributed.compression import check_compress, compressed_sum
from portacnn.distributed.launchers import check_size, cuda_number
from portacnn.errors import ArrayError, DependencyError
from portacnn.runtime import backend_of, resolve, where

_log = logging.getLogger("portacnn")
_REMEDY = 'pip install "portacnn[mpi]" for the MPI of this system, or "portacnn[mpich]" to get one'


def mpi() -> Any:
    """Return the module ``mpi4py.MPI``, whose import initializes MPI.

    Raises:
        DependencyError: if mpi4py is not installed, or finds no MPI library.
    """
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise DependencyError(f"MPI needs mpi4py, which does not load: {error}; {_REMEDY}")
    except RuntimeError as error:  # mpi4py's wheel looks for a library when it is imported
        reason = str(error).partition("\n")[0]
        raise DependencyError(f"mpi4py is installed, but {reason}; {_REMEDY}")
    return MPI


class MpiCommunicator(Communicator):
    """All ranks of ``MPI.COMM_WORLD``, or of another communicator of mpi4py."""

    name = "mpi"

    def __init__(self, world: Any = None) -> None:
        self._mpi = mpi()
        if world is None:
            library = self._mpi.Get_library_version().partition("\n")[0].strip("\0 ")
            check_size(self._mpi.COMM_WORLD.size, f"mpi4py ({' '.join(library.split()[:4])})")
            world = self._mpi.COMM_WORLD
        self._world = world.Dup()  # its messages are apart from those of the caller's own code
        self.rank, self.size = self._world.rank, self._world.size
        host = self._world.Split_type(self._mpi.COMM_TYPE_SHARED, key=self.rank)
        self.local_rank, self.local_size = host.rank, host.size
        host.Free()
        self._ops = {"sum": self._mpi.SUM, "max": self._mpi.MAX, "min": self._mpi.MIN}
        self._worker: _Worker | None = None
        self._overlap, self._fault = self._world.Dup(), self._world.Dup()

    def all_reduce(self, array: Array, op: Op = "sum", *, compress: Half | None = None) -> None:
        check_compress(compress, array, op)
        self._all_reduce(self._world, array, op, compress)

    def start_all_reduce(self, array: Array, *, compress: Half | None = None) -> Pending:
        check_compress(compress, array, "sum")

        def reduce() -> None:
            self._all_reduce(self._overlap, array, "sum", compress)

        if self._mpi.Query_thread() < self._mpi.THREAD_MULTIPLE:
            return _Later(reduce)
        if self._worker is None:
            self._worker = _Worker()
        return self._worker.start(reduce)

    def broadcast(self, array: Array, root: int = 0) -> None:
        if not _empty(array):
            with _Lent(array, self._mpi) as buffer:
                self._world.Bcast(buffer, root)

    def barrier(self) -> None:
        self._world.Barrier()

    def share(self, value: Any, root: int = 0) -> Any:
        text = bytearray(_written(value) if self.rank == root else b"")
        size = ctypes.c_int64(len(text))
        self._world.Bcast(size, root)
        if self.rank != root:
            text = bytearray(size.value)
        self._world.Bcast(text, root)
        return json.loads(text)

    def gather(self, value: Any) -> list[Any]:
        text = _written(value)
        sizes = (ctypes.c_int64 * self.size)()
        self._world.Allgather(ctypes.c_int64(len(text)), sizes)
        texts = bytearray(sum(sizes))
        self._world.Allgatherv(text, [texts, list(sizes), self._mpi.BYTE])
        ends = [sum(sizes[: rank + 1]) for rank in range(self.size)]
        return [json.loads(texts[end - size : end]) for end, size in zip(ends, sizes, strict=True)]

    def any_rank(self, flag: bool) -> bool:
        found = bytearray([flag])
        self._world.Allreduce(self._mpi.IN_PLACE, found, self._mpi.MAX)
        return bool(found[0])

    def meets(self, seconds: float) -> bool:
        end = monotonic() + seconds
        request = self._fault.Ibarrier()
        while not request.Test():
            if monotonic() > end:
                return False
            sleep(0.01)
        return True

    def abort(self, code: int = 1) -> None:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        self._mpi.COMM_WORLD.Abort(code)

    def _all_reduce(self, world: Any, array: Array, op: Op, compress: Half | None) -> None:
        if _empty(array):
            return
        with _Lent(array, self._mpi, on_host=compress is not None) as buffer:
            if compress is None:
                world.Allreduce(self._mpi.IN_PLACE, buffer, self._ops[op])
            elif self.size > 1:
                with resolve("numpy").active():  # values beyond the range become infinite
                    compressed_sum(buffer.reshape(-1, order="A"), compress, _Exchange(world))


class _Exchange:
    """The transport of compressed sums."""

    def __init__(self, world: Any) -> None:
        self.size, self._world = world.size, world

    def all_to_all(self, send: HostArray, receive: HostArray) -> None:
        self._world.Alltoall(send, receive)

    def all_gather(self, send: HostArray, receive: HostArray) -> None:
        self._world.Allgather(send, receive)


def _written(value: Any) -> bytes:
    return json.dumps(value).encode()


def _empty(array: Array) -> bool:
    return 0 in array.shape


# --- arrays as buffers ----------------------------------------------------------------------------


class _Lent:
    """The memory of an array as a buffer that mpi4py takes, for the length of a ``with`` block. A
    staged array gets the buffer's values at its end. ``on_host``: as a NumPy array."""

    def __init__(self, array: Array, library: Any, on_host: bool = False) -> None:
        self.array, self.backend = array, backend_of(array)
        self.library, self.on_host = library, on_host
        self.staged: HostArray | None = None

    def __enter__(self) -> Any:
        buffer = host_view(self.array)
        if buffer is None and not self.on_host and self._on_cuda():
            if cuda_aware(self.library):
                self._settle()
                return self.array
            _warn_staged()
        if buffer is None:
            host = self.backend.to_host(self.array)
            buffer = self.staged = resolve("numpy").contiguous(host)
        return buffer.view("uint8") if buffer.dtype == bool else buffer

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.staged is not None and kind is None:
            with where(self.array):
                self.array[...] = self.backend.xp.asarray(
                    self.staged, dtype=self.array.dtype, device=self.array.device
                )

    def _on_cuda(self) -> bool:
        return cuda_number(self.backend.name, self.array.device) is not None

    def _settle(self) -> None:
        place = self.backend.place(self.array.device)
        resolve(f"{self.backend.name}:{place}").synchronize()


def host_view(array: Array) -> HostArray | None:
    """Return a NumPy array that shares the memory of ``array`` and can be written to, or None if
    there is none that MPI takes as it is."""
    try:
        view = resolve("numpy").receive(array)
    except ArrayError:
        return None
    flags = view.flags
    return view if flags.writeable and (flags.c_contiguous or flags.f_contiguous) else None


@cache
def cuda_aware(library: Any) -> bool:
    """Return whether this MPI says that it takes pointers to CUDA memory."""
    info = library.COMM_WORLD.Get_info()
    kinds = info.Get("mpi_memory_alloc_kinds") or ""  # MPI 4.1
    info.Free()
    if "cuda" in kinds or os.environ.get("MPICH_GPU_SUPPORT_ENABLED") == "1":  # Cray's MPICH
        return True
    query = getattr(ctypes.CDLL(None), "MPIX_Query_cuda_support", None)  # Open MPI
    return query is not None and bool(query() == 1)


@cache
def _warn_staged() -> None:
    _log.warning(
        "this MPI does not say that it is CUDA-aware: gradients go through host memory; on NVIDIA "
        'GPUs distributed="nccl" is faster'
    )


# --- reductions during computation ----------------------------------------------------------------


class _Later(Pending):
    """A reduction that runs when it is waited for."""

    def __init__(self, reduce: Any) -> None:
        self._reduce = reduce

    def wait(self) -> None:
        if self._reduce is not None:
            reduce, self._reduce = self._reduce, None
            reduce()


class _Started(Pending):
    """A reduction in the hands of a ``_Worker``."""

    def __init__(self, reduce: Any) -> None:
        self._reduce = reduce
        self._done = Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._reduce()
        except BaseException as error:
            self._error = error
        finally:
            self._reduce = None  # drops the array
            self._done.set()

    def wait(self) -> None:
        self._done.wait()
        if self._error is not None:
            raise self._error


class _Worker:
    """A thread that runs reductions one after the other, in the order in which they started."""

    def __init__(self) -> None:
        self._started: SimpleQueue[_Started] = SimpleQueue()
        Thread(target=self._serve, name="portacnn all_reduce", daemon=True).start()

    def start(self, reduce: Any) -> Pending:
        pending = _Started(reduce)
        self._started.put(pending)
        return pending

    def _serve(self) -> None:
        while True:
            self._started.get().run()
