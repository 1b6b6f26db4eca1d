"""Compile CUDA sources as CuPy does, without a GPU or a driver: NVRTC through ctypes, and NVIDIA's
disassembler.

Both are packages: ``pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-nvdisasm``.
"""

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
import time
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

AS_CUPY = ("-ftz=true",)  # what CuPy adds to the options of a RawModule
NO_NVRTC = "NVRTC is not installed: pip install nvidia-cuda-nvrtc-cu12"
NO_DISASSEMBLER = (
    "nvdisasm is not installed: pip install nvidia-cuda-nvdisasm, or have a CUDA toolkit on PATH"
)


class CompileError(Exception):
    """Raised if NVRTC rejects the source; has its log."""


class Compiled(NamedTuple):
    """What NVRTC returns. ``code`` is a cubin for an ``sm_`` architecture, and the PTX's text for a
    ``compute_`` one."""

    code: bytes
    log: str
    seconds: float


def _folders() -> list[Path]:
    """Return the folders of NVIDIA's packages."""
    spec = find_spec("nvidia")
    return [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []


@cache
def library() -> ctypes.CDLL | None:
    """Return NVRTC: the library at ``$NVRTC``, else that of its package; None if there is none."""
    if chosen := os.environ.get("NVRTC"):
        return ctypes.CDLL(chosen)
    found = [path for folder in _folders() for path in sorted(folder.glob("*/lib/libnvrtc.so.*"))]
    return ctypes.CDLL(str(found[0])) if found else None


@cache
def disassembler() -> str | None:
    """Return the path of nvdisasm: on PATH, else of its package; None if there is none."""
    found = [str(path) for folder in _folders() for path in sorted(folder.glob("*/bin/nvdisasm"))]
    return shutil.which("nvdisasm") or next(iter(found), None)


def version() -> str:
    """Return the version of NVRTC: ``12.9``."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _loaded().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def _loaded() -> ctypes.CDLL:
    nvrtc = library()
    if nvrtc is None:
        raise CompileError(NO_NVRTC)
    return nvrtc


def compiled(source: str, options: tuple[str, ...], architecture: str = "sm_90") -> Compiled:
    """Compile a source; ptxas reports registers and spills in the log.

    Args:
        architecture: ``sm_90`` and similar for machine code, ``compute_90`` for PTX.

    Raises:
        CompileError: with NVRTC's log.
    """
    nvrtc, program = _loaded(), ctypes.c_void_p()
    more = ("--ptxas-options=-v",) if architecture.startswith("sm_") else ()
    options = (*options, f"--gpu-architecture={architecture}", *AS_CUPY, *more)
    if nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None
    ):
        raise CompileError("NVRTC made no program")
    try:
        given = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        start = time.perf_counter()
        status = nvrtc.nvrtcCompileProgram(program, len(options), given)
        seconds = time.perf_counter() - start
        log = (
            _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            .decode()
            .rstrip("\0")
        )
        if status:
            raise CompileError(f"{' '.join(options)}\n{log}")
        kind = "CUBIN" if architecture.startswith("sm_") else "PTX"
        code = _text(
            getattr(nvrtc, f"nvrtcGet{kind}Size"), getattr(nvrtc, f"nvrtcGet{kind}"), program
        )
        return Compiled(code, log, seconds)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(size_of, read, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    read(program, buffer)
    return buffer.raw


def spills(log: str) -> list[int]:
    """Return the bytes of spilled registers of each kernel, as reported by ptxas."""
    return [int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]


def disassembled(cubin: bytes) -> str:
    """Return SASS, one instruction per line. Raises CompileError if there is no disassembler, or it
    fails.
    """
    command = disassembler()
    if command is None:
        raise CompileError(NO_DISASSEMBLER)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [command, "-c", file.name], capture_output=True, text=True, check=False, timeout=120
        )
    if done.returncode:
        raise CompileError(done.stderr)
    return done.stdout
