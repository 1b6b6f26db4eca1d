// Z (M, N) = A (M, K) @ B (K, N), plus a bias per row, and ReLU if `relu`: the affine map and its
// gradients.
//
// A factor is contiguous along the depth (A_DEEP, B_DEEP 1) or along its rows or columns (0);
// `a_step` and `b_step` are the strides of the other axis. An optional mask for A (A_MASK 1) or B
// (B_MASK 1) has the same layout; elements count as 0 where the mask is not above 0. A column of
// ones may follow the last column of B; its product goes to `ones` (M). The depth is split: with
// more than one split, each writes its sums to partials (splits, M, N [+ 1]).
// Grid: tiles of columns, tiles of rows, splits. All indices fit into int, which the host checks.
#include "tile.cuh"

// How the threads of a block read lines of a factor, BK deep: each has one position along the
// contiguous axis and every `apart`-th along the other axis. Lines beyond the end of the matrix
// repeat the last one; their results are dropped.
template <int COUNT, bool DEEP>
struct Reader {
  static constexpr int together = DEEP ? BK : COUNT, apart = THREADS / together;
  static constexpr int loads = ((DEEP ? COUNT : BK) + apart - 1) / apart;
  const REAL *from, *mask;
  int ahead, stride, line, left;  // left: the depth from this thread's first element on
  int over[DEEP ? loads : 1];     // the offsets of the lines of each load

  __device__ __forceinline__ Reader(
      const REAL* from, const REAL* mask, int first, int last, int line0, int lines, int step)
      : from(from), mask(mask) {
    line = line0 + (DEEP ? threadIdx.x / BK : threadIdx.x % COUNT);
    const int k = DEEP ? threadIdx.x % BK : threadIdx.x / COUNT, at = first + k;
    left = last - at;
    ahead = DEEP ? BK : BK * step;
    stride = apart * step;
    const int start = DEEP ? at : at * step + min(line, lines - 1);
    this->from += start, this->mask += mask ? start : 0;
    if (DEEP)
#pragma unroll
      for (int i = 0; i < loads; i++) over[DEEP ? i : 0] = min(line + i * apart, lines - 1) * step;
  }

  template <bool MASKED>
  __device__ __forceinline__ void load(REAL (&values)[loads]) {
#pragma unroll
    for (int i = 0; i < loads; i++) {
      const bool within = DEEP ? left > 0 : i * apart < left;
      const int more = DEEP ? over[DEEP ? i : 0] : i * stride;
      values[i] = within && !(MASKED && mask[more] <= 0) ? from[more] : REAL(0);
    }
    from += ahead, left -= BK;
    if (MASKED) mask += ahead;
  }

  template <int LINE>
  __device__ __forceinline__ void store(REAL (&tile)[BK][LINE], const REAL (&values)[loads]) const {
    const int own = threadIdx.x % together, other = threadIdx.x / together;
#pragma unroll
    for (int i = 0; i < loads; i++)
      if (other + i * apart < (DEEP ? COUNT : BK))
        tile[DEEP ? own : other + i * apart][DEEP ? other + i * apart : own] = values[i];
  }
};

#define BLOCKS (SLICES > 2 && RESIDENT > 1 ? RESIDENT - 1 : RESIDENT)  // avoids register spills

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) gemm(
    const REAL* __restrict__ a_, const REAL* __restrict__ a_mask, const REAL* __restrict__ b_,
    const REAL* __restrict__ b_mask, const REAL* __restrict__ bias, REAL* __restrict__ z,
    REAL* __restrict__ ones, REAL* __restrict__ partials, int relu, int M, int N, int K, int a_step,
    int b_step, int each) {
  __shared__ Shared shared;
  const int row0 = blockIdx.y * BM, column0 = blockIdx.x * BN;
  const int split = blockIdx.z, first = split * each, last = min(first + each, K),
            columns = N + (ones ? 1 : 0);
  typedef Reader<BM, A_DEEP> A;
  typedef Reader<BN, B_DEEP> B;
  A a_reader(a_, a_mask, first, last, row0, M, a_step);
  B b_reader(b_, b_mask, first, last, column0, N, b_step);

  REAL a[A::loads], b[B::loads], sum[ROWS][COLUMNS];
  product(
      first, last, shared, sum,
      [&](int) {
        a_reader.template load<A_MASK>(a);
        b_reader.template load<B_MASK>(b);
#pragma unroll
        for (int i = 0; i < B::loads; i++)
          if (b_reader.line + (B_DEEP ? i * B::apart : 0) == N) b[i] = 1;
      },
      [&](int half) {
        a_reader.store(shared.left.at[half], a);
        b_reader.store(shared.right.at[half], b);
      });

#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    const int row = row0 + own_row(i);
    if (row >= M) continue;
    const REAL shift = bias ? bias[row] : REAL(0);
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
      const int column = column0 + own_column(j);
      if (column >= columns) continue;
      if (gridDim.z > 1) {
        partials[((long long)split * M + row) * columns + column] = sum[i][j];
      } else if (column == N) {
        ones[row] = sum[i][j];
      } else {
        const REAL value = sum[i][j] + shift;
        z[row * N + column] = relu && value <= 0 ? REAL(0) : value;
      }
    }
  }
}
