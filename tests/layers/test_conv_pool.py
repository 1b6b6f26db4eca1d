"""Convolution and pooling layers: their numbers against torch.nn's, and what their constructors
refuse."""

from typing import Any

import numpy as np
import pytest

from portacnn import layers
from portacnn.errors import ArgumentError, ShapeError
from support.checks import normal, refuses
from support.matrix import Here, needs

# name, arguments, keywords, sample shape. The names are torch.nn's, and so are the arguments.
LAYERS = [
    ("Conv1d", (2, 4, 3), {"stride": 2, "padding": 1}, (2, 7)),
    ("Conv1d", (2, 4, 3, 1, 2), {"padding_mode": "circular"}, (2, 5)),
    (
        "Conv2d",
        (2, 4, (2, 3)),
        {"padding": (1, 2), "padding_mode": "reflect", "groups": 2},
        (2, 4, 5),
    ),
    ("Conv2d", (1, 2, 4), {"padding": "same", "padding_mode": "replicate"}, (1, 4, 3)),
    (
        "Conv3d",
        (2, 3, 2),
        {"stride": (1, 2, 1), "dilation": (2, 1, 1), "bias": False},
        (2, 4, 4, 3),
    ),
    ("Conv3d", (1, 2, 3), {"padding": 1, "padding_mode": "replicate"}, (1, 2, 3, 2)),
    ("ConvTranspose1d", (2, 3, 3, 2, 1, 1), {}, (2, 4)),
    (
        "ConvTranspose2d",
        (4, 6, 3),
        {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2},
        (4, 3, 2),
    ),
    ("ConvTranspose2d", (2, 1, 2), {"bias": False, "dilation": 2}, (2, 2, 2)),
    ("ConvTranspose3d", (2, 2, 2, (2, 1, 2)), {}, (2, 2, 2, 1)),
    ("MaxPool1d", (2,), {}, (2, 5)),
    ("MaxPool2d", (3, 2, 1), {"dilation": 2, "ceil_mode": True}, (2, 8, 9)),
    ("MaxPool3d", (2,), {"stride": 1}, (1, 3, 3, 2)),
    ("AvgPool1d", (3, 2, 1), {"count_include_pad": False}, (2, 6)),
    ("AvgPool2d", (2,), {"divisor_override": 3}, (2, 4, 4)),
    ("AvgPool3d", ((2, 1, 2),), {"ceil_mode": True}, (1, 3, 2, 3)),
    ("AdaptiveAvgPool1d", (3,), {}, (2, 5)),
    ("AdaptiveAvgPool2d", ((None, 2),), {}, (2, 3, 5)),
    ("AdaptiveAvgPool3d", (2,), {}, (1, 3, 4, 2)),
    ("AdaptiveMaxPool1d", (2,), {}, (1, 3)),
    ("AdaptiveMaxPool2d", ((2, 3),), {}, (2, 5, 4)),
    ("AdaptiveMaxPool3d", ((1, 2, 3),), {}, (1, 2, 4, 3)),
]
every_layer = pytest.mark.parametrize(
    ("name", "args", "kwargs", "shape"), LAYERS, ids=[entry[0] for entry in LAYERS]
)


@needs("torch")
@every_layer
def test_values_and_gradients_agree_with_pytorch(
    backend: Here, name: str, args: tuple, kwargs: dict, shape: tuple
):
    import torch

    layer = getattr(layers, name)(*args, **kwargs).build(
        shape, device=backend.device, dtype="float64", seed=3
    )
    twin = getattr(torch.nn, name)(*args, **kwargs).double()
    twin.load_state_dict(
        {path: torch.tensor(value) for path, value in layer.state_dict().items()}, strict=True
    )
    host = normal(2, *shape)
    leaf = torch.tensor(host, requires_grad=True)
    expected = twin(leaf)
    dy = normal(*expected.shape, seed=1)
    expected.backward(torch.tensor(dy))
    y, cache = layer.forward(backend.array(host), train=True)
    dx = layer.backward(backend.array(dy), cache)
    assert tuple(y.shape) == (2, *layer.output_shape)
    np.testing.assert_allclose(backend.host(y), expected.detach().numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(backend.host(dx), leaf.grad.numpy(), rtol=1e-9, atol=1e-12)
    for path, parameter in twin.named_parameters():
        np.testing.assert_allclose(
            backend.host(layer.grads[path]), parameter.grad.numpy(), rtol=1e-9, atol=1e-12
        )
    assert layer(backend.array(host)) is not None  # evaluation keeps nothing
    assert layer.forward(backend.array(host), keep=False)[1] is None


@pytest.mark.parametrize(("name", "bound"), [("Conv1d", 6), ("ConvTranspose1d", 12)])
def test_weights_start_as_in_pytorch(name: str, bound: int):
    """Uniform within 1 / sqrt(fan_in), where PyTorch counts fan_in on the weight's second axis."""
    layer = getattr(layers, name)(2, 4, 3).build((2, 5), seed=0)
    for value in layer.state_dict().values():
        assert 0.3 * bound**-0.5 < np.abs(value).max() <= bound**-0.5


def test_padding_mode_with_uneven_pads(backend: Here):
    layer = layers.Conv2d(1, 1, 2, padding=((1, 0), (0, 2)), padding_mode="reflect", bias=False)
    layer.build((1, 3, 4), device=backend.device, dtype="float64", seed=0)
    host = normal(2, 1, 3, 4)
    y, cache = layer.forward(backend.array(host), train=True)
    y = backend.host(y)
    weight = layer.state_dict()["weight"][0, 0]
    wide = np.pad(host[:, 0], ((0, 0), (1, 0), (0, 2)), "reflect")
    expected = sum(
        weight[i, j] * wide[:, i : i + y.shape[2], j : j + y.shape[3]]
        for i in (0, 1)
        for j in (0, 1)
    )
    np.testing.assert_allclose(y[:, 0], expected, rtol=1e-12)
    assert layer.backward(backend.array(np.ones(y.shape)), cache, need_dx=False) is None


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (3, 2, 4, 3)])
@pytest.mark.parametrize("name", ["GlobalAvgPool", "GlobalMaxPool"])
def test_global_pools(backend: Here, name: str, shape: tuple):
    host = normal(2, *shape)
    flat = host.reshape(2, 3, -1)
    expected = flat.mean(axis=2) if name == "GlobalAvgPool" else flat.max(axis=2)
    dx = []
    for flatten in (False, True):
        layer = getattr(layers, name)(flatten=flatten).build(
            shape, device=backend.device, dtype="float64"
        )
        y, cache = layer.forward(backend.array(host), train=True)
        assert layer.output_shape == ((3,) if flatten else (3, *(1,) * (len(shape) - 1)))
        assert tuple(y.shape) == (2, *layer.output_shape)
        np.testing.assert_allclose(backend.host(y).reshape(2, 3), expected, rtol=1e-12)
        dx.append(
            backend.host(
                layer.backward(backend.array(normal(2, 3, seed=1).reshape(y.shape)), cache)
            )
        )
    np.testing.assert_array_equal(*dx)
    np.testing.assert_allclose(
        dx[0].reshape(flat.shape).sum(axis=2), normal(2, 3, seed=1), rtol=1e-12
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: layers.Conv1d(3, 4, 3, groups=2), ("Conv1d: ", "3 channels", "2 groups")),
        (lambda: layers.Conv3d(4, 3, 3, groups=2), ("Conv3d: ", "3 channels", "2 groups")),
        (lambda: layers.Conv2d(1, 1, 3, padding=-1), ("Conv2d: ", "padding", "at least 0")),
        (lambda: layers.Conv2d(1, 1, 3, padding=((0, 1), (0, -1))), ("Conv2d: ", "padding")),
        (lambda: layers.Conv2d(1, 1, 3, padding="full"), ("Conv2d: ", "padding", "'full'")),
        (lambda: layers.Conv2d(1, 1, (3, 3, 3)), ("Conv2d: ", "kernel_size", "2 of them")),
        (
            lambda: layers.Conv2d(1, 1, 3, padding_mode="mirror"),
            ("Conv2d: ", "padding_mode", "'reflect'", "'mirror'"),
        ),
        (lambda: layers.Conv2d(1, 1, 3, groups=0), ("Conv2d: ", "groups")),
        (lambda: layers.ConvTranspose1d(2, 3, 3, groups=2), ("ConvTranspose1d: ", "3 channels")),
        (
            lambda: layers.ConvTranspose2d(1, 1, 3, output_padding=1),
            ("ConvTranspose2d: ", "output_padding", "below"),
        ),
        (
            lambda: layers.ConvTranspose2d(1, 1, 3, 2, output_padding=2),
            ("ConvTranspose2d: ", "output_padding"),
        ),
        (
            lambda: layers.ConvTranspose2d(1, 1, 3, padding="same"),
            ("ConvTranspose2d: ", "numbers", "'same'"),
        ),
        (lambda: layers.MaxPool3d(2, stride=0), ("MaxPool3d: ", "stride")),
        (lambda: layers.MaxPool1d(2, padding=-1), ("MaxPool1d: ", "padding")),
        (lambda: layers.AvgPool2d(2, divisor_override=0), ("AvgPool2d: ", "divisor_override")),
        (lambda: layers.AdaptiveAvgPool2d(0), ("AdaptiveAvgPool2d: ", "output_size")),
        (lambda: layers.AdaptiveAvgPool2d((1, 2, 3)), ("AdaptiveAvgPool2d: ", "2 of them")),
    ],
)
def test_constructors_refuse(make: Any, words: tuple):
    refuses(ArgumentError, *words, call=make)


@pytest.mark.parametrize(
    ("layer", "shape", "words"),
    [
        (lambda: layers.Conv1d(2, 1, 3), (2, 4, 4), ("net.0 (Conv1d): ", "samples (C, W)")),
        (lambda: layers.Conv3d(2, 1, 3), (3, 4, 4, 4), ("expected 2 input channels, got 3",)),
        (
            lambda: layers.Conv2d(1, 1, 3, padding=2, padding_mode="reflect"),
            (1, 2, 5),
            ("reflect", "at most 1"),
        ),
        (lambda: layers.ConvTranspose2d(None, 4, 1, groups=2), (3, 2, 2), ("3 input channels",)),
        (lambda: layers.ConvTranspose2d(1, 1, 1, padding=1), (1, 2, 2), ("output size",)),
        (lambda: layers.MaxPool1d(3), (1, 2), ("kernel 3", "input 2")),
        (lambda: layers.AdaptiveAvgPool2d(2), (1, 2), ("samples (C, H, W)",)),
        (lambda: layers.GlobalAvgPool(), (3,), ("spatial axis",)),
    ],
)
def test_shapes_are_checked_when_built(layer: Any, shape: tuple, words: tuple):
    net = layers.Sequential(net=layers.Sequential(layer()))
    refuses(ShapeError, "net.0 (", *words, call=lambda: net.build(shape))
