"""ONNX files from a stranger: each is read rightly or refused with ModelFormatError; none crashes,
hangs or eats the memory."""

import logging
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import portacnn.onnx
from portacnn.errors import ModelFormatError
from portacnn.onnx import wire

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from support import onnx_files  # noqa: E402
from support.onnx_files import MODELS, model_of, numbers, spoil_bytes, spoil_parts  # noqa: E402
from tools import fuzz  # noqa: E402

node = helper.make_node


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


def write(path: Path, model: Any) -> Path:
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path


def refused(
    path: Path, model: Any, *words: str, most: int | None = 16 << 20, **options: Any
) -> None:
    """Loading raises ModelFormatError with the file's name and these words, at once, and within
    ``most`` bytes and four files."""
    write(path, model)
    start = time.monotonic()
    with pytest.raises(ModelFormatError) as caught:
        portacnn.onnx.load(path, **options)
    assert time.monotonic() - start < 10
    assert type(caught.value) is ModelFormatError
    for word in (str(path), *words):
        assert word in str(caught.value)
    assert len(str(caught.value)) < 4000
    if most is None:
        return
    tracemalloc.start()
    try:
        with pytest.raises(ModelFormatError):
            portacnn.onnx.load(path, **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < most + 4 * path.stat().st_size


def test_the_models_load_as_they_are(path: Path):
    for make in MODELS.values():
        assert portacnn.onnx.load(write(path, make())).state_dict()


# --- spoilt files ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


SPOIL = settings(
    max_examples=100,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)
CONTENTS = {name: make().SerializeToString() for name, make in MODELS.items()}


def attempted(path: Path, content: bytes) -> None:
    """What the fuzz run does with a file: anything but a model or ModelFormatError fails."""
    path.write_bytes(content)
    assert fuzz.attempt(onnx_files.load, path) in (
        "refused",
        "loaded and run",
        "loaded, too large to be run here",
    )


@SPOIL
@given(name=st.sampled_from(sorted(CONTENTS)), share=st.floats(0, 1, exclude_max=True))
def test_cut_files(path: Path, quiet: None, name: str, share: float):
    attempted(path, CONTENTS[name][: int(share * len(CONTENTS[name]))])


@SPOIL
@given(name=st.sampled_from(sorted(CONTENTS)), at=st.integers(0, 1 << 20), bit=st.integers(0, 7))
def test_flipped_bits(path: Path, quiet: None, name: str, at: int, bit: int):
    content = bytearray(CONTENTS[name])
    content[at % len(content)] ^= 1 << bit
    attempted(path, bytes(content))


@SPOIL
@given(content=st.binary(max_size=300))
def test_random_bytes(path: Path, quiet: None, content: bytes):
    attempted(path, content)


@SPOIL
@given(name=st.sampled_from(sorted(CONTENTS)), seed=st.integers(0, 1 << 30))
def test_spoilt_bytes(path: Path, quiet: None, name: str, seed: int):
    attempted(path, spoil_bytes(CONTENTS[name], Random(seed)))


@SPOIL
@given(name=st.sampled_from(sorted(CONTENTS)), seed=st.integers(0, 1 << 30))
def test_spoilt_parts(path: Path, quiet: None, name: str, seed: int):
    attempted(path, spoil_parts(MODELS[name](), Random(seed)))


@pytest.mark.slow
def test_fuzz(tmp_path: Path, quiet: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert fuzz.main("onnx", "60", str(int(time.time()))) == 0


# --- what a graph may not be ----------------------------------------------------------------------


def test_no_file_and_no_model(path: Path):
    with pytest.raises(FileNotFoundError):
        portacnn.onnx.load(path)
    refused(path, b"", "no graph")
    refused(path, b"\x80\x04\x95 a pickle", "not a whole ONNX file")
    refused(path, helper.make_model(helper.make_graph([], "g", [], [])), "no output")


def test_cycles_and_names(path: Path):
    two = [node("Relu", ["b"], ["a"]), node("Add", ["a", "x"], ["b"]), node("Relu", ["b"], ["y"])]
    refused(path, model_of(two), "cycle", "'b'")
    refused(path, model_of([node("Add", ["y", "x"], ["y"])]), "cycle")
    refused(
        path, model_of([node("Relu", ["nobody"], ["y"])]), "'nobody'", "no node computes its input"
    )
    refused(
        path, model_of([node("Relu", ["x"], ["z"])]), "'y'", "no node computes the graph's output"
    )
    refused(
        path,
        model_of([node("Relu", ["x"], ["y"]), node("Tanh", ["x"], ["y"])]),
        "'y' already exists",
    )
    refused(path, model_of([node("Relu", ["x"], ["x"])]), "already exists")
    refused(path, model_of([node("Relu", ["x"], ["w"])], {"w": numbers(2)}), "already exists")
    refused(path, model_of([node("Relu", ["x"], [])]), "no outputs")
    model = model_of([node("Relu", ["x"], ["y"])], {"w": numbers(2)})
    model.graph.initializer.append(model.graph.initializer[0])
    refused(path, model, "two initializers")
    model = model_of([node("Relu", ["x"], ["y"])])
    model.graph.input.append(model.graph.input[0])
    refused(path, model, "two inputs")


def test_one_input_and_one_output(path: Path):
    model = model_of([node("Add", ["x", "z"], ["y"])])
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 2, 5, 5]))
    refused(path, model, "one input", "'x', 'z'")
    model = model_of([node("Split", ["x"], ["y", "z"], axis=1)])
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    refused(path, model, "one output", "'y', 'z'")
    refused(path, model_of([node("Relu", ["w"], ["y"])], {"w": numbers(2)}), "one input", "none")
    refused(
        path, model_of([node("Relu", ["x"], ["y"])], dtype=TensorProto.INT64), "data type 7 (int64)"
    )
    refused(
        path,
        model_of([node("Cast", ["x"], ["y"], to=1)], dtype=TensorProto.UINT8),
        "(uint8)",
        "model.preprocess",
    )


def test_operators_that_are_not_there(path: Path):
    refused(
        path,
        model_of([node("Einsum", ["x"], ["y"], "blocks/7", equation="ij->ji")]),
        "'blocks/7' (Einsum)",
        "Conv, ",
    )
    refused(path, model_of([node("Relu", ["x"], ["y"], domain="ai.tools")]), "ai.tools.Relu")
    inner = helper.make_graph([], "inner", [], [helper.make_tensor_value_info("x", 1, None)])
    refused(
        path, model_of([node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)]), "(If)"
    )
    refused(path, model_of([node("Relu", ["x"], ["y"], body=inner)]), "unknown attribute 'body'")
    model = model_of([node("Relu", ["x"], ["y"])])
    model.functions.append(helper.make_function("", "Relu", ["x"], ["y"], [], model.opset_import))
    refused(path, model, "functions")
    model = model_of([node("Relu", ["x"], ["y"])])
    model.graph.sparse_initializer.append(onnx.SparseTensorProto())
    refused(path, model, "sparse")


@pytest.mark.parametrize("version", [0, 5, 29, 1 << 40, -1])
def test_opsets(path: Path, version: int):
    model = model_of([node("Relu", ["x"], ["y"])])
    model.opset_import[0].version = version
    refused(path, model, "opset")
    del model.opset_import[:]
    refused(path, model, "opset")


def test_attributes(path: Path):
    refused(path, model_of([node("Softmax", ["x"], ["y"], axis=1.5)]), "'axis'", "kind")
    refused(path, model_of([node("LeakyRelu", ["x"], ["y"], alpha=float("nan"))]), "'alpha' is nan")
    refused(
        path, model_of([node("Relu", ["x"], ["y"], surprise=1)]), "unknown attribute 'surprise'"
    )
    model = model_of([node("Softmax", ["x"], ["y"], axis=1)])
    model.graph.node[0].attribute.append(model.graph.node[0].attribute[0])
    refused(path, model, "twice")
    model = model_of([node("Softmax", ["x"], ["y"])])
    model.graph.node[0].attribute.append(
        onnx.AttributeProto(name="axis", ref_attr_name="other", type=2)
    )
    refused(path, model, "no value")


def test_outputs_that_no_layer_makes(path: Path):
    nodes = [node("Dropout", ["x"], ["a", "mask"]), node("Add", ["a", "mask"], ["y"])]
    refused(path, model_of(nodes), "output 1 ('mask')")


# --- absurd numbers -------------------------------------------------------------------------------

HUGE = 1 << 40
WEIGHT = {"w": numbers(2, 2, 3, 3)}


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Conv", ["x", "w"], ["y"], pads=[0, 0, HUGE, HUGE])],
        [node("Conv", ["x", "w"], ["y"], pads=[0, 0, (1 << 31) - 1, (1 << 31) - 1])],
        [node("Conv", ["x", "w"], ["y"], pads=[0, 0, -1, 0])],
        [node("Conv", ["x", "w"], ["y"], strides=[0, 1])],
        [node("Conv", ["x", "w"], ["y"], dilations=[HUGE, 1])],
        [node("Conv", ["x", "w"], ["y"], dilations=[1])],
        [node("Conv", ["x", "w"], ["y"], group=0)],
        [node("Conv", ["x", "w"], ["y"], group=HUGE)],
        [node("Conv", ["x", "w"], ["y"], group=2)],
        [node("Conv", ["x", "w"], ["y"], kernel_shape=[2, 2])],
        [node("Conv", ["x", "w"], ["y"], auto_pad="SOME")],
        [node("Conv", ["x"], ["y"])],
        [node("Conv", ["x", "x"], ["y"])],
        [node("ConvTranspose", ["x", "w"], ["y"], strides=[(1 << 31) - 1] * 2)],
        [node("ConvTranspose", ["x", "w"], ["y"], output_shape=[HUGE, HUGE])],
        [node("ConvTranspose", ["x", "w"], ["y"], output_shape=[-5, 3])],
        [node("ConvTranspose", ["x", "w"], ["y"], output_padding=[9, 9])],
        [node("MaxPool", ["x"], ["y"])],
        [node("MaxPool", ["x"], ["y"], kernel_shape=[1 << 30, 1 << 30], pads=[1 << 29] * 4)],
        [node("MaxPool", ["x"], ["y"], kernel_shape=[1 << 16, 1 << 16])],
        [node("MaxPool", ["x"], ["y"], kernel_shape=[0, 2])],
        [node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], pads=[0, 0, 1 << 30, 1 << 30])],
        [node("AveragePool", ["x"], ["y"], kernel_shape=[2, 2], pads=[9, 9, 9, 9])],
        [node("LRN", ["x"], ["y"], size=0)],
        [node("LRN", ["x"], ["y"], size=4)],
        [node("Softmax", ["x"], ["y"], axis=HUGE)],
        [node("Softmax", ["x"], ["y"], axis=0)],
        [node("Flatten", ["x"], ["y"], axis=0)],
        [node("Flatten", ["x"], ["y"], axis=2)],
        [node("Transpose", ["x"], ["y"], perm=[0, 1, 2])],
        [node("Transpose", ["x"], ["y"], perm=[1, 0, 2, 3])],
        [node("Transpose", ["x"], ["y"], perm=list(range(10_000)))],
        [node("Concat", ["x", "x"], ["y"], axis=0)],
        [node("Concat", ["x", "w"], ["y"], axis=1)],
        [node("Dropout", ["x", "two"], ["y"])],
        [node("Dropout", ["x", "", "yes"], ["y"])],
        [node("Reshape", ["x", "to"], ["y"])],
        [node("Reshape", ["x", "w"], ["y"])],
        [node("Reshape", ["x", "x"], ["y"])],
        [node("Unsqueeze", ["x", "to"], ["y"])],
        [node("Squeeze", ["x", "one"], ["y"])],
        [node("Split", ["x"], ["y"] + [f"y{i}" for i in range(9)], axis=1)],
        [node("Slice", ["x", "one", "one", "one"], ["y"])],
        [node("Gather", ["x", "one"], ["y"], axis=0)],
        [node("Gather", ["x", "to"], ["y"], axis=1)],
        [node("Pad", ["x", "pads"], ["y"])],
        [node("Pad", ["x", "pads"], ["y"], mode="reflect")],
        [node("Pad", ["x", "one"], ["y"])],
        [node("Gemm", ["x", "w"], ["y"])],
        [node("MatMul", ["x", "w"], ["y"])],
        [node("MatMul", ["w", "x"], ["y"])],
        [node("MatMul", ["x", "wide"], ["y"])],
        [node("Add", ["x", "wide"], ["y"])],
        [node("Add", ["x", "batch"], ["y"])],
        [node("Add", ["x"], ["y"])],
        [node("Add", ["x", "x", "x"], ["y"])],
        [node("Cast", ["x"], ["y"], to=7)],
        [node("Cast", ["x"], ["y"])],
        [node("ReduceMean", ["x"], ["y"])],
        [node("ReduceMean", ["x"], ["y"], axes=[1, 1])],
        [node("BatchNormalization", ["x", "v", "v", "v", "v"], ["y"], training_mode=1)],
        [node("BatchNormalization", ["x", "v", "v", "v"], ["y"])],
        [node("BatchNormalization", ["x", "wide", "v", "v", "v"], ["y"])],
        [node("BatchNormalization", ["x", "v", "v", "v", "v"], ["y"], epsilon=-1.0)],
        [node("LayerNormalization", ["x", "v"], ["y"])],
        [node("GroupNormalization", ["x", "v", "v"], ["y"], num_groups=HUGE)],
        [node("InstanceNormalization", ["x", "v", "one"], ["y"])],
        [node("PRelu", ["x", "w"], ["y"])],
        [node("Clip", ["x", "v"], ["y"])],
        [node("Celu", ["x"], ["y"], alpha=0.0)],
        [node("ConstantOfShape", ["shape"], ["c"]), node("Add", ["x", "c"], ["y"])],
        [node("ConstantOfShape", ["to"], ["c"]), node("Add", ["x", "c"], ["y"])],
        [node("Mul", ["row", "column"], ["c"]), node("Add", ["x", "c"], ["y"])],
        [
            node("Shape", ["x"], ["s"]),
            node("Mul", ["s", "s"], ["t"]),
            node("Reshape", ["x", "t"], ["y"]),
        ],
        [
            node("Shape", ["x"], ["s"]),
            node("Cast", ["s"], ["t"], to=1),
            node("Add", ["x", "t"], ["y"]),
        ],
        [node("Relu", ["w"], ["a"]), node("Add", ["a", "x"], ["y"])],
        [node("Identity", ["w"], ["y"]), node("Relu", ["x"], ["z"])],
    ],
    ids=lambda nodes: f"{nodes[0].op_type}",
)
def test_numbers_that_mean_nothing(path: Path, nodes: list[Any]):
    weights = {
        **WEIGHT,
        "two": np.float32(2),
        "yes": np.bool_(True),
        "to": np.array([3, -7, HUGE]),
        "one": np.array([1]),
        "pads": np.array([0, 0, HUGE, 0, 0, 0, 0, 3]),
        "wide": numbers(1, 2, 3),
        "batch": numbers(3, 2, 5, 5),
        "v": numbers(2),
        "shape": np.array([1 << 20, 1 << 20]),
        "row": numbers(1, 20_000),
        "column": numbers(20_000, 1),
    }
    used = {name for n in nodes for name in n.input}
    refused(path, model_of(nodes, {k: v for k, v in weights.items() if k in used}), most=100 << 20)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Conv", {"auto_pad": "SAME_UPPER", "pads": [0, 0, 0, 0]}),
        ("Conv", {"auto_pad": "VALID", "pads": [1, 1, 1, 1]}),
        ("MaxPool", {"auto_pad": "SAME_LOWER", "pads": [0, 0, 0, 0], "kernel_shape": [3, 3]}),
    ],
)
def test_two_paddings_that_differ(path: Path, kind: str, options: dict[str, Any]):
    """Of such a pool onnxruntime takes auto_pad, onnx's own shapes pads; none is more right."""
    inputs = {"Conv": ["x", "w"], "MaxPool": ["x"]}[kind]
    weights = {"w": numbers(3, 2, 3, 3)} if kind == "Conv" else {}
    refused(
        path,
        model_of([node(kind, inputs, ["y"], **options)], weights),
        f"({kind})",
        "auto_pad",
        "pads",
    )
    options["pads"] = [0, 0, 0, 0] if options["auto_pad"] == "VALID" else [1, 1, 1, 1]
    assert portacnn.onnx.load(
        write(path, model_of([node(kind, inputs, ["y"], **options)], weights))
    ).output_shape


@pytest.mark.parametrize("kind", ["Add", "Mul", "PRelu"])
def test_a_constant_of_more_axes_would_move_the_batch(path: Path, kind: str):
    """(N, 3) and (1, 1, 3) give (1, N, 3)."""
    model = model_of([node(kind, ["x", "w"], ["y"])], {"w": numbers(1, 1, 3)}, ("N", 3))
    refused(path, model, f"({kind})", "a constant [1, 1, 3]")


def test_values_that_grow_without_end(path: Path):
    """Each doubles the one before; each is planned only."""
    nodes = [node("Concat", [f"v{i}", f"v{i}"], [f"v{i + 1}"], axis=1) for i in range(60)]
    nodes = [node("Relu", ["x"], ["v0"]), *nodes, node("Relu", ["v60"], ["y"])]
    refused(path, model_of(nodes), "more than", "values")


def test_many_small_nodes_that_ask_for_much(path: Path):
    """The same weight, used again and again, is copied each time: the room for that is limited."""
    rows = [node("Mul", [f"v{i}", "w"], [f"v{i + 1}"]) for i in range(400)]
    nodes = [node("Relu", ["x"], ["v0"]), *rows, node("Relu", ["v400"], ["y"])]
    model = model_of(nodes, {"w": numbers(1, 300_000)}, ("N", 300_000))
    refused(path, model, "more bytes", "max_extra_bytes=", most=100 << 20)
    kernels = [
        node("MaxPool", [f"v{i}"], [f"v{i + 1}"], kernel_shape=[100, 100], pads=[50] * 4)
        for i in range(20)
    ]
    refused(
        path,
        model_of([nodes[0], *kernels, node("Relu", ["v20"], ["y"])]),
        "kernels",
        most=100 << 20,
    )


def test_a_long_graph_is_read_in_time(path: Path):
    rows = [node("Relu", [f"v{i}"], [f"v{i + 1}"]) for i in range(5000)]
    rows = [node("Relu", ["x"], ["v0"]), *rows, node("Relu", ["v5000"], ["y"])]
    write(path, model_of(rows))
    start = time.monotonic()
    model = portacnn.onnx.load(path)
    assert time.monotonic() - start < 10
    assert model.predict(np.ones((1, 2, 5, 5), np.float32)).shape == (1, 2, 5, 5)


def field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    groups = bytearray()
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


@pytest.mark.parametrize(
    "content",
    [
        lambda n: field(7, field(1, b"") * n),  # nodes of nothing
        lambda n: field(7, field(1, field(4, b"R") + field(2, b"y")) * n),
        lambda n: field(7, field(5, b"") * n),  # initializers
        lambda n: field(7, field(11, b"") * n),  # inputs
        lambda n: field(7, field(1, field(4, b"R") + field(2, b"y") + field(1, b"") * n)),
        lambda n: field(7, field(1, field(5, field(8, bytes(n))))),  # a list of numbers
        lambda n: field(7, field(1, field(5, field(6, b"") * n))),  # graphs
        lambda n: field(7, field(5, field(1, bytes(n)))),  # axes
        lambda n: field(7, field(11, field(2, field(1, field(2, field(1, b"") * n))))),
        lambda n: b"\x08\x01" * n,
        lambda n: b"\x7a\x00" * n,  # fields that nobody knows
        lambda n: b"\x08" + b"\x80" * n,
        lambda n: b"\x0b" * n,  # groups, which nest
        lambda n: field(7, field(1, field(4, b"R" * n))),
        lambda n: field(7, field(7, field(7, field(7, b"")))) * 2,
    ],
    ids=range(15),
)
def test_many_small_pieces(
    path: Path, content: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch
):
    """Bytes that would be far larger as objects: what may come of them is counted. Memory is
    watched at a tenth of the size."""
    refused(path, content(300_000), most=None)
    monkeypatch.setattr(wire, "MOST", wire.MOST // 10)
    refused(path, content(30_000), most=6 << 20)


@pytest.mark.parametrize(("number", "size"), [(8, 1), (7, 4)])
def test_each_number_in_a_list_counts_as_an_object(
    path: Path, number: int, size: int, monkeypatch: pytest.MonkeyPatch
):
    """An attribute's ints and floats: one list is one field, however long it is."""
    monkeypatch.setattr(wire, "MOST", 3000)
    for count, words in ((2000, "has no operator"), (4000, "more than 3000 objects")):
        refused(path, field(7, field(1, field(5, field(number, bytes(size * count))))), words)


def test_deep_nesting(path: Path):
    content = b""
    for _ in range(2000):  # graphs in attributes of nodes of graphs
        content = field(
            1, field(4, b"If") + field(2, b"y") + field(5, field(1, b"g") + field(6, content))
        )
    refused(path, field(7, content))


# --- tensors --------------------------------------------------------------------------------------


def tensor_model(tensor: Any) -> Any:
    tensor.name = "w"
    model = model_of([node("Add", ["x", "w"], ["y"])])
    model.graph.initializer.append(tensor)
    return model


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
def test_what_a_tensor_claims(path: Path, change: dict[str, Any], words: str):
    tensor = numpy_helper.from_array(numbers(5))
    for name, value in change.items():
        tensor.ClearField(name)
        if isinstance(value, list):
            getattr(tensor, name).extend(value)
        else:
            setattr(tensor, name, value)
    refused(path, tensor_model(tensor), "tensor 'w'", words)


def test_axes(path: Path):
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
def test_numbers_that_are_not_there(path: Path, kind: int, count: int, data: dict[str, Any]):
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


# --- external data --------------------------------------------------------------------------------


def external(location: str, length: Any = None, offset: Any = None, **more: str) -> Any:
    tensor = TensorProto(
        data_type=TensorProto.FLOAT, dims=[2, 5, 5], data_location=TensorProto.EXTERNAL
    )
    given = {"location": location, "offset": offset, "length": length, **more}
    for key, value in given.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor_model(tensor)


def test_external_data(path: Path):
    values = numbers(60)
    (path.parent / "sub").mkdir()
    (path.parent / "sub" / "w.bin").write_bytes(values.tobytes())
    write(path, external("sub/w.bin", 200, 40))
    x = np.zeros((1, 2, 5, 5), np.float32)
    np.testing.assert_array_equal(portacnn.onnx.load(path).predict(x)[0].ravel(), values[10:])
    write(path, external("./sub/w.bin"))
    np.testing.assert_array_equal(portacnn.onnx.load(path).predict(x)[0].ravel(), values[:50])


def test_external_data_that_are_not_there(path: Path):
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


# --- arguments ------------------------------------------------------------------------------------


def test_shapes_that_are_open(path: Path):
    model = model_of([node("Relu", ["x"], ["y"])], shape=["N", 2, "H", "W"])
    refused(path, model, "input_shape")
    assert portacnn.onnx.load(write(path, model), input_shape=(2, 4, 6)).output_shape == (2, 4, 6)
    refused(path, model, "input_shape", input_shape=(3, 4, 6))
    refused(path, model, "input_shape", input_shape=(2, 4))
    refused(path, model_of([node("Relu", ["x"], ["y"])], shape=["N"]), "has only the batch axis")
    refused(path, model_of([node("Relu", ["x"], ["y"])], shape=["N", 0]), "open")
    refused(path, model_of([node("Relu", ["x"], ["y"])], shape=["N", -4]), "open")
    refused(path, model_of([node("Relu", ["x"], ["y"])], shape=["N", 1 << 40, 3]), "values")
