// The optimizers' updates of ops/update.py, one launch per array, and the functions before a step:
// clipping and the search for NaN.
//
// `lr_at`, `step_at`, `first_at` and `ok`, if not null, are numbers in device memory. They replace
// `lr`, `step` and `first`; if *ok is false, nothing changes. Values derived from such numbers are
// computed in double here and rounded to REAL at the end, so the bits do not depend on where the
// numbers are stored. Grid: as many blocks as run at once; each thread loops over the elements with
// the grid's stride.
#include "reduce.cuh"

#define NUMBER(name) (name##_at ? *name##_at : name)
#define EACH(i, count)                                                          \
  _Pragma("unroll 4") for (int i = blockIdx.x * BLOCK + threadIdx.x; i < count; \
                           i += gridDim.x * BLOCK)

extern "C" __global__ void __launch_bounds__(BLOCK) sgd(
    REAL* __restrict__ p, const REAL* __restrict__ g, const bool* __restrict__ ok,
    const double* __restrict__ lr_at, double lr, REAL weight_decay, int count) {
  if (ok && !*ok) return;
  const REAL rate = REAL(NUMBER(lr));
  EACH(i, count) p[i] -= rate * (g[i] + weight_decay * p[i]);
}

extern "C" __global__ void __launch_bounds__(BLOCK) momentum(
    REAL* __restrict__ p, const REAL* __restrict__ g, REAL* __restrict__ v,
    const bool* __restrict__ ok, const double* __restrict__ lr_at, double lr,
    const bool* __restrict__ first_at, bool first, REAL weight_decay, double mu, double dampening,
    bool nesterov, int count) {
  if (ok && !*ok) return;
  const REAL rate = REAL(NUMBER(lr)), keep = REAL(mu),
             intake = REAL(NUMBER(first) ? 1.0 : 1.0 - dampening);
  EACH(i, count) {
    const REAL value = p[i], grad = g[i] + weight_decay * value,
               speed = keep * v[i] + intake * grad;
    v[i] = speed;
    p[i] = value - rate * (nesterov ? grad + keep * speed : speed);
  }
}

extern "C" __global__ void __launch_bounds__(BLOCK) adagrad(
    REAL* __restrict__ p, const REAL* __restrict__ g, REAL* __restrict__ s,
    const bool* __restrict__ ok, const double* __restrict__ lr_at, double lr, REAL weight_decay,
    REAL eps, int count) {
  if (ok && !*ok) return;
  const REAL rate = REAL(NUMBER(lr));
  EACH(i, count) {
    const REAL value = p[i], grad = g[i] + weight_decay * value, square = s[i] + grad * grad;
    s[i] = square;
    p[i] = value - rate * (grad / (sqrt(square) + eps));
  }
}

// `mean` and `velocity` may be null.
extern "C" __global__ void __launch_bounds__(BLOCK) rmsprop(
    REAL* __restrict__ p, const REAL* __restrict__ g, REAL* __restrict__ s, REAL* __restrict__ mean,
    REAL* __restrict__ velocity, const bool* __restrict__ ok, const double* __restrict__ lr_at,
    double lr, REAL weight_decay, double alpha, REAL eps, REAL mu, int count) {
  if (ok && !*ok) return;
  const REAL rate = REAL(NUMBER(lr)), old = REAL(alpha), fresh = REAL(1 - alpha);
  EACH(i, count) {
    const REAL value = p[i], grad = g[i] + weight_decay * value,
               square = old * s[i] + fresh * (grad * grad);
    s[i] = square;
    REAL spread = square;
    if (mean) {
      const REAL centre = old * mean[i] + fresh * grad;
      mean[i] = centre;
      spread = square - centre * centre;
      if (spread < 0) spread = 0;  // rounding error
    }
    REAL change = grad / (sqrt(spread) + eps);
    if (velocity) velocity[i] = change = mu * velocity[i] + change;
    p[i] = value - rate * change;
  }
}

extern "C" __global__ void __launch_bounds__(BLOCK) adam(
    REAL* __restrict__ p, const REAL* __restrict__ g, REAL* __restrict__ m, REAL* __restrict__ v,
    const bool* __restrict__ ok, const double* __restrict__ lr_at, double lr,
    const long long* __restrict__ step_at, long long step, double weight_decay, double beta1,
    double beta2, REAL eps, bool decoupled, int count) {
  if (ok && !*ok) return;
  const double rate = NUMBER(lr), steps = double(NUMBER(step));
  const REAL size = REAL(rate / (1 - pow(beta1, steps))),
             spread = REAL(sqrt(1 - pow(beta2, steps)));
  const REAL shrink = REAL(decoupled ? 1 - rate * weight_decay : 1.0),
             decay = REAL(decoupled ? 0.0 : weight_decay);
  const REAL old1 = REAL(beta1), fresh1 = REAL(1 - beta1), old2 = REAL(beta2),
             fresh2 = REAL(1 - beta2);
  EACH(i, count) {
    const REAL value = p[i], grad = g[i] + decay * value;
    const REAL mean = old1 * m[i] + fresh1 * grad, square = old2 * v[i] + fresh2 * (grad * grad);
    m[i] = mean;
    v[i] = square;
    p[i] = shrink * value - size * (mean / (sqrt(square) / spread + eps));
  }
}

// partials (gridDim.x): the sum of squares of each block.
extern "C" __global__ void __launch_bounds__(BLOCK) square_sums(
    const REAL* __restrict__ g, double* __restrict__ partials, int count) {
  __shared__ double buffer[1][BLOCK];
  double sum[1] = {0};
  EACH(i, count) {
    const double value = g[i];
    sum[0] = fma(value, value, sum[0]);
  }
  block_sums(sum, buffer);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum[0];
}

// The norm of all arrays from their partials (parts); g is multiplied by the factor, at most 1,
// that reduces it to `limit`.
extern "C" __global__ void __launch_bounds__(BLOCK) clip(
    REAL* __restrict__ g, const double* __restrict__ partials, REAL* __restrict__ norm,
    const double* __restrict__ limit_at, double limit, int parts, int count) {
  __shared__ double buffer[1][BLOCK];
  double sum[1] = {0};
  for (int i = threadIdx.x; i < parts; i += BLOCK) sum[0] += partials[i];
  block_sums(sum, buffer);
  const double length = sqrt(sum[0]);
  if (blockIdx.x == 0 && threadIdx.x == 0) *norm = REAL(length);
  double factor = NUMBER(limit) / (length + 1e-6);  // 1e-6 avoids a division by 0, as in PyTorch
  if (factor > 1) factor = 1;
  const REAL by = REAL(factor);
  EACH(i, count) g[i] *= by;
}

// bad (gridDim.x): the number of threads of each block that found NaN or infinity.
extern "C" __global__ void __launch_bounds__(BLOCK) count_not_finite(
    const REAL* __restrict__ x, int* __restrict__ bad, int count) {
  __shared__ int buffer[1][BLOCK];
  int met[1] = {0};
  EACH(i, count) met[0] |= !isfinite(x[i]);
  block_sums(met, buffer);
  if (threadIdx.x == 0) bad[blockIdx.x] = met[0];
}

// ok: whether none was found. One block.
extern "C" __global__ void __launch_bounds__(BLOCK) none_met(
    const int* __restrict__ bad, bool* __restrict__ ok, int parts) {
  __shared__ int buffer[1][BLOCK];
  int met[1] = {0};
  for (int i = threadIdx.x; i < parts; i += BLOCK) met[0] |= bad[i];
  block_sums(met, buffer);
  if (threadIdx.x == 0) *ok = !met[0];
}
