// im2col and col2im: the columns of a convolution and their adjoint. col2im gathers, so that the
// order of its sums is fixed.
//
// C channels, D, H, W input, OD, OH, OW output, KD, KH, KW kernel, SD.. stride, PD.. padding
// before, DD.. dilation, N batch. x is stored (C, D, H, W, N), columns (C, KD*KH*KW, OD, OH, OW,
// N); missing axes are leading ones. A thread has one cell (the spatial axes and N) of many rows,
// so that the divisions by cell are done once. Grid: cells, rows.
#define GEOMETRY                                                                              \
  int C, int D, int H, int W, int OD, int OH, int OW, int KD, int KH, int KW, int SD, int SH, \
      int SW, int PD, int PH, int PW, int DD, int DH, int DW, int N

extern "C" __global__ void __launch_bounds__(256, 4) im2col(
    const REAL* __restrict__ x, REAL* __restrict__ columns, GEOMETRY) {
  const long long cell = blockIdx.x * 256ll + threadIdx.x, cells = (long long)OD * OH * OW * N;
  if (cell >= cells) return;
  const int n = (int)(cell % N), place = (int)(cell / N);
  const int left = place % OW * SW - PW, top = place / OW % OH * SH - PH,
            front = place / OW / OH * SD - PD;
  for (int row = blockIdx.y; row < C * KD * KH * KW; row += gridDim.y) {
    const int kw = row % KW, kh = row / KW % KH, kd = row / KW / KH % KD, c = row / KW / KH / KD;
    const int d = front + kd * DD, h = top + kh * DH, w = left + kw * DW;
    const bool inside =
        (unsigned)d < (unsigned)D && (unsigned)h < (unsigned)H && (unsigned)w < (unsigned)W;
    columns[row * cells + cell] =
        inside ? x[((((long long)c * D + d) * H + h) * W + w) * N + n] : REAL(0);
  }
}

// The output that reads input i at tap k; -1 if none.
__device__ __forceinline__ int reader(
    int i, int k, int dilation, int before, int stride, int outputs) {
  const int place = i + before - k * dilation;
  return place >= 0 && place % stride == 0 && place / stride < outputs ? place / stride : -1;
}

extern "C" __global__ void __launch_bounds__(256, 4) col2im(
    const REAL* __restrict__ columns, REAL* __restrict__ x, GEOMETRY) {
  const long long cell = blockIdx.x * 256ll + threadIdx.x, cells = (long long)D * H * W * N;
  if (cell >= cells) return;
  const int n = (int)(cell % N), place = (int)(cell / N), w = place % W, h = place / W % H,
            d = place / W / H;
  for (int c = blockIdx.y; c < C; c += gridDim.y) {
    REAL sum = 0;
    for (int kd = 0; kd < KD; kd++) {
      const int od = reader(d, kd, DD, PD, SD, OD);
      if (od < 0) continue;
      for (int kh = 0; kh < KH; kh++) {
        const int oh = reader(h, kh, DH, PH, SH, OH);
        if (oh < 0) continue;
        for (int kw = 0; kw < KW; kw++) {
          const int ow = reader(w, kw, DW, PW, SW, OW);
          if (ow < 0) continue;
          const long long row = (((long long)c * KD + kd) * KH + kh) * KW + kw;
          sum += columns[(((row * OD + od) * OH + oh) * OW + ow) * N + n];
        }
      }
    }
    x[c * cells + cell] = sum;
  }
}
