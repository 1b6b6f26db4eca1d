"""What every communicator does, on several ranks: run by ``test_communicator.py`` under mpiexec."""

import sys
import threading
import time

import numpy as np

from portacnn import distributed
from portacnn.backends.threads import thread_count
from portacnn.runtime import resolve

ours = distributed.connect("mpi")
rank, size = ours.rank, ours.size
assert (size, ours.local_rank, ours.local_size) == (int(sys.argv[1]), rank, size)
assert distributed.connect("mpi") is ours
assert (distributed.connect("auto") is ours) == (size > 1)
assert thread_count() == 1 or size == 1  # OMP_NUM_THREADS


def values(rank: int, dtype: str, shape: tuple[int, ...] = (2, 3, 4)) -> np.ndarray:
    """What a rank has: whole numbers, whose sums are exact in any order."""
    return np.random.default_rng(rank).integers(0, 9, shape).astype(dtype)


def of_all(function: np.ufunc, dtype: str) -> np.ndarray:
    return function.reduce([values(r, dtype) for r in range(size)])


# --- values of JSON -------------------------------------------------------------------------------

value = {"text": "é" * rank, "list": [1, 2.5, None, True], "rank": rank}
assert ours.gather(value) == [{**value, "rank": r, "text": "é" * r} for r in range(size)]
assert ours.share({"a": (1, 2)} if rank == 0 else object()) == {"a": [1, 2]}
assert ours.share(rank, root=size - 1) == size - 1
assert ours.any_rank(rank == size - 1)
assert not ours.any_rank(False)
assert ours.meets(10)

# --- arrays, in place -----------------------------------------------------------------------------

for home in map(resolve, sys.argv[2:]):
    with home.active():
        for dtype in ("float32", "float64", "int64", "uint8", "bool"):
            array = home.asarray(values(rank, dtype))
            ours.all_reduce(array, "max")
            assert np.array_equal(home.to_host(array), of_all(np.maximum, dtype)), (home, dtype)
            assert array.device == home.device
            array = home.asarray(values(rank, dtype))
            ours.broadcast(array, root=size - 1)
            assert np.array_equal(home.to_host(array), values(size - 1, dtype)), (home, dtype)
        array = home.asarray(values(rank, "float32"))
        ours.all_reduce(array, "min")
        assert np.array_equal(home.to_host(array), of_all(np.minimum, "float32"))

        # three at once, while the caller does something else
        arrays = [home.asarray(values(rank, "float32") * k) for k in (1, 2, 3)]
        empty = home.xp.zeros((0, 3), dtype=home.dtype("float32"), device=home.device)
        scalar = home.asarray(np.asarray(rank + 1.0))
        pending = [ours.start_all_reduce(array) for array in (*arrays, empty, scalar)]
        ours.barrier()
        for each in pending:
            each.wait()
        for k, array in zip((1, 2, 3), arrays, strict=True):
            assert np.array_equal(home.to_host(array), of_all(np.add, "float32") * k), home
        assert home.to_host(scalar) == sum(range(1, size + 1))

        # a layout with the batch last: another order in memory, the same elements
        packed = home.xp.permute_dims(home.asarray(values(rank, "float32")), (2, 0, 1))
        ours.all_reduce(packed)
        assert np.array_equal(home.to_host(packed), of_all(np.add, "float32").transpose(2, 0, 1))

# --- a stretch of a flat buffer, as the Trainer reduces it ----------------------------------------

flat = values(rank, "float32", (10,))
ours.all_reduce(flat[2:5])
told = np.array(ours.gather(flat.tolist()))
assert (told[:, 2:5] == sum(values(r, "float32", (10,))[2:5] for r in range(size))).all()
assert (told[:, 5:] == [values(r, "float32", (10,))[5:] for r in range(size)]).all()

# --- 16 bits on the wire --------------------------------------------------------------------------


def drawn(rank: int) -> np.ndarray:
    drawn = np.random.default_rng(rank).standard_normal(70_001).astype("float32")
    if rank == 0:
        drawn[:4] = [np.nan, np.inf, -np.inf, 1e30]
    return drawn


def rounded(array: np.ndarray, half: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        if half == "float16":
            return array.astype("float16").astype("float32")
        # to 8 bits of mantissa, by arithmetic: the last bit kept is 2 ** (exponent - 8)
        mantissa, exponent = np.frexp(array.astype("float64"))
        return np.ldexp(np.rint(mantissa * 256), exponent - 8).astype("float32")


for half in ("bfloat16", "float16"):
    array = drawn(rank)
    ours.start_all_reduce(array, compress=half).wait()
    with np.errstate(invalid="ignore"):
        wanted = drawn(0)
        if size > 1:
            total = rounded(drawn(0), half)
            for r in range(1, size):
                total = total + rounded(drawn(r), half)
            wanted = rounded(total, half)
    assert np.array_equal(array, wanted, equal_nan=True), half
    bits = array.view("uint32").tolist()[:1000]
    assert all(other == bits for other in ours.gather(bits))

# --- the thread that reduces stands behind no other -----------------------------------------------

late = np.ones(3)
if rank == size - 1:
    time.sleep(0.05)
pending = ours.start_all_reduce(late)
ours.barrier()
pending.wait()
assert (late == size).all()
assert sum(thread.name == "portacnn all_reduce" for thread in threading.enumerate()) == 1
if rank == 0:
    print("passed")
