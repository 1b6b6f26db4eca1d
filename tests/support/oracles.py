"""What ops are tested against: plain loops over single numbers in float64, written from the
definitions. No array tricks.

Notation: N batch, C in-channels, O out-channels, H, W input, KH, KW kernel, OH, OW output.
"""

import math
from collections.abc import Callable
from itertools import product

import numpy as np


def numerical_gradient(
    f: Callable[[np.ndarray], float], x: np.ndarray, h: float = 1e-6
) -> np.ndarray:
    """Central differences of f, which maps an array to a number, at x in float64."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        plus, minus = x.copy(), x.copy()
        plus[index] += h
        minus[index] -= h
        gradient[index] = (f(plus) - f(minus)) / (2 * h)
    return gradient


def max_pool2d(x, kernel, stride, pads, dilation, out):
    """out: (OH, OW). Gives (y, chosen): for every output the position (row, column) of its first
    maximum."""
    n_, c_, h_, w_ = x.shape
    y, chosen = np.zeros((n_, c_, *out)), {}
    for n, c, i, j in np.ndindex(n_, c_, *out):
        best = None
        for ki, kj in product(range(kernel[0]), range(kernel[1])):
            row, col = (
                i * stride[0] + ki * dilation[0] - pads[0][0],
                j * stride[1] + kj * dilation[1] - pads[1][0],
            )
            if 0 <= row < h_ and 0 <= col < w_ and (best is None or x[n, c, row, col] > best):
                best = x[n, c, row, col]
                chosen[n, c, i, j] = (row, col)
        y[n, c, i, j] = best
    return y, chosen


def pads_of(padding, size, kernel, stride, dilation):
    """Every form of ``padding`` as ((top, bottom), (left, right)); "same" by trying how many cells
    it takes."""
    if padding == "valid":
        return ((0, 0), (0, 0))
    if padding == "same":
        pads = []
        for n, k, s, d in zip(size, kernel, stride, dilation, strict=True):
            total = 0
            while output_count(n, k, s, (0, total), d) < math.ceil(n / s):
                total += 1
            pads.append((total // 2, math.ceil(total / 2)))
        return tuple(pads)
    if isinstance(padding, int):
        return ((padding, padding), (padding, padding))
    return tuple((p, p) if isinstance(p, int) else tuple(p) for p in padding)


def output_count(n, k, s, pads, d=1, ceil_mode=False):
    """How many windows there are along one axis, found by laying them down one after the other."""
    before, after = pads
    span, start, count = d * (k - 1) + 1, -before, 0
    while start + span <= n + after:
        start, count = start + s, count + 1
    last_end = start - s + span
    return count + (1 if ceil_mode and last_end < n + after and start < n else 0)


def max_pool2d_gradient(shape, chosen, dy):
    """chosen: as ``max_pool2d`` gives it."""
    dx = np.zeros(shape)
    for (n, c, i, j), (row, col) in chosen.items():
        dx[n, c, row, col] += dy[n, c, i, j]
    return dx


def avg_pool2d(x, dy, kernel, stride, pads, out, count_include_pad):
    """(y, dx). Padding that a window covers counts only with count_include_pad; what lies beyond
    the padding never does."""
    (top, bottom), (left, right) = pads
    h_, w_ = x.shape[2:]
    y, dx = np.zeros((*x.shape[:2], *out)), np.zeros(x.shape)
    for n, c, i, j in np.ndindex(y.shape):
        cells = [
            (i * stride[0] + a - top, j * stride[1] + b - left) for a, b in np.ndindex(*kernel)
        ]
        inside = [(row, col) for row, col in cells if 0 <= row < h_ and 0 <= col < w_]
        padded = [(row, col) for row, col in cells if row < h_ + bottom and col < w_ + right]
        count = len(padded if count_include_pad else inside)
        y[n, c, i, j] = sum(float(x[n, c, row, col]) for row, col in inside) / count
        for row, col in inside:
            dx[n, c, row, col] += dy[n, c, i, j] / count
    return y, dx


def im2col_places(shape, kernel, stride, pad):
    """The tutorials' definition: {(row, column) of the matrix: (n, c, h, w) of the image it shows},
    padding left out; (OH, OW)."""
    n_, c_, h_, w_ = shape
    kh, kw = kernel
    oh = output_count(h_, kh, stride[0], (pad[0], pad[0]))
    ow = output_count(w_, kw, stride[1], (pad[1], pad[1]))
    places = {}
    for n, i, j, c, a, b in np.ndindex(n_, oh, ow, c_, kh, kw):
        row, col = i * stride[0] + a - pad[0], j * stride[1] + b - pad[1]
        if 0 <= row < h_ and 0 <= col < w_:
            places[(n * oh + i) * ow + j, (c * kh + a) * kw + b] = (n, c, row, col)
    return places, (oh, ow)


def linear(x, weight, bias, dy):
    """(y, dx, dweight, dbias)."""
    y, dx = np.zeros((len(x), len(weight))), np.zeros(x.shape)
    dweight, dbias = np.zeros(weight.shape), np.zeros(len(weight))
    for n, o in np.ndindex(y.shape):
        y[n, o] = 0.0 if bias is None else bias[o]
        dbias[o] += dy[n, o]
        for f in range(x.shape[1]):
            y[n, o] += float(x[n, f]) * float(weight[o, f])
            dx[n, f] += dy[n, o] * weight[o, f]
            dweight[o, f] += dy[n, o] * x[n, f]
    return y, dx, dweight, dbias


def cross_entropy(
    logits, target, weight=None, ignore_index=-100, label_smoothing=0.0, reduction="mean"
):
    """(loss, dlogits for a dy of ones), sample by sample with math's exp and log."""
    classes = logits.shape[1]
    indices = target.ndim < logits.ndim
    weight = np.ones(classes) if weight is None else weight
    places = [
        (index[0], slice(None), *index[1:])
        for index in np.ndindex(logits.shape[0], *logits.shape[2:])
    ]
    losses, dlogits, count = (
        np.zeros((logits.shape[0], *logits.shape[2:])),
        np.zeros(logits.shape),
        0.0,
    )
    for place in places:
        at, row = (place[0], *place[2:]), [float(v) for v in logits[place]]
        if indices and target[at] == ignore_index:
            continue
        share = (
            [float(c == target[at]) for c in range(classes)]
            if indices
            else [float(v) for v in target[place]]
        )
        count += sum(w * p for w, p in zip(weight, share, strict=True)) if indices else 1.0
        q = [
            w * ((1 - label_smoothing) * p + label_smoothing / classes)
            for w, p in zip(weight, share, strict=True)
        ]
        top = max(row)
        log_total = top + math.log(math.fsum(math.exp(v - top) for v in row))
        losses[at] = math.fsum(a * (log_total - v) for a, v in zip(q, row, strict=True) if a != 0)
        dlogits[place] = [sum(q) * math.exp(v - log_total) - a for a, v in zip(q, row, strict=True)]
    if reduction == "none":
        return losses, dlogits
    scale = 1.0 / count if reduction == "mean" else 1.0
    return np.asarray(losses.sum() * scale), dlogits * scale


def sgd(p, gradients, lr):
    """The value of one number p after a step for each gradient."""
    for g in gradients:
        p -= lr * g
    return p


def momentum(p, gradients, lr, rate):
    v = 0.0
    for g in gradients:
        v = rate * v + g
        p -= lr * v
    return p


def adam(p, gradients, lr, beta1, beta2, eps):
    """Kingma and Ba, 2015, algorithm 1, as printed."""
    m = v = 0.0
    for t, g in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        p -= lr * (m / (1 - beta1**t)) / (math.sqrt(v / (1 - beta2**t)) + eps)
    return p
