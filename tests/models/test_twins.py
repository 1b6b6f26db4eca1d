"""The published architectures against their PyTorch twins: keys, shapes, and a training step."""

from math import prod, sqrt

import numpy as np
import pytest

from portacnn.models import (
    VGG11,
    VGG16,
    AlexNet,
    DeepConvNet,
    EfficientNetB0,
    LeNet5,
    MobileNetV2,
    ResNet18,
    ResNet20,
    ResNet50,
    UNet,
)
from portacnn.runtime import resolve
from support.checks import normal, untouched
from support.matrix import Here, needs

# --- PyTorch twins --------------------------------------------------------------------------------


def cases():
    """name -> (model, its arguments, the twin of the module ``twins``, size of an image)."""
    few = {"num_classes": 7, "in_channels": 2}
    return {
        "lenet-classic": (LeNet5, few, lambda t: t.lenet5(7, 2, "classic", 2), 28),
        "lenet-classic-32": (LeNet5, few, lambda t: t.lenet5(7, 2, "classic", 0), 32),
        "lenet-modern": (
            LeNet5,
            {**few, "variant": "modern"},
            lambda t: t.lenet5(7, 2, "modern", 2),
            28,
        ),
        "deep": (
            DeepConvNet,
            {**few, "dropout": 0},
            lambda t: t.deep_conv_net(7, 2, dropout=0),
            28,
        ),
        "deep-other": (
            DeepConvNet,
            {**few, "dropout": 0, "hidden_size": 9},
            lambda t: t.deep_conv_net(7, 2, 576, 9, 0),
            (20, 23),
        ),
        "alexnet": (
            AlexNet,
            {**few, "hidden_size": 20, "dropout": 0},
            lambda t: t.alexnet(7, 2, 256, 20, 0),
            67,
        ),
        "vgg11": (
            VGG11,
            {**few, "hidden_size": 12, "dropout": 0},
            lambda t: t.VGG("A", 7, 2, False, 12, 0),
            32,
        ),
        "vgg11-bn": (
            VGG11,
            {**few, "hidden_size": 12, "dropout": 0, "batch_norm": True},
            lambda t: t.VGG("A", 7, 2, True, 12, 0),
            64,
        ),
        "vgg16": (
            VGG16,
            {**few, "hidden_size": 12, "dropout": 0},
            lambda t: t.VGG("D", 7, 2, False, 12, 0),
            32,
        ),
        "resnet20-a": (ResNet20, few, lambda t: t.ResNet20(7, 2, "A"), 16),
        "resnet20-b": (ResNet20, {**few, "option": "B"}, lambda t: t.ResNet20(7, 2, "B"), (15, 18)),
        "resnet18": (ResNet18, few, lambda t: t.ResNet(t.BasicBlock, (2, 2, 2, 2), 7, 2), 48),
        "mobilenet": (
            MobileNetV2,
            {**few, "width": 0.25, "dropout": 0},
            lambda t: t.MobileNetV2(7, 2, (8, 8, 8, 8, 16, 24, 40, 80, 1280)),
            32,
        ),
        "efficientnet": (
            EfficientNetB0,
            {**few, "dropout": 0, "stochastic_depth": 0},
            lambda t: t.EfficientNetB0(7, 2),
            32,
        ),
        "unet": (UNet, {**few, "width": 2}, lambda t: t.UNet(2, 7, 2), (16, 32)),
        "unet-bilinear": (
            UNet,
            {**few, "width": 2, "up": "bilinear"},
            lambda t: t.UNet(2, 7, 2, bilinear=True),
            (32, 16),
        ),
        "resnet50": (ResNet50, few, lambda t: t.ResNet(t.Bottleneck, (3, 4, 6, 3), 7, 2), 48),
    }


LARGE = {"vgg11", "vgg11-bn", "vgg16", "resnet18", "resnet50", "alexnet", "efficientnet"}


every_model = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in LARGE else ()) for n in cases()]
)


large_model = pytest.mark.parametrize("name", sorted(LARGE - {"resnet50", "vgg16", "vgg11-bn"}))


def twin(name, device, dtype="float64"):
    """(torch, our model, PyTorch's), with weights and statistics that went from theirs to ours,
    drawn as PyTorch draws."""
    import torch

    from support import twins

    kind, arguments, make, size = cases()[name]
    torch.manual_seed(0)
    theirs = make(twins).to(getattr(torch, dtype))
    with torch.no_grad():
        # what starts as zeros and ones, and what would fade
        for key, value in theirs.state_dict().items():
            if (
                (value.ndim <= 1 and value.is_floating_point())
                or "s2" in key
                or "s4" in key
                or "c3" in key
            ):
                value.copy_(0.5 + torch.rand(value.shape))
            elif value.ndim > 1:
                value.copy_(torch.randn(value.shape) * sqrt(2 / prod(value.shape[1:])))
    ours = kind(**arguments, input_size=size, device=device, dtype=dtype, seed=0)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict({key: value.numpy() for key, value in theirs.state_dict().items()})
    return torch, ours, theirs


FULL_SIZE = {
    "alexnet": (AlexNet, {}, lambda t: t.alexnet(1000, 3)),
    "vgg11": (VGG11, {}, lambda t: t.VGG("A", 1000, 3, False)),
    "vgg16": (VGG16, {}, lambda t: t.VGG("D", 1000, 3, False)),
    "vgg16-bn": (VGG16, {"batch_norm": True}, lambda t: t.VGG("D", 1000, 3, True)),
    "resnet18": (ResNet18, {}, lambda t: t.ResNet(t.BasicBlock, (2, 2, 2, 2), 1000, 3)),
    "resnet50": (ResNet50, {}, lambda t: t.ResNet(t.Bottleneck, (3, 4, 6, 3), 1000, 3)),
    "mobilenet": (MobileNetV2, {}, lambda t: t.MobileNetV2(1000, 3)),
    "efficientnet": (EfficientNetB0, {}, lambda t: t.EfficientNetB0(1000, 3)),
    "unet": (UNet, {}, lambda t: t.UNet(3, 2)),
    "unet-bilinear": (UNet, {"up": "bilinear"}, lambda t: t.UNet(3, 2, bilinear=True)),
}


@needs("torch")
@pytest.mark.parametrize("name", FULL_SIZE)
def test_keys_and_shapes_are_those_of_torchvision(only_planned, name):
    import torch

    from support import twins

    kind, arguments, make = FULL_SIZE[name]
    ours = kind(**arguments)
    with torch.device("meta"):
        theirs = make(twins)
    declared = {
        f"{layer.path}.{name}": spec.shape
        for layer in ours.walk()
        for specs in (layer.declared, layer.declared_buffers)
        for name, spec in specs.items()
    }
    assert list(declared.items()) == [
        (key, tuple(value.shape)) for key, value in theirs.state_dict().items()
    ]
    if name.startswith("vgg"):
        for part in ("features", "classifier"):
            kinds = [type(layer).__name__ for layer in ours.children[part].children.values()]
            assert kinds == [type(layer).__name__ for layer in getattr(theirs, part)]


def compare(here, name, tolerance=1e-9, count=4):
    """A training step and a look afterwards, with the weights of one in the other."""
    torch, ours, theirs = twin(name, here.device)
    host = normal(count, *ours.input_shape)
    up = normal(count, *ours.output_shape, seed=1) / count
    x = here.array(host)

    def close(got, expected, what):
        expected = expected.detach().numpy()
        limit = tolerance * max(1.0, np.abs(expected).max(initial=0.0))
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=limit, err_msg=what)

    leaf = torch.tensor(host, requires_grad=True)
    expected = theirs.train()(leaf)
    expected.backward(torch.tensor(up))
    with untouched(here, x):
        logits, kept = ours.forward(x, train=True)
        close(here.host(logits), expected, "logits, train")
        dx = ours.backward(here.array(up), kept)
    close(here.host(dx), leaf.grad, "dx")
    grads = ours.named_gradients()
    for path, parameter in theirs.named_parameters():
        close(here.host(grads[path]), parameter.grad, path)
    state = ours.state_dict()
    for path, value in theirs.state_dict().items():  # running statistics
        close(state[path], value, path)
    # The other way round: ours into the twin, which has lost its own.
    ours.load_state_dict(
        {path: value * 0.9 if value.dtype.kind == "f" else value for path, value in state.items()}
    )
    theirs.load_state_dict(
        {key: torch.tensor(value) for key, value in ours.state_dict().items()}, strict=True
    )
    close(here.host(ours.predict(x)), theirs.eval()(torch.tensor(host)), "logits")


@needs("torch")
@every_model
def test_a_step_agrees_with_the_twin(backend: Here, name):
    compare(backend, name)


@needs("torch")
@large_model
def test_a_step_of_a_large_model_agrees_with_the_twin(name):
    compare(Here("numpy", resolve("numpy")), name)


@needs("torch")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["alexnet", "vgg16", "resnet50"])
@pytest.mark.parametrize("device", ["numpy", "torch"])
def test_a_full_size_image_agrees_with_the_twin(name, device):
    """A photograph's size through the whole thing, in float32, and with all its weights."""
    import torch

    from support import twins

    kind, _, make = FULL_SIZE[name]
    ours = kind(seed=0, device=device)
    with torch.device("meta"):
        theirs = make(twins)
    theirs.load_state_dict(
        {k: torch.from_numpy(v) for k, v in ours.state_dict().items()}, strict=True, assign=True
    )
    x = normal(1, 3, 224, 224).astype("float32")
    got = ours.backend.to_host(ours.predict(x))
    expected = theirs.eval()(torch.from_numpy(x)).detach().numpy()
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
