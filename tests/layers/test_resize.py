"""Layers that change an image's size, weight channels or skip samples: against PyTorch, and their
refusals."""

from typing import Any

import numpy as np
import pytest

import portacnn
from portacnn import layers as L
from portacnn.errors import ArgumentError, ShapeError
from portacnn.runtime import resolve
from support.checks import agree, gradient_agrees, normal, refuses
from support.matrix import Here, needs


def center(x: Any) -> Any:
    """Rows 1 or 2 of 5 by 2 (round(1.5) is 2), columns 1..3 of 5."""
    return x[:, :, 2:4, 1:4]


CASES = [
    (L.Upsample(None, 2, "bilinear"), ("Upsample", (None, 2, "bilinear")), (2, 3, 4)),
    (L.Upsample((4, 3)), ("Upsample", ((4, 3),)), (2, 3, 4)),
    (
        L.Upsample(None, 3, "linear", align_corners=True),
        ("Upsample", (None, 3, "linear", True)),
        (2, 3),
    ),
    (L.PixelShuffle(2), ("PixelShuffle", (2,)), (8, 2, 3)),
    (L.PixelUnshuffle(2), ("PixelUnshuffle", (2,)), (2, 4, 6)),
    (L.Crop([(1, 0), (0, 2)]), lambda x: x[:, :, 1:, :-2], (2, 3, 4)),
    (L.CenterCrop((2, 3)), center, (2, 5, 5)),
]


@pytest.mark.parametrize(("layer", "twin", "shape"), CASES)
@needs("torch")
def test_values_and_gradients_agree_with_pytorch(
    backend: Here, layer: Any, twin: Any, shape: tuple
):
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle")
    if isinstance(twin, tuple):
        twin = getattr(torch.nn, twin[0])(*twin[1])
    host = normal(2, *shape)
    leaf = torch.tensor(host, requires_grad=True)
    expected = twin(leaf)
    up = normal(*expected.shape, seed=1)
    expected.backward(torch.tensor(up))
    x = backend.array(host)
    ours = type(layer)(**layer.arguments()[1]).build(shape, device=backend.device, dtype="float64")
    assert ours.output_shape == tuple(expected.shape[1:])
    assert ours.multiply_adds() == 0
    y, cache = ours.forward(x)
    agree(backend, y, expected.detach().numpy(), x)
    agree(backend, ours.backward(backend.array(up), cache), leaf.grad.numpy(), x)
    agree(backend, ours.prepare(x)(x), expected.detach().numpy(), x)


@needs("torch")
def test_squeeze_and_excitation(backend: Here):
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle")
    from support import twins

    torch.manual_seed(0)
    theirs = twins.SqueezeExcitation(6, 2, torch.nn.SiLU).double()
    ours = L.SqueezeExcitation(6, 2, L.SiLU())
    ours.build((6, 3, 4), device=backend.device, dtype="float64")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict({key: value.numpy() for key, value in theirs.state_dict().items()})
    host, up = normal(2, 6, 3, 4), normal(2, 6, 3, 4, seed=1)
    leaf = torch.tensor(host, requires_grad=True)
    expected = theirs(leaf)
    expected.backward(torch.tensor(up))
    x = backend.array(host)
    y, cache = ours.forward(x)
    agree(backend, y, expected.detach().numpy(), x)
    agree(backend, ours.backward(backend.array(up), cache), leaf.grad.numpy(), x)
    for path, parameter in theirs.named_parameters():
        agree(backend, ours.named_gradients()[path], parameter.grad.numpy(), x)
    # fc1 and fc2 on one pixel
    assert sum(layer.multiply_adds() for layer in ours.walk()) == 2 * 6 * 2


def test_stochastic_depth(backend: Here):
    """Whole samples fall, the others are scaled, and the gradient falls with them; out of training
    nothing happens."""
    layer = L.StochasticDepth(0.25).build((3, 2), device=backend.device, dtype="float64", seed=1)
    x = backend.array(1 + normal(400, 3, 2) ** 2)
    y, cache = layer.forward(x, train=True)
    ratio = backend.host(y) / backend.host(x)
    kept = ratio[:, 0, 0] > 0
    np.testing.assert_allclose(ratio, np.broadcast_to(kept[:, None, None] / 0.75, ratio.shape))
    assert 0.17 < 1 - kept.mean() < 0.33
    np.testing.assert_array_equal(backend.host(layer.backward(x, cache)), backend.host(y))
    again, _ = layer.forward(x, train=True)
    assert (backend.host(again) != backend.host(y)).any()
    assert layer(x) is x


def test_the_same_samples_fall_on_every_backend(backend: Here):
    make = lambda home: L.StochasticDepth(0.5).build((2,), device=home, seed=3)  # noqa: E731
    ones = np.ones((32, 2), "float32")
    y, _ = make(backend.device).forward(backend.array(ones), train=True)
    expected, _ = make("numpy").forward(ones, train=True)
    np.testing.assert_array_equal(backend.host(y), expected)


@pytest.mark.parametrize(
    ("kind", "words", "make"),
    [
        (ArgumentError, ("Upsample", "either size"), lambda: L.Upsample()),
        (ArgumentError, ("PixelShuffle", "upscale_factor"), lambda: L.PixelShuffle(0)),
        (ArgumentError, ("Crop", "margins"), lambda: L.Crop([(1, 2, 3)])),
        (ArgumentError, ("Crop", "at least 0"), lambda: L.Crop([(1, -2)])),
        (ArgumentError, ("CenterCrop", "size"), lambda: L.CenterCrop((0, 2))),
        (ArgumentError, ("SqueezeExcitation", "squeeze"), lambda: L.SqueezeExcitation(4, 0)),
        (
            ShapeError,
            ("bilinear", "1 spatial"),
            lambda: L.Upsample(2, mode="bilinear").plan((2, 3)),
        ),
        (ShapeError, ("C*4",), lambda: L.PixelShuffle(2).plan((3, 4, 4))),
        (ShapeError, ("multiples of 2",), lambda: L.PixelUnshuffle(2).plan((3, 4, 5))),
        (ShapeError, ("leave nothing",), lambda: L.Crop([(2, 2), (0, 0)]).plan((3, 4, 5))),
        (ShapeError, ("2 spatial axes",), lambda: L.Crop([(2, 2), (0, 0)]).plan((3, 4))),
        (ShapeError, ("at least (4, 4)",), lambda: L.CenterCrop((4, 4)).plan((3, 4, 3))),
        (ShapeError, ("fc1", "4"), lambda: L.SqueezeExcitation(4, 2).plan((3, 4, 4))),
    ],
)
def test_wrong_arguments_are_refused(kind, words, make):
    refuses(kind, *words, call=make)


def test_files_hold_them(tmp_path):
    model = portacnn.Model(
        L.Conv2d(1, 4, 3, padding=1),
        L.SqueezeExcitation(4, 2, L.SiLU()),
        L.PixelShuffle(2),
        L.Upsample(None, (2.0, 1.5), "bilinear"),
        L.CenterCrop((4, 4)),
        L.Crop([(1, 0), (0, 1)]),
    ).build((1, 6, 6), device="numpy", seed=0)
    model.save(tmp_path / "net")
    x = normal(3, 1, 6, 6).astype("float32")
    again = portacnn.load(tmp_path / "net", device="numpy")
    np.testing.assert_array_equal(again.predict(x), model.predict(x))


def test_gradients_of_crops_agree_with_finite_differences():
    here, host = Here("numpy", resolve("numpy")), normal(1, 1, 5, 4)
    layer = L.CenterCrop((2, 3)).build((1, 5, 4), device="numpy", dtype="float64")
    y, cache = layer.forward(host)
    dy = normal(*y.shape, seed=1)
    gradient_agrees(here, layer.backward(dy, cache), lambda x: np.sum(layer(x) * dy), host)
