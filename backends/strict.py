"""array-api-strict: the array API standard and nothing else, for tests. Its ``device1`` represents
a GPU on machines without one.
"""

from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import Any

import numpy as np

from portacnn.errors import BackendError
from portacnn.runtime import Array, Backend, BackendInfo, HostArray

KINDS = frozenset({"cpu"})
_MADE_UP = 12  # DLPack's device type for extensions
_WITHOUT_INT64 = ("no_x64",)
_REMEDY = "array-api-strict is not installed: pip install array-api-strict"


class StrictBackend(Backend):
    """array_api_strict arrays on one of the library's simulated devices. They wrap NumPy arrays, so
    warnings are switched off.
    """

    enters = True

    def active(self) -> AbstractContextManager[Any]:
        return np.errstate(all="ignore")

    def elsewhere(self, device: Any) -> AbstractContextManager[Any]:
        return np.errstate(all="ignore")

    def place(self, device: Any) -> str:
        return _word(device)

    def dlpack_device(self, array: Array) -> tuple[int, int]:
        word = _word(array.device)  # the library reports the CPU for all its devices
        return (1, 0) if word == "cpu" else (_MADE_UP, int(word.removeprefix("device")))

    def to_host(self, array: Array) -> HostArray:
        return np.array(array.to_device(self.xp.Device("CPU_DEVICE")))


def probe() -> BackendInfo:
    try:
        import array_api_strict as xp
    except ImportError:
        return BackendInfo("array_api_strict", None, (), _REMEDY)
    devices = tuple(_word(device) for device in xp.__array_namespace_info__().devices())
    return BackendInfo("array_api_strict", version("array-api-strict"), devices)


def connect(device: str | None) -> Backend:
    info = probe()
    if info.reason:
        raise BackendError(info.reason)
    import array_api_strict as xp

    word = device or "cpu"
    if word not in info.devices:
        raise BackendError(
            f"expected an array_api_strict device ({', '.join(info.devices)}), got {device!r}"
        )
    if word in _WITHOUT_INT64:
        raise BackendError(
            f"array_api_strict:{word} has no 64-bit integers, which labels and indices need; use "
            "array_api_strict:device1"
        )
    return StrictBackend(
        name="array_api_strict", xp=xp, device=xp.Device("CPU_DEVICE" if word == "cpu" else word)
    )


def _word(device: object) -> str:
    name = str(device).split("'")[1]
    return "cpu" if name == "CPU_DEVICE" else name
