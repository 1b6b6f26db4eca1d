"""Every CUDA source, with every set of defines that it is used with, through NVRTC to machine code:
no GPU is needed for that.

Registers that spill to memory are a mistake in a kernel's plan, so none may.
"""

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import portacnn.backends
from portacnn.backends.cupy import nvrtc as cupy_module
from portacnn.backends.cupy.plan import TILES, YIELDS
from portacnn.ops.dispatch import PRECISIONS

sys.path.append(str(Path(__file__).resolve().parents[3] / "scripts" / "gpu"))

import nvrtc
import sass

from support.matrix import needs

FOLDER = Path(portacnn.backends.__file__).parent
SOURCES = {path.name for path in (FOLDER / "cupy" / "cuda").glob("*.cu")}


def used() -> Iterator[cupy_module.Variant]:
    for path in sorted((FOLDER / "cupy").glob("*.py")):
        yield from getattr(import_module(f"portacnn.backends.cupy.{path.stem}"), "VARIANTS", ())


VARIANTS = list(used())


def _slow(defines: dict[str, Any], dtype: str) -> bool:
    """All but the products that most layers run: in float32, by whole steps of depth, four numbers
    to a load."""
    usual = {"BY_TAP": 2, "VEC": 4, "STRIDED": 0, "A_MASK": 0, "B_MASK": 0}
    product = "TM" in defines
    unusual = any(defines.get(key, value) != value for key, value in usual.items())
    return product and (unusual or "PRECISION" in defines or dtype != "float32")


def _cases() -> list[Any]:
    """All in float32 and float64 as they are; of those for tensor cores, which load alike, and of
    products, one in so many."""
    all_of_them = [
        (*variant, dtype) for variant in VARIANTS for dtype in cupy_module.dtypes(variant[1])
    ]
    rounded = [case for case in all_of_them if "PRECISION" in case[1]]
    chosen = [case for case in all_of_them if "PRECISION" not in case[1]] + rounded[::7]
    return [
        pytest.param(file, defines, dtype, marks=pytest.mark.slow if _slow(defines, dtype) else ())
        for file, defines, dtype in chosen
    ]


CASES = _cases()
SOME_CASES = CASES[::7]  # for other architectures: the code is the same, and registers are as many


def name(value: object) -> str:
    return "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def check_compiles(file: str, defines: dict[str, Any], dtype: str, architecture: str) -> None:
    log = nvrtc.compiled(
        cupy_module.source(file), cupy_module.options(dtype, defines), architecture
    ).log
    assert "warning" not in log, log
    assert nvrtc.spills(log), f"no word of registers in the log: {log!r}"
    assert not any(nvrtc.spills(log)), log


@needs("nvrtc")
@pytest.mark.parametrize(("file", "defines", "dtype"), CASES, ids=name)
def test_compiles_without_spilling(file: str, defines: dict, dtype: str):
    check_compiles(file, defines, dtype, "sm_90")


@needs("nvrtc")
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_100"])
@pytest.mark.parametrize(("file", "defines", "dtype"), SOME_CASES, ids=name)
def test_compiles_for_other_architectures(file: str, defines: dict, dtype: str, architecture: str):
    check_compiles(file, defines, dtype, architecture)


def test_the_main_loop_is_the_shortest_with_most_products():
    lines = [
        "MOV R1, R2",
        ".L_x_0:",
        "FADD R1, R1, R2",
        ".L_x_1:",
        "FFMA R0, R1, R2, R0",
        "@!P0 LDG.E R1, [R2.64]",
    ]
    lines += [
        "@P1 BRA `(.L_x_1)",
        "@P0 BRA `(.L_x_0)",
        ".L_x_2:",
        "IADD3 R1, R1, 1, RZ",
        "BRA `(.L_x_2)",
        "EXIT",
    ]
    text = "\n".join(
        line if line.startswith(".L") else f"        /*0010*/                   {line} ;"
        for line in lines
    )
    assert sass.main_loop(text) == (["FFMA", "LDG.E", "BRA"], 9)


FLOORS = {  # shares of products in the main loop: scripts/gpu/sass.py
    "forward": {
        "FEW": 0.65,
        "SOME": 0.65,
        "SMALL": 0.55,
        "SQUARE": 0.65,
        "WIDE": 0.75,
        "LARGE": 0.8,
    },
    "input": {"FEW": 0.65, "SOME": 0.65, "SMALL": 0.55, "SQUARE": 0.65, "WIDE": 0.75, "LARGE": 0.8},
    "weight": {"TINY": 0.55, "NARROW": 0.55, "SMALL": 0.6, "SQUARE": 0.65},
}


@needs("disassembler")
@pytest.mark.parametrize(
    ("kernel", "tile"),
    [
        pytest.param(
            kernel, tile, marks=() if tile in ("FEW", "SOME", "NARROW") else pytest.mark.slow
        )
        for kernel, floors in FLOORS.items()
        for tile in floors
    ],
)
def test_most_of_a_main_loop_is_products(kernel: str, tile: str):
    defines = {**sass.USUAL[kernel], **TILES[tile].defines}
    got = sass.count(
        cupy_module.source("conv.cu"), cupy_module.options("float32", defines), "sm_90"
    )
    assert got.product >= 16 * 16, "the main loop was not found"
    assert got.share >= FLOORS[kernel][tile]
    assert set(FLOORS[kernel]) == set(YIELDS[kernel])


@needs("nvrtc")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_tensor_cores_instructions(precision: str):
    """They are in the code where they were asked for, and nowhere else."""
    number = PRECISIONS.index(precision)
    more = {"PRECISION": number} if number else {}
    defines = {
        "A_DEEP": 1,
        "B_DEEP": 0,
        "A_MASK": 0,
        "B_MASK": 0,
        **TILES["SQUARE"].defines,
        **more,
    }
    code = nvrtc.compiled(
        cupy_module.source("gemm.cu"), cupy_module.options("float32", defines), "compute_80"
    ).code
    used = set(re.findall(r"(?:mma\.sync|cvt\.rna?)\.[\w.]+", code.decode()))
    assert (
        used
        == {
            "float32": set(),
            "tf32": {"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", "cvt.rna.tf32.f32"},
            "3xtf32": {"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", "cvt.rna.tf32.f32"},
            "bfloat16": {
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
                "cvt.rn.bf16x2.f32",
            },
            "float16": {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "cvt.rn.f16x2.f32"},
        }[precision]
    )


def test_every_source_is_listed():
    assert {file for file, _ in VARIANTS} == SOURCES


@needs("nvrtc")
def test_what_is_wrong_is_refused():
    with pytest.raises(nvrtc.CompileError, match="undefined"):
        nvrtc.compiled('extern "C" __global__ void k(float* x) { x[0] = nothing; }', ())


@needs("nvrtc")
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
    assert any(nvrtc.spills(nvrtc.compiled(code, ()).log))
