"""Random arguments for every op that a GPU has a kernel for: what ``gpu/kernels.py`` calls them
with.

Where an op has to decide something (ReLU, the largest under a window) the numbers are multiples of
1/8, few enough that every sum is exact in float32: then float32 and float64 decide alike, ties
included.

Notation: N batch, C in-channels, O out-channels, S the spatial axes.
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import numpy as np

from gpu.tools import add_root

add_root()

from portacnn.ops import use_kernels  # noqa: E402
from portacnn.ops.dispatch import OPS  # noqa: E402
from portacnn.ops.pool import pool_windows  # noqa: E402
from portacnn.ops.windows import Windows  # noqa: E402


class Example(NamedTuple):
    """One call. Arrays of floats among ``args`` come in the dtype under test, those among
    ``options`` as they are."""

    args: tuple
    options: dict[str, Any]
    backward: bool = True


class Draw:
    """Random arguments.

    Args:
        large: shapes of more than one block of threads too.
    """

    def __init__(self, seed: int, large: bool) -> None:
        self.rng = np.random.default_rng(seed)
        self.large = large

    def whole(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def of(self, *values: Any) -> Any:
        return values[self.whole(0, len(values) - 1)]

    def batch(self) -> int:
        return self.of(1, 2, 8, 31, 32, 33, *((100, 257) if self.large else ()), self.whole(1, 40))

    def size(self, least: int = 0, most: int = 3) -> tuple[int, ...]:
        return tuple(self.whole(1, 13) for _ in range(self.whole(least, most)))

    def numbers(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape)

    def eighths(self, *shape: int) -> np.ndarray:
        """Multiples of 1/8 between -1 and 1: the products of two are multiples of 1/64, and 10^5 of
        them add up exactly."""
        return self.rng.integers(-8, 9, shape) / 8

    def windows(self) -> Windows:
        axes = self.of(2, 2, 2, 1)

        def each(low: int, high: int) -> tuple[int, ...]:
            return tuple(self.whole(low, high) for _ in range(axes))

        kernel, stride, dilation = each(1, 5), each(1, 3), each(1, 2)
        pads = tuple(zip(each(0, 3), each(0, 3), strict=True))
        least = (
            max(1, d * (k - 1) + 1 - sum(p)) for k, d, p in zip(kernel, dilation, pads, strict=True)
        )
        size = tuple(n + more for n, more in zip(least, each(0, 12), strict=True))
        return Windows.of(size, kernel, stride, pads, dilation)

    def pooling(self, size: tuple[int, ...]) -> Windows:
        kernel = tuple(self.whole(1, min(3, n)) for n in size)
        plain = self.of(True, False)
        stride = kernel if plain else tuple(self.whole(1, 4) for _ in size)
        padding = int(not plain and min(kernel) > 1 and self.of(True, False))
        return pool_windows(size, kernel, stride, padding, 1, self.of(True, False))


# --- how the arguments of each op are drawn -------------------------------------------------------


def _convolution(draw: Draw, values: Callable[..., np.ndarray]) -> tuple:
    windows, groups, n = draw.windows(), draw.of(1, 1, 1, 2), draw.batch()
    c, o = (groups * draw.whole(1, 20) for _ in range(2))
    bias = draw.of(None, values(o))
    return (
        values(n, c, *windows.size),
        values(o, c // groups, *windows.kernel),
        bias,
        windows,
        groups,
    )


def conv(draw: Draw) -> Example:
    return Example(_convolution(draw, draw.numbers), {"keep": True})


def conv_relu(draw: Draw) -> Example:
    exact = draw.of(True, True, False)
    args = _convolution(draw, draw.eighths if exact else draw.numbers)
    return Example((*args, draw.of(None, draw.pooling(args[3].out))), {"keep": True}, exact)


def conv_transpose(draw: Draw) -> Example:
    stride, n = draw.whole(1, 3), draw.batch()
    size, kernel = (draw.whole(1, 9), draw.whole(1, 9)), (draw.whole(1, 4), draw.whole(1, 4))
    windows = Windows.transposed(size, kernel, stride, 0, draw.whole(0, stride - 1), 1)
    groups = draw.of(1, 1, 2)
    c, o = (groups * draw.whole(1, 10) for _ in range(2))
    weight = draw.numbers(c, o // groups, *kernel)
    return Example(
        (draw.numbers(n, c, *size), weight, draw.of(None, draw.numbers(o)), windows, groups),
        {"keep": True},
    )


def gather(draw: Draw) -> Example:
    windows = draw.windows()
    return Example((draw.numbers(draw.whole(1, 20), *windows.size, draw.batch()), windows), {})


def scatter(draw: Draw) -> Example:
    windows = draw.windows()
    return Example(
        (draw.numbers(draw.whole(1, 9), prod(windows.kernel), *windows.out, draw.batch()), windows),
        {},
    )


def linear(draw: Draw) -> Example:
    n, f, o = draw.batch(), draw.whole(1, 400), draw.whole(1, 130)
    return Example(
        (draw.numbers(n, f), draw.numbers(o, f), draw.of(None, draw.numbers(o))), {"keep": True}
    )


def linear_relu(draw: Draw) -> Example:
    n, f, o, exact = (
        draw.batch(),
        draw.whole(1, 400),
        draw.whole(1, 130),
        draw.of(True, True, False),
    )
    values = draw.eighths if exact else draw.numbers
    return Example((values(n, f), values(o, f), draw.of(None, values(o))), {"keep": True}, exact)


def relu(draw: Draw) -> Example:
    return Example((draw.eighths(draw.batch(), *draw.size()),), {"keep": True})


def erf(draw: Draw) -> Example:
    return Example((3 * draw.numbers(draw.batch(), *draw.size()),), {})


def max_pool(draw: Draw) -> Example:
    size = draw.size(1)
    return Example(
        (draw.eighths(draw.batch(), draw.whole(1, 20), *size), draw.pooling(size)), {"keep": True}
    )


def avg_pool(draw: Draw) -> Example:
    size = draw.size(1)
    x, divisor = draw.numbers(draw.batch(), draw.whole(1, 20), *size), draw.of(None, None, 3)
    return Example((x, draw.pooling(size), draw.of(True, False), divisor), {"keep": True})


def batch_norm(draw: Draw) -> Example:
    """At least eight numbers a channel: of fewer, nothing is left of dx but its rounding."""
    c = draw.whole(4, 20)
    x = draw.numbers(max(8, draw.batch()), c, *draw.size(0, 2)) + draw.of(0.0, 3.0)
    running = draw.numbers(c), 1.0 + np.abs(draw.numbers(c))
    affine = draw.of((None, None), (draw.numbers(c), draw.numbers(c)))
    options = {"training": draw.of(True, False), "momentum": 0.3, "eps": 1e-3, "keep": True}
    return Example((x, *running, *affine), options)


def batch_norm_relu(draw: Draw) -> Example:
    """Drawn again until no number is so near to 0 that rounding decides whether ReLU lets it
    through."""
    while True:
        example = batch_norm(draw)
        with use_kernels("reference"):
            y, _ = OPS["batch_norm"](
                *(None if a is None else a.copy() for a in example.args), **example.options
            )
        if np.abs(y).min() > 1e-5 * np.abs(y).max():
            return example


def summands(draw: Draw) -> list[np.ndarray]:
    shape = (draw.batch(), *draw.size())
    return [draw.eighths(*shape) for _ in range(draw.whole(1, 4))]


def add(draw: Draw) -> Example:
    return Example((summands(draw),), {})


def add_relu(draw: Draw) -> Example:
    return Example((summands(draw),), {"keep": True})


def softmax_cross_entropy(draw: Draw) -> Example:
    n, classes, size = draw.batch(), draw.whole(2, 30), draw.of((), (), draw.size(1, 2))
    labels = draw.rng.integers(0, classes, (n, *size))
    if draw.of(True, False, False):
        labels[draw.rng.random(labels.shape) < 0.3] = -100
        labels.flat[0] = 1
    target = (
        labels
        if draw.of(True, True, False)
        else np.moveaxis(draw.rng.dirichlet(np.ones(classes), (n, *size)), -1, 1)
    )
    options = {
        "weight": draw.of(None, None, 0.5 + draw.rng.random(classes)),
        "label_smoothing": draw.of(0.0, 0.1),
    }
    options |= {"reduction": draw.of("mean", "mean", "sum", "none"), "keep": True}
    return Example((5 * draw.numbers(n, classes, *size), target), options)


def _words(draw: Draw, *shape: int) -> Any:
    return draw.rng.integers(0, 1 << 32, shape)


def kept(draw: Draw) -> Example:
    rows, length = draw.batch(), draw.of(1, 7, 400, *((20000,) if draw.large else ()))
    return Example(
        (np.zeros(1), length, _words(draw, rows), _words(draw, rows), draw.whole(1, (1 << 32) - 1)),
        {},
    )


def drop(draw: Draw) -> Example:
    size = draw.size(1, 2)
    x = draw.numbers(draw.batch(), draw.whole(1, 12), *size)
    length = draw.of(x[0].size, x.shape[1])
    key = (int(_words(draw)), int(_words(draw)))
    counters: Any = draw.of((3, 70), (np.asarray(1 << 33), np.asarray(5)))
    return Example((x, draw.of(0.0, 0.2, 0.5, 1.0), length, key, *counters), {"keep": True})


def take_batch(draw: Draw) -> Example:
    n, c, size = draw.batch(), draw.whole(1, 4), draw.size(0, 2)
    indices = draw.of(None, draw.rng.integers(0, n, draw.batch()))
    std = 1.0 + draw.rng.random((c, *(1,) * len(size)))
    if draw.of(True, True, False):
        images = draw.rng.integers(0, 256, (n, c, *size)).astype(np.uint8)
        return Example((images, indices, draw.of(None, 100 * std), 50 * std), {})
    return Example((draw.numbers(n, c, *size), indices, None, None), {})


def _parameters(draw: Draw, lists: int) -> tuple[list[np.ndarray], ...]:
    """Parameters, gradients, and so many lists beside them in which nothing is negative; often one
    long array, as in training."""
    long = draw.of(100_000 if draw.large else 3000, draw.whole(1, 3000))
    shapes = draw.of(
        [(long,)], [(draw.whole(1, 20),) * draw.whole(0, 3) for _ in range(draw.whole(1, 4))]
    )
    found = [[np.asarray(draw.numbers(*shape)) for shape in shapes] for _ in range(2 + lists)]
    return tuple(found[:2]) + tuple(
        [np.asarray(np.abs(array)) for array in arrays] for arrays in found[2:]
    )


def _update(lists: int, **fixed: Callable[[Draw], Any]) -> Callable[[Draw], Example]:
    """An optimizer's op: its rate and its counts as Python's numbers, or as arrays on the device as
    in a replayed step."""

    def one(draw: Draw) -> Example:
        on_device = draw.of(True, False)
        options = {name: value(draw) for name, value in fixed.items()}
        options |= {"lr": 0.05, "weight_decay": draw.of(0.0, 0.1)}
        if on_device:
            counts = {"lr": np.float64, "step": np.int64, "first": np.bool_}
            options |= {
                name: np.asarray(options[name], kind)
                for name, kind in counts.items()
                if name in options
            }
        return Example(
            _parameters(draw, lists),
            {**options, "ok": draw.of(None, np.asarray(True), np.asarray(False))},
        )

    return one


def _either(*values: Any) -> Callable[[Draw], Any]:
    return lambda draw: draw.of(*values)


def rmsprop_update(draw: Draw) -> Example:
    (p, g, square, mean, velocity), options, _ = _update(
        3, alpha=_either(0.9), eps=_either(1e-3), momentum=_either(0.5)
    )(draw)
    square, mean = (
        [np.asarray(s + 1) for s in square],
        [np.asarray(np.tanh(m)) for m in mean],
    )  # the variance is above 0
    return Example((p, g, square, draw.of(None, mean), draw.of(None, velocity)), options)


def all_finite(draw: Draw) -> Example:
    arrays, _ = _parameters(draw, 0)
    if draw.of(True, False):
        arrays[-1].flat[draw.whole(0, arrays[-1].size - 1)] = draw.of(np.nan, np.inf, -np.inf)
    return Example((arrays,), {})


def clip_by_global_norm(draw: Draw) -> Example:
    return Example((_parameters(draw, 0)[1], draw.of(0.5, 1e6)), {})


EXAMPLES: dict[str, Callable[[Draw], Example]] = {
    **{e.__name__: e for e in (gather, scatter)},
    **{
        e.__name__: e
        for e in (
            conv,
            conv_relu,
            conv_transpose,
            linear,
            linear_relu,
            relu,
            erf,
            max_pool,
            avg_pool,
        )
    },
    **{
        e.__name__: e
        for e in (batch_norm, batch_norm_relu, add, add_relu, softmax_cross_entropy, kept, drop)
    },
    **{e.__name__: e for e in (take_batch, rmsprop_update, all_finite, clip_by_global_norm)},
    "sgd_update": _update(0),
    "momentum_update": _update(
        1,
        momentum=_either(0.0, 0.9),
        dampening=_either(0.0, 0.5),
        nesterov=_either(True, False),
        first=_either(True, False),
    ),
    "adagrad_update": _update(1, eps=_either(1e-7)),
    "adam_update": _update(
        2,
        beta1=_either(0.9),
        beta2=_either(0.999),
        eps=_either(1e-8),
        step=_either(1, 2, 9, 1000),
        decoupled=_either(True, False),
    ),
}
