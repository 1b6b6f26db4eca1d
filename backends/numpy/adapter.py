"""The NumPy adapter: the CPU backend that is always available."""

from contextlib import AbstractContextManager
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from portacnn.backends.numpy.kernels import KERNELS
from portacnn.backends.threads import apart, on_one_blas_thread
from portacnn.errors import BackendError
from portacnn.runtime import Array, Backend, BackendInfo, HostArray, kernel_sets

KINDS = frozenset({"cpu"})
REFUSED = {
    "MaskedArray": "the mask would be lost; fill the masked values first: x.filled(0), or another "
    "value",
    "matrix": "its operator * is a matrix product; pass numpy.asarray(x)",
}


class NumpyBackend(Backend):
    """NumPy arrays; host memory is device memory."""

    views_alias = True
    enters = True
    run = staticmethod(on_one_blas_thread)

    def asarray(self, host: HostArray, dtype: str | None = None) -> Array:
        return np.array(host, dtype=dtype and self.dtype(dtype))

    def share(self, host: HostArray) -> Array:
        return np.asarray(host)

    def to_host(self, array: Array) -> HostArray:
        return np.array(array)

    def contiguous(self, array: Array) -> Array:
        return np.asarray(array, order="C")  # ascontiguousarray turns () into (1,)

    def as_real(self, array: Array) -> Array:
        array = self.contiguous(array)
        return array.view(array.real.dtype).reshape(*array.shape, 2)

    def as_complex(self, parts: Array) -> Array:
        whole = np.result_type(parts.dtype, np.complex64)
        return self.contiguous(parts).view(whole)[..., 0]

    def active(self) -> AbstractContextManager[Any]:
        return np.errstate(all="ignore")

    def elsewhere(self, device: Any) -> AbstractContextManager[Any]:
        return np.errstate(all="ignore")


def probe() -> BackendInfo:
    compiler = f" with numba {version('numba')}" if find_spec("numba") else ""
    return BackendInfo("numpy", np.__version__ + compiler, ("cpu",))


def connect(device: str | None) -> Backend:
    if device not in (None, "cpu"):
        raise BackendError(
            f"NumPy supports the CPU only, got device {device!r}; for a GPU use cuda or torch:cuda"
        )
    # numba is imported in a separate thread: an interruption of the import would leave it unusable
    # for the rest of the process.
    kernels = kernel_sets("numpy", KERNELS, partial(apart, import_module))
    return NumpyBackend(name="numpy", xp=xp, device="cpu", kernels=kernels)
