"""The backends that the suite runs on, ``Here``: one of them under test, and what a test needs.

A test that does not apply, or that cannot run here, is not generated; the header of a run says
which backends and packages are missing.
"""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portacnn.runtime import Array, Backend

BACKENDS = {
    "numpy": "numpy",
    "numpy-readonly": "numpy",
    "strict": "array_api_strict",
    "strict-device1": "array_api_strict:device1",
    "torch": "torch",
    "torch-cuda": "torch:cuda",
    "cupy": "cupy",
}
BY_NAME_ONLY = {"cupy-emulated": "cupy", "jax": "jax"}


@dataclass(frozen=True)
class Here:
    """A backend under test: how to bring arrays there and back. ``name`` is the test's, ``backend``
    portacnn's."""

    name: str
    backend: Backend

    @property
    def device(self) -> Backend:
        """What ``device=`` of models and ``resolve`` takes."""
        return self.backend

    @property
    def xp(self) -> Any:
        return self.backend.xp

    def array(self, host: Any, dtype: str | None = None) -> Array:
        array = self.backend.asarray(np.asarray(host), dtype)
        if self.name == "numpy-readonly":
            array.flags.writeable = False
        return array

    def host(self, array: Array) -> np.ndarray:
        return self.backend.to_host(array)


HAVING: dict[str, Callable[[Backend], bool]] = {
    "kernels": lambda backend: bool(backend.kernels),
    "update kernels": lambda backend: "sgd_update" in backend.kernels.get("native", {}),
    "views": lambda backend: backend.views_alias,
    "float16": lambda backend: hasattr(backend.xp, "float16"),
    "strides": lambda backend: backend.name in ("numpy", "torch"),
}


def backends(*names: str, having: str | None = None) -> pytest.MarkDecorator:
    """The backends that a test's fixture ``backend`` goes over: these of BACKENDS, or those that
    have something (a key of HAVING)."""
    assert set(names) <= {*BACKENDS, *BY_NAME_ONLY}
    assert having is None or having in HAVING
    return pytest.mark.backends(*names, having=having)


EACH_LIBRARY = backends(
    "numpy", "strict-device1", "torch", "torch-cuda", "cupy", "cupy-emulated", "jax"
)
"""For a test, or as ``pytestmark`` for a file, that goes over each library once: where no array of
its own is handed to the library, read-only inputs are NumPy again, and whatever fails on
array-api-strict's CPU fails on its ``device1`` too."""


def suits(name: str, backend: Backend, marker: pytest.Mark) -> bool:
    """Whether a test that is marked so goes over this backend."""
    having = marker.kwargs["having"]
    return (not marker.args or name in marker.args) and (having is None or HAVING[having](backend))


def _package(name: str) -> Callable[[], str | None]:
    def check() -> str | None:
        spec = find_spec(name)  # without an origin it is the folder of tests of that name
        return None if spec and spec.origin else "not installed"

    return check


def _mpi() -> str | None:
    from support.mpi import mpiexec

    return _package("mpi4py")() or (None if mpiexec() else 'no mpiexec (pip install "mpich")')


def _browser() -> str | None:
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if missing:
        return f"no {missing[0]} (Debian: apt-get install chromium chromium-driver)"
    return _package("selenium")()


def _compiler() -> str | None:
    from support.cuda_emulator.emulator import NO_COMPILER, compiler

    return NO_COMPILER if compiler() is None else None


def _nvrtc() -> str | None:
    nvrtc = _gpu_nvrtc()
    return nvrtc.NO_NVRTC if nvrtc.library() is None else None


def _disassembler() -> str | None:
    return _nvrtc() or (_gpu_nvrtc().NO_DISASSEMBLER if not _gpu_nvrtc().disassembler() else None)


def _gpu_nvrtc() -> Any:
    if (folder := str(ROOT / "scripts" / "gpu")) not in sys.path:
        sys.path.append(folder)
    return import_module("nvrtc")


ROOT = Path(__file__).resolve().parents[2]
MNIST = ROOT.parent / "shared" / "data" / "mnist"
NEEDS: dict[str, Callable[[], str | None]] = {
    **{
        name: _package(name)
        for name in (
            *("torch", "numba", "onnx", "onnxruntime", "tensorboard", "PIL", "pooch"),
            *("jax", "matplotlib", "pycocotools", "nbclient", "ipykernel", "starlette", "uvicorn"),
        )
    },
    "mpi4py": _mpi,
    "browser": _browser,
    "compiler": _compiler,
    "nvrtc": _nvrtc,
    "disassembler": _disassembler,
    "mnist": lambda: None if MNIST.is_dir() else f"the whole of MNIST is not at {MNIST}",
}
"""What a test may need beside the test group: by name, a function of why it is missing, or None."""


def needs(*names: str) -> pytest.MarkDecorator:
    """A test that runs where all these are (keys of NEEDS)."""
    assert set(names) <= set(NEEDS)
    return pytest.mark.needs(*names)
