"""What ops are tested against: plain loops over single numbers in float64, written from the definitions. No array tricks.

Notation: N batch, C in-channels, O out-channels, H, W input, KH, KW kernel, OH, OW output.
"""

from collections.abc import Callable
from itertools import product

import numpy as np


def numerical_gradient(f: Callable[[np.ndarray], float], x: np.ndarray, h: float = 1e-6) -> np.ndarray:
    """Central differences of f, which maps an array to a number, at x in float64."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        plus, minus = x.copy(), x.copy()
        plus[index] += h
        minus[index] -= h
        gradient[index] = (f(plus) - f(minus)) / (2 * h)
    return gradient


def conv2d(x, weight, bias, stride, pads, dilation, groups):
    """pads: ((top, bottom), (left, right)). Every output number is a sum over channels and taps, one by one."""
    (top, bottom), (left, right) = pads
    n_, _, h_, w_ = x.shape
    o_, cg, kh, kw = weight.shape
    oh = (h_ + top + bottom - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    ow = (w_ + left + right - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    y = np.zeros((n_, o_, oh, ow))
    for n, o, i, j in product(range(n_), range(o_), range(oh), range(ow)):
        total = 0.0 if bias is None else float(bias[o])
        for c, ki, kj in product(range(cg), range(kh), range(kw)):
            row, col = i * stride[0] + ki * dilation[0] - top, j * stride[1] + kj * dilation[1] - left
            if 0 <= row < h_ and 0 <= col < w_:
                channel = o // (o_ // groups) * cg + c
                total += float(x[n, channel, row, col]) * float(weight[o, c, ki, kj])
        y[n, o, i, j] = total
    return y


def max_pool2d(x, kernel, stride, pads, dilation, out):
    """out: (OH, OW). Gives (y, chosen): for every output the position (row, column) of its first maximum."""
    n_, c_, h_, w_ = x.shape
    y, chosen = np.zeros((n_, c_, *out)), {}
    for n, c, i, j in np.ndindex(n_, c_, *out):
        best = None
        for ki, kj in product(range(kernel[0]), range(kernel[1])):
            row, col = i * stride[0] + ki * dilation[0] - pads[0][0], j * stride[1] + kj * dilation[1] - pads[1][0]
            if 0 <= row < h_ and 0 <= col < w_ and (best is None or x[n, c, row, col] > best):
                best = x[n, c, row, col]
                chosen[n, c, i, j] = (row, col)
        y[n, c, i, j] = best
    return y, chosen
