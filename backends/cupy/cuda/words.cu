// Writes numbers from the host to device memory. They are passed as launch arguments, so there is
// no copy and no wait.

// words[0..count): bit patterns of long long or double.
extern "C" __global__ void set_words(
    long long* __restrict__ words, int count, long long w0, long long w1, long long w2,
    long long w3, long long w4, long long w5, long long w6, long long w7) {
  const long long all[8] = {w0, w1, w2, w3, w4, w5, w6, w7};
  const int i = threadIdx.x;
  if (i < count) words[i] = all[i];
}
