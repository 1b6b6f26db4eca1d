"""Models in files: what is written comes back, and what is no model is refused before anything of
it is believed."""

import contextlib
import json
import pickle
import re
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import portacnn
from portacnn import Normalize, files
from portacnn.errors import ArgumentError, ModelFormatError
from portacnn.layers import (
    AvgPool2d,
    Conv2d,
    Flatten,
    Layer,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
    Sigmoid,
    Tanh,
)
from portacnn.models import Model, SimpleConvNet
from support.matrix import needs
from support.nets import bits, patches, small_net
from support.trees import plain_json, replaced

st_numpy = pytest.importorskip("safetensors.numpy")
fuzz = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("PORTACNN_BACKEND", raising=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The bytes of a saved small net."""
    path = tmp_path_factory.mktemp("saved") / "net.safetensors"
    small_net().save(path)
    return path.read_bytes()


def own():
    return Model(
        stem=Sequential(Conv2d(1, 3, (3, 2), padding=((1, 0), (0, 1)), bias=False), act=Sigmoid()),
        pool=MaxPool2d(2, ceil_mode=True),
        mean=AvgPool2d((2, 1), stride=1),
        relu=ReLU(),
        flatten=Flatten(),
        fc=Linear(None, 4, weight_init="xavier", bias_init=0.5),
    )


def pictured():
    """One that takes uint8."""
    net = Model(Flatten(), Linear(None, 2)).build((3, 1, 2), seed=0)
    net.preprocess = Normalize(mean=(0.485, 0.456, 0.1), std=(0.229, 0.224, 1 / 3))
    return net


def header_of(data):
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_description(data, description):
    """The same file with another description of its model, and no checksum."""
    header, tensors = header_of(data)
    header["__metadata__"] = {"portacnn": re.sub(r'"checksum": "[0-9a-f]{8}", ', "", description)}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + tensors


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "make",
    [
        lambda **to: small_net(**to),
        lambda device, **to: own().build((1, 8, 8), device=device, **to),
    ],
)
def test_round_trip(backend, tmp_path, make, dtype):
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


def refused(path, data, match=None):
    path.write_bytes(data)
    with pytest.raises(ModelFormatError, match=match) as caught:
        portacnn.load(path)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, ValueError)


def only_format_errors(path, data):
    path.write_bytes(data)
    with contextlib.suppress(ModelFormatError):
        assert isinstance(portacnn.load(path), Model)


def test_cut_short_anywhere(saved, tmp_path):
    (header,) = struct.unpack("<Q", saved[:8])
    cuts = {
        *range(0, 40),
        *range(0, len(saved), 97),
        header + 7,
        header + 8,
        header + 9,
        len(saved) - 1,
    }
    for cut in sorted(cuts):
        refused(tmp_path / "net", saved[:cut], "is not an intact safetensors file")
    refused(tmp_path / "net", saved + b"x", "is not an intact safetensors file")


@fuzz
@given(data=st.data())
def test_flipped_bits(saved, tmp_path, data):
    (header,) = struct.unpack("<Q", saved[:8])
    spoilt = bytearray(saved)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, header + 8) | st.integers(0, len(saved) - 1))
        spoilt[place] ^= 1 << data.draw(st.integers(0, 7))
    only_format_errors(tmp_path / "net", bytes(spoilt))


@fuzz
@given(junk=st.binary(max_size=300))
def test_random_bytes(tmp_path, junk):
    only_format_errors(tmp_path / "net", junk)
    only_format_errors(tmp_path / "net", struct.pack("<Q", len(junk)) + junk)


@pytest.fixture(scope="module")
def each_saved(tmp_path_factory):
    """The bytes of several saved nets."""
    nets = {"small": small_net(), "own": own().build((1, 8, 8), seed=0), "pictured": pictured()}
    folder = tmp_path_factory.mktemp("each")
    for name, net in nets.items():
        net.save(folder / name)
    return {name: (folder / name).read_bytes() for name in nets}


@pytest.mark.parametrize("net", ["small", "own", "pictured"])
@fuzz
@given(data=st.data(), new=plain_json)
def test_descriptions_with_a_part_exchanged(each_saved, tmp_path, net, data, new):
    """Whatever JSON says, a file gives a model or a ModelFormatError."""
    whole = each_saved[net]
    description = json.loads(header_of(whole)[0]["__metadata__"]["portacnn"])
    _, count = replaced(description, -1, None)
    changed, _ = replaced(description, data.draw(st.integers(0, count - 1)), new)
    only_format_errors(tmp_path / "net", with_description(whole, json.dumps(changed)))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is not an intact safetensors file"),
        ("{", "is not an intact safetensors file"),
        ("null", "does not describe its model"),
        ("[]", "does not describe"),
        ('{"format": 3}', "has format 3, but this version reads 1 and 2; upgrade portacnn"),
        ('{"format": 1}', "does not describe its model correctly: KeyError"),
        (
            '{"format": 1, "dtype": "float32", "model": {"class": ["x"], "arguments": {}}}',
            "does not describe",
        ),
        (
            '{"format": 1, "dtype": "float32", "model": {"class": "ReLU", "arguments": {}}}',
            "expected a Model, got a ReLU",
        ),
        (
            '{"format": 1, "dtype": "f4", "model": {"class": "SimpleConvNet", "arguments": {}}}',
            "dtype must be",
        ),
        (
            '{"format": 1, "dtype": "float32", "model": {"class": "SimpleConvNet", "arguments": '
            '{"x": 1}}}',
            "SimpleConvNet does not take x",
        ),
        (
            '{"format": 1, "dtype": "float32", "model": {"class": "SimpleConvNet", "arguments": '
            "{}}}",
            "the state does not fit this network. of another shape: conv1.weight",
        ),
        (
            '{"format": 1, "dtype": "float32", "input_shape": [2, 2], "model": {"class": "Model", '
            '"arguments": {}}}',
            "unexp",
        ),
    ],
)
def test_descriptions_that_do_not_fit(saved, tmp_path, text, match):
    refused(tmp_path / "net", with_description(saved, text), match)


MODEL = (
    '{"format": 1, "dtype": "float32", "input_shape": %s, "model": {"class": "Model", "arguments": '
    '{}, "layers": %s}}'
)
LINEAR = '[{"class": "Linear", "arguments": {"in_features": null, "out_features": %s}}]'


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,  # RecursionError out of json
        MODEL % ('["a"]', "[]"),  # ValueError out of int()
        MODEL % ("[Infinity]", "[]"),  # OverflowError out of int()
        MODEL % ("[3]", LINEAR % 10**18),  # MemoryError or ValueError out of NumPy
        MODEL
        % ("[3]", '[{"class": "Sequential", "arguments": {}, "layers": ' * 400 + "[]" + "}]" * 400),
        MODEL % ("[3]", '[{"class": "Linear", "arguments": []}]'),  # AttributeError
    ],
    ids=["nesting", "text", "infinity", "huge", "depth", "list"],
)
def test_descriptions_made_to_harm(saved, tmp_path, text):
    refused(tmp_path / "net", with_description(saved, text))


@pytest.mark.parametrize(
    ("preprocess", "match"),
    [
        ("0", "does not describe its model correctly: TypeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError"),
        ('{"class": "Normalize"}', "KeyError"),
        ('{"class": "Model", "arguments": {}}', "unknown preprocess 'Model'; upgrade portacnn"),
        ('{"class": ["Normalize"], "arguments": {}}', "unknown preprocess"),
        ('{"class": "Normalize", "arguments": [1]}', "TypeError"),
        ('{"class": "Normalize", "arguments": {"size": 1}}', "Normalize does not take size"),
        (
            '{"class": "Normalize", "arguments": {"mean": NaN}}',
            "mean must be a finite number, got nan",
        ),
        ('{"class": "Normalize", "arguments": {"mean": {"a": 1}}}', "mean must be a finite number"),
        (
            '{"class": "Normalize", "arguments": {"mean": [[1], [1], [1]]}}',
            "must be a finite number",
        ),
        (
            '{"class": "Normalize", "arguments": {"std": [1, 1, 0]}}',
            "must be a finite number above 0, got 0",
        ),
        (
            '{"class": "Normalize", "arguments": {"scale": Infinity}}',
            "scale must be a finite number above 0",
        ),
        (
            '{"class": "Normalize", "arguments": {"scale": 1%s}}' % ("0" * 400),
            "scale must be a finite number above 0",
        ),
        (
            '{"class": "Normalize", "arguments": {"mean": [1, 1]}}',
            "mean has 2 values, one per channel",
        ),
    ],
)
def test_preprocesses_made_to_harm(tmp_path, preprocess, match):
    pictured().save(tmp_path / "good")
    whole = (tmp_path / "good").read_bytes()
    header = json.loads(header_of(whole)[0]["__metadata__"]["portacnn"])
    good = json.dumps(header["preprocess"])
    text = json.dumps(header)
    assert good in text
    refused(tmp_path / "net", with_description(whole, text.replace(good, preprocess)), match)


def test_a_class_nobody_imported(saved, tmp_path):
    text = '{"format": 1, "dtype": "float32", "model": {"class": "Nobody", "arguments": {}}}'
    refused(
        tmp_path / "net",
        with_description(saved, text),
        "unknown class 'Nobody'; import the module that defines it",
    )


def test_another_class_than_asked_for(tmp_path):
    own().build((1, 8, 8), seed=0).save(tmp_path / "net")
    with pytest.raises(ModelFormatError, match="net: expected a SimpleConvNet, got a Model"):
        SimpleConvNet.load(tmp_path / "net")
    small_net().save(tmp_path / "net")
    assert type(Model.load(tmp_path / "net")) is SimpleConvNet


def test_a_folder_that_is_not_there(tmp_path):
    """The error is about what was asked for, not about a temporary file."""
    with pytest.raises(FileNotFoundError) as caught:
        small_net().save(tmp_path / "no" / "net")
    assert caught.value.filename == str(tmp_path / "no" / "net")


def test_other_peoples_safetensors(tmp_path):
    st_numpy.save_file({"weight": np.zeros(3)}, tmp_path / "net")
    with pytest.raises(
        ModelFormatError,
        match=r"net: it does not describe its "
        r"model.*model.load_weights\(path\)",
    ):
        portacnn.load(tmp_path / "net")
    tensors, header = files.load_tensors(tmp_path / "net")
    assert header is None
    assert tensors["weight"].tolist() == [0, 0, 0]


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_refused_unread(tmp_path, protocol):
    refused(
        tmp_path / "net",
        pickle.dumps({"weight": Bomb()}, protocol),
        "looks like a pickle or a PyTorch archive, which can run code when it is read. portacnn "
        "reads safetensors. "
        "If you trust the file, convert it where it was made",
    )
    if protocol == 2:
        refused(tmp_path / "net", pickle.dumps(Bomb(), 0), "is not an intact safetensors file")


def test_a_pytorch_archive_is_refused_unread(tmp_path):
    with zipfile.ZipFile(tmp_path / "net", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    refused(
        tmp_path / "net",
        (tmp_path / "net").read_bytes(),
        "looks like a zip archive, or a pickle or a PyTorch archive",
    )


@needs("torch")
def test_what_torch_saves_is_refused(tmp_path):
    import torch

    for new in (True, False):
        torch.save({"weight": torch.zeros(3)}, tmp_path / "net", _use_new_zipfile_serialization=new)
        refused(
            tmp_path / "net",
            (tmp_path / "net").read_bytes(),
            r"safetensors\.torch\.save_file\(state_dict, \.\.\.\)",
        )


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        portacnn.load(tmp_path / "missing")
    with pytest.raises(IsADirectoryError):
        portacnn.load(tmp_path)


def test_an_unknown_device_is_not_the_files_fault(saved, tmp_path):
    (tmp_path / "net").write_bytes(saved)
    with pytest.raises(portacnn.PortacnnError, match="unknown device 'tpu'") as caught:
        portacnn.load(tmp_path / "net", device="tpu")
    assert not isinstance(caught.value, ModelFormatError)


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
