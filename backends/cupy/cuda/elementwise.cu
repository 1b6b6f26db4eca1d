// Elementwise kernels: ReLU, sums of arrays, and a batch gathered from a set of images.
// Grid, unless stated otherwise: as many blocks as run at once; each thread loops over the elements
// with the grid's stride.

extern "C" __global__ void __launch_bounds__(256) relu(
    const REAL* __restrict__ x, REAL* __restrict__ y, int count) {
  const int stride = gridDim.x * blockDim.x;
#pragma unroll 4
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
    const REAL value = x[i];
    y[i] = value <= 0 ? REAL(0) : value;
  }
}

// dx = 0 where y, the output of ReLU, is at most 0, else dy. NaN passes dy on, as in PyTorch.
extern "C" __global__ void __launch_bounds__(256) relu_backward(
    const REAL* __restrict__ dy, const REAL* __restrict__ y, REAL* __restrict__ dx, int count) {
  const int stride = gridDim.x * blockDim.x;
#pragma unroll 4
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
    const REAL given = dy[i];
    dx[i] = y[i] <= 0 ? REAL(0) : given;
  }
}

// y = a + b + c + d, from left to right, and ReLU if `relu`; c and d may be null.
extern "C" __global__ void __launch_bounds__(256) add(
    const REAL* __restrict__ a, const REAL* __restrict__ b, const REAL* __restrict__ c,
    const REAL* __restrict__ d, REAL* __restrict__ y, bool relu, int count) {
  const int stride = gridDim.x * blockDim.x;
#pragma unroll 4
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
    REAL sum = a[i] + b[i];
    if (c) sum += c[i];
    if (d) sum += d[i];
    y[i] = relu && sum <= 0 ? REAL(0) : sum;
  }
}

#if BYTES
typedef unsigned char Pixel;
#else
typedef REAL Pixel;
#endif

// images (count, L) -> y (L, B): `indices` selects B of them, null all of them. Tiles of 32 by 32
// make reads and writes coalesced. L is C times `pixels`. The `mean` of a channel is subtracted and
// the result divided by `std`, each if it is not null. An index outside the set returns NaN. Grid:
// tiles of L, tiles of B.
extern "C" __global__ void __launch_bounds__(256) take_batch(
    const Pixel* __restrict__ images, const long long* __restrict__ indices,
    const REAL* __restrict__ mean, const REAL* __restrict__ std_, REAL* __restrict__ y, int count,
    int L, int pixels, int B) {
  __shared__ REAL tile[32][33];
  const int across = threadIdx.x % 32, down = threadIdx.x / 32, l0 = blockIdx.x * 32,
            b0 = blockIdx.y * 32;
  const int from = l0 + across;
  if (from < L) {
    const int c = from / pixels;
    const REAL shift = mean ? mean[c] : REAL(0), divisor = std_ ? std_[c] : REAL(1);
#pragma unroll
    for (int i = down; i < 32; i += 8) {
      if (b0 + i >= B) break;
      const long long image = indices ? indices[b0 + i] : b0 + i;
      REAL value = REAL(__uint_as_float(0x7fc00000u));  // NaN
      if (image >= 0 && image < count) {
        value = REAL(images[image * L + from]);
        if (mean) value -= shift;
        if (std_) value /= divisor;
      }
      tile[i][across] = value;
    }
  }
  __syncthreads();
  const int b = b0 + across;
  if (b >= B) return;
#pragma unroll
  for (int i = down; i < 32; i += 8)
    if (l0 + i < L) y[(l0 + i) * B + b] = tile[across][i];
}
