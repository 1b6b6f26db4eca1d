"""What ops are tested against: plain loops over single numbers in float64 (complex128 for complex
ones), written from the definitions. No array tricks.

Notation: N batch, C in-channels, O out-channels, S/OUT the spatial axes in/out, K the kernel (for
two axes H, W, OH, OW, KH, KW). Positions are tuples of S's length; pads are a pair (before, after)
for each axis.

The same arguments are asked for again on every backend, in every dtype and memory layout: results
are remembered, and read-only.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import numpy as np

Position = tuple[int, ...]
REMEMBERED = 500


def _key(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, value.tobytes()
    return tuple(_key(item) for item in value) if isinstance(value, list | tuple) else value


def _read_only(value: Any) -> Any:
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, np.ndarray):
            item.flags.writeable = False
    return value


def remembered(oracle: Callable[..., Any]) -> Callable[..., Any]:
    known: OrderedDict[Any, Any] = OrderedDict()

    @wraps(oracle)
    def call(*args: Any, **options: Any) -> Any:
        key = _key([args, [*options.items()]])
        if key not in known:
            known[key] = _read_only(oracle(*args, **options))
            if len(known) > REMEMBERED:
                known.popitem(last=False)
        known.move_to_end(key)
        return known[key]

    return call


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


def seen(o: Position, kernel, stride, pads, dilation) -> Iterator[tuple[Position, Position]]:
    """What the window of output ``o`` sees: (offset in the kernel, position in the input, which may
    lie outside it)."""
    for k in np.ndindex(*kernel):
        yield k, tuple(o[a] * stride[a] + k[a] * dilation[a] - pads[a][0] for a in range(len(o)))


def inside(position: Position, size) -> bool:
    return all(0 <= p < n for p, n in zip(position, size, strict=True))


def conv_out(size, kernel, stride, pads, dilation) -> Position:
    axes = zip(size, kernel, stride, pads, dilation, strict=True)
    return tuple((n + sum(p) - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)


def wide(array: Any) -> np.ndarray:
    """In float64 or complex128."""
    array = np.asarray(array)
    return array.astype(np.result_type(array, np.float64))


@remembered
def conv(x, weight, bias, stride, pads, dilation, groups):
    """Every output number is a sum over taps, one by one, of products summed over channels."""
    x, weight = wide(x), wide(weight)
    cg, kernel, size = weight.shape[1], weight.shape[2:], x.shape[2:]
    out = conv_out(size, kernel, stride, pads, dilation)
    y = np.zeros((len(x), len(weight), *out), x.dtype)
    for place in np.ndindex(*out):
        taps = [t for t in seen(place, kernel, stride, pads, dilation) if inside(t[1], size)]
        for n, o in np.ndindex(len(x), len(weight)):
            first = o // (len(weight) // groups) * cg  # channel of the group
            total = 0.0 if bias is None else bias[o].item()
            for k, at in taps:
                total += (x[n, first : first + cg, *at] @ weight[o, :, *k]).item()
            y[n, o, *place] = total
    return y


@remembered
def conv_gradients(x, weight, dy, stride, pads, dilation, groups):
    """(dx, dweight, dbias): each product of the forward sends its share to both of its factors,
    times the conjugate of the other."""
    x, weight, dy = wide(x), wide(weight), wide(dy)
    cg, kernel, size = weight.shape[1], weight.shape[2:], x.shape[2:]
    dx, dweight, dbias = (np.zeros(s, x.dtype) for s in (x.shape, weight.shape, len(weight)))
    for place in np.ndindex(*dy.shape[2:]):
        taps = [t for t in seen(place, kernel, stride, pads, dilation) if inside(t[1], size)]
        for n, o in np.ndindex(len(x), len(weight)):
            first, given = o // (len(weight) // groups) * cg, dy[n, o, *place]
            dbias[o] += given
            for k, at in taps:
                dx[n, first : first + cg, *at] += given * weight[o, :, *k].conj()
                dweight[o, :, *k] += given * x[n, first : first + cg, *at].conj()
    return dx, dweight, dbias


@remembered
def conv_transpose(x, weight, bias, stride, pads, output_padding, dilation, groups):
    """Every input number is multiplied with the kernel, and the product is added where the stride
    puts it."""
    cg, og, kernel, axes = (
        len(weight) // groups,
        weight.shape[1],
        weight.shape[2:],
        range(x.ndim - 2),
    )
    out = [
        (x.shape[2 + a] - 1) * stride[a]
        - sum(pads[a])
        + dilation[a] * (kernel[a] - 1)
        + output_padding[a]
        + 1
        for a in axes
    ]
    y = np.zeros((len(x), og * groups, *out), wide(x).dtype)
    for n, c, *place in np.ndindex(x.shape):
        for k in np.ndindex(*kernel):
            at = tuple(place[a] * stride[a] + k[a] * dilation[a] - pads[a][0] for a in axes)
            if inside(at, out):
                for o in range(og):
                    y[n, c // cg * og + o, *at] += x[n, c, *place] * weight[c, o, *k]
    return y if bias is None else y + bias.reshape(-1, *(1 for _ in axes))


@remembered
def max_pool(x, out, kernel, stride, pads, dilation):
    """(y, {place in y: place in x of its first maximum})."""
    y, chosen = np.zeros((*x.shape[:2], *out)), {}
    for n, c, *place in np.ndindex(y.shape):
        cells = [
            at
            for _, at in seen(tuple(place), kernel, stride, pads, dilation)
            if inside(at, x.shape[2:])
        ]
        best = max(x[n, c, *at] for at in cells)
        chosen[n, c, *place] = (n, c, *next(at for at in cells if x[n, c, *at] == best))
        y[n, c, *place] = best
    return y, chosen


@remembered
def avg_pool(x, out, kernel, stride, pads, count_include_pad, divisor):
    """(y, {place in y: [(place in x, its share)]})."""
    y, shares, size = np.zeros((*x.shape[:2], *out), wide(x).dtype), {}, x.shape[2:]
    padded = [n + after for n, (_, after) in zip(size, pads, strict=True)]
    for n, c, *place in np.ndindex(y.shape):
        cells = [at for _, at in seen(tuple(place), kernel, stride, pads, (1,) * len(size))]
        within = [at for at in cells if inside(at, size)]
        counted = [at for at in cells if all(p < end for p, end in zip(at, padded, strict=True))]
        count = divisor or len(counted if count_include_pad else within)
        shares[n, c, *place] = [((n, c, *at), 1 / count) for at in within]
        y[n, c, *place] = sum(x[at] * share for at, share in shares[n, c, *place])
    return y, shares


def adaptive_cells(place: Position, out, size) -> list[Position]:
    """The inputs that one output of adaptive pooling sees."""
    starts = [math.floor(o * n / m) for o, m, n in zip(place, out, size, strict=True)]
    ends = [math.ceil((o + 1) * n / m) for o, m, n in zip(place, out, size, strict=True)]
    return [
        tuple(s + i for s, i in zip(starts, offset, strict=True))
        for offset in np.ndindex(*(e - s for s, e in zip(starts, ends, strict=True)))
    ]


@remembered
def adaptive_avg_pool(x, out):
    y = np.zeros((*x.shape[:2], *out))
    for n, c, *place in np.ndindex(y.shape):
        cells = adaptive_cells(tuple(place), out, x.shape[2:])
        y[n, c, *place] = sum(x[n, c, *at] for at in cells) / len(cells)
    return y


@remembered
def adaptive_max_pool(x, out):
    """(y, chosen) as ``max_pool``."""
    y, chosen = np.zeros((*x.shape[:2], *out)), {}
    for n, c, *place in np.ndindex(y.shape):
        cells = adaptive_cells(tuple(place), out, x.shape[2:])
        best = max(x[n, c, *at] for at in cells)
        chosen[n, c, *place] = (n, c, *next(at for at in cells if x[n, c, *at] == best))
        y[n, c, *place] = best
    return y, chosen


def routed(shape, chosen, dy):
    """The gradient of a maximum: each of dy goes to the place that was chosen."""
    dx = np.zeros(shape)
    for place, at in chosen.items():
        dx[at] += dy[place]
    return dx


def shared(shape, shares, dy):
    """The gradient of a mean."""
    dx = np.zeros(shape, wide(dy).dtype)
    for place, cells in shares.items():
        for at, share in cells:
            dx[at] += dy[place] * share
    return dx


@remembered
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


@remembered
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


@remembered
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
