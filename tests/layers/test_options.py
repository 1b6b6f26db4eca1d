"""Options: what a layer's constructor was told, its op is told, in training and out of it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from portacnn import layers as L
from portacnn import ops
from portacnn.errors import PortacnnError
from support.checks import distinct, normal

X = {1: distinct(3, 4, 10), 2: distinct(3, 4, 7, 8), 3: distinct(2, 4, 5, 6, 5)}
CONV = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}
BACK = {"stride": 3, "padding": 1, "output_padding": 1, "dilation": 2, "groups": 2}
MAX = {"stride": 2, "padding": 1, "dilation": 2, "ceil_mode": True}
MEAN = {
    "stride": 2,
    "padding": 1,
    "ceil_mode": True,
    "count_include_pad": False,
    "divisor_override": 5,
    "dilation": 2,
}


def _cases() -> dict[str, tuple[Callable[[], Any], str, int, dict[str, Any]]]:
    """By a name: the layer, its op, the spatial axes of the input, and the op's options. The
    layer's own parameters go to the op by their names."""
    cases: dict[str, Any] = {}
    for n in (1, 2, 3):
        for name, value in CONV.items():
            conv = getattr(L, f"Conv{n}d")
            given = {"groups": 2, name: value}
            cases[f"Conv{n}d {name}"] = (
                (lambda c=conv, g=given: c(4, 6, 2, **g)),
                f"conv{n}d",
                n,
                given,
            )
        for name, value in BACK.items():
            back = getattr(L, f"ConvTranspose{n}d")
            given = {"stride": 2, "groups": 2, name: value}
            cases[f"ConvTranspose{n}d {name}"] = (
                (lambda c=back, g=given: c(4, 6, 2, **g)),
                f"conv_transpose{n}d",
                n,
                given,
            )
        for name, value in MAX.items():
            pool = getattr(L, f"MaxPool{n}d")
            given = {"kernel_size": 3, "stride": 2, name: value}
            cases[f"MaxPool{n}d {name}"] = (
                (lambda c=pool, g=given: c(**g)),
                f"max_pool{n}d",
                n,
                given,
            )
        for name, value in MEAN.items():
            mean = getattr(L, f"AvgPool{n}d")
            given = {"kernel_size": 3, "stride": 2, "padding": 1, name: value}
            cases[f"AvgPool{n}d {name}"] = (
                (lambda c=mean, g=given: c(**g)),
                f"avg_pool{n}d",
                n,
                given,
            )
    eps = {"eps": 0.5}
    cases |= {
        "LayerNorm eps": (
            lambda: L.LayerNorm(8, **eps),
            "layer_norm",
            2,
            {"normalized_shape": 8, **eps},
        ),
        "GroupNorm eps": (
            lambda: L.GroupNorm(2, 4, **eps),
            "group_norm",
            2,
            {"num_groups": 2, **eps},
        ),
        "InstanceNorm2d eps": (lambda: L.InstanceNorm2d(4, **eps), "instance_norm", 2, eps),
    }
    for name, value in {"alpha": 0.3, "beta": 0.5, "k": 2.0}.items():
        cases[f"LocalResponseNorm {name}"] = (
            (lambda g={name: value}: L.LocalResponseNorm(3, **g)),
            "local_response_norm", 2, {"size": 3, name: value},
        )  # fmt: skip
    for kind, op, name, value in (
        (L.LeakyReLU, "leaky_relu", "negative_slope", 0.3),
        (L.ELU, "elu", "alpha", 0.3),
        (L.GELU, "gelu", "approximate", "tanh"),
        (L.Softplus, "softplus", "beta", 3.0),
        (L.Softplus, "softplus", "threshold", -0.1),
        (L.HardSigmoid, "hard_sigmoid", "alpha", 0.1),
        (L.HardSigmoid, "hard_sigmoid", "beta", 0.1),
        (L.Clip, "clip", "min", -0.2),
        (L.Clip, "clip", "max", 0.2),
    ):
        cases[f"{kind.__name__} {name}"] = (
            (lambda k=kind, g={name: value}: k(**g)),
            op,
            2,
            {name: value},
        )
    return cases


CASES = _cases()


@pytest.mark.parametrize("name", CASES)
def test_options_reach_the_op(name: str):
    """The op's result with the option, which is another than without it."""
    make, op, axes, options = CASES[name]
    x = X[axes]
    layer = make().build(x.shape[1:], device="numpy", dtype="float64", seed=0)
    for array in layer.params.values():
        array[...] = normal(*array.shape, seed=3)
    expected, cache = getattr(ops, op)(x, **layer.params, **options)
    y, kept = layer.forward(x, train=True)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(layer.forward(x)[0], expected)
    assert y.shape[1:] == layer.output_shape
    dy = normal(*y.shape, seed=1)
    dx = getattr(ops, f"{op}_backward")(dy, cache)
    np.testing.assert_array_equal(layer.backward(dy, kept), dx[0] if isinstance(dx, tuple) else dx)
    others = {key: value for key, value in options.items() if key != name.split()[1]}
    try:
        plain, _ = getattr(ops, op)(x, **layer.params, **others)
    except (PortacnnError, TypeError):  # a weight of groups, an argument without a default
        return
    assert not np.array_equal(plain, y), "the option makes no difference here"
