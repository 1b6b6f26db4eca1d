"""The emulator that runs CUDA kernels on the host: it computes what they say, and shows what is
wrong with them."""

from pathlib import Path

import numpy as np
import pytest

import portacnn.backends
from support.cuda_emulator.emulator import (
    ORDERS,
    CompileError,
    LaunchError,
    Module,
    thread_order,
)
from support.cuda_rig import rounded
from support.matrix import needs

pytestmark = needs("compiler")

CODE = """
#define C_KERNEL extern "C" __global__ void __launch_bounds__(64)
#define KERNEL(name) C_KERNEL name(const REAL* __restrict__ x, REAL* y, int n, bool on)
KERNEL(reversed) {
  __shared__ REAL s[64];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (on) s[threadIdx.x] = i < n ? x[i] : 0;
#ifndef FORGOTTEN
  __syncthreads();
#endif
  if (i < n) y[i] = s[63 - threadIdx.x];
}
extern "C" __global__ void __launch_bounds__(sizeof(REAL) > 4 ? 32 : (64)) log(float* y, int n) {
  for (int i = 0; i < n; i++) {
    if (threadIdx.x < blockIdx.x + 3) __syncthreads();
    y[threadIdx.x + threadIdx.y * blockDim.x] = blockIdx.z * 10 + threadIdx.y;
  }
}
"""
OPTIONS = ("-DREAL=float",)


def run(options: tuple[str, ...] = OPTIONS, on: bool = True) -> np.ndarray:
    x, y = np.arange(100, dtype="float32"), np.full(100, np.nan, "float32")
    Module(CODE, options).get_function("reversed")((2,), (64,), (x, y, np.int32(100), np.bool_(on)))
    return y


WANTED = np.concatenate([np.arange(63, -1, -1), [0] * 28, np.arange(99, 91, -1)])


@pytest.mark.parametrize("order", ORDERS)
def test_threads_share_memory_across_a_barrier(order: str):
    with thread_order(order, 3):
        np.testing.assert_array_equal(run(), WANTED)


def test_a_missing_barrier_shows():
    wrong = 0
    for order in ORDERS:
        with thread_order(order):
            wrong += not np.array_equal(run((*OPTIONS, "-DFORGOTTEN")), WANTED)
    assert wrong == 3


def test_shared_memory_begins_poisoned():
    assert np.isnan(run(on=False)).all()


def test_a_barrier_that_some_threads_do_not_reach():
    log = Module(CODE, OPTIONS).get_function("log")
    y = np.zeros(8, "float32")
    with pytest.raises(LaunchError, match=r"block \(0, 0, 0\): line 15 and the end"):
        log((1,), (4,), (y, np.int32(1)))
    log((1, 1, 2), (2, 4), (y, np.int32(2)))  # and it goes on afterwards
    np.testing.assert_array_equal(y, [10, 10, 11, 11, 12, 12, 13, 13])


X = np.zeros(100, "float32")
READ_ONLY = np.zeros(100, "float32")
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ((X, X, 100, True), "argument 2: got np.int64"),
        ((X, X, np.float32(1), True), "argument 2: got np.float32"),
        ((X, X.astype("float64"), np.int32(1), True), "argument 1: got an array of float64"),
        ((X, READ_ONLY, np.int32(1), True), "argument 1: .* read-only"),
        ((X, np.uint64(8), np.int32(1), True), "argument 1: .* takes a pointer"),
        ((X, X, X, True), "argument 2: got an array"),
        ((X, X, "1", True), "could not hand over a str"),
        ((X, X, np.int32(1)), "takes 4 arguments, got 3"),
    ],
)
def test_wrong_arguments(args: tuple, problem: str):
    with pytest.raises(LaunchError, match=problem):
        Module(CODE, OPTIONS).get_function("reversed")((1,), (64,), args)


@pytest.mark.parametrize(
    ("grid", "block"), [((1,), (2048,)), ((0,), (64,)), ((1, 70000), (64,)), ((1,), (64, 64))]
)
def test_wrong_sizes(grid: tuple, block: tuple):
    with pytest.raises(LaunchError):
        Module(CODE, OPTIONS).get_function("reversed")(
            grid, block, (X, X.copy(), np.int32(1), True)
        )


def test_an_absent_array_is_a_null_pointer():
    code = 'extern "C" __global__ void k(const float* x, float* y) { y[0] = x ? 1 : 2; }'
    for arg in (np.uint64(0), None):
        y = np.zeros(1, "float32")
        Module(code).get_function("k")((1,), (1,), (arg, y))
        assert y[0] == 2


def test_no_such_kernel():
    with pytest.raises(LaunchError, match="no kernel nothing"):
        Module(CODE, OPTIONS).get_function("nothing")


def test_the_compilers_words_come_through():
    with pytest.raises(CompileError, match="unknown_name"):
        Module('extern "C" __global__ void k(float* x) { x[0] = unknown_name; }')


# --- warps and tensor cores -----------------------------------------------------------------------

WARPS = """
extern "C" __global__ void turned(float* y, int n) {
  __shared__ float s[64];
  int i = threadIdx.x;
  for (int round = 0; round < 3; round++) {
    s[i] = i + 100 * round;
    __syncwarp();
    y[i] = s[i ^ OTHER];
    __syncwarp();
  }
}
extern "C" __global__ void left_alone(float* y, int n) {
  if (threadIdx.x != 40) __syncwarp();
  if (n) __syncthreads();
  y[threadIdx.x] = 1;
}
"""


def turned(other: int, order: str) -> np.ndarray:
    y = np.zeros(64, "float32")
    with thread_order(order):
        Module(WARPS, (f"-DOTHER={other}",)).get_function("turned")((1,), (64,), (y, np.int32(64)))
    return y


@pytest.mark.parametrize("order", ORDERS)
def test_a_warps_threads_share_memory_across_their_barrier(order: str):
    np.testing.assert_array_equal(turned(31, order), (np.arange(64) ^ 31) + 200)


def test_a_warps_barrier_does_not_hold_the_others():
    wanted = (np.arange(64) ^ 32) + 200
    assert not all(np.array_equal(turned(32, order), wanted) for order in ORDERS)


@pytest.mark.parametrize(("n", "met"), [(0, "the end and line 13"), (1, "line 14 and line 13")])
def test_a_warps_barrier_that_one_thread_does_not_reach(n: int, met: str):
    module, y = Module(WARPS, ("-DOTHER=1",)), np.zeros(64, "float32")
    with pytest.raises(LaunchError, match=met):
        module.get_function("left_alone")((1,), (64,), (y, np.int32(n)))
    module.get_function("turned")((1,), (64,), (y, np.int32(64)))  # and it goes on afterwards
    np.testing.assert_array_equal(y, (np.arange(64) ^ 1) + 200)


MMA = (Path(portacnn.backends.__file__).parent / "cupy" / "cuda" / "mma.cuh").read_text()
CORES = (
    MMA
    + """
extern "C" __global__ void round_factors(const float* x, unsigned* y) {
  int i = threadIdx.x;
  y[i] = factor_of(x[2 * i], x[2 * i + 1]);
}
extern "C" __global__ void multiply(const unsigned* a, const unsigned* b, float* c) {
  int i = threadIdx.x;
  unsigned own[4], other[2];
  for (int r = 0; r < 4; r++) own[r] = a[4 * i + r];
  for (int r = 0; r < 2; r++) other[r] = b[2 * i + r];
  mma(c[4 * i], c[4 * i + 1], c[4 * i + 2], c[4 * i + 3], own, other);
  mma(c[4 * i], c[4 * i + 1], c[4 * i + 2], c[4 * i + 3], own, other);
}
"""
)
WORDS = {"tf32": 1, "bfloat16": 2, "float16": 3}


def cores(precision: str) -> Module:
    return Module(CORES, (f"-DPRECISION={WORDS[precision]}",))


def decoded(registers: np.ndarray, precision: str) -> np.ndarray:
    """(n,) registers -> (n, numbers in each)."""
    if precision == "tf32":
        return registers.view("float32")[:, None]
    halves = registers.view("uint16").reshape(-1, 2)  # the lower one first
    return (
        halves.view("float16")
        if precision == "float16"
        else (halves.astype("uint32") << 16).view("float32")
    )


@pytest.mark.parametrize("precision", WORDS)
def test_factors_are_rounded_to_the_nearest(precision: str):
    rng = np.random.default_rng(0)
    ties = [s * (1 + (2 * k + 1) / 2**bits) for s in (1, -1) for k in range(4) for bits in (8, 11)]
    edges = [
        0,
        -0.0,
        np.inf,
        -np.inf,
        np.nan,
        65504,
        65519.99,
        65520,
        -70000,
        3.4e38,
        2**-14,
        2**-24,
        2**-25,
        1.5 * 2**-24,
    ]
    edges += [2.5 * 2**-24, -1e-8, 2**-14 * (1 - 2**-12), 1 - 2**-13, 2 - 2**-12]
    drawn = np.concatenate([rng.standard_normal(500), np.exp(rng.uniform(-30, 30, 477))])
    x = np.concatenate([ties, edges, drawn])
    x = x[: len(x) // 2 * 2].astype("float32")
    y = np.zeros(len(x) // 2, "uint32")
    cores(precision).get_function("round_factors")((1,), (len(y),), (x, y))
    got = decoded(y, precision)
    np.testing.assert_array_equal(got, rounded(x.reshape(-1, 2), precision)[:, : got.shape[1]])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("precision", WORDS)
def test_fragments_lie_as_ptx_has_them(precision: str, order: str):
    """Against the lists of the PTX ISA, lane by lane; all numbers are small and whole, so that
    nothing is rounded."""
    rng = np.random.default_rng(1)
    depth = 8 if precision == "tf32" else 16
    a, b, c = (
        rng.integers(-9, 10, shape).astype("float32")
        for shape in ((16, depth), (depth, 8), (16, 8))
    )
    lanes = [(lane // 4, lane % 4) for lane in range(32)]
    if precision == "tf32":
        own = np.array(
            [[a[g, t], a[g + 8, t], a[g, t + 4], a[g + 8, t + 4]] for g, t in lanes]
        ).view("uint32")
        other = np.array([[b[t, g], b[t + 4, g]] for g, t in lanes]).view("uint32")
    else:
        rows = [
            [
                a[g, 2 * t :][:2],
                a[g + 8, 2 * t :][:2],
                a[g, 2 * t + 8 :][:2],
                a[g + 8, 2 * t + 8 :][:2],
            ]
            for g, t in lanes
        ]
        columns = [[b[2 * t : 2 * t + 2, g], b[2 * t + 8 : 2 * t + 10, g]] for g, t in lanes]
        own, other = (_packed(np.array(numbers), precision) for numbers in (rows, columns))
    sums = np.array(
        [[c[g, 2 * t], c[g, 2 * t + 1], c[g + 8, 2 * t], c[g + 8, 2 * t + 1]] for g, t in lanes]
    )
    with thread_order(order, 5):
        cores(precision).get_function("multiply")((1,), (32,), (own, other, sums))
    wanted = 2 * (a @ b) + c
    for (g, t), got in zip(lanes, sums, strict=True):
        np.testing.assert_array_equal(got.reshape(2, 2), wanted[g::8, 2 * t : 2 * t + 2])


def _packed(pairs: np.ndarray, precision: str) -> np.ndarray:
    """(lanes, registers, 2) of float32 -> (lanes, registers)."""
    bits = (
        pairs.astype("float16").view("uint16")
        if precision == "float16"
        else pairs.view("uint32") >> 16
    )
    return np.ascontiguousarray(bits[..., 0].astype("uint32") | bits[..., 1].astype("uint32") << 16)
