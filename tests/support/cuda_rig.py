"""What tests of CUDA kernels stand on where there is no GPU: the few names of ``cupy`` that host
code uses, over the emulator.

Device arrays are NumPy arrays. Each lies between two red zones, of NaN, that must stay as they are;
a fresh one is full of NaN, or of 0xee where it holds integers. What a test brings is read-only.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from portacnn.backends.cupy import memory as cupy_memory
from portacnn.backends.cupy import nvrtc as cupy_module
from support.cuda_emulator.emulator import ORDERS, Module, thread_order
from support.matrix import needs

needs_compiler = needs("compiler")
orders = st.sampled_from(ORDERS)
LIMIT = {"float32": 1e-5, "float64": 1e-12}
_ZONE = 64  # numbers before and behind an array


class Rig:
    """The arrays that were made, and how often what was launched."""

    def __init__(self) -> None:
        self.zones: list[np.ndarray] = []
        self.launches: list[tuple[str, tuple, tuple]] = []

    def empty(self, shape: Any, dtype: Any = "float64") -> np.ndarray:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        dtype = np.dtype(dtype)
        count = int(np.prod(shape))
        memory = np.full(
            (count + 2 * _ZONE) * dtype.itemsize, 0xFF if dtype.kind == "f" else 0xEE, "uint8"
        )
        zone = _ZONE * dtype.itemsize
        self.zones += [memory[:zone], memory[len(memory) - zone :]]
        return memory[zone : len(memory) - zone].view(dtype).reshape(shape)

    def array(
        self, host: np.ndarray, dtype: str, order: tuple[int, ...] | None = None
    ) -> np.ndarray:
        """On the device, with its axes in memory in this order: (1, 2, 3, 0) is the batch last."""
        order = tuple(range(host.ndim)) if order is None else order
        array = self.empty([host.shape[axis] for axis in order], dtype)
        array[...] = host.transpose(order)
        array.flags.writeable = False
        return array.transpose(np.argsort(order))

    def check_zones(self) -> None:
        for zone in self.zones:
            assert (zone == zone[0]).all(), "written beyond the end of an array"
            assert zone[0] in (0xFF, 0xEE)


def _raw_module(rig: Rig) -> type:
    class RawModule:
        def __init__(self, code: str, options: tuple[str, ...]) -> None:
            self.module = Module(code, options)

        def get_function(self, name: str) -> Any:
            function = self.module.get_function(name)

            def launch(grid: tuple, block: tuple, args: tuple) -> None:
                rig.launches.append((name, grid, block))
                function(grid, block, args)

            return launch

    return RawModule


@contextmanager
def rigged(order: str = "forward", seed: int = 0, capability: str = "90") -> Iterator[Rig]:
    """Within, ``import cupy`` gives the stand-in; afterwards, the red zones are looked at.

    Args:
        capability: of the device, as CuPy has it: "90" is 9.0.
    """
    rig = Rig()
    device = SimpleNamespace(compute_capability=capability)
    stand_in = SimpleNamespace(
        RawModule=_raw_module(rig), empty=rig.empty, cuda=SimpleNamespace(Device=lambda: device)
    )
    with pytest.MonkeyPatch.context() as patch, thread_order(order, seed):
        patch.setitem(sys.modules, "cupy", stand_in)
        patch.setattr(cupy_memory, "address", lambda array: array.ctypes.data)
        cupy_module._load.cache_clear()
        try:
            yield rig
        finally:
            cupy_module._load.cache_clear()
    rig.check_zones()


_BITS = {"tf32": 11, "bfloat16": 8, "float16": 11}  # of a number's fraction, the first one included


def rounded(x: np.ndarray, precision: str) -> np.ndarray:
    """What factors become (see ``ops.use_precision``), in float64, computed with fractions and
    exponents."""
    x = np.asarray(x, "float64")
    # of the latter, both halves together are as good as exact
    if precision in ("float32", "3xtf32"):
        return x
    fraction, exponent = np.frexp(x)
    scale = np.full(x.shape, 2.0 ** _BITS[precision])
    if precision == "float16":  # below 2**-14 numbers lie evenly
        scale = np.ldexp(scale, np.minimum(exponent + 13, 0))
    steps = fraction * scale
    # Halves: to the even one, of TF32 away from 0.
    steps = (
        np.sign(steps) * np.floor(np.abs(steps) + 0.5) if precision == "tf32" else np.rint(steps)
    )
    result = np.ldexp(steps / scale, exponent)
    largest = 65504 if precision == "float16" else np.finfo("float32").max
    return np.where(np.abs(result) > largest, np.copysign(np.inf, x), result)


def close(got: np.ndarray, wanted: np.ndarray, dtype: str, terms: np.ndarray) -> None:
    """Of the dtype and shape, and within LIMIT of the largest sum of its terms' absolute values.

    terms: those sums, from the same reckoning with absolute values. Where terms cancel, a sum of
    them may be small while its rounding isn't: the result's own largest number is no measure then.
    """
    assert got.dtype == dtype
    assert got.shape == wanted.shape
    np.testing.assert_allclose(
        got, wanted, rtol=0, atol=LIMIT[dtype] * float(terms.max(initial=1e-30))
    )
