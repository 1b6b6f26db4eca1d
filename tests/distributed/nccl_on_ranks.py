"""NcclCommunicator on two ranks, with stand-ins for CuPy and for cupyx.distributed. Run by
``test_ranks.py`` under mpiexec."""

import logging

import numpy as np
from mpi4py import MPI

from support import fake_cupy, nccl_stub

fake_cupy.install()
nccl_stub.install()

import cupy as cp  # noqa: E402

from portacnn import distributed  # noqa: E402
from portacnn.runtime import resolve  # noqa: E402

world = MPI.COMM_WORLD
rank, size = world.rank, world.size
home = resolve(distributed.device_for("cuda", rank))
assert home.device.id == rank
ours = distributed.connect("auto" if size > 1 else "nccl", home)
assert (ours.name, ours.rank, ours.size) == ("nccl", rank, size)
assert distributed.connect("nccl", home) is ours


def values(rank: int) -> np.ndarray:
    return np.random.default_rng(rank).standard_normal((3, 40)).astype("float32")


with home.active():
    # sums that overlap with computation, in the order in which they were started
    first, second = home.asarray(values(rank)), home.asarray(values(rank) * 2)
    waiting = [ours.start_all_reduce(first), ours.start_all_reduce(second)]
    other = cp.ones((4,), "float32") * 3
    for pending in waiting:
        pending.wait()
    total = sum(values(r) for r in range(size))
    assert np.array_equal(home.to_host(first), total)
    assert np.array_equal(home.to_host(second * 1), total * 2)
    # a result that was not waited for is still being written
    third = home.asarray(values(rank))
    pending = ours.start_all_reduce(third)
    try:
        third *= 2
    except fake_cupy.RaceError:
        pass
    else:
        raise AssertionError("the stub has not seen the race")
    pending.wait()

    flag = home.asarray(np.array([rank == 1, False]))
    ours.all_reduce(flag, "max")
    assert home.to_host(flag).tolist() == [size > 1, False]
    sent = home.asarray(values(rank))
    ours.broadcast(sent, root=size - 1)
    assert np.array_equal(home.to_host(sent), values(size - 1))
    for half in ("float16", "bfloat16"):
        array, beside = home.asarray(values(rank)), values(rank)
        ours.all_reduce(array, compress=half)
        distributed.connect("mpi").all_reduce(beside, compress=half)  # see mpi_on_ranks.py
        assert np.array_equal(home.to_host(array), beside)
        assert np.array_equal(beside, total) == (size == 1)

    # MPI that is not CUDA-aware: through the host, with one warning
    warned: list[str] = []
    logging.getLogger("portacnn").addFilter(lambda record: warned.append(record.msg) or False)
    for _ in range(2):
        array = home.asarray(values(rank))
        distributed.connect("mpi").all_reduce(array)
        assert np.array_equal(home.to_host(array), total)
    assert len(warned) == 1
    assert warned[0].startswith("this MPI does not say that it is CUDA-aware")

    # what NCCL does not take goes through the host: a layout, a dtype
    strided = cp.empty((40, 3), "float32").T
    strided[...] = home.asarray(values(rank))
    ours.all_reduce(strided)
    assert np.array_equal(home.to_host(strided), total)
    short = home.asarray(np.full((2,), 7, "int16"))
    ours.all_reduce(short)
    assert home.to_host(short).tolist() == [7 * size] * 2

host = values(rank)
ours.all_reduce(host)
assert np.array_equal(host, total)
assert ours.gather(rank) == list(range(size))
by_nccl = [call[0] for call in nccl_stub.calls]
assert by_nccl == [
    "init",
    *("all_reduce",) * 4,
    "broadcast",
    *("all_to_all", "all_gather") * (2 if size > 1 else 0),
]
streams = {call[-1] for call in nccl_stub.calls if call[0] != "init"}
assert len(streams) == 1
print("passed")
