"""The emulator that runs CUDA kernels on the host: it computes what they say, and shows what is wrong with them."""

import numpy as np
import pytest
from cuda_emulator.emulator import NO_COMPILER, ORDERS, CompileError, LaunchError, Module, compiler, thread_order

pytestmark = pytest.mark.skipif(compiler() is None, reason=NO_COMPILER)

CODE = """
#define KERNEL(name) extern "C" __global__ void __launch_bounds__(64) name(const REAL* __restrict__ x, REAL* y, int n, bool on)
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
    with pytest.raises(LaunchError, match=r"block \(0, 0, 0\): line 14 and the end"):
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


@pytest.mark.parametrize(("grid", "block"), [((1,), (2048,)), ((0,), (64,)), ((1, 70000), (64,)), ((1,), (64, 64))])
def test_wrong_sizes(grid: tuple, block: tuple):
    with pytest.raises(LaunchError):
        Module(CODE, OPTIONS).get_function("reversed")(grid, block, (X, X.copy(), np.int32(1), True))


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
