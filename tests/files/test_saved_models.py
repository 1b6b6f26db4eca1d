"""Saved models: they come back whole, on any backend, and are written whole or not at all."""

import numpy as np
import pytest
import safetensors.numpy as st_numpy

import portacnn
from portacnn import Normalize, files
from portacnn.errors import ArgumentError
from portacnn.layers import (
    Flatten,
    Layer,
    Linear,
    ReLU,
    Sequential,
    Tanh,
)
from portacnn.models import Model, SimpleConvNet
from support.matrix import needs
from support.nets import bits, patches, small_net
from support.saved_models import header_of, own

# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "make",
    [
        lambda **to: small_net(**to),
        lambda device, **to: own().build((1, 8, 8), device=device, **to),
    ],
)
def test_a_round_trip_restores_the_model(backend, tmp_path, make, dtype):
    net = make(device=backend.device, dtype=dtype, seed=3)
    path = tmp_path / "net.safetensors"
    net.save(path)
    x, t = patches(9)
    for device in (backend.device, "numpy"):
        again = portacnn.load(path, device=device)
        assert type(again) is type(net)
        assert bits(again) == bits(net)
        assert again.dtype == dtype
        assert again.input_shape == net.input_shape
        assert [(layer.path, type(layer)) for layer in again.walk()] == [
            (la.path, type(la)) for la in net.walk()
        ]
        assert again.loss(x, t) == pytest.approx(net.loss(x, t), rel=1e-5)
    assert type(net).load(path, device=backend.device).backend == backend.backend
    assert list(tmp_path.iterdir()) == [path]


@needs("torch")
def test_from_backend_to_backend(tmp_path):
    pytest.importorskip("array_api_strict")
    net = small_net("numpy", dtype="float64")
    before, expected = bits(net), net.loss(*patches(9))
    for step, device in enumerate(
        ["torch", "array_api_strict:device1", "torch", "array_api_strict", "numpy"]
    ):
        net.save(tmp_path / f"{step}")
        net = portacnn.load(tmp_path / f"{step}", device=device)
        assert bits(net) == before
        assert net.loss(*patches(9)) == pytest.approx(expected, rel=1e-12)


def test_the_variable_chooses_where_a_model_is_loaded(backend, tmp_path, monkeypatch):
    small_net().save(tmp_path / "net")
    monkeypatch.setenv("PORTACNN_BACKEND", backend.backend.name)
    assert portacnn.load(tmp_path / "net").backend.name == backend.backend.name


def test_arguments_come_back(tmp_path):
    net = SimpleConvNet(
        (2, 9, 9), {"filter_num": 3, "pad": 1}, 7, 5, weight_init_std="sigmoid", seed=0
    )
    net.save(tmp_path / "net")
    again = portacnn.load(tmp_path / "net")
    assert again.children["conv1"].padding == 1
    assert again.arguments()[1]["weight_init_std"] == "sigmoid"
    assert "seed" not in again.arguments()[1]
    model = own().build((1, 8, 8), seed=0)
    model.save(tmp_path / "own")
    loaded = portacnn.load(tmp_path / "own")
    assert [layer.output_shape for layer in loaded.walk()] == [
        layer.output_shape for layer in model.walk()
    ]
    assert loaded.save(tmp_path / "again") is None
    assert (tmp_path / "again").read_bytes() == (tmp_path / "own").read_bytes()


def test_weights_that_came_from_elsewhere(tmp_path):
    """What is in the arrays is saved, not what a seed would draw."""
    net = small_net(seed=1)
    net.load_state_dict({path: value * 0 + 2 for path, value in net.state_dict().items()})
    net.save(tmp_path / "net")
    assert all(
        (value == 2).all() for value in portacnn.load(tmp_path / "net").state_dict().values()
    )


def test_others_can_read_the_weights(backend, tmp_path):
    net = small_net(backend.device)
    net.save(tmp_path / "net.safetensors")
    tensors = st_numpy.load_file(tmp_path / "net.safetensors")
    assert {path: value.tobytes() for path, value in tensors.items()} == {
        path: value.tobytes() for path, value in net.state_dict().items()
    }


@pytest.mark.parametrize("order", ["C", "F"])
def test_tensors_of_any_layout(tmp_path, order):
    rng = np.random.default_rng(0)
    tensors = {
        "turned": np.array(rng.random((3, 4)), order=order),
        "sliced": rng.random((6, 6))[::2, 1:],
        "whole": np.arange(5),
        "none": np.zeros((0, 3), "float32"),
        "number": np.array(1.5),
    }
    files.save_tensors(tmp_path / "t", tensors, {"any": [1, None, "text"]})
    found, header = files.load_tensors(tmp_path / "t")
    assert header == {"any": [1, None, "text"]}
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def test_every_length_of_header_can_be_read_again(tmp_path):
    for length in range(1, 260, 4):
        files.save_tensors(tmp_path / "t", {"x" * length: np.zeros(2)}, None)
        files.load_tensors(tmp_path / "t")


@pytest.mark.parametrize("name", ["layers", "seed", "device", "dtype"])
def test_children_of_any_name(tmp_path, name):
    net = Model(flatten=Flatten(), **{name: Linear(None, 4)}).build((1, 2, 2), seed=0)
    net.save(tmp_path / "net")
    assert bits(portacnn.load(tmp_path / "net")) == bits(net)


def test_numpy_numbers_as_arguments(tmp_path):
    small_net(hidden_size=np.int64(5)).save(tmp_path / "net")


def test_what_json_cannot_hold_is_said_before_anything_is_written(tmp_path):
    path = tmp_path / "net"
    path.write_bytes(b"old")
    net = Model(
        Flatten(), fc=Linear(None, 2, weight_init=lambda rng, *_: rng.random((2, 4)))
    ).build((1, 2, 2))
    with pytest.raises(ArgumentError, match=r"fc \(Linear\): cannot be saved: .*function"):
        net.save(path)
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("preprocess", [Normalize(), Normalize(0.01, (1 / 3, 0, -2), [1, 2, 3e-5])])
def test_the_preprocess_comes_back(backend, tmp_path, preprocess):
    net = Model(Flatten(), Linear(None, 2)).build((3, 1, 2), device=backend.device, seed=0)
    net.save(tmp_path / "without")
    assert (
        "preprocess"
        not in header_of((tmp_path / "without").read_bytes())[0]["__metadata__"]["portacnn"]
    )
    assert portacnn.load(tmp_path / "without", device=backend.device).preprocess is None
    net.preprocess = preprocess
    net.save(tmp_path / "with")
    again = portacnn.load(tmp_path / "with", device=backend.device)
    assert again.preprocess == preprocess
    assert hash(again.preprocess) == hash(preprocess)
    x = np.arange(12, dtype="uint8").reshape(2, 3, 1, 2)
    np.testing.assert_array_equal(backend.host(again.predict(x)), backend.host(net.predict(x)))


# --- whole or not at all --------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "net.safetensors"
    small_net().save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        small_net(seed=1).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_replaces_the_old_file(tmp_path):
    path = tmp_path / "net"
    small_net(seed=0).save(path)
    small_net(seed=1).save(path)
    assert bits(portacnn.load(path)) == bits(small_net(seed=1))
    assert list(tmp_path.iterdir()) == [path]
    other = tmp_path / "plain"
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode  # as the umask says, not mkstemp's 0600


def test_content_in_pieces(tmp_path):
    """All of them in their order; and where one cannot be had, the file that was there."""
    path = tmp_path / "pieces"
    files.write_atomically(path, (bytes([i]) * i for i in range(4)))
    assert path.read_bytes() == b"\x01\x02\x02\x03\x03\x03"

    def broken():
        yield b"new"
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        files.write_atomically(path, broken())
    assert path.read_bytes() == b"\x01\x02\x02\x03\x03\x03"
    assert list(tmp_path.iterdir()) == [path]


def test_no_folder_to_write_into(tmp_path):
    with pytest.raises(FileNotFoundError):
        small_net().save(tmp_path / "missing" / "net")


# --- what is no model -----------------------------------------------------------------------------


def test_a_class_of_ones_own_does_not_replace_portacnns(tmp_path):
    Model(act=Tanh(), flatten=Flatten(), fc=Linear(None, 2)).build((1, 2, 2), seed=0).save(
        tmp_path / "net"
    )
    type("Tanh", (Layer,), {"infer": lambda self, shape: shape, "forward": lambda self, x, **_: x})
    assert type(portacnn.load(tmp_path / "net").children["act"]) is Tanh


class Blocks(Sequential):
    def __init__(self, blocks):
        super().__init__(*blocks)


def test_layers_in_a_list_come_back(tmp_path):
    net = Model(b=Blocks([Flatten(), ReLU()]), fc=Linear(None, 4)).build((1, 2, 2), seed=0)
    net.save(tmp_path / "net")
    assert bits(portacnn.load(tmp_path / "net")) == bits(net)


def test_the_arrays_of_a_part():
    tensors = {"model.a.b": 1, "models.a": 2, "model": 3, "best.model.a": 4}
    assert files.within("model", tensors) == {"a.b": 1}


def test_a_layer_that_a_script_defines(tmp_path):
    """Its module is ``__main__``, whose name begins with an underscore as private classes' do."""
    kind = type("OfAScript", (ReLU,), {"__module__": "__main__"})
    net = Model(act=kind(), fc=Linear(None, 2)).build((3,), seed=0)
    net.save(tmp_path / "net")
    assert type(portacnn.load(tmp_path / "net").children["act"]) is kind
