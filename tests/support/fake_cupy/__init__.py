"""A stand-in for CuPy on a machine without a GPU, for tests alone: NumPy memory under CuPy's
manners.

``install()`` puts it into ``sys.modules`` as ``cupy``. It has two devices, refuses what CuPy
refuses, knows streams, events, pools and captured graphs (see ``machine``), and runs CUDA kernels
by way of ``cuda_emulator``. ``log`` says what was asked of it. ``names.txt`` lists CuPy 14.2's own
functions and their parameters: what is not in it is not in the stand-in either.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from support.fake_cupy import array as arrays
from support.fake_cupy import machine, streams
from support.fake_cupy.machine import CUDARuntimeError, OutOfMemoryError, RaceError, capacity, log

__all__ = [
    "CUDARuntimeError",
    "OutOfMemoryError",
    "RaceError",
    "capacity",
    "install",
    "installed",
    "log",
]

_OWN = ("array", "asarray", "ascontiguousarray", "empty", "empty_like", "asnumpy", "ndarray")
_UFUNC = {"out", "dtype", "casting", "where"}
_VALUES = (
    *(
        "bool_",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "intp",
        "float16",
        "float32",
    ),
    *(
        "float64",
        "complex64",
        "complex128",
        "dtype",
        "generic",
        "number",
        "integer",
        "floating",
        "inexact",
        "finfo",
    ),
    *(
        "iinfo",
        "newaxis",
        "pi",
        "e",
        "inf",
        "nan",
        "signedinteger",
        "unsignedinteger",
        "complexfloating",
    ),
)


def _parameters() -> dict[str, set[str]]:
    """The arguments that may be given by name, of each of CuPy's functions."""
    lines = (
        line.split() for line in Path(__file__).with_name("names.txt").read_text().splitlines()
    )
    return {
        name: _UFUNC
        if parameters == ["ufunc"]
        else set(parameters[0].split(","))
        if parameters
        else set()
        for name, *parameters in lines
    }


def _function(name: str, function: Any, known: set[str] | None) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        if (
            known is not None
            and not any(word.startswith("**") for word in known)
            and not kwargs.keys() <= known
        ):
            raise TypeError(f"cupy.{name} has no argument {', '.join(kwargs.keys() - known)}")
        return arrays.call(name, function, args, kwargs)

    run.__name__ = name
    run.__module__ = "cupy"
    return run


class RawModule:
    """``cupy.RawModule`` by the emulator. Arguments are checked there; arrays are recorded with
    their addresses."""

    def __init__(self, *, code: str, options: tuple[str, ...] = (), **_: Any) -> None:
        from support.cuda_emulator.emulator import Module

        self._module = Module(code, options)

    def get_function(self, name: str) -> Any:
        function = self._module.get_function(name)

        def launch(grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...]) -> None:
            reads, writes, plain = [], [], []
            for arg, wanted in zip(args, function.parameters, strict=True):
                if isinstance(arg, arrays.ndarray):
                    (writes if wanted[0] == "P" else reads).append(arg._memory.block)
                    plain.append(arg._a)
                elif isinstance(arg, np.generic | int | float):
                    plain.append(arg)
                else:
                    raise TypeError(f"Unsupported type {type(arg)}")
            machine.submit(
                machine.Work(name, lambda: function(grid, block, tuple(plain)), reads, writes)
            )

        return launch


def _module(name: str, **names: Any) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)  # what find_spec looks at
    vars(module).update(names)
    module.__all__ = sorted(n for n in names if not n.startswith("_"))  # type: ignore[attr-defined]
    return module


def _make() -> dict[str, ModuleType]:
    names = {name: getattr(arrays, name) for name in _OWN}
    for name, known in _parameters().items():
        if name not in names and hasattr(np, name):
            names[name] = _function(name, getattr(np, name), known)
    names |= {name: getattr(np, name) for name in _VALUES}
    names |= {
        name: getattr(np, name)
        for name in ("isdtype", "result_type", "can_cast", "promote_types", "issubdtype")
    }
    result_type = np.result_type
    names["result_type"] = lambda *args: result_type(
        *(a.dtype if isinstance(a, arrays.ndarray) else a for a in args)
    )
    names["can_cast"] = lambda a, to, casting="safe": np.can_cast(
        a.dtype if isinstance(a, arrays.ndarray) else a, to, casting
    )
    linalg, fft = (
        _module(
            f"cupy.{kind}",
            **{
                name: _function("matmul" if kind == "linalg" else name, getattr(numpys, name), None)
                for name in numpys.__all__
                if callable(getattr(numpys, name)) and not isinstance(getattr(numpys, name), type)
            },
        )
        for kind, numpys in (("linalg", np.linalg), ("fft", np.fft))
    )
    runtime = _module(
        "cupy.cuda.runtime",
        CUDARuntimeError=CUDARuntimeError,
        getDeviceCount=lambda: machine.DEVICES,
        getDevice=machine.current_device,
        runtimeGetVersion=lambda: 12090,
        driverGetVersion=lambda: 12090,
        getDeviceProperties=lambda device: {
            "name": b"the host",
            "multiProcessorCount": 1,
            "major": 9,
            "minor": 0,
        },
        memGetInfo=lambda: machine.Device().mem_info,
        deviceSynchronize=lambda: machine.Device().synchronize(),
        streamCaptureModeGlobal=0,
        streamCaptureModeThreadLocal=1,
        streamCaptureModeRelaxed=2,
    )
    memory = _module(
        "cupy.cuda.memory", OutOfMemoryError=OutOfMemoryError, MemoryPointer=machine.MemoryPointer
    )
    device = _module("cupy.cuda.device", Device=machine.Device)
    cuda = _module(
        "cupy.cuda",
        device=device,
        runtime=runtime,
        memory=memory,
        Memory=machine.DeviceMemory,
        is_available=lambda: True,
        **{
            name: getattr(machine, name)
            for name in (
                *(
                    "Device",
                    "Stream",
                    "Event",
                    "Graph",
                    "MemoryPool",
                    "MemoryPointer",
                    "using_allocator",
                ),
                *("get_allocator", "get_current_stream", "alloc_pinned_memory", "get_elapsed_time"),
            )
        },
    )
    cupy = _module(
        "cupy",
        **names,
        RawModule=RawModule,
        cuda=cuda,
        linalg=linalg,
        fft=fft,
        is_available=cuda.is_available,
        get_default_memory_pool=lambda: machine.default_pool,
        ufunc=SimpleNamespace,
    )
    cupy.__version__ = "14.2.0"  # type: ignore[attr-defined]
    cupy.__path__ = cuda.__path__ = []  # packages
    erf = _function("erf", np.vectorize(math.erf, otypes=[float]), None)
    special = _module("cupyx.scipy.special", erf=lambda x: erf(x).astype(x.dtype))
    scipy = _module("cupyx.scipy", special=special)
    modules = (
        cupy,
        cuda,
        runtime,
        device,
        memory,
        linalg,
        fft,
        _module("cupyx", scipy=scipy),
        scipy,
        special,
    )
    return {module.__name__: module for module in modules}


_made: dict[str, ModuleType] = {}


def install() -> ModuleType:
    """Make ``import cupy`` give the stand-in, from now on; gives it back."""
    if not _made:
        _made.update(_make())
    sys.modules.update(_made)
    return _made["cupy"]


@contextmanager
def installed() -> Iterator[ModuleType]:
    """Within it, ``import cupy`` gives the stand-in, whatever else is here; in the end its memory
    is as large as it was."""
    import array_api_compat

    from portacnn.backends.cupy import nvrtc as cupy_module

    heads = ("cupy", "cupyx", "array_api_compat.cupy")
    below = tuple(f"{head}." for head in heads)

    def concerned() -> dict[str, ModuleType]:
        return {
            name: m for name, m in sys.modules.items() if name in heads or name.startswith(below)
        }

    before, room = concerned(), capacity.copy()
    compat = vars(array_api_compat).get("cupy")
    for name in before:
        del sys.modules[name]
    cupy_module._load.cache_clear()
    try:
        yield install()
    finally:
        for name in concerned():
            del sys.modules[name]
        sys.modules.update(before)
        if compat is not None:
            array_api_compat.cupy = compat
        cupy_module._load.cache_clear()
        capacity[:] = room
        for number in range(machine.DEVICES):
            with machine.Device(number) as device:
                device.synchronize()
                machine.default_pool.free_all_blocks()
        streams.forget_unused()
