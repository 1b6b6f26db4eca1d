// A block's share of a matrix product: BM rows by BN columns in registers, fed through shared memory BK deep at a time.
//
// TX threads stand side by side, THREADS / TX above each other; each has TM rows that follow each other and TN columns that lie
// TX apart. Both factors lie depth first in shared memory, twice: while one half is read, the other is filled. With TX of 32
// or more a warp reads the same rows, which costs it one access, and columns that fill one.
#define THREADS 256
#define BK 8
#define PAD 4  // between rows of shared memory: the threads of a warp that store one row each get banks of their own
// Blocks on a multiprocessor at least: of its 65,536 registers a block's 256 threads then have 80 or 128 each, or all they can.
#define RESIDENT (TM * TN * sizeof(REAL) <= 64 ? 3 : TM * TN * sizeof(REAL) <= (sizeof(REAL) == 4 ? 256 : 128) ? 2 : 1)
#define BM (THREADS / TX * TM)
#define BN (TX * TN)

struct __align__(16) Left { REAL at[2][BK][BM + PAD]; };
struct __align__(16) Right { REAL at[2][BK][BN + PAD]; };

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

// The product itself. load(k): take what lies from depth k on into registers; store(half): put it into shared memory.
template <typename Load, typename Store>
__device__ __forceinline__ void product(
    int first, int last, const Left& left, const Right& right, REAL (&sum)[TM][TN], Load load, Store store) {
#pragma unroll
  for (int i = 0; i < TM; i++)
#pragma unroll
    for (int j = 0; j < TN; j++) sum[i][j] = 0;
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
