"""Several processes that train one model: ``connect`` returns their ``Communicator``.

``mpi`` reduces arrays by MPI, ``nccl`` those on NVIDIA GPUs by NCCL; ``single`` is one process
alone. ``launch`` reads what the launcher of the job says about it.
"""

from typing import Any, Literal

from portacnn.distributed.base import Communicator, Pending
from portacnn.distributed.faults import agree, take_down_at_errors, taking_down
from portacnn.distributed.launch import launch
from portacnn.distributed.single import SingleProcess
from portacnn.distributed.threads import divide_threads
from portacnn.errors import ArgumentError
from portacnn.runtime import Backend

__all__ = [
    "Communicator",
    "Pending",
    "SingleProcess",
    "agree",
    "connect",
    "launch",
    "taking_down",
]

Engine = Literal["auto", "mpi", "nccl"]
ENGINES = ("auto", "mpi", "nccl")


def connect(
    engine: Engine | Communicator | None = "auto", device: str | Backend | None = None
) -> Communicator:
    """Return the communicator of this job.

    Args:
        engine: "mpi", "nccl", or "auto": a single process if no launcher started several, else
            NCCL for a CUDA device, MPI for others. None: a single process. A ``Communicator`` is
            returned unchanged.
        device: the device of the model.

    Raises:
        ArgumentError: for an unknown engine.
        DependencyError: if the engine's package is not installed.
        BackendError: if the engine sees another number of processes than the launcher started.
    """
    if isinstance(engine, Communicator):
        return engine
    if engine is None:
        return SingleProcess()
    if engine not in ENGINES:
        raise ArgumentError(
            f"distributed must be one of {', '.join(ENGINES)}, None or a Communicator; got "
            f"{engine!r}"
        )
    said = launch()
    if engine == "auto" and (said is None or said.size == 1):
        return SingleProcess()
    return _world("mpi")


_connected: dict[str, Any] = {}


def _world(engine: str) -> Communicator:
    """Return the communicator of all ranks: the same at each call, as MPI has only so many."""
    if engine not in _connected:
        from portacnn.distributed.mpi import MpiCommunicator

        communicator = _connected[engine] = MpiCommunicator()
        if communicator.size > 1:
            divide_threads(communicator)
            take_down_at_errors(communicator)
    return _connected[engine]
