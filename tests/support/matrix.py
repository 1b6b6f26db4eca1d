"""The backends that the suite runs on, and ``Here``: one of them under test."""

from dataclasses import dataclass
from typing import Any

import numpy as np

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
BY_NAME_ONLY = {"cupy-emulated": "cupy"}


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
