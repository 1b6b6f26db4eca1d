"""SimpleConvNet of the tutorials: against portacnn's, its gradients, its files."""

import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest

import portacnn
from portacnn import scratch
from portacnn.errors import (
    ArgumentError,
    LabelError,
    ModelFormatError,
    ShapeError,
)
from support.checks import DTYPES, agree, normal, refuses
from support.matrix import EACH_LIBRARY
from support.scratch_nets import SMALL, digits, quick_net


def test_parameter_names_and_shapes():
    net = scratch.SimpleConvNet(seed=0)
    assert {key: array.shape for key, array in net.params.items()} == {
        "W1": (30, 1, 5, 5),
        "b1": (30,),
        "W2": (30 * 12 * 12, 100),
        "b2": (100,),
        "W3": (100, 10),
        "b3": (10,),
    }
    assert isinstance(net.layers, OrderedDict)
    assert list(net.layers) == ["Conv1", "Relu1", "Pool1", "Affine1", "Relu2", "Affine2"]
    assert isinstance(net.last_layer, scratch.SoftmaxWithLoss)
    assert net.params["W1"].dtype == np.float32
    assert float(net.params["W1"].std()) == pytest.approx(0.01, rel=0.1)
    assert scratch.SimpleConvNet(dtype="float64").params["W1"].dtype == np.float64
    refuses(ArgumentError, "filters", call=lambda: scratch.SimpleConvNet(conv_param={"filters": 3}))


@pytest.mark.parametrize("pad", [0, 1])
def test_network_equals_portacnns(backend, pad):
    """From the same seed: logits, loss, gradients and accuracy."""
    arguments = {
        **SMALL,
        "input_dim": (2, 9, 11),
        "conv_param": {"filter_num": 3, "filter_size": 3, "pad": pad, "stride": 2},
    }
    x, t = normal(7, 2, 9, 11), np.arange(7) % 5
    for dtype in DTYPES:
        ours = scratch.SimpleConvNet(
            **arguments, weight_init_std="he", device=backend.device, seed=3, dtype=dtype
        )
        other = portacnn.SimpleConvNet(
            **arguments, weight_init_std="he", device=backend.device, seed=3, dtype=dtype
        )
        agree(backend, ours.predict(x), backend.host(other.predict(x)), ours.params["W1"])
        assert ours.loss(x, t) == pytest.approx(other.loss(x, t), rel=1e-6)
        assert ours.accuracy(x, t, batch_size=3) == other.accuracy(x, t)
        grads, expected = ours.gradient(x, t), other.gradient(x, t)
        for key, name in (("1", "conv1"), ("2", "fc1"), ("3", "fc2")):
            agree(
                backend, grads[f"b{key}"], backend.host(expected[f"{name}.bias"]), ours.params["W1"]
            )
            agree(
                backend,
                grads[f"W{key}"],
                backend.host(expected[f"{name}.weight"]).T
                if key != "1"
                else backend.host(expected["conv1.weight"]),
                ours.params["W1"],
            )


@EACH_LIBRARY
def test_gradient_check(backend):
    """ch07/gradient_check.py: mean differences of 1e-7 and less, in float32 too."""
    small = {
        **SMALL,
        "input_dim": (1, 6, 6),
        "conv_param": {"filter_num": 2, "filter_size": 3},
        "hidden_size": 2,
    }
    rng = np.random.default_rng(0)
    x, t = rng.random((1, 1, 6, 6)), np.array([1]).reshape(1, 1)
    kinds = (("float32", 1e-7), ("float64", 1e-8))
    for dtype, limit in kinds if backend.name == "numpy" else kinds[:1]:
        net = scratch.SimpleConvNet(**small, device=backend.device, seed=1, dtype=dtype)
        before = {key: backend.host(array).tobytes() for key, array in net.params.items()}
        own = dict(net.params)
        numerical, grads = net.numerical_gradient(x, t), net.gradient(x, t)
        assert list(numerical) == list(grads) == list(net.params)
        for key, array in net.params.items():
            assert numerical[key].dtype == array.dtype
            assert np.abs(backend.host(numerical[key]) - backend.host(grads[key])).mean() < limit
        assert any(np.abs(backend.host(g)).max() > 1e-3 for g in grads.values())
        assert all(net.params[key] is own[key] for key in own)
        assert before == {key: backend.host(array).tobytes() for key, array in net.params.items()}


def test_layers_share_the_parameters(backend):
    net = scratch.SimpleConvNet(**SMALL, device=backend.device, seed=0)
    x, t = normal(4, 1, 10, 10), np.arange(4)
    assert net.layers["Conv1"].W is net.params["W1"]
    assert net.layers["Affine2"].b is net.params["b3"]
    loss = net.loss(x, t)
    optimizer = scratch.SGD(lr=0.5)
    own = dict(net.params)
    for _ in range(3):
        optimizer.update(net.params, net.gradient(x, t))
    assert all(net.params[key] is own[key] for key in own)
    assert net.loss(x, t) < loss - 1e-3
    for key in (
        "W1",
        "W2",
        "W3",
    ):  # written into by hand, as the book's optimizers do; strict has no in-place views to share
        net.params[key][...] = backend.xp.zeros_like(net.params[key])
    assert np.allclose(backend.host(net.predict(x)), backend.host(net.params["b3"]))
    net.params["b3"] = backend.array(np.arange(5), "float32")  # or put in its place
    assert np.allclose(backend.host(net.predict(x)), np.arange(5))
    assert net.layers["Affine2"].b is net.params["b3"]


def test_accuracy_counts_the_last_short_batch(backend):
    net = scratch.SimpleConvNet(**SMALL, device=backend.device, seed=0)
    for key in ("W1", "W2", "W3"):
        net.params[key][...] = backend.xp.zeros_like(net.params[key])
    net.params["b3"][...] = backend.array([0, 0, 1, 0, 0], "float32")  # it always says 2
    x = normal(7, 1, 10, 10)
    t = np.array([0, 2, 2, 0, 0, 2, 2])
    for labels in (t, t[:, None], np.eye(5)[t], t.astype(np.uint8)):
        assert net.accuracy(x, labels, batch_size=5) == 4 / 7
        assert net.accuracy(x, labels) == 4 / 7
    assert net.accuracy(backend.array(x), backend.array(t), batch_size=3) == 4 / 7
    refuses(ArgumentError, "image", call=lambda: net.accuracy(x[:0], t[:0]))
    refuses(LabelError, "outside", call=lambda: net.accuracy(x, t + 3))
    refuses(LabelError, "7 labels", call=lambda: net.accuracy(x, t[:6]))
    refuses(ShapeError, "1, 10, 10", call=lambda: net.predict(x[:, :, :9]))


def test_nan_is_never_right(backend):
    """The book's argmax takes NaN for the largest, and all-NaN images for zeros."""
    net, (x, t) = quick_net(backend.device), digits(20)
    t = 0 * t
    x[:12] = np.nan
    rest = net.accuracy(x[12:], t[12:])
    for batch_size in (7, 100):
        assert net.accuracy(x, t, batch_size) == pytest.approx(rest * 8 / 20)
    for wrong in (0, 1.5, "7"):
        refuses(
            ArgumentError,
            "batch_size must be a whole number",
            call=lambda wrong=wrong: net.accuracy(x, t, wrong),
        )


def test_bytes_are_taken_as_they_are(backend):
    net = scratch.SimpleConvNet(**SMALL, device=backend.device, seed=0)
    x = np.random.default_rng(0).integers(0, 256, (3, 1, 10, 10), dtype=np.uint8)
    assert np.array_equal(
        backend.host(net.predict(x)), backend.host(net.predict(x.astype("float32")))
    )


# --- files ----------------------------------------------------------------------------------------


def test_save_and_load(backend, tmp_path):
    net = scratch.SimpleConvNet(**SMALL, device=backend.device, seed=0)
    other = scratch.SimpleConvNet(**SMALL, device=backend.device, seed=1, dtype="float64")
    own = dict(other.params)
    net.save_params(tmp_path / "params.pkl")  # the name that is pasted; safetensors all the same
    other.load_params(tmp_path / "params.pkl")
    assert all(other.params[key] is own[key] for key in own)
    x = normal(2, 1, 10, 10)
    assert np.allclose(backend.host(other.predict(x)), backend.host(net.predict(x)), atol=1e-6)
    loaded = pytest.importorskip("safetensors.numpy").load_file(tmp_path / "params.pkl")
    assert {key: array.shape for key, array in loaded.items()} == {
        key: array.shape for key, array in net.params.items()
    }
    assert np.array_equal(loaded["W2"], backend.host(net.params["W2"]))


def test_default_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = scratch.SimpleConvNet(**SMALL, seed=0)
    net.save_params()
    assert os.listdir() == ["params.safetensors"]
    net.load_params()


def test_converted_from_the_book(tmp_path):
    """As load_params says to do it, in the book's own environment."""
    params = {
        key: normal(*array.shape) for key, array in scratch.SimpleConvNet(**SMALL).params.items()
    }
    pytest.importorskip("safetensors.numpy").save_file(params, tmp_path / "params.safetensors")
    net = scratch.SimpleConvNet(**SMALL, dtype="float64")
    net.load_params(tmp_path / "params.safetensors")
    assert all(np.array_equal(net.params[key], params[key]) for key in params)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


def test_a_pickle_is_refused_unread(tmp_path):
    net = scratch.SimpleConvNet(**SMALL, seed=0)
    before = {key: array.copy() for key, array in net.params.items()}
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "params.pkl").write_bytes(pickle.dumps({"W1": Bomb()}, protocol))
        words = ("params.pkl", "pickle", "can run code", "safetensors.numpy.save_file(params, ...)")
        refuses(ModelFormatError, *words, call=lambda: net.load_params(tmp_path / "params.pkl"))
    (tmp_path / "params.pkl").write_bytes(pickle.dumps({"W1": Bomb()}, 0))
    refuses(
        ModelFormatError,
        "not an intact safetensors file",
        call=lambda: net.load_params(tmp_path / "params.pkl"),
    )
    assert all(np.array_equal(net.params[key], before[key]) for key in before)


def test_parameters_of_another_network(tmp_path):
    net = scratch.SimpleConvNet(**SMALL, seed=0)
    before = {key: array.copy() for key, array in net.params.items()}
    scratch.SimpleConvNet(**{**SMALL, "hidden_size": 7}).save_params(tmp_path / "wide")
    portacnn.SimpleConvNet(**SMALL).save(tmp_path / "model")
    for name in ("wide", "model"):
        refuses(
            ModelFormatError,
            name,
            "expected parameters",
            call=lambda name=name: net.load_params(tmp_path / name),
        )
    assert all(np.array_equal(net.params[key], before[key]) for key in before)
