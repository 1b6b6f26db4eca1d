// Batch norm, optionally with ReLU. x (C, P): P = S*N adjacent elements per channel.
//
// A channel is divided into `splits` parts of `each` elements. One launch computes three values per
// part. The next one combines those of the channel in each of its blocks, always in the same order,
// and reads the elements once more.
//
// A mean is two numbers: `mean`, rounded to REAL, and its rounding error `rest`. The variance of
// elements with a large mean therefore stays accurate. The values that a channel needs later are in
// statistics (5, C): mean, rest, rstd, scale, shift, with scale = weight * rstd, shift = bias -
// rest * scale, and y = (x - mean) * scale + shift.
// Grid: splits, C. All indices fit into int, which the host checks.
#include "reduce.cuh"

__device__ __forceinline__ REAL affine(REAL x, REAL mean, REAL scale, REAL shift) {
  // explicit fma: forward and backward pass must compute the same sign
  return fma(x - mean, scale, shift);
}

// partials (3, C, splits): a mean (two numbers, see above) and the sum of squared deviations from
// it. The second pass is relative to a first mean, whose rounding error is the sum of the
// deviations.
extern "C" __global__ void __launch_bounds__(BLOCK) norm_partials(
    const REAL* __restrict__ x, REAL* __restrict__ partials, int P, int each) {
  __shared__ REAL buffer[2][BLOCK];
  const int c = blockIdx.y, split = blockIdx.x, splits = gridDim.x, C = gridDim.y,
            tid = threadIdx.x;
  const int count = min(each, P - split * each);
  const REAL* const row = x + c * P + split * each;
  const REAL origin = row[0];
  REAL total[1] = {0};
#pragma unroll 4
  for (int i = tid; i < count; i += BLOCK) total[0] += row[i] - origin;
  block_sums(total, buffer);
  const REAL mean = origin + total[0] / REAL(count);
  REAL sums[2] = {0, 0};
#pragma unroll 4
  for (int i = tid; i < count; i += BLOCK) {
    const REAL away = row[i] - mean;
    sums[0] += away;
    sums[1] = fma(away, away, sums[1]);
  }
  block_sums(sums, buffer);
  if (tid) return;
  const REAL rest = sums[0] / REAL(count);
  partials[c * splits + split] = mean;
  partials[(C + c) * splits + split] = rest;
  partials[(2 * C + c) * splits + split] = sums[1] - sums[0] * rest;
}

// The statistics from the partials (null: from the running statistics), and y. The first block of a
// channel writes `statistics` and updates the running statistics, if they exist. `momentum_at`
// replaces `momentum`.
extern "C" __global__ void __launch_bounds__(BLOCK) norm_forward(
    const REAL* __restrict__ x, const REAL* __restrict__ partials, const REAL* __restrict__ weight,
    const REAL* __restrict__ bias, REAL* __restrict__ running_mean, REAL* __restrict__ running_var,
    const REAL* __restrict__ momentum_at, double momentum, double eps,
    REAL* __restrict__ statistics, REAL* __restrict__ y, int relu, int P, int each) {
  __shared__ double buffer[1][BLOCK];
  const int c = blockIdx.y, split = blockIdx.x, splits = gridDim.x, C = gridDim.y,
            tid = threadIdx.x;
  REAL mean, rest;
  double var;
  if (partials) {  // Chan's formula, relative to the mean of the first part
    const double origin = partials[c * splits];
    double count = 0, away = 0, squares = 0;
    if (tid < splits) {
      count = min(each, P - tid * each);
      away = (partials[c * splits + tid] - origin) + partials[(C + c) * splits + tid];
      squares = partials[(2 * C + c) * splits + tid];
    }
    double sum[1] = {count * away};
    block_sums(sum, buffer);
    const double from_origin = sum[0] / P;
    sum[0] = squares + count * (away - from_origin) * (away - from_origin);
    block_sums(sum, buffer);
    var = sum[0] / P;
    mean = REAL(origin + from_origin);
    rest = REAL((origin - mean) + from_origin);
    if (running_mean && split == 0 && tid == 0) {
      const double m = momentum_at ? double(*momentum_at) : momentum;
      running_mean[c] = REAL((1 - m) * running_mean[c] + m * (origin + from_origin));
      running_var[c] = REAL((1 - m) * running_var[c] + m * (sum[0] / (P - 1)));
    }
  } else {
    mean = running_mean[c];
    rest = 0;
    var = running_var[c];
  }
  const double rstd = 1 / sqrt(var + eps);
  const REAL scale = REAL(weight ? weight[c] * rstd : rstd);
  const REAL shift = (bias ? bias[c] : REAL(0)) - rest * scale;
  if (statistics && split == 0 && tid == 0) {
    statistics[c] = mean;
    statistics[C + c] = rest;
    statistics[2 * C + c] = REAL(rstd);
    statistics[3 * C + c] = scale;
    statistics[4 * C + c] = shift;
  }
  const int start = c * P + split * each, count = min(each, P - split * each);
#pragma unroll 4
  for (int i = tid; i < count; i += BLOCK) {
    const REAL value = affine(x[start + i], mean, scale, shift);
    y[start + i] = relu && value <= 0 ? REAL(0) : value;
  }
}

// partials (2, C, splits): the sums of g and of g * (x - mean), where g is dy, or 0 where ReLU
// returned 0.
extern "C" __global__ void __launch_bounds__(BLOCK) norm_sums(
    const REAL* __restrict__ dy, const REAL* __restrict__ x, const REAL* __restrict__ statistics,
    REAL* __restrict__ partials, int relu, int P, int each) {
  __shared__ REAL buffer[2][BLOCK];
  const int c = blockIdx.y, split = blockIdx.x, splits = gridDim.x, C = gridDim.y,
            tid = threadIdx.x;
  const REAL mean = statistics[c], scale = statistics[3 * C + c], shift = statistics[4 * C + c];
  const int start = c * P + split * each, count = min(each, P - split * each);
  REAL sums[2] = {0, 0};
#pragma unroll 4
  for (int i = tid; i < count; i += BLOCK) {
    const REAL value = x[start + i], given = dy[start + i];
    const REAL g = relu && affine(value, mean, scale, shift) <= 0 ? REAL(0) : given;
    sums[0] += g;
    sums[1] = fma(g, value - mean, sums[1]);
  }
  block_sums(sums, buffer);
  if (tid) return;
  partials[c * splits + split] = sums[0];
  partials[(C + c) * splits + split] = sums[1];
}

// dbias = sum(g), dweight = sum(g * xhat), each if it is not null; and, if dx is not null, dx =
// scale * (g - mean(g) - xhat * mean(g * xhat)), or scale * g if mean and variance are not x's
// `own`.
// `splits` of the partials, one per block of the grid; without dx one block per channel is enough.
// The partials need not be set if nothing is computed of them.
extern "C" __global__ void __launch_bounds__(BLOCK) norm_backward(
    const REAL* __restrict__ dy, const REAL* __restrict__ x, const REAL* __restrict__ statistics,
    const REAL* __restrict__ partials, REAL* __restrict__ dweight, REAL* __restrict__ dbias,
    REAL* __restrict__ dx, int relu, int own, int splits, int P, int each) {
  __shared__ double buffer[2][BLOCK];
  const int c = blockIdx.y, split = blockIdx.x, C = gridDim.y, tid = threadIdx.x;
  const REAL mean = statistics[c], scale = statistics[3 * C + c], shift = statistics[4 * C + c];
  const double rest = statistics[C + c], rstd = statistics[2 * C + c];
  double sums[2] = {0, 0};
  if (tid < splits) {
    sums[0] = partials[c * splits + tid];
    sums[1] = partials[(C + c) * splits + tid];
  }
  block_sums(sums, buffer);
  const double along_x = sums[1] - rest * sums[0];
  if (split == 0 && tid == 0) {
    if (dbias) dbias[c] = REAL(sums[0]);
    if (dweight) dweight[c] = REAL(along_x * rstd);
  }
  if (!dx) return;
  const double steep = own ? rstd * rstd * along_x / P : 0;
  const REAL slope = REAL(steep), level = REAL(own ? sums[0] / P - rest * steep : 0);
  const int start = c * P + split * each, count = min(each, P - split * each);
#pragma unroll 4
  for (int i = tid; i < count; i += BLOCK) {
    const REAL value = x[start + i], given = dy[start + i];
    const REAL g = relu && affine(value, mean, scale, shift) <= 0 ? REAL(0) : given;
    dx[start + i] = scale * (g - fma(value - mean, slope, level));
  }
}
