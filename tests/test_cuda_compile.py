"""Every CUDA source, with every set of defines that it is used with, through NVRTC to machine code: no GPU is needed for that.

Registers that spill to memory are a mistake in a kernel's plan, so none may.
"""

import ctypes
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import portacnn.backends
from portacnn.backends import cupy_module

FOLDER = Path(portacnn.backends.__file__).parent
SOURCES = {path.name for path in (FOLDER / "cuda").glob("*.cu")}
ARCHITECTURES = ["sm_90", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sm_80", "sm_100"))]
DTYPES = ("float32", "float64")
AS_CUPY = ("-ftz=true",)  # what CuPy adds to the options of a RawModule


def used() -> Iterator[cupy_module.Variant]:
    for path in sorted(FOLDER.glob("cupy_*.py")):
        yield from getattr(import_module(f"portacnn.backends.{path.stem}"), "VARIANTS", ())


VARIANTS = list(used())


@cache
def library() -> ctypes.CDLL | None:
    """NVRTC of the package nvidia-cuda-nvrtc-cu12."""
    spec = find_spec("nvidia")
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    found = [path for folder in folders for path in sorted(folder.glob("cuda_nvrtc/lib/libnvrtc.so.*"))]
    return ctypes.CDLL(str(found[0])) if found else None


needs_nvrtc = pytest.mark.skipif(library() is None, reason="needs NVRTC: pip install nvidia-cuda-nvrtc-cu12")


def compiled(code: str, options: tuple[str, ...]) -> str:
    """The compiler's log. Raises AssertionError with it where it refuses."""
    nvrtc = library()
    assert nvrtc is not None
    program = ctypes.c_void_p()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), code.encode(), b"kernels.cu", 0, None, None) == 0
    try:
        given = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        status = nvrtc.nvrtcCompileProgram(program, len(options), given)
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        assert status == 0, f"{options}\n{log.value.decode()}"
        return log.value.decode()
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def spills(log: str) -> list[int]:
    """Bytes of every kernel that its registers could not hold, as ptxas tells them."""
    return [int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]


def name(value: object) -> str:
    return "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("file", "defines"), VARIANTS, ids=name)
def test_compiles_without_spilling(file: str, defines: dict, dtype: str, architecture: str):
    options = (
        *cupy_module.options(dtype, defines),
        f"--gpu-architecture={architecture}",
        *AS_CUPY,
        "--ptxas-options=-v",
    )
    log = compiled(cupy_module.source(file), options)
    assert "warning" not in log, log
    assert spills(log), f"no word of registers in the log: {log!r}"
    assert not any(spills(log)), log


def test_every_source_is_listed():
    assert {file for file, _ in VARIANTS} == SOURCES


@needs_nvrtc
def test_what_is_wrong_is_refused():
    with pytest.raises(AssertionError, match="undefined"):
        compiled('extern "C" __global__ void k(float* x) { x[0] = nothing; }', ("--gpu-architecture=sm_90",))


@needs_nvrtc
def test_spills_are_seen():
    code = """extern "C" __global__ void __launch_bounds__(1024, 2) k(float* x) {
      float a[64];
      #pragma unroll
      for (int i = 0; i < 64; i++) a[i] = x[i * 1024 + threadIdx.x];
      for (int j = 0; j < 9; j++) {
        #pragma unroll
        for (int i = 0; i < 64; i++) a[i] = a[i] * a[(i + 7) % 64] + x[j];
      }
      #pragma unroll
      for (int i = 0; i < 64; i++) x[i * 1024 + threadIdx.x] = a[i];
    }"""
    assert any(spills(compiled(code, ("--gpu-architecture=sm_90", "--ptxas-options=-v"))))
