"""Inference runs convolutions with what follows them as one op: nothing of it may be seen but the
time it takes, and the layers one by one, each with a hook, return the same."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from portacnn import Model, models
from portacnn.errors import ShapeError
from portacnn.layers import (
    Arithmetic,
    AvgPool2d,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    Branches,
    Clip,
    Conv1d,
    Conv2d,
    Conv3d,
    Dropout,
    Flatten,
    Graph,
    Layer,
    Linear,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
    Recompute,
    ReLU,
    Residual,
    Sequential,
    SiLU,
    StochasticDepth,
)
from portacnn.ops.fused import conv_unit
from support.checks import agree, normal, refuses, with_each_kernel
from support.matrix import Here, backends

Seq = Sequential


class OwnNorm(BatchNorm2d):
    pass


class Halved(Residual):
    """Its forward is its own, so nothing may run in place of it."""

    def forward(self, x: Any, *, train: bool = False, keep: bool = True) -> Any:
        y, cache = super().forward(x, train=train, keep=keep)
        return y / 2, cache


class Doubled(Sequential):
    def forward(self, x: Any, *, train: bool = False, keep: bool = True) -> Any:
        y, cache = super().forward(x, train=train, keep=keep)
        return 2 * y, cache


def conv(**more: Any) -> Conv2d:
    return Conv2d(None, 3, 3, padding=1, **more)


def body(*last: Layer) -> Sequential:
    return Seq(conv(bias=False), BatchNorm2d(3), ReLU(), conv(), BatchNorm2d(3), *last)


def projection() -> Sequential:
    return Seq(Conv2d(None, 3, 1), BatchNorm2d(3))


def graph(*nodes: tuple[str, Layer, list[str]]) -> Graph:
    return Graph(("first", conv(), ["input"]), *nodes)


def add() -> Arithmetic:
    return Arithmetic("add")


def shared() -> Sequential:
    one = conv()
    return Seq(one, ReLU(), Residual(one, activation=ReLU()), one)


NETS: dict[str, tuple[Callable[[], Layer], int, int]] = {
    # the network, how often conv_unit runs, and how many of these add a residual
    "everything": (lambda: Seq(conv(), BatchNorm2d(3), ReLU(), MaxPool2d(2)), 1, 0),
    "clip": (lambda: Seq(conv(bias=False), BatchNorm2d(3, affine=False), Clip(-0.1, 0.2)), 1, 0),
    "pool": (lambda: Seq(conv(), MaxPool2d(2), ReLU()), 1, 0),
    "groups": (lambda: Seq(conv(groups=3), BatchNorm2d(3), Clip(0, 6), conv(), ReLU()), 2, 0),
    "other order": (lambda: Seq(conv(), ReLU(), BatchNorm2d(3), ReLU()), 1, 0),
    "another activation": (lambda: Seq(conv(), BatchNorm2d(3), SiLU(), MaxPool2d(2)), 1, 0),
    "other padding": (lambda: Seq(conv(padding_mode="reflect"), BatchNorm2d(3), ReLU()), 0, 0),
    "no statistics": (
        lambda: Seq(conv(), BatchNorm2d(3, track_running_stats=False), ReLU()),
        0,
        0,
    ),
    "own class": (lambda: Seq(conv(), OwnNorm(3), ReLU()), 0, 0),
    "identity": (lambda: Residual(body(), activation=ReLU()), 2, 1),
    "projection": (lambda: Residual(body(), projection(), activation=Clip(0, 1)), 3, 1),
    "no activation": (lambda: Residual(body()), 2, 1),
    "activation apart": (lambda: Residual(body(), activation=SiLU()), 2, 1),
    "ends with ReLU": (lambda: Residual(body(ReLU()), activation=ReLU()), 2, 0),
    "ends with pooling": (lambda: Residual(body(AvgPool2d(3, 1, 1)), activation=ReLU()), 2, 0),
    "nested": (lambda: Residual(Seq(conv=Seq(Seq(body())))), 2, 1),
    "stochastic depth": (lambda: Residual(Seq(body(), StochasticDepth(0.5))), 2, 1),
    "empty": (lambda: Residual(Seq(Dropout(0.5)), activation=ReLU()), 0, 0),
    "alone": (lambda: Residual(conv(), activation=ReLU()), 1, 1),
    "recomputed": (lambda: Residual(Recompute(body()), activation=ReLU()), 2, 1),
    "block in a block": (lambda: Residual(Residual(body()), activation=ReLU()), 2, 1),
    "own block": (lambda: Seq(Halved(body(), activation=ReLU()), conv(), ReLU()), 3, 1),
    "own body": (lambda: Residual(Doubled(body()), activation=ReLU()), 2, 0),
    "branches": (lambda: Branches(body(), Seq(), projection(), conv()), 3, 0),
    "added": (lambda: Branches(body(), projection(), join="add"), 3, 0),
    "shared": (shared, 2, 1),
    "graph": (
        lambda: graph(
            ("bn", BatchNorm2d(3), ["first"]),
            ("relu", ReLU(), ["bn"]),
            ("conv", conv(), ["relu"]),
            ("add", add(), ["conv", "relu"]),
            ("relu2", Clip(0, 6), ["add"]),
            ("short", conv(), ["relu2"]),
            ("conv2", conv(), ["relu2"]),
            ("bn2", BatchNorm2d(3), ["conv2"]),
            ("add2", add(), ["short", "bn2"]),
            ("relu3", ReLU(), ["add2"]),
        ),
        3,
        2,
    ),
    "the other value is made later": (
        lambda: graph(
            ("conv", conv(), ["first"]),
            ("mean", AvgPool2d(3, 1, 1), ["first"]),
            ("add", add(), ["conv", "mean"]),
            ("more", add(), ["add", "first"]),
        ),
        1,
        1,
    ),
    "values of several users": (
        lambda: graph(
            ("bn", BatchNorm2d(3), ["first"]),
            ("add", add(), ["bn", "first"]),
            ("relu", ReLU(), ["add"]),
            ("conv", conv(), ["relu"]),
            ("sum", add(), ["conv", "add"]),
            ("twice", add(), ["sum", "sum"]),
        ),
        1,
        1,
    ),
    "broadcast": (
        lambda: graph(
            ("conv", Conv2d(None, 3, 3), ["first"]),
            ("other", conv(), ["first"]),
            ("small", AvgPool2d((5, 4)), ["other"]),
            ("add", add(), ["conv", "small"]),
            ("relu", ReLU(), ["add"]),
            ("less", Arithmetic("subtract"), ["relu", "small"]),
        ),
        0,
        0,
    ),
}
SIZE = (3, 5, 4)


def built(here: Here, net: Layer, shape: tuple[int, ...] = SIZE, dtype: str = "float64") -> Model:
    """With running statistics that are not the initial ones, as trained networks have them."""
    model = Model(net=net).build(shape, device=here.device, dtype=dtype, seed=0)
    state = {
        path: array + 0.3 * np.abs(normal(*array.shape, seed=number)).astype(array.dtype)
        if "running" in path or "bias" in path
        else array
        for number, (path, array) in enumerate(model.state_dict().items())
    }
    model.load_state_dict(state)
    return model


def one_by_one(here: Here, model: Model, x: Any) -> np.ndarray:
    handles = [layer.on_output(lambda y: None) for layer in model.walk()]
    try:
        return here.host(model(x))
    finally:
        for handle in handles:
            handle.remove()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parts each call, or preparation, of conv_unit has."""
    calls, check = [], conv_unit.check

    def count(parts: Any, *arguments: Any) -> None:
        calls.append(len(parts))
        check(parts, *arguments)

    monkeypatch.setattr(conv_unit, "check", count)
    return calls


@pytest.mark.parametrize("name", NETS)
@with_each_kernel
def test_a_pass_returns_what_the_layers_one_by_one_return(backend: Here, name: str):
    net, count, sums = NETS[name]
    model = built(backend, net())
    x = backend.array(normal(2, *SIZE))
    with pytest.MonkeyPatch.context() as patch:
        calls = counted(patch)
        expected = one_by_one(backend, model, x)
        assert np.ptp(expected, axis=0).max() > 0.1  # it depends on the input
        assert calls == []
        agree(backend, model(x), expected, x, 1e-12)
        assert (len(calls), calls.count(2)) == (count, sums)
    agree(backend, model.forward(x)[0], expected, x, 1e-12)
    function = model.prepare(x)
    function(backend.array(normal(2, *SIZE, seed=1)))
    agree(backend, function(x), expected, x, 1e-12)
    agree(backend, model.predict(x), expected, x, 1e-12)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: Seq(Conv1d(2, 3, 3), BatchNorm1d(3), ReLU(), MaxPool1d(2)), (2, 9)),
        (lambda: Seq(Conv3d(2, 3, 2), BatchNorm3d(3), Clip(0, 1), MaxPool3d(2)), (2, 4, 5, 4)),
    ],
)
def test_along_other_axes(backend: Here, make: Callable[[], Layer], shape: tuple[int, ...]):
    model = built(backend, make(), shape)
    assert len(model.net.inference_stages) == 1
    x = backend.array(normal(2, *shape))
    agree(backend, model(x), one_by_one(backend, model, x), x, 1e-12)


@backends("numpy", "torch")
@pytest.mark.parametrize(
    "make",
    [
        lambda **given: models.ResNet20(seed=0, input_size=8, option="B", **given),
        lambda **given: models.MobileNetV2(5, width=0.1, seed=0, input_size=32, **given),
    ],
)
def test_known_models(backend: Here, make: Callable[..., Model]):
    """In float64; each block of the same shape adds its input in the last convolution. The running
    statistics are those of the images: with the initial ones the activations fade out, and the
    logits would be the last bias, whatever the layers before it compute."""
    model = make(device=backend.device, dtype="float64")
    x = backend.array(normal(2, *model.input_shape))
    for layer in model.walk():
        if isinstance(layer, BatchNorm2d):
            layer.momentum = 1.0
    model.forward(x, train=True)
    expected = one_by_one(backend, model, x)
    assert np.abs(expected[0] - expected[1]).max() > 0.01 * np.abs(expected).max()
    with pytest.MonkeyPatch.context() as patch:
        calls = counted(patch)
        agree(backend, model(x), expected, x, 1e-10)
        blocks = [layer for layer in model.walk() if isinstance(layer, Residual)]
        assert calls.count(2) == len(blocks) > 0
        assert len(calls) == sum(isinstance(layer, Conv2d) for layer in model.walk())
    agree(backend, model.predict(x), expected, x, 1e-10)


def test_a_hook_in_a_block_sees_its_layer(backend: Here):
    """Each hook sees what its layer returns, whether its neighbours are observed or not."""
    model = built(backend, Residual(body(), projection(), activation=ReLU()))
    x, alone = backend.array(normal(2, *SIZE)), []
    layers = [layer for layer in model.walk() if layer is not model]
    handles = [y.on_output(lambda y: alone.append(backend.host(y))) for y in layers]
    expected = backend.host(model(x))
    for handle in handles:
        handle.remove()
    assert len(alone) == len(layers)
    for layer in layers:
        seen: list[Any] = []
        handle = layer.on_output(lambda y, seen=seen: seen.append(backend.host(y)))
        agree(backend, model(x), expected, x, 1e-12)
        handle.remove()
        (y,) = seen
        assert any(y.shape == a.shape and np.allclose(y, a, 1e-12, 1e-12) for a in alone)


def test_statistics_and_weights_are_read_in_each_call(backend: Here):
    """A prepared function and a captured pass see what training, loading and ``replace`` write."""
    model = built(backend, Seq(conv(), BatchNorm2d(3), ReLU(), Flatten(), Linear(None, 2)))
    x = backend.array(normal(2, *SIZE))
    model.predict(x)
    model.forward(x, train=True)
    agree(backend, model.predict(x), one_by_one(backend, model, x), x, 1e-12)
    model.net.children["1"].eps = 0.5
    agree(backend, model(x), one_by_one(backend, model, x), x, 1e-12)
    model.replace("net.1", BatchNorm2d(3, track_running_stats=False))
    agree(backend, model.predict(x), one_by_one(backend, model, x), x, 1e-12)
    model.freeze()
    agree(backend, model.predict(x), one_by_one(backend, model, x), x, 1e-12)


def test_nan_and_infinity_stay(backend: Here):
    model = built(backend, Residual(body(), activation=Clip(0, 6)), dtype="float32")
    host = normal(3, *SIZE)
    host[0, 0, 1, 1], host[1, 2, 4, 3], host[2] = np.nan, np.inf, -np.inf
    x = backend.array(host, "float32")
    expected = one_by_one(backend, model, x)
    assert np.isnan(expected).any()
    for y in (model(x), model.predict(x)):
        np.testing.assert_array_equal(np.isnan(backend.host(y)), np.isnan(expected))
        np.testing.assert_allclose(backend.host(y), expected, 1e-5, 1e-5)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_residual_of_another_size_is_refused(backend: Here, hooked: bool):
    """Under the block's name, whether the last convolution computes the sum or not. The images are
    not of the size that the network was built for."""
    net = Model(block=Residual(Conv2d(2, 2, 3, 2, 1), AvgPool2d(2)))
    net.build((2, 4, 4), device=backend.device, dtype="float64")
    if hooked:
        net.block.body.on_output(lambda y: None)
    x = backend.array(normal(1, 2, 5, 5))
    refuses(ShapeError, "block (Residual)", "of one shape", call=lambda: net(x))


@pytest.mark.parametrize("count", [1, 9])
def test_a_forward_of_ones_own_is_predicted_with(backend: Here, count: int):
    """For few images as for many: no path that was prepared for the base class's."""

    class Seven(Model):
        def forward(self, x: Any, *, train: bool = False, keep: bool = True) -> Any:
            y, cache = super().forward(x, train=train, keep=keep)
            return 0 * y + 7, cache

    class Below(Seven):
        pass

    for kind in (Seven, Below):
        model = kind(Conv2d(1, 2, 3), ReLU(), Flatten(), Linear(None, 2))
        model.build((1, 5, 5), device=backend.device, seed=0)
        y = backend.host(model.predict(np.ones((count, 1, 5, 5), np.float32)))
        np.testing.assert_array_equal(y, np.full((count, 2), 7.0))


def test_preparing_runs_each_layer_once():
    """However deep it lies."""
    ran = []

    class Seen(ReLU):
        def forward(self, x: Any, *, train: bool = False, keep: bool = True) -> Any:
            ran.append(self)
            return super().forward(x, train=train, keep=keep)

    net: Layer = Seen()
    for _ in range(3):
        net = Branches(Seq(Residual(Seq(net))), join="add")
    x = np.ones((1, 2), np.float32)
    model = Model(net).build((2,), device="numpy")
    model.prepare(x)
    assert len(ran) == 1
