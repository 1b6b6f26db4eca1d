"""Several processes that train one model: ``connect`` returns their ``Communicator``.

``mpi`` reduces arrays by MPI, ``nccl`` those on NVIDIA GPUs by NCCL; ``single`` is one process
alone. ``launchers`` reads what the launcher of the job says about it.
"""

import logging
from functools import cache
from typing import Literal

from portacnn.distributed.base import Communicator, Pending
from portacnn.distributed.faults import agree, take_down_at_errors, taking_down
from portacnn.distributed.launchers import device_for, launch
from portacnn.distributed.single import SingleProcess
from portacnn.distributed.threads import divide_threads
from portacnn.errors import ArgumentError
from portacnn.runtime import Backend, resolve

__all__ = [
    "Communicator",
    "Pending",
    "SingleProcess",
    "agree",
    "connect",
    "control",
    "device_for",
    "join",
    "launch",
    "taking_down",
]

_log = logging.getLogger("portacnn")
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
        BackendError: if the engine sees another number of processes than the launcher started, or
            does not support the device.
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
    if engine == "mpi":
        return _by_mpi()
    backend = resolve(device)
    return _by_nccl(backend) if engine == "nccl" or _suits_nccl(backend) else _by_mpi()


def join(engine: Engine | None = "auto", device: str | None = None) -> tuple[Communicator, Backend]:
    """Return the communicator of this job and the device of this rank, ``device_for(device)``.

    Example:
        >>> ranks, device = join("auto", "cpu")
        >>> ranks.rank, ranks.size, str(device)
        (0, 1, 'numpy on cpu')
    """
    ranks = control(engine)
    with taking_down(ranks):  # one host may lack the device
        home = resolve(device_for(device, ranks.local_rank))
        return connect(engine, home), home


def control(engine: Engine | None = "auto") -> Communicator:
    """Return the communicator of this job before the device is known. It carries the values of any
    engine: MPI's, or that of a single process."""
    return connect("mpi" if engine == "nccl" else engine, "cpu")


def _suits_nccl(backend: Backend) -> bool:
    from portacnn.distributed.nccl import device_number, unavailable

    if device_number(backend) is None:
        return False
    reason = unavailable()
    if reason is not None:
        _log.warning("gradients on %s are reduced by MPI: %s", backend, reason)
    return reason is None


# One communicator for all callers: MPI has a limited number, and NCCL takes seconds to start.


@cache
def _by_mpi() -> Communicator:
    from portacnn.distributed.mpi import MpiCommunicator

    communicator = MpiCommunicator()
    if communicator.size > 1:
        divide_threads(communicator)
        take_down_at_errors(communicator)
    return communicator


@cache
def _by_nccl(backend: Backend) -> Communicator:
    from portacnn.distributed.nccl import NcclCommunicator

    return NcclCommunicator(backend, _by_mpi())
