"""Tensors of ONNX files that claim what is not there, in the file and beside it."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import portacnn.onnx
from portacnn.errors import ModelFormatError
from portacnn.onnx.reading import Budget
from support.onnx_files import model_of, numbers
from support.onnx_refused import field, refused, write

node = helper.make_node


def tensor_model(tensor: Any) -> Any:
    tensor.name = "w"
    model = model_of([node("Add", ["x", "w"], ["y"])])
    model.graph.initializer.append(tensor)
    return model


# --- tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dims": [1 << 40]}, "is invalid"),
        ({"dims": [-1]}, "is invalid"),
        ({"dims": [1 << 30, 1 << 30]}, "is invalid"),
        ({"dims": [0, 1 << 30, 1 << 30]}, "is invalid"),
        ({"dims": [1 << 20]}, "takes 4194304 bytes, but there are 20"),
        ({"dims": [4]}, "takes 16 bytes, but there are 20"),
        ({"dims": []}, "takes 4 bytes"),
        ({"data_type": 0}, "data type 0 is not supported"),
        ({"data_type": 8}, "data type 8 is not supported"),
        ({"data_type": 99}, "data type 99 is not supported"),
        ({"data_type": 11}, "takes 40 bytes"),
        ({"raw_data": b""}, "takes 20 bytes, but there are 0"),
        ({"float_data": [1.0]}, "two fields"),
        ({"int32_data": [1]}, "two fields"),
    ],
)
def test_a_tensor_whose_fields_contradict_is_refused(
    path: Path, change: dict[str, Any], words: str
):
    tensor = numpy_helper.from_array(numbers(5))
    for name, value in change.items():
        tensor.ClearField(name)
        if isinstance(value, list):
            getattr(tensor, name).extend(value)
        else:
            setattr(tensor, name, value)
    refused(path, tensor_model(tensor), "tensor 'w'", words)


def test_a_tensor_with_too_many_axes_is_refused(path: Path):
    refused(
        path,
        tensor_model(TensorProto(data_type=1, dims=[1] * 17, float_data=[1.0])),
        "more than 16 axes",
    )


@pytest.mark.parametrize(
    ("kind", "count", "data"),
    [
        (TensorProto.INT64, 3, {"int64_data": [1, 2]}),
        (TensorProto.INT64, 1 << 30, {"int64_data": [1, 2]}),
        (TensorProto.INT64, 2, {"int64_data": [1, -2, 3]}),
        (TensorProto.FLOAT, 2, {"float_data": [1.0]}),
        (TensorProto.FLOAT, 2, {"double_data": [1.0, 2.0]}),
        (TensorProto.FLOAT16, 2, {"float_data": [1.0, 2.0]}),
        (TensorProto.FLOAT, 2, {}),
    ],
)
def test_missing_elements_are_refused(path: Path, kind: int, count: int, data: dict[str, Any]):
    refused(path, tensor_model(TensorProto(data_type=kind, dims=[count], **data)), "tensor 'w'")


def test_numbers_in_7_bit_groups_are_cut(path: Path):
    """Two numbers are declared: one, and the beginning of another."""
    tensor = field(8, b"w") + b"\x10\x07\x08\x02" + field(7, b"\x01\x80")
    graph = model_of([node("Reshape", ["x", "w"], ["y"])]).graph.SerializeToString()
    refused(
        path,
        field(7, graph + field(5, tensor)) + field(8, b"\x10\x11"),
        "tensor 'w'",
        "expected 2 elements",
    )


def external(location: str, length: Any = None, offset: Any = None, **more: str) -> Any:
    tensor = TensorProto(
        data_type=TensorProto.FLOAT, dims=[2, 5, 5], data_location=TensorProto.EXTERNAL
    )
    given = {"location": location, "offset": offset, "length": length, **more}
    for key, value in given.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor_model(tensor)


# --- external data --------------------------------------------------------------------------------


def test_external_data_are_read_from_the_folder_and_below(path: Path):
    values = numbers(60)
    (path.parent / "sub").mkdir()
    (path.parent / "sub" / "w.bin").write_bytes(values.tobytes())
    write(path, external("sub/w.bin", 200, 40))
    x = np.zeros((1, 2, 5, 5), np.float32)
    np.testing.assert_array_equal(portacnn.onnx.load(path).predict(x)[0].ravel(), values[10:])
    write(path, external("./sub/w.bin"))
    np.testing.assert_array_equal(portacnn.onnx.load(path).predict(x)[0].ravel(), values[:50])


def test_missing_external_data_are_refused(path: Path):
    inside = path.parent / "w.bin"
    inside.write_bytes(bytes(240))
    refused(path, external("other.bin"), "'other.bin'", "cannot be read")
    refused(path, external("w.bin", 200, 41), "truncated: expected 241 bytes, got 240")
    large = external("w.bin")
    large.graph.initializer[0].dims[0] = 1 << 20
    refused(path, large, "truncated", most=1 << 20)
    refused(path, external("w.bin", 199), "length")
    for offset in ("-1", "1e3", "0x10", " 1", "1_0", "٣", "9" * 30, "9" * 5000):
        refused(path, external("w.bin", None, offset))
    refused(path, external("w.bin", surprise="1"), "not described correctly")
    refused(path, external(""), "not described correctly")
    refused(path, external("w.bin\0"), "not described correctly")
    refused(path, external("."), "outside")
    os.mkfifo(path.parent / "pipe")
    refused(path, external("pipe"), "regular file")
    (path.parent / "folder").mkdir()
    refused(path, external("folder"))


def test_external_data_stay_inside(path: Path, tmp_path_factory: pytest.TempPathFactory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "w.bin").write_bytes(bytes(200))
    inside = path.parent / "inside"
    inside.mkdir()
    (path.parent / "w.bin").write_bytes(bytes(200))
    model = inside / "model.onnx"
    (inside / "file").symlink_to(outside / "w.bin")
    (inside / "folder").symlink_to(outside)
    (inside / "up").symlink_to("..")
    beside = path.parent / "inside-beside"
    beside.mkdir()
    (beside / "w.bin").write_bytes(bytes(200))
    for location in (
        str(outside / "w.bin"),
        "../w.bin",
        "../inside/../w.bin",
        "../inside-beside/w.bin",
        "file",
        "folder/w.bin",
        "up/w.bin",
        "/dev/zero",
        "..\\w.bin",
        "sub/../../w.bin",
    ):
        refused(model, external(location))
    (inside / "own.bin").write_bytes(bytes(200))
    (inside / "sub").mkdir()
    # not worth telling apart from those that leave
    refused(model, external("sub/../own.bin"), "outside")
    (inside / "link").symlink_to("own.bin")
    assert portacnn.onnx.load(write(model, external("link")))


def test_the_budget_is_taken_to_the_last_byte():
    budget = Budget(0, max_extra_bytes=100)
    budget.take(60)
    budget.take(40)
    with pytest.raises(ModelFormatError, match="need 1 more bytes, but only 0 are left"):
        budget.take(1)
