"""``features``: the output of any layer, as a hook sees it."""

from typing import Any

import numpy as np
import pytest

from portacnn import Model, Normalize
from portacnn.errors import ArgumentError, StateError
from portacnn.layers import (
    Arithmetic,
    BatchNorm2d,
    Branches,
    Conv2d,
    Dropout,
    Flatten,
    Layer,
    Linear,
    MaxPool2d,
    Recompute,
    ReLU,
    Residual,
    Sequential,
)
from portacnn.models import GraphModel
from support.checks import refuses
from support.matrix import EACH_LIBRARY, Here
from support.nets import as_bytes, patches

SHARED = "shared.0", "shared.1"


def net(device: Any) -> Model:
    twice = Conv2d(3, 3, 1)
    model = Model(
        stem=Sequential(conv=Conv2d(1, 3, 3, padding=1), relu=ReLU(), pool=MaxPool2d(2)),
        norm=BatchNorm2d(3),
        relu=ReLU(),
        block=Residual(
            Sequential(conv1=Conv2d(3, 3, 3, padding=1), relu1=ReLU(), drop=Dropout(0.5)),
            Conv2d(3, 3, 1),
            activation=ReLU(),
        ),
        again=Recompute(Sequential(conv2=Conv2d(3, 3, 1), relu2=ReLU())),
        shared=Sequential(twice, twice),
        sides=Branches(left=Conv2d(3, 2, 1), right=Sequential(inner=Conv2d(3, 1, 1), r=ReLU())),
        flatten=Flatten(),
        fc1=Linear(None, 5),
        relu3=ReLU(),
        fc2=Linear(5, 4),
    )
    return model.build((1, 8, 8), device=device, dtype="float64", seed=2)


def graph(device: Any) -> Model:
    model = GraphModel(
        ("conv1", Conv2d(1, 3, 3, padding=1), ["input"]),
        ("relu1", ReLU(), ["conv1"]),
        ("conv2", Conv2d(3, 3, 3, padding=1), ["relu1"]),
        ("sum", Arithmetic("add"), ["conv2", "relu1"]),
        ("flatten", Flatten(), ["sum"]),
        ("fc", Linear(None, 4), ["flatten"]),
    )
    return model.build((1, 8, 8), device=device, dtype="float64", seed=2)


@EACH_LIBRARY
@pytest.mark.parametrize("make", [net, graph])
@pytest.mark.parametrize("size", [None, 4])
def test_features_returns_the_output_of_every_layer_of_every_container(
    backend: Here, make: Any, size: int | None
):
    model, x = make(backend.device), patches(9, dtype="float64")[0]
    places = {"block.body": model.block.body} if make is net else {}
    for layer in model.walk():  # outer layers first: "block" is the block, not its body
        for place in layer.places:
            places.setdefault(place.path, layer)
    seen: dict[str, list[Any]] = {path: [] for path in places}
    handles = [
        layer.on_output(lambda y, path=path: seen[path].append(backend.host(y)))
        for path, layer in places.items()
    ]
    model.predict(x)
    for handle in handles:
        handle.remove()
    logits = model.predict(x)
    for path in places:
        expected = seen[path][SHARED.index(path) if path in SHARED else 0]
        y = model.features(x, path, size)
        assert type(y) is type(logits)
        np.testing.assert_allclose(backend.host(y), expected, rtol=1e-12, err_msg=path)
    assert not any(layer.hooks for layer in model.walk())


def test_the_layers_after_it_do_not_run(backend: Here):
    model, x = net(backend.device), patches(3, dtype="float64")[0]
    ran: list[Any] = []
    model.fc2.on_output(ran.append)
    model.features(x, "fc1")
    assert ran == []
    assert tuple(model.features(x[:0], "fc1").shape) == (0, 5)


def test_uint8_images_are_preprocessed(backend: Here):
    model, x = net(backend.device), as_bytes(patches(3)[0])
    model.preprocess = Normalize(mean=0.5, std=0.25)
    expected = model.features((x / 255.0 - 0.5) / 0.25, "block")
    np.testing.assert_allclose(
        backend.host(model.features(x, "block")), backend.host(expected), rtol=1e-12
    )


class Silent(Layer):
    """A container that runs a layer by its ``forward``."""

    def __init__(self) -> None:
        self.adopt("inner", Conv2d(1, 1, 1))

    def infer(self, shape: Any) -> Any:
        return self.inner.plan(shape, self.child_path("inner"))

    def forward(self, x: Any, *, train: bool = False, keep: bool = True) -> Any:
        return self.inner.forward(x, train=train, keep=keep)


def test_wrong_arguments_are_refused():
    model, x = net("numpy"), patches(3, dtype="float64")[0]
    refuses(ArgumentError, "fc9", "fc1", call=lambda: model.features(x, "fc9"))
    refuses(ArgumentError, "batch_size", call=lambda: model.features(x, "fc1", 0))
    silent = Model(a=Silent(), b=Flatten()).build((1, 8, 8), device="numpy", dtype="float64")
    refuses(StateError, "a.inner", call=lambda: silent.features(x, "a.inner"))
