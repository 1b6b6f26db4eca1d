// The tile of a matrix product that a block computes: BM rows by BN columns in registers. Shared
// memory holds BK of depth at a time.
//
// THREADS / SLICES threads share the tile: TX of them across, each with TM rows by TN columns. If
// SLICES is above 1, each slice of threads computes the whole tile for every SLICES-th step of
// depth, and the sums are added at the end. Small tiles then have as many elements per thread as
// the others, and few reads of shared memory. Both factors are stored depth first in shared memory,
// twice: while one half is read, the other is filled. A warp is 4 threads high and 8 wide, so that
// it reads few rows and few columns, and a thread reads 16 bytes at a time.
//
// With PRECISION (see mma.cuh) tensor cores compute the same tile, and a thread has the elements of
// its fragments. In both cases they are ROWS by COLUMNS; own_row(i) and own_column(j) return their
// positions.
//
// Defines: REAL; TM, TN, TX, SLICES; POOL, 1 if four of a thread's columns must be the taps of a
// 2x2 window.
#pragma once
#define THREADS 256
#define BM (THREADS / SLICES / TX * TM)
#define BN (TX * TN)
#define PAD 4  // between rows of shared memory, avoids bank conflicts of stores

#if PRECISION
#include "mma.cuh"
constexpr int STEP = 16, BK = STEP;
#define RESIDENT 1  // blocks per multiprocessor; without it the compiler spills registers
#else
// Loads may treat one STEP of depth as a unit: the channels of one tap.
constexpr int STEP = sizeof(REAL) == 4 ? 16 : 8, BK = STEP * SLICES;
// The least number of blocks per multiprocessor. Of its 65,536 registers each of a block's 256
// threads then has 80 or 128, or as many as possible.
#define RESIDENT                                                   \
  (TM * TN * sizeof(REAL) <= 64                                ? 3 \
   : TM * TN * sizeof(REAL) <= (sizeof(REAL) == 4 ? 256 : 128) ? 2 \
                                                               : 1)
#endif

struct __align__(16) Left { REAL at[2][BK][BM + PAD]; };
struct __align__(16) Right { REAL at[2][BK][BN + PAD]; };

#if PRECISION
// Warps are arranged DOWN by ACROSS; each has fragments of 16 rows and of 8 columns.
#define DOWN (BM >= 32 ? 2 : 1)
#define ACROSS (THREADS / 32 / DOWN)
#define ROWS (BM / DOWN / 8)
#define COLUMNS (BN / ACROSS / 4)
#define TOGETHER 1  // adjacent columns of a thread
static_assert(
    sizeof(REAL) == 4 && BM % (16 * DOWN) == 0 && BN % (8 * ACROSS) == 0,
    "tensor cores have no such tile");

__device__ __forceinline__ int own_row(int i) {
  return threadIdx.x / 32 / ACROSS * (BM / DOWN) + 8 * i + threadIdx.x % 32 / 4;
}

// The first column of the warp.
__device__ __forceinline__ int first_column() {
  return threadIdx.x / 32 % ACROSS * (BN / ACROSS);
}

// The assignment of a tile's columns to fragment columns is free. Here the fragment columns 2 t and
// 2 t + 1 are the tile columns t and 4 + t, so that a thread's columns are evenly spaced, and four
// of them can be the taps of a window.
__device__ __forceinline__ int own_column(int j) {
  return first_column() + 4 * j + threadIdx.x % 4;
}

// The order of the depth is free too if both factors use the same: a thread takes 2 t and 2 t + 1
// of each eight. With PAD 4 there are no bank conflicts within a warp.
template <int LINE>
__device__ __forceinline__ Factor factor(const REAL (&tile)[BK][LINE], int deep, int part, int at) {
  const int k = deep + threadIdx.x % 4 * 2 + (MMA_DEPTH == 8 ? part : 8 * part);
  return factor_of(tile[k][at], tile[k + 1][at]);
}

__device__ __forceinline__ void multiply(
    const Left& left, const Right& right, int half, REAL (&sum)[ROWS][COLUMNS]) {
  const int g = threadIdx.x % 32 / 4, column = first_column() + g % 2 * 4 + g / 2;
#pragma unroll
  for (int deep = 0; deep < BK; deep += MMA_DEPTH) {
    Factor a[ROWS / 2][4];
#pragma unroll
    for (int i = 0; i < ROWS / 2; i++)
#pragma unroll
      for (int r = 0; r < 4; r++)
        a[i][r] = factor(left.at[half], deep, r / 2, own_row(2 * i + r % 2));
#pragma unroll
    for (int j = 0; j < COLUMNS; j += 2) {
      Factor b[2];
#pragma unroll
      for (int r = 0; r < 2; r++) b[r] = factor(right.at[half], deep, r, column + 4 * j);
#pragma unroll
      for (int i = 0; i < ROWS; i += 2)
        mma(sum[i][j], sum[i][j + 1], sum[i + 1][j], sum[i + 1][j + 1], a[i / 2], b);
    }
  }
}

struct Shared { Left left; Right right; };
#define IN_SLICE 0
#else
#define ROWS (TM / SLICES)
#define COLUMNS TN
constexpr int A_TOGETHER =
    TM < 16 / (int)sizeof(REAL) ? TM : 16 / (int)sizeof(REAL);  // rows read at once: 16 bytes
#if POOL
#define TOGETHER 1
#else
constexpr int TOGETHER =
    TN < 16 / (int)sizeof(REAL) ? TN : 16 / (int)sizeof(REAL);  // adjacent columns read at once
#endif
static_assert(TX % 8 == 0 && THREADS / SLICES / TX % 4 == 0 && TM % SLICES == 0, "no such tile");

// In a warp, lanes l and l ^ 1 are below each other and share columns; l and l ^ 2 are side by side
// and share rows. Reads of 16 bytes are then served for half a warp at once.
#define IN_SLICE (THREADS / SLICES)
__device__ __forceinline__ int thread() { return threadIdx.x % IN_SLICE; }
__device__ __forceinline__ int own_x() { return thread() / 32 % (TX / 8) * 8 + thread() % 16 / 2; }
__device__ __forceinline__ int own_y() {
  return thread() / 32 / (TX / 8) * 4 + thread() % 32 / 16 * 2 + thread() % 2;
}

__device__ __forceinline__ int own_row(int i) {
  return own_y() * TM + threadIdx.x / IN_SLICE * ROWS + i;
}
__device__ __forceinline__ int own_column(int j) {
#if POOL
  return j / 4 * (4 * TX) + own_x() / 4 * 16 + own_x() % 4 + 4 * (j % 4);
#else
  return j / TOGETHER * (TOGETHER * TX) + own_x() * TOGETHER + j % TOGETHER;
#endif
}

template <int COUNT>
struct __align__(COUNT * sizeof(REAL)) Neighbours { REAL value[COUNT]; };

__device__ __forceinline__ void multiply(
    const Left& left, const Right& right, int half, REAL (&sum)[TM][TN]) {
  const int slice = threadIdx.x / IN_SLICE;
#pragma unroll
  for (int step = 0; step < BK; step += SLICES) {
    const int k = step + slice;
    REAL a[TM], b[TN];
#pragma unroll
    for (int i = 0; i < TM; i += A_TOGETHER) {
      const auto rows =
          *reinterpret_cast<const Neighbours<A_TOGETHER>*>(&left.at[half][k][own_y() * TM + i]);
#pragma unroll
      for (int t = 0; t < A_TOGETHER; t++) a[i + t] = rows.value[t];
    }
#pragma unroll
    for (int j = 0; j < TN; j += TOGETHER) {
      const auto columns =
          *reinterpret_cast<const Neighbours<TOGETHER>*>(&right.at[half][k][own_column(j)]);
#pragma unroll
      for (int t = 0; t < TOGETHER; t++) b[j + t] = columns.value[t];
    }
#pragma unroll
    for (int i = 0; i < TM; i++)
#pragma unroll
      for (int j = 0; j < TN; j++) sum[i][j] += a[i] * b[j];
  }
}

#if SLICES > 1
// The sums are added in the order of the slices; each slice adds its own rows of every thread.
union Shared {
  struct { Left left; Right right; };
  REAL sums[SLICES][TM][TN][IN_SLICE];
};

__device__ __forceinline__ void gather(
    Shared& shared, const REAL (&own)[TM][TN], REAL (&sum)[ROWS][COLUMNS]) {
  const int slice = threadIdx.x / IN_SLICE;
#pragma unroll
  for (int i = 0; i < TM; i++)
#pragma unroll
    for (int j = 0; j < TN; j++) shared.sums[slice][i][j][thread()] = own[i][j];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < ROWS; i++)
#pragma unroll
    for (int j = 0; j < TN; j++) {
      sum[i][j] = 0;
#pragma unroll
      for (int s = 0; s < SLICES; s++) sum[i][j] += shared.sums[s][slice * ROWS + i][j][thread()];
    }
}
#else
struct Shared { Left left; Right right; };
#endif
#endif

// The product. load(k): read depth k and following into registers; store(half): write them to
// shared memory.
template <typename Load, typename Store>
__device__ __forceinline__ void product(
    int first, int last, Shared& shared, REAL (&sum)[ROWS][COLUMNS], Load load, Store store) {
#if !PRECISION && SLICES > 1
  REAL own[TM][TN];
#else
  auto& own = sum;
#endif
  for (auto& row : own)
    for (auto& value : row) value = 0;
  if (first < last) load(first), store(0);
  __syncthreads();
  int half = 0;
#pragma unroll 1
  for (int k = first; k < last; k += BK, half ^= 1) {
    const bool more = k + BK < last;
    if (more) load(k + BK);
    multiply(shared.left, shared.right, half, own);
    if (more) store(half ^ 1);  // that half is not in use since the last barrier
    __syncthreads();
  }
#if !PRECISION && SLICES > 1
  gather(shared, own, sum);
#endif
}
