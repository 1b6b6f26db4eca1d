"""Exported files: whole or not there, weights beside them, and what they tell of training."""

import re
import sys

import numpy as np
import onnx
import pytest

import portacnn.onnx
from portacnn import layers as L
from portacnn import models as M
from portacnn.errors import DependencyError
from portacnn.layers import Linear, Sequential
from portacnn.onnx import export as public_export
from support.checks import refuses
from support.onnx_export import close, export, images, nodes, run

exporting, building = sys.modules["portacnn.onnx.export"], sys.modules["portacnn.onnx.builder"]


def test_dropout_is_told_to_whoever_trains_the_file(tmp_path):
    path = export(
        Sequential(drop=L.Dropout(0.3), more=L.Dropout2d(0.3)).build((2, 3, 3), device="numpy"),
        tmp_path,
    )
    (constant, dropout) = nodes(path)
    assert (dropout.name, dropout.op_type) == ("drop/Dropout", "Dropout")
    assert onnx.numpy_helper.to_array(constant.attribute[0].t) == np.float32(0.3)


def test_momentum_is_told_in_onnxs_way(tmp_path):
    """There it is the share of the running statistics that stays."""
    network = Sequential(
        a=L.BatchNorm1d(3, momentum=0.25), b=L.BatchNorm1d(3, momentum=None)
    ).build((3,), device="numpy")
    first, second = (
        {attribute.name: attribute.f for attribute in node.attribute}
        for node in nodes(export(network, tmp_path))
    )
    assert first["momentum"] == 0.75
    assert "momentum" not in second


def test_two_exports_are_equal_byte_for_byte(tmp_path):
    model = M.LeNet5(device="numpy", seed=0)
    first = export(model, tmp_path).read_bytes()
    assert export(model, tmp_path).read_bytes() == first


def test_a_missing_onnx_raises_an_error(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    network = Linear(3, 2).build((3,), device="numpy")
    call = lambda: public_export(network, tmp_path / "m.onnx")  # noqa: E731
    refuses(DependencyError, "onnx is not installed", 'pip install "portacnn[onnx]"', call=call)
    with pytest.raises(ImportError):
        call()


def test_a_folder_that_is_not_there(tmp_path):
    network = Linear(3, 2).build((3,), device="numpy")
    with pytest.raises(FileNotFoundError):
        public_export(network, tmp_path / "none" / "m.onnx")


@pytest.fixture
def small_files(monkeypatch):
    """As if a file could hold next to nothing: the weights go beside it."""
    monkeypatch.setattr(exporting, "_INLINE", 1000)


def beside(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "model.onnx")


def test_large_weights_go_to_a_second_file(small_files, tmp_path):
    model = M.SimpleConvNet(device="numpy", seed=0)
    path = export(model, tmp_path)
    (name,) = beside(tmp_path)
    assert re.fullmatch(r"model\.onnx\.[0-9a-f]{16}\.data", name)
    assert path.stat().st_size < 10_000
    x = images(model, 7)
    close(run(path, x), model.predict(x))
    file = onnx.load(path, load_external_data=False)
    places = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in file.graph.initializer
    }
    assert places["fc1.bias"] == {}
    assert places["fc1.weight"]["location"] == name
    assert all(int(place["offset"]) % 4096 == 0 for place in places.values() if place)
    loaded = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(path).graph.initializer
    }
    assert all(np.array_equal(loaded[name], array) for name, array in model.state_dict().items())


def test_a_second_export_leaves_no_weights_behind(small_files, tmp_path, monkeypatch):
    (tmp_path / "other.onnx.0123456789abcdef.data").write_bytes(b"another's")
    (tmp_path / "model.onnx.data").write_bytes(b"another's")
    foreign = beside(tmp_path)
    export(M.SimpleConvNet(device="numpy", seed=0), tmp_path)
    first = set(beside(tmp_path))
    export(M.SimpleConvNet(device="numpy", seed=1), tmp_path)
    second = set(beside(tmp_path))
    assert len(first & second) == len(foreign)
    assert len(second) == len(foreign) + 1
    monkeypatch.setattr(exporting, "_INLINE", 1 << 30)
    export(M.SimpleConvNet(device="numpy", seed=2), tmp_path)
    assert beside(tmp_path) == foreign


@pytest.mark.parametrize("failing", [1, 2])
def test_a_disk_that_fills_up_leaves_what_was_there(failing, small_files, monkeypatch, tmp_path):
    model = M.SimpleConvNet(device="numpy", seed=0)
    path, x = export(model, tmp_path), images(model, 2)
    before, names = model.predict(x), beside(tmp_path)
    write, calls = exporting.write_atomically, []

    def full(target, content):
        calls.append(target)
        if len(calls) == failing:
            raise OSError(28, "No space left on device")
        write(target, content)

    monkeypatch.setattr(exporting, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        public_export(M.SimpleConvNet(device="numpy", seed=1), path)
    assert len(calls) == failing
    assert beside(tmp_path) == names
    close(run(path, x), before)


@pytest.mark.slow
def test_more_than_two_gigabytes_can_be_exported(tmp_path):
    network = Sequential(
        wide=Linear(24_000, 24_000, bias=False, weight_init="zeros"), fc=Linear(24_000, 3)
    )
    network.build((24_000,), device="numpy", seed=0)
    network.children["wide"].params["weight"][-1, :7] = 1.0
    path = export(network, tmp_path)
    assert path.stat().st_size < 1 << 20
    (name,) = beside(tmp_path)
    assert (tmp_path / name).stat().st_size > 2 << 30
    x = images(network, 1)
    expected = network(x)
    del network  # each copy of its weights is a tenth of many a machine's memory
    close(run(path, x), expected)
    close(portacnn.onnx.load(path, device="numpy").predict(x), expected)
    (tmp_path / name).unlink()  # pytest would keep it
