// Sums over the threads of a block in a fixed order: the upper half is repeatedly added to the
// lower half.
#pragma once
#define BLOCK 256

// K sums at once; afterwards all threads have them. `buffer` is shared memory, free on return.
template <int K, typename T>
__device__ __forceinline__ void block_sums(T (&sums)[K], T (*buffer)[BLOCK]) {
  const int tid = threadIdx.x;
#pragma unroll
  for (int k = 0; k < K; k++) buffer[k][tid] = sums[k];
  __syncthreads();
  for (int half = BLOCK / 2; half > 0; half /= 2) {
    if (tid < half) {
#pragma unroll
      for (int k = 0; k < K; k++) buffer[k][tid] += buffer[k][tid + half];
    }
    __syncthreads();
  }
#pragma unroll
  for (int k = 0; k < K; k++) sums[k] = buffer[k][0];
  __syncthreads();
}
