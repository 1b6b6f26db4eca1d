// Convolution with few channels per group, such as depthwise: too few for a tile of a matrix
// product. Each thread computes VEC outputs, tap by tap. Forward pass with bias and limits (ReLU,
// ReLU6); the gradients of the input and the weight.
//
// Letters and memory layout as in conv.cu: G groups of C in-channels and O out-channels; x (G, C,
// H, W, N), y (G, O, OH, OW, N), weight (G, O, C, KH, KW). Adjacent threads have adjacent samples,
// so that the reads and writes of a warp are coalesced.
//
// Defines: REAL; VEC; FORWARD, INPUT or WEIGHT: the kernel; FROM, in the gradients (see
// gradient.cuh): 0 or 1.
#include "gradient.cuh"
#include "reduce.cuh"
#include "walk.cuh"

#define GEOMETRY                                                                                 \
  int C, int H, int W, int O, int OH, int OW, int KH, int KW, int SH, int SW, int TOP, int LEFT, \
      int DH, int DW, int N

__device__ __forceinline__ void add(Vector& sum, const Vector& values, REAL factor) {
#pragma unroll
  for (int e = 0; e < VEC; e++) sum.value[e] += values.value[e] * factor;
}

#ifdef FORWARD
// Grid: blocks of cells = OH*OW*N, G * O.
extern "C" __global__ void __launch_bounds__(BLOCK) group_forward(
    const REAL* __restrict__ x, const REAL* __restrict__ weight, const REAL* __restrict__ bias,
    REAL* __restrict__ y, REAL low, REAL high, GEOMETRY) {
  const int cell = (blockIdx.x * BLOCK + threadIdx.x) * VEC, row = blockIdx.y, cells = OH * OW * N;
  if (cell >= cells) return;
  const int top = cell / N / OW * SH - TOP, side = cell / N % OW * SW - LEFT;
  const REAL* plane = x + row / O * C * H * W * N + cell % N;
  weight += row * C * KH * KW;
  Vector sum;
#pragma unroll
  for (int e = 0; e < VEC; e++) sum.value[e] = bias ? bias[row] : REAL(0);
  for (int c = 0; c < C; c++, plane += H * W * N)
    for (int ky = 0; ky < KH; ky++) {
      const int iy = top + ky * DH;
#pragma unroll 4
      for (int kx = 0; kx < KW; kx++, weight++) {
        const int ix = side + kx * DW;
        if ((unsigned)iy < (unsigned)H && (unsigned)ix < (unsigned)W)
          add(sum, read(plane + (iy * W + ix) * N), *weight);
      }
    }
#pragma unroll
  for (int e = 0; e < VEC; e++) {  // NaN stays
    sum.value[e] = sum.value[e] < low ? low : sum.value[e];
    sum.value[e] = sum.value[e] > high ? high : sum.value[e];
  }
  *reinterpret_cast<Vector*>(y + row * cells + cell) = sum;
}
#endif

#ifdef INPUT
// For each input, the sum over the outputs that read it, in a fixed order. bias is added, because a
// transposed convolution is the same computation.
// Grid: blocks of H*W*N, G * C.
extern "C" __global__ void __launch_bounds__(BLOCK) group_input_gradient(
    const REAL* __restrict__ dy, const REAL* __restrict__ y, const REAL* __restrict__ weight,
    const REAL* __restrict__ bias, REAL* __restrict__ dx, GEOMETRY) {
  const int place = (blockIdx.x * BLOCK + threadIdx.x) * VEC, row = blockIdx.y, plane = H * W * N,
            given = OH * OW * N;
  if (place >= plane) return;
  const int top = place / N / W + TOP, side = place / N % W + LEFT;
  int from = row / C * O * given + place % N;
  weight += (row / C * O * C + row % C) * KH * KW;
  Vector sum;
#pragma unroll
  for (int e = 0; e < VEC; e++) sum.value[e] = bias ? bias[row] : REAL(0);
  for (int o = 0; o < O; o++, from += given, weight += C * KH * KW)
    for (int ky = 0; ky < KH; ky++) {
      const int oy = top - ky * DH;
      if (oy < 0 || oy % SH) continue;
#pragma unroll 4
      for (int kx = 0; kx < KW; kx++) {
        const int ox = side - kx * DW;
        if (ox < 0 || ox % SW) continue;
        const Place at(oy / SH, ox / SW, OH, OW, N);
        if (at.inside)
          add(sum, gradient_at(dy + from + at.at, y + from + at.at, nullptr, 0),
              weight[ky * KW + kx]);
      }
    }
  *reinterpret_cast<Vector*>(dx + row * plane + place) = sum;
}
#endif

#ifdef WEIGHT
#define TAPS 4  // of a row of the kernel that a block has the sums of

// A block has a part of the cells, and TAPS taps of one row of one kernel, from kx0 on: dy is read
// once for all of them. An additional sum is that of dy itself, for dbias. With more than one
// split, sums go to partials (splits, G*O, C*KH*KW [+ 1]), and sum_partials adds them. Grid:
// splits, rows of taps = C * KH * ceil(KW / TAPS), G * O.
extern "C" __global__ void __launch_bounds__(BLOCK, 4) group_weight_gradient(
    const REAL* __restrict__ x, const REAL* __restrict__ dy, const REAL* __restrict__ y,
    REAL* __restrict__ dweight, REAL* __restrict__ dbias, REAL* __restrict__ partials, int each,
    GEOMETRY) {
  __shared__ REAL buffer[TAPS + 1][BLOCK];
  const int row = blockIdx.z, pieces = (KW + TAPS - 1) / TAPS, kx0 = blockIdx.y % pieces * TAPS;
  const int c = blockIdx.y / pieces / KH, ky = blockIdx.y / pieces % KH, cells = OH * OW * N;
  const int last = min((int)(blockIdx.x + 1) * each, cells);
  const REAL* plane = x + (row / O * C + c) * H * W * N;
  const int from = row * cells;
  REAL sums[TAPS + 1] = {0};
  int cell = blockIdx.x * each + threadIdx.x * VEC;
  for (Walk at(cell, BLOCK * VEC, OW, N); cell < last; cell += BLOCK * VEC, at.next()) {
    const int iy = at.c * SH - TOP + ky * DH, side = at.y * SW - LEFT, sample = at.x;
    const Vector gradient = gradient_at(dy + from + cell, y + from + cell, nullptr, 0);
#pragma unroll
    for (int t = 0; t < TAPS; t++) {
      const int ix = side + (kx0 + t) * DW;
      if (kx0 + t >= KW || (unsigned)iy >= (unsigned)H || (unsigned)ix >= (unsigned)W) continue;
      const Vector values = read(plane + (iy * W + ix) * N + sample);
#pragma unroll
      for (int e = 0; e < VEC; e++) sums[t] += gradient.value[e] * values.value[e];
    }
#pragma unroll
    for (int e = 0; e < VEC; e++) sums[TAPS] += gradient.value[e];
  }
  block_sums(sums, buffer);
  const int depth = C * KH * KW, columns = depth + (dbias ? 1 : 0), t = threadIdx.x;
  if (t > TAPS) return;
  const bool of_bias = t == TAPS;
  if (of_bias ? !dbias || blockIdx.y : kx0 + t >= KW) return;
  const int column = of_bias ? depth : (c * KH + ky) * KW + kx0 + t;
  const REAL sum = buffer[t][0];
  if (gridDim.x > 1) partials[((long long)blockIdx.x * gridDim.z + row) * columns + column] = sum;
  else if (of_bias) dbias[row] = sum;
  else dweight[row * depth + column] = sum;
}
#endif
