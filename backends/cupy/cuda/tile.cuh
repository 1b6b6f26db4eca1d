// A block's share of a matrix product: BM rows by BN columns in registers, fed through shared memory BK deep at a time.
//
// TX threads stand side by side, THREADS / TX above each other; each has TM rows that follow each other and TN columns that lie
// TX apart. Both factors lie depth first in shared memory, twice: while one half is read, the other is filled. With TX of 32
// or more a warp reads the same rows, which costs it one access, and columns that fill one.
//
// With PRECISION (see mma.cuh) tensor cores multiply the same tile, and a thread has the numbers of the fragments it holds. Either
// way they are ROWS by COLUMNS, own_row(i) and own_column(j) say which, and a thread's columns lie APART.
#define THREADS 256
#if PRECISION
#include "mma.cuh"
#define BK MMA_DEPTH
#define RESIDENT 1  // blocks on a multiprocessor at least: not said, the compiler spares registers until some spill
#else
#define BK 8
// Blocks on a multiprocessor at least: of its 65,536 registers a block's 256 threads then have 80 or 128 each, or all they can.
#define RESIDENT (TM * TN * sizeof(REAL) <= 64 ? 3 : TM * TN * sizeof(REAL) <= (sizeof(REAL) == 4 ? 256 : 128) ? 2 : 1)
#endif
#define PAD 4  // between rows of shared memory: the threads of a warp that store one row each get banks of their own
#define BM (THREADS / TX * TM)
#define BN (TX * TN)

struct __align__(16) Left { REAL at[2][BK][BM + PAD]; };
struct __align__(16) Right { REAL at[2][BK][BN + PAD]; };

#if PRECISION
// Warps stand in DOWN by ACROSS; each has fragments of 16 rows below each other and of 8 columns side by side.
#define DOWN (BM >= 32 ? 2 : 1)
#define ACROSS (THREADS / 32 / DOWN)
#define ROWS (BM / DOWN / 8)
#define COLUMNS (BN / ACROSS / 4)
#define APART 4
static_assert(sizeof(REAL) == 4 && BM % (16 * DOWN) == 0 && BN % (8 * ACROSS) == 0, "tensor cores have no such tile");

__device__ __forceinline__ int own_row(int i) {
  return threadIdx.x / 32 / ACROSS * (BM / DOWN) + 8 * i + threadIdx.x % 32 / 4;
}

__device__ __forceinline__ int first_column() { return threadIdx.x / 32 % ACROSS * (BN / ACROSS); }  // of the warp

// Which of a tile's columns is which of its fragments' is free: here a fragment's columns 2 t and 2 t + 1 are the tile's t and 4 + t,
// so that a thread's columns lie evenly, and four of them can be a window's taps.
__device__ __forceinline__ int own_column(int j) { return first_column() + 4 * j + threadIdx.x % 4; }

// Free as well, as long as both factors do it alike, is the order of depth: a thread takes 2 t and 2 t + 1 of each eight. With
// PAD 4 the threads of a warp then read from banks of their own.
template <int LINE>
__device__ __forceinline__ unsigned factor(const REAL (&tile)[BK][LINE], int part, int at) {
  const int k = threadIdx.x % 4 * 2 + (BK == 8 ? part : 8 * part);
  return MMA_FACTOR(tile[k][at], tile[k + 1][at]);
}

__device__ __forceinline__ void multiply(const Left& left, const Right& right, int half, REAL (&sum)[ROWS][COLUMNS]) {
  const int g = threadIdx.x % 32 / 4, column = first_column() + g % 2 * 4 + g / 2;
  unsigned a[ROWS / 2][4], b[COLUMNS / 2][2];
#pragma unroll
  for (int i = 0; i < ROWS / 2; i++)
#pragma unroll
    for (int r = 0; r < 4; r++) a[i][r] = factor(left.at[half], r / 2, own_row(2 * i + r % 2));
#pragma unroll
  for (int j = 0; j < COLUMNS / 2; j++)
#pragma unroll
    for (int r = 0; r < 2; r++) b[j][r] = factor(right.at[half], r, column + 8 * j);
#pragma unroll
  for (int i = 0; i < ROWS; i += 2)
#pragma unroll
    for (int j = 0; j < COLUMNS; j += 2)
      MMA_PRODUCT(sum[i][j], sum[i][j + 1], sum[i + 1][j], sum[i + 1][j + 1], a[i / 2], b[j / 2]);
}
#else
#define ROWS TM
#define COLUMNS TN
#define APART TX
__device__ __forceinline__ int own_row(int i) { return threadIdx.x / TX * TM + i; }
__device__ __forceinline__ int own_column(int j) { return threadIdx.x % TX + TX * j; }

// As many rows as are read in one go: 16 bytes at most.
constexpr int TOGETHER = TM < 16 / (int)sizeof(REAL) ? TM : 16 / (int)sizeof(REAL);
struct __align__(TOGETHER * sizeof(REAL)) Rows { REAL value[TOGETHER]; };

__device__ __forceinline__ void multiply(const Left& left, const Right& right, int half, REAL (&sum)[TM][TN]) {
  const int tx = threadIdx.x % TX, ty = threadIdx.x / TX;
#pragma unroll
  for (int k = 0; k < BK; k++) {
    REAL a[TM], b[TN];
#pragma unroll
    for (int i = 0; i < TM; i += TOGETHER) {
      const Rows rows = *reinterpret_cast<const Rows*>(&left.at[half][k][ty * TM + i]);
#pragma unroll
      for (int t = 0; t < TOGETHER; t++) a[i + t] = rows.value[t];
    }
#pragma unroll
    for (int j = 0; j < TN; j++) b[j] = right.at[half][k][tx + TX * j];
#pragma unroll
    for (int i = 0; i < TM; i++)
#pragma unroll
      for (int j = 0; j < TN; j++) sum[i][j] += a[i] * b[j];
  }
}
#endif

// The product itself. load(k): take what lies from depth k on into registers; store(half): put it into shared memory.
template <typename Load, typename Store>
__device__ __forceinline__ void product(
    int first, int last, const Left& left, const Right& right, REAL (&sum)[ROWS][COLUMNS], Load load, Store store) {
#pragma unroll
  for (int i = 0; i < ROWS; i++)
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) sum[i][j] = 0;
  load(first);
  store(0);
  __syncthreads();
  int half = 0;
  for (int k = first; k < last; k += BK, half ^= 1) {
    const bool more = k + BK < last;
    if (more) load(k + BK);
    multiply(left, right, half, sum);
    if (more) store(half ^ 1);  // nobody has read that half since the last barrier
    __syncthreads();
  }
}

// A number k = (c * ys + y) * xs + x in its parts, and on in equal steps: divisions only at the start.
struct Walk {
  int c, y, x, ys, xs, step_c, step_y, step_x;
  __device__ __forceinline__ Walk(int k, int step, int ys, int xs) : ys(ys), xs(xs) {
    c = k / (ys * xs), y = k / xs % ys, x = k % xs;
    step_c = step / (ys * xs), step_y = step / xs % ys, step_x = step % xs;
  }
  __device__ __forceinline__ void next() {
    x += step_x;
    if (x >= xs) x -= xs, y++;
    y += step_y;
    if (y >= ys) y -= ys, c++;
    c += step_c;
  }
};
