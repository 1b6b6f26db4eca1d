// The gradient of a convolution's own output, from dy after ReLU or pooling. Defines: REAL; VEC; FROM: 0, it is dy; 1, it is dy where
// y, which is after ReLU, is above 0; 2, dy is after 2x2 pooling too, and each value goes to the tap that won.
#pragma once
#include "vector.cuh"

// Where the gradients of the outputs at (oy, ox) stand in a channel of dy.
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

// VEC of dy that follow each other, as y or the winners of the pooling, at the same place, let them through.
__device__ __forceinline__ Vector gradient_at(const REAL* dy, const REAL* y, const unsigned char* winner, int tap) {
  Vector out = read(dy);
#if FROM == 1
  const Vector behind = read(y);
#pragma unroll
  for (int e = 0; e < VEC; e++) out.value[e] = behind.value[e] > 0 ? out.value[e] : REAL(0);
#elif FROM == 2
  const Several<unsigned char> won = *reinterpret_cast<const Several<unsigned char>*>(winner);
#pragma unroll
  for (int e = 0; e < VEC; e++) out.value[e] = won.value[e] == tap ? out.value[e] : REAL(0);
#endif
  return out;
}
