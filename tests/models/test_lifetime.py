"""What is deleted is gone at once: nothing that holds a network's arrays waits for the garbage
collector."""

import gc
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

import portacnn
from portacnn import Model, Trainer
from portacnn.layers import (
    BatchNorm2d,
    Branches,
    Conv2d,
    Flatten,
    Layer,
    Linear,
    MaxPool2d,
    ReLU,
    Residual,
    Sequential,
)
from portacnn.models import DeepConvNet, LeNet5, ResNet20, SimpleConvNet
from support.matrix import Here, needs
from support.nets import patches, small_net


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # so that the next test's collection does not look through all of pytest again
    gc.disable()
    yield
    gc.enable()


def everything(network: Layer) -> list[weakref.ref]:
    """Its layers, parameters, buffers and gradients."""
    arrays = [
        array
        for named in (network.named_state(), network.named_gradients())
        for array in named.values()
    ]
    return [weakref.ref(each) for each in (*network.walk(), *arrays)]


def alive(refs: list[weakref.ref]) -> list[str]:
    return [type(each()).__name__ for each in refs if each() is not None]


def use(model: Model, x: np.ndarray, t: np.ndarray) -> None:
    """Prepared ways, a workspace, caches and gradients, each more than once."""
    for count in (1, 2, len(x), 1):
        model.predict(x[:count])
    model.loss(x, t)
    model.gradient(x, t)
    model.forward(model.batch(model.accept(x[:2])))


@pytest.mark.parametrize(
    "make", [SimpleConvNet, DeepConvNet, LeNet5, ResNet20], ids=lambda make: make.__name__
)
def test_models_are_freed(make):
    model = make(seed=0, device="numpy")
    x = np.random.default_rng(0).random((9, *model.input_shape), dtype="float32")
    use(model, x, np.arange(9) % model.classes)
    refs = everything(model)
    del model
    assert alive(refs) == []


def test_every_container_is_freed_on_every_backend(backend: Here):
    (x, t), layers = (
        patches(9),
        {
            "block": Residual(Conv2d(1, 2, 3, padding=1), Conv2d(1, 2, 1), activation=ReLU()),
            "norm": BatchNorm2d(2),
            "branches": Branches(Sequential(Conv2d(2, 2, 1), ReLU(), MaxPool2d(2)), MaxPool2d(2)),
            "flatten": Flatten(),
            "fc": Linear(None, 4),
        },
    )
    model = Model(**layers).build((1, 8, 8), device=backend.device, seed=0)
    del layers
    use(model, x, t)
    model.to("numpy")
    model.build((1, 8, 8), device=backend.device, seed=1)
    use(model, x, t)
    refs = everything(model)
    del model
    assert alive(refs) == []


def test_a_trainer_is_freed_with_its_optimizer_and_data(backend: Here):
    (x, t), model = patches(20), small_net(backend.device)
    trainer = Trainer(
        model,
        x,
        t,
        x,
        t,
        epochs=2,
        mini_batch_size=8,
        compile_step=True,
        early_stopping=2,
        verbose=False,
    )
    trainer.train()
    model.predict(x[:1])
    state = [array for slots in trainer.optimizer.state.values() for array in slots.values()]
    refs = [
        *everything(model),
        *map(weakref.ref, (trainer, trainer.optimizer, trainer._feed, *state)),
    ]
    del model, state
    assert len(alive(refs)) == len(refs)  # the Trainer holds them all
    del trainer
    assert alive(refs) == []


@needs("onnx")
def test_a_graph_from_onnx_is_freed(tmp_path):
    import onnx

    from support.onnx_files import classifier

    onnx.save(classifier(), tmp_path / "model.onnx")
    model = portacnn.onnx.load(tmp_path / "model.onnx", device="numpy")
    x = np.random.default_rng(0).random((9, *model.input_shape), dtype="float32")
    for count in (1, 9, 1):
        model.predict(x[:count])
    refs = everything(model)
    del model
    assert alive(refs) == []


def test_a_layer_that_is_left_does_not_keep_its_network():
    model = small_net("numpy")
    x, t = patches(9)
    use(model, x, t)
    conv, refs = model.children["conv1"], [weakref.ref(model), weakref.ref(model.children["fc1"])]
    del model
    assert alive(refs) == []
    with pytest.raises(portacnn.errors.StateError, match="another network"):
        Model(conv=conv, flatten=Flatten(), fc=Linear(None, 2)).build((1, 8, 8), device="numpy")
