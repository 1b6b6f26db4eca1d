"""Prepared ops do what the ops do, whatever is written into their parameters."""

import numpy as np
import pytest

from portacnn import ops
from portacnn.ops import use_kernels, workspace
from portacnn.ops.conv import conv, conv_windows
from portacnn.ops.fused import (
    conv_relu,
    linear_relu,
)
from portacnn.ops.windows import Windows
from support.checks import (
    DTYPES,
    agree,
    choices,
    normal,
    untouched,
)
from support.fused_cases import CASES
from support.matrix import Here

# --- prepared -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*CASES, "linear", "linear_relu"])
def test_a_prepared_op_does_what_the_op_does(backend: Here, name: str, dtype: str):
    """For other arrays of the same kind, with other values in the same parameters, over and
    over."""
    if name in CASES:
        op, hosts, rest = conv_relu, CASES[name].arrays(), CASES[name].arguments()
    else:
        op, hosts, rest = (
            getattr(ops, name, linear_relu),
            (normal(3, 4), normal(5, 4, seed=1), normal(5, seed=2)),
            (),
        )
    for choice in choices(backend):
        with use_kernels(choice):
            x = backend.array(hosts[0], dtype)
            weight, bias = (
                None if a is None else backend.backend.asarray(a, dtype) for a in hosts[1:]
            )
            function = op.prepare(x, weight, bias, *rest)
            for seed in range(3):
                other = backend.array(normal(*hosts[0].shape, seed=seed), dtype)
                weight[...] = backend.array(normal(*hosts[1].shape, seed=seed + 9), dtype)
                if bias is not None:
                    bias[...] = backend.array(normal(*hosts[2].shape, seed=seed + 8), dtype)
                with untouched(backend, other, weight, bias):
                    got = function(other)
                with use_kernels("reference"):
                    expected, _ = op(other, weight, bias, *rest, keep=False)
                agree(backend, got, backend.host(expected), other)


@pytest.mark.parametrize("which", ["weight", "bias", "both"])
@pytest.mark.parametrize("name", ["conv2d", "conv_relu", "linear", "linear_relu"])
def test_a_prepared_op_sees_what_is_written_to_strided_parameters(
    backend: Here, name: str, which: str
):
    """A kernel that wants them in one piece must not keep a copy of its own."""
    op = {"conv2d": conv, "conv_relu": conv_relu, "linear": ops.linear, "linear_relu": linear_relu}[
        name
    ]
    convolves = name.startswith("conv")
    x = backend.array(normal(2, 3, 6, 5) if convolves else normal(2, 3), "float32")
    wide = backend.backend.asarray(normal(4, 6, 3, 3) if convolves else normal(4, 6), "float32")
    long = backend.backend.asarray(normal(8), "float32")
    weight, bias = wide[:, ::2, ...], long[::2]
    if which == "weight":  # each by itself: the other one must not be what a kernel declines
        bias = long = backend.backend.asarray(normal(4), "float32")
    elif which == "bias":
        wide = weight = backend.backend.asarray(backend.host(weight), "float32")
    rest = (
        (conv_windows(2, x, weight, bias, stride=1, padding=0, dilation=1, groups=1), 1)
        if convolves
        else ()
    )
    rest = (*rest, None) if name == "conv_relu" else rest
    for choice in choices(backend):
        with use_kernels(choice):
            function = op.prepare(x, weight, bias, *rest)
            function(x)
            wide[...] = wide * -0.5
            long[...] = long + 1.0
            with use_kernels("reference"):
                expected, _ = op(x, weight, bias, *rest, keep=False)
            agree(backend, function(x), backend.host(expected), x)


@pytest.mark.parametrize("relu", [False, True])
def test_a_prepared_convolution_takes_little_memory(backend: Here, relu: bool):
    """All of its columns at once would be 72 MiB: then it is better not prepared."""
    x = backend.array(np.zeros((8, 64, 64, 64)), "float32")
    weight = backend.array(np.zeros((1, 64, 3, 3)), "float32")
    windows = Windows.of((64, 64), 3, padding=1)
    for choice in choices(backend):
        plan = workspace.Plan()
        with use_kernels(choice), workspace.planning(plan):
            if relu:
                conv_relu.prepare(x, weight, None, windows, 1, None)
            else:
                conv.prepare(x, weight, None, windows, 1)
        assert plan.size < 20 << 20
