"""What the launcher of a parallel job (mpiexec, srun, torchrun) says in the environment.

The size comes from the engine, such as MPI. The launcher's own figure is compared with it: with an
``mpiexec`` of another MPI every process would otherwise train alone, and write the same files.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from portacnn.errors import BackendError
from portacnn.runtime import VARIABLE, backend_info, resolve


class Launcher(NamedTuple):
    """The environment variables of one family of launchers."""

    name: str
    size: str
    rank: str


LAUNCHERS = (
    # mpiexec may itself start its helpers by srun, so SLURM's figures are asked last.
    Launcher("Open MPI's mpiexec", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    Launcher("MVAPICH's mpiexec", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    Launcher("MPICH's or Intel MPI's mpiexec", "PMI_SIZE", "PMI_RANK"),
    # srun alone sets this one; SLURM_NTASKS is set in a batch script, too, which runs once
    Launcher("SLURM's srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    Launcher("torchrun", "TORCHELASTIC_RUN_ID", "RANK"),
)
_FIX = {
    "torchrun": "portacnn is launched by MPI: mpiexec -n {size} python ...",
    "SLURM's srun": "let srun speak the language of this MPI (srun --mpi=pmi2 or --mpi=pmix; srun "
    "--mpi=list shows them), or use the mpiexec that belongs to it",
}
_USUAL_FIX = (
    'use the mpiexec that belongs to this MPI (of pip install "portacnn[mpich]": bin/mpiexec of '
    "the same environment), or install mpi4py for the MPI of this mpiexec: pip install "
    '"portacnn[mpi]"'
)


class Launch(NamedTuple):
    """What the launcher says: who it is, and the number of processes and this one's."""

    launcher: str
    size: int
    rank: int


def launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """Return what a launcher says about this job, or None if none started this process."""
    for launcher in LAUNCHERS:
        size = environment.get(launcher.size, "")
        if launcher.name == "torchrun" and size:
            size = environment.get("WORLD_SIZE", "")
        if size.isdecimal():
            rank = environment.get(launcher.rank, "")
            return Launch(launcher.name, int(size), int(rank) if rank.isdecimal() else 0)
    return None


def check_size(size: int, engine: str, environment: Mapping[str, str] = os.environ) -> None:
    """Check the number of processes that an engine sees against the launcher's.

    Raises:
        BackendError: if they differ.
    """
    said = launch(environment)
    if said is None or said.size == size:
        return
    raise BackendError(
        f"{said.launcher} started {said.size} processes, but {engine} sees {size}: they belong to "
        f"different installations of MPI; {_FIX.get(said.launcher, _USUAL_FIX)}".format(
            size=said.size
        )
    )


def cuda_number(library: str, device: Any) -> int | None:
    """Return the number of a CUDA device by a library's device object, or None if it is none."""
    if library == "cupy":
        return device.id
    return device.index if library == "torch" and device.type == "cuda" else None


def device_for(device: str | None, local_rank: int) -> str | None:
    """Return the device of this rank: that of its local rank for CUDA devices without a number, any
    other as asked for.

    If a launcher has hidden the GPUs of other ranks (CUDA_VISIBLE_DEVICES), local ranks count
    through those that are left.

    Example:
        >>> device_for("cpu", 1), device_for("cuda:3", 1)
        ('cpu', 'cuda:3')
    """
    asked = device or os.environ.get(VARIABLE)
    if asked not in ("auto", "cuda", "cupy", "cupy:cuda", "torch:cuda"):
        return device
    backend = resolve(device)
    count = sum(name.startswith("cuda") for name in backend_info(backend.name).devices)
    return f"{backend.name}:cuda:{local_rank % count}" if count else backend.name
