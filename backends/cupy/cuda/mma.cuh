// Tensor cores, from sm_80 on: C += A @ B, with A (16, K), B (K, 8) and C (16, 8) held by the 32 threads of a warp together.
//
// Factors are rounded to what PRECISION says, 1 TF32, 2 bfloat16, 3 float16, 4 to two numbers of TF32; C is added up in float. K is 8 for TF32, one number
// to a register, and else 16, two neighbours of depth to a register, the first in its lower half. With g = lane / 4, t = lane % 4,
// and P numbers to a register, number h of a register holds (PTX ISA, "Matrix fragments for mma.m16n8k8" and "m16n8k16"):
//   A: a[r]  row g + 8 (r % 2), depth P t + h + 4 P (r / 2)       B: b[r]  depth P t + h + 4 P r, column g
//   C: c0, c1  row g, columns 2 t, 2 t + 1                        c2, c3  row g + 8, the same columns
// Whoever compiles this for something else than a GPU brings functions of these names.
#ifdef __CUDA_ARCH__
// To the nearest, of two the one farther from 0: there is no other way to TF32.
__device__ __forceinline__ unsigned tf32(float x) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// To the nearest, of two the even one.
__device__ __forceinline__ unsigned bf16x2(float first, float second) {
  unsigned bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}

__device__ __forceinline__ unsigned f16x2(float first, float second) {
  unsigned bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}

#define MMA(NAME, INSTRUCTION)                                                                             \
  __device__ __forceinline__ void NAME(                                                                    \
      float& c0, float& c1, float& c2, float& c3, const unsigned (&a)[4], const unsigned (&b)[2]) {        \
    asm volatile(INSTRUCTION " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"            \
                 : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                      \
  }
MMA(mma_tf32, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
MMA(mma_bf16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
MMA(mma_f16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
#undef MMA
#endif

// A factor, from the numbers that follow each other in depth, and the product: as PRECISION says.
#if PRECISION == 4
// A number as the sum of two of TF32: what rounding leaves over is at most 2^-11 of it, and of that, again, 2^-11. Products of the
// smaller halves are left out, so that a product is off by at most 3 * 2^-22 of itself, and sums are as exact as in float32.
// Infinity, and what TF32 rounds to it (from 3.4e38 on), gives NaN.
#define MMA_DEPTH 8
struct Factor { unsigned most, rest; };
__device__ __forceinline__ Factor factor_of(float first, float) {
  const unsigned most = tf32(first);
  return {most, tf32(first - __uint_as_float(most))};
}
__device__ __forceinline__ void mma(
    float& c0, float& c1, float& c2, float& c3, const Factor (&a)[4], const Factor (&b)[2]) {
  const unsigned a_most[4] = {a[0].most, a[1].most, a[2].most, a[3].most}, b_most[2] = {b[0].most, b[1].most};
  const unsigned a_rest[4] = {a[0].rest, a[1].rest, a[2].rest, a[3].rest}, b_rest[2] = {b[0].rest, b[1].rest};
  mma_tf32(c0, c1, c2, c3, a_rest, b_most);
  mma_tf32(c0, c1, c2, c3, a_most, b_rest);
  mma_tf32(c0, c1, c2, c3, a_most, b_most);
}
#else
typedef unsigned Factor;
#if PRECISION == 1
#define MMA_DEPTH 8
#define mma mma_tf32
__device__ __forceinline__ Factor factor_of(float first, float) { return tf32(first); }
#elif PRECISION == 2
#define MMA_DEPTH 16
#define mma mma_bf16
__device__ __forceinline__ Factor factor_of(float first, float second) { return bf16x2(first, second); }
#else
#define MMA_DEPTH 16
#define mma mma_f16
__device__ __forceinline__ Factor factor_of(float first, float second) { return f16x2(first, second); }
#endif
#endif
