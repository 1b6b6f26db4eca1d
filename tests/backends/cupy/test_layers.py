"""Every layer in a captured step, on the stand-in for CuPy: nothing is sent or fetched, and a
replay is the step to the bit.

The stand-in sends what CuPy sends unasked (tables of addresses, lists), and refuses it in a
capture, where CuPy would record a copy from pinned memory and an event that is never done.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from portacnn import layers as L
from portacnn import ops, resolve
from portacnn.layers import Layer, Sequential, at_step
from portacnn.models.lenet5 import ScaledTanh, TableConv2d
from portacnn.models.resnet import PadChannels
from portacnn.ops import use_kernels
from portacnn.optim import make_optimizer
from support import fake_cupy
from support.cuda_rig import needs_compiler
from support.fake_cupy import log

pytestmark = needs_compiler


@pytest.fixture(autouse=True)
def cp():
    with fake_cupy.installed() as cupy:
        yield cupy


def nine(make: Callable[[], Layer]) -> list[Layer]:
    """One more than CuPy joins without a table of their addresses."""
    return [make() for _ in range(9)]


def several(join: Callable[[], Layer], count: int = 2) -> Callable[[], Layer]:
    """A network in which ``join`` takes as many values, of different shapes along the channels."""
    names = [f"a{i}" for i in range(count)]
    return lambda: L.Graph(
        *((name, L.Tanh(), ["input"]) for name in names), ("join", join(), names)
    )


ONE: list[tuple[Callable[[], Layer], tuple[int, ...]]] = [
    (lambda: L.Conv1d(2, 3, 3), (2, 7)),
    (lambda: L.Conv2d(2, 3, 3, padding=1), (2, 5, 6)),
    (lambda: L.ConvTranspose1d(2, 3, 3), (2, 5)),
    (lambda: L.ConvTranspose2d(2, 3, 2, 2), (2, 3, 4)),
    (lambda: L.Linear(6, 4), (6,)),
    (lambda: L.Flatten(), (2, 3)),
    (lambda: L.MaxPool1d(2), (2, 6)),
    (lambda: L.MaxPool2d(2), (2, 4, 6)),
    (lambda: L.MaxPool3d(2), (1, 4, 4, 4)),
    (lambda: L.AvgPool1d(2), (2, 6)),
    (lambda: L.AvgPool2d(3, 1, 1), (2, 4, 6)),
    (lambda: L.AvgPool3d(2), (1, 4, 4, 4)),
    (lambda: L.AdaptiveAvgPool1d(9), (2, 12)),
    (lambda: L.AdaptiveAvgPool2d((9, 10)), (2, 11, 30)),
    (lambda: L.AdaptiveAvgPool3d((1, 2, 9)), (1, 2, 4, 10)),
    (lambda: L.AdaptiveMaxPool1d(9), (2, 12)),
    (lambda: L.AdaptiveMaxPool2d((9, 10)), (2, 11, 30)),
    (lambda: L.AdaptiveMaxPool3d((1, 2, 9)), (1, 2, 4, 10)),
    (lambda: L.GlobalAvgPool(), (2, 3, 4)),
    (lambda: L.Upsample(None, 2, "bilinear"), (2, 3, 4)),
    (lambda: L.Upsample((5, 3)), (2, 3, 4)),
    (lambda: L.PixelShuffle(2), (8, 3, 4)),
    (lambda: L.PixelUnshuffle(2), (2, 4, 6)),
    (lambda: L.Crop([(1, 0), (0, 2)]), (2, 3, 4)),
    (lambda: L.CenterCrop((2, 2)), (2, 3, 4)),
    (lambda: L.StochasticDepth(0.5), (2, 3, 4)),
    (lambda: L.SqueezeExcitation(4, 2), (4, 3, 2)),
    (lambda: L.GlobalMaxPool(flatten=True), (2, 3, 4)),
    (lambda: L.BatchNorm1d(4), (4,)),
    (lambda: L.BatchNorm2d(3), (3, 4, 5)),
    (lambda: L.BatchNorm3d(3), (3, 2, 4, 5)),
    (lambda: L.InstanceNorm1d(3, affine=True), (3, 9)),
    (lambda: L.InstanceNorm2d(3, track_running_stats=True), (3, 4, 5)),
    (lambda: L.InstanceNorm3d(3), (3, 2, 4, 5)),
    (lambda: L.GroupNorm(2, 4), (4, 3, 5)),
    (lambda: L.LayerNorm((4, 5)), (3, 4, 5)),
    (lambda: L.LocalResponseNorm(5, alpha=0.5), (7, 3, 4)),
    (lambda: L.LocalResponseNorm(5, alpha=0.5, beta=0.6), (7, 3, 4)),
    (lambda: L.ReLU(), (2, 3, 4)),
    (lambda: L.LeakyReLU(), (2, 3, 4)),
    (lambda: L.ELU(), (2, 3, 4)),
    (lambda: L.Sigmoid(), (6,)),
    (lambda: L.Tanh(), (6,)),
    (lambda: L.SiLU(), (6,)),
    (lambda: L.GELU(), (6,)),
    (lambda: L.GELU("tanh"), (6,)),
    (lambda: L.Softplus(), (6,)),
    (lambda: L.SELU(), (6,)),
    (lambda: L.CELU(0.6), (6,)),
    (lambda: L.HardSigmoid(), (6,)),
    (lambda: L.HardSwish(), (6,)),
    (lambda: L.Clip(-0.5, 0.5), (6,)),
    (lambda: L.PReLU((2, 1, 1)), (2, 3, 4)),
    *(
        (lambda function=function: L.Elementwise(function), (2, 3))
        for function in (
            "abs",
            "cos",
            "erf",
            "exp",
            "mish",
            "negative",
            "reciprocal",
            "sin",
            "softsign",
            "log",
            "sqrt",
        )
    ),
    (lambda: L.Softmax(1), (4, 3)),
    (lambda: L.LogSoftmax(1), (5,)),
    (lambda: L.Dropout(), (2, 3)),
    (lambda: L.Dropout1d(), (2, 3)),
    (lambda: L.Dropout2d(), (2, 3, 4)),
    (lambda: L.Dropout3d(), (2, 3, 4, 2)),
    (lambda: L.Recompute(Sequential(L.BatchNorm2d(2), L.ReLU(), L.Dropout())), (2, 3, 4)),
    (lambda: L.Reshape((4, 6)), (2, 3, 4)),
    (lambda: L.Permute((0, 3, 1, 2)), (2, 3, 4)),
    *(
        (lambda mode=mode: L.Pad(((0, 0), (2, 1), (0, 3)), mode), (2, 3, 4))
        for mode in ("zeros", "reflect", "replicate", "circular")
    ),
    (lambda: L.Slice((0, 1, 0), (2, 3, 4), (1, 1, 2)), (2, 3, 4)),
    (lambda: L.Take([2, 0, 0], 3), (2, 3, 4)),
    (lambda: L.Reduce("mean", (1, 3)), (2, 3, 4)),
    *(
        (lambda kind=kind: L.ArithmeticWith(kind, (2, 1, 1)), (2, 3, 4))
        for kind in ("add", "subtract", "multiply", "divide", "maximum", "minimum", "power")
    ),
    *(
        (several(lambda kind=kind: L.Arithmetic(kind)), (2, 3))
        for kind in ("add", "subtract", "multiply", "divide", "maximum", "minimum", "power")
    ),
    (several(L.Concat, 9), (2, 3, 4)),
    (several(lambda: L.Concat(2), 9), (2, 3, 4)),
    (lambda: L.Branches(*nine(lambda: L.Conv2d(2, 3, 1)), L.Conv2d(2, 1, 1)), (2, 3, 4)),
    (lambda: L.Branches(*nine(L.Tanh), join="add"), (2, 3, 4)),
    (lambda: L.Residual(L.Conv2d(3, 3, 3, padding=1), activation=L.ReLU()), (3, 4, 5)),
    (
        lambda: Sequential(
            L.Conv2d(2, 4, 3),
            L.BatchNorm2d(4),
            L.ReLU(),
            L.MaxPool2d(2),
            L.Flatten(),
            L.Linear(None, 3),
        ),
        (2, 6, 6),
    ),
    (several(L.Where, 3), (2, 3)),
    (lambda: L.Constant((2, 3)), (4,)),
    (lambda: L.Expand((2, 3, 4)), (2, 1, 4)),
    (lambda: Sequential(L.MergeIntoBatch(2), L.Tanh(), L.SplitFromBatch(2)), (2, 3, 4)),
    (lambda: L.Quantize("int8"), (2, 3)),
    (lambda: L.Dequantize("int8"), (2, 3)),
    (lambda: ScaledTanh(), (2, 3)),
    (lambda: TableConv2d([[0], [0, 2], [1, 2, 3]], (3, 2)), (4, 5, 4)),
    (lambda: PadChannels(5), (2, 3, 4)),
]
PRODUCTS: list[tuple[Callable[[], Layer], tuple[int, ...]]] = [
    (lambda: L.Conv3d(1, 2, 2), (1, 3, 3, 3)),
    (lambda: L.ConvTranspose3d(1, 2, 2), (1, 2, 2, 2)),
    (lambda: L.MatMulWith(5), (2, 3, 4)),
    (several(L.MatMul), (3, 3)),
]
"""Layers whose products are cuBLAS's, which CuPy refuses to record."""


@dataclass(frozen=True)
class State:
    lr: Any


def named(case: Any) -> str | None:
    return repr(case()) if callable(case) else None


def stepper(layer: Layer) -> Callable[..., Any]:
    """A forward pass, a backward pass with the output as its gradient, and an update."""

    def step(x: Any, state: State) -> Any:
        y, cache = layer.forward(x, train=True)
        dx = layer.backward(y, cache)
        params, grads = layer.named_parameters(), layer.named_gradients()
        if params:
            ops.clip_by_global_norm(list(grads.values()), 1.0)
            ops.sgd_update(list(params.values()), list(grads.values()), lr=state.lr)
        return y, dx

    return step


def carried(events: list[Any]) -> list[Any]:
    return [event for event in events if event.kind in ("h2d", "d2h", "sync")]


def outcome(
    layer: Layer, home: Any, shape: tuple[int, ...], compiled: bool
) -> tuple[list[bytes], Any, list[Any]]:
    """Six steps: what each gave, the compiled step, and what was carried or waited for from the
    third on."""
    layer.build(shape, device=home, seed=0)
    step = stepper(layer)
    run = home.compile_step(step, ()) if compiled else step
    given, seen = [], []
    for number in range(6):
        x = home.asarray(np.random.default_rng(number).random((3, *shape)) + 0.1, "float32")
        with home.active(), at_step(0), log.watch() as events:
            result = run(x, State(0.1))
        seen += carried(events) if number >= 2 else []
        given += [home.to_host(array).tobytes() for array in result]
    return given, run, seen


@pytest.mark.parametrize(("make", "shape"), ONE, ids=named)
def test_a_captured_step_of_a_layer_carries_nothing(make, shape):
    home = resolve("cuda:1")
    plain, _, seen = outcome(make(), home, shape, False)
    # On the null stream, CuPy may join arrays by way of a table.
    assert [event for event in seen if event.detail != "concatenate"] == []
    captured, step, seen = outcome(make(), home, shape, True)
    assert (step.graphs, step.reason) == (1, None)
    assert seen == []
    assert captured == plain


@pytest.mark.parametrize(("make", "shape"), PRODUCTS, ids=named)
def test_a_layer_that_needs_cublas_says_so_and_carries_nothing_either(make, shape):
    home = resolve("cuda:1")
    plain, _, seen = outcome(make(), home, shape, False)
    assert seen == []
    captured, step, seen = outcome(make(), home, shape, True)
    assert step.graphs == 0
    assert "cuBLAS" in step.reason
    assert seen == []
    assert captured == plain


def test_every_layer_is_tried():
    tried = {type(part) for make, _ in ONE + PRODUCTS for part in make().walk()}
    whole = {
        kind
        for kind in Layer.known.values()
        if kind.__module__.startswith("portacnn.layers") and kind.__name__ in L.__all__
    }
    assert {kind.__name__ for kind in whole - tried} <= {"Layer", "Join"}


# --- updates and losses ---------------------------------------------------------------------------

UPDATES: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {"weight_decay": 0.1}),
    ("momentum", {"momentum": 0.9, "nesterov": True}),
    ("adagrad", {}),
    ("rmsprop", {"centered": True, "momentum": 0.5}),
    ("adam", {}),
    ("adamw", {"no_decay": ["p1"]}),
]


@dataclass(frozen=True)
class Numbers:
    lr: Any
    count: Any


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize(("name", "options"), UPDATES, ids=[name for name, _ in UPDATES])
def test_a_captured_update_carries_nothing(name, options, kernels):
    """Of more parameters than CuPy joins without a table, clipped together."""
    home = resolve("cuda:1")
    rng = np.random.default_rng(0)
    grads = [
        {f"p{i}": home.asarray(rng.standard_normal((2, i + 1))) for i in range(10)}
        for _ in range(5)
    ]

    def run(compiled: bool) -> tuple[dict[str, bytes], Any]:
        params = {f"p{i}": home.asarray(np.ones((2, i + 1))) for i in range(10)}
        optimizer = make_optimizer(name, options)

        def step(*arrays: Any) -> Any:
            *own, state = arrays
            own = [array + 0 for array in own]
            norm = ops.clip_by_global_norm(own, 1.0)
            fine = ops.all_finite(own)
            optimizer.update(
                params, dict(zip(params, own, strict=True)), fine, lr=state.lr, count=state.count
            )
            return norm, fine

        do = home.compile_step(step, ()) if compiled else step
        with use_kernels(kernels), home.active():
            for number, own in enumerate(grads):
                with log.watch() as seen:
                    do(*own.values(), Numbers(0.1, number + 1))
                optimizer.advance()
                assert number < 2 or not compiled or carried(seen) == []
        return {key: home.to_host(array).tobytes() for key, array in params.items()}, do

    plain, _ = run(False)
    captured, step = run(True)
    assert (step.graphs, step.reason) == (1, None)
    assert captured == plain


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "reduction": "sum"}, {"reduction": "none"}]
)
@pytest.mark.parametrize("indices", [True, False])
def test_a_captured_loss_carries_nothing(options, indices, kernels):
    home = resolve("cuda:1")
    rng = np.random.default_rng(0)
    x, t = (
        rng.standard_normal((4, 5)),
        rng.integers(0, 5, 4) if indices else rng.dirichlet(np.ones(5), 4),
    )
    x, t = home.asarray(x), home.asarray(t)

    def step(x: Any, t: Any, state: State) -> Any:
        loss, cache = ops.softmax_cross_entropy(x, t, **options)
        return loss, ops.softmax_cross_entropy_backward(loss, cache)

    compiled = home.compile_step(step, ())
    with use_kernels(kernels):
        for number in range(4):
            with log.watch() as seen:
                compiled(x, t, State(0.1))
            assert number < 2 or carried(seen) == []
    assert (compiled.graphs, compiled.reason) == (1, None)
