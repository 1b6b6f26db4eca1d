// An index k = (c * ys + y) * xs + x as its parts, incremented in equal steps: divisions only at
// the start.
#pragma once
struct Walk {
  int c, y, x, ys, xs, step_c, step_y, step_x;
  __device__ __forceinline__ Walk(int k, int step, int ys, int xs) : ys(ys), xs(xs) {
    c = k / (ys * xs), y = k / xs % ys, x = k % xs;
    step_c = step / (ys * xs), step_y = step / xs % ys, step_x = step % xs;
  }
  __device__ __forceinline__ void next() {
    x += step_x;
    if (x >= xs) x -= xs, y++;
    y += step_y;
    if (y >= ys) y -= ys, c++;
    c += step_c;
  }
};
