// Convolution of one or two axes as a matrix product whose second factor, the columns, is never written: it is read from where
// it lies. Forward with bias, ReLU and 2x2 max pooling; the gradients of the input and of the weight.
//
// G groups; in each: C in-channels, O out-channels. H, W input, OH, OW output, KH, KW kernel, SH, SW stride, DH, DW dilation,
// TOP, LEFT padding, N batch. x lies (G, C, H, W, N), y (G, O, OH, OW, N), weight (G, O, C, KH, KW); one axis is H = KH = 1.
// All indices fit into int: the host sees to that.
//
// Defines: REAL; TM, TN, TX (see tile.cuh); FORWARD, INPUT or WEIGHT, which of the kernels; POOL, in the forward: 0, or 1 for
// 2x2 max pooling; PRECISION (see mma.cuh); FROM, in the gradients: how dy is that of the convolution (see gradient_at).
#include "tile.cuh"

#define GEOMETRY                                                                                                        \
  int C, int H, int W, int O, int OH, int OW, int KH, int KW, int SH, int SW, int TOP, int LEFT, int DH, int DW, int N

#define CUT 255  // as a window's winner: ReLU let nothing through

#ifdef FORWARD
#if POOL
// Four columns that lie APART, from one of a thread's on, are the taps of a window: this is the window, among the block's.
__device__ __forceinline__ int window_of(int column) { return column / (4 * APART) * APART + column % APART; }
#endif

// y (O, cells) = weight (O, C*KH*KW) @ columns, cells = OH*OW*N; pooled: (O, OH/2*OW/2*N), and the tap that won.
// Grid: tiles of columns, tiles of rows, groups. With pooling, a thread's columns are the four taps of COLUMNS/4 windows, so that
// it has each window's numbers to itself.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) conv_forward(
    const REAL* __restrict__ x, const REAL* __restrict__ weight, const REAL* __restrict__ bias, REAL* __restrict__ y,
    unsigned char* __restrict__ winner, int relu, GEOMETRY) {
  __shared__ Left left;
  __shared__ Right right;
  constexpr int rows_at_once = THREADS / BN, b_loads = BK / rows_at_once, a_loads = (BM * BK + THREADS - 1) / THREADS;
  const int tid = threadIdx.x, row0 = blockIdx.y * BM, depth = C * KH * KW;
  x += blockIdx.z * C * H * W * N;
  weight += blockIdx.z * O * depth;

  const int column = tid % BN;
#if POOL
  const int cells = (OH / 2) * (OW / 2) * N, across = OW / 2, tap = column / APART % 4;
  const int cell = blockIdx.x * (BN / 4) + window_of(column);
  const int oy = cell / N / across * 2 + tap / 2, ox = cell / N % across * 2 + tap % 2;
#else
  const int cells = OH * OW * N, cell = blockIdx.x * BN + column;
  const int oy = cell / N / OW, ox = cell / N % OW;
#endif
  const int nowhere = -(1 << 30);  // no tap leads from there into the input
  const int top = cell < cells ? oy * SH - TOP : nowhere, side = ox * SW - LEFT, sample = cell % N;
  Walk at(tid / BN, rows_at_once, KH, KW);

  REAL a[a_loads], b[b_loads], sum[ROWS][COLUMNS];
  product(
      0, depth, left, right, sum,
      [&](int k) {
#pragma unroll
        for (int i = 0; i < a_loads; i++) {
          const int line = tid / BK + i * (THREADS / BK), row = row0 + line, kk = k + tid % BK;
          a[i] = line < BM && row < O && kk < depth ? weight[row * depth + kk] : REAL(0);
        }
#pragma unroll
        for (int i = 0; i < b_loads; i++) {
          const int iy = top + at.y * DH, ix = side + at.x * DW;
          const bool inside = at.c < C && (unsigned)iy < (unsigned)H && (unsigned)ix < (unsigned)W;
          b[i] = inside ? x[((at.c * H + iy) * W + ix) * N + sample] : REAL(0);
          at.next();
        }
      },
      [&](int half) {
#pragma unroll
        for (int i = 0; i < a_loads; i++) {
          const int line = tid / BK + i * (THREADS / BK);
          if (line < BM) left.at[half][tid % BK][line] = a[i];
        }
#pragma unroll
        for (int i = 0; i < b_loads; i++) right.at[half][tid / BN + i * rows_at_once][column] = b[i];
      });

#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    const int row = row0 + own_row(i);
    if (row >= O) continue;
    const REAL shift = bias ? bias[blockIdx.z * O + row] : REAL(0);
    const int line = (blockIdx.z * O + row) * cells;
#if POOL
#pragma unroll
    for (int j = 0; j < COLUMNS; j += 4) {
      const int to = blockIdx.x * (BN / 4) + window_of(own_column(j));
      if (to >= cells) continue;
      REAL most = sum[i][j] + shift;
      int first = 0;
#pragma unroll
      for (int t = 1; t < 4; t++) {
        const REAL value = sum[i][j + t] + shift;
        if (value > most || value != value) most = value, first = t;  // of equals the first; a NaN stays
      }
      y[line + to] = relu && most <= 0 ? REAL(0) : most;
      if (winner) winner[line + to] = relu && !(most > 0) ? CUT : first;
    }
#else
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
      const int to = blockIdx.x * BN + own_column(j);
      if (to >= cells) continue;
      const REAL value = sum[i][j] + shift;
      y[line + to] = relu && value <= 0 ? REAL(0) : value;
    }
#endif
  }
}
#else

// The gradient of the convolution's own output at (row, oy, ox, sample), cell = (oy * OW + ox) * N + sample. FROM 0: dy is it;
// 1: dy where y, which is after ReLU, is above 0; 2: dy is after 2x2 pooling too, and each goes to the tap that won.
__device__ __forceinline__ REAL gradient_at(
    const REAL* __restrict__ dy, const REAL* __restrict__ y, const unsigned char* __restrict__ winner, int row, int oy,
    int ox, int sample, int cell, int OH, int OW, int N) {
#if FROM == 2
  const int down = OH / 2, across = OW / 2, wy = oy / 2, wx = ox / 2;
  const int from = ((row * down + wy) * across + wx) * N + sample;
  return wy < down && wx < across && winner[from] == (oy % 2) * 2 + ox % 2 ? dy[from] : REAL(0);
#else
  const int from = row * OH * OW * N + cell;
#if FROM == 1
  return y[from] > 0 ? dy[from] : REAL(0);
#else
  return dy[from];
#endif
#endif
}

#ifdef INPUT
// dx (C, H*W*N) = weight.T (C, O*taps) @ the gradients that each input's outputs have: read from there, so nothing is added to
// twice and the order of every sum is fixed. bias is added: a transposed convolution is the same.
//
// Inputs with the same remainders by the stride have the same taps, so each such phase is a product of its own, and in it
// an output's row is a number that falls by `back` from tap to tap. Grid: tiles of columns, tiles of rows, groups * SH * SW.
struct Phase {  // of one axis
  int inputs, taps, first, every, back;
  __device__ __forceinline__ Phase(int remainder, int size, int kernel, int stride, int before, int dilation) {
    inputs = remainder < size ? (size - 1 - remainder) / stride + 1 : 0;
    first = 0, every = 1;
    while (first < kernel && (remainder + before - first * dilation) % stride != 0) first++;
    while (every * dilation % stride != 0) every++;
    taps = first < kernel ? (kernel - 1 - first) / every + 1 : 0;
    back = every * dilation / stride;
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) conv_input_gradient(
    const REAL* __restrict__ dy, const REAL* __restrict__ y, const unsigned char* __restrict__ winner,
    const REAL* __restrict__ weight, const REAL* __restrict__ bias, REAL* __restrict__ dx, int given, GEOMETRY) {
  __shared__ Left left;
  __shared__ Right right;
  constexpr int rows_at_once = THREADS / BN, b_loads = BK / rows_at_once, a_loads = (BM * BK + THREADS - 1) / THREADS;
  const int tid = threadIdx.x, row0 = blockIdx.y * BM;
  const int group = blockIdx.z / (SH * SW), remainder = blockIdx.z % (SH * SW);
  const Phase down(remainder / SW, H, KH, SH, TOP, DH), across(remainder % SW, W, KW, SW, LEFT, DW);
  const int cells = down.inputs * across.inputs * N, taps = down.taps * across.taps, depth = O * taps;
  if ((int)(blockIdx.x * BN) >= cells) return;  // the first phase has the most
  dy += group * O * given;  // given: numbers of dy in a channel
#if FROM == 1
  y += group * O * given;
#elif FROM == 2
  winner += group * O * given;
#endif
  weight += group * O * C * KH * KW;

  const int column = tid % BN, cell = blockIdx.x * BN + column, sample = cell % N;
  const int iy = remainder / SW + cell / N / across.inputs * SH, ix = remainder % SW + cell / N % across.inputs * SW;
  const int nowhere = -(1 << 30);  // no tap leads from there into the output
  const int top = cell < cells && depth > 0 ? (iy + TOP - down.first * DH) / SH : nowhere;
  const int side = (ix + LEFT - across.first * DW) / SW;
  Walk at(tid / BN, rows_at_once, max(down.taps, 1), max(across.taps, 1));
  Walk weights(tid % BK, BK, max(down.taps, 1), max(across.taps, 1));

  REAL a[a_loads], b[b_loads], sum[ROWS][COLUMNS];
  product(
      0, depth, left, right, sum,
      [&](int) {
        const int tap = (down.first + weights.y * down.every) * KW + across.first + weights.x * across.every;
#pragma unroll
        for (int i = 0; i < a_loads; i++) {
          const int line = tid / BK + i * (THREADS / BK), row = row0 + line;
          const bool inside = line < BM && row < C && weights.c < O && depth > 0;
          a[i] = inside ? weight[(weights.c * C + row) * KH * KW + tap] : REAL(0);
        }
        weights.next();
#pragma unroll
        for (int i = 0; i < b_loads; i++) {
          const int oy = top - at.y * down.back, ox = side - at.x * across.back;
          const bool inside = at.c < O && (unsigned)oy < (unsigned)OH && (unsigned)ox < (unsigned)OW;
          const int from = (oy * OW + ox) * N + sample;
          b[i] = inside ? gradient_at(dy, y, winner, at.c, oy, ox, sample, from, OH, OW, N) : REAL(0);
          at.next();
        }
      },
      [&](int half) {
#pragma unroll
        for (int i = 0; i < a_loads; i++) {
          const int line = tid / BK + i * (THREADS / BK);
          if (line < BM) left.at[half][tid % BK][line] = a[i];
        }
#pragma unroll
        for (int i = 0; i < b_loads; i++) right.at[half][tid / BN + i * rows_at_once][column] = b[i];
      });

#pragma unroll
  for (int j = 0; j < COLUMNS; j++) {
    const int to = blockIdx.x * BN + own_column(j), s = to % N;
    if (to >= cells) continue;
    const int hy = remainder / SW + to / N / across.inputs * SH, hx = remainder % SW + to / N % across.inputs * SW;
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      const int row = row0 + own_row(i);
      if (row >= C) continue;
      const REAL shift = bias ? bias[group * C + row] : REAL(0);
      dx[(((group * C + row) * H + hy) * W + hx) * N + s] = sum[i][j] + shift;
    }
  }
}
#endif

#ifdef WEIGHT
// dweight (O, C*KH*KW) = gradients (O, cells) @ columns.T, cells = OH*OW*N; one column more, of ones, gives dbias. The cells are
// split: with more than one split, each writes its sums to partials (splits, G*O, columns), to be added up by sum_partials.
// Grid: tiles of columns, tiles of rows, G * splits.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) conv_weight_gradient(
    const REAL* __restrict__ x, const REAL* __restrict__ dy, const REAL* __restrict__ y,
    const unsigned char* __restrict__ winner, REAL* __restrict__ dweight, REAL* __restrict__ dbias,
    REAL* __restrict__ partials, int splits, int each, int given, GEOMETRY) {
  __shared__ Left left;
  __shared__ Right right;
  constexpr int lines = THREADS / BK, a_loads = BM / lines, b_loads = BN / lines;
  const int tid = threadIdx.x, row0 = blockIdx.y * BM, column0 = blockIdx.x * BN;
  const int group = blockIdx.z / splits, split = blockIdx.z % splits;
  const int depth = C * KH * KW, columns = depth + (dbias ? 1 : 0), cells = OH * OW * N;
  const int first = split * each, last = min(first + each, cells);
  x += group * C * H * W * N;
  dy += group * O * given;  // given: numbers of dy in a channel
#if FROM == 1
  y += group * O * given;
#elif FROM == 2
  winner += group * O * given;
#endif

  // Of the cells, this thread takes every BK-th; of the columns, every lines-th: their taps stay the same.
  int cell = first + tid % BK;
  Walk at(cell, BK, OW, N);
  int channel[b_loads], ky[b_loads], kx[b_loads];
#pragma unroll
  for (int i = 0; i < b_loads; i++) {
    const int column = column0 + tid / BK + i * lines;
    channel[i] = column < depth ? column / (KH * KW) : -1;
    ky[i] = column / KW % KH * DH - TOP;
    kx[i] = column % KW * DW - LEFT;
  }

  REAL a[a_loads], b[b_loads], sum[ROWS][COLUMNS];
  product(
      first, last, left, right, sum,
      [&](int) {
        const bool here = cell < last;
        const int oy = at.c, ox = at.y, sample = at.x;
#pragma unroll
        for (int i = 0; i < a_loads; i++) {
          const int row = row0 + tid / BK + i * lines;
          a[i] = here && row < O ? gradient_at(dy, y, winner, row, oy, ox, sample, cell, OH, OW, N) : REAL(0);
        }
#pragma unroll
        for (int i = 0; i < b_loads; i++) {
          const int iy = oy * SH + ky[i], ix = ox * SW + kx[i];
          const bool inside = here && channel[i] >= 0 && (unsigned)iy < (unsigned)H && (unsigned)ix < (unsigned)W;
          b[i] = inside ? x[((channel[i] * H + iy) * W + ix) * N + sample] : REAL(0);
          if (here && column0 + tid / BK + i * lines == depth) b[i] = 1;
        }
        cell += BK;
        at.next();
      },
      [&](int half) {
#pragma unroll
        for (int i = 0; i < a_loads; i++) left.at[half][tid % BK][tid / BK + i * lines] = a[i];
#pragma unroll
        for (int i = 0; i < b_loads; i++) right.at[half][tid % BK][tid / BK + i * lines] = b[i];
      });

  const int rows = gridDim.z / splits * O;
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    const int own = row0 + own_row(i), row = group * O + own;
    if (own >= O) continue;
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
      const int column = column0 + own_column(j);
      if (column >= columns) continue;
      if (splits > 1) partials[((long long)split * rows + row) * columns + column] = sum[i][j];
      else if (column < depth) dweight[row * depth + column] = sum[i][j];
      else dbias[row] = sum[i][j];
    }
  }
}
#endif
#endif
