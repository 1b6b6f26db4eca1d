// Dropout with the masks of ops/masks.py, bit by bit. There the hash is computed in int64 and cut
// to 32 bits, here in 32 bits.
//
// x (L, N): N adjacent samples of L elements, of which `inner` share a mask value. The two words of
// a sample are a hash of `step` and of its position, `first` + n. `words` (2, N), if not null, are
// written by the forward pass; with `given` they are read instead. `step_at` and `first_at`, if not
// null, replace `step` and `first`.
// A block computes LONG elements of 32 samples. Grid: blocks of samples, blocks of elements.
// Indices fit into int.
#define ACROSS 32
#define LANES 8
#define LONG 64
typedef unsigned int word;
typedef unsigned long long wide;

__device__ __forceinline__ word mixed(word x, int shift, word factor) {
  return (x ^ (x >> shift)) * factor;
}

// "triple32" (Chris Wellons, "Prospecting for hash functions", 2018)
__device__ __forceinline__ word hash(word x) {
  x = mixed(mixed(mixed(x, 17, 0xED5AD4BBu), 11, 0xAC4C1B51u), 15, 0x31848BABu);
  return x ^ (x >> 14);
}

extern "C" __global__ void __launch_bounds__(ACROSS * LANES) drop(
    const REAL* __restrict__ x, REAL* __restrict__ y, word* __restrict__ words, bool given,
    word key0, word key1, const long long* __restrict__ step_at, long long step,
    const long long* __restrict__ first_at, long long first, wide threshold, REAL scale, int L,
    int N, int inner) {
  __shared__ word both[2][ACROSS];
  const int across = threadIdx.x % ACROSS, lane = threadIdx.x / ACROSS,
            n = blockIdx.x * ACROSS + across;
  if (lane < 2 && n < N) {
    word made;
    if (given) {
      made = words[lane * N + n];
    } else {
      const wide when = step_at ? *step_at : step, where = (first_at ? *first_at : first) + n;
      made = lane ? key1 : key0;
      made = hash(made ^ word(when));
      made = hash(made ^ word(when >> 32));
      made = hash(made ^ word(where));
      made = hash(made ^ word(where >> 32));
      if (words && blockIdx.y == 0) words[lane * N + n] = made;
    }
    both[lane][across] = made;
  }
  __syncthreads();
  if (n >= N) return;
  const word one = both[0][across], other = both[1][across];
  const int start = blockIdx.y * LONG, end = min(start + LONG, L);
#pragma unroll 4
  for (int l = start + lane; l < end; l += LANES) {
    const word index = inner == 1 ? l : l / inner;
    word h = mixed(index ^ one, 17, 0xED5AD4BBu) ^ other;
    h = mixed(mixed(h, 11, 0xAC4C1B51u), 15, 0x31848BABu);
    h ^= h >> 14;
    y[l * N + n] = x[l * N + n] * (h >= threshold ? scale : REAL(0));
  }
}
