"""NCCL through ``cupyx.distributed``: sums of arrays on NVIDIA GPUs, one GPU per rank.

NCCL moves CuPy's arrays, and torch's, which are shared by DLPack. Another communicator, MPI's, has
started the ranks and carries the rest: values of JSON, flags, arrays in host memory.

All of NCCL's work goes to one separate stream. An operation waits there for the work that the
caller's stream had before it, and the caller's stream waits for it when the result is needed.
"""

import os
import platform
from typing import Any

from portacnn.device_runtime import Array
from portacnn.distributed.base import Communicator, Half, Op, Pending
from portacnn.distributed.compression import check_compress, compressed_sum
from portacnn.distributed.launchers import cuda_number
from portacnn.errors import ArrayError, BackendError, DependencyError
from portacnn.runtime import Backend, backend_of, dtype_name, resolve

_DTYPES = {
    *("int8", "uint8", "int32", "uint32", "int64", "uint64"),
    *("float16", "float32", "float64", "bool"),
}
"""The dtypes that are handed to NCCL; bool as uint8."""


class NcclCommunicator(Communicator):
    """All ranks, each with a CUDA device.

    Args:
        device: the backend of this rank's device, CuPy's or torch's.
        control: the communicator for everything else. If it is MPI's, of ``MPI.COMM_WORLD``.
    """

    name = "nccl"

    def __init__(self, device: Backend, control: Communicator) -> None:
        number = device_number(device)
        if number is None:
            raise BackendError(
                f'distributed="nccl" needs a CUDA device for each rank; got {device}'
            )
        if (reason := unavailable()) is not None:
            raise DependencyError(reason)
        self._control = control
        self.rank, self.size = control.rank, control.size
        self.local_rank, self.local_size = control.local_rank, control.local_size
        import cupy as cp
        from cupyx.distributed import init_process_group

        self._check_devices(number)
        self._device = cp.cuda.Device(number)
        with self._device:
            self._nccl = init_process_group(
                self.size, self.rank, backend="nccl", use_mpi=control.name == "mpi"
            )
            self._stream = cp.cuda.Stream(non_blocking=True)

    def all_reduce(self, array: Array, op: Op = "sum", *, compress: Half | None = None) -> None:
        check_compress(compress, array, op)
        if self._takes(array):
            self._start(array, op, compress).wait()
        else:
            self._control.all_reduce(array, op, compress=compress)

    def start_all_reduce(self, array: Array, *, compress: Half | None = None) -> Pending:
        check_compress(compress, array, "sum")
        if self._takes(array):
            return self._start(array, "sum", compress)
        return self._control.start_all_reduce(array, compress=compress)

    def broadcast(self, array: Array, root: int = 0) -> None:
        if not self._takes(array):
            self._control.broadcast(array, root)
            return
        with self._device:
            ours = self._received(array)
            self._nccl.broadcast(ours, root, stream=self._stream)
            _OnStream(self, ours, backend_of(array)).wait()

    def barrier(self) -> None:
        self._control.barrier()

    def share(self, value: Any, root: int = 0) -> Any:
        return self._control.share(value, root)

    def gather(self, value: Any) -> list[Any]:
        return self._control.gather(value)

    def any_rank(self, flag: bool) -> bool:
        return self._control.any_rank(flag)

    def meets(self, seconds: float) -> bool:
        return self._control.meets(seconds)

    def abort(self, code: int = 1) -> None:
        self._control.abort(code)

    def close(self) -> None:
        """End what cupyx.distributed runs beside this process if MPI has not started the ranks."""
        self._nccl.stop()

    def _start(self, array: Array, op: Op, compress: Half | None) -> Pending:
        with self._device:
            ours = self._received(array)
            if compress is None:
                self._nccl.all_reduce(ours, ours, op, stream=self._stream)
            elif self.size > 1:
                with self._stream:
                    xp = resolve(f"cupy:{self._device.id}").xp
                    compressed_sum(xp.reshape(ours, (-1,)), compress, self)
            return _OnStream(self, ours, backend_of(array))

    def all_to_all(self, send: Array, receive: Array) -> None:
        """Fill ``receive[r]`` with what rank r has in ``send[rank]``, for ``compressed_sum``."""
        self._nccl.all_to_all(send.view("uint8"), receive.view("uint8"), stream=self._stream)

    def all_gather(self, send: Array, receive: Array) -> None:
        """Fill ``receive[r]`` with what rank r has in ``send``, for ``compressed_sum``."""
        send = send.view("uint8")
        self._nccl.all_gather(send, receive.view("uint8"), send.shape[0], stream=self._stream)

    def _takes(self, array: Array) -> bool:
        """Return whether NCCL can work on this array where it lies. The answer must depend on what
        all ranks have in common."""
        backend = backend_of(array)
        if dtype_name(array) not in _DTYPES:
            return False
        if 0 in array.shape or cuda_number(backend.name, array.device) is None:
            return False
        if backend.name == "torch":
            return bool(array.is_contiguous())
        return bool(array.flags.c_contiguous)

    def _received(self, array: Array) -> Array:
        """Return an array as CuPy's, whose earlier work NCCL's stream waits for."""
        import cupy as cp

        number = cuda_number(backend_of(array).name, array.device)
        if number != self._device.id:
            raise ArrayError(
                f"this rank reduces arrays on cuda:{self._device.id}; got one on cuda:{number}"
            )
        if backend_of(array).name == "cupy":
            self._stream.wait_event(cp.cuda.get_current_stream().record())
        else:
            with self._stream:  # DLPack makes the current stream wait for torch's
                array = cp.from_dlpack(array)
        return array.view("uint8") if dtype_name(array) == "bool" else array

    def _check_devices(self, number: int) -> None:
        """Raise BackendError if two ranks have one GPU: NCCL would wait for ever."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        told = self.gather([platform.node(), visible, number])
        for rank, one in enumerate(told):
            other = told.index(one)
            if other < rank:
                raise BackendError(
                    f"ranks {other} and {rank} on {one[0]} both use cuda:{one[2]}; NCCL needs a "
                    'GPU for each rank: device="cuda" without a number takes that of the local '
                    "rank"
                )


class _OnStream(Pending):
    """A reduction in NCCL's stream. It holds the array's memory until it is waited for."""

    def __init__(self, owner: NcclCommunicator, array: Array, backend: Backend) -> None:
        self._owner, self._array, self._backend = owner, array, backend
        self._done = owner._stream.record()

    def wait(self) -> None:
        import cupy as cp

        if self._backend.name == "cupy":
            with self._owner._device:
                cp.cuda.get_current_stream().wait_event(self._done)
        else:
            self._done.synchronize()  # torch's streams do not know CuPy's events
        self._array = None


def unavailable() -> str | None:
    """Return why NCCL cannot be used in this environment, or None."""
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        return (
            f'distributed="nccl" needs CuPy, which does not load: {error}; pip install '
            '"portacnn[cuda13]"'
        )
    if not nccl.available:
        return "CuPy finds no NCCL: pip install nvidia-nccl-cu13 (or -cu12, as CuPy's)"
    return None


def device_number(device: Backend) -> int | None:
    """Return the number of a backend's CUDA device, or None if it is none."""
    return cuda_number(device.name, device.device)
