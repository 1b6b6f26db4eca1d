"""``Communicator``: the interface through which the processes of a training exchange arrays.

The words are MPI's. A *rank* is one of ``size`` processes that run the same program, or its
number. A collective operation is called by all ranks, in the same order, with arrays of the same
shape and dtype. ``single``, ``mpi`` and ``nccl`` implement it; code above does not ask which of
them it has.
"""

from typing import Any, ClassVar, Literal

from portacnn.device_runtime import Array

Op = Literal["sum", "max", "min"]
Half = Literal["bfloat16", "float16"]


class Pending:
    """A reduction that was started. Its array must be left alone until ``wait`` has returned."""

    def wait(self) -> None:
        """Wait until the array holds the result. Raises the error of a reduction that failed."""


class Communicator:
    """All ranks of a job.

    Attributes:
        name: "single", "mpi" or "nccl".
        rank, size: this process's number, and the number of processes.
        local_rank, local_size: the same among the processes of this host.
    """

    name: ClassVar[str]
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank {self.rank} of {self.size})"

    def all_reduce(self, array: Array, op: Op = "sum", *, compress: Half | None = None) -> None:
        """Replace the array's elements, in place, by their sum, maximum or minimum over all ranks.

        All ranks get the same bits. For booleans "max" is a logical or, "min" a logical and.
        ``compress``: send the floats of a sum in 16 bits, see ``compression``.
        """
        raise NotImplementedError

    def start_all_reduce(self, array: Array, *, compress: Half | None = None) -> Pending:
        """Start to sum an array over all ranks, in place, and return at once. All ranks must start
        the same reductions in the same order."""
        raise NotImplementedError

    def broadcast(self, array: Array, root: int = 0) -> None:
        """Replace the array's elements, in place, by those of the rank ``root``."""
        raise NotImplementedError

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        raise NotImplementedError

    def share(self, value: Any, root: int = 0) -> Any:
        """Return the value that the rank ``root`` passed; what others pass is ignored. It must be a
        value of JSON: text, numbers, booleans, None, lists, dictionaries with text as keys."""
        raise NotImplementedError

    def gather(self, value: Any) -> list[Any]:
        """Return the values that all ranks passed, by rank. They must be values of JSON."""
        raise NotImplementedError

    def any_rank(self, flag: bool) -> bool:
        """Return whether the flag is true on at least one rank."""
        raise NotImplementedError

    def meets(self, seconds: float) -> bool:
        """Return whether all ranks call this within a time. A job whose ranks do not meet cannot
        go on: the only call that may follow is ``abort``."""
        raise NotImplementedError

    def abort(self, code: int = 1) -> None:
        """End the processes of all ranks at once, with this exit status."""
        raise NotImplementedError
