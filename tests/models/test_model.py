"""Models: SimpleConvNet, and what every Model does with images and labels that come from
outside."""

import re
from math import sqrt

import numpy as np
import pytest

from portacnn import Normalize, Trainer, load_mnist_sample, resolve
from portacnn.errors import (
    ArgumentError,
    ArrayError,
    BackendError,
    LabelError,
    ModelFormatError,
    ShapeError,
    StateError,
)
from portacnn.gradient_check import numerical_gradient
from portacnn.layers import AdaptiveAvgPool2d, Conv2d, Flatten, Linear, MaxPool2d, ReLU
from portacnn.models import Model, ModelInfo, SimpleConvNet
from portacnn.ops import use_kernels
from support.matrix import needs
from support.memory_meter import metered
from support.nets import as_bytes, bits, patches, small_net, torch_twin


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("PORTACNN_BACKEND", raising=False)


# --- SimpleConvNet --------------------------------------------------------------------------------


def test_defaults_are_the_tutorials():
    net = SimpleConvNet(seed=0)
    assert {path: value.shape for path, value in net.state_dict().items()} == {
        "conv1.weight": (30, 1, 5, 5),
        "conv1.bias": (30,),
        "fc1.weight": (100, 30 * 12 * 12),
        "fc1.bias": (100,),
        "fc2.weight": (10, 100),
        "fc2.bias": (10,),
    }
    assert [type(layer).__name__ for layer in net.children.values()] == (
        ["Conv2d", "ReLU", "MaxPool2d", "Flatten", "Linear", "ReLU", "Linear"]
    )
    assert (net.input_shape, net.output_shape, net.classes) == ((1, 28, 28), (10,), 10)
    assert net.backend.name == "numpy"
    for path, value in net.state_dict().items():
        assert value.dtype == "float32"
        assert value.std() == (pytest.approx(0.01, rel=0.1) if path.endswith("weight") else 0)


@pytest.mark.parametrize(
    ("conv_param", "conv", "features"),
    [
        (None, (30, 24, 24), 30 * 12 * 12),
        ({}, (30, 24, 24), 30 * 12 * 12),
        ({"filter_num": 4}, (4, 24, 24), 4 * 12 * 12),
        # the pool leaves the last row and column out
        ({"filter_num": 4, "filter_size": 4}, (4, 25, 25), 4 * 12 * 12),
        ({"filter_num": 4, "pad": 2}, (4, 28, 28), 4 * 14 * 14),
        ({"filter_num": 4, "pad": 1, "stride": 2}, (4, 13, 13), 4 * 6 * 6),
        ({"filter_num": 4, "filter_size": 28, "pad": 1}, (4, 3, 3), 4),
    ],
)
def test_conv_param(conv_param, conv, features):
    net = SimpleConvNet(conv_param=conv_param, hidden_size=7, output_size=3, seed=0)
    assert net.children["conv1"].output_shape == conv
    assert net.children["fc1"].params["weight"].shape == (7, features)
    assert net.predict(np.zeros((2, 1, 28, 28), "float32")).shape == (2, 3)


@pytest.mark.parametrize(
    ("what", "gain"),
    [(0.05, None), (1, None), ("he", 2), ("relu", 2), ("xavier", 1), ("sigmoid", 1)],
)
def test_weight_init_std(what, gain):
    net = SimpleConvNet(
        (8, 12, 12),
        {"filter_num": 40},
        hidden_size=90,
        output_size=60,
        weight_init_std=what,
        seed=1,
    )
    for path, fan_in in {"conv1": 8 * 25, "fc1": 40 * 4 * 4, "fc2": 90}.items():
        weight = net.state_dict()[f"{path}.weight"]
        expected = sqrt(gain / fan_in) if gain else float(what)
        assert weight.std() == pytest.approx(expected, rel=0.04), path
        assert abs(weight.mean()) < 4 * expected / sqrt(weight.size)
        assert not net.state_dict()[f"{path}.bias"].any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"input_dim": (28, 28)},
            ShapeError,
            r"^conv1 \(Conv2d\): expected samples \(C, H, W\), "
            r"got \(28, 28\)$",
        ),
        (
            {"input_dim": (1, 4, 4)},
            ShapeError,
            r"^conv1 \(Conv2d\): kernel 5x5 is larger than the "
            r"input 4x4",
        ),
        (
            {"input_dim": (1, 5, 5)},
            ShapeError,
            r"^pool1 \(MaxPool2d\): kernel 2x2 is larger than "
            r"the input 1x1",
        ),
        ({"input_dim": (0, 28, 28)}, ShapeError, "input_shape must be positive numbers"),
        (
            {"conv_param": {"filters": 3}},
            ArgumentError,
            "conv_param takes filter_num, filter_size, pad, stride; got fil",
        ),
        ({"conv_param": {"pad": -1}}, ArgumentError, "padding"),
        ({"hidden_size": 0}, ArgumentError, "out_features"),
        ({"output_size": 2.5}, ArgumentError, "out_features"),
        (
            {"weight_init_std": "glorot"},
            ArgumentError,
            r"^Conv2d: unknown weight initializer "
            r"'glorot'",
        ),
        (
            {"weight_init_std": -1},
            ArgumentError,
            "a weight initializer must be a standard deviation",
        ),
        ({"device": "tpu"}, BackendError, "unknown device 'tpu'"),
        ({"device": "array_api_strict:device9"}, BackendError, "array.api.strict"),
        ({"dtype": "float16"}, ArgumentError, "dtype must be"),
        ({"seed": 0.5}, ArgumentError, "seed must be a whole number or None"),
    ],
)
def test_arguments_without_meaning(arguments, error, message):
    with pytest.raises(error, match=message):
        SimpleConvNet(**arguments)


def test_device_argument_and_variable(backend, monkeypatch):
    net = small_net(backend.device)
    assert net.backend == backend.backend
    assert {value.device for value in net.named_parameters().values()} == {backend.backend.device}
    monkeypatch.setenv("PORTACNN_BACKEND", backend.backend.name)
    assert SimpleConvNet((1, 8, 8), seed=0).backend.name == backend.backend.name


# --- numbers --------------------------------------------------------------------------------------


@needs("torch")
@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 7, 9)])
def test_against_pytorch(backend, shape):
    import torch

    net = small_net(
        backend.device,
        input_dim=shape,
        dtype="float64",
        conv_param={"filter_num": 3, "filter_size": 3, "pad": 1},
    )
    x, t = patches(7, shape=shape, dtype="float64")
    twin = torch_twin(torch, net)
    logits = twin(torch.tensor(x))
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(t))
    loss.backward()

    np.testing.assert_allclose(
        backend.host(net.predict(x)), logits.detach().numpy(), rtol=1e-11, atol=1e-13
    )
    assert net.loss(x, t) == pytest.approx(loss.item(), rel=1e-12)
    assert net.accuracy(x, t) == (logits.argmax(1).numpy() == t).mean()
    gradient = net.gradient(x, t)
    assert list(gradient) == [name for name, _ in twin.named_parameters()]
    for name, p in twin.named_parameters():
        np.testing.assert_allclose(
            backend.host(gradient[name]), p.grad.numpy(), rtol=1e-9, atol=1e-13, err_msg=name
        )


def test_gradient_against_numerical_gradient(backend):
    net = SimpleConvNet(
        (1, 5, 5),
        {"filter_num": 2, "filter_size": 3},
        3,
        2,
        "he",
        device=backend.device,
        seed=1,
        dtype="float64",
    )
    x, t = patches(3, classes=2, shape=(1, 5, 5), dtype="float64")
    before, held = bits(net), net.named_parameters()
    gradient, numerical = net.gradient(x, t), net.numerical_gradient(x, t)
    assert list(gradient) == list(numerical) == list(held)
    for path, g in gradient.items():
        g, n = backend.host(g), backend.host(numerical[path])
        assert g.any(), path
        assert np.linalg.norm(g - n) < 1e-6 * np.linalg.norm(n), path
    assert bits(net) == before  # every weight was put back, into the same array
    assert all(net.named_parameters()[path] is value for path, value in held.items())


def test_gradients_are_copies(backend):
    net = small_net(backend.device)
    x, t = patches(8)
    first = net.gradient(x, t)
    kept = {path: backend.host(value) for path, value in first.items()}
    net.gradient(*patches(8, seed=1))
    for path, value in first.items():
        np.testing.assert_array_equal(backend.host(value), kept[path])


def test_numerical_gradient_of_a_function(backend):
    p = backend.backend.asarray(np.arange(6.0).reshape(2, 3))
    gradient = numerical_gradient(lambda: float(np.sum(backend.host(p) ** 3)), p)
    np.testing.assert_allclose(
        backend.host(gradient), 3 * np.arange(6.0).reshape(2, 3) ** 2, rtol=1e-6, atol=1e-7
    )
    np.testing.assert_array_equal(backend.host(p), np.arange(6.0).reshape(2, 3))


def test_numerical_gradient_in_any_memory_order():
    p = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    np.testing.assert_allclose(numerical_gradient(lambda: float((p**2).sum()), p), 2 * p, rtol=1e-6)


def test_numerical_gradient_puts_back_when_f_fails():
    p = np.array([1.0, 2.0])
    with pytest.raises(ZeroDivisionError):
        numerical_gradient(lambda: 1 / 0, p)
    assert p.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("labels", ["int64", "uint8", "one-hot", "float one-hot"])
def test_labels_in_every_form(backend, labels):
    net = small_net(backend.device)
    x, t = patches(10)
    expected = net.loss(x, t), net.accuracy(x, t), backend.host(net.gradient(x, t)["fc1.weight"])
    one_hot = np.eye(4, dtype="float32" if "float" in labels else "int64")[t]
    given = one_hot if "hot" in labels else t.astype(labels)
    for form in (given, backend.array(given)):
        assert net.loss(x, form) == expected[0]
        assert net.accuracy(x, form) == expected[1]
        np.testing.assert_array_equal(
            backend.host(net.gradient(x, form)["fc1.weight"]), expected[2]
        )


def test_accuracy_counts_the_last_short_batch(backend):
    """103 images, 100 at a time: the last three count as much as the others."""
    net = small_net(backend.device)
    x, _ = patches(103)
    predicted = backend.host(net.predict(x)).argmax(axis=1)
    t = np.where(np.arange(103) < 60, predicted, (predicted + 1) % 4)
    t[100:] = predicted[100:]
    for batch_size in (100, 103, 256, 1 if backend.name == "numpy" else 40):
        assert net.accuracy(x, t, batch_size=batch_size) == 63 / 103
    assert net.count_correct(x, net.labels(t, 103), 100) == 63


def test_predict_gives_logits(backend):
    net = small_net(backend.device)
    x, _ = patches(11)
    whole = net.predict(x)
    assert tuple(whole.shape) == (11, 4)
    assert whole.device == backend.backend.device
    for batch_size in (1, 4, 11, 12):
        np.testing.assert_allclose(
            backend.host(net.predict(x, batch_size)), backend.host(whole), rtol=1e-5, atol=1e-6
        )
    np.testing.assert_allclose(
        backend.host(net.predict(backend.array(x))), backend.host(whole), rtol=1e-5, atol=1e-6
    )
    assert np.exp(backend.host(whole)).sum(axis=1) != pytest.approx(1.0)


def test_images_of_other_float_types_and_layouts(backend):
    net = small_net(backend.device)
    x, t = patches(6)
    expected = net.loss(x, t)
    for form in (
        x.astype("float64"),
        np.asfortranarray(x),
        np.flip(np.flip(x, 3).copy(), 3),
        x.astype(">f4"),
    ):
        if form.dtype.byteorder == ">" and backend.name != "numpy":
            continue
        assert net.loss(form, t) == pytest.approx(expected, rel=1e-6)
    assert backend.host(net.predict(x.astype("float64"))).dtype == "float32"
    double = small_net(backend.device, dtype="float64")
    assert backend.host(double.predict(x)).dtype == "float64"


def test_images_and_labels_stay_untouched(backend):
    net = small_net(backend.device)
    x, t = patches(6)
    here, labels = backend.array(x), backend.array(t)
    net.predict(here)
    net.loss(here, labels)
    net.gradient(here, labels)
    net.accuracy(here, labels)
    np.testing.assert_array_equal(backend.host(here), x)
    np.testing.assert_array_equal(backend.host(labels), t)


def test_one_image_and_none(backend):
    net = small_net(backend.device)
    x, t = patches(1)
    assert tuple(net.predict(x).shape) == (1, 4)
    assert np.isfinite(net.loss(x, t))
    assert net.accuracy(x, t) in (0, 1)
    assert all(np.isfinite(backend.host(g)).all() for g in net.gradient(x, t).values())
    empty = net.predict(x[:0])
    assert tuple(empty.shape) == (0, 4)
    assert empty.dtype == backend.backend.dtype("float32")
    with pytest.raises(ArgumentError, match="SimpleConvNet: accuracy needs at least one image"):
        net.accuracy(x[:0], t[:0])


@pytest.mark.parametrize("device", ["numpy", "array_api_strict"])
def test_loss_of_an_empty_batch(device):
    pytest.importorskip("array_api_strict")
    x, t = patches(1)
    with pytest.raises(ArgumentError, match="at least one image, got none"):
        small_net(device).loss(x[:0], t[:0])


@pytest.mark.parametrize("choice", ["auto", "native", "reference"])
def test_the_loss_goes_through_in_batches(choice, monkeypatch):
    """Its memory is that of ``accuracy``, and its value the mean over all images, a short last
    batch among them."""
    (x, t), net = patches(1500), small_net()
    with use_kernels(choice):
        net.loss(x[:10], t[:10])
        with metered(monkeypatch) as meter:
            net.accuracy(x, t)
            need = meter.peak()
            net.release_memory()
            meter.restart_peak()
            found = net.loss(x, t)
            assert meter.peak() <= need + (256 << 10)
        logits = net(x).astype("float64")
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        assert found == pytest.approx(-logs[np.arange(1500), t].mean(), rel=1e-5)


def test_to_keeps_bits(backend):
    net = small_net("numpy")
    x, t = patches(9)
    before, loss = bits(net), net.loss(x, t)
    assert net.to(backend.device) is net
    assert net.backend == backend.backend
    assert bits(net) == before
    assert net.loss(x, t) == pytest.approx(loss, rel=1e-6)
    net.gradient(x, t)
    assert bits(net.to("numpy")) == before
    assert net.loss(x, t) == loss


def test_to_nowhere_changes_nothing():
    net = small_net("numpy")
    held = net.named_parameters()
    with pytest.raises(BackendError):
        net.to("tpu")
    assert all(net.named_parameters()[path] is value for path, value in held.items())


# --- preprocess -----------------------------------------------------------------------------------


def colour_net(device, dtype="float32", **preprocess):
    net = Model(conv=Conv2d(3, 4, 3), relu=ReLU(), flatten=Flatten(), fc=Linear(None, 4))
    net.build((3, 8, 8), device=device, dtype=dtype, seed=0)
    net.preprocess = Normalize(**preprocess)
    return net


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
    for (n, c, h, w), value in np.ndenumerate(images):
        mean, std = (
            np.broadcast_to(preprocess.get(k, d), 3)[c] for k, d in (("mean", 0.0), ("std", 1.0))
        )
        floats[n, c, h, w] = (value * scale - mean) / std
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


def test_floats_pass_a_preprocess_by(backend):
    x, _ = patches(9, shape=(3, 8, 8))
    net = colour_net(backend.device, mean=0.5, std=0.1)
    with_it = backend.host(net.predict(x))
    net.preprocess = None
    np.testing.assert_array_equal(with_it, backend.host(net.predict(x)))


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


def test_no_uint8_images_and_flat_ones(backend):
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
def test_normalize_without_a_meaning(arguments, message):
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


# --- bad input ------------------------------------------------------------------------------------

CALLS = {
    "predict": lambda net, x: net.predict(x),
    "loss": lambda net, x: net.loss(x, np.zeros(x.shape[0], int)),
    "accuracy": lambda net, x: net.accuracy(x, np.zeros(x.shape[0], int)),
    "gradient": lambda net, x: net.gradient(x, np.zeros(x.shape[0], int)),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@every_call
def test_wrong_images(backend, call):
    net = small_net(backend.device)
    for shape, hint in (
        ((5, 3, 8, 8), "; make the channels one: x.mean(1)[:, None]"),
        (
            (5, 1, 9, 8),
            "; flatten (Flatten) binds the network to this size",
        ),
        ((5, 8, 8), "; add a channel axis: x[:, None]"),
        ((5, 64), "; x.reshape(-1, 1, 8, 8)"),
        ((5, 1, 8, 8, 1), ""),
        ((5,), ""),
    ):
        with pytest.raises(ShapeError) as caught:
            call(net, np.zeros(shape, "float32"))
        size = "x".join(map(str, shape))
        expected = (
            f"SimpleConvNet: expected images (N, 1, 8, 8), got {size}, numpy float32 on cpu{hint}"
        )
        assert str(caught.value) == expected
    for dtype in ("uint8", "int64", "bool"):
        with pytest.raises(
            ArrayError,
            match=rf"^SimpleConvNet: expected floating-point images, got 5x1x8x8, numpy {dtype} on "
            r"cpu; scale",
        ) as caught:
            call(net, np.zeros((5, 1, 8, 8), dtype))
        assert "x.astype('float32') / 255" in str(caught.value)
    with pytest.raises(
        ArrayError,
        match=r"expected floating-point .* model\.preprocess = "
        r"portacnn\.Normalize\(\)",
    ):
        call(net, backend.array(np.zeros((5, 1, 8, 8)), "uint8"))
    net.preprocess = Normalize()
    call(net, np.zeros((5, 1, 8, 8), "uint8"))
    for dtype in ("int8", "int32", "int64", "bool"):
        for x in (np.zeros((5, 1, 8, 8), dtype), backend.array(np.zeros((5, 1, 8, 8)), dtype)):
            with pytest.raises(
                ArrayError,
                match=r"expected images of uint8 or floating point, "
                rf"got .*{dtype} on",
            ):
                call(net, x)
    with pytest.raises(
        ShapeError,
        match=r"expected images \(N, 1, 8, 8\), got 5x3x8x8, numpy "
        r"uint8",
    ):
        call(net, np.zeros((5, 3, 8, 8), "uint8"))


@every_call
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize(
    ("sample", "shape", "cure"),
    [
        ((3, 8, 9), (3, 8, 9), "x[None]"),
        ((3, 8, 9), (5, 8, 9, 3), "x.transpose(0, 3, 1, 2)"),
        ((3, 8, 9), (8, 9, 3), "x[None].transpose(0, 3, 1, 2)"),
        ((1, 8, 9), (5, 8, 9), "x[:, None]"),
        ((1, 8, 9), (8, 9), "x[None, None]"),
        ((1, 8, 9), (5, 8, 9, 1), "x.transpose(0, 3, 1, 2)"),
        ((3, 8, 9), (5, 216), "x.reshape(-1, 3, 8, 9)"),
        ((3, 8, 9), (5, 1, 8, 9), "x[:, [0, 0, 0]]"),
        ((3, 8, 9), (5, 8, 9), "x[:, None][:, [0, 0, 0]]"),
        ((3, 8, 9), (8, 9), "x[None, None][:, [0, 0, 0]]"),
        ((3, 8, 9), (5, 4, 8, 9), "x[:, :3]"),
        ((3, 8, 9), (5, 8, 9, 4), "x[..., :3].transpose(0, 3, 1, 2)"),
    ],
)
def test_the_cure_that_is_told_is_one(call, sample, shape, cure, dtype):
    """Whatever else may be wrong (bytes without a preprocess), the shape is said first."""
    net = Model(Flatten(), Linear(None, 4)).build(sample, seed=0, device="numpy")
    x = np.zeros(shape, dtype)
    with pytest.raises(ShapeError) as caught:
        call(net, x)
    assert str(caught.value).endswith(
        f"numpy {dtype} on cpu; {caught.value.message.rpartition('; ')[2]}"
    )
    assert caught.value.message.endswith(cure)
    net.preprocess = Normalize()
    call(net, eval(cure, {"x": x}))


def test_images_of_another_size_or_of_channels_too_many():
    net = Model(Flatten(), Linear(None, 4)).build((3, 8, 9), seed=0, device="numpy")
    with pytest.raises(ShapeError, match=r"binds the network to this size$"):
        net.predict(np.zeros((2, 3, 8, 8), "float32"))
    gray = Model(Flatten(), Linear(None, 4)).build((1, 8, 9), seed=0, device="numpy")
    gray.preprocess = Normalize()
    for x, cure in (
        (np.ones((2, 3, 8, 9), "float32"), "x.mean(1)[:, None]"),
        (np.full((2, 3, 8, 9), 255, "uint8"), "x.mean(1)[:, None].astype(x.dtype)"),
    ):
        with pytest.raises(ShapeError, match=re.escape(f"the channels one: {cure}") + "$"):
            gray.predict(x)
        close = gray.predict(eval(cure, {"x": x})) - gray.predict(np.ones((2, 1, 8, 9), "float32"))
        assert np.abs(close).max() < 1e-5


def test_images_on_another_scale_than_those_of_the_training(backend, caplog):
    """A model without a preprocess knows from its training what its images were."""
    x, t = patches(20)
    net = small_net(backend.device)
    net.predict(255 * x)
    Trainer(net, x, t, epochs=1, batch_size=10, verbose=False).train()
    least, largest = net.info.input_range
    assert (least, largest) == (float(x.min()), float(x.max()))
    net.predict(x), net.predict(0 * x), net.predict(3 * x)
    assert not caplog.messages
    net.predict(255 * x), net.predict(255 * x)
    again = small_net(backend.device)
    again.info = net.info
    again.predict(backend.array(255 * x)), again.predict(255 * x)
    assert len(caplog.messages) == 2
    assert all("trained on images of" in m and "x / 255" in m for m in caplog.messages)
    caplog.clear()
    net = small_net(backend.device)
    net.info = ModelInfo(input_range=(0.0, 255.0))
    net.predict(0 * x), net.predict(200 * x[:1])
    assert not caplog.messages
    net.predict(x / x.max())
    assert len(caplog.messages) == 1
    assert "x * 255" in caplog.messages[0]


@needs("torch")
def test_the_cure_in_torchs_words():
    import torch

    net = Model(Flatten(), Linear(None, 4)).build((3, 8, 9), seed=0, device="torch")
    with pytest.raises(ShapeError, match=r"x\.permute\(0, 3, 1, 2\)$"):
        net.predict(torch.zeros(5, 8, 9, 3))


def test_channels_last_in_a_network_s_shape():
    for build in (
        lambda: SimpleConvNet((32, 32, 3), device="numpy"),
        lambda: Model(Conv2d(3, 4, 5), Flatten(), Linear(None, 2)).build(
            (32, 32, 3), device="numpy"
        ),
    ):
        with pytest.raises(
            ShapeError,
            match=r"\(C, H, W\): did you mean \(3, 32, 32\) instead of "
            r"\(32, 32, 3\)\?$",
        ):
            build()
    with pytest.raises(ShapeError, match=r"larger than the input 3x3; [^.]* or a larger input$"):
        SimpleConvNet((3, 3, 3), device="numpy")


def test_floats_that_look_like_bytes_are_said_once(backend, caplog):
    """To a model that was made for bytes: it would take them as 255 times too bright."""
    x, t = patches(20)
    stored = as_bytes(x)
    for call in (
        lambda net, x: net.predict(x),
        lambda net, x: net.predict(x[:2, ...]),
        lambda net, x: net.loss(x, t),
        lambda net, x: Trainer(net, x, t, x, t, epochs=1, mini_batch_size=10, verbose=False),
    ):
        net = small_net(backend.device)
        caplog.clear()
        call(net, 255 * x)  # without a preprocess nothing is known of them
        net.preprocess = Normalize()
        call(net, stored)
        call(net, x)
        assert not caplog.messages
        net = small_net(backend.device)
        net.preprocess = Normalize()
        for images in (stored.astype("float32"), backend.array(stored, "float32")):
            call(net, images)
            call(net, images)
        (message,) = caplog.messages
        assert "SimpleConvNet: preprocess does not apply to floating-point images" in message
        assert "x.astype('uint8')" in message
    net.preprocess = Normalize(scale=1.0)  # floats of 0..255 are what that makes
    net._warned = False
    caplog.clear()
    net.predict(stored.astype("float32"))
    assert not caplog.messages


@every_call
def test_images_of_another_library_or_device(call):
    strict = pytest.importorskip("array_api_strict")
    images = strict.zeros((5, 1, 8, 8), dtype=strict.float32, device=strict.Device("device1"))
    with pytest.raises(
        ArrayError,
        match=r"^SimpleConvNet: the model is on numpy on cpu, the images are 5x1x8x8, "
        r"array_api_strict float32 on device1; "
        "move one of them",
    ):
        call(small_net("numpy"), images)
    with pytest.raises(ArrayError, match=r"the model is on array_api_strict on device1, the"):
        call(
            small_net("array_api_strict:device1"), strict.zeros((5, 1, 8, 8), dtype=strict.float32)
        )


@pytest.mark.parametrize("call", ["predict", "loss", "accuracy"])
def test_images_that_are_no_array(call):
    net = small_net()
    arguments = () if call == "predict" else (np.array([0]),)
    for thing in ([[[[1.0]]]], None, np.float32(1.0)):
        with pytest.raises((ArrayError, ShapeError)):
            getattr(net, call)(thing, *arguments)


@pytest.mark.parametrize(
    ("t", "message"),
    [
        ([0, 1, 4], "label 4 at index 2 is outside 0..3; the network has 4 outputs"),
        ([0, -1, 3], "label -1 at index 1 is outside 0..3"),
        ([0, 1], r"got shape \(2,\)"),
        ([0, 1, 2, 3], r"got shape \(4,\)"),
        (np.zeros((3, 4, 1), int), r"got shape \(3, 4, 1\)"),
        (1, r"got shape \(\)|got a single number"),
        (np.eye(3), r"must have 4 columns, .* got 3|\(3, 4\) for outputs of \(4,\)"),
        (np.eye(4)[:2], r"got shape \(2, 4\)"),
        (np.zeros((3, 4)), "row 0 is not one-hot"),
        (np.eye(4)[:3] * 0.5, "row 0 is not one-hot"),
        ([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0]], "row 2 is not one-hot"),
        ([0.0, 1.0, 2.0], r"whole numbers 0\.\.3, got float64"),
        ([True, False, True], "got bool"),
    ],
)
def test_wrong_labels(backend, t, message):
    net = small_net(backend.device)
    x, _ = patches(3)
    for call in (net.loss, net.accuracy, net.gradient):
        for form in [np.asarray(t)] + [backend.array(t)] * (np.ndim(t) > 0):
            with pytest.raises(LabelError, match=message) as caught:
                call(x, form)
            assert isinstance(caught.value, ValueError)


def test_lists_say_which_they_are_and_what_to_do():
    net, (x, t) = small_net(), patches(4)
    told = (
        r"expected an array of numpy, .*; got builtins\.list \(numpy\.asarray\(\.\.\.\) makes "
        r"an array of it\)"
    )
    for call in (net.loss, net.accuracy, net.gradient):
        call(x, t.tolist())  # labels may be lists
        with pytest.raises(ArrayError, match=rf"^SimpleConvNet: x: {told}"):
            call(list(x), t)
    with pytest.raises(ArrayError, match=rf"^SimpleConvNet: x: {told}"):
        net.predict(x.tolist())
    for place, name in ((0, "x_train"), (2, "x_test")):
        given = [x, t.tolist(), x, t.tolist()]
        given[place] = list(given[place])
        with pytest.raises(ArrayError, match=rf"^SimpleConvNet: {name}: {told}"):
            Trainer(net, *given, mini_batch_size=2, verbose=False)


def test_a_state_of_lists_says_what_is_wrong():
    net = small_net()
    before = bits(net)
    state = net.state_dict()
    for wrong, message in (
        (
            {**state, "fc2.bias": [0.0] * 4},
            r"not an array \(convert it with numpy\.asarray\): "
            r"fc2\.bias, a list",
        ),
        ({**state, "fc2.bias": None}, r"fc2\.bias, a NoneType"),
        (list(state.values()), "expected arrays by path, as state_dict"),
        (None, "got a NoneType"),
    ):
        with pytest.raises(ModelFormatError, match=message):
            net.load_state_dict(wrong)
    assert bits(net) == before


def test_numpys_integers_and_arrays_of_them_are_whole_numbers(tmp_path):
    """Where a number or several are taken; and they are saved."""
    a, n = np.array, np.int64
    net = Model(
        Conv2d(n(1), n(3), a([3, 3]), a([1, 1]), padding=a([1, 1])),
        MaxPool2d(a([2, 2])),
        Conv2d(None, 3, a(3), padding=a([[1, 0], [0, 1]])),
        AdaptiveAvgPool2d(a([2, 2])),
        Flatten(),
        Linear(None, a(4)),
    )
    plain = Model(
        Conv2d(1, 3, (3, 3), (1, 1), padding=(1, 1)),
        MaxPool2d((2, 2)),
        Conv2d(None, 3, 3, padding=((1, 0), (0, 1))),
        AdaptiveAvgPool2d((2, 2)),
        Flatten(),
        Linear(None, 4),
    )
    net.build(a([1, 8, 8]), seed=n(0), device="numpy")
    plain.build((1, 8, 8), seed=0, device="numpy")
    x, _ = patches(9)
    net.save(tmp_path / "net")
    expected = plain.predict(x)
    for one in (net, Model.load(tmp_path / "net", device="numpy")):
        np.testing.assert_array_equal(one.predict(x, n(4)), one.predict(x, 4))
        np.testing.assert_array_equal(one.predict(x), expected)
    for wrong in (
        a([3.0, 3.0]),
        a([True, True]),
        np.True_,
        a([[3, 3]]),
        a(["3"]),
        10**400,
        1.5,
        "3",
    ):
        with pytest.raises(ArgumentError, match="kernel_size"):
            Conv2d(1, 1, wrong)
        with pytest.raises((ArgumentError, ShapeError)):
            Linear(None, wrong)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, "4", True, np.array([2, 2]), np.float32(2)])
def test_batch_size_without_meaning(batch_size):
    net = small_net()
    x, t = patches(4)
    with pytest.raises(
        ArgumentError, match="SimpleConvNet: batch_size must be a whole number of at least 1, got"
    ):
        net.predict(x, batch_size)
    with pytest.raises(ArgumentError):
        net.accuracy(x, t, batch_size)


# --- models of other shapes -----------------------------------------------------------------------


def test_a_model_of_ones_own(backend):
    net = Model(conv=Conv2d(1, 2, 3), relu=ReLU(), flatten=Flatten(), fc=Linear(None, 4))
    x, t = patches(5)
    for call in (lambda: net.predict(x), lambda: net.loss(x, t), lambda: net.gradient(x, t)):
        with pytest.raises(
            StateError,
            match=r"^Model: not built yet: call build\(input_shape, "
            r"device=...\)",
        ):
            call()
    assert net.build((1, 8, 8), device=backend.device, seed=0) is net
    assert tuple(net.predict(x).shape) == (5, 4)
    assert set(net.gradient(x, t)) == {"conv.weight", "conv.bias", "fc.weight", "fc.bias"}


def test_a_model_that_gives_maps_takes_maps_of_labels():
    net = Model(conv=Conv2d(1, 2, 3)).build((1, 8, 8), seed=0)
    x, t = patches(2)[0], np.zeros((2, 6, 6), int)
    logits = net.predict(x).astype("float64")
    assert logits.shape == (2, 2, 6, 6)
    expected = -(logits[:, 0] - np.log(np.exp(logits).sum(axis=1))).mean()
    assert net.loss(x, t) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(LabelError, match=r"expects class indices \(2, 6, 6\)"):
        net.loss(*patches(2))
    with pytest.raises(ShapeError, match=r"one output for each class, but its output has shape"):
        net.accuracy(*patches(2))


def test_the_same_seed_gives_the_same_net(backend):
    assert bits(small_net(backend.device)) == bits(small_net("numpy"))
    assert bits(small_net(seed=1)) != bits(small_net(seed=0))
    assert bits(small_net(seed=None)) != bits(small_net(seed=None))
    assert bits(small_net(resolve("numpy"))) == bits(small_net())
