"""Every public op once: how it is called, forward and backward, on arrays of given shapes. For what
has to hold of all of them.

``EVERY[name]`` says which arrays of floats an op takes, in a small and in a long form. In the long
one all that is summed has two thousand summands or more (where there are sums): float16 counts up
to 2048, bfloat16 up to 256.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from portacnn import ops
from support.matrix import Here

Shapes = dict[str, tuple[int, ...]]


class Case(NamedTuple):
    op: str
    small: Shapes
    long: Shapes
    run: Callable[..., list[Any]]
    """(here, arrays by name) -> results: the output, the gradients, what was written into."""


def _flat(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [array for item in value for array in _flat(item)]
    return [value] if hasattr(value, "dtype") else []


def _pair(
    here: Here, arrays: dict[str, Any], *, op: str, writes: tuple[str, ...] = (), **options: Any
) -> list[Any]:
    """The output, and the gradients for a gradient equal to it."""
    first, *others = arrays
    y, cache = getattr(ops, op)(arrays[first], **{name: arrays[name] for name in others}, **options)
    gradients = getattr(ops, f"{op}_backward")(y, cache)
    return [*_flat(y), *_flat(gradients), *(arrays[name] for name in writes)]


def _windowed(here: Here, arrays: dict[str, Any], *, op: str, **options: Any) -> list[Any]:
    """Pooling: a kernel one shorter than each axis, so that there are two windows on each, which
    overlap."""
    return _pair(
        here,
        arrays,
        op=op,
        kernel_size=tuple(n - 1 for n in arrays["x"].shape[2:]),
        stride=1,
        **options,
    )


def _over_all(
    here: Here, arrays: dict[str, Any], *, op: str, option: str, axis: int, **options: Any
) -> list[Any]:
    """With an option that is the extent of an axis."""
    return _pair(here, arrays, op=op, **{option: arrays["x"].shape[axis]}, **options)


def _entropy(here: Here, arrays: dict[str, Any], reduction: str) -> list[Any]:
    count, classes = arrays["logits"].shape
    labels = here.array(np.arange(count) % classes)
    return _pair(
        here,
        {**arrays, "target": labels},
        op="softmax_cross_entropy",
        reduction=reduction,
        label_smoothing=0.1,
    )


def _normalized(here: Here, arrays: dict[str, Any], *, op: str, **options: Any) -> list[Any]:
    return _pair(here, arrays, op=op, writes=("running_mean", "running_var"), **options)


def _updated(here: Here, arrays: dict[str, Any], *, op: str, **options: Any) -> list[Any]:
    p, g, *states = ([array] for array in arrays.values())
    result = getattr(ops, op)(p, g, *states, **options)
    return [*_flat(result), *_flat(p), *_flat(states)]


def _clipped(here: Here, arrays: dict[str, Any]) -> list[Any]:
    return [ops.clip_by_global_norm([arrays["g"]], 1.0), arrays["g"]]


def _columns(here: Here, arrays: dict[str, Any]) -> list[Any]:
    col = ops.im2col(arrays["x"], 2, 2)
    return [col, ops.col2im(col, tuple(arrays["x"].shape), 2, 2)]


def _case(
    op: str, small: Shapes, long: Shapes | None = None, run: Any = _pair, **options: Any
) -> Case:
    return Case(op, small, long or small, partial(run, op=op, **options))


def _each_axes(op: str, run: Any, long: int, **options: Any) -> dict[str, Case]:
    return {
        f"{op}{axes}d": _case(
            f"{op}{axes}d",
            {"x": (2, 2, *(3,) * axes)},
            {"x": (1, 2, *(3,) * (axes - 1), long)},
            run,
            **options,
        )
        for axes in (1, 2, 3)
    }


def _taken(here: Here, arrays: dict[str, Any]) -> list[Any]:
    return [ops.take_batch(arrays["x"], here.array(np.arange(arrays["x"].shape[0])[::-1]))]


_X: Shapes = {"x": (4, 3, 2, 3)}
_CHANNELS: Shapes = {name: (3,) for name in ("running_mean", "running_var", "weight", "bias")}
_ELEMENTWISE = (
    "clip",
    "elu",
    "gelu",
    "hard_sigmoid",
    "hard_swish",
    "leaky_relu",
    "relu",
    "scaled_elu",
    "sigmoid",
    "silu",
)

EVERY: dict[str, Case] = {
    **{name: _case(name, _X) for name in (*_ELEMENTWISE, "softplus", "tanh")},
    "gelu of tanh": _case("gelu", _X, approximate="tanh"),
    "clip to bounds": _case("clip", _X, min=-0.5, max=0.5),
    **{
        f"elementwise {kind}": _case("elementwise", _X, function=kind)
        for kind in ("abs", "cos", "erf", "exp", "log", "mish", "negative", "reciprocal", "sin",
        "softsign", "sqrt")
    },
    **{
        "arithmetic "
        f"{kind}": _case("arithmetic", {"a": (4, 3), "b": (3,)}, {"a": (2500, 3), "b": (3,)},
        kind=kind)
        for kind in ("add", "subtract", "multiply", "divide", "power", "maximum", "minimum")
    },
    "prelu": _case("prelu", {"x": (4, 3), "slope": (3,)}, {"x": (5000, 3), "slope": (3,)}),
    "erf": Case("erf", _X, _X, lambda here, a: [ops.erf(a["x"])]),
    "softmax": _case("softmax", {"x": (3, 5)}, {"x": (2, 5000)}, dim=1),
    "log_softmax": _case("log_softmax", {"x": (3, 5)}, {"x": (2, 5000)}, dim=1),
    **{
        f"conv{axes}d": _case(
            f"conv{axes}d",
            {"x": (2, 2, *(3,) * axes), "weight": (3, 2, *(2,) * axes), "bias": (3,)},
            {"x": (2, 90, *(5,) * axes), "weight": (2, 90, *(5,) * axes), "bias": (2,)},
        )
        for axes in (1, 2, 3)
    },
    "conv2d of "
    "many": _case("conv2d", {"x": (2, 1, 3, 3), "weight": (2, 1, 1, 1)}, {"x": (40, 1, 9, 9),
    "weight": (2, 1, 1, 1)}),
    **{
        f"conv_transpose{axes}d": _case(
            f"conv_transpose{axes}d",
            {"x": (2, 2, *(3,) * axes), "weight": (2, 3, *(2,) * axes), "bias": (3,)},
            {"x": (2, 2300, *(1,) * axes), "weight": (2300, 2, *(1,) * axes), "bias": (2,)},
        )
        for axes in (1, 2, 3)
    },
    "linear": _case(
        "linear",
        {"x": (3, 4), "weight": (2, 4), "bias": (2,)},
        {"x": (200, 2300), "weight": (2, 2300), "bias": (2,)},
    ),
    "batch_norm": _case("batch_norm", {**_X, **_CHANNELS}, {"x": (400, 3, 2, 3), **_CHANNELS},
    _normalized, training=True),
    "batch_norm at "
    "rest": _case("batch_norm", {**_X, **_CHANNELS}, {"x": (400, 3, 2, 3), **_CHANNELS},
    _normalized),
    "instance_norm": _case("instance_norm", {**_X, **_CHANNELS}, {"x": (2, 3, 50, 50),
    **_CHANNELS}, _normalized),
    "group_norm": _case(
        "group_norm", {**_X, "weight": (3,), "bias": (3,)}, {"x": (2, 3, 30, 30), "weight": (3,),
        "bias": (3,)}, num_groups=1
    ),
    "layer_norm": _case("layer_norm", {"x": (3, 5), "weight": (5,)}, {"x": (2, 5),
    "weight": (5,)}, normalized_shape=5),
    "layer_norm of "
    "many": _case("layer_norm", {"x": (3, 5)}, {"x": (2, 5000)}, _over_all,
    option="normalized_shape", axis=1),
    "local_response_norm": _case(
        "local_response_norm", {"x": (2, 4, 2)}, {"x": (1, 2500, 1)}, _over_all, option="size",
        axis=1, alpha=1.0
    ),
    "softmax_cross_entropy": Case(
        "softmax_cross_entropy", {"logits": (4, 3)}, {"logits": (5000, 3)}, partial(_entropy,
        reduction="mean")
    ),
    "softmax_cross_entropy summed": Case(
        "softmax_cross_entropy", {"logits": (4, 3)}, {"logits": (2, 5000)}, partial(_entropy,
        reduction="sum")
    ),
    "mse_loss": _case("mse_loss", {"input": (4, 3), "target": (4, 3)}, {"input": (5000,),
    "target": (5000,)}),
    "binary_cross_entropy_with_logits": _case(
        "binary_cross_entropy_with_logits", {"input": (4, 3), "target": (4, 3)},
        {"input": (5000,), "target": (5000,)}
    ),
    **_each_axes("max_pool", _windowed, 9),
    **_each_axes("avg_pool", _windowed, 900),
    **_each_axes("adaptive_avg_pool", _pair, 2500, output_size=1),
    **_each_axes("adaptive_max_pool", _pair, 9, output_size=2),
    "avg_pool2d at edges": _case(
        "avg_pool2d", {"x": (1, 1, 4, 4)}, {"x": (1, 1, 2, 5000)}, kernel_size=(2, 2), stride=3,
        padding=1, ceil_mode=True,
        count_include_pad=False,
    ),
    "global_avg_pool": _case("global_avg_pool", _X, {"x": (2, 3, 60, 60)}),
    "global_max_pool": _case("global_max_pool", _X),
    "interpolate": _case("interpolate", {"x": (2, 2, 3, 2)}, {"x": (1, 1, 1, 2)}, size=(5000, 3)),
    "interpolate linearly": _case(
        "interpolate", {"x": (2, 2, 3, 4)}, {"x": (1, 1, 1, 3)}, size=(5000, 2), mode="bilinear"
    ),
    "pixel_shuffle": _case("pixel_shuffle", {"x": (2, 8, 3, 2)}, upscale_factor=2),
    "pixel_unshuffle": _case("pixel_unshuffle", {"x": (2, 2, 4, 6)}, downscale_factor=2),
    "stochastic_depth": _case("stochastic_depth", _X, p=0.5, seed=0),
    "pad": _case("pad", {"x": (2, 2, 3, 3)}, pad=(1, 1, 1, 1), mode="reflect"),
    "dropout": _case("dropout", _X, p=0.5, seed=0),
    **{
        f"dropout{axes}d": _case(f"dropout{axes}d", {"x": (2, 3, *(2,) * axes)}, p=0.5,
        seed=0) for axes in (1, 2, 3)
    },
    "im2col": Case("im2col", {"x": (2, 2, 3, 3)}, {"x": (2, 2, 3, 3)}, _columns),
    "take_batch": Case("take_batch", _X, _X, _taken),
    "all_finite": Case("all_finite", {"x": (3,)}, {"x": (70000,)}, lambda here,
    a: [ops.all_finite([a["x"]])]),
    "clip_by_global_norm": Case("clip_by_global_norm", {"g": (3,)}, {"g": (5000,)}, _clipped),
    "is_correct": Case(
        "is_correct", {"x": (3, 4)}, {"x": (3, 4)}, lambda here, a: [ops.is_correct(a["x"],
        here.array(np.arange(a["x"].shape[0])))]
    ),
    "sgd_update": _case("sgd_update", {"p": (3,), "g": (3,)}, run=_updated, lr=0.1),
    "momentum_update": _case("momentum_update", {"p": (3,), "g": (3,), "v": (3,)}, run=_updated,
    lr=0.1, momentum=0.9),
    "adagrad_update": _case("adagrad_update", {"p": (3,), "g": (3,), "s": (3,)}, run=_updated,
    lr=0.1, eps=1e-7),
    "rmsprop_update": _case("rmsprop_update", {"p": (3,), "g": (3,), "s": (3,)}, run=_updated,
    lr=0.1, alpha=0.9, eps=1e-8),
    "adam_update": _case(
        "adam_update", {"p": (3,), "g": (3,), "m": (3,), "v": (3,)}, run=_updated, lr=0.1,
        beta1=0.9, beta2=0.999, eps=1e-8, step=1
    ),
}  # fmt: skip
