"""Gradients for the input and for a layer, saliency, Grad-CAM: against finite differences and
PyTorch's autograd."""

from threading import Thread

import numpy as np
import pytest

import portacnn
from portacnn.errors import ArgumentError, LabelError, ShapeError, StateError
from portacnn.layers import (
    BatchNorm2d,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    Recompute,
    ReLU,
    Residual,
    Sequential,
)
from portacnn.models import GraphModel, Model, grad_cam, input_gradient, layer_gradient, saliency
from support.matrix import EACH_LIBRARY, needs

pytestmark = EACH_LIBRARY
X = np.random.default_rng(5).normal(size=(3, 2, 8, 8))
CLASSES = [2, 0, 1]


def net(device, **options):
    """A convolution that is fused with what follows, a block with a shortcut, a head."""
    body = Sequential(conv=Conv2d(4, 4, 3, padding=1), bn=BatchNorm2d(4))
    layers = {
        "conv1": Conv2d(2, 4, 3, padding=1),
        "relu1": ReLU(),
        "pool1": MaxPool2d(2),
        "block": Residual(body, activation=ReLU()),
        "flatten": Flatten(),
        "fc": Linear(None, 3),
    }
    return Model(**layers).build((2, 8, 8), device=device, dtype="float64", seed=1, **options)


def agrees_with_slopes(gradient, function, at, h=1e-6):
    """Whether a gradient is right along some directions, by finite differences of the function."""
    rng, found = np.random.default_rng(7), []
    for _ in range(6):
        v = rng.normal(size=at.shape) * (rng.random(at.shape) < 0.5)
        slope = (function(at + h * v) - function(at - h * v)) / (2 * h)
        found.append(np.isclose(slope, (gradient * v).sum(), rtol=1e-5, atol=1e-7))
    return all(found)


def test_input_gradient_agrees_with_finite_differences(backend):
    model = net(backend.device)
    found = backend.host(input_gradient(model, backend.array(X), CLASSES, batch_size=2))
    assert found.shape == X.shape

    def chosen(x):
        y = backend.host(model.predict(backend.array(x)))
        return y[np.arange(3), CLASSES].sum()

    assert agrees_with_slopes(found, chosen, X)


@pytest.mark.parametrize("path", ["conv1", "block", "block.bn", "block.activation", "fc"])
def test_layer_gradient_agrees_with_finite_differences(backend, path):
    """Of layers that run fused with others, and within a block."""
    model = net(backend.device)
    x = backend.array(X[:1])
    features, gradient = map(backend.host, layer_gradient(model, x, path, 1))
    np.testing.assert_allclose(features, backend.host(model.features(x, path)), rtol=1e-12)
    shortcut = backend.host(model.features(x, "pool1"))

    def rest(y):
        layers = {name: model.children[name] for name in ("pool1", "flatten", "fc")}
        y = backend.array(y)
        if path == "conv1":
            y = model.children["block"](layers["pool1"](model.children["relu1"](y)))
        if path == "block.bn":
            y = ReLU().build(y.shape[1:], device=backend.device)(y + backend.array(shortcut))
        if path != "fc":
            y = layers["fc"](layers["flatten"](y))
        return float(backend.host(y)[0, 1])

    assert agrees_with_slopes(gradient, rest, features)


def test_nothing_is_changed(backend):
    model = net(backend.device)
    x = backend.array(X)
    model.backward(model.forward(x)[0] * 0.0 + 1.0, model.forward(x)[1])
    grads = {name: backend.host(g).copy() for name, g in model.named_gradients().items()}
    state = model.state_dict()
    model.freeze()
    before = backend.host(input_gradient(model, x, 0))
    model.unfreeze()
    assert np.array_equal(before, backend.host(input_gradient(model, x, 0)))
    layer_gradient(model, x, "conv1", 1)
    for name, grad in model.named_gradients().items():
        assert np.array_equal(grads[name], backend.host(grad))
    for name, array in model.state_dict().items():
        assert np.array_equal(state[name], array)
    assert all(layer.hooks == () for layer in model.walk())


def test_a_layer_in_two_places_is_found_by_each_path(backend):
    shared = Conv2d(2, 2, 3, padding=1)
    model = GraphModel(
        ("a", shared, ["input"]),
        ("relu", ReLU(), ["a"]),
        ("b", shared, ["relu"]),
        ("pool", GlobalAvgPool(), ["b"]),
    )
    model.build((2, 4, 4), device=backend.device, dtype="float64", seed=0)
    x = backend.array(X[:1, :, :4, :4])
    later = layer_gradient(model, x, "b", 1)[1]
    mean = np.zeros((1, 2, 4, 4))
    mean[:, 1] = 1 / 16
    assert np.allclose(backend.host(later), mean)
    features, first = map(backend.host, layer_gradient(model, x, "a", 1))
    relu = ReLU().build((2, 4, 4), device=backend.device)

    def rest(y):
        return float(backend.host(shared(relu(backend.array(y))))[0, 1].mean())

    assert agrees_with_slopes(first, rest, features)


def test_within_a_part_that_is_recomputed(backend):
    def made(wrap):
        inner = Sequential(conv=Conv2d(2, 3, 3), relu=ReLU(), last=Conv2d(3, 2, 1))
        model = Model(part=wrap(inner), pool=GlobalAvgPool())
        return model.build((2, 8, 8), device=backend.device, dtype="float64", seed=3)

    x = backend.array(X)
    for path in ("part.relu", "part.last"):
        one, other = (layer_gradient(made(w), x, path, 0) for w in (Recompute, lambda p: p))
        for a, b in zip(one, other, strict=True):
            assert np.allclose(backend.host(a), backend.host(b))


def test_grad_cam_and_saliency_agree_with_their_formulas(backend):
    model = net(backend.device)
    x = backend.array(X)
    features, gradient = map(backend.host, layer_gradient(model, x, "block.activation", CLASSES))
    seen = np.einsum("nc,nchw->nhw", gradient.mean((2, 3)), features).clip(0)
    most = seen.max((1, 2), keepdims=True)
    expected = np.divide(seen, most, out=np.zeros_like(seen), where=most > 0)
    for path in (None, "block.activation"):
        assert np.allclose(backend.host(grad_cam(model, x, path, CLASSES)), expected)
    expected = np.abs(backend.host(input_gradient(model, x, CLASSES))).max(1)
    assert np.array_equal(backend.host(saliency(model, x, CLASSES)), expected)


def test_the_class_is_the_largest_output_unless_one_is_chosen(backend):
    model = net(backend.device)
    x = backend.array(X)
    best = backend.host(model.predict(x)).argmax(1)
    chosen = backend.array(best.astype("int64"))
    assert np.array_equal(
        backend.host(input_gradient(model, x)), backend.host(input_gradient(model, x, chosen))
    )


def test_the_output_of_a_map_is_the_sum_over_it(backend):
    """The gradient of the sum over a class's map."""
    model = Model(conv=Conv2d(2, 3, 1)).build((2, 4, 4), device=backend.device, seed=0)
    found = backend.host(input_gradient(model, backend.array(X[:, :, :4, :4], "float32"), 2))
    weight = model.state_dict()["conv.weight"][2, :, 0, 0]
    assert np.allclose(found, np.broadcast_to(weight[None, :, None, None], found.shape))


def test_uint8_images_are_preprocessed(backend):
    model = net(backend.device)
    model.preprocess = portacnn.Normalize()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 2, 8, 8)).astype("uint8")
    floats = backend.array(pixels / 255)
    assert np.allclose(
        backend.host(input_gradient(model, backend.array(pixels), 0)),
        backend.host(input_gradient(model, floats, 0)),
    )


def test_threads_do_not_disturb_each_other(backend):
    """Each thread watches its own pass."""
    model, found = net(backend.device), {}
    x = backend.array(X)
    expected = {p: layer_gradient(model, x, p, 0)[1] for p in ("conv1", "block.bn")}

    def work(path):
        found[path] = [layer_gradient(model, x, path, 0)[1] for _ in range(5)]

    threads = [Thread(target=work, args=(path,)) for path in expected]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for path, gradients in found.items():
        assert all(
            np.allclose(backend.host(expected[path]), backend.host(each)) for each in gradients
        )


@needs("torch")
def test_gradients_agree_with_pytorch(backend):
    """A whole ResNet, by autograd, for its input and for a block."""
    import torch

    model = portacnn.models.ResNet20(
        10, input_size=16, device=backend.device, dtype="float64", seed=0
    )
    state = {name: torch.tensor(array) for name, array in model.state_dict().items()}

    def bn(x, at):
        args = [state[f"{at}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        return torch.nn.functional.batch_norm(x, *args, eps=1e-5)

    def conv(x, at, stride=1):
        return torch.nn.functional.conv2d(x, state[f"{at}.weight"], stride=stride, padding=1)

    x = torch.tensor(np.random.default_rng(1).normal(size=(2, 3, 16, 16)), requires_grad=True)
    y = bn(conv(x, "conv1"), "bn1").relu()
    for stage in (1, 2, 3):
        for block in range(3):
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            inner = bn(conv(y, f"{at}.conv1", stride), f"{at}.bn1").relu()
            inner = bn(conv(inner, f"{at}.conv2"), f"{at}.bn2")
            short = y[:, :, ::stride, ::stride]
            more = (inner.shape[1] - short.shape[1]) // 2
            y = (inner + torch.nn.functional.pad(short, (0, 0, 0, 0, more, more))).relu()
            if at == "layer2.1":
                kept = y
                kept.retain_grad()
    logits = y.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    (logits[0, 3] + logits[1, 7]).backward()
    images = backend.array(x.detach().numpy())
    assert np.allclose(backend.host(input_gradient(model, images, [3, 7])), x.grad.numpy())
    features, gradient = layer_gradient(model, images, "layer2.1", [3, 7])
    assert np.allclose(backend.host(features), kept.detach().numpy())
    assert np.allclose(backend.host(gradient), kept.grad.numpy())


def test_what_cannot_be_done(backend):
    model = net(backend.device)
    x = backend.array(X)
    for classes, error in (([0, 1], LabelError), (3, LabelError), ([0, 1, -1], LabelError)):
        with pytest.raises(error, match=r"classes must be one of 0\.\.2 for each of 3 images"):
            input_gradient(model, x, classes)
    with pytest.raises(ArgumentError, match="at least one image"):
        input_gradient(model, x[:0, ...])
    with pytest.raises(ArgumentError, match="conv9"):
        layer_gradient(model, x, "conv9")
    with pytest.raises(ShapeError, match=r"fc \(Linear\): Grad-CAM needs a layer with an output"):
        grad_cam(model, x, "fc")
    with pytest.raises(StateError, match="not built"):
        input_gradient(Model(fc=Linear(2, 3)), x)
    flat = Model(fc=Linear(4, 3)).build((4,), device=backend.device)
    with pytest.raises(ShapeError, match="no layer with an output"):
        grad_cam(flat, backend.array(np.zeros((1, 4), "float32")))
