// Softmax cross-entropy with integer labels, the mean over the labels that count, and its gradient
// for a dy of 1.
//
// With q = (1 - smoothing) * one_hot + smoothing / C, or 0 if the label is `ignored`, the loss of a
// sample is -sum(q * log_softmax(logits)), and NaN if its label is not a class. The mean is over
// the labels that are classes and not ignored. logits (N, C) have the strides `step_n` and
// `step_c`, and so do dlogits. `rows` (2, N) are the largest logit of each sample and the sum of
// exp(logit - largest).
//
// A sample has `lanes` threads, a power of two, adjacent if its classes are adjacent in memory.
// With one block, its only launch does everything. Otherwise each block writes two partial sums (2,
// blocks), and softmax_gradient, launched next, adds them in a fixed order.
#include "reduce.cuh"

struct Place { int sample, lane, together; };  // sample: of the `together` samples of a block
__device__ __forceinline__ Place place(int lanes, int step_c) {
  const int tid = threadIdx.x, together = BLOCK / lanes;
  if (step_c == 1) return {tid / lanes, tid % lanes, together};
  return {tid % together, tid / together, together};
}

__device__ __forceinline__ bool is_class(long long label, int C) { return label >= 0 && label < C; }

// The reduction of a value over all lanes of a sample, pairwise. buffer: (lanes, together) elements
// of shared memory.
template <typename Fold>
__device__ __forceinline__ REAL folded(REAL x, REAL* buffer, Place at, int lanes, Fold fold) {
  REAL* const mine = buffer + at.lane * at.together + at.sample;
  *mine = x;
  __syncthreads();
  for (int half = lanes / 2; half > 0; half /= 2) {
    if (at.lane < half) *mine = fold(*mine, mine[half * at.together]);
    __syncthreads();
  }
  x = buffer[at.sample];
  __syncthreads();
  return x;
}

// The mean over no samples is NaN and its gradient 0, as in PyTorch.
__device__ __forceinline__ REAL mean_of(double sum, double count) {
  return REAL(count == 0 ? double(__uint_as_float(0x7fc00000u)) : sum / count);
}

// dlogits of this block's samples: (softmax * sum(q) - q) / count.
__device__ __forceinline__ void write_gradient(
    const REAL* logits, const long long* labels, const REAL* rows, REAL* dlogits, int lanes, int N,
    int C, int step_n, int step_c, long long ignored, REAL smoothing, double count) {
  const Place at = place(lanes, step_c);
  const REAL scale = REAL(count == 0 ? 0 : 1 / count), even = smoothing / REAL(C),
             whole = 1 - smoothing;
  for (int n = blockIdx.x * at.together + at.sample; n < N; n += gridDim.x * at.together) {
    const long long label = labels[n];
    const bool counts = label != ignored, known = is_class(label, C);
    const REAL peak = rows[n], per_total = 1 / rows[N + n];
    const REAL all = !counts ? REAL(0) : known ? REAL(1) : smoothing;  // sum(q)
#pragma unroll 2
    for (int c = at.lane; c < C; c += lanes) {
      const int where = n * step_n + c * step_c;
      const REAL q = !counts ? REAL(0) : c == label ? whole + even : even;
      dlogits[where] = (exp(logits[where] - peak) * per_total * all - q) * scale;
    }
  }
}

extern "C" __global__ void __launch_bounds__(BLOCK) softmax_loss(
    const REAL* __restrict__ logits, const long long* __restrict__ labels, REAL* rows,
    double* __restrict__ partials, REAL* __restrict__ loss, REAL* __restrict__ dlogits, int lanes,
    int N, int C, int step_n, int step_c, long long ignored, REAL smoothing) {
  __shared__ REAL buffer[BLOCK];
  __shared__ double sums[2][BLOCK];
  const Place at = place(lanes, step_c);
  const auto sum = [](REAL a, REAL b) { return a + b; };
  double total[2] = {0, 0};
  for (int start = blockIdx.x * at.together; start < N; start += gridDim.x * at.together) {
    const int n = start + at.sample;
    const bool here = n < N;
    REAL peak = REAL(__uint_as_float(0xff800000u));  // -inf
    if (here) {
#pragma unroll 2
      for (int c = at.lane; c < C; c += lanes) {
        const REAL logit = logits[n * step_n + c * step_c];
        if (logit > peak) peak = logit;
      }
    }
    peak = folded(peak, buffer, at, lanes, [](REAL a, REAL b) { return b > a ? b : a; });
    REAL exps = 0, away = 0;
    if (here) {
#pragma unroll 2
      for (int c = at.lane; c < C; c += lanes) {
        const REAL shifted = logits[n * step_n + c * step_c] - peak;
        exps += exp(shifted);
        away += shifted;
      }
    }
    exps = folded(exps, buffer, at, lanes, sum);
    if (smoothing != 0) away = folded(away, buffer, at, lanes, sum);
    if (here && at.lane == 0) {
      rows[n] = peak;
      rows[N + n] = exps;
      const long long label = labels[n];
      const bool counts = label != ignored;
      if (is_class(label, C) && counts) {
        const REAL root = log(exps), whole = 1 - smoothing;
        REAL own = 0;
        if (whole != 0) own = whole * (root - (logits[n * step_n + int(label) * step_c] - peak));
        if (smoothing != 0) own += smoothing * (root - away / REAL(C));
        total[0] += own;
        total[1] += 1;
      } else if (counts) {
        total[0] = double(__uint_as_float(0x7fc00000u));  // NaN
      }
    }
  }
  block_sums(total, sums);
  if (gridDim.x > 1) {
    if (threadIdx.x == 0) {
      partials[blockIdx.x] = total[0];
      partials[gridDim.x + blockIdx.x] = total[1];
    }
    return;
  }
  if (threadIdx.x == 0) *loss = mean_of(total[0], total[1]);
  if (dlogits)
    write_gradient(
        logits, labels, rows, dlogits, lanes, N, C, step_n, step_c, ignored, smoothing, total[1]);
}

// After softmax_loss with more than one block (`blocks`): the loss, and dlogits if it is not null.
extern "C" __global__ void __launch_bounds__(BLOCK) softmax_gradient(
    const REAL* __restrict__ logits, const long long* __restrict__ labels,
    const REAL* __restrict__ rows, const double* __restrict__ partials, REAL* __restrict__ loss,
    REAL* __restrict__ dlogits, int blocks, int lanes, int N, int C, int step_n, int step_c,
    long long ignored, REAL smoothing) {
  __shared__ double sums[2][BLOCK];
  double total[2] = {0, 0};
  for (int i = threadIdx.x; i < blocks; i += BLOCK) {
    total[0] += partials[i];
    total[1] += partials[blocks + i];
  }
  block_sums(total, sums);
  if (blockIdx.x == 0 && threadIdx.x == 0) *loss = mean_of(total[0], total[1]);
  if (dlogits)
    write_gradient(
        logits, labels, rows, dlogits, lanes, N, C, step_n, step_c, ignored, smoothing, total[1]);
}
