"""CUDA sources in ``backends/cupy/cuda``, compiled by NVRTC at the first launch, and their kernels.

The element type of a source is ``REAL`` (float or double); other compile-time parameters are
defines. The define ``PRECISION`` makes products use tensor cores (cuda/mma.cuh). Launch arguments
are CuPy arrays, ``NULL`` for an absent array, and numbers of the kernel's types: np.int32 for int,
np.int64 for long long, np.float32 or np.float64, np.bool_. CuPy passes them unchecked.
"""

import re
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

import numpy as np

from portacnn.ops.dispatch import PRECISIONS, precision

NULL = np.uint64(0)
"""The null pointer."""

Launcher = Callable[[tuple[int, ...], tuple[int, ...], tuple[Any, ...]], None]
"""(grid, block, arguments): launches on the current device and stream, without waiting."""

Variant = tuple[str, dict[str, str | int]]
"""The file name of a source and its defines other than REAL. Host modules list theirs as
``VARIANTS``."""

_REAL = {"float32": "float", "float64": "double"}
_ROUNDINGS: list[dict[str, str | int]] = [
    {"PRECISION": number} for number in range(1, len(PRECISIONS))
]
_TENSOR_CORES = 80  # the first compute capability whose tensor cores support TF32 and bfloat16
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)


@cache
def source(file: str) -> str:
    """Return a file of ``backends/cupy/cuda`` with its includes inserted, so that CuPy's cache
    detects changes in them.
    """
    folder = files("portacnn.backends.cupy") / "cuda"
    text = (folder / file).read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda match: source(match[1]), text)


def options(dtype: str, defines: dict[str, str | int]) -> tuple[str, ...]:
    """Return the compiler options for float32 or float64, sorted."""
    return (
        "--std=c++17",
        f"-DREAL={_REAL[dtype]}",
        *(f"-D{name}={value}" for name, value in sorted(defines.items())),
    )


@lru_cache(maxsize=1024)
def _load(file: str, name: str, dtype: str, defines: tuple[tuple[str, str | int], ...]) -> Launcher:
    import cupy as cp

    module = cp.RawModule(code=source(file), options=options(dtype, dict(defines)))
    return module.get_function(name)


def kernel(file: str, name: str, dtype: str, **defines: str | int) -> Launcher:
    """Return the kernel ``name`` of ``file``, compiled once per set of defines and device (CuPy
    distinguishes devices).

    Args:
        dtype: "float32" or "float64".
    """
    return _load(file, name, dtype, tuple(defines.items()))


def precisions(device: Any) -> tuple[str, ...]:
    """Return the precisions that a ``cupy.cuda.Device`` supports."""
    return PRECISIONS if int(device.compute_capability) >= _TENSOR_CORES else PRECISIONS[:1]


def rounding(dtype: str) -> dict[str, str | int]:
    """Return the define for the current ``ops.use_precision``. Empty for float32, other dtypes, and
    devices that do not support it.
    """
    word = precision()
    if word == PRECISIONS[0] or dtype != "float32":
        return {}
    import cupy as cp

    return {"PRECISION": PRECISIONS.index(word)} if word in precisions(cp.cuda.Device()) else {}


def with_rounding(variants: list[Variant]) -> list[Variant]:
    """Return the variants, and each float32 variant again for every precision."""
    rounded = [
        (file, {**own, **more})
        for more in _ROUNDINGS
        for file, own in variants
        if "float32" in dtypes(own)
    ]
    return [*variants, *rounded]


def dtypes(defines: dict[str, str | int]) -> tuple[str, ...]:
    """Return the dtypes that a source supports with these defines. For doubles, registers hold half
    as many elements.
    """
    if (
        "PRECISION" in defines
        or defines.get("VEC") == 4
        or int(defines.get("TM", 0)) * int(defines.get("TN", 0)) > 32
    ):
        return ("float32",)
    return ("float64",) if defines.get("VEC") == 2 else tuple(_REAL)


def supported(dtype: Any) -> bool:
    """Return whether there are kernels for this dtype."""
    return str(dtype) in _REAL
