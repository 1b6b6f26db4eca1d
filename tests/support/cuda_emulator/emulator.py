"""CUDA kernels compiled for the host and run there, in the manner of ``cupy.RawModule``: what tests
run without a GPU.

``Module(code, options).get_function(name)(grid, block, args)`` takes what CuPy's takes, with NumPy
arrays, or anything whose ``data.ptr`` is an address on the host, in place of CuPy's. It is stricter
than a GPU: the number of arguments, their sizes, their kinds and what pointers point to must be the
kernel's, a pointer to something the kernel may write must be given an array that may be written,
and a barrier that some threads of a block do not reach is an error. See ``cuda.h`` for how threads
run.
"""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

HEADER = Path(__file__).with_name("cuda.h")
ORDERS = ("forward", "reverse", "shuffled")
VARIABLE = "PORTACNN_EMULATOR_ORDER"
MOST_THREADS, MOST_BLOCKS = 1024, (2**31 - 1, 65535, 65535)  # of every CUDA device so far
_FLAGS = (
    *("-std=c++17", "-O2", "-march=native", "-fPIC", "-shared", "-w", "-fno-strict-aliasing"),
    # both take a jump to another stack for an attack
    *("-U_FORTIFY_SOURCE", "-fcf-protection=none"),
)
_NAMES = re.compile(r'extern\s*"C"\s*__global__[^({;]*?(\w+)\s*\(')
_C_NAMES = re.compile(r'extern\s*"C"')

_lock = Lock()  # the fibres of a module are its own, but they are one set
_order = [os.environ.get(VARIABLE) or "forward", 0]


class CompileError(Exception):
    """The host's compiler refused the source; its words."""


class LaunchError(Exception):
    """What CUDA would refuse, compute wrongly or leave undefined."""


@contextmanager
def thread_order(order: str, seed: int = 0) -> Iterator[None]:
    """Within: blocks run, and in each its threads, forward, in reverse, or shuffled, anew from
    barrier to barrier."""
    if order not in ORDERS:
        raise ValueError(f"an order of threads is one of {', '.join(ORDERS)}; got {order!r}")
    before = _order.copy()
    _order[:] = order, seed
    try:
        yield
    finally:
        _order[:] = before


@cache
def compiler() -> tuple[str, ...] | None:
    """The command of a C++ compiler: ``$CXX``, g++, clang++ or ziglang's; None where there is
    none."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (found := shutil.which(name.split()[0])):
            return (found, *name.split()[1:])
    return (sys.executable, "-m", "ziglang", "c++") if find_spec("ziglang") else None


NO_COMPILER = (
    "no C++ compiler to run CUDA kernels on the host with: install g++, clang++ or the "
    "package ziglang"
)


@cache
def _folder() -> Path:
    """Where compiled modules are kept: our own folder, which nobody else may write to."""
    folder = Path(tempfile.gettempdir()) / f"portacnn-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.stat()
    return (
        folder
        if state.st_uid == os.getuid() and not state.st_mode & 0o022
        else Path(tempfile.mkdtemp())
    )


def _run(command: tuple[str, ...], source: str) -> str:
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


@cache
def _library(code: str, options: tuple[str, ...]) -> ctypes.CDLL:
    command = compiler()
    if command is None:
        raise CompileError(NO_COMPILER)
    kept = tuple(option for option in options if option.startswith(("-D", "-I")))
    headers = (path.read_text() for path in sorted(HEADER.parent.glob("*.h")))
    parts = (code, *kept, *headers, *command, *_FLAGS, platform.machine(), platform.node())
    target = _folder() / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()}.so"
    if not target.exists():
        # Preprocessed first: names of kernels may be put together by macros.
        plain = _run(
            (*command, "-x", "c++", "-E", "-P", "-w", "-D__launch_bounds__(...)=", *kept, "-"), code
        )
        enter = "".join(
            f"EMULATED_KERNEL({name})\n" for name in dict.fromkeys(_NAMES.findall(plain))
        )
        # In a namespace and with C++ names: a kernel may be called as the host's C library calls
        # something else.
        body = f'namespace kernels {{\n#line 1 "kernels.cu"\n{_C_NAMES.sub("", code)}\n}}'
        # Defined only behind the header, whose own names a define may be.
        defines = "".join(
            f"#define {option[2:].replace('=', ' ', 1)}\n"
            for option in kept
            if option.startswith("-D")
        )
        folders = (option for option in kept if option.startswith("-I"))
        source = f'#include "{HEADER}"\n{defines}{body}\n{enter}'
        part = target.with_name(f"{target.stem}.{os.getpid()}.part")
        _run((*command, *_FLAGS, *folders, "-x", "c++", "-", "-o", str(part)), source)
        part.replace(target)
    return ctypes.CDLL(str(target))


class Module:
    """As ``cupy.RawModule``: compiles at once. Options other than -D and -I are for NVRTC alone and
    left out."""

    def __init__(self, code: str, options: tuple[str, ...] = (), **_: Any) -> None:
        self._library = _library(code, tuple(options))

    def get_function(self, name: str) -> "Function":
        """The kernel ``extern "C" __global__ void name(...)``. Raises LaunchError where there is
        none."""
        return Function(name, self._library)


class Function:
    """A kernel. ``grid`` and ``block`` have one to three numbers; see the module for ``args``."""

    def __init__(self, name: str, library: ctypes.CDLL) -> None:
        try:
            self._launch = library[f"emulated_launch_{name}"]
            signature = library[f"emulated_signature_{name}"]
        except AttributeError:
            raise LaunchError(f"no kernel {name}") from None
        signature.restype = ctypes.c_char_p
        letters = signature().decode()
        self.name = name
        self.parameters = tuple(letters[i : i + 3] for i in range(0, len(letters), 3))

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple, shared_mem: int = 0
    ) -> None:
        sizes = [*grid, *[1] * (3 - len(grid)), *block, *[1] * (3 - len(block))]
        threads = sizes[3] * sizes[4] * sizes[5]
        if len(sizes) != 6 or min(sizes) < 1 or threads > MOST_THREADS or shared_mem:
            raise LaunchError(
                f"{self.name}: grid {grid}, block {block}, {shared_mem} bytes: not to be launched"
            )
        if any(n > most for n, most in zip(sizes, MOST_BLOCKS, strict=False)):
            raise LaunchError(f"{self.name}: a grid of {grid} is too large; at most {MOST_BLOCKS}")
        if len(args) != len(self.parameters):
            raise LaunchError(
                f"{self.name} takes {len(self.parameters)} arguments, got {len(args)}"
            )
        values = [
            self._value(i, arg, want)
            for i, (arg, want) in enumerate(zip(args, self.parameters, strict=True))
        ]
        pointers = (ctypes.c_void_p * len(values))(*[v.ctypes.data for v in values])
        report = (ctypes.c_int * 5)()
        order, seed = _order
        with _lock:
            status = self._launch(
                pointers,
                (ctypes.c_uint * 6)(*sizes),
                ORDERS.index(order),
                ctypes.c_ulonglong(seed),
                report,
            )
        if status:
            x, y, z, one, other = report
            ends = " and ".join("the end" if mark < 0 else f"line {mark}" for mark in (one, other))
            raise LaunchError(
                f"{self.name}: barrier not reached by all threads of block {(x, y, z)}: {ends}"
            )

    def _value(self, place: int, arg: Any, want: str) -> np.ndarray:
        """The argument as CuPy would hand it to CUDA: its bytes, in an array of one number."""
        where = f"{self.name}, argument {place}"
        if arg is None:
            arg = np.uint64(0)
        address, dtype, writable = _address(arg)
        if address is not None:
            if want[0] not in "pP":
                raise LaunchError(f"{where}: got an array where the kernel takes a number ({want})")
            if want[0] == "P" and not writable:
                raise LaunchError(
                    f"{where}: the kernel may write there, and the array is read-only"
                )
            if (
                want[1] != "-"
                and dtype is not None
                and (_letter(dtype), str(dtype.itemsize)) not in _takes(want)
            ):
                raise LaunchError(
                    f"{where}: got an array of {dtype} where the kernel has {want[1:]}"
                )
            return np.array([address], np.uint64)
        if isinstance(arg, bool | int | float):  # as CuPy: a bool, a long long or a double
            arg = (
                np.bool_(arg)
                if isinstance(arg, bool)
                else np.int64(arg)
                if isinstance(arg, int)
                else np.float64(arg)
            )
        if not isinstance(arg, np.generic):
            raise LaunchError(f"{where}: CuPy could not hand over a {type(arg).__name__}")
        if want[0] in "pP":
            if not (isinstance(arg, np.uint64) and arg == 0):
                raise LaunchError(
                    f"{where}: got {arg!r} where the kernel takes a pointer: an "
                    "array, or np.uint64(0)"
                )
        elif (_letter(arg.dtype), str(arg.dtype.itemsize)) not in _takes(want):
            raise LaunchError(f"{where}: got {arg!r} where the kernel takes {want[1:]}")
        return np.array([arg])


def _address(arg: Any) -> tuple[int | None, np.dtype | None, bool]:
    """Where the array lies, its dtype, and whether it may be written; no address for anything
    else."""
    if isinstance(arg, np.ndarray):
        return arg.ctypes.data, arg.dtype, arg.flags.writeable
    if isinstance(arg, np.generic):
        return None, None, False
    memory = getattr(arg, "data", None)
    if hasattr(memory, "ptr"):
        return memory.ptr, arg.dtype, True
    return (arg.ptr, None, True) if hasattr(arg, "ptr") else (None, None, False)


def _letter(dtype: np.dtype) -> str:
    return {"u": "i"}.get(dtype.kind, dtype.kind)


def _takes(want: str) -> set[tuple[str, str]]:
    """A bool is a byte to CUDA."""
    return {("b", "1"), ("i", "1")} if want[1:] in ("b1", "i1") else {(want[1], want[2])}
