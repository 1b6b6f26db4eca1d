"""What a measurement ran on: memory, threads and versions of this process, speed of the machine."""

import contextlib
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bench_timing import WARM_UP_SECONDS, repeat


def memory() -> tuple[int, int] | None:
    """Return the current and the peak memory of this process in bytes (on macOS the peak twice), or
    None if unknown.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        told = {key: value for key, _, value in (line.partition(":") for line in lines)}
        return tuple(1024 * int(told[key].split()[0]) for key in ("VmRSS", "VmHWM"))  # type: ignore[return-value]
    except (OSError, KeyError):
        pass
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    return most, most


def reset_peak() -> None:
    """Reset the peak memory, if Linux allows it: imports temporarily need more memory than
    they keep.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def about(task: dict[str, Any]) -> dict[str, Any]:
    """Return the versions and thread counts of this process."""
    return {"versions": versions(), "threads": threads(task["contender"])}


def versions() -> dict[str, str]:
    """Return the versions of the loaded libraries."""
    loaded = {"python": sys.version.split()[0]}
    for name in (
        "portacnn",
        "numpy",
        "torch",
        "cupy",
        "array_api_strict",
        "numba",
        "onnxruntime",
        "chainer",
        "dezero",
    ):
        if name in sys.modules and hasattr(sys.modules[name], "__version__"):
            loaded[name] = str(sys.modules[name].__version__)
    return loaded


def threads(contender: str) -> dict[str, int]:
    """Return the number of threads of each pool in this process."""
    count = {}
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        pass
    else:
        count = {pool["internal_api"]: pool["num_threads"] for pool in threadpool_info()}
    if "torch" in sys.modules:
        count["torch"] = sys.modules["torch"].get_num_threads()
    if contender in ("portacnn", "portacnn-onnx"):
        from portacnn.backends.threads import thread_count

        count["portacnn"] = thread_count()
    return count


def machine() -> dict[str, Any]:
    """Describe the machine, and measure a large product and a large copy with NumPy, the best of
    several.

    A copy counts the bytes read and the bytes written.
    """
    rng = np.random.default_rng(0)
    a, b = (rng.random((2048, 2048), dtype=np.float32) for _ in range(2))
    out = np.empty_like(a)
    source = rng.random(1 << 24, dtype=np.float32)  # 64 MiB
    target = np.empty_like(source)

    def best(work: Callable[[], Any]) -> float:
        def once() -> float:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start

        once()
        return min(repeat(once, 3, WARM_UP_SECONDS))

    gemm, copy = best(lambda: np.matmul(a, b, out=out)), best(lambda: np.copyto(target, source))
    reached = {
        "gemm_gflops": 2 * 2048**3 / gemm / 1e9,
        "copy_gb_per_s": 2 * source.nbytes / copy / 1e9,
    }
    return {"cpu": cpu_name(), "cores": cores(), "system": platform.platform(), **reached}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def cores() -> float:
    """Return the number of cores this process may use; a container's quota may be a fraction."""
    allowed = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return allowed if quota == "max" else min(allowed, int(quota) / int(period))
    except (OSError, ValueError):
        return allowed
