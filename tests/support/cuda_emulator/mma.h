// backends/cuda/mma.cuh on the host: the same functions, with fragments exchanged between the fibres of a warp.
//
// Written from the PTX ISA's figures, by itself. What a GPU leaves open is fixed: products are added up in float in the order of depth.
#pragma once

namespace emulated {

// Numbers that other lanes of the warp read, decoded; in turn two sets, so that one barrier for each product is enough.
struct Fragments { float a[4][2], b[2][2]; };
static Fragments held[THREADS / 32][2][32];

inline float of_tf32(unsigned bits, int) { return __uint_as_float(bits & ~0x1fffu); }  // the 13 lowest bits are not looked at
inline float of_bf16(unsigned bits, int half) { return __uint_as_float(half ? bits & 0xffff0000u : bits << 16); }
inline float of_f16(unsigned bits, int half) {
  const unsigned u = half ? bits >> 16 : bits & 0xffff, fraction = u & 0x3ff;
  const int exponent = u >> 10 & 31;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                                    : exponent ? ldexpf(1024 + fraction, exponent - 25) : ldexpf(fraction, -24);
  return u >> 15 ? -size : size;
}

// P numbers in each register.
template <int P, float (*number)(unsigned, int)>
inline void mma(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  const int warp = running / 32, lane = running % 32, g = lane / 4, t = lane % 4;
  Fragments(&lanes)[32] = held[warp][generation[warp] % 2];
  for (int h = 0; h < P; h++) {
    for (int r = 0; r < 4; r++) lanes[lane].a[r][h] = number(a[r], h);
    for (int r = 0; r < 2; r++) lanes[lane].b[r][h] = number(b[r], h);
  }
  wait_for_warp(__LINE__);
  for (int i = 0; i < 4; i++) {
    const int row = g + (i < 2 ? 0 : 8), column = 2 * t + i % 2;
    for (int k = 0; k < 8 * P; k++) {
      const int upper = k >= 4 * P, beside = k % (4 * P) / P;  // the lane's place among the four of a row or column
      c[i] += lanes[row % 8 * 4 + beside].a[2 * upper + row / 8][k % P] * lanes[column * 4 + beside].b[upper][k % P];
    }
  }
}

inline unsigned to_bf16(float x) {
  const unsigned u = __float_as_uint(x);
  return x != x ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}

inline unsigned to_f16(float x) {
  const unsigned u = __float_as_uint(fabsf(x)), sign = __float_as_uint(x) >> 16 & 0x8000;
  if (x != x) return 0x7fff;
  if (u >= 0x477ff000) return sign | 0x7c00;  // from 65520 on
  if (u < 0x38800000) return sign | (unsigned)rintf(ldexpf(fabsf(x), 24));  // below the least normal number
  return sign | (((u + 0xfff + (u >> 13 & 1)) >> 13) - (112 << 10));
}

}  // namespace emulated

inline unsigned tf32(float x) {
  const unsigned u = __float_as_uint(x);
  return x != x ? 0x7fffffff : isinf(x) ? u : (u + 0x1000) & ~0x1fffu;
}
inline unsigned bf16x2(float first, float second) { return emulated::to_bf16(first) | emulated::to_bf16(second) << 16; }
inline unsigned f16x2(float first, float second) { return emulated::to_f16(first) | emulated::to_f16(second) << 16; }

#define EMULATED_MMA(name, ...) \
  inline void name(float& c0, float& c1, float& c2, float& c3, const unsigned (&a)[4], const unsigned (&b)[2]) { \
    float c[4] = {c0, c1, c2, c3}; \
    emulated::mma<__VA_ARGS__>(c, a, b); \
    c0 = c[0], c1 = c[1], c2 = c[2], c3 = c[3]; \
  }
EMULATED_MMA(mma_tf32, 1, emulated::of_tf32)
EMULATED_MMA(mma_bf16, 2, emulated::of_bf16)
EMULATED_MMA(mma_f16, 2, emulated::of_f16)
#undef EMULATED_MMA
