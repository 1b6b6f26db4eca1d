"""The CuPy adapter. (Not named ``cupy.py``, which would shadow the library.)"""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from portacnn.backends.cupy.nvrtc import precisions
from portacnn.device_runtime import Uploader
from portacnn.errors import BackendError
from portacnn.runtime import Array, Backend, BackendInfo, HostArray, Kernel

KINDS = frozenset({"cuda"})
_REMEDY = (
    'CuPy is not installed: pip install "portacnn[cuda13]" (or "portacnn[cuda12]", to fit '
    "the driver)"
)
_FULL = re.compile(r"Out of memory allocating ([\d,]+) bytes \(allocated so far: ([\d,]+) bytes")


class CupyBackend(Backend):
    """CuPy arrays on one CUDA device.

    CuPy allocates and launches on its *current* device, whatever ``device=`` says. Code that
    creates arrays or computes therefore runs inside ``active()``, and the dispatch of ops enters
    the device of its arrays.
    """

    views_alias = True
    enters = True

    @property
    def precisions(self) -> tuple[str, ...]:
        return precisions(self.device)

    def place(self, device: Any) -> str:
        return f"cuda:{device.id}"

    def asarray(self, host: HostArray, dtype: str | None = None) -> Array:
        import cupy as cp

        with self.device:
            return cp.array(host, dtype=dtype and self.dtype(dtype), order="C")

    def to_host(self, array: Array) -> HostArray:
        import cupy as cp

        return np.array(cp.asnumpy(array))

    def contiguous(self, array: Array) -> Array:
        import cupy as cp

        # ascontiguousarray turns () into (1,)
        return array if array.flags.c_contiguous else cp.ascontiguousarray(array)

    def as_real(self, array: Array) -> Array:
        array = self.contiguous(array)
        return array.view(array.real.dtype).reshape(*array.shape, 2)

    def as_complex(self, parts: Array) -> Array:
        whole = np.result_type(parts.dtype, np.complex64)
        return self.contiguous(parts).view(whole)[..., 0]

    def synchronize(self) -> None:
        self.device.synchronize()

    def active(self) -> AbstractContextManager[Any]:
        return self.device

    def elsewhere(self, device: Any) -> AbstractContextManager[Any] | None:
        import cupy as cp

        return None if device.id == cp.cuda.runtime.getDevice() else device

    def free_memory(self) -> int | None:
        import cupy as cp

        with self.device:
            return cp.cuda.runtime.memGetInfo()[0] + cp.get_default_memory_pool().free_bytes()

    def memory_error(self, error: BaseException) -> tuple[int, int] | None:
        found = _FULL.search(str(error)) if isinstance(error, MemoryError) else None
        return found and (int(found[1].replace(",", "")), int(found[2].replace(",", "")))  # type: ignore[return-value]

    def uploader(self) -> Uploader:
        from portacnn.backends.cupy.stream import CupyUploader

        return CupyUploader(self)

    def compile_step(
        self, step: Callable[..., Any], example: tuple[Any, ...]
    ) -> Callable[..., Any]:
        from portacnn.backends.cupy.capture import CapturedStep

        return CapturedStep(self, step)


def probe() -> BackendInfo:
    try:
        import cupy as cp
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "cupy"
        return BackendInfo(
            "cupy",
            None,
            (),
            _REMEDY if missing else f"CuPy is installed but does not load: {error}",
        )
    try:
        count = cp.cuda.runtime.getDeviceCount()
    except cp.cuda.runtime.CUDARuntimeError as error:
        return BackendInfo(
            "cupy", cp.__version__, (), f"CuPy is installed but no CUDA device responds: {error}"
        )
    if count == 0:
        return BackendInfo(
            "cupy", cp.__version__, (), "CuPy is installed but there is no CUDA device"
        )
    return BackendInfo("cupy", cp.__version__, tuple(f"cuda:{i}" for i in range(count)))


def connect(device: str | None) -> Backend:
    info = probe()
    if info.reason:
        raise BackendError(info.reason)
    import array_api_compat.cupy as compat
    import cupy as cp

    from portacnn.backends.cupy.kernels import KERNELS
    from portacnn.backends.cupy.namespace import namespace

    device_ = cp.cuda.Device(_index(device, info))
    kernels = {"native": {**_KERNELS, **KERNELS}}
    return CupyBackend(name="cupy", xp=namespace(compat), device=device_, kernels=kernels)


def _erf(x: Any) -> Any:
    from cupyx.scipy.special import erf

    return erf(x)


_KERNELS = {"erf": Kernel(_erf)}


def _index(device: str | None, info: BackendInfo) -> int:
    """Return the index of a device: ``None``, ``"1"``, ``"cuda"`` or ``"cuda:1"``."""
    word: Any = "0" if device in (None, "cuda") else device
    word = word.removeprefix("cuda:")
    if not word.isdecimal():
        raise BackendError(
            f"CuPy supports CUDA devices, got {device!r}; use cuda or cuda:N, or the backend numpy"
        )
    if int(word) >= len(info.devices):
        raise BackendError(
            f"expected one of CuPy's devices {', '.join(info.devices)}, got cuda:{word}"
        )
    return int(word)
