"""As ``oracles``, for any number of spatial axes: loops over single numbers in float64, written
from the definitions.

Notation: N batch, C in-channels, O out-channels, S/OUT the spatial axes in/out, K the kernel.
Positions are tuples of S's length; pads are a pair (before, after) for each axis.
"""

from collections.abc import Iterator
from math import ceil, floor

import numpy as np

Position = tuple[int, ...]


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


def conv(x, weight, bias, stride, pads, dilation, groups):
    """Every output number is a sum over taps, one by one, of products summed over channels."""
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    cg, kernel, size = weight.shape[1], weight.shape[2:], x.shape[2:]
    out = conv_out(size, kernel, stride, pads, dilation)
    y = np.zeros((len(x), len(weight), *out))
    for place in np.ndindex(*out):
        taps = [t for t in seen(place, kernel, stride, pads, dilation) if inside(t[1], size)]
        for n, o in np.ndindex(len(x), len(weight)):
            first = o // (len(weight) // groups) * cg  # channel of the group
            total = 0.0 if bias is None else float(bias[o])
            for k, at in taps:
                total += float(x[n, first : first + cg, *at] @ weight[o, :, *k])
            y[n, o, *place] = total
    return y


def conv_gradients(x, weight, dy, stride, pads, dilation, groups):
    """(dx, dweight, dbias): each product of the forward sends its share to both of its factors."""
    cg, kernel, size = weight.shape[1], weight.shape[2:], x.shape[2:]
    dx, dweight, dbias = np.zeros(x.shape), np.zeros(weight.shape), np.zeros(len(weight))
    for place in np.ndindex(*dy.shape[2:]):
        taps = [t for t in seen(place, kernel, stride, pads, dilation) if inside(t[1], size)]
        for n, o in np.ndindex(len(x), len(weight)):
            first, given = o // (len(weight) // groups) * cg, dy[n, o, *place]
            dbias[o] += given
            for k, at in taps:
                dx[n, first : first + cg, *at] += given * weight[o, :, *k]
                dweight[o, :, *k] += given * x[n, first : first + cg, *at]
    return dx, dweight, dbias


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
    y = np.zeros((len(x), og * groups, *out))
    for n, c, *place in np.ndindex(x.shape):
        for k in np.ndindex(*kernel):
            at = tuple(place[a] * stride[a] + k[a] * dilation[a] - pads[a][0] for a in axes)
            if inside(at, out):
                for o in range(og):
                    y[n, c // cg * og + o, *at] += x[n, c, *place] * weight[c, o, *k]
    return y if bias is None else y + bias.reshape(-1, *(1 for _ in axes))


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


def avg_pool(x, out, kernel, stride, pads, count_include_pad, divisor):
    """(y, {place in y: [(place in x, its share)]})."""
    y, shares, size = np.zeros((*x.shape[:2], *out)), {}, x.shape[2:]
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
    starts = [floor(o * n / m) for o, m, n in zip(place, out, size, strict=True)]
    ends = [ceil((o + 1) * n / m) for o, m, n in zip(place, out, size, strict=True)]
    return [
        tuple(s + i for s, i in zip(starts, offset, strict=True))
        for offset in np.ndindex(*(e - s for s, e in zip(starts, ends, strict=True)))
    ]


def adaptive_avg_pool(x, out):
    y = np.zeros((*x.shape[:2], *out))
    for n, c, *place in np.ndindex(y.shape):
        cells = adaptive_cells(tuple(place), out, x.shape[2:])
        y[n, c, *place] = sum(x[n, c, *at] for at in cells) / len(cells)
    return y


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
    dx = np.zeros(shape)
    for place, cells in shares.items():
        for at, share in cells:
            dx[at] += dy[place] * share
    return dx
