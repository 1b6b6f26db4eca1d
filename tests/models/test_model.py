"""Models: SimpleConvNet, and what every Model does with images and labels that come from
outside."""

import subprocess
import sys
from math import sqrt

import numpy as np
import pytest

from portacnn import resolve
from portacnn.errors import (
    ArgumentError,
    BackendError,
    LabelError,
    ShapeError,
    StateError,
)
from portacnn.gradient_check import numerical_gradient
from portacnn.layers import Conv2d, Flatten, Linear, ReLU
from portacnn.models import Model, SimpleConvNet
from portacnn.ops import use_kernels
from support.matrix import needs
from support.memory_meter import metered
from support.nets import bits, patches, small_net, torch_twin


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
def test_conv_param_sets_the_convolution(conv_param, conv, features):
    net = SimpleConvNet(conv_param=conv_param, hidden_size=7, output_size=3, seed=0)
    assert net.children["conv1"].output_shape == conv
    assert net.children["fc1"].params["weight"].shape == (7, features)
    assert net.predict(np.zeros((2, 1, 28, 28), "float32")).shape == (2, 3)


@pytest.mark.parametrize(
    ("what", "gain"),
    [(0.05, None), (1, None), ("he", 2), ("relu", 2), ("xavier", 1), ("sigmoid", 1)],
)
def test_weight_init_std_sets_the_initial_weights(what, gain):
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
def test_arguments_out_of_range_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        SimpleConvNet(**arguments)


def test_the_device_comes_from_the_argument_or_the_variable(backend, monkeypatch):
    net = small_net(backend.device)
    assert net.backend == backend.backend
    assert {value.device for value in net.named_parameters().values()} == {backend.backend.device}
    monkeypatch.setenv("PORTACNN_BACKEND", backend.backend.name)
    assert SimpleConvNet((1, 8, 8), seed=0).backend.name == backend.backend.name


# --- numbers --------------------------------------------------------------------------------------


@needs("torch")
@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 7, 9)])
def test_loss_and_gradients_agree_with_pytorch(backend, shape):
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


def test_gradients_agree_with_numerical_gradients(backend):
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


def test_numerical_gradient_agrees_with_calculus(backend):
    p = backend.backend.asarray(np.arange(6.0).reshape(2, 3))
    gradient = numerical_gradient(lambda: float(np.sum(backend.host(p) ** 3)), p)
    np.testing.assert_allclose(
        backend.host(gradient), 3 * np.arange(6.0).reshape(2, 3) ** 2, rtol=1e-6, atol=1e-7
    )
    np.testing.assert_array_equal(backend.host(p), np.arange(6.0).reshape(2, 3))


def test_numerical_gradient_takes_any_memory_order():
    p = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    np.testing.assert_allclose(numerical_gradient(lambda: float((p**2).sum()), p), 2 * p, rtol=1e-6)


def test_numerical_gradient_puts_back_when_f_fails():
    p = np.array([1.0, 2.0])
    with pytest.raises(ZeroDivisionError):
        numerical_gradient(lambda: 1 / 0, p)
    assert p.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("labels", ["int64", "uint8", "one-hot", "float one-hot"])
def test_labels_may_have_any_form(backend, labels):
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


def test_images_may_have_other_float_types_and_layouts(backend):
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


def test_one_image_and_no_image_are_allowed(backend):
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
def test_the_loss_of_an_empty_batch_is_refused(device):
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


# --- models of other shapes -----------------------------------------------------------------------


def test_a_model_must_be_built_before_it_runs(backend):
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


# the peak of the process, as malloc's own losses count too; in a process of its own for that reason
MEASURED = """
import resource
import numpy as np
from portacnn import SimpleConvNet

x, t = np.zeros((10_000, 1, 28, 28), "float32"), np.zeros(10_000, "int64")
x += 0.5
net = SimpleConvNet((1, 28, 28), device="DEVICE", seed=0)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for name in ("accuracy", "loss", "evaluate"):
    getattr(net, name)(x[:300], t[:300])
before = peak()
for name in ("accuracy", "loss", "evaluate"):
    getattr(net, name)(x, t)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("device", ["numpy", pytest.param("torch", marks=needs("torch"))])
def test_an_evaluation_of_10000_digits_adds_at_most_50_mib(device):
    run = [sys.executable, "-c", MEASURED.replace("DEVICE", device)]
    assert float(subprocess.run(run, capture_output=True, check=True, timeout=120).stdout) < 50
