// The gradient of a convolution's output, from dy after ReLU or pooling. Defines: REAL; VEC; FROM:
// 0, it is dy; 1, it is dy where y (after ReLU) is above 0; 2, dy is also after 2x2 pooling, and
// each value goes to the winning tap.
#pragma once
#include "vector.cuh"

// The offset of the gradients of the outputs at (oy, ox) in a channel of dy.
struct Place {
  bool inside;
  int at, tap;
  __device__ __forceinline__ Place(int oy, int ox, int OH, int OW, int N) {
    inside = (unsigned)oy < (unsigned)OH && (unsigned)ox < (unsigned)OW;
#if FROM == 2
    const int down = OH / 2, across = OW / 2, wy = oy / 2, wx = ox / 2;
    inside = inside && wy < down && wx < across;
    at = (wy * across + wx) * N, tap = (oy % 2) * 2 + ox % 2;
#else
    at = (oy * OW + ox) * N, tap = 0;
#endif
  }
};

// VEC adjacent values of dy; 0 where y or the winner of the pooling excludes them.
__device__ __forceinline__ Vector gradient_at(
    const REAL* dy, const REAL* y, const unsigned char* winner, int tap) {
  Vector out = read(dy);
#if FROM == 1
  const Vector behind = read(y);
#pragma unroll
  for (int e = 0; e < VEC; e++) out.value[e] = behind.value[e] <= 0 ? REAL(0) : out.value[e];
#elif FROM == 2
  const Several<unsigned char> won = *reinterpret_cast<const Several<unsigned char>*>(winner);
#pragma unroll
  for (int e = 0; e < VEC; e++) out.value[e] = won.value[e] == tap ? out.value[e] : REAL(0);
#endif
  return out;
}
