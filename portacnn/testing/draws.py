"""How the arguments of each op are drawn: functions from ``Random`` to the arguments by name.

Arrays are NumPy's, of floats in float64; they come in the dtype under test. Those named in STATE
keep their dtype: a training step has them on the device.

Notation: N batch, C in-channels, O out-channels, G groups, S the spatial axes, K a kernel's.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from portacnn.ops import use_kernels
from portacnn.ops.dispatch import OPS
from portacnn.ops.fused import ConvNorm
from portacnn.ops.resize import COORDINATES, ROUNDING, axes_of
from portacnn.ops.windows import Windows
from portacnn.testing.random import Random

STATE = ("lr", "momentum")
Arguments = dict[str, Any]
Draw = Callable[[Random], Arguments]


def with_options(draw: Draw, **options: Any) -> Draw:
    """The same arguments and these, a draw from several where one is a tuple."""

    def run(random: Random) -> Arguments:
        chosen = {
            name: random.of(*value) if isinstance(value, tuple) else value
            for name, value in options.items()
        }
        return {**draw(random), **chosen}

    return run


def _maybe(random: Random, value: Any) -> Any:
    return random.of(None, value)


# --- convolution ----------------------------------------------------------------------------------


def _channels(random: Random) -> tuple[int, int, int, int]:
    """G, C, O, and how far the input may be larger than a window. Of few channels, of many (whose
    steps of depth are full or not), and of few in each of several groups."""
    kind = random.of("few", "few", "many", "grouped")
    if kind == "grouped":
        groups = random.whole(2, 5)
        return groups, groups * random.of(1, 1, 2, 4), groups * random.whole(1, 4), 9
    groups = random.of(1, 1, 1, 2, 3)
    if kind == "few":
        return groups, groups * random.upto(9, 20), groups * random.upto(9, 20), 12
    c, o = (groups * random.of(5, 11, 16, 17, 32) for _ in range(2))
    return groups, c, o, 3


def convolution(axes: int | None = None, exact: bool = False, grouped: bool = False) -> Draw:
    """Of the op ``conv``. exact: of multiples of 1/8. grouped: of few channels in each of several
    groups."""

    def draw(random: Random) -> Arguments:
        if grouped:
            groups, each, most = random.whole(2, 5), random.of(1, 1, 2, 4), 9
            c, o = groups * each, groups * random.whole(1, 4)
        else:
            groups, c, o, most = _channels(random)
        windows = random.windows(axes, most)
        n = random.batch() if most > 3 else random.of(1, 3, 4, 8)
        values = random.eighths if exact else random.numbers
        return {
            "x": values(n, c, *windows.size),
            "weight": values(o, c // groups, *windows.kernel),
            "bias": _maybe(random, values(o)),
            "windows": windows,
            "groups": groups,
        }

    return draw


def conv_relu(random: Random) -> Arguments:
    arguments = convolution(exact=True)(random)
    out = arguments["windows"].out
    # windows of 2x2 side by side have a kernel of their own
    pool = random.of(None, "any", "two") if min(out) > 1 else random.of(None, "any")
    if pool == "any":
        return {**arguments, "pool": random.pooling(out)}
    return {**arguments, "pool": pool and Windows.of(out, 2, 2)}


def conv_unit(grouped: bool = False) -> Draw:
    def draw(random: Random) -> Arguments:
        arguments = convolution(grouped=grouped)(random)
        x, weight, windows = (arguments.pop(name) for name in ("x", "weight", "windows"))
        o, out = len(weight), windows.out
        residual = random.of(None, random.numbers(len(x), o, *out))
        norm = ConvNorm(random.numbers(o), random.positive(o), **_affine(random, o), eps=1e-3)
        low, high = random.of((None, None), (0.0, None), (0.0, 6.0), (None, 0.5), (-0.25, 0.25))
        return {
            "parts": [x] if residual is None else [x, residual],
            "weight": weight,
            "bias": arguments["bias"],
            "windows": windows,
            "groups": arguments["groups"],
            "norm": random.of(norm, None),
            "low": low,
            "high": high,
            "pool": random.of(None, random.pooling(out)),
        }

    return draw


def conv_transpose(axes: int | None = None) -> Draw:
    """Its windows are those of the convolution whose input's gradient it is."""

    def draw(random: Random) -> Arguments:
        groups, c, o, most = _channels(random)
        windows, n = random.windows(axes, most), random.of(1, 2, 3, 8, random.upto(4, 33))
        return {
            "x": random.numbers(n, c, *windows.out),
            "weight": random.numbers(c, o // groups, *windows.kernel),
            "bias": _maybe(random, random.numbers(o)),
            "windows": windows,
            "groups": groups,
        }

    return draw


def _face(arguments: Arguments) -> Arguments:
    """As the public op takes them: the numbers in place of the windows."""
    windows = arguments.pop("windows")
    return {
        **arguments,
        "stride": windows.stride,
        "padding": windows.pads,
        "dilation": windows.dilation,
    }


def public_conv(axes: int) -> Draw:
    return lambda random: _face(convolution(axes)(random))


def public_conv_transpose(axes: int) -> Draw:
    def draw(random: Random) -> Arguments:
        arguments = conv_transpose(axes)(random)
        w = arguments["windows"]
        left = tuple(
            (n + sum(pads) - d * (k - 1) - 1) % s
            for n, pads, d, k, s in zip(w.size, w.pads, w.dilation, w.kernel, w.stride, strict=True)
        )
        return {**_face(arguments), "output_padding": left}

    return draw


def gather(random: Random) -> Arguments:
    windows = random.windows(random.of(1, 2, 2, 3))
    return {"x": random.numbers(random.upto(4, 20), *windows.size, random.batch())} | {
        "windows": windows
    }


def scatter(random: Random) -> Arguments:
    windows = random.windows(random.of(1, 2, 2, 3))
    c, taps = random.upto(4, 9), prod(windows.kernel)
    return {"columns": random.numbers(c, taps, *windows.out, random.batch()), "windows": windows}


def _patches(random: Random) -> tuple[tuple[int, ...], Arguments]:
    h, w, stride, pad = (random.whole(*limits) for limits in ((1, 3), (1, 3), (1, 2), (0, 1)))
    shape = (random.whole(1, 4), random.whole(1, 3), h + random.whole(0, 4), w + random.whole(0, 4))
    return shape, {"filter_h": h, "filter_w": w, "stride": stride, "pad": pad}


def im2col(random: Random) -> Arguments:
    shape, options = _patches(random)
    return {"input_data": random.numbers(*shape), **options}


def col2im(random: Random) -> Arguments:
    shape, options = _patches(random)
    n, c, *size = shape
    kernel = options["filter_h"], options["filter_w"]
    out = (
        (s + 2 * options["pad"] - k) // options["stride"] + 1
        for s, k in zip(size, kernel, strict=True)
    )
    col = random.numbers(n * prod(out), c * prod(kernel))
    return {"col": col, "input_shape": shape, **options}


def _columns(random: Random) -> tuple[Windows, Arguments]:
    windows = random.windows(random.whole(1, 3), 4)
    names = ("stride", "dilation")
    options = {name: getattr(windows, name) for name in names}
    return windows, {"kernel_size": windows.kernel, "padding": windows.pads, **options}


def unfold(random: Random) -> Arguments:
    windows, options = _columns(random)
    return {"x": random.numbers(random.of(1, 3), random.whole(1, 3), *windows.size), **options}


def fold(random: Random) -> Arguments:
    windows, options = _columns(random)
    rows = random.whole(1, 3) * prod(windows.kernel)
    columns = random.numbers(random.of(1, 3), rows, prod(windows.out))
    return {"columns": columns, "output_size": windows.size, **options}


# --- pooling --------------------------------------------------------------------------------------


def _images(random: Random, axes: int | None = None) -> tuple[int, ...]:
    """(N, C, *S)"""
    size = random.size(1) if axes is None else random.size(axes, axes)
    return random.batch(), random.upto(3, 20), *size


def max_pool(random: Random) -> Arguments:
    shape = _images(random)
    return {"x": random.eighths(*shape), "windows": random.pooling(shape[2:], dilated=True)}


def avg_pool(random: Random) -> Arguments:
    shape = _images(random)
    return {
        "x": random.numbers(*shape),
        "windows": random.pooling(shape[2:]),
        "count_include_pad": random.of(True, False),
        "divisor": random.of(None, None, 3),
    }


def public_pool(axes: int, average: bool) -> Draw:
    def draw(random: Random) -> Arguments:
        n, c, *size = random.batch(), random.upto(3, 9), *random.size(axes, axes)
        kernel = tuple(random.whole(1, min(3, s)) for s in size)
        options = {"padding": 1} if min(kernel) > 1 and random.of(True, False) else {}
        options |= {"stride": random.of(None, 1, 2), "ceil_mode": random.of(True, False)}
        if average:
            options |= {"count_include_pad": random.of(True, False)}
        values = random.numbers if average else random.eighths
        return {"x": values(n, c, *size), "kernel_size": kernel, **options}

    return draw


def adaptive(axes: int, average: bool) -> Draw:
    def draw(random: Random) -> Arguments:
        shape = _images(random, axes)
        x = (random.numbers if average else random.eighths)(*shape)
        return {"x": x, "output_size": tuple(random.whole(1, n + 1) for n in shape[2:])}

    return draw


def adaptive_op(average: bool) -> Draw:
    def draw(random: Random) -> Arguments:
        arguments = adaptive(random.whole(1, 3), average)(random)
        return {"x": arguments["x"], "size": arguments["output_size"]}

    return draw


def images(random: Random) -> Arguments:
    return {"x": random.numbers(*_images(random))}


def equal_images(random: Random) -> Arguments:
    return {"x": random.eighths(*_images(random))}


# --- affine maps, elementwise ---------------------------------------------------------------------


def linear(exact: bool = False) -> Draw:
    def draw(random: Random) -> Arguments:
        n, o = random.batch(), random.of(random.upto(12, 60), 16, 31, 33, 64, 65)
        f = random.of(random.upto(12, 400), 16, 31, 33, 64, 65, 200, 333)
        values = random.eighths if exact else random.numbers
        x, weight = values(n, f), values(o, f)
        return {"x": x, "weight": weight, "bias": _maybe(random, values(o))}

    return draw


def elementwise(random: Random) -> Arguments:
    return {"x": 3 * random.numbers(random.batch(), *random.size())}


def positive(random: Random) -> Arguments:
    return {"x": random.positive(random.batch(), *random.size())}


def relu(random: Random) -> Arguments:
    return {"x": random.eighths(random.batch(), *random.size())}


def erf(random: Random) -> Arguments:
    """Longer than one piece, too."""
    shape = random.of(random.size(), (random.of(5, 1000, 3000),))
    return {"x": 3 * random.numbers(random.batch(), *shape)}


def arithmetic(kind: str) -> Draw:
    def draw(random: Random) -> Arguments:
        shape = random.batch(), *random.size()
        other = random.of(shape, shape[1:], tuple(random.of(1, n) for n in shape))
        a, b = (random.positive(*s) for s in random.of((shape, other), (other, shape)))
        return {"a": a, "b": b, "kind": kind}

    return draw


def select(random: Random) -> Arguments:
    shape = random.batch(), *random.size()
    others = (tuple(random.of(1, n) for n in shape) for _ in range(2))
    a, b = (random.numbers(*other) for other in others)
    return {"condition": np.round(random.numbers(*shape)), "a": a, "b": b}


def reduce(kind: str) -> Draw:
    def draw(random: Random) -> Arguments:
        x = random.positive(random.batch(), *random.size(1, 3))
        axes = [axis for axis in range(x.ndim) if random.of(True, False)] or [x.ndim - 1]
        return {"x": x, "kind": kind, "axes": axes, "keepdims": random.of(True, False)}

    return draw


def prelu(random: Random) -> Arguments:
    c = random.upto(4, 12)
    return {"x": random.numbers(random.batch(), c), "slope": random.numbers(c)}


def along(least: int = 1) -> Draw:
    """Of an op along one axis, ``dim``."""

    def draw(random: Random) -> Arguments:
        shape = random.batch(), *random.size(least, 3)
        return {"x": 3 * random.numbers(*shape), "dim": random.whole(0, len(shape) - 1)}

    return draw


def parts(random: Random) -> Arguments:
    shape = random.batch(), *random.size()
    return {"parts": [random.eighths(*shape) for _ in range(random.whole(1, 9))]}


def pad(random: Random) -> Arguments:
    shape = random.batch(), random.whole(1, 3), random.whole(2, 6), random.whole(2, 6)
    return {
        "x": random.numbers(*shape),
        "pad": tuple(random.whole(0, 1) for _ in range(4)),
        "mode": random.of("constant", "reflect", "replicate", "circular"),
    }


def pad_axes(random: Random) -> Arguments:
    arguments = pad(random)
    left, right, top, bottom = arguments.pop("pad")
    return {**arguments, "pads": ((0, 0), (0, 0), (top, bottom), (left, right)), "value": 0.0}


# --- normalization --------------------------------------------------------------------------------


def _affine(random: Random, c: int) -> Arguments:
    return {"weight": _maybe(random, random.numbers(c)), "bias": _maybe(random, random.numbers(c))}


def batch_norm(training: bool) -> Draw:
    """At least eight values of a channel: of fewer, nothing is left of dx but its rounding. Several
    channels, as their gradients are sums: a single one may come near zero."""

    def draw(random: Random) -> Arguments:
        c = random.whole(4, 20)
        n, size = random.batch(), random.size(0, 3)
        x = random.numbers(max(n, -(-8 // prod(size))), c, *size) + random.of(0.0, 3.0)
        running = random.numbers(c), 1.0 + np.abs(random.numbers(c))
        mean, var = random.of(running, running, (None, None)) if training else running
        return {
            "x": x,
            "running_mean": mean,
            "running_var": var,
            **_affine(random, c),
            "training": training,
            "momentum": 0.3,
            "eps": 1e-3,
        }

    return draw


def batch_norm_relu(random: Random) -> Arguments:
    """Drawn again until no output is so near to 0 that rounding decides whether ReLU lets it
    pass."""
    while True:
        arguments = batch_norm(random.of(True, False))(random)
        copies = {n: a.copy() if isinstance(a, np.ndarray) else a for n, a in arguments.items()}
        with use_kernels("reference"):
            y, _ = OPS["batch_norm"](copies.pop("x"), **copies)
        if np.abs(y).min() > 1e-5 * np.abs(y).max():
            return arguments


def instance_norm(random: Random) -> Arguments:
    c = random.whole(2, 5)
    x = random.numbers(random.whole(1, 4), c, random.whole(3, 6), random.whole(3, 6))
    running = {"running_mean": random.numbers(c), "running_var": random.positive(c)}
    return {"x": x, **random.of({}, running), **_affine(random, c), "eps": 1e-3}


def group_norm(random: Random) -> Arguments:
    groups, each = random.whole(1, 3), random.whole(2, 3)
    c = groups * each
    x = random.numbers(random.whole(1, 6), c, random.whole(3, 6), random.whole(3, 6))
    return {"x": x, "num_groups": groups, **_affine(random, c), "eps": 1e-3}


def layer_norm(random: Random) -> Arguments:
    shape = tuple(random.whole(3, 9) for _ in range(random.whole(1, 2)))
    x = random.numbers(random.batch(), *shape)
    affine = {name: _maybe(random, random.numbers(*shape)) for name in ("weight", "bias")}
    return {"x": x, "normalized_shape": shape, **affine, "eps": 1e-3}


def response_norm(random: Random) -> Arguments:
    shape = random.batch(), random.whole(1, 9), *random.size(1, 2)
    return {"x": random.numbers(*shape), "size": random.whole(1, 5), "alpha": random.of(1e-2, 1.0)}


# --- losses ---------------------------------------------------------------------------------------


def softmax_cross_entropy(random: Random) -> Arguments:
    n, classes, size = random.batch(), random.whole(2, 30), random.of((), (), random.size(1, 2))
    labels = random.integers(0, classes, n, *size)
    if random.of(True, False, False):
        labels[random.values.random(labels.shape) < 0.3] = -100
        labels.flat[0] = 1
    shares = np.moveaxis(random.values.dirichlet(np.ones(classes), (n, *size)), -1, 1)
    return {
        "logits": 5 * random.numbers(n, classes, *size),
        "target": random.of(labels, labels, shares),
        "weight": random.of(None, None, random.positive(classes)),
        "label_smoothing": random.of(0.0, 0.1),
        "reduction": random.of("mean", "mean", "sum", "none"),
    }


def cross_entropy_of_labels(random: Random) -> Arguments:
    """The mean loss of one label a sample: what a training run computes."""
    n = random.of(random.batch(), random.whole(1, 40), 300, 1100)
    classes = random.of(random.whole(1, 9), *((12, 33, 70) if n <= 40 else ()))
    ignored = random.of(-100, 0, 2)
    labels = random.integers(0, classes, n)
    if (labels == ignored).all():  # the mean of nothing is NaN
        labels[0] = ignored = max(ignored, 0)
        ignored = -100
    kind = random.of("int64", "int32", "uint8")
    return {
        "logits": random.of(0.0, 500.0) + 4 * random.numbers(n, classes),
        "target": labels.astype(kind),
        "ignore_index": ignored,
        "label_smoothing": random.of(0.0, 0.1, 1.0),
    }


def of_two(random: Random) -> Arguments:
    """A loss of one value against another."""
    shape = random.batch(), *random.size(0, 2)
    return {
        "input": random.numbers(*shape),
        "target": np.asarray(random.values.random(shape)),
        "reduction": random.of("mean", "sum", "none"),
    }


def apart(random: Random) -> Arguments:
    """As ``of_two``, for losses whose slope jumps: no value is within 1e-3 of a jump."""
    made = of_two(random)
    size = np.abs(made["input"] - made["target"])
    step = np.where(size < 1e-3, 0.01, 0.0) + np.where(np.abs(size - 1) < 1e-3, 0.01, 0.0)
    return {**made, "input": made["input"] + np.sign(made["input"] - made["target"] + 1e-9) * step}


def focal_loss(random: Random) -> Arguments:
    made = softmax_cross_entropy(random)
    classes = made["logits"].shape[1]
    labels = random.integers(0, classes, made["logits"].shape[0], *made["logits"].shape[2:])
    return {
        "logits": made["logits"],
        "target": labels,
        "gamma": random.of(0.0, 1.0, 2.0),
        "weight": made["weight"],
        "reduction": made["reduction"],
    }


def dice_loss(random: Random) -> Arguments:
    n, classes, size = random.batch(), random.whole(1, 8), random.size(1, 2)
    return {
        "probabilities": np.asarray(random.values.random((n, classes, *size))),
        "target": random.integers(0, classes, n, *size),
        "smooth": random.of(1.0, 0.1),
        "weight": random.of(None, random.positive(n)),
    }


def nt_xent_loss(random: Random) -> Arguments:
    pairs, length = random.whole(1, 12), random.whole(2, 20)
    return {
        "embeddings": random.numbers(2 * pairs, length) + 0.5,
        "labels": np.arange(2 * pairs) // 2,
        "temperature": random.of(0.1, 0.5, 1.0),
    }


def triplet_loss(random: Random) -> Arguments:
    n, length = random.whole(1, 12), random.whole(1, 20)
    return {
        "embeddings": random.numbers(n, length),
        "labels": np.arange(n) % random.whole(1, 4),
        "margin": random.of(0.0, 0.2, 1.0),
        "triplets": random.of("semihard", "hardest", "all"),
    }


def is_correct(random: Random) -> Arguments:
    n, classes = random.batch(), random.whole(1, 30)
    return {"logits": random.eighths(n, classes), "labels": random.integers(0, classes, n)}


# --- dropout, batches -----------------------------------------------------------------------------

WORD = 1 << 32


def kept(random: Random) -> Arguments:
    rows, length = random.batch(), random.of(1, 7, 400, *((20_000,) * (random.scale != "small")))
    return {
        "like": np.zeros(1),
        "length": length,
        "first": random.integers(0, WORD, rows),
        "second": random.integers(0, WORD, rows),
        "threshold": random.whole(1, WORD - 1),
    }


def drop(random: Random) -> Arguments:
    x = random.numbers(random.batch(), random.whole(1, 12), *random.size(1, 2))
    one, other = random.integers(0, WORD, 2)
    counters = random.of(
        (3, 70), (2**31 - 1, 2**32), (np.asarray(1 << 33), np.asarray(5)), (2**62, 2**40 + 7)
    )
    return {
        "x": x,
        "p": random.of(0.0, 0.2, 0.5, 0.9, 1.0),
        "length": random.of(x[0].size, x.shape[1]),
        "key": (int(one), int(other)),
        "step": counters[0],
        "first": counters[1],
    }


def dropout(least: int, most: int) -> Draw:
    def draw(random: Random) -> Arguments:
        shape = random.batch(), random.upto(3, 12), *random.size(least, most)
        return {"x": random.numbers(*shape), "p": random.of(0.0, 0.2, 0.5, 1.0), "seed": 3}

    return draw


def interpolate(random: Random) -> Arguments:
    linear = random.of(True, False)
    size = random.size(2, 2) if linear else random.size(1, 3)
    return {
        "x": random.numbers(random.batch(), random.upto(3, 12), *size),
        "size": tuple(random.whole(1, 9) for _ in size),
        "mode": "bilinear" if linear else "nearest",
        "coordinates": random.of(*COORDINATES),
        "rounding": None if linear else random.of(*ROUNDING),
    }


def resize(random: Random) -> Arguments:
    made = interpolate(random)
    x = made.pop("x")
    return {"x": x, "axes": axes_of(x.shape[2:], scale_factor=None, **made)}


def pixel_shuffle(random: Random) -> Arguments:
    r, c = random.whole(1, 3), random.whole(1, 4)
    shape = random.batch(), c * r * r, *random.size(2, 2)
    return {"x": random.numbers(*shape), "upscale_factor": r}


def pixel_unshuffle(random: Random) -> Arguments:
    r = random.whole(1, 3)
    shape = random.batch(), random.whole(1, 4), *(r * n for n in random.size(2, 2))
    return {"x": random.numbers(*shape), "downscale_factor": r}


def take_batch(random: Random) -> Arguments:
    n, c, size = random.batch(), random.whole(1, 4), random.size(0, 2)
    indices = _maybe(random, random.integers(0, n, random.batch()))
    if random.of(True, True, False):
        std = 1.0 + random.values.random((c, *(1,) * len(size)))
        images = random.integers(0, 256, n, c, *size).astype(np.uint8)
        return {
            "images": images,
            "indices": indices,
            "mean": _maybe(random, 100 * std),
            "std": 50 * std,
        }
    return {"images": random.numbers(n, c, *size), "indices": indices}


# --- updates --------------------------------------------------------------------------------------

ON_DEVICE = {"lr": np.float64, "step": np.int64, "first": np.bool_}


def _lists(random: Random, *names: str) -> Arguments:
    """Lists of arrays alike in shape; often one long array, as in training. Those beside
    parameters and gradients have nothing negative."""
    longest = {"small": 700, "medium": 3000, "large": 100_000}[random.scale]
    few = 5 if random.scale == "small" else 20
    shapes = random.of(
        [(random.of(longest, random.whole(1, 700)),)],
        [
            tuple(random.whole(1, few) for _ in range(random.whole(0, 3)))
            for _ in range(random.whole(1, 4))
        ],
    )
    made = {name: [random.numbers(*shape) for shape in shapes] for name in names}
    return {
        name: arrays if name in ("params", "grads") else [np.asarray(np.abs(a)) for a in arrays]
        for name, arrays in made.items()
    }


def update(*states: str, **options: Any) -> Draw:
    """An optimizer's op. Its rate and its counts are Python's numbers, or arrays on the device as
    in a replayed step. options: a tuple is a choice."""

    def draw(random: Random) -> Arguments:
        found = with_options(
            lambda random: _lists(random, "params", "grads", *states),
            **options,
            lr=0.05,
            weight_decay=(0.0, 0.1),
        )(random)
        if random.of(True, False):
            found |= {
                name: np.asarray(found[name], t) for name, t in ON_DEVICE.items() if name in found
            }
        return {**found, "ok": random.of(None, np.asarray(True), np.asarray(False))}

    return draw


def rmsprop_update(random: Random) -> Arguments:
    """The mean of squares is above the square of the mean."""
    draw = update("mean_square", "mean", "velocity", alpha=(0.9, 0.95), eps=1e-3, momentum=0.5)
    found = draw(random)
    found["mean_square"] = [np.asarray(s + 1) for s in found["mean_square"]]
    found["mean"] = _maybe(random, [np.asarray(np.tanh(m)) for m in found["mean"]])
    found["velocity"] = _maybe(random, found["velocity"])
    return found


def all_finite(random: Random) -> Arguments:
    arrays = _lists(random, "params")["params"]
    if random.of(True, False):
        last = arrays[-1].reshape(-1)
        last[random.whole(0, last.size - 1)] = random.of(np.nan, np.inf, -np.inf)
    return {"arrays": arrays}


def clip_by_global_norm(random: Random) -> Arguments:
    return {"grads": _lists(random, "grads")["grads"], "max_norm": random.of(0.5, 3.0, 1e6)}
