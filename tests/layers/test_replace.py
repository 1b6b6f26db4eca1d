"""``replace``: a network that was built is changed, and all that knows of it agrees."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portacnn
from portacnn import Model, Trainer
from portacnn.errors import ArgumentError, ShapeError, StateError
from portacnn.layers import (
    Arithmetic,
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    Layer,
    Linear,
    MaxPool2d,
    ReLU,
    Residual,
    Sequential,
    Sigmoid,
    Tanh,
)
from portacnn.models import GraphModel, ResNet20
from portacnn.optim import SGD, Adam
from support.checks import normal, refuses
from support.matrix import EACH_LIBRARY, Here, backends
from support.nets import bits, patches, small_net


def net(**options: Any) -> Model:
    model = Model(
        stem=Sequential(conv=Conv2d(1, 3, 3, padding=1), relu=ReLU(), pool=MaxPool2d(2)),
        block=Residual(
            Sequential(conv1=Conv2d(3, 3, 3, padding=1), bn1=BatchNorm2d(3)), activation=ReLU()
        ),
        flatten=Flatten(),
        fc=Linear(None, 4),
    )
    return model.build((1, 8, 8), **{"seed": 7, **options})


def test_a_new_head(backend: Here, tmp_path: Path):
    """predict, summary, state and file say the same; what stays keeps its weights; the new weights
    are a fresh network's."""
    pytest.importorskip("safetensors")
    model, x = net(device=backend.device), patches(9)[0]
    before = model.state_dict()
    model.predict(x), model.predict(x[:1])
    old = model.replace("fc", Linear(None, 3))
    assert isinstance(old, Linear)
    assert model.classes == 3
    for count in (1, 9):
        assert tuple(model.predict(x[:count]).shape) == (count, 3)
    line = next(line for line in model.summary().splitlines() if line.startswith("fc "))
    assert line.split()[2:4] == ["3", "147"]
    after = model.state_dict()
    assert list(after) == list(before)
    for path in before:
        if not path.startswith("fc"):
            assert after[path].tobytes() == before[path].tobytes()
    fresh = Model(fc=Linear(None, 3)).build((48,), seed=7).state_dict()
    assert after["fc.weight"].tobytes() == fresh["fc.weight"].tobytes()
    model.save(tmp_path / "net.safetensors")
    again = portacnn.load(tmp_path / "net.safetensors", device=backend.device)
    assert bits(again) == bits(model)
    assert repr(again) == repr(model)
    np.testing.assert_array_equal(backend.host(again.predict(x)), backend.host(model.predict(x)))
    t = np.arange(9) % 3
    Trainer(model, x, t, x, t, epochs=1, mini_batch_size=9, verbose=False).train()
    assert model.state_dict()["fc.weight"].tobytes() != after["fc.weight"].tobytes()


@pytest.mark.parametrize("count", [1, 40])
def test_layers_without_parameters_and_stages(backend: Here, count: int):
    """A ReLU that ran as one op with its convolution, in a network whose prediction is prepared."""
    model, x = net(device=backend.device), patches(count)[0]
    model.predict(x)
    model.replace("stem.relu", Tanh())
    model.replace("block.activation", Sigmoid())
    assert [type(part) for part in model.children["stem"].stages] == [Conv2d, Tanh, MaxPool2d]
    other = Model(
        stem=Sequential(conv=Conv2d(1, 3, 3, padding=1), tanh=Tanh(), pool=MaxPool2d(2)),
        block=Residual(
            Sequential(conv1=Conv2d(3, 3, 3, padding=1), bn1=BatchNorm2d(3)), activation=Sigmoid()
        ),
        flatten=Flatten(),
        fc=Linear(None, 4),
    ).build((1, 8, 8), device=backend.device, seed=7)
    assert bits(other) == bits(model)
    np.testing.assert_allclose(
        backend.host(model.predict(x)), backend.host(other.predict(x)), rtol=1e-6
    )
    model.replace("stem.relu", ReLU())
    assert len(model.children["stem"].stages) == 1


@EACH_LIBRARY
@backends("numpy", "strict-device1", "torch")
@pytest.mark.parametrize(
    ("make", "path", "new", "changed"),
    [
        (lambda d: ResNet20(device=d, seed=0), "fc", lambda: Linear(None, 3), "fc.weight"),
        (
            lambda d: ResNet20(device=d, seed=0),
            "layer2.0.conv1",
            lambda: Conv2d(16, 32, 5, 2, 2),
            "layer2.0.conv1.weight",
        ),
        (
            lambda d: ResNet20(device=d, seed=0),
            "layer3",
            lambda: Sequential(Conv2d(32, 64, 1)),
            "layer3.0.weight",
        ),
        (
            lambda d: small_net(d),
            "fc2",
            lambda: Sequential(Linear(6, 5), ReLU(), Linear(5, 4)),
            "fc2.2.weight",
        ),
    ],
)
def test_models_that_build_themselves(
    backend: Here, tmp_path: Path, make: Any, path: str, new: Any, changed: str
):
    pytest.importorskip("safetensors")
    model = make(backend.device)
    layer = new()
    model.replace(path, layer)
    shape = model.state_dict()[changed].shape
    model.save(tmp_path / "net.safetensors")
    again = portacnn.load(tmp_path / "net.safetensors", device=backend.device)
    assert type(again) is type(model)
    assert bits(again) == bits(model) == bits(pickle.loads(pickle.dumps(model)))
    assert again.state_dict()[changed].shape == shape
    x = normal(2, *model.input_shape).astype("float32")
    np.testing.assert_array_equal(backend.host(again.predict(x)), backend.host(model.predict(x)))


def test_what_was_replaced_can_be_changed_and_put_back(tmp_path: Path):
    pytest.importorskip("safetensors")
    model = small_net("numpy")
    old = model.replace("fc2", Sequential(Linear(6, 5), ReLU(), Linear(5, 4)))
    model.replace("fc2.2", Linear(5, 2))
    model.save(tmp_path / "net.safetensors")
    assert bits(portacnn.load(tmp_path / "net.safetensors")) == bits(model)
    weights = old.params["weight"].copy()
    # a view would keep all parameters of the network in memory
    assert all(array.flags.owndata for array in old.params.values())
    model.replace("fc2", old)  # which keeps its own
    assert np.array_equal(model.state_dict()["fc2.weight"], weights)
    assert bits(model) == bits(small_net("numpy"))
    model.save(tmp_path / "net.safetensors")
    assert bits(portacnn.load(tmp_path / "net.safetensors")) == bits(model)


def test_a_layer_that_stays_inside_a_new_one(backend: Here):
    model = net(device=backend.device)
    before = model.state_dict()
    model.replace("fc", Sequential(Dropout(0.5), model.children["fc"]))
    assert model.state_dict()["fc.1.weight"].tobytes() == before["fc.weight"].tobytes()
    x = patches(3)[0]
    np.testing.assert_array_equal(
        backend.host(model.predict(x)), backend.host(net(device=backend.device).predict(x))
    )


def test_a_layer_moves_to_another_network(backend: Here):
    """It is copied to the network's device and keeps its weights."""
    first, second = net(device="numpy"), net(device=backend.device, seed=1)
    refuses(
        StateError,
        "part of another network",
        call=lambda: second.replace("block", first.children["block"]),
    )
    weight = first.state_dict()["block.conv1.weight"]
    taken = first.replace("block", Sequential(Conv2d(3, 3, 1)))
    second.replace("block", taken)
    assert second.state_dict()["block.conv1.weight"].tobytes() == weight.tobytes()
    assert (
        taken.children["body"].children["conv1"].params["weight"].device == backend.backend.device
    )
    Sequential(other=second.replace("block", Sequential())).build((3, 4, 4), seed=0)
    for model in (first, second):
        assert backend.host(second.predict(patches(2)[0])).shape == (2, 4)
        assert model.predict(patches(2)[0]).shape == (2, 4)


def test_graphs(backend: Here, tmp_path: Path):
    pytest.importorskip("safetensors")
    nodes = (
        ("a.conv", Conv2d(1, 2, 3, padding=1), ["input"]),
        ("b", Conv2d(1, 2, 1), ["input"]),
        ("sum", Arithmetic("add"), ["a.conv", "b"]),
        ("flat", Flatten(), ["sum"]),
        ("fc", Linear(None, 3), ["flat"]),
    )
    model = GraphModel(*nodes).build((1, 4, 4), device=backend.device, seed=0)
    x = normal(12, 1, 4, 4).astype("float32")
    before = backend.host(model.predict(x))
    model.replace("sum", Arithmetic("multiply"))
    model.replace("b", Sequential(Conv2d(1, 2, 3, padding=1)))
    refuses(
        ShapeError, ["at least", "2 inputs"][1], call=lambda: model.replace("b", Arithmetic("add"))
    )
    assert "b.0.weight" in model.state_dict()
    after = backend.host(model.predict(x))
    assert not np.allclose(after, before)
    model.save(tmp_path / "graph.safetensors")
    again = portacnn.load(tmp_path / "graph.safetensors", device=backend.device)
    np.testing.assert_array_equal(backend.host(again.predict(x)), after)


@EACH_LIBRARY
@pytest.mark.parametrize(
    ("path", "new", "kind", "words"),
    [
        (
            "fc",
            lambda: Linear(7, 3),
            ShapeError,
            ("fc (Linear)", "expected 7 input features, got 48"),
        ),
        (
            "stem.conv",
            lambda: Conv2d(1, 5, 3, padding=1),
            ShapeError,
            ("block.conv1", "expected 3 input channels"),
        ),
        (
            "stem.pool",
            lambda: MaxPool2d(4),
            ShapeError,
            ("fc (Linear)", "keeps its weights", "(4, 48)", "(4, 12)"),
        ),
        ("nowhere", ReLU, ArgumentError, ("no layer at 'nowhere'", "block.conv1")),
        ("fc", lambda: "fc", ArgumentError, ("'fc'",)),
        (
            "fc",
            lambda: Linear(None, 3, weight_init=lambda *_: np.ones(2)),
            ArgumentError,
            ("initializer",),
        ),
    ],
)
def test_an_error_changes_nothing(backend: Here, path: str, new: Any, kind: Any, words: Any):
    model = net(device=backend.device)
    before, arrays, layers = bits(model), model.named_parameters(), list(model.walk())
    shapes, text = (
        [(layer.path, layer.input_shape, layer.output_shape) for layer in layers],
        repr(model),
    )
    layer = new()
    refuses(kind, *words, call=lambda: model.replace(path, layer))
    assert bits(model) == before
    assert all(model.named_parameters()[name] is array for name, array in arrays.items())
    assert list(model.walk()) == layers
    assert [(layer.path, layer.input_shape, layer.output_shape) for layer in model.walk()] == shapes
    assert repr(model) == text
    Trainer(model, *patches(8), *patches(8), epochs=1, mini_batch_size=4, verbose=False).train()


def test_a_layer_into_itself():
    model = net()
    refuses(
        ArgumentError,
        "into itself",
        call=lambda: model.replace("stem.conv", Sequential(model.children["stem"])),
    )


def test_assignment_is_refused():
    model = net()
    words = ("replace",)
    refuses(StateError, *words, call=lambda: model.children.__setitem__("fc", Linear(None, 3)))
    refuses(StateError, *words, call=lambda: model.children.update(fc=Linear(None, 3)))
    refuses(StateError, *words, call=lambda: model.children.pop("fc"))
    for holder, name in ((model, "fc"), (model, "head"), (model.children["block"], "body")):
        refuses(
            StateError,
            *words,
            call=lambda holder=holder, name=name: setattr(holder, name, Linear(None, 3)),
        )
    with pytest.raises(StateError, match="replace"):
        del model.children["fc"]
    assert tuple(model.predict(patches(1)[0]).shape) == (1, 4)


def test_an_attribute_reads_a_child():
    model = net()
    assert model.fc is model.children["fc"]
    assert model.block.body.conv1 is model.layer_at("block.conv1")
    model.replace("fc", Linear(None, 3))
    assert model.fc.out_features == 3
    with pytest.raises(AttributeError, match=r"^'Model' object has no attribute 'fd'"):
        _ = model.fd
    assert not hasattr(model.fc, "fd")
    assert copy.deepcopy(model).fc.out_features == pickle.loads(pickle.dumps(model)).fc.out_features


def test_a_child_called_as_a_method_is_reached_by_children_alone():
    model = Model(build=Linear(None, 3), params=ReLU(), kernel_size=Linear(3, 2))
    model.build((4,), seed=0)
    assert list(model.state_dict())[-1] == "kernel_size.bias"
    assert model.params == {}
    assert isinstance(model.children["params"], ReLU)
    assert isinstance(model.kernel_size, Linear)
    assert tuple(model.predict(np.zeros((1, 4), np.float32)).shape) == (1, 2)


class Scaled(Layer):
    """A layer of somebody's own around another, which is an attribute and a child."""

    def __init__(self) -> None:
        self.inner = Linear(None, 2)
        self.adopt("inner", self.inner)

    def infer(self, shape: Any) -> Any:
        return self.inner.plan(shape, self.child_path("inner"))

    def forward(self, x: Any, *, train: bool = False, keep: bool = True) -> Any:
        y, cache = self.inner.forward(x, train=train, keep=keep)
        return 2 * y, cache

    def backward(self, dy: Any, cache: Any, *, need_dx: bool = True) -> Any:
        return self.inner.backward(2 * dy, cache, need_dx=need_dx)


def test_assignment_is_refused_in_a_layer_of_ones_own():
    """Once it is built; ``replace`` changes the attribute with the child."""
    model = Model(scaled=Scaled())
    model.build((4,), seed=0)
    refuses(
        StateError, "'inner'", "replace", call=lambda: setattr(model.scaled, "inner", Linear(4, 3))
    )
    refuses(StateError, "'inner'", call=lambda: delattr(model.scaled, "inner"))
    model.replace("scaled.inner", Linear(None, 3))
    assert tuple(model.predict(np.zeros((1, 4), np.float32)).shape) == (1, 3)


class Own(Model):
    """One that keeps a layer as an attribute, too."""

    def __init__(self) -> None:
        self.head = Linear(None, 4)
        super().__init__(flatten=Flatten(), head=self.head)


def test_an_attribute_follows():
    model = Own().build((1, 8, 8), seed=0)
    model.replace("head", Linear(None, 3))
    assert model.head is model.children["head"]
    assert model.head.out_features == 3


def test_a_network_that_is_not_built_yet():
    model = Model(a=Sequential(Linear(None, 3), ReLU()), b=Residual(Linear(3, 3)))
    model.replace("a.0", Linear(None, 3, bias=False))
    model.replace("b.body", Sequential(fc=Linear(3, 3)))
    assert list(model.build((4,), seed=0).state_dict()) == [
        "a.0.weight",
        "b.fc.weight",
        "b.fc.bias",
    ]


def test_a_place_of_a_shared_layer():
    fc = Linear(3, 3)
    model = Model(a=fc, act=ReLU(), b=fc).build((3,), seed=0)
    before = model.state_dict()["a.weight"]
    model.replace("a", Linear(3, 3))
    assert model.children["b"] is fc
    assert list(model.state_dict()) == ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert np.array_equal(model.state_dict()["b.weight"], before)


def test_a_part_is_asked(backend: Here):
    """``replace`` of a layer inside means the network."""
    model = net(device=backend.device)
    model.children["stem"].replace("relu", Tanh())
    assert isinstance(model.layer_at("stem.relu"), Tanh)
    assert model.revision == 2


# --- who trained the network before ---------------------------------------------------------------


def test_a_trainer_of_before_says_so(backend: Here):
    model = net(device=backend.device)
    run = Trainer(model, *patches(8), *patches(8), epochs=1, mini_batch_size=4, verbose=False)
    model.replace("stem.relu", Tanh())
    refuses(StateError, "make a new Trainer", call=run.train)
    refuses(
        StateError,
        "make a new Trainer",
        call=lambda: run.run_batch(model.backend.asarray(np.arange(4))),
    )
    Trainer(model, *patches(8), *patches(8), epochs=1, mini_batch_size=4, verbose=False).train()


@pytest.mark.parametrize("make", [lambda: SGD(0.1, momentum=0.9), Adam], ids=["momentum", "adam"])
def test_an_optimizer_of_before_says_so(backend: Here, make: Any):
    model, optimizer, (x, t) = net(device=backend.device), make(), patches(8)
    optimizer.update(model.named_parameters(), model.gradient(x, t))
    model.replace("fc", Linear(None, 5))
    words = ("fc.weight", "(5, 48)", "(4, 48)", "new optimizer")
    gradients = model.gradient(x, t)
    before = bits(model)
    refuses(StateError, *words, call=lambda: optimizer.update(model.named_parameters(), gradients))
    assert bits(model) == before
    make().update(model.named_parameters(), gradients)
