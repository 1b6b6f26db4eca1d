// Sums over the threads of a block in a fixed order: the upper half is folded onto the lower one, over and over.
#pragma once
#define BLOCK 256

// K sums at once; afterwards all threads have them. `room` is shared memory, free again on return.
template <int K, typename T> __device__ __forceinline__ void block_sums(T (&sums)[K], T (*room)[BLOCK]) {
  const int tid = threadIdx.x;
#pragma unroll
  for (int k = 0; k < K; k++) room[k][tid] = sums[k];
  __syncthreads();
  for (int half = BLOCK / 2; half > 0; half /= 2) {
    if (tid < half) {
#pragma unroll
      for (int k = 0; k < K; k++) room[k][tid] += room[k][tid + half];
    }
    __syncthreads();
  }
#pragma unroll
  for (int k = 0; k < K; k++) sums[k] = room[k][0];
  __syncthreads();
}
