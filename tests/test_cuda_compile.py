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
from portacnn.backends.cupy import nvrtc as cupy_module
from portacnn.backends.cupy.plan import SPLIT_TILES
from portacnn.ops.dispatch import PRECISIONS

FOLDER = Path(portacnn.backends.__file__).parent
SOURCES = {path.name for path in (FOLDER / "cupy" / "cuda").glob("*.cu")}
ARCHITECTURES = ["sm_90", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sm_80", "sm_100"))]
AS_CUPY = ("-ftz=true",)  # what CuPy adds to the options of a RawModule


def used() -> Iterator[cupy_module.Variant]:
    for path in sorted((FOLDER / "cupy").glob("*.py")):
        yield from getattr(import_module(f"portacnn.backends.cupy.{path.stem}"), "VARIANTS", ())


VARIANTS = list(used())
CASES = [
    # float16's code is bfloat16's but for two instructions, which test_the_tensor_cores_instructions finds.
    pytest.param(file, defines, dtype, marks=pytest.mark.slow if defines.get("PRECISION") == 3 else ())
    for file, defines in VARIANTS
    for dtype in cupy_module.dtypes(defines)
]


@cache
def library() -> ctypes.CDLL | None:
    """NVRTC of the package nvidia-cuda-nvrtc-cu12."""
    spec = find_spec("nvidia")
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    found = [path for folder in folders for path in sorted(folder.glob("cuda_nvrtc/lib/libnvrtc.so.*"))]
    return ctypes.CDLL(str(found[0])) if found else None


needs_nvrtc = pytest.mark.skipif(library() is None, reason="needs NVRTC: pip install nvidia-cuda-nvrtc-cu12")


def compiled(code: str, options: tuple[str, ...], ptx: list[str] | None = None) -> str:
    """The compiler's log; ``ptx`` is given the PTX. Raises AssertionError with the log where it refuses."""
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
        if ptx is not None:
            nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
            text = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetPTX(program, text)
            ptx.append(text.value.decode())
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
@pytest.mark.parametrize(("file", "defines", "dtype"), CASES, ids=name)
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


@needs_nvrtc
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_tensor_cores_instructions(precision: str):
    """They are in the code where they were asked for, and nowhere else."""
    number = PRECISIONS.index(precision)
    more = {"PRECISION": number} if number else {}
    defines = {"A_DEEP": 1, "B_DEEP": 0, "A_MASK": 0, "B_MASK": 0, **SPLIT_TILES[0].defines, **more}
    options = (*cupy_module.options("float32", defines), "--gpu-architecture=compute_80")
    found: list[str] = []
    compiled(cupy_module.source("gemm.cu"), options, found)
    used = set(re.findall(r"(?:mma\.sync|cvt\.rna?)\.[\w.]+", found[0]))
    assert (
        used
        == {
            "float32": set(),
            "tf32": {"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", "cvt.rna.tf32.f32"},
            "bfloat16": {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "cvt.rn.bf16x2.f32"},
            "float16": {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "cvt.rn.f16x2.f32"},
        }[precision]
    )


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
