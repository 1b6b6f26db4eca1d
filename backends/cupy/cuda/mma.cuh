// Tensor cores, from sm_80 on: C += A @ B, with A (16, K), B (K, 8) and C (16, 8) distributed over
// the 32 threads of a warp.
//
// Factors are rounded to PRECISION: 1 TF32, 2 bfloat16, 3 float16, 4 to two TF32 values; C is
// accumulated in float. For TF32, K is 8 and a register holds one value. Otherwise K is 16 and a
// register holds two neighbours in depth, the first in its lower half. With g = lane / 4, t = lane
// % 4 and P values per register, value h of a register is (PTX ISA, "Matrix fragments for
// mma.m16n8k8" and "m16n8k16"):
//   A: a[r]  row g + 8 (r % 2), depth P t + h + 4 P (r / 2)
//   B: b[r]  depth P t + h + 4 P r, column g
//   C: c0, c1  row g, columns 2 t, 2 t + 1;  c2, c3  row g + 8, the same columns
// Code that compiles this for anything but a GPU must define functions of these names.
#ifdef __CUDA_ARCH__
// Round to nearest, ties away from 0: TF32 has no other rounding.
__device__ __forceinline__ unsigned tf32(float x) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// Round to nearest, ties to even.
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

#define MMA(NAME, INSTRUCTION)                                                                  \
  __device__ __forceinline__ void NAME(                                                         \
      float& c0, float& c1, float& c2, float& c3, const unsigned (&a)[4],                       \
      const unsigned (&b)[2]) {                                                                 \
    asm volatile(INSTRUCTION " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));           \
  }
MMA(mma_tf32, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
MMA(mma_bf16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
MMA(mma_f16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
#undef MMA
#endif

// A factor, from values adjacent in depth, and the product, in PRECISION.
#if PRECISION == 4
// A value as the sum of two TF32 values: the rounding error is at most 2^-11 of it, and the error
// of the second 2^-11 of that. Products of the two smaller halves are omitted, so a product has a
// relative error of at most 3 * 2^-22, and sums are as accurate as in float32. Infinity, and values
// that TF32 rounds to it (from 3.4e38 on), become NaN.
#define MMA_DEPTH 8
struct Factor { unsigned most, rest; };
__device__ __forceinline__ Factor factor_of(float first, float) {
  const unsigned most = tf32(first);
  return {most, tf32(first - __uint_as_float(most))};
}
__device__ __forceinline__ void mma(
    float& c0, float& c1, float& c2, float& c3, const Factor (&a)[4], const Factor (&b)[2]) {
  const unsigned a_most[4] = {a[0].most, a[1].most, a[2].most, a[3].most},
                 b_most[2] = {b[0].most, b[1].most};
  const unsigned a_rest[4] = {a[0].rest, a[1].rest, a[2].rest, a[3].rest},
                 b_rest[2] = {b[0].rest, b[1].rest};
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
__device__ __forceinline__ Factor factor_of(float first, float second) {
  return bf16x2(first, second);
}
#else
#define MMA_DEPTH 16
#define mma mma_f16
__device__ __forceinline__ Factor factor_of(float first, float second) {
  return f16x2(first, second);
}
#endif
#endif
