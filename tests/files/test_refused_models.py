"""Files that are no model, damaged or made to harm: each is refused with ModelFormatError."""

import contextlib
import json
import pickle
import re
import struct
import zipfile

import numpy as np
import pytest
import safetensors.numpy as st_numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import portacnn
from portacnn import Normalize, files
from portacnn.errors import ModelFormatError
from portacnn.layers import (
    Flatten,
    Linear,
)
from portacnn.models import Model, SimpleConvNet
from support.matrix import needs
from support.nets import small_net
from support.saved_models import header_of, own
from support.trees import plain_json, replaced

fuzz = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The bytes of a saved small net."""
    path = tmp_path_factory.mktemp("saved") / "net.safetensors"
    small_net().save(path)
    return path.read_bytes()


def pictured():
    """One that takes uint8."""
    net = Model(Flatten(), Linear(None, 2)).build((3, 1, 2), seed=0)
    net.preprocess = Normalize(mean=(0.485, 0.456, 0.1), std=(0.229, 0.224, 1 / 3))
    return net


def with_description(data, description):
    """The same file with another description of its model, and no checksum."""
    header, tensors = header_of(data)
    header["__metadata__"] = {"portacnn": re.sub(r'"checksum": "[0-9a-f]{8}", ', "", description)}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + tensors


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
    assert caught.value.strerror == f"there is no folder {tmp_path / 'no'}; create it first"


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
