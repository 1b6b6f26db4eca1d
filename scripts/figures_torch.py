"""Every op in terms of PyTorch alone: its formulas for ``freeze_figures.py``.

``DEFINITIONS[op]`` takes the op's arguments by name, arrays as float64 tensors, and returns the
result; autograd computes the gradients. An op that writes into its arguments does so here too. What
PyTorch does not have is written from its definition, with tensors.

Notation: N batch, C/O channels, S the spatial axes, K a kernel's, OUT an output's.
"""

from collections.abc import Callable
from itertools import product
from math import floor, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from portacnn.ops.windows import Windows

# --- convolution ----------------------------------------------------------------------------------


def padded(x: Tensor, pads: Any, value: float = 0.0) -> Tensor:
    """Pad the spatial axes: ((before, after), ...); a negative number crops."""
    flat = [n for pair in reversed(tuple(pads)) for n in pair]
    return F.pad(x, flat, value=value)


def by_axes(name: str, x: Tensor) -> Callable[..., Any]:
    return getattr(F, f"{name}{x.ndim - 2}d")


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, windows: Windows, groups: int) -> Tensor:
    w = windows
    return by_axes("conv", x)(padded(x, w.pads), weight, bias, w.stride, 0, w.dilation, groups)


def public_conv(x, weight, bias, stride, padding, dilation, groups) -> Tensor:
    return by_axes("conv", x)(padded(x, padding), weight, bias, stride, 0, dilation, groups)


def conv_transpose(x, weight, bias, windows: Windows, groups: int) -> Tensor:
    w = windows
    full = by_axes("conv_transpose", x)(x, weight, None, w.stride, 0, 0, groups, w.dilation)
    pads = [
        (-before, size + before - have)
        for (before, _), size, have in zip(w.pads, w.size, full.shape[2:], strict=True)
    ]
    y = padded(full, pads)
    return y if bias is None else y + over(bias, y)


def public_conv_transpose(
    x, weight, bias, stride, padding, dilation, groups, output_padding
) -> Tensor:
    full = by_axes("conv_transpose", x)(x, weight, None, stride, 0, 0, groups, dilation)
    pads = [
        (-before, more - after)
        for (before, after), more in zip(padding, output_padding, strict=True)
    ]
    y = padded(full, pads)
    return y if bias is None else y + over(bias, y)


def over(values: Tensor, y: Tensor) -> Tensor:
    """One value per channel, along y (N, C, *S)."""
    return values.reshape(-1, *(1,) * (y.ndim - 2))


def conv_relu(x, weight, bias, windows, groups, pool) -> Tensor:
    y = conv(x, weight, bias, windows, groups).relu()
    return y if pool is None else max_pool(y, pool)


def conv_unit(parts, weight, bias, windows, groups, norm, low, high, pool) -> Tensor:
    y = conv(parts[0], weight, bias, windows, groups)
    if norm is not None:
        y = F.batch_norm(
            y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )
    for residual in parts[1:]:
        y = y + residual
    if low is not None or high is not None:
        y = y.clamp(low, high)
    return y if pool is None else max_pool(y, pool)


def gather(x: Tensor, windows: Windows) -> Tensor:
    """x (C, *S, N) -> (C, taps, *OUT, N)."""
    w = windows
    x = F.pad(x, [0, 0, *(n for pair in reversed(w.pads) for n in pair)])
    taps = []
    for tap in product(*map(range, w.kernel)):
        at = tuple(
            slice(k * d, k * d + s * (out - 1) + 1, s)
            for k, d, s, out in zip(tap, w.dilation, w.stride, w.out, strict=True)
        )
        taps.append(x[(slice(None), *at)])
    return torch.stack(taps, 1)


def scatter(columns: Tensor, windows: Windows) -> Tensor:
    """The transpose of ``gather``."""
    x = torch.zeros(
        (columns.shape[0], *windows.size, columns.shape[-1]),
        dtype=columns.dtype,
        requires_grad=True,
    )
    return torch.autograd.grad(gather(x, windows), x, columns.detach())[0]


def unfold(x: Tensor, kernel_size, padding, stride, dilation) -> Tensor:
    """x (N, C, *S) -> (N, C*T, L), over any number of axes."""
    windows = Windows.of(tuple(x.shape[2:]), kernel_size, stride, padding, dilation)
    columns = gather(torch.movedim(x, 0, -1), windows)
    return torch.movedim(columns, -1, 0).reshape(len(x), x.shape[1] * prod(windows.kernel), -1)


def fold(columns: Tensor, output_size, kernel_size, **options) -> Tensor:
    """The transpose of ``unfold``."""
    channels = columns.shape[1] // prod(kernel_size)
    shape = (len(columns), channels, *output_size)
    x = torch.zeros(shape, dtype=columns.dtype, requires_grad=True)
    return torch.autograd.grad(unfold(x, kernel_size, **options), x, columns.detach())[0]


def im2col(input_data: Tensor, filter_h: int, filter_w: int, stride: int, pad: int) -> Tensor:
    columns = F.unfold(input_data, (filter_h, filter_w), padding=pad, stride=stride)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def col2im(col: Tensor, input_shape, filter_h: int, filter_w: int, stride: int, pad: int) -> Tensor:
    columns = col.reshape(input_shape[0], -1, col.shape[1]).transpose(1, 2)
    return F.fold(columns, input_shape[2:], (filter_h, filter_w), padding=pad, stride=stride)


# --- pooling --------------------------------------------------------------------------------------


def reached(x: Tensor, windows: Windows, value: float) -> Tensor:
    """x padded, or cropped, to exactly what the windows see."""
    w = windows
    needed = [
        (out - 1) * s + d * (k - 1) + 1
        for out, s, d, k in zip(w.out, w.stride, w.dilation, w.kernel, strict=True)
    ]
    pads = [
        (before, total - before - size)
        for (before, _), total, size in zip(w.pads, needed, w.size, strict=True)
    ]
    return padded(x, pads, value)


def max_pool(x: Tensor, windows: Windows) -> Tensor:
    w = windows
    x = reached(x, w, -torch.inf)
    return by_axes("max_pool", x)(x, w.kernel, w.stride, 0, w.dilation)


def avg_pool(x: Tensor, windows: Windows, count_include_pad: bool, divisor: int | None) -> Tensor:
    w, taps = windows, prod(windows.kernel)

    def sums(values: Tensor) -> Tensor:
        return by_axes("avg_pool", x)(values, w.kernel, w.stride) * taps

    if divisor is not None:
        return sums(reached(x, w, 0.0)) / divisor
    if count_include_pad:  # of the padding, but not of what lies beyond it
        counted = padded(torch.ones_like(x), w.pads, 1.0)
        after = [
            (0, n - m) for n, m in zip(reached(x, w, 0.0).shape[2:], counted.shape[2:], strict=True)
        ]
        counted = padded(counted, after)
    else:
        counted = reached(torch.ones_like(x), w, 0.0)
    return sums(reached(x, w, 0.0)) / sums(counted.detach())


def public_max_pool(x, kernel_size, stride=None, padding=0, ceil_mode=False) -> Tensor:
    return by_axes("max_pool", x)(x, kernel_size, stride, padding, ceil_mode=ceil_mode)


def public_avg_pool(x, kernel_size, stride=None, padding=0, ceil_mode=False, **options) -> Tensor:
    return by_axes("avg_pool", x)(x, kernel_size, stride, padding, ceil_mode, **options)


def adaptive(kind: str) -> Callable[..., Tensor]:
    return lambda x, output_size: by_axes(f"adaptive_{kind}_pool", x)(x, tuple(output_size))


def inner_adaptive(kind: str) -> Callable[..., Tensor]:
    return lambda x, size: by_axes(f"adaptive_{kind}_pool", x)(x, tuple(size))


def global_pool(kind: str) -> Callable[..., Tensor]:
    return lambda x: by_axes(f"adaptive_{kind}_pool", x)(x, 1)


# --- elementwise, reductions ----------------------------------------------------------------------

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "cos": torch.cos,
    "erf": torch.erf,
    "exp": torch.exp,
    "floor": torch.floor,
    "log": torch.log,
    "mish": F.mish,
    "negative": torch.neg,
    "nonzero": lambda x: (x != 0).to(x.dtype) + 0.0 * x,
    "reciprocal": torch.reciprocal,
    "sin": torch.sin,
    "softsign": F.softsign,
    "sqrt": torch.sqrt,
}
ARITHMETIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "subtract": torch.sub,
    "multiply": torch.mul,
    "divide": torch.div,
    "power": torch.pow,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "fmod": torch.fmod,
    "greater": lambda a, b: (a > b).to(a.dtype) + 0.0 * (a + b),
}
REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "sum": torch.sum,
    "max": torch.amax,
    "l2": lambda x, dim, keepdim: torch.linalg.vector_norm(x, dim=dim, keepdim=keepdim),
    "log_sum_exp": torch.logsumexp,
}


def reduce(x: Tensor, kind: str, axes: list[int], keepdims: bool) -> Tensor:
    return REDUCTIONS[kind](x, dim=axes, keepdim=keepdims)


def clip(x: Tensor, min: float | None = None, max: float | None = None) -> Tensor:
    return x + 0.0 if min is None and max is None else x.clamp(min, max)


def pad(x: Tensor, pad: tuple[int, ...], mode: str) -> Tensor:
    return F.pad(x, pad, mode)


def pad_axes(x: Tensor, pads: Any, mode: str, value: float) -> Tensor:
    return F.pad(x, [n for pair in reversed(pads[2:]) for n in pair], mode)


def added(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)


# --- normalization --------------------------------------------------------------------------------


def batch_norm(
    x, running_mean, running_var, weight, bias, training=False, momentum=0.1, eps=1e-5
) -> Tensor:
    return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)


def instance_norm(x, running_mean=None, running_var=None, weight=None, bias=None, eps=1e-5):
    return F.instance_norm(x, running_mean, running_var, weight, bias, eps=eps)


def group_norm(x, num_groups, weight, bias, eps) -> Tensor:
    """PyTorch's backward pass fails if only one of weight and bias is given."""
    y = F.group_norm(x, num_groups, eps=eps)
    y = y if weight is None else y * over(weight, y)
    return y if bias is None else y + over(bias, y)


def response_norm(x: Tensor, size: int, alpha: float) -> Tensor:
    return F.local_response_norm(x, size, alpha)


# --- losses ---------------------------------------------------------------------------------------


def reduced(losses: Tensor, reduction: str, count: Any = None) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (count or losses.numel())


def softmax_cross_entropy(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    if target.dtype in (torch.uint8, torch.int32):
        target = target.long()
    return F.cross_entropy(logits, target, **options)


def sigmoid_focal(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Of gamma 2 and alpha 0.25."""
    p, log_p, log_q = input.sigmoid(), F.logsigmoid(input), F.logsigmoid(-input)
    on, off = 0.25 * target * (1 - p) ** 2 * log_p, 0.75 * (1 - target) * p**2 * log_q
    return reduced(-(on + off), reduction)


def focal(logits: Tensor, target: Tensor, gamma: float, weight: Any, reduction: str) -> Tensor:
    log_p = F.log_softmax(logits, 1).gather(1, target.unsqueeze(1)).squeeze(1)
    each = -((1 - log_p.exp()) ** gamma) * log_p
    return reduced(each if weight is None else weight[target] * each, reduction)


def dice(probabilities: Tensor, target: Tensor, smooth: float, weight: Any) -> Tensor:
    losses = []
    for n, c in product(*map(range, probabilities.shape[:2])):
        p, t = probabilities[n, c], (target[n] == c).double()
        both = (2 * (p * t).sum() + smooth) / (p.sum() + t.sum() + smooth)
        losses.append((1 - both) * (1.0 if weight is None else weight[n]))
    return torch.stack(losses).mean()


def nt_xent(embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    z, losses = F.normalize(embeddings, dim=1), []
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if j != i]
        alike = [others.index(j) for j in others if labels[j] == labels[i]]
        log_p = F.log_softmax((z[others] @ z[i]) / temperature, 0)
        losses.append(-log_p[alike].mean())
    return torch.stack(losses).mean()


def triplet(embeddings: Tensor, labels: Tensor, margin: float, triplets: str) -> Tensor:
    numbers, chosen = range(len(labels)), []
    for i in numbers:
        alike = [j for j in numbers if j != i and labels[j] == labels[i]]
        others = [j for j in numbers if labels[j] != labels[i]]
        away = F.pairwise_distance(embeddings[i], embeddings).detach().numpy()
        if triplets == "hardest" and alike and others:
            alike, others = [max(alike, key=away.item)], [min(others, key=away.item)]
        for p in alike:
            if triplets == "semihard" and others:
                farther = [n for n in others if away[n] > away[p]]
                nearest = min(farther, key=away.item) if farther else max(others, key=away.item)
                chosen.append((i, p, nearest))
            else:
                chosen += [(i, p, n) for n in others]
    if not chosen:
        return (0.0 * embeddings).sum()
    a, p, n = (embeddings[list(places)] for places in zip(*chosen, strict=True))
    return F.triplet_margin_loss(a, p, n, margin)


# --- images ---------------------------------------------------------------------------------------

# Where output o of m reads among n cells: ONNX's Resize, by the name of the coordinates.
SOURCE: dict[str, Callable[[int, int, int], float]] = {
    "asymmetric": lambda o, n, m: o * n / m,
    "half_pixel": lambda o, n, m: (o + 0.5) * n / m - 0.5,
    "align_corners": lambda o, n, m: o * (n - 1) / (m - 1) if m > 1 else 0.0,
    "pytorch_half_pixel": lambda o, n, m: (o + 0.5) * n / m - 0.5 if m > 1 else 0.0,
    "half_pixel_symmetric": lambda o, n, m: (o + 0.5) * n / m - 0.5,
    "tf_half_pixel_for_nn": lambda o, n, m: (o + 0.5) * n / m if n != m else float(o),
}
NEAREST: dict[str, Callable[[float], int]] = {
    "floor": lambda at: floor(at + 1e-9),
    "ceil": lambda at: -floor(-at + 1e-9),
    "round_prefer_floor": lambda at: -floor(0.5 - at + 1e-9),
    "round_prefer_ceil": lambda at: floor(at + 0.5 + 1e-9),
}


def weights(n: int, m: int, coordinates: str, rounding: str | None) -> Tensor:
    """(m, n): the share of each cell in each output of one axis."""
    matrix = torch.zeros((m, n), dtype=torch.float64)
    for o in range(m):
        at = SOURCE[coordinates](o, n, m)
        at = at if rounding is None else NEAREST[rounding](at)
        at = min(max(at, 0.0), n - 1.0)
        low = min(floor(at + 1e-9), n - 1)
        matrix[o, low] += 1 - (at - low)
        if low + 1 < n:
            matrix[o, low + 1] += at - low
    return matrix


def interpolate(x: Tensor, size, mode: str, coordinates: str, rounding: str | None) -> Tensor:
    for axis, m in enumerate(size, 2):
        matrix = weights(x.shape[axis], m, coordinates, rounding)
        x = torch.movedim(torch.movedim(x, axis, -1) @ matrix.T, -1, axis)
    return x


def resize(x: Tensor, axes: Any) -> Tensor:
    """Of axes that say where an output reads: start + o * step."""
    for number, axis in enumerate(axes, 2):
        matrix = torch.zeros((axis.out, axis.size), dtype=torch.float64)
        for o in range(axis.out):
            at = float(axis.start + o * axis.step)
            at = at if axis.rounding is None else NEAREST[axis.rounding](at)
            at = min(max(at, 0.0), axis.size - 1.0)
            low = min(floor(at + 1e-9), axis.size - 1)
            matrix[o, low] += 1 - (at - low)
            if low + 1 < axis.size:
                matrix[o, low + 1] += at - low
        x = torch.movedim(torch.movedim(x, number, -1) @ matrix.T, -1, number)
    return x


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias).relu()


DEFINITIONS: dict[str, Callable[..., Tensor]] = {
    **{f"conv{n}d": public_conv for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": public_conv_transpose for n in (1, 2, 3)},
    **{f"max_pool{n}d": public_max_pool for n in (1, 2, 3)},
    **{f"avg_pool{n}d": public_avg_pool for n in (1, 2, 3)},
    **{f"adaptive_{kind}_pool{n}d": adaptive(kind) for kind in ("avg", "max") for n in (1, 2, 3)},
    **{f"adaptive_{kind}_pool": inner_adaptive(kind) for kind in ("avg", "max")},
    **{f"global_{kind}_pool": global_pool(kind) for kind in ("avg", "max")},
    "conv": conv,
    "conv_relu": conv_relu,
    "conv_unit": conv_unit,
    "conv_transpose": conv_transpose,
    "gather": gather,
    "scatter": scatter,
    "unfold": unfold,
    "fold": fold,
    "im2col": im2col,
    "col2im": col2im,
    "max_pool": max_pool,
    "avg_pool": avg_pool,
    "linear": F.linear,
    "linear_relu": linear_relu,
    "add": added,
    "add_relu": lambda parts: added(parts).relu(),
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "elu": F.elu,
    "gelu": F.gelu,
    "leaky_relu": F.leaky_relu,
    "scaled_elu": lambda x: F.elu(x),  # its factors are 1
    "hard_sigmoid": lambda x: (x / 6 + 0.5).clamp(0, 1),  # F.hardsigmoid rounds 1/6 to float32
    "hard_swish": F.hardswish,
    "softplus": F.softplus,
    "clip": clip,
    "prelu": lambda x, slope: F.prelu(x, slope),
    "erf": torch.erf,
    "elementwise": lambda x, function: FUNCTIONS[function](x),
    "arithmetic": lambda a, b, kind: ARITHMETIC[kind](a, b),
    "select": lambda condition, a, b: torch.where(condition != 0, a, b),
    "reduce": reduce,
    "softmax": F.softmax,
    "log_softmax": F.log_softmax,
    "pad": pad,
    "pad_axes": pad_axes,
    "batch_norm": batch_norm,
    "batch_norm_relu": lambda x, **others: batch_norm(x, **others).relu(),
    "instance_norm": instance_norm,
    "group_norm": group_norm,
    "layer_norm": F.layer_norm,
    "local_response_norm": response_norm,
    "softmax_cross_entropy": softmax_cross_entropy,
    "mse_loss": F.mse_loss,
    "binary_cross_entropy_with_logits": F.binary_cross_entropy_with_logits,
    "l1_loss": F.l1_loss,
    "huber_loss": F.huber_loss,
    "sigmoid_focal_loss": sigmoid_focal,
    "focal_loss": focal,
    "dice_loss": dice,
    "nt_xent_loss": nt_xent,
    "triplet_loss": triplet,
    "is_correct": lambda logits, labels: logits.argmax(1) == labels,
    "interpolate": interpolate,
    "resize": resize,
    "pixel_shuffle": F.pixel_shuffle,
    "pixel_unshuffle": F.pixel_unshuffle,
}
