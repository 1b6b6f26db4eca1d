"""Several Trainers in the threads of one process, as the ranks of a job: quick, and on every
backend. Real processes: tests/distributed."""

import json
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from portacnn.distributed import Communicator, Pending
from portacnn.runtime import backend_of

PATIENCE = 5.0
"""Seconds that a rank waits for the others before the test fails."""


class Job:
    """What the ranks of a job have in common."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=PATIENCE)
        self.meeting = threading.Barrier(size)
        self.slots: list[Any] = [None] * size
        self.aborted: list[int] = []


class ThreadCommunicator(Communicator):
    """One of the ranks. ``log`` lists its collective operations."""

    name = "threads"

    def __init__(self, job: Job, rank: int) -> None:
        self.job, self.rank, self.size = job, rank, job.size
        self.local_rank, self.local_size = rank, job.size
        self.log: list[Any] = []

    def _all(self, value: Any) -> list[Any]:
        self.job.slots[self.rank] = value
        self.job.barrier.wait()
        found = list(self.job.slots)
        self.job.barrier.wait()
        return found

    def _reduce(self, array: Any, op: str, compress: str | None = None) -> None:
        backend = backend_of(array)
        own = np.array(backend.to_host(array))
        if compress is not None:  # float16 only
            own = own.astype(compress).astype(own.dtype)
        parts = self._all(own)
        assert len({(part.shape, part.dtype) for part in parts}) == 1
        total = parts[0].copy()
        for part in parts[1:]:
            total = {"sum": np.add, "max": np.maximum, "min": np.minimum}[op](total, part)
        self._write(array, total)

    @staticmethod
    def _write(array: Any, host: np.ndarray) -> None:
        backend = backend_of(array)
        array[...] = backend.xp.asarray(
            backend.asarray(host), dtype=array.dtype, device=array.device
        )

    def all_reduce(self, array: Any, op: str = "sum", *, compress: str | None = None) -> None:
        self.log.append(("all_reduce", tuple(array.shape)))
        self._reduce(array, op, compress)

    def start_all_reduce(self, array: Any, *, compress: str | None = None) -> Pending:
        self.log.append(("start", tuple(array.shape)))
        return _Started(self, array, compress)

    def broadcast(self, array: Any, root: int = 0) -> None:
        self.log.append(("broadcast", tuple(array.shape)))
        self._write(array, self._all(np.array(backend_of(array).to_host(array)))[root])

    def barrier(self) -> None:
        self._all(None)

    def share(self, value: Any, root: int = 0) -> Any:
        return json.loads(self._all(json.dumps(value) if self.rank == root else "")[root])

    def gather(self, value: Any) -> list[Any]:
        return [json.loads(each) for each in self._all(json.dumps(value))]

    def any_rank(self, flag: bool) -> bool:
        return any(self._all(bool(flag)))

    def meets(self, seconds: float) -> bool:
        try:
            self.job.meeting.wait(min(seconds, 0.3))
        except threading.BrokenBarrierError:
            return False
        return True

    def abort(self, code: int = 1) -> None:
        self.job.aborted.append(self.rank)
        self.job.barrier.abort()


class _Started(Pending):
    """Sums at ``wait``, and sees whether the array was left alone until then."""

    def __init__(self, communicator: ThreadCommunicator, array: Any, compress: str | None) -> None:
        self.communicator, self.array, self.compress = communicator, array, compress
        self.before = np.array(backend_of(array).to_host(array))

    def wait(self) -> None:
        now = backend_of(self.array).to_host(self.array)
        np.testing.assert_array_equal(now, self.before, "written to after its sum had started")
        self.communicator._reduce(self.array, "sum", self.compress)


def on_ranks(size: int, work: Callable[[ThreadCommunicator], Any]) -> list[Any]:
    """The results of ``work`` on all ranks, run by a thread each. Raises the first error of a rank
    that had no broken barrier."""
    job = Job(size)
    results: list[Any] = [None] * size
    failed: list[BaseException] = []

    def one(rank: int) -> None:
        try:
            results[rank] = work(ThreadCommunicator(job, rank))
        except threading.BrokenBarrierError as error:
            failed.append(error)
        except BaseException as error:
            failed.insert(0, error)
            job.barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * PATIENCE)
    if failed:
        raise failed[0]
    return results
