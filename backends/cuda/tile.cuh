// A block's share of a matrix product: BM rows by BN columns in registers, fed through shared memory BK deep at a time.
//
// TX threads stand side by side, THREADS / TX above each other; each has TM rows that follow each other and TN columns that lie
// TX apart. Both factors lie depth first in shared memory, twice: while one half is read, the other is filled.
#define THREADS 256
#define BK 8
#define PAD 4  // between rows of shared memory: the threads of a warp that store one row each get banks of their own
#define BM (THREADS / TX * TM)
#define BN (TX * TN)

typedef REAL Left[2][BK][BM + PAD];
typedef REAL Right[2][BK][BN + PAD];

__device__ __forceinline__ void multiply(const Left& left, const Right& right, int half, REAL (&sum)[TM][TN]) {
  const int tx = threadIdx.x % TX, ty = threadIdx.x / TX;
#pragma unroll
  for (int k = 0; k < BK; k++) {
    REAL a[TM], b[TN];
#pragma unroll
    for (int i = 0; i < TM; i++) a[i] = left[half][k][ty * TM + i];
#pragma unroll
    for (int j = 0; j < TN; j++) b[j] = right[half][k][tx + TX * j];
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
