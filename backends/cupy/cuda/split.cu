// The end of a product whose depth was split: the sum over all splits, in a fixed order.
//
// A block computes 32 elements with eight threads each: each thread adds every eighth split, and
// then the eight sums are added. partials (splits, rows, columns [+ 1]) -> y (rows, columns), plus
// a bias per row, and ReLU if `relu`. The additional column, if any, goes to `ones` (rows).
extern "C" __global__ void __launch_bounds__(256) sum_partials(
    const REAL* __restrict__ partials, const REAL* __restrict__ bias, REAL* __restrict__ y,
    REAL* __restrict__ ones, int splits, int rows, int columns, int relu) {
  __shared__ REAL sums[8][32];
  const int own = threadIdx.x % 32, share = threadIdx.x / 32, width = columns + (ones ? 1 : 0);
  const int index = blockIdx.x * 32 + own;
  const bool here = index < rows * width;
  REAL sum = 0;
  if (here) {
#pragma unroll 4
    for (int split = share; split < splits; split += 8)
      sum += partials[(long long)split * rows * width + index];
  }
  sums[share][own] = sum;
  __syncthreads();
  if (share || !here) return;
#pragma unroll
  for (int i = 1; i < 8; i++) sum += sums[i][own];
  const int row = index / width, column = index % width;
  if (column == columns) {
    ones[row] = sum;
    return;
  }
  if (bias) sum += bias[row];
  y[row * columns + column] = relu && sum <= 0 ? REAL(0) : sum;
}
