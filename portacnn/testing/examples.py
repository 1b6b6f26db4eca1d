"""One table of examples for every op: public ones, and those that only kernels see.

``EXAMPLES[name].draw(random)`` returns random arguments. ``EXAMPLES[name].sized("small", values)``
returns arguments of fixed sizes, for tests that choose the values. In the "long" sizes every sum
has two thousand summands or more (where there are sums): float16 counts up to 2048, bfloat16 to
256.

This table feeds the tests that run every op on every backend, the comparison of kernels, the tests
of CUDA kernels on an emulator, and the check on a GPU (``scripts/gpu_check.py``). A new op needs
one row here.

Notation: N batch, C in-channels, O out-channels, S the spatial axes.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

import numpy as np

from portacnn import ops
from portacnn.ops.dispatch import OPS
from portacnn.testing import draws
from portacnn.testing.draws import STATE, Arguments, Draw, with_options
from portacnn.testing.random import Random

Shape = tuple[int, ...]
Shapes = dict[str, Shape | list[Shape]]
"""Of the arrays of floats by name; a list of shapes is a list of arrays."""
Form = Literal["small", "long"]


@dataclass(frozen=True)
class Example:
    """How an op is called.

    Args:
        op: a public name of ``portacnn.ops``, or one that kernels are found by (``OPS``).
        draw: random arguments by name, in the op's order.
        small, long: shapes of fixed sizes; none for an op that is not public.
        options: the other arguments for fixed sizes, or a function of the shapes.
        differentiable: the arguments that the backward gives a gradient of, in its order.
        integers: the first argument may hold integers.
        float32: how far a float32 result may be off, relative to its largest value.
    """

    op: str
    draw: Draw
    small: Shapes = field(default_factory=dict)
    long: Shapes = field(default_factory=dict)
    options: Mapping[str, Any] | Callable[[Any], Arguments] = field(default_factory=dict)
    differentiable: tuple[str, ...] = ()
    integers: bool = False
    float32: float = 1e-5

    @property
    def public(self) -> bool:
        return self.op in ops.__all__

    @property
    def forward(self) -> Callable[..., Any]:
        return getattr(ops, self.op) if self.public else OPS[self.op]

    @property
    def backward(self) -> Callable[..., Any] | None:
        """The function of a gradient and a cache; None for an op without one."""
        if not self.differentiable:
            return None
        if self.public:
            return getattr(ops, f"{self.op}_backward")
        op: Any = OPS[self.op]
        return getattr(import_module(op.__module__), op.portable_backward.__name__)

    @property
    def writes(self) -> tuple[str, ...]:
        """The arguments that the op writes into."""
        return OPS[self.op].writes if self.op in OPS else ()

    def sized(self, form: Form, values: Callable[[str, Shape], Any]) -> Arguments:
        """Arguments of a fixed size. values: makes an array of floats by its name and shape."""
        return self.of_shapes(self.small if form == "small" else self.long, values)

    def of_shapes(self, shapes: Shapes, values: Callable[[str, Shape], Any]) -> Arguments:
        arrays = {
            name: [values(name, one) for one in shape]
            if isinstance(shape, list)
            else values(name, shape)
            for name, shape in shapes.items()
        }
        options = self.options(shapes) if callable(self.options) else self.options
        return {**arrays, **options}

    def results(
        self, arguments: Arguments, gradient: Callable[[Any], Any] = lambda y: y
    ) -> list[Any]:
        """Call the op: its output, the gradients, and what it wrote into.

        Args:
            arguments: by name, on one backend.
            gradient: of the output; a function of it.
        """
        gradients = None
        if (backward := self.backward) is None:
            result = call(self.forward, arguments)
        else:
            result, cache = call(self.forward, {**arguments, "keep": True})
            gradients = backward(gradient(result), cache)
        written = [arguments.get(name) for name in self.writes]
        return list(arrays_of([result, gradients, written]))


def call(function: Callable[..., Any], arguments: Arguments) -> Any:
    """The first argument by its place, the others by name."""
    first, *_ = arguments
    return function(arguments[first], **{n: a for n, a in arguments.items() if n != first})


def arrays_of(value: Any) -> Iterator[Any]:
    """All arrays in lists and tuples, of any library, in order."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from arrays_of(item)
    elif hasattr(value, "dtype"):
        yield value


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with its NumPy arrays changed, those in dictionaries, lists and tuples too."""
    if isinstance(value, dict):
        return {name: mapped(item, change) for name, item in value.items()}
    if isinstance(value, list | tuple):
        items = [mapped(item, change) for item in value]
        return getattr(type(value), "_make", type(value))(items)  # named tuples have it
    return change(value) if isinstance(value, np.ndarray) else value


def as_given(arguments: Arguments, change: Callable[[Any], Any]) -> Arguments:
    """``arguments`` with the arrays of floats changed that come in the dtype under test, and with
    copies of the others."""

    def floats(array: Any) -> Any:
        return change(array) if array.dtype.kind == "f" else array.copy()

    return {
        name: value if name in STATE else mapped(value, floats) for name, value in arguments.items()
    }


def examples_of(op: str) -> dict[str, Example]:
    """The examples of an op, by name."""
    return {name: example for name, example in EXAMPLES.items() if example.op == op}


# --- how the rows are made ------------------------------------------------------------------------


def _of(op: str, draw: Draw, small: Shapes, long: Shapes | None = None, **more: Any) -> Example:
    return Example(op, draw, small, long or small, **more)


def _x(op: str, draw: Draw, small: Shapes, long: Shapes | None = None, **options: Any) -> Example:
    return _of(op, draw, small, long, options=options, differentiable=("x",))


def _inner(op: str, draw: Draw, *differentiable: str) -> Example:
    return Example(op, draw, differentiable=differentiable)


def _each(name: str, make: Callable[[int], Example]) -> dict[str, Example]:
    return {f"{name}{axes}d": make(axes) for axes in (1, 2, 3)}


def _update(op: str, draw: Draw, *states: str, **options: Any) -> Example:
    shapes: Shapes = {name: [(3,)] for name in ("params", "grads", *states)}
    return _of(op, draw, shapes, options={"lr": 0.1, **options})


def _two_windows(shapes: Any) -> Arguments:
    """Pooling: a kernel one shorter than each axis, so that there are two windows on each, which
    overlap."""
    return {"kernel_size": tuple(n - 1 for n in shapes["x"][2:]), "stride": 1}


def _enlarged(width: int, **options: Any) -> Callable[[Any], Arguments]:
    """Interpolation to 5 rows; of a single row to 5000, so that its gradient is a long sum."""

    def of(shapes: Any) -> Arguments:
        return {"size": (5000 if shapes["x"][2] == 1 else 5, width), **options}

    return of


def _reversed(shapes: Any) -> Arguments:
    return {"indices": np.arange(shapes["images"][0])[::-1].copy()}


def _labels(name: str, **options: Any) -> Callable[[Any], Arguments]:
    def of(shapes: Any) -> Arguments:
        n, classes = shapes["logits"]
        return {name: np.arange(n) % classes, **options}

    return of


def _classes(shape: Shape) -> Any:
    """Class indices (N, *S) for outputs (N, C, *S)."""
    n, classes, *size = shape
    return np.arange(n * int(np.prod(size))).reshape(n, *size) % classes


_X: Shapes = {"x": (4, 3, 2, 3)}
_AFFINE: Shapes = {"weight": (3,), "bias": (3,)}
_RUNNING: Shapes = {"running_mean": (3,), "running_var": (3,), **_AFFINE}
_ALL = ("x", "weight", "bias")

# --- the table ------------------------------------------------------------------------------------

_ELEMENTWISE: dict[str, Example] = {
    **{
        name: _x(name, draws.elementwise, _X)
        for name in (
            *("clip", "elu", "gelu", "hard_sigmoid", "hard_swish", "leaky_relu", "scaled_elu"),
            *("sigmoid", "silu", "softplus", "tanh"),
        )
    },
    "relu": _x("relu", draws.relu, _X),
    "gelu of tanh": _x(
        "gelu", with_options(draws.elementwise, approximate="tanh"), _X, approximate="tanh"
    ),
    "clip to bounds": _x(
        "clip", with_options(draws.elementwise, min=-0.5, max=0.5), _X, min=-0.5, max=0.5
    ),
    **{
        f"elementwise {kind}": _x(
            "elementwise",
            with_options(
                draws.positive if kind in ("log", "reciprocal", "sqrt") else draws.elementwise,
                function=kind,
            ),
            _X,
            function=kind,
        )
        for kind in (
            *("abs", "cos", "erf", "exp", "floor", "log", "mish", "negative", "nonzero"),
            *("reciprocal", "sin", "softsign", "sqrt"),
        )
    },
    **{
        f"arithmetic {kind}": _of(
            "arithmetic",
            draws.arithmetic(kind),
            {"a": (4, 3), "b": (3,)},
            {"a": (2500, 3), "b": (3,)},
            options={"kind": kind},
            differentiable=("a", "b"),
        )
        for kind in (
            *("add", "subtract", "multiply", "divide", "power", "maximum", "minimum", "fmod"),
            "greater",
        )
    },
    "select": _of(
        "select",
        draws.select,
        {"condition": (4, 1), "a": (4, 3), "b": (3,)},
        {"condition": (2500, 1), "a": (2500, 3), "b": (3,)},
        differentiable=("a", "b"),
    ),
    **{
        f"reduce {kind}": _x(
            "reduce", draws.reduce(kind), {"x": (2, 5)}, {"x": (2, 2500)}, kind=kind, axes=[1]
        )
        for kind in ("sum", "max", "l2", "log_sum_exp")
    },
    "prelu": _of(
        "prelu",
        draws.prelu,
        {"x": (4, 3), "slope": (3,)},
        {"x": (5000, 3), "slope": (3,)},
        differentiable=("x", "slope"),
    ),
    "erf": _of("erf", draws.erf, _X),
    **{
        name: _x(name, draws.along(), {"x": (3, 5)}, {"x": (2, 5000)}, dim=1)
        for name in ("softmax", "log_softmax")
    },
    "pad": _x("pad", draws.pad, {"x": (2, 2, 3, 3)}, pad=(1, 1, 1, 1), mode="reflect"),
    "pad_axes": _inner("pad_axes", draws.pad_axes, "x"),
    "add": _inner("add", draws.parts),
    "add_relu": _inner("add_relu", draws.parts, "parts"),
}

_PRODUCTS: dict[str, Example] = {
    **_each(
        "conv",
        lambda axes: _of(
            f"conv{axes}d",
            draws.public_conv(axes),
            {"x": (2, 2, *(3,) * axes), "weight": (3, 2, *(2,) * axes), "bias": (3,)},
            {"x": (2, 90, *(5,) * axes), "weight": (2, 90, *(5,) * axes), "bias": (2,)},
            differentiable=_ALL,
        ),
    ),
    "conv2d of many": _of(
        "conv2d",
        draws.public_conv(2),
        {"x": (2, 1, 3, 3), "weight": (2, 1, 1, 1)},
        {"x": (40, 1, 9, 9), "weight": (2, 1, 1, 1)},
        differentiable=_ALL,
    ),
    **_each(
        "conv_transpose",
        lambda axes: _of(
            f"conv_transpose{axes}d",
            draws.public_conv_transpose(axes),
            {"x": (2, 2, *(3,) * axes), "weight": (2, 3, *(2,) * axes), "bias": (3,)},
            {"x": (2, 2300, *(1,) * axes), "weight": (2300, 2, *(1,) * axes), "bias": (2,)},
            differentiable=_ALL,
        ),
    ),
    "conv": _inner("conv", draws.convolution(), *_ALL),
    "conv of few channels in a group": _inner("conv", draws.convolution(grouped=True), *_ALL),
    "conv_relu": _inner("conv_relu", draws.conv_relu, *_ALL),
    "conv_unit": _inner("conv_unit", draws.conv_unit()),
    "conv_unit of few channels in a group": _inner("conv_unit", draws.conv_unit(grouped=True)),
    "conv_transpose": _inner("conv_transpose", draws.conv_transpose(), *_ALL),
    "gather": _inner("gather", draws.gather),
    "scatter": _inner("scatter", draws.scatter),
    "im2col": _of(
        "im2col",
        draws.im2col,
        {"input_data": (2, 2, 3, 3)},
        options={"filter_h": 2, "filter_w": 2},
        integers=True,
    ),
    "col2im": _of(
        "col2im",
        draws.col2im,
        {"col": (8, 8)},
        options={"input_shape": (2, 2, 3, 3), "filter_h": 2, "filter_w": 2},
        integers=True,
    ),
    "unfold": _of(
        "unfold", draws.unfold, {"x": (2, 2, 3, 3)}, options={"kernel_size": 2}, integers=True
    ),
    "fold": _of(
        "fold",
        draws.fold,
        {"columns": (2, 8, 4)},
        options={"output_size": (3, 3), "kernel_size": 2},
        integers=True,
    ),
    "linear": _of(
        "linear",
        draws.linear(),
        {"x": (3, 4), "weight": (2, 4), "bias": (2,)},
        {"x": (200, 2300), "weight": (2, 2300), "bias": (2,)},
        differentiable=_ALL,
    ),
    "linear_relu": _inner("linear_relu", draws.linear(exact=True), *_ALL),
}

_NORMS: dict[str, Example] = {
    "batch_norm": _of(
        "batch_norm",
        draws.batch_norm(training=True),
        {**_X, **_RUNNING},
        {"x": (400, 3, 2, 3), **_RUNNING},
        options={"training": True},
        differentiable=_ALL,
    ),
    "batch_norm at rest": _of(
        "batch_norm",
        draws.batch_norm(training=False),
        {**_X, **_RUNNING},
        {"x": (400, 3, 2, 3), **_RUNNING},
        differentiable=_ALL,
    ),
    "batch_norm_relu": _inner("batch_norm_relu", draws.batch_norm_relu, *_ALL),
    "instance_norm": _of(
        "instance_norm",
        draws.instance_norm,
        {**_X, **_RUNNING},
        {"x": (2, 3, 50, 50), **_RUNNING},
        differentiable=_ALL,
    ),
    "group_norm": _of(
        "group_norm",
        draws.group_norm,
        {**_X, **_AFFINE},
        {"x": (2, 3, 30, 30), **_AFFINE},
        options={"num_groups": 1},
        differentiable=_ALL,
    ),
    "layer_norm": _of(
        "layer_norm",
        draws.layer_norm,
        {"x": (3, 5), "weight": (5,)},
        {"x": (2, 5), "weight": (5,)},
        options={"normalized_shape": 5},
        differentiable=_ALL,
    ),
    "layer_norm of many": _of(
        "layer_norm",
        draws.layer_norm,
        {"x": (3, 5)},
        {"x": (2, 5000)},
        options=lambda shapes: {"normalized_shape": shapes["x"][-1]},
        differentiable=_ALL,
    ),
    "local_response_norm": _of(
        "local_response_norm",
        draws.response_norm,
        {"x": (2, 4, 2)},
        {"x": (1, 2500, 1)},
        options=lambda shapes: {"size": shapes["x"][1], "alpha": 1.0},
        differentiable=("x",),
    ),
}

_LOSSES: dict[str, Example] = {
    "softmax_cross_entropy": _of(
        "softmax_cross_entropy",
        draws.softmax_cross_entropy,
        {"logits": (4, 3)},
        {"logits": (5000, 3)},
        options=_labels("target", reduction="mean", label_smoothing=0.1),
        differentiable=("logits",),
    ),
    "softmax_cross_entropy of labels": _of(
        "softmax_cross_entropy",
        draws.cross_entropy_of_labels,
        {"logits": (4, 3)},
        {"logits": (2, 5000)},
        options=_labels("target", reduction="sum", label_smoothing=0.1),
        differentiable=("logits",),
    ),
    **{
        name: _of(
            name,
            draws.of_two,
            {"input": (4, 3), "target": (4, 3)},
            {"input": (5000,), "target": (5000,)},
            differentiable=("input",),
        )
        for name in ("mse_loss", "binary_cross_entropy_with_logits")
    },
    **{
        name: _of(
            name,
            draws.apart if name != "sigmoid_focal_loss" else draws.of_two,
            {"input": (4, 3), "target": (4, 3), "weight": (4, 1)},
            {"input": (5000,), "target": (5000,), "weight": (5000,)},
            differentiable=("input",),
        )
        for name in ("l1_loss", "huber_loss", "sigmoid_focal_loss")
    },
    "focal_loss": _of(
        "focal_loss",
        draws.focal_loss,
        {"logits": (4, 3)},
        {"logits": (2, 5000)},
        options=_labels("target", reduction="sum"),
        differentiable=("logits",),
    ),
    "dice_loss": _of(
        "dice_loss",
        draws.dice_loss,
        {"probabilities": (2, 3, 2, 3), "weight": (2,)},
        {"probabilities": (1, 3, 9, 900), "weight": (1,)},
        options=lambda shapes: {"target": _classes(shapes["probabilities"]), "ignore_index": 0},
        differentiable=("probabilities",),
    ),
    "nt_xent_loss": _of(
        "nt_xent_loss",
        draws.nt_xent_loss,
        {"embeddings": (6, 3)},
        {"embeddings": (4, 5000)},
        options=lambda shapes: {
            "labels": np.arange(shapes["embeddings"][0]) // 2,
            "temperature": 0.5,
        },
        differentiable=("embeddings",),
    ),
    "triplet_loss": _of(
        "triplet_loss",
        draws.triplet_loss,
        {"embeddings": (6, 3)},
        {"embeddings": (4, 5000)},
        options=lambda shapes: {"labels": np.arange(shapes["embeddings"][0]) // 2},
        differentiable=("embeddings",),
    ),
    "is_correct": _of(
        "is_correct",
        draws.is_correct,
        {"logits": (3, 4)},
        options=_labels("labels"),
        integers=True,
    ),
}

_POOLS: dict[str, Example] = {
    **{
        f"{name}{axes}d": _of(
            f"{name}{axes}d",
            draws.public_pool(axes, name == "avg_pool"),
            {"x": (2, 2, *(3,) * axes)},
            {"x": (1, 2, *(3,) * (axes - 1), 900 if name == "avg_pool" else 9)},
            options=_two_windows,
            differentiable=("x",),
        )
        for name in ("max_pool", "avg_pool")
        for axes in (1, 2, 3)
    },
    **{
        f"{name}{axes}d": _x(
            f"{name}{axes}d",
            draws.adaptive(axes, name == "adaptive_avg_pool"),
            {"x": (2, 2, *(3,) * axes)},
            {"x": (1, 2, *(3,) * (axes - 1), 2500 if output == 1 else 9)},
            output_size=output,
        )
        for name, output in (("adaptive_avg_pool", 1), ("adaptive_max_pool", 2))
        for axes in (1, 2, 3)
    },
    "avg_pool2d at edges": _x(
        "avg_pool2d",
        draws.public_pool(2, average=True),
        {"x": (1, 1, 4, 4)},
        {"x": (1, 1, 2, 5000)},
        kernel_size=(2, 2),
        stride=3,
        padding=1,
        ceil_mode=True,
        count_include_pad=False,
    ),
    "global_avg_pool": _x("global_avg_pool", draws.images, _X, {"x": (2, 3, 60, 60)}),
    "global_max_pool": _x("global_max_pool", draws.equal_images, _X),
    "max_pool": _inner("max_pool", draws.max_pool, "x"),
    "avg_pool": _inner("avg_pool", draws.avg_pool, "x"),
    "adaptive_avg_pool": _inner("adaptive_avg_pool", draws.adaptive_op(average=True), "x"),
    "adaptive_max_pool": _inner("adaptive_max_pool", draws.adaptive_op(average=False), "x"),
}

_BATCHES: dict[str, Example] = {
    "interpolate": _of(
        "interpolate",
        draws.interpolate,
        {"x": (2, 2, 3, 2)},
        {"x": (1, 1, 1, 2)},
        options=_enlarged(3),
        differentiable=("x",),
    ),
    "interpolate of lines": _of(
        "interpolate",
        draws.interpolate,
        {"x": (2, 2, 3, 4)},
        {"x": (1, 1, 1, 3)},
        options=_enlarged(2, mode="bilinear"),
        differentiable=("x",),
    ),
    "resize": _inner("resize", draws.resize, "x"),
    "pixel_shuffle": _x(
        "pixel_shuffle", draws.pixel_shuffle, {"x": (2, 8, 3, 2)}, upscale_factor=2
    ),
    "pixel_unshuffle": _x(
        "pixel_unshuffle", draws.pixel_unshuffle, {"x": (2, 2, 4, 6)}, downscale_factor=2
    ),
    "stochastic_depth": _x("stochastic_depth", draws.dropout(0, 3), _X, p=0.5, seed=0),
    "dropout": _x("dropout", draws.dropout(0, 3), _X, p=0.5, seed=0),
    **_each(
        "dropout",
        lambda axes: _x(
            f"dropout{axes}d",
            draws.dropout(axes, axes),
            {"x": (2, 3, *(2,) * axes)},
            p=0.5,
            seed=0,
        ),
    ),
    "drop": _inner("drop", draws.drop, "x"),
    "kept": _inner("kept", draws.kept),
    "take_batch": _of(
        "take_batch",
        draws.take_batch,
        {"images": _X["x"]},
        options=_reversed,
        integers=True,
    ),
}

_UPDATES: dict[str, Example] = {
    "all_finite": _of(
        "all_finite", draws.all_finite, {"arrays": [(3,)]}, {"arrays": [(70000,)]}, integers=True
    ),
    "clip_by_global_norm": _of(
        "clip_by_global_norm",
        draws.clip_by_global_norm,
        {"grads": [(3,)]},
        {"grads": [(5000,)]},
        options={"max_norm": 1.0},
    ),
    "sgd_update": _update("sgd_update", draws.update()),
    "momentum_update": _update(
        "momentum_update",
        draws.update(
            "velocity",
            momentum=(0.0, 0.9),
            dampening=(0.0, 0.5),
            nesterov=(True, False),
            first=(True, False),
        ),
        "velocity",
        momentum=0.9,
    ),
    "adagrad_update": _update(
        "adagrad_update", draws.update("square_sum", eps=1e-7), "square_sum", eps=1e-7
    ),
    "rmsprop_update": _update(
        "rmsprop_update", draws.rmsprop_update, "mean_square", alpha=0.9, eps=1e-8
    ),
    "adam_update": _update(
        "adam_update",
        draws.update(
            "mean",
            "mean_square",
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            step=(1, 2, 9, 1000, 2**33),
            decoupled=(True, False),
        ),
        "mean",
        "mean_square",
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        step=1,
    ),
}

EXAMPLES: dict[str, Example] = {
    **_ELEMENTWISE,
    **_PRODUCTS,
    **_NORMS,
    **_LOSSES,
    **_POOLS,
    **_BATCHES,
    **_UPDATES,
}
"""Every op, by name; of an op with several rows one has the op's own name. (The public
``conv2d`` and what kernels see of it, ``conv``, each have their rows.)"""

__all__ = ["EXAMPLES", "STATE", "Arguments", "Example", "Random", "arrays_of", "as_given", "call"]
__all__ += ["examples_of", "mapped"]
