"""ONNX files that ask for too much, by numbers, nodes, pieces or nesting: each is refused at once
and within little memory."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

import portacnn.onnx
from portacnn.onnx import wire
from support.onnx_files import model_of, numbers
from support.onnx_refused import field, refused, write

node = helper.make_node


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
def test_values_out_of_range_are_refused(path: Path, nodes: list[Any]):
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
    refused(path, model, f"({kind})", "got [1, 1, 3]")


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
    start = time.process_time()
    model = portacnn.onnx.load(path)
    assert time.process_time() - start < 10
    assert model.predict(np.ones((1, 2, 5, 5), np.float32)).shape == (1, 2, 5, 5)


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
def test_many_small_pieces_stay_within_the_memory_limit(
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


def test_the_length_of_a_name_is_limited(path: Path):
    for length, words in ((4096, "not supported: RRR"), (4097, "a name has 4097 bytes; the limit")):
        refused(path, model_of([node("R" * length, ["x"], ["y"])]), words)


def test_whole_numbers_of_64_bits_come_back():
    """As the onnx package wrote them: 10 bytes each if they are negative."""
    given = [0, 1, -1, 127, 128, -128, (1 << 63) - 1, 1 - (1 << 63), -1 << 63]
    made = model_of([node("Slice", ["x"], ["y"], ends=given)])
    graph = wire.read_model(memoryview(made.SerializeToString())).graph
    assert graph is not None
    assert graph.nodes[0].attributes[0].values == {"ints": given}


def test_deep_nesting_is_refused(path: Path):
    content = b""
    for _ in range(2000):  # graphs in attributes of nodes of graphs
        content = field(
            1, field(4, b"If") + field(2, b"y") + field(5, field(1, b"g") + field(6, content))
        )
    refused(path, field(7, content))
