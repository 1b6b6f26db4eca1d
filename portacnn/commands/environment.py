"""What a run runs on: versions, device, threads, memory. For ``portacnn info`` and history.json."""

import os
import platform
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from portacnn.cache import cache_folder
from portacnn.runtime import Backend
from portacnn.version import VERSION

_PACKAGES = (
    *("numpy", "array-api-compat", "array-api-strict", "torch", "cupy", "numba", "threadpoolctl"),
    *("safetensors", "tqdm", "pillow", "pooch", "matplotlib", "onnx", "onnxruntime"),
    "mpi4py",
    "scikit-learn",
)
"""The packages that portacnn can use, as they are called on the index."""


def installed(module: str) -> bool:
    """Return whether a module can be imported, without importing it."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def versions() -> dict[str, str | None]:
    """Return the versions of portacnn, Python and the packages that it can use; None for those that
    are not installed."""
    found: dict[str, str | None] = {"portacnn": VERSION, "Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    if found["cupy"] is None:  # its packages are called by the version of CUDA
        for name in ("cupy-cuda13x", "cupy-cuda12x"):
            try:
                found["cupy"] = version(name)
            except PackageNotFoundError:
                continue
    return found


def threads() -> dict[str, Any]:
    """Return the cores of the machine, the threads of portacnn's own kernels, and those of each
    BLAS that is loaded."""
    own = import_module("portacnn.backends.threads")  # knows cores and container limits
    found: dict[str, Any] = {"cores": os.cpu_count(), "portacnn": own.thread_count()}
    if installed("threadpoolctl"):
        from threadpoolctl import threadpool_info

        for pool in threadpool_info():
            found[pool["internal_api"]] = pool["num_threads"]
    return found


def variables() -> dict[str, str]:
    """Return the environment variables that portacnn reads and that are set."""
    return {name: os.environ[name] for name in sorted(os.environ) if name.startswith("PORTACNN_")}


def caches() -> list[tuple[str, int]]:
    """Return the folders of caches, and the bytes in each."""
    try:
        root = cache_folder()
    except FileNotFoundError:
        return []
    folders = [root, *sorted(path for path in _entries(root) if path.is_dir())]
    return [(str(folder), _size(folder)) for folder in folders]


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _size(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:  # removed meanwhile
                continue
    return total


def peak_memory() -> int | None:
    """Return the largest memory of this process so far in bytes; None if the system does not
    say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def environment(backend: Backend) -> dict[str, Any]:
    """Return what a run on this backend runs on, for history.json."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "backend": str(backend),
        "threads": threads(),
        "variables": variables(),
    }
