"""Layers that run as one op: nothing of it may be seen but the time it takes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from portacnn import Model, load, ops
from portacnn.errors import PortacnnError, StateError
from portacnn.layers import (
    Arithmetic,
    BatchNorm2d,
    Conv1d,
    Conv2d,
    Conv3d,
    Dropout,
    Flatten,
    Graph,
    Linear,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
    ReLU,
    Residual,
    Sequential,
    Sigmoid,
    at_step,
)
from support.checks import agree, normal, refuses, with_each_kernel
from support.matrix import Here


class OwnConv(Conv2d):
    pass


class OwnReLU(ReLU):
    pass


class OwnPool(MaxPool2d):
    pass


class OwnLinear(Linear):
    pass


def names(*layers: Any) -> list[str]:
    """What runs as one, by the layers' places."""
    return [getattr(stage, "name", "-") for stage in Sequential(*layers).stages]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([Conv2d(1, 2, 3), ReLU(), MaxPool2d(2)], ["0 + 1 + 2"]),
        ([Conv1d(1, 2, 3), ReLU(), MaxPool1d(2)], ["0 + 1 + 2"]),
        ([Conv3d(1, 2, 3), ReLU(), MaxPool3d(2)], ["0 + 1 + 2"]),
        ([Conv2d(1, 2, 3), ReLU(), Conv2d(2, 2, 3), ReLU(), MaxPool2d(2)], ["0 + 1", "2 + 3 + 4"]),
        ([Linear(3, 2), ReLU(), Linear(2, 2)], ["0 + 1", "-"]),
        ([Linear(3, 2), ReLU(), MaxPool2d(2)], ["0 + 1", "-"]),
        ([Conv2d(1, 2, 3), ReLU(), MaxPool1d(2)], ["0 + 1", "-"]),
        ([Conv2d(1, 2, 3), ReLU(), ReLU()], ["0 + 1", "-"]),
        ([Conv2d(1, 2, 3), MaxPool2d(2), ReLU()], ["-"] * 3),
        ([Conv2d(1, 2, 3), Sigmoid(), ReLU()], ["-"] * 3),
        ([ReLU(), MaxPool2d(2), Conv2d(1, 2, 3)], ["-"] * 3),
        ([OwnConv(1, 2, 3), ReLU(), MaxPool2d(2)], ["-"] * 3),
        ([Conv2d(1, 2, 3), OwnReLU(), MaxPool2d(2)], ["-"] * 3),
        ([Conv2d(1, 2, 3), ReLU(), OwnPool(2)], ["0 + 1", "-"]),
        ([OwnLinear(3, 2), ReLU()], ["-"] * 2),
        ([Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), ReLU(), MaxPool2d(2)], ["-"] * 3),
        ([], []),
    ],
)
def test_what_runs_as_one(layers: list[Any], expected: list[str]):
    assert names(*layers) == expected


def net(here: Here, dtype: str = "float64") -> Model:
    model = Model(
        conv1=Conv2d(2, 3, 3, padding=1),
        relu1=ReLU(),
        pool1=MaxPool2d(2),
        conv2=Conv2d(3, 4, 3, stride=2, padding=1, bias=False),
        relu2=ReLU(),
        conv3=Conv2d(4, 4, 2, padding=1),
        relu3=ReLU(),
        pool3=MaxPool2d(2, 1, 1),
        flatten=Flatten(),
        fc1=Linear(None, 6),
        relu4=ReLU(),
        dropout=Dropout(0.5),
        fc2=Linear(6, 3),
    )
    return model.build((2, 8, 9), device=here.device, dtype=dtype, seed=0)


def one_by_one(model: Model, x: Any, train: bool) -> Any:
    caches = []
    for layer in model.children.values():
        x, cache = layer.forward(x, train=train)
        caches.append(cache)
    return x, caches


def back_one_by_one(model: Model, dy: Any, caches: list[Any]) -> Any:
    for layer, cache in zip(reversed(model.children.values()), reversed(caches), strict=True):
        dy = layer.backward(dy, cache)
    return dy


X, T = normal(5, 2, 8, 9), np.array([0, 1, 2, 1, 0])


@pytest.mark.parametrize("train", [False, True])
@with_each_kernel
def test_logits_losses_and_gradients_are_those_of_the_layers_one_by_one(backend: Here, train: bool):
    fused, plain, x, t = net(backend), net(backend), backend.array(X), backend.array(T)
    assert len(fused.stages) < len(fused.children)
    for step in range(3):  # later gradients are written into the same arrays
        with at_step(step):
            logits, kept = fused.forward(x, train=train)
        with at_step(step):
            expected, caches = one_by_one(plain, x, train)
        agree(backend, logits, backend.host(expected), x)
        loss, cache = ops.softmax_cross_entropy(logits, t)
        loss2, cache2 = ops.softmax_cross_entropy(expected, t)
        agree(backend, loss, backend.host(loss2), x)
        dx = fused.backward(ops.softmax_cross_entropy_backward(1.0, cache), kept)
        dx2 = back_one_by_one(plain, ops.softmax_cross_entropy_backward(1.0, cache2), caches)
        agree(backend, dx, backend.host(dx2), x)
        gradients, expected_gradients = fused.named_gradients(), plain.named_gradients()
        assert list(gradients) == list(expected_gradients) == list(fused.named_parameters())
        for path, gradient in gradients.items():
            agree(backend, gradient, backend.host(expected_gradients[path]), x)


@with_each_kernel
def test_without_a_wish_for_dx_the_parameters_gradients_are_the_same(backend: Here):
    model, x = net(backend), backend.array(X)
    dy = backend.array(normal(5, 3))
    _, cache = model.forward(x)
    assert model.backward(dy, cache, need_dx=False) is None
    found = {path: backend.host(gradient) for path, gradient in model.named_gradients().items()}
    _, cache = model.forward(x)
    assert model.backward(dy, cache) is not None
    for path, gradient in model.named_gradients().items():
        agree(backend, gradient, found[path], x)


def test_paths_and_files_are_those_of_the_layers(backend: Here, tmp_path: Any):
    model = net(backend, "float32")
    paths = [
        f"{layer}.{name}"
        for layer in ("conv1", "conv2", "conv3", "fc1", "fc2")
        for name in ("weight", "bias")
    ]
    paths.remove("conv2.bias")
    assert list(model.state_dict()) == list(model.named_parameters()) == paths
    listed = [words[0] for line in model.summary().splitlines() if (words := line.split())]
    assert set(model.children) <= set(listed)
    model.save(tmp_path / "net.safetensors")
    again = load(tmp_path / "net.safetensors", device=backend.device)
    assert [getattr(stage, "name", None) for stage in again.stages] == [
        getattr(s, "name", None) for s in model.stages
    ]
    assert list(again.state_dict()) == paths
    x = backend.array(X, "float32")
    agree(backend, again.predict(x), backend.host(model.predict(x)), x)
    assert repr(again) == repr(model)


def test_what_is_put_beside_layers_changes_nothing(backend: Here):
    """The same layers, one of them in a Sequential of its own: not together any more, and the
    numbers are the same."""
    inner = Sequential(conv=Conv2d(2, 3, 3), relu=ReLU())
    outer = Model(inner, MaxPool2d(2), Flatten(), Linear(None, 3)).build(
        (2, 8, 9), device=backend.device, seed=0
    )
    flat = Model(Conv2d(2, 3, 3), ReLU(), MaxPool2d(2), Flatten(), Linear(None, 3))
    flat.build((2, 8, 9), device=backend.device, seed=1)
    assert [len(model.stages) for model in (outer, flat)] == [4, 3]
    flat.load_state_dict(dict(zip(flat.state_dict(), outer.state_dict().values(), strict=True)))
    x = backend.array(X, "float32")
    agree(backend, flat(x), backend.host(outer(x)), x)


# --- caches and errors ----------------------------------------------------------------------------


def raised(call: Callable[[], Any]) -> PortacnnError:
    with pytest.raises(PortacnnError) as caught:
        call()
    return caught.value


def test_errors_name_the_layer_that_has_the_parameters(backend: Here):
    model = net(backend, "float32")
    wrong_channels = backend.array(normal(2, 3, 8, 9), "float32")
    message = str(raised(lambda: model(wrong_channels)))
    assert "conv1 (Conv2d)" in message
    assert "2 input channels, got 3" in message
    small = backend.array(normal(2, 2, 1, 1), "float32")
    message = str(raised(lambda: model(small)))
    assert "conv1 (Conv2d)" in message
    assert "kernel 2x2 is larger than the input 1x1" in message
    short = backend.array(normal(2, 2, 8, 4), "float32")
    message = str(raised(lambda: model(short)))
    assert "fc1 (Linear)" in message
    assert "input features" in message
    integers = backend.array(np.ones((1, 2, 8, 9)), "int32")
    assert "conv1 (Conv2d)" in str(raised(lambda: model(integers)))


def test_a_stage_that_is_not_built_says_so():
    refuses(
        StateError,
        "not built yet",
        call=lambda: Sequential(Conv2d(1, 2, 3), ReLU())(np.ones((1, 1, 4, 4))),
    )
    refuses(
        StateError, "not built yet", call=lambda: Sequential(Linear(3, 2), ReLU())(np.ones((1, 3)))
    )


def test_a_cache_is_used_once(backend: Here):
    model, x = net(backend), backend.array(X)
    dy = backend.array(normal(5, 3))
    _, nothing = model.forward(x, keep=False)
    refuses(StateError, "Model", "keep=True", call=lambda: model.backward(dy, nothing))
    features = Sequential(conv=Conv2d(2, 3, 3), relu=ReLU()).build(
        (2, 8, 9), device=backend.device, dtype="float64"
    )
    y, cache = features.forward(x)
    features.backward(y, cache)
    refuses(StateError, "Sequential", "has been used", call=lambda: features.backward(y, cache))


def test_another_forward_leaves_what_was_kept(backend: Here):
    model, x = net(backend), backend.array(X)
    dy = backend.array(normal(5, 3))
    _, cache = model.forward(x)
    model.backward(dy, cache)
    expected = {path: backend.host(gradient) for path, gradient in model.named_gradients().items()}
    _, cache = model.forward(x)
    model.forward(backend.array(X[:2]))  # a cache that nobody wants
    model.backward(dy, cache)
    for path, gradient in model.named_gradients().items():
        agree(backend, gradient, expected[path], x)


def test_a_stage_after_the_layer_moved(backend: Here):
    """``to`` makes new arrays: the stage asks the layer for them."""
    model, x = net(backend, "float32"), backend.array(X, "float32")
    before = backend.host(model(x))
    model.to("numpy")
    np.testing.assert_allclose(model(X.astype("float32")), before, rtol=1e-4, atol=1e-5)
    model.to(backend.device)
    agree(backend, model(x), before, x)


def test_an_observed_layer_runs_by_itself(backend: Here):
    """A hook sees a layer's output, in training and in predictions of one image, and changes
    nothing."""
    x, t = normal(3, 1, 8, 8).astype("float32"), np.asarray([0, 1, 2])
    net = Model(
        conv=Conv2d(1, 4, 3), relu=ReLU(), pool=MaxPool2d(2), flatten=Flatten(), fc=Linear(None, 3)
    )
    net.build((1, 8, 8), device=backend.device, seed=0)
    gradients = {path: backend.host(array) for path, array in net.gradient(x, t).items()}
    alone = backend.host(net.predict(x[:1]))
    seen: list[Any] = []
    handle = net.children["relu"].on_output(lambda y: seen.append(backend.host(y)))
    plain = np.maximum(backend.host(net.children["conv"](backend.array(x))), 0)
    np.testing.assert_allclose(backend.host(net.predict(x[:1])), alone, rtol=1e-5, atol=1e-6)
    assert [tuple(y.shape) for y in seen] == [(1, 4, 6, 6)]
    for path, array in net.gradient(x, t).items():
        np.testing.assert_allclose(backend.host(array), gradients[path], rtol=1e-4, atol=1e-6)
    assert len(seen) == 2
    np.testing.assert_allclose(seen[1], plain, rtol=1e-5, atol=1e-6)
    handle.remove()
    handle.remove()  # the second time does nothing
    net.predict(x[:1])
    assert len(seen) == 2


def test_each_handle_ends_its_own_calls():
    """A function that was given twice is called twice, until both of its handles are removed."""
    layer, seen = ReLU().build((2,), device="numpy"), []
    first, second = layer.on_output(seen.append), layer.on_output(seen.append)
    calls = []
    for act in (lambda: None, first.remove, first.remove, second.remove):
        act()
        seen.clear()
        layer(np.ones((1, 2), np.float32))
        calls.append(len(seen))
    assert calls == [2, 1, 1, 0]


BLOCKS: dict[str, Callable[[], Any]] = {
    "convolution": lambda: Sequential(Conv2d(2, 2, 3), ReLU(), MaxPool2d(2)),
    "norm": lambda: Sequential(BatchNorm2d(2), ReLU()),
    "linear": lambda: Sequential(Flatten(), Linear(None, 3), ReLU()),
    "residual": lambda: Residual(Conv2d(2, 2, 3, padding=1), activation=ReLU()),
    "graph": lambda: Graph(
        ("a", Conv2d(2, 2, 3, padding=1), ["input"]),
        ("b", ReLU(), ["a"]),
        ("c", Arithmetic("add"), ["b", "input"]),
        ("d", ReLU(), ["c"]),
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_hook_between_forward_and_backward_changes_nothing(backend: Here, name: str):
    """A cache belongs to its forward pass: whether layers ran as one is that pass's business."""
    block = BLOCKS[name]().build((2, 6, 7), device=backend.device, dtype="float64", seed=0)
    x = backend.array(normal(3, 2, 6, 7))

    def observe() -> list[Any]:
        return [layer.on_output(lambda y: None) for layer in block.walk()]

    def gradients(before: bool, after: bool) -> dict[str, np.ndarray]:
        """With hooks in the forward pass or not, and in the backward pass or not."""
        handles = observe() if before else []
        y, cache = block.forward(x)
        if before and not after:
            for handle in handles:
                handle.remove()
        handles += observe() if after and not before else []
        dx = block.backward(backend.array(normal(*y.shape, seed=1)), cache)
        for handle in handles:
            handle.remove()
        found = {"dx": dx, **block.named_gradients()}
        return {path: backend.host(array) for path, array in found.items()}

    expected = gradients(False, False)
    for hooked in ((False, True), (True, False), (True, True), (False, False)):
        found = gradients(*hooked)
        assert found.keys() == expected.keys()
        for path, gradient in found.items():
            np.testing.assert_allclose(gradient, expected[path], rtol=1e-10, atol=1e-12)
