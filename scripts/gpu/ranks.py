"""NCCL on the GPU at hand, as a job of one rank: a section of ``gpu_check.py``.

With one rank sums are the values themselves. What is checked is that NCCL loads, takes portacnn's
arrays in their own stream, and that results are there when they have been waited for.
"""

import time

import numpy as np

from gpu.tools import Gpu, NotHereError, Section, add_root

add_root()

from portacnn.distributed.nccl import NcclCommunicator, unavailable  # noqa: E402
from portacnn.distributed.single import SingleProcess  # noqa: E402
from portacnn.runtime import Backend, backend_info, resolve  # noqa: E402

DTYPES = ("float16", "float32", "float64", "int32", "int64", "uint8", "bool")


def nccl(section: Section) -> None:
    """Reduce and broadcast arrays of CuPy, and of torch if it sees the GPU."""
    home = Gpu(section.device).home
    if (reason := unavailable()) is not None:
        raise NotHereError(reason)
    ours = NcclCommunicator(home, SingleProcess())
    try:
        _check(section, ours, home)
        if any(name.startswith("cuda") for name in backend_info("torch").devices):
            _check(section, ours, resolve(f"torch:cuda:{home.device.id}"))
        else:
            section.notes.append("torch sees no GPU: its arrays were not reduced")
        _time(section, ours, home)
    finally:
        ours.close()


def _check(section: Section, ours: NcclCommunicator, home: Backend) -> None:
    draw = np.random.default_rng(0)
    for dtype in DTYPES:
        with section.caught(f"{home.name} {dtype}"), home.active():
            host = draw.integers(0, 2, (3, 1000)).astype(dtype)
            array = home.asarray(host)
            for op in ("sum", "max", "min") if dtype != "bool" else ("max",):
                ours.all_reduce(array, op)
            ours.broadcast(array)
            same = np.array_equal(home.to_host(array), host)
            section.expect(same, f"{home.name} {dtype}: one rank changed its values")
            section.row(library=home.name, dtype=dtype, same=same)
    with section.caught(f"{home.name}: overlap"), home.active():
        # Each sum waits for the work before it; the work after it waits for the sum.
        array = home.asarray(np.ones((1 << 20,), "float32"))
        for _ in range(50):
            array *= 2.0
            pending = ours.start_all_reduce(array)
            home.xp.sum(home.xp.ones((1 << 18,), dtype=array.dtype, device=home.device))
            pending.wait()
            array *= 0.5
        host = home.to_host(array)
        section.expect((host == 1.0).all(), f"{home.name}: a sum was not waited for")


def _time(section: Section, ours: NcclCommunicator, home: Backend) -> None:
    """Time a call, which with one rank is the cost of a launch."""
    with section.caught("times"), home.active():
        for count in (1, 1 << 20, 12 << 20):
            array = home.asarray(np.zeros((count,), "float32"))
            ours.all_reduce(array)
            home.synchronize()
            begin = time.perf_counter()
            for _ in range(20):
                ours.all_reduce(array)
            home.synchronize()
            micro = 1e6 * (time.perf_counter() - begin) / 20
            section.figures[f"all_reduce of {count:,} float32, us"] = round(micro, 1)
