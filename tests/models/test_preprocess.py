"""A model's preprocess: what becomes of uint8 images."""

import re

import numpy as np
import pytest

from portacnn import Normalize, load_mnist_sample
from portacnn.errors import (
    ArgumentError,
    ArrayError,
    ShapeError,
)
from portacnn.layers import Conv2d, Flatten, Linear, ReLU
from portacnn.models import Model, SimpleConvNet
from support.matrix import EACH_LIBRARY
from support.nets import as_bytes, patches, small_net


def colour_net(device, dtype="float32", **preprocess):
    net = Model(conv=Conv2d(3, 4, 3), relu=ReLU(), flatten=Flatten(), fc=Linear(None, 4))
    net.build((3, 8, 8), device=device, dtype=dtype, seed=0)
    net.preprocess = Normalize(**preprocess)
    return net


@EACH_LIBRARY
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "preprocess",
    [
        {},
        {"scale": 1.0, "mean": 100.0, "std": 50.0},
        {"mean": (0.485, 0.456, 0.406), "std": np.array([0.229, 0.224, 0.225])},
        {"mean": [0.5, 0.25, 0.0]},
        {"std": (1, 2, 3), "scale": 0.01},
    ],
)
def test_uint8_images_are_normalised(backend, preprocess, dtype):
    images, t = as_bytes(patches(9, shape=(3, 8, 8))[0]), np.arange(9) % 4
    scale = preprocess.get("scale", 1 / 255)
    floats = np.empty(images.shape)
    means, stds = (
        np.broadcast_to(preprocess.get(k, d), 3) for k, d in (("mean", 0.0), ("std", 1.0))
    )
    for c, mean, std in zip(range(3), means, stds, strict=True):
        floats[:, c] = (images[:, c] * scale - mean) / std
    net = colour_net(backend.device, dtype, **preprocess)
    limit = {"float32": 1e-5, "float64": 1e-12}[dtype]
    for x in (images, backend.array(images)):
        np.testing.assert_allclose(
            backend.host(net.predict(x, 4)),
            backend.host(net.predict(floats)),
            rtol=limit,
            atol=limit,
        )
        assert net.loss(x, t) == pytest.approx(net.loss(floats, t), rel=limit)
        assert net.accuracy(x, t) == net.accuracy(floats, t)
        ours, theirs = net.gradient(x, t), net.gradient(floats, t)
        for path in theirs:
            wanted = backend.host(theirs[path])
            np.testing.assert_allclose(
                backend.host(ours[path]), wanted, rtol=limit, atol=10 * limit * abs(wanted).max()
            )


def test_preprocess_does_not_change_floats(backend):
    x, _ = patches(9, shape=(3, 8, 8))
    net = colour_net(backend.device, mean=0.5, std=0.1)
    with_it = backend.host(net.predict(x))
    net.preprocess = None
    np.testing.assert_array_equal(with_it, backend.host(net.predict(x)))


@EACH_LIBRARY
def test_uint8_and_floats_of_the_loader_are_the_same_bits(backend):
    (floats, t), _ = load_mnist_sample()
    (images, _), _ = load_mnist_sample(normalize=False)
    net = SimpleConvNet(device=backend.device, seed=0)
    net.preprocess = Normalize()
    assert (
        backend.host(net.predict(images[:300])).tobytes()
        == backend.host(net.predict(floats[:300])).tobytes()
    )
    assert net.loss(images[:20], t[:20]) == net.loss(floats[:20], t[:20])


def test_a_preprocess_follows_the_model_and_can_be_changed(backend):
    images, _ = patches(9, shape=(3, 8, 8))
    images = as_bytes(images)
    net = colour_net("numpy", mean=0.5)
    expected = net.predict(images)
    net.to(backend.device)
    np.testing.assert_allclose(backend.host(net.predict(images)), expected, rtol=1e-5, atol=1e-5)
    net.preprocess = Normalize(mean=0.25)
    np.testing.assert_allclose(
        backend.host(net.predict(images)),
        backend.host(net.predict((images / 255 - 0.25).astype("float32"))),
        rtol=1e-5,
        atol=1e-5,
    )
    net.preprocess = None
    with pytest.raises(ArrayError, match="expected floating-point images"):
        net.predict(images)


def test_empty_and_flat_uint8_images_are_allowed(backend):
    assert tuple(colour_net(backend.device).predict(np.zeros((0, 3, 8, 8), "uint8")).shape) == (
        0,
        4,
    )
    flat = Model(fc=Linear(None, 2)).build((5,), device=backend.device, seed=0)
    flat.preprocess = Normalize(mean=0.5)
    x = np.arange(10, dtype="uint8").reshape(2, 5) * 20
    wanted = backend.host(flat.predict((x / 255 - 0.5).astype("float32")))
    np.testing.assert_allclose(backend.host(flat.predict(x)), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 0}, "Normalize: scale must be a finite number above 0, got 0"),
        ({"scale": "1/255"}, "Normalize: scale must be a finite number above 0, got '1/255'"),
        ({"scale": (0.1, 0.2)}, "Normalize: scale must be one number, got (0.1, 0.2)"),
        ({"mean": float("nan")}, "Normalize: mean must be a finite number, got nan"),
        ({"mean": None}, "Normalize: mean must be a finite number, got None"),
        ({"mean": True}, "Normalize: mean must be a finite number, got True"),
        ({"mean": ()}, "Normalize: mean must be a finite number, got ()"),
        ({"mean": (0.1, "a")}, "Normalize: mean[1] must be a finite number, got 'a'"),
        ({"mean": 10**400}, "Normalize: mean must be a finite number, got 1000"),
        ({"std": (1, 0.0)}, "Normalize: std[1] must be a finite number above 0, got 0.0"),
        ({"std": -1}, "Normalize: std must be a finite number above 0, got -1"),
        (
            {"mean": (1, 2), "std": (1, 2, 3)},
            "mean and std must have one number per channel each, got (1.0, 2.0) and (1.0",
        ),
        ({"scale": 1e-20, "std": 1e20}, "must stay within float32's range"),
        ({"scale": 1e-20, "mean": -1e20}, "must stay within float32's range"),
        ({"std": 1e-40}, "must stay within float32's range"),
    ],
)
def test_normalize_refuses_wrong_arguments(arguments, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        Normalize(**arguments)


def test_a_preprocess_that_does_not_fit():
    net = small_net()
    with pytest.raises(
        ArgumentError,
        match=r"SimpleConvNet: preprocess must be a portacnn\.Normalize or None, got 255",
    ):
        net.preprocess = 255
    message = (
        r"preprocess: mean has 3 values, one per channel, but images \(N, 1, 8, 8\) have "
        r"1 "
        r"channels"
    )
    with pytest.raises(ShapeError, match=f"SimpleConvNet: {message}"):
        net.preprocess = Normalize(mean=(0.1, 0.2, 0.3))
    assert net.preprocess is None
    early = Model(Flatten(), Linear(None, 2))
    early.preprocess = Normalize(mean=(0.1, 0.2, 0.3))
    with pytest.raises(ShapeError, match=f"Model: {message}"):
        early.build((1, 8, 8))
    assert early.build((3, 8, 8)).preprocess.mean == (0.1, 0.2, 0.3)
