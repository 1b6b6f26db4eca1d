// Convolution over one or two axes as a matrix product whose second factor, the columns, is never
// written: it is read from the input. Forward pass with bias, ReLU and 2x2 max pooling; the
// gradients of the input and of the weight.
//
// G groups; in each: C in-channels, O out-channels. H, W input, OH, OW output, KH, KW kernel, SH,
// SW stride, DH, DW dilation, TOP, LEFT padding, N batch. x is stored (G, C, H, W, N), y (G, O, OH,
// OW, N), weight (G, O, C, KH, KW); one axis means H = KH = 1. All indices fit into int, which the
// host checks.
//
// The depth is traversed a STEP of channels at a time, and these channels tap by tap: the address
// and the bounds of a tap are computed once per step, and the channels of a step have a constant
// stride. The taps of a step read the same channels, from the L1 cache. A forward pass of few
// channels proceeds value by value instead. Values outside the input are read from `constants`.
// Rows and columns beyond the end of a matrix are computed from the last one's values and not
// written.
//
// Defines: REAL; TM, TN, TX, SLICES, VEC (see tile.cuh); FORWARD, INPUT or WEIGHT: the kernel;
// POOL, in the forward pass: 0, or 1 for 2x2 max pooling; BY_TAP: 0 value by value (forward only),
// 1 by tap, 2 by tap if C (in the input gradient: O) is a multiple of STEP; STRIDED, in the input
// gradient: 0 if SH = SW = 1; PRECISION (see mma.cuh); FROM, in the gradients: the kind of dy (see
// gradient.cuh). VEC is above 1 only if N is a multiple of it and all arrays are aligned to it.
#include "gradient.cuh"
#include "tile.cuh"
#include "walk.cuh"

#define GEOMETRY                                                                                 \
  int C, int H, int W, int O, int OH, int OW, int KH, int KW, int SH, int SW, int TOP, int LEFT, \
      int DH, int DW, int N

#define CUT 255  // a window's winner if ReLU returns 0

// The number of values of a row that a thread writes at once.
constexpr int WRITTEN = TOGETHER % VEC == 0 ? VEC : 1;
struct __align__(WRITTEN * sizeof(REAL)) Written { REAL value[WRITTEN]; };

// The least number of blocks per multiprocessor; fewer if many loads with separate indices would
// cause register spills.
#ifdef FORWARD
#define CROWDED (BY_TAP < 2 && TM * TN >= 64 ? 1 : 0)
#elif defined(INPUT)
#define CROWDED                                                                                \
  ((FROM > 0 && VEC == 1) || (STRIDED && TM * TN >= 64) || (STRIDED && FROM > 0 && SLICES > 1) \
       ? 1 : 0)
#else
#define CROWDED (SLICES > 2 ? (VEC == 1 ? 2 : FROM == 2 ? 1 : 0) : VEC == 1 ? 1 : 0)
#endif
#define BLOCKS (RESIDENT > CROWDED ? RESIDENT - CROWDED : 1)

__device__ const __align__(16) REAL constants[8] = {0, 0, 0, 0, 1, 1, 1, 1};  // zeros and ones

#ifndef WEIGHT
// Loads of columns: threads are side by side along a line, VEC columns each, LINES lines at once.
constexpr int ACROSS_LINE = BN / VEC, LINES = THREADS / ACROSS_LINE, B_LOADS = STEP / LINES;
static_assert(STEP % LINES == 0, "a load is of one step");
// Whether a load is in bounds; unless BK divides the depth, the last BK may be half full.
#define WHOLE(condition) ((BY_TAP == 2 && BK == STEP) || (condition))
#endif

#ifdef FORWARD
#if POOL
// Of 16 columns, four at distance 4 are the taps of a window; this is the index of the window in
// the block.
__device__ __forceinline__ int window_of(int column) { return column / 16 * 4 + column % 4; }
#endif

// y (O, cells) = weight (O, C*KH*KW) @ columns, cells = OH*OW*N; pooled: (O, OH/2*OW/2*N), and the
// winning tap.
// Grid: tiles of columns, tiles of rows, groups. With pooling, a thread's columns are the four taps
// of COLUMNS/4 windows, so that a thread has all values of a window.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv_forward(
    const REAL* __restrict__ x, const REAL* __restrict__ weight, const REAL* __restrict__ bias,
    REAL* __restrict__ y, unsigned char* __restrict__ winner, int relu, GEOMETRY) {
  __shared__ Shared shared;
  constexpr int a_lines = THREADS / STEP, a_loads = (BM + a_lines - 1) / a_lines;
  const int tid = threadIdx.x, row0 = blockIdx.y * BM, taps = KH * KW, plane = H * W * N;
  const int column = tid % ACROSS_LINE * VEC, line = tid / ACROSS_LINE;
#if POOL
  const int cells = (OH / 2) * (OW / 2) * N, across = OW / 2, tap = column / 4 % 4;
  const int cell = min((int)blockIdx.x * (BN / 4) + window_of(column), cells - VEC);
  const int oy = cell / N / across * 2 + tap / 2, ox = cell / N % across * 2 + tap % 2;
#else
  const int cells = OH * OW * N, cell = min((int)blockIdx.x * BN + column, cells - VEC);
  const int oy = cell / N / OW, ox = cell / N % OW;
#endif
  const int top = oy * SH - TOP, side = ox * SW - LEFT;
  // The address of this thread's first values, without the tap; for the weight, the row of each
  // load.
  const REAL* from = x + (blockIdx.z * C + (BY_TAP ? line : 0)) * plane + cell % N;
  const REAL* from_weight = weight + (blockIdx.z * O + min(row0 + tid / STEP, O - 1)) * C * taps;
  const int below = O - 1 - row0 - tid / STEP;  // rows of the weight below that of the first load
#if BY_TAP
  const int depth = (C + STEP - 1) / STEP * STEP * taps;
  from_weight += tid % STEP * taps;
  int channel = 0, ky = 0, kx = 0;
#else
  const int depth = C * taps;
  Walk at(line, LINES, KH, KW);
#endif

  REAL a[BK / STEP][a_loads], sum[ROWS][COLUMNS];
  Vector b[BK / STEP][B_LOADS];
  product(
      0, depth, shared, sum,
      [&](int k) {
#pragma unroll
        for (int s = 0; s < BK / STEP; s++) {
#if BY_TAP
          const int ahead = 0;
          const bool within = WHOLE(channel + tid % STEP < C);
          const int iy = top + ky * DH, ix = side + kx * DW;
          const bool inside = (unsigned)iy < (unsigned)H && (unsigned)ix < (unsigned)W;
          const REAL* here = inside ? from + (iy * W + ix) * N : constants;
          const int stride = inside ? LINES * plane : 0;
          const int left = C - channel - line;
#else
          const int ahead = k + s * STEP + tid % STEP;
          const bool within = ahead < depth;
#endif
#pragma unroll
          for (int i = 0; i < a_loads; i++)
            a[s][i] =
                within ? from_weight[max(min(i * a_lines, below), 0) * taps * C + ahead] : REAL(0);
#pragma unroll
          for (int i = 0; i < B_LOADS; i++) {
#if BY_TAP
            b[s][i] = read(WHOLE(i * LINES < left) ? here + i * stride : constants);
#else
            const int iy = top + at.y * DH, ix = side + at.x * DW;
            const bool inside =
                at.c < C && (unsigned)iy < (unsigned)H && (unsigned)ix < (unsigned)W;
            b[s][i] = read(inside ? from + ((at.c * H + iy) * W + ix) * N : constants);
            at.next();
#endif
          }
#if BY_TAP
          from_weight++;
          if (++kx == KW) {
            kx = 0;
            if (++ky == KH)
              ky = 0, channel += STEP, from += STEP * plane, from_weight += (STEP - 1) * taps;
          }
#endif
        }
      },
      [&](int half) {
#pragma unroll
        for (int s = 0; s < BK / STEP; s++) {
#pragma unroll
          for (int i = 0; i < a_loads; i++) {
            const int own = tid / STEP + i * a_lines;
            if (own < BM) shared.left.at[half][s * STEP + tid % STEP][own] = a[s][i];
          }
#pragma unroll
          for (int i = 0; i < B_LOADS; i++)
            *reinterpret_cast<Vector*>(
                &shared.right.at[half][s * STEP + line + i * LINES][column]) = b[s][i];
        }
      });

#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    const int row = row0 + own_row(i);
    if (row >= O) continue;
    const REAL shift = bias ? bias[blockIdx.z * O + row] : REAL(0);
    const int first = (blockIdx.z * O + row) * cells;
#if POOL
#pragma unroll
    for (int j = 0; j < COLUMNS; j += 4) {
      const int to = blockIdx.x * (BN / 4) + window_of(own_column(j));
      if (to >= cells) continue;
      REAL most = sum[i][j] + shift;
      int won = 0;
#pragma unroll
      for (int t = 1; t < 4; t++) {
        const REAL value = sum[i][j + t] + shift;
        if (value > most || value != value)
          most = value, won = t;  // the first of equals; NaN stays
      }
      y[first + to] = relu && most <= 0 ? REAL(0) : most;
      if (winner) winner[first + to] = relu && most <= 0 ? CUT : won;
    }
#else
#pragma unroll
    for (int j = 0; j < COLUMNS; j += WRITTEN) {
      const int to = blockIdx.x * BN + own_column(j);
      if (to >= cells) continue;
      Written out;
#pragma unroll
      for (int e = 0; e < WRITTEN; e++) {
        const REAL value = sum[i][j + e] + shift;
        out.value[e] = relu && value <= 0 ? REAL(0) : value;
      }
      *reinterpret_cast<Written*>(y + first + to) = out;
    }
#endif
  }
}
#else

#ifdef INPUT
// dx (C, H*W*N) = weight.T (C, O*taps) @ the gradients of the outputs that read each input. It
// gathers, so there are no atomic additions, and the order of every sum is fixed. bias is added,
// because a transposed convolution is the same computation.
//
// Inputs with the same remainders modulo the stride have the same taps. Each such phase is a
// separate product, in which the row of an output decreases by `back` from tap to tap. Grid: tiles
// of columns, tiles of rows, groups * SH * SW.
struct Phase {  // of one axis
  int inputs, taps, first, every, back;
  __device__ __forceinline__ Phase(
      int remainder, int size, int kernel, int stride, int before, int dilation) {
    inputs = size, taps = kernel, first = 0, every = 1, back = dilation;
    if (!STRIDED) return;
    inputs = remainder < size ? (size - 1 - remainder) / stride + 1 : 0;
#pragma unroll 1
    while (first < kernel && (remainder + before - first * dilation) % stride != 0) first++;
#pragma unroll 1
    while (every * dilation % stride != 0) every++;
    taps = first < kernel ? (kernel - 1 - first) / every + 1 : 0;
    back = every * dilation / stride;
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv_input_gradient(
    const REAL* __restrict__ dy, const REAL* __restrict__ y,
    const unsigned char* __restrict__ winner, const REAL* __restrict__ weight,
    const REAL* __restrict__ bias, REAL* __restrict__ dx, int given, GEOMETRY) {
  __shared__ Shared shared;
  constexpr int a_lines = THREADS / BM, a_loads = (STEP + a_lines - 1) / a_lines;
  const int tid = threadIdx.x, row0 = blockIdx.y * BM, all_taps = KH * KW;
  const int sh = STRIDED ? SH : 1, sw = STRIDED ? SW : 1;
  const int group = blockIdx.z / (sh * sw), remainder = blockIdx.z % (sh * sw);
  const Phase down(remainder / sw, H, KH, sh, TOP, DH), across(remainder % sw, W, KW, sw, LEFT, DW);
  const int cells = down.inputs * across.inputs * N,
            depth = (O + STEP - 1) / STEP * STEP * down.taps * across.taps;
  if ((int)(blockIdx.x * BN) >= cells) return;  // the first phase has the most cells
  const int column = tid % ACROSS_LINE * VEC, line = tid / ACROSS_LINE;
  const int cell = min((int)blockIdx.x * BN + column, cells - VEC);
  const int iy = remainder / sw + cell / N / across.inputs * sh,
            ix = remainder % sw + cell / N % across.inputs * sw;
  const int top = (iy + TOP - down.first * DH) / sh, side = (ix + LEFT - across.first * DW) / sw;
  const int own_a = tid % BM, line_a = tid / BM % STEP;
  // The index of this thread's first values, without the tap; given: the number of values of dy per
  // channel.
  int from = (group * O + line) * given + cell % N;
  int from_weight = ((group * O + line_a) * C + min(row0 + own_a, C - 1)) * all_taps +
                    down.first * KW + across.first;
  int channel = 0, ty = 0, tx = 0;

  REAL a[BK / STEP][a_loads], sum[ROWS][COLUMNS];
  Vector b[BK / STEP][B_LOADS];
  product(
      0, depth, shared, sum,
      [&](int) {
#pragma unroll
        for (int s = 0; s < BK / STEP; s++) {
          const REAL* here_a = weight + (from_weight + ty * down.every * KW + tx * across.every);
          const int left_a = O - channel - line_a, left = O - channel - line;
          const Place place(top - ty * down.back, side - tx * across.back, OH, OW, N);
          const REAL* here = place.inside ? dy + (from + place.at) : constants;
#if FROM == 1
          const REAL* behind = place.inside ? y + (from + place.at) : constants;
#else
          const REAL* behind = here;
#endif
#if FROM == 2
          const unsigned char* won = winner + (place.inside ? from + place.at : 0);
#else
          const unsigned char* won = winner;
#endif
          const int stride = place.inside ? LINES * given : 0;
#pragma unroll
          for (int i = 0; i < a_loads; i++)
            a[s][i] = WHOLE(i * a_lines < left_a) ? here_a[i * a_lines * C * all_taps] : REAL(0);
#pragma unroll
          for (int i = 0; i < B_LOADS; i++) {
            const bool within = WHOLE(i * LINES < left);
            const REAL *own = within ? here + i * stride : constants,
                       *own_y = within ? behind + i * stride : constants;
            b[s][i] = gradient_at(own, own_y, won + (within ? i * stride : 0), place.tap);
          }
          if (++tx == across.taps) {
            tx = 0;
            if (++ty == down.taps)
              ty = 0, channel += STEP, from += STEP * given, from_weight += STEP * C * all_taps;
          }
        }
      },
      [&](int half) {
#pragma unroll
        for (int s = 0; s < BK / STEP; s++) {
#pragma unroll
          for (int i = 0; i < a_loads; i++)
            if (tid / BM + i * a_lines < STEP)
              shared.left.at[half][s * STEP + line_a + i * a_lines][own_a] = a[s][i];
#pragma unroll
          for (int i = 0; i < B_LOADS; i++)
            *reinterpret_cast<Vector*>(
                &shared.right.at[half][s * STEP + line + i * LINES][column]) = b[s][i];
        }
      });

#pragma unroll
  for (int j = 0; j < COLUMNS; j += WRITTEN) {
    const int to = blockIdx.x * BN + own_column(j);
    if (to >= cells) continue;
    int place = to;
    if (STRIDED) {
      const int hy = remainder / sw + to / N / across.inputs * sh,
                hx = remainder % sw + to / N % across.inputs * sw;
      place = (hy * W + hx) * N + to % N;
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      const int row = row0 + own_row(i);
      if (row >= C) continue;
      const REAL shift = bias ? bias[group * C + row] : REAL(0);
      Written out;
#pragma unroll
      for (int e = 0; e < WRITTEN; e++) out.value[e] = sum[i][j + e] + shift;
      *reinterpret_cast<Written*>(dx + ((group * C + row) * H * W * N + place)) = out;
    }
  }
}
#endif

#ifdef WEIGHT
// dweight (O, C*KH*KW) = gradients (O, cells) @ columns.T, cells = OH*OW*N; an additional column of
// ones computes dbias. The cells are split: with more than one split, each writes its sums to
// partials (splits, G*O, columns), and sum_partials adds them.
// Grid: tiles of columns, tiles of rows, G * splits.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv_weight_gradient(
    const REAL* __restrict__ x, const REAL* __restrict__ dy, const REAL* __restrict__ y,
    const unsigned char* __restrict__ winner, REAL* __restrict__ dweight, REAL* __restrict__ dbias,
    REAL* __restrict__ partials, int splits, int each, int given, GEOMETRY) {
  __shared__ Shared shared;
  constexpr int deep = BK / VEC, lines = THREADS / deep;
  constexpr int a_loads = (BM + lines - 1) / lines, b_loads = (BN + lines - 1) / lines;
  const int tid = threadIdx.x, row0 = blockIdx.y * BM, column0 = blockIdx.x * BN;
  const int group = blockIdx.z / splits, split = blockIdx.z % splits;
  const int depth = C * KH * KW, columns = depth + (dbias ? 1 : 0), cells = OH * OW * N;
  const int first = split * each, last = min(first + each, cells);
  // This thread has VEC cells of every BK, and every lines-th column, whose taps do not change.
  const int own = tid % deep * VEC, line = tid / deep;
  int cell = first + own;
  Walk at(cell, BK, OW, N);
  // The index of their values, without the cell; given: the number of values of dy per channel.
  int from_y[a_loads], from_x[b_loads], ky[b_loads], kx[b_loads];
  const REAL* outside[b_loads];  // the additional column is all ones
#pragma unroll
  for (int i = 0; i < a_loads; i++)
    from_y[i] = (group * O + min(row0 + line + i * lines, O - 1)) * given;
#pragma unroll
  for (int i = 0; i < b_loads; i++) {
    const int column = column0 + line + i * lines;
    ky[i] = column < depth ? column / KW % KH * DH - TOP : -(1 << 30);
    kx[i] = column % KW * DW - LEFT;
    from_x[i] =
        column < depth ? (((group * C + column / (KH * KW)) * H + ky[i]) * W + kx[i]) * N : 0;
    outside[i] = constants + (column < depth ? 0 : 4);
  }

  REAL sum[ROWS][COLUMNS];
  Vector a[a_loads], b[b_loads];
  product(
      first, last, shared, sum,
      [&](int) {
        const bool here = cell < last;
        const int oy = at.c, ox = at.y, sample = at.x;
        const Place place(here ? oy : -1, ox, OH, OW, N);
        const int own_dy = place.at + sample, own_x = (oy * SH * W + ox * SW) * N + sample;
#pragma unroll
        for (int i = 0; i < a_loads; i++) {
          const int from = from_y[i] + own_dy;
          const REAL *own = place.inside ? dy + from : constants,
                     *behind = place.inside ? y + from : constants;
          a[i] = gradient_at(own, behind, winner + (place.inside ? from : 0), place.tap);
        }
#pragma unroll
        for (int i = 0; i < b_loads; i++) {
          const int iy = oy * SH + ky[i], ix = ox * SW + kx[i];
          const bool inside = here && (unsigned)iy < (unsigned)H && (unsigned)ix < (unsigned)W;
          b[i] = read(inside ? x + (from_x[i] + own_x) : outside[i]);
        }
        cell += BK;
        at.next();
      },
      [&](int half) {
#pragma unroll
        for (int i = 0; i < a_loads; i++)
#pragma unroll
          for (int e = 0; e < VEC; e++)
            if (line + i * lines < BM)
              shared.left.at[half][own + e][line + i * lines] = a[i].value[e];
#pragma unroll
        for (int i = 0; i < b_loads; i++)
#pragma unroll
          for (int e = 0; e < VEC; e++)
            if (line + i * lines < BN)
              shared.right.at[half][own + e][line + i * lines] = b[i].value[e];
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
