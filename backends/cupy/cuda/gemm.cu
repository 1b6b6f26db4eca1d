// Z (M, N) = A (M, K) @ B (K, N), plus a bias for each row, cut off below 0 where relu: the affine map and its gradients.
//
// Each factor lies with neighbours of depth together (A_DEEP, B_DEEP 1) or with neighbours of a row or column together (0);
// `a_step` and `b_step` are the distances along the other axis. Where a mask is given, for A (A_MASK 1) or B (B_MASK 1) and
// laid out as they are, what stands where it isn't above 0 counts as 0. One column of ones may follow B's last: its product goes
// to `ones` (M). The depth is split: with more than one split, each writes its sums to partials (splits, M, N [+ 1]).
// Grid: tiles of columns, tiles of rows, splits. All indices fit into int: the host sees to that.
#include "tile.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) gemm(
    const REAL* __restrict__ a_, const REAL* __restrict__ a_mask, const REAL* __restrict__ b_,
    const REAL* __restrict__ b_mask, const REAL* __restrict__ bias, REAL* __restrict__ z, REAL* __restrict__ ones,
    REAL* __restrict__ partials, int relu, int M, int N, int K, int a_step, int b_step, int each) {
  __shared__ Left left;
  __shared__ Right right;
  constexpr int a_loads = (BM * BK + THREADS - 1) / THREADS, b_loads = (BN * BK + THREADS - 1) / THREADS;
  const int tid = threadIdx.x, row0 = blockIdx.y * BM, column0 = blockIdx.x * BN;
  const int split = blockIdx.z, first = split * each, last = min(first + each, K), columns = N + (ones ? 1 : 0);

  REAL a[a_loads], b[b_loads], sum[ROWS][COLUMNS];
  product(
      first, last, left, right, sum,
      [&](int k) {
#pragma unroll
        for (int i = 0; i < a_loads; i++) {
          const int index = tid + i * THREADS;
#if A_DEEP
          const int row = row0 + index / BK, kk = k + index % BK, from = row * a_step + kk;
#else
          const int row = row0 + index % BM, kk = k + index / BM, from = kk * a_step + row;
#endif
          const bool inside = index < BM * BK && row < M && kk < last;
#if A_MASK
          a[i] = inside && a_mask[from] > 0 ? a_[from] : REAL(0);
#else
          a[i] = inside ? a_[from] : REAL(0);
#endif
        }
#pragma unroll
        for (int i = 0; i < b_loads; i++) {
          const int index = tid + i * THREADS;
#if B_DEEP
          const int column = column0 + index / BK, kk = k + index % BK, from = column * b_step + kk;
#else
          const int column = column0 + index % BN, kk = k + index / BN, from = kk * b_step + column;
#endif
          const bool inside = index < BN * BK && column < N && kk < last;
#if B_MASK
          b[i] = inside && b_mask[from] > 0 ? b_[from] : REAL(0);
#else
          b[i] = inside ? b_[from] : REAL(0);
#endif
          if (column == N && kk < last) b[i] = 1;
        }
      },
      [&](int half) {
#pragma unroll
        for (int i = 0; i < a_loads; i++) {
          const int index = tid + i * THREADS;
          if (index < BM * BK) left.at[half][A_DEEP ? index % BK : index / BM][A_DEEP ? index / BK : index % BM] = a[i];
        }
#pragma unroll
        for (int i = 0; i < b_loads; i++) {
          const int index = tid + i * THREADS;
          if (index < BN * BK) right.at[half][B_DEEP ? index % BK : index / BN][B_DEEP ? index / BK : index % BN] = b[i];
        }
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
