"""Fully convolutional networks take images of any size that fits; others refuse them."""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import numpy as np
import pytest

import portacnn
from portacnn.errors import ArgumentError, ShapeError
from portacnn.layers import (
    BatchNorm2d,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    LayerNorm,
    Linear,
    MaxPool2d,
    ReLU,
)
from portacnn.models import Model, UNet
from support.checks import normal, refuses
from support.matrix import EACH_LIBRARY, Here


def unet(device="numpy", **changes):
    arguments = {"depth": 2, "width": 4, "input_size": 8, "seed": 0, "device": device}
    return UNet(1, 3, **{**arguments, **changes})


@EACH_LIBRARY
@pytest.mark.parametrize("up", ["transpose", "bilinear"])
def test_a_unet_takes_any_size_that_fits_its_depth(backend: Here, up):
    """As one that was built for that size; few images and many, uint8 and floating point."""
    model = unet(backend.device, up=up)
    before = model.input_shape, model.output_shape, [layer.path for layer in model.walk()]
    for size, counts in (((12, 20), (1, 12)), ((4, 4), (3,)), ((12, 20), (1,))):
        other = unet(backend.device, up=up, input_size=size)
        other.load_state_dict(model.state_dict())
        for count in counts:
            x = normal(count, 1, *size).astype("float32")
            got = backend.host(model.predict(x))
            assert got.shape == (count, 3, *size)
            np.testing.assert_allclose(got, backend.host(other.predict(x)), rtol=1e-5, atol=1e-5)
    assert before == (
        model.input_shape,
        model.output_shape,
        [layer.path for layer in model.walk()],
    )


def test_a_size_that_does_not_fit_says_why():
    model = unet()
    with pytest.raises(ShapeError) as caught:
        model.predict(normal(2, 1, 10, 8))
    assert "expected images (N, 1, 8, 8), got 2x1x10x8" in str(caught.value)
    assert "multiples of 4 (2**depth), got (1, 10, 8)" in str(caught.value)
    refuses(ShapeError, "expected images", call=lambda: model.predict(normal(2, 2, 8, 8)))
    refuses(ShapeError, "multiples of 4", call=lambda: unet(input_size=6))
    refuses(ArgumentError, "UNet", "up", call=lambda: unet(up="nearest"))
    refuses(ArgumentError, "UNet", "depth", call=lambda: unet(depth=0))


def classifier(*layers):
    return Model(Conv2d(1, 4, 3), BatchNorm2d(4), ReLU(), *layers).build(
        (1, 8, 8), device="numpy", seed=0
    )


def test_a_classifier_with_global_pooling_takes_them_too():
    model = classifier(GlobalAvgPool(flatten=True), Linear(4, 3))
    x = normal(5, 1, 11, 9).astype("float32")
    assert model.predict(x).shape == (5, 3)
    assert 0 <= model.accuracy(x, np.zeros(5, int)) <= 1
    assert np.isfinite(model.loss(x, np.zeros(5, int)))
    assert set(model.gradient(x, np.zeros(5, int))) == set(model.named_parameters())


@pytest.mark.parametrize(
    ("layers", "shape", "words"),
    [
        # whose pooling leaves out the last row: as many features, all the same
        ((MaxPool2d(2), Flatten(), Linear(None, 3)), (1, 9, 8), r"4 \(Flatten\) fits this size"),
        ((LayerNorm((4, 6, 6)),), (1, 9, 9), "LayerNorm"),
        ((MaxPool2d(4),), (1, 4, 4), "MaxPool2d"),
    ],
)
def test_networks_with_a_fixed_size_refuse_other_sizes(layers, shape, words):
    model = classifier(*layers)
    with pytest.raises(ShapeError, match=words):
        model.predict(normal(2, *shape))
    assert model.predict(normal(2, 1, 8, 8)).shape[0] == 2


def test_a_replaced_layer_is_looked_at_again():
    model = classifier(GlobalAvgPool(flatten=True), Linear(4, 3))
    x = normal(2, 1, 11, 11)
    model.predict(x)
    model.replace("2", LayerNorm((4, 6, 6)))
    refuses(ShapeError, "LayerNorm", call=lambda: model.predict(x))


def test_memory_follows_the_larger_images(monkeypatch: pytest.MonkeyPatch):
    """Fewer of them go through at a time."""
    model, seen = unet(), []
    forward = Model.forward
    monkeypatch.setattr(
        Model,
        "forward",
        lambda self, x, **options: seen.append(x.shape[0]) or forward(self, x, **options),
    )
    numbers = 4 * max(
        np.prod(place.output_shape)
        for layer in model.walk()
        if not layer.children
        for place in layer.places
    )
    monkeypatch.setattr("portacnn.models.sizes._MAX_BYTES", 8 * int(numbers) * 40)
    model.predict(normal(40, 1, 8, 8))
    model.predict(normal(40, 1, 16, 16))
    assert seen == [40, 10, 10, 10, 10]


def test_threads_may_predict_images_of_different_sizes():
    model = unet()
    inputs = [normal(2, 1, 4 * n, 8).astype("float32") for n in range(1, 9)]
    expected = [unet().predict(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for got, right in zip(pool.map(model.predict, inputs), expected, strict=True):
                np.testing.assert_array_equal(got, right)


def test_loaded_and_copied_models_take_any_size(tmp_path):
    model, x = unet(), normal(2, 1, 12, 4)
    expected = model.predict(x)
    model.save(tmp_path / "net")
    np.testing.assert_array_equal(
        portacnn.load(tmp_path / "net", device="numpy").predict(x), expected
    )

    np.testing.assert_array_equal(deepcopy(model).predict(x), expected)
