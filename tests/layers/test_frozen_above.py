"""A frozen layer above one that is trained goes backward for the gradient of its input alone."""

from inspect import getsource
from typing import Any

import numpy as np
import pytest

from portacnn.layers import (
    ArithmeticWith,
    BatchNorm2d,
    Constant,
    Conv2d,
    ConvTranspose2d,
    GroupNorm,
    InstanceNorm2d,
    Layer,
    LayerNorm,
    Linear,
    MatMulWith,
    MaxPool2d,
    PReLU,
    ReLU,
    Sequential,
    SqueezeExcitation,
)
from portacnn.models.lenet5 import TableConv2d
from support.matrix import Here, backends

IMAGE = (2, 4, 4)
WITH_PARAMETERS = {
    "conv": (lambda: Sequential(a=Conv2d(2, 2, 3, padding=1)), IMAGE),
    "margins": (lambda: Sequential(a=Conv2d(2, 2, 3, padding=1, padding_mode="reflect")), IMAGE),
    "transposed": (lambda: Sequential(a=ConvTranspose2d(2, 3, 3)), IMAGE),
    "table": (lambda: Sequential(a=TableConv2d([[0], [0, 1]], 3)), IMAGE),
    "linear": (lambda: Sequential(a=Linear(4, 3)), (4,)),
    "conv relu pool": (lambda: Sequential(a=Conv2d(2, 2, 3), r=ReLU(), p=MaxPool2d(2)), IMAGE),
    "linear relu": (lambda: Sequential(a=Linear(4, 3), r=ReLU()), (4,)),
    "batch norm": (lambda: Sequential(a=BatchNorm2d(2)), IMAGE),
    "batch norm relu": (lambda: Sequential(a=BatchNorm2d(2), r=ReLU()), IMAGE),
    "group norm": (lambda: Sequential(a=GroupNorm(1, 2)), IMAGE),
    "layer norm": (lambda: Sequential(a=LayerNorm((2, 4, 4))), IMAGE),
    "instance norm": (lambda: Sequential(a=InstanceNorm2d(2, affine=True)), IMAGE),
    "prelu": (lambda: Sequential(a=PReLU((2, 1, 1))), IMAGE),
    "constant": (lambda: Sequential(a=ArithmeticWith("multiply", (2, 1, 1))), IMAGE),
    "constant first": (lambda: Sequential(a=ArithmeticWith("subtract", (2, 1, 1), True)), IMAGE),
    "array": (lambda: Sequential(a=Constant((2, 3))), (4,)),
    "matrix": (lambda: Sequential(a=MatMulWith(3)), IMAGE),
    "squeeze": (lambda: Sequential(a=SqueezeExcitation(2, 2)), IMAGE),
}


def declares(kind: type[Layer]) -> bool:
    return "self.declare(" in getsource(kind)


def test_every_layer_with_parameters_is_compared():
    """Those that declare some themselves, or have a base that does."""
    built = [make().build(shape, seed=0) for make, shape in WITH_PARAMETERS.values()]
    here = {type(layer) for model in built for layer in model.walk() if layer.declared}
    bases = {base for kind in here for base in kind.__mro__}
    own = [kind for kind in Layer.known.values() if kind.__module__.startswith("portacnn.")]
    declaring = {base for kind in own for base in kind.__mro__ if base is not Layer}
    assert {kind.__name__ for kind in declaring - bases if declares(kind)} == set()


@backends("numpy", "numpy-readonly", "strict-device1", "torch", "cupy")
@pytest.mark.parametrize("what", WITH_PARAMETERS)
def test_a_frozen_layer_computes_the_gradient_of_its_input_alone(
    backend: Here, what: str, monkeypatch: pytest.MonkeyPatch
):
    """Above one that is trained. Its own gradients would be dropped: they are not computed. Those
    that are, are those of the network without frozen layers."""
    make, shape = WITH_PARAMETERS[what]
    model = Sequential(below=ArithmeticWith("add", shape), above=make())
    model.build(shape, device=backend.device, dtype="float64", seed=3)
    x = backend.array(np.random.default_rng(0).normal(size=(3, *shape)))
    paths = [path for path in model.named_parameters() if path.startswith("above")]
    y, kept = model.forward(x)
    model.backward(y, kept)
    full = {path: backend.host(grad) for path, grad in model.named_gradients().items()}
    made: list[str] = []
    add_grads = Layer.add_grads

    def watched(layer: Layer, **grads: Any) -> None:
        made.extend(f"{layer.path}.{name}" for name, grad in grads.items() if grad is not None)
        add_grads(layer, **grads)

    monkeypatch.setattr(Layer, "add_grads", watched)
    for frozen in (paths, *([path] for path in paths)):
        made.clear()
        model.unfreeze()
        model.freeze(frozen)
        y, kept = model.forward(x)
        model.backward(y, kept)
        assert set(made) == {"below.value", *paths} - set(frozen)
        for path, grad in model.named_gradients().items():
            np.testing.assert_allclose(backend.host(grad), full[path], rtol=1e-10, atol=1e-12)


@backends("strict")
@pytest.mark.parametrize("what", ["conv", "transposed", "matrix"])
def test_a_frozen_layer_computes_one_product(
    backend: Here, what: str, monkeypatch: pytest.MonkeyPatch
):
    """Of the two of a backward pass, dx and dweight."""
    make, shape = WITH_PARAMETERS[what]
    model = make().build(shape, device=backend.device, seed=0)
    x = backend.array(np.ones((1, *shape)), "float32")
    matmul, products = backend.xp.matmul, []
    monkeypatch.setattr(backend.xp, "matmul", lambda *two: products.append(0) or matmul(*two))
    for count, frozen in ((2, False), (1, True)):
        if frozen:
            model.freeze()
        y, kept = model.forward(x)
        products.clear()
        model.backward(y, kept)
        assert len(products) == count
