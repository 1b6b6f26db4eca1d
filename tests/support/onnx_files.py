"""Small ONNX models for tests, made with the onnx package, and ways to spoil their bytes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import portacnn.onnx
from portacnn.models import Model

OPSET = 17


def model_of(
    nodes: Sequence[Any],
    weights: dict[str, np.ndarray] | None = None,
    shape: Sequence[Any] = ("N", 2, 5, 5),
    *,
    opset: int = OPSET,
    dtype: int = TensorProto.FLOAT,
    output: str = "y",
) -> onnx.ModelProto:
    """A model of these nodes: from "x" of this shape to ``output``."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("x", dtype, list(shape))],
        [helper.make_tensor_value_info(output, dtype, None)],
        [
            numpy_helper.from_array(np.asarray(array), name)
            for name, array in (weights or {}).items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def numbers(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def classifier() -> onnx.ModelProto:
    """A branching net with most of what a file can have: constants, shapes that are computed, a
    join, a concatenation."""
    node = helper.make_node
    nodes = [
        node(
            "Conv",
            ["x", "conv1.weight", "conv1.bias"],
            ["a"],
            "conv1/Conv",
            kernel_shape=[3, 3],
            pads=[1, 1, 1, 1],
        ),
        node(
            "BatchNormalization",
            ["a", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"],
            ["b"],
            "bn/BN",
        ),
        node("Relu", ["b"], ["c"], "relu"),
        node(
            "MaxPool",
            ["c"],
            ["d"],
            "pool",
            kernel_shape=[2, 2],
            strides=[1, 1],
            auto_pad="SAME_UPPER",
        ),
        node("Conv", ["c", "conv2.weight"], ["e"], "conv2/Conv", auto_pad="SAME_LOWER"),
        node("Add", ["d", "e"], ["f"], "add"),
        node("Concat", ["f", "c"], ["g"], "concat", axis=1),
        node("Constant", [], ["two"], value=numpy_helper.from_array(np.float32(2.0))),
        node("Mul", ["g", "two"], ["h"]),
        node("AveragePool", ["h"], ["i"], kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
        node("Shape", ["i"], ["s"]),
        node("Gather", ["s", "zero"], ["n"], axis=0),
        node("Unsqueeze", ["n", "axes"], ["n1"]),
        node("Concat", ["n1", "minus"], ["to"], axis=0),
        node("Reshape", ["i", "to"], ["j"]),
        node("Dropout", ["j"], ["k"], "drop/Dropout"),
        node("Gemm", ["k", "fc.weight", "fc.bias"], ["l"], "fc/Gemm", transB=1),
        node("Clip", ["l", "", "six"], ["y"]),
    ]
    weights = {
        "conv1.weight": numbers(4, 2, 3, 3),
        "conv1.bias": numbers(4, seed=1),
        "bn.weight": 1 + 0.1 * numbers(4, seed=2),
        "bn.bias": numbers(4, seed=3),
        "bn.running_mean": numbers(4, seed=4),
        "bn.running_var": 1 + numbers(4, seed=5) ** 2,
        "conv2.weight": numbers(4, 4, 2, 2, seed=6),
        "fc.weight": numbers(3, 8 * 9, seed=7) / 8,
        "fc.bias": numbers(3, seed=8),
        "zero": np.int64(0),
        "axes": np.array([0]),
        "minus": np.array([-1]),
        "six": np.float32(6),
    }
    return model_of(nodes, weights)


def oddities() -> onnx.ModelProto:
    """Operators that are rare, each for itself."""
    node = helper.make_node
    nodes = [
        node("Pad", ["x", "pads"], ["a"], mode="reflect"),
        node(
            "ConvTranspose", ["a", "w"], ["b"], "up", strides=[2, 2], output_padding=[1, 0], group=2
        ),
        node("InstanceNormalization", ["b", "s", "o"], ["c"]),
        node("PRelu", ["c", "slope"], ["d"]),
        node("LRN", ["d"], ["e"], size=3),
        node("Transpose", ["e"], ["f"], perm=[0, 2, 3, 1]),
        node("LayerNormalization", ["f", "ls", "lo"], ["g"], axis=-1),
        node("MatMul", ["g", "m"], ["h"]),
        node("Split", ["h", "parts"], ["i1", "i2"], axis=3),
        node("Sub", ["i1", "const"], ["j"]),
        node("Div", ["i2", "const"], ["k"]),
        node("Max", ["j", "k"], ["l"]),
        node("Slice", ["l", "from", "until", "axes"], ["m1"]),
        node("ReduceMean", ["m1"], ["n"], axes=[1, 2], keepdims=0),
        node("Squeeze", ["n2", "two"], ["o1"]),
        node("LogSoftmax", ["o1"], ["y"], axis=1),
    ]
    nodes.insert(14, node("Unsqueeze", ["n", "two"], ["n2"]))
    weights = {
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "w": numbers(2, 2, 3, 3),
        "s": numbers(4, seed=1),
        "o": numbers(4, seed=2),
        "slope": numbers(4, 1, 1, seed=3),
        "ls": numbers(4, seed=4),
        "lo": numbers(4, seed=5),
        "m": numbers(4, 6, seed=6),
        "parts": np.array([3, 3]),
        "const": 2 + numbers(1, 1, 1, 3, seed=7) ** 2,
        "from": np.array([1, 0]),
        "until": np.array([2**62, 7]),
        "axes": np.array([1, 2]),
        "two": np.array([2]),
    }
    return model_of(nodes, weights)


def windows() -> onnx.ModelProto:
    """Windows that are merged with the batch by shapes that the file computes, attention with the
    batch as second axis, a branch that is known, and a sequence."""
    node = helper.make_node
    value = helper.make_tensor_value_info
    branches = {
        f"{name}_branch": helper.make_graph(
            [node(kind, ["w3", *more], ["inner"], f"in {name}", **options)],
            name,
            [],
            [value("inner", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(numbers(1, 1, 2, seed=9), "row")],
        )
        for name, kind, more, options in (
            ("then", "Add", ["row"], {}),
            ("else", "Einsum", [], {"equation": "abc->abc"}),
        )
    }
    nodes = [
        node("Shape", ["x"], ["s64"]),
        node("Cast", ["s64"], ["s"], to=TensorProto.INT32),
        node("Slice", ["s", "at0", "at1"], ["n"]),
        node("Slice", ["s", "at1", "at2"], ["c"]),
        node("Concat", ["n", "c", "halves"], ["to6"], axis=0),
        node("Cast", ["to6"], ["to6_64"], to=TensorProto.INT64),
        node("Reshape", ["x", "to6_64"], ["w1"]),  # (N, C, 2, 2, 2, 2)
        node("Transpose", ["w1"], ["w2"], perm=[0, 2, 4, 3, 5, 1]),
        node("Reshape", ["w2", "flat"], ["w3"]),  # (N * 4, 4, C)
        node("Greater", ["n", "none"], ["yes"]),
        node("If", ["yes"], ["w4"], "if", **branches),
        node("Mul", ["n", "four"], ["rows"]),
        node("Concat", ["rows", "four", "c"], ["to3"], axis=0),
        node("Cast", ["to3"], ["to3_64"], to=TensorProto.INT64),
        node("Reshape", ["w4", "to3_64"], ["w5"]),
        node("LayerNormalization", ["w5", "ls", "lo"], ["w6"]),
        node("Transpose", ["w6"], ["t1"], perm=[1, 0, 2]),  # (4, N * 4, C)
        node("MatMul", ["t1", "m"], ["t2"]),
        node("Softmax", ["t2"], ["t3"], axis=0),
        node("Mul", ["t3", "scale"], ["t4"]),
        node("SplitToSequence", ["t4", "two"], ["parts"], axis=2),
        node("SequenceAt", ["parts", "one"], ["second"]),
        node("SequenceAt", ["parts", "last"], ["again"]),
        node("Add", ["second", "again"], ["t5"]),
        node("Transpose", ["t5"], ["t6"], perm=[1, 2, 0]),  # (N * 4, 2, 4)
        node("Concat", ["n", "open"], ["to2"], axis=0),
        node("Cast", ["to2"], ["to2_64"], to=TensorProto.INT64),
        node("Reshape", ["t6", "to2_64"], ["y"]),
    ]
    int32 = {"halves": [2, 2, 2, 2], "none": [0], "four": [4], "open": [-1]}
    weights = {name: np.array(row, np.int32) for name, row in int32.items()}
    weights |= {name: np.array([i]) for i, name in enumerate(("at0", "at1", "at2"))}
    weights |= {
        "flat": np.array([-1, 4, 2]),
        "ls": numbers(2, seed=1),
        "lo": numbers(2, seed=2),
        "m": numbers(2, 4, seed=3),
        "scale": numbers(1, 4, seed=4),
        "two": np.int64(2),
        "one": np.int64(1),
        "last": np.int64(-1),
    }
    return model_of(nodes, weights, ("N", 2, 4, 4))


def several() -> onnx.ModelProto:
    """Two inputs and three outputs."""
    node, value = helper.make_node, helper.make_tensor_value_info
    nodes = [
        node("Conv", ["x", "conv.weight"], ["a"], "conv"),
        node("GlobalAveragePool", ["a"], ["b"]),
        node("Flatten", ["b"], ["c"]),
        node("Gemm", ["z", "fc.weight", "fc.bias"], ["d"], "fc"),
        node("Tanh", ["d"], ["e"]),
        node("Concat", ["c", "e"], ["y"], axis=1),
        node("Sub", ["c", "d"], ["scores"]),
    ]
    weights = {
        "conv.weight": numbers(3, 2, 2, 2),
        "fc.weight": numbers(4, 3, seed=1),
        "fc.bias": numbers(3, seed=2),
    }
    model = model_of(nodes, weights)
    model.graph.input.append(value("z", TensorProto.FLOAT, ["N", 4]))
    model.graph.output.append(value("a", TensorProto.FLOAT, None))
    model.graph.output.append(value("scores", TensorProto.FLOAT, None))
    return model


def choices() -> onnx.ModelProto:
    """Interpolation, comparisons, reductions, and quantized weights and values."""
    node = helper.make_node
    nodes = [
        node("Resize", ["x", "", "scales"], ["a"], mode="linear"),
        node("Greater", ["a", "c"], ["b"]),
        node("Not", ["b"], ["n"]),
        node("Where", ["n", "a", "c"], ["d"]),
        node("QuantizeLinear", ["d", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["e"]),
        node("DequantizeLinear", ["w8", "ws", "wz"], ["w"], axis=0),
        node("Conv", ["e", "w"], ["f"]),
        node("ReduceMax", ["f"], ["g"], axes=[2]),
        node("Expand", ["g", "sizes"], ["h"]),
        node("Slice", ["h", "from", "to", "axes", "steps"], ["i"]),
        node("Pad", ["i", "pads"], ["j"]),
        node("ReduceL2", ["j"], ["k"], axes=[3], keepdims=0),
        node("Tile", ["k", "times"], ["l"]),
        node("MatMul", ["l", "v"], ["m"]),
        node("LayerNormalization", ["m", "one"], ["o"], axis=1),
        node("Sign", ["o"], ["p"]),
        node("Mod", ["o", "half"], ["r"], fmod=1),
        node("Concat", ["p", "r"], ["y"], axis=1),
    ]
    weights = {
        "scales": np.array([1, 1, 2, 1.5], np.float32),
        "c": numbers(2, 1, 1, seed=1),
        "s": np.float32(0.02),
        "z": np.int8(5),
        "w8": np.arange(-18, 18, dtype=np.int8).reshape(2, 2, 3, 3),
        "ws": np.array([0.05, 0.1], np.float32),
        "wz": np.zeros(2, np.int8),
        "sizes": np.array([1, 2, 3, 5]),
        "from": np.array([-1]),
        "to": np.array([-9]),
        "axes": np.array([3]),
        "steps": np.array([-2]),
        "pads": np.array([0, 0, -1, 1, 0, 0, 1, 0]),
        "times": np.array([1, 1, 2]),
        "v": numbers(6, seed=2),
        "one": np.array([1.5], np.float32),
        "half": np.float32(0.3),
    }
    return model_of(nodes, weights)


def typed() -> onnx.ModelProto:
    """Every way in which a tensor's numbers can lie in a file."""
    node, floats = helper.make_node, [0.5, -1.5, 2.0, 3.0]
    tensors = [
        helper.make_tensor("float_data", TensorProto.FLOAT, [4], floats),
        helper.make_tensor("half", TensorProto.FLOAT16, [4], floats),
        helper.make_tensor("brain", TensorProto.BFLOAT16, [4], floats),
        numpy_helper.from_array(np.array(floats, np.float16), "raw_half"),
        helper.make_tensor("double", TensorProto.DOUBLE, [4], floats),
        helper.make_tensor("shape", TensorProto.INT64, [2], [0, 4]),
        helper.make_tensor("ints", TensorProto.INT32, [1], [-1]),
    ]
    names = [t.name for t in tensors[:5]]
    nodes = [node("Reshape", ["x", "shape"], ["x0"])]
    for i, name in enumerate(names):
        nodes.append(node("Cast", [name], [f"{name} wide"], to=TensorProto.FLOAT))
        nodes.append(node("Add", [f"x{i}", f"{name} wide"], [f"x{i + 1}"]))
    nodes.append(node("Cast", ["ints"], ["axes"], to=TensorProto.INT64))
    nodes += [node("Unsqueeze", ["x5", "axes"], ["u"]), node("Flatten", ["u"], ["y"])]
    model = model_of(nodes, {}, ("N", 2, 2))
    model.graph.initializer.extend(tensors)
    return model


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "classifier": classifier,
    "oddities": oddities,
    "typed": typed,
    "windows": windows,
    "choices": choices,
}
SPOILT = {**MODELS, "several": several}
"""The models that are damaged."""
_EXTREMES = [
    0,
    1,
    -1,
    2,
    3,
    7,
    127,
    128,
    1 << 15,
    1 << 20,
    1 << 31,
    1 << 40,
    (1 << 63) - 1,
    -(1 << 63),
]


def spoil_bytes(content: bytes, random: Random) -> bytes:
    """Cut, flip, overwrite, insert, take out or repeat some bytes."""
    spoilt = bytearray(content)
    for _ in range(random.choice([1, 1, 1, 2, 5, 20])):
        if not spoilt:
            break
        at = random.randrange(len(spoilt))
        length = random.choice([1, 1, 2, 8, 64])
        way = random.randrange(6)
        if way == 0:
            spoilt[at] ^= 1 << random.randrange(8)
        elif way == 1:
            spoilt[at] = random.choice([0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)])
        elif way == 2:
            del spoilt[at : at + length]
        elif way == 3:
            spoilt[at:at] = random.randbytes(length)
        elif way == 4:
            spoilt[at:at] = spoilt[at : at + length]
        elif random.random() < 0.3:
            del spoilt[at:]
    return bytes(spoilt)


def spoil_parts(model: onnx.ModelProto, random: Random) -> bytes:
    """Change what the file says, with its form left whole: numbers, names, operators, order."""
    spoilt = onnx.ModelProto()
    spoilt.CopyFrom(model)
    graph = spoilt.graph
    for _ in range(random.choice([1, 1, 2, 3])):
        node = random.choice(graph.node)
        other = random.choice(graph.node)
        tensor = random.choice(graph.initializer)
        way = random.randrange(13)
        if way == 0 and node.attribute:
            attribute = random.choice(node.attribute)
            if attribute.ints:
                attribute.ints[random.randrange(len(attribute.ints))] = random.choice(_EXTREMES)
            else:
                attribute.i = random.choice(_EXTREMES)
        elif way == 1 and node.attribute:
            attribute = random.choice(node.attribute)
            attribute.ints.append(random.choice(_EXTREMES))
        elif way == 2:
            node.op_type = other.op_type
        elif way == 3 and node.input:
            node.input[random.randrange(len(node.input))] = random.choice(
                [*other.output, *other.input, "x", "", tensor.name]
            )
        elif way == 4:
            node.output[0] = other.output[0]
        elif way == 5:
            rows = list(graph.node)
            random.shuffle(rows)
            del graph.node[:]
            graph.node.extend(rows)
        elif way == 6 and tensor.dims:
            tensor.dims[random.randrange(len(tensor.dims))] = random.choice(_EXTREMES)
        elif way == 7:
            dims = graph.input[0].type.tensor_type.shape.dim
            dims[random.randrange(len(dims))].dim_value = random.choice(_EXTREMES)
        elif way == 8:
            tensor.data_type = random.randrange(30)
        elif way == 9 and tensor.data_type == TensorProto.INT64 and len(tensor.raw_data) >= 8:
            # the type may have been changed above, so some bytes may be left over
            whole = np.frombuffer(tensor.raw_data, np.int64, len(tensor.raw_data) // 8).copy()
            whole[random.randrange(whole.size)] = random.choice(_EXTREMES)
            tensor.raw_data = whole.tobytes()
        elif way == 10:
            graph.node.insert(random.randrange(len(graph.node)), other)
        elif way == 11:
            tensor.CopyFrom(
                numpy_helper.from_array(
                    numbers(*random.choices([1, 2, 4, 5], k=random.randrange(5))), tensor.name
                )
            )
        elif way == 12:
            del node.input[-1:]
    return spoilt.SerializeToString()


def load(path: Path) -> Model:
    return portacnn.onnx.load(path)


def samples() -> tuple[list[bytes], Callable[[Random], bytes]]:
    """A whole file, and a function that returns a damaged one."""
    models = {name: make() for name, make in SPOILT.items()}
    contents = {name: model.SerializeToString() for name, model in models.items()}

    def spoilt(random: Random) -> bytes:
        name, way = random.choice(list(models)), random.randrange(8)
        if way == 0:
            return random.randbytes(random.randrange(200))
        if way < 4:
            return spoil_bytes(contents[name], random)
        return spoil_parts(models[name], random)

    return [contents["classifier"], contents["windows"], contents["several"]], spoilt
