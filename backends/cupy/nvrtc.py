"""CUDA sources under ``backends/cupy/cuda``, compiled by NVRTC when they are first launched, and
their kernels.

A source knows its element type as ``REAL`` (float or double); what else it wants to know while it
is compiled comes as defines. ``PRECISION`` among them makes products go to tensor cores
(cuda/mma.cuh). Arguments of a launch are CuPy arrays, ``NULL`` for one that is not there, and
numbers of the kernel's own types: np.int32 for int, np.int64 for long long, np.float32 or
np.float64, np.bool_. CuPy hands them over as they are, unchecked.
"""

import re
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

import numpy as np

from portacnn.ops.dispatch import PRECISIONS, precision

NULL = np.uint64(0)
"""The pointer to nothing."""

Launcher = Callable[[tuple[int, ...], tuple[int, ...], tuple[Any, ...]], None]
"""(grid, block, arguments): on the current device and stream, without waiting."""

Variant = tuple[str, dict[str, str | int]]
"""A source's file name and the defines it is used with, beside REAL. Host modules list theirs as
``VARIANTS``."""

_REAL = {"float32": "float", "float64": "double"}
_ROUNDINGS: list[dict[str, str | int]] = [
    {"PRECISION": number} for number in range(1, len(PRECISIONS))
]
_TENSOR_CORES = 80  # the first compute capability whose tensor cores take TF32 and bfloat16
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)


@cache
def source(file: str) -> str:
    """The text of a file of ``backends/cupy/cuda`` with the ones it includes put in, so that CuPy's
    cache sees changes in those."""
    folder = files("portacnn.backends.cupy") / "cuda"
    text = (folder / file).read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda match: source(match[1]), text)


def options(dtype: str, defines: dict[str, str | int]) -> tuple[str, ...]:
    """What the compiler is given for float32 or float64, in an order of its own."""
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
    """The kernel ``name`` of ``file``; compiled once for each set of defines and device (CuPy keeps
    it apart by device).

    Args:
        dtype: "float32" or "float64".
    """
    return _load(file, name, dtype, tuple(defines.items()))


def precisions(device: Any) -> tuple[str, ...]:
    """What a ``cupy.cuda.Device`` can round factors to."""
    return PRECISIONS if int(device.compute_capability) >= _TENSOR_CORES else PRECISIONS[:1]


def rounding(dtype: str) -> dict[str, str | int]:
    """The define for what ``ops.use_precision`` says here; none for float32 as it is, other dtypes,
    and devices that can't."""
    word = precision()
    if word == PRECISIONS[0] or dtype != "float32":
        return {}
    import cupy as cp

    return {"PRECISION": PRECISIONS.index(word)} if word in precisions(cp.cuda.Device()) else {}


def with_rounding(variants: list[Variant]) -> list[Variant]:
    """These, and each that takes float32 again for all that factors can be rounded to."""
    rounded = [
        (file, {**own, **more})
        for more in _ROUNDINGS
        for file, own in variants
        if "float32" in dtypes(own)
    ]
    return [*variants, *rounded]


def dtypes(defines: dict[str, str | int]) -> tuple[str, ...]:
    """Which ones a source takes with these defines. Of doubles, registers hold half as many."""
    if (
        "PRECISION" in defines
        or defines.get("VEC") == 4
        or int(defines.get("TM", 0)) * int(defines.get("TN", 0)) > 32
    ):
        return ("float32",)
    return ("float64",) if defines.get("VEC") == 2 else tuple(_REAL)


def supported(dtype: Any) -> bool:
    """Whether there are kernels for arrays of this dtype."""
    return str(dtype) in _REAL
