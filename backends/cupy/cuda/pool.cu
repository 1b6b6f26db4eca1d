// Pooling of x (C, D, H, W, N) to y (C, OD, OH, OW, N), and its backward pass; missing spatial axes
// have size 1.
//
// KD, KH, KW are the window size, S. the stride, P. the padding before, D. the dilation. For
// windows over one or two axes, KH and KW may be compile-time constants, KH_IS and KW_IS: then all
// reads of a window are in flight at once. MANY_TAPS: more than 256.
// A block computes a part of one row of W*N elements. All indices fit into int, which the host
// checks. Grid: rows, parts of a row.
#define GEOMETRY                                                                                 \
  int N, int D, int H, int W, int OD, int OH, int OW, int kd_, int kh_, int kw_, int SD, int SH, \
      int SW, int PD, int PH, int PW, int DD, int DH, int DW
#ifdef KH_IS
#define WINDOW constexpr int KD = 1, KH = KH_IS, KW = KW_IS
#else
#define WINDOW const int KD = kd_, KH = kh_, KW = kw_
#endif
#ifdef MANY_TAPS
typedef int Tap;
#else
typedef unsigned char Tap;
#endif

// The row of the array (C, depth, height, ...) of this block.
struct Row { int c, d, h; };
__device__ __forceinline__ Row row_of(int depth, int height) {
  const int row = blockIdx.x, h = row % height, rest = row / height;
  return {rest / depth, rest % depth, h};
}

// The maximum of each window; NaN wins. Of equal maxima the first, of several NaN the last. winner,
// if not null: the number of its tap.
extern "C" __global__ void __launch_bounds__(256, 6) max_pool(
    const REAL* __restrict__ x, REAL* __restrict__ y, Tap* __restrict__ winner, GEOMETRY) {
  WINDOW;
  const int column = blockIdx.y * blockDim.x + threadIdx.x;
  if (column >= OW * N) return;
  const Row row = row_of(OD, OH);
  const int ow = column / N, n = column - ow * N;
  const int d0 = row.d * SD - PD, h0 = row.h * SH - PH, w0 = ow * SW - PW;
  REAL best = REAL(__uint_as_float(0xff800000u));  // -inf
  int tap = -1;
#pragma unroll
  for (int kd = 0; kd < KD; kd++) {
    const int d = d0 + kd * DD;
#pragma unroll
    for (int kh = 0; kh < KH; kh++) {
      const int h = h0 + kh * DH;
#pragma unroll
      for (int kw = 0; kw < KW; kw++) {
        const int w = w0 + kw * DW;
        if (d < 0 || d >= D || h < 0 || h >= H || w < 0 || w >= W) continue;
        const REAL value = x[(((row.c * D + d) * H + h) * W + w) * N + n];
        if (tap < 0 || value > best || value != value) {
          best = value;
          tap = (kd * KH + kh) * KW + kw;
        }
      }
    }
  }
  const int to = blockIdx.x * OW * N + column;
  y[to] = best;
  if (winner) winner[to] = Tap(max(tap, 0));
}

// The windows o, from last down to first, that may read cell `at` of an axis: at + pad = o * step +
// k * distance.
struct Seen { int first, last; };
__device__ __forceinline__ Seen seen_by(int at, int pad, int step, int extent, int out) {
  const int reach = at + pad - extent + 1;
  return {reach > 0 ? (reach + step - 1) / step : 0, min((at + pad) / step, out - 1)};
}

// dx: the sum of the gradients of the windows whose maximum a cell is, in the order of the taps.
extern "C" __global__ void __launch_bounds__(256, 6) max_pool_backward(
    const REAL* __restrict__ dy, const Tap* __restrict__ winner, REAL* __restrict__ dx, GEOMETRY) {
  WINDOW;
  const int column = blockIdx.y * blockDim.x + threadIdx.x;
  if (column >= W * N) return;
  const Row row = row_of(D, H);
  const int w = column / N, n = column - w * N;
  const Seen ds = seen_by(row.d, PD, SD, (KD - 1) * DD + 1, OD),
             hs = seen_by(row.h, PH, SH, (KH - 1) * DH + 1, OH);
  const Seen ws = seen_by(w, PW, SW, (KW - 1) * DW + 1, OW);
  REAL sum = 0;
  for (int od = ds.last; od >= ds.first; od--) {
    const int at_d = row.d + PD - od * SD, kd = DD == 1 ? at_d : at_d / DD;
    if (kd * DD != at_d) continue;
    for (int oh = hs.last; oh >= hs.first; oh--) {
      const int at_h = row.h + PH - oh * SH, kh = DH == 1 ? at_h : at_h / DH;
      if (kh * DH != at_h) continue;
#pragma unroll 2
      for (int ow = ws.last; ow >= ws.first; ow--) {
        const int at_w = w + PW - ow * SW, kw = DW == 1 ? at_w : at_w / DW;
        const int from = (((row.c * OD + od) * OH + oh) * OW + ow) * N + n;
        if (kw * DW == at_w && winner[from] == (kd * KH + kh) * KW + kw) sum += dy[from];
      }
    }
  }
  dx[blockIdx.x * W * N + column] = sum;
}

// The divisor of a window: `divisor`, if it is not 0; else the number of its cells inside the
// array, with `padded` also those in the padding, which is A. wide after the array on each axis.
// Cells beyond that never count.
__device__ __forceinline__ int cells(
    int o, int step, int pad, int k, int size, int after, int padded) {
  const int start = o * step - pad, low = padded ? -pad : 0, high = padded ? size + after : size;
  return min(start + k, high) - max(start, low);
}
#define AVERAGE int divisor, int padded, int AD, int AH, int AW
#define CELLS(od, oh, ow)                                                                  \
  (divisor ? divisor                                                                       \
           : cells(od, SD, PD, KD, D, AD, padded) * cells(oh, SH, PH, KH, H, AH, padded) * \
                 cells(ow, SW, PW, KW, W, AW, padded))

// The mean of each window, without dilation.
extern "C" __global__ void __launch_bounds__(256, 6) avg_pool(
    const REAL* __restrict__ x, REAL* __restrict__ y, AVERAGE, GEOMETRY) {
  WINDOW;
  const int column = blockIdx.y * blockDim.x + threadIdx.x;
  if (column >= OW * N) return;
  const Row row = row_of(OD, OH);
  const int ow = column / N, n = column - ow * N;
  const int d0 = row.d * SD - PD, h0 = row.h * SH - PH, w0 = ow * SW - PW;
  REAL sum = 0;
#pragma unroll
  for (int kd = 0; kd < KD; kd++) {
    const int d = d0 + kd;
#pragma unroll
    for (int kh = 0; kh < KH; kh++) {
      const int h = h0 + kh;
#pragma unroll
      for (int kw = 0; kw < KW; kw++) {
        const int w = w0 + kw;
        if (d < 0 || d >= D || h < 0 || h >= H || w < 0 || w >= W) continue;
        sum += x[(((row.c * D + d) * H + h) * W + w) * N + n];
      }
    }
  }
  y[blockIdx.x * OW * N + column] = sum * (REAL(1) / CELLS(row.d, row.h, ow));
}

// dx: the sum of the gradients of the windows that read a cell, divided as the mean was, in the
// order of the taps.
extern "C" __global__ void __launch_bounds__(256, 6) avg_pool_backward(
    const REAL* __restrict__ dy, REAL* __restrict__ dx, AVERAGE, GEOMETRY) {
  WINDOW;
  const int column = blockIdx.y * blockDim.x + threadIdx.x;
  if (column >= W * N) return;
  const Row row = row_of(D, H);
  const int w = column / N, n = column - w * N;
  const Seen ds = seen_by(row.d, PD, SD, KD, OD), hs = seen_by(row.h, PH, SH, KH, OH),
             ws = seen_by(w, PW, SW, KW, OW);
  REAL sum = 0;
  for (int od = ds.last; od >= ds.first; od--) {
    for (int oh = hs.last; oh >= hs.first; oh--) {
#pragma unroll 2
      for (int ow = ws.last; ow >= ws.first; ow--)
        sum +=
            dy[(((row.c * OD + od) * OH + oh) * OW + ow) * N + n] * (REAL(1) / CELLS(od, oh, ow));
    }
  }
  dx[blockIdx.x * W * N + column] = sum;
}
