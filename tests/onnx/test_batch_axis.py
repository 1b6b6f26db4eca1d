"""Files that compute shapes with the number of samples, that move the batch, merge other axes with
it, or remove it: against onnxruntime."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from portacnn.errors import ModelFormatError
from portacnn.layers import Conv2d, MergeIntoBatch, Reshape, Sequential, SplitFromBatch
from portacnn.models.sizes import Size
from portacnn.onnx import counts
from support.onnx_files import model_of, numbers
from support.onnx_load import load, runtime

node = helper.make_node
INT32, FLOAT, INT64 = TensorProto.INT32, TensorProto.FLOAT, TensorProto.INT64


def agrees(model: Any, folder: Path, shape: tuple[int, ...] = (2, 4, 4), batch: int = 3) -> None:
    """Ours is what onnxruntime says; for a file for one sample, sample by sample."""
    x = numbers(batch, *shape, seed=5)
    fixed = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    got = load(model, folder).predict(x)
    if fixed == 1:
        expected = np.stack([runtime(model, row[None]) for row in x])
        got = got.reshape(expected.shape)
    else:
        expected = runtime(model, x)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


# --- shapes that contain the number of samples ----------------------------------------------------

SHAPE = {
    "int32, as Paddle": [
        node("Shape", ["x"], ["s64"]),
        node("Cast", ["s64"], ["s"], to=INT32),
        node("Slice", ["s", "i0", "i1"], ["n"]),
        node("Concat", ["n", "rest32"], ["to32"], axis=0),
        node("Cast", ["to32"], ["to"], to=INT64),
    ],
    "floats, as tf2onnx": [
        node("Shape", ["x"], ["s"]),
        node("Cast", ["s"], ["f"], to=FLOAT),
        node("Slice", ["f", "i0", "i1"], ["nf"]),
        node("Mul", ["nf", "half"], ["h"]),
        node("Add", ["h", "h"], ["again"]),
        node("Floor", ["again"], ["floor"]),
        node("Cast", ["floor"], ["n"], to=INT64),
        node("Concat", ["n", "rest"], ["to"], axis=0),
    ],
    "divided": [
        node("Shape", ["x"], ["s"]),
        node("ReduceProd", ["s"], ["all"], keepdims=1),
        node("Div", ["all", "thirty_two"], ["n"]),
        node("Concat", ["n", "rest"], ["to"], axis=0),
    ],
    "a quotient without it": [
        node("Size", ["x"], ["all0"]),
        node("Unsqueeze", ["all0", "i0"], ["all"]),
        node("Shape", ["x"], ["n"], start=0, end=1),
        node("Div", ["all", "n"], ["each"]),
        node("Div", ["each", "four"], ["c"]),
        node("Concat", ["n", "c", "four"], ["to"], axis=0),
    ],
    "chosen by comparisons": [
        node("Shape", ["x"], ["s"]),
        node("Slice", ["s", "i0", "i1"], ["n"]),
        node("Concat", ["n", "rest"], ["to0"], axis=0),
        node("Equal", ["to0", "minus"], ["is_minus"]),
        node("Where", ["is_minus", "ones", "to0"], ["to1"]),
        node("Max", ["to1", "ones"], ["to2"]),
        node("Min", ["to2", "to1"], ["to3"]),
        node("Greater", ["to3", "zeros"], ["is_more"]),
        node("Where", ["is_more", "to3", "zeros"], ["to"]),
    ],
    "moved": [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "two_by_two"], ["square"]),  # [[N, 4], [4, 2]]
        node("Transpose", ["square"], ["turned"], perm=[1, 0]),
        node("Reshape", ["turned", "minus"], ["row"]),
        node("Split", ["row", "splits"], ["n", "more"], axis=0),
        node("Sub", ["n", "i0"], ["n2"]),
        node("Neg", ["n2"], ["less"]),
        node("Abs", ["less"], ["n3"]),
        node("Concat", ["n3", "rest"], ["to"], axis=0),
    ],
}
CONSTANTS = {
    "i0": np.array([0]),
    "i1": np.array([1]),
    "rest": np.array([4, 8]),
    "rest32": np.array([4, 8], np.int32),
    "half": np.float32(0.5),
    "four": np.array([4]),
    "thirty_two": np.array([32]),
    "minus": np.array([-1]),
    "ones": np.array([1, 1, 1]),
    "zeros": np.array([0, 0, 0]),
    "two_by_two": np.array([[0, 2], [3, 1]]),
    "splits": np.array([1, 3]),
}


@pytest.mark.parametrize("name", SHAPE)
def test_shapes_keep_the_number_of_samples(tmp_path: Path, name: str):
    nodes = [*SHAPE[name], node("Reshape", ["x", "to"], ["y"])]
    used = {given for one in nodes for given in one.input}
    constants = {key: value for key, value in CONSTANTS.items() if key in used}
    agrees(model_of(nodes, constants, ("N", 2, 4, 4)), tmp_path)


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Mul", ["n", "n"], ["m"])],
        [node("Div", ["n", "two"], ["m"])],
        [node("Div", ["two", "n"], ["m"])],
        [node("Equal", ["n", "two"], ["b"]), node("Where", ["b", "two", "n"], ["m"])],
        [node("Max", ["n", "two"], ["m"])],
        [node("Sub", ["two", "n"], ["d"]), node("Abs", ["d"], ["m"])],
        [node("Range", ["i0s", "ns", "i1s"], ["m"])],
        [node("Cast", ["n"], ["f"], to=FLOAT), node("Sqrt", ["f"], ["m"])],
        [node("Cast", ["n"], ["f"], to=FLOAT), node("Mul", ["f", "half"], ["m"])],
    ],
    ids=lambda nodes: nodes[0].op_type,
)
def test_what_depends_on_the_number_of_samples_in_another_way(tmp_path: Path, nodes: list[Any]):
    nodes = [
        node("Shape", ["x"], ["n"], start=0, end=1),
        node("Squeeze", ["n", "i0"], ["ns"]),
        *nodes,
        node("Cast", ["m"], ["to"], to=INT64),
        node("Reshape", ["x", "to"], ["y"]),
    ]
    constants = CONSTANTS | {"two": np.array([2]), "i0s": np.int64(0), "i1s": np.int64(1)}
    with pytest.raises(ModelFormatError, match="computes with the number of samples"):
        load(model_of(nodes, constants, ("N", 2, 4, 4)), tmp_path)


def test_comparisons_hold_for_every_number_of_samples():
    """Or they raise Unknown. Against the numbers themselves, for N from 1 to 50."""
    some = [(a, b) for a in (-3, -1, 0, 1, 2, 7) for b in (-2, -1, 0, 1, 3)]
    functions = {
        "Equal": np.equal,
        "Greater": np.greater,
        "GreaterOrEqual": np.greater_equal,
        "Less": np.less,
        "LessOrEqual": np.less_equal,
        "Max": np.maximum,
        "Min": np.minimum,
    }
    n, decided = np.arange(1, 51), 0
    for name, truth in functions.items():
        for a, b in some:
            for c, d in some:
                expected = truth(a + b * n, c + d * n)
                x, y = (counts.Count(np.array(i), np.array(j)) for i, j in ((a, b), (c, d)))
                try:
                    made = counts.FUNCTIONS[name](x, y)
                except counts.Unknown:
                    continue
                np.testing.assert_array_equal(made.a + made.b * n, expected)
                decided += 1
    assert decided > 3000


# --- the batch elsewhere --------------------------------------------------------------------------

MOVED = {
    "operators on (C, H, W, N)": [
        node("Transpose", ["x"], ["a"], perm=[1, 2, 3, 0]),
        node("Relu", ["a"], ["b"]),
        node("Mul", ["b", "w441"], ["c"]),
        node("ReduceMean", ["c"], ["d"], axes=[1], keepdims=1),
        node("Sub", ["c", "d"], ["e"]),
        node("Slice", ["e", "i0", "i1", "i1"], ["first"]),
        node("Concat", ["e", "first"], ["f"], axis=1),
        node("Gather", ["f", "gathered"], ["g"], axis=2),
        node("Softmax", ["g"], ["h"], axis=2),
        node("Unsqueeze", ["h", "i1"], ["i"]),
        node("ReduceSum", ["i", "i1"], ["j"], keepdims=0),
        node("Split", ["j", "split23"], ["k1", "k2"], axis=1),
        node("Concat", ["k2", "k1"], ["l"], axis=1),
        node("Transpose", ["l"], ["y"], perm=[3, 0, 1, 2]),
    ],
    "heads of attention": [
        node("Reshape", ["x", "to_l_8"], ["a"]),  # (N, 4, 8)
        node("MatMul", ["a", "qkv"], ["b"]),
        node("Reshape", ["b", "to_heads"], ["c"]),  # (N, 4, 3, 2, 4)
        node("Transpose", ["c"], ["d"], perm=[2, 0, 3, 1, 4]),
        node("Split", ["d"], ["q1", "k1", "v1"], axis=0),
        node("Squeeze", ["q1", "i0"], ["q"]),
        node("Squeeze", ["k1", "i0"], ["k"]),
        node("Gather", ["d", "second"], ["v"], axis=0),
        node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        node("MatMul", ["q", "kt"], ["e"]),
        node("Add", ["e", "bias"], ["e2"]),
        node("Softmax", ["e2"], ["f"], axis=-1),
        node("MatMul", ["f", "v"], ["g"]),
        node("Transpose", ["g"], ["h"], perm=[0, 2, 1, 3]),
        node("Reshape", ["h", "to_l_8"], ["y"]),
    ],
    "sequence first, heads merged with the batch": [
        node("Reshape", ["x", "to_l_8"], ["a"]),
        node("Transpose", ["a"], ["b"], perm=[1, 0, 2]),  # (4, N, 8)
        node("Reshape", ["b", "open_8"], ["rows"]),  # (4 * N, 8)
        node("Gemm", ["rows", "w88", "w8"], ["linear"]),
        node("Reshape", ["linear", "four_open_8"], ["c"]),
        node("Reshape", ["c", "four_open_4"], ["d"]),  # (4, N * 2, 4)
        node("Transpose", ["d"], ["e"], perm=[1, 0, 2]),
        node("Transpose", ["d"], ["f"], perm=[1, 2, 0]),
        node("MatMul", ["e", "f"], ["g"]),
        node("Softmax", ["g"], ["h"], axis=-1),
        node("MatMul", ["h", "e"], ["i"]),
        node("Transpose", ["i"], ["j"], perm=[1, 0, 2]),
        node("Reshape", ["j", "four_open_8"], ["k"]),
        node("LayerNormalization", ["k", "w8", "w8"], ["l"]),
        node("Add", ["l", "b"], ["m"]),
        node("Transpose", ["m"], ["y"], perm=[1, 0, 2]),
    ],
    "windows as images": [
        node("Reshape", ["x", "to_windows"], ["a"]),  # (N, 2, 2, 2, 2, 2)
        node("Transpose", ["a"], ["b"], perm=[0, 2, 4, 1, 3, 5]),
        node("Reshape", ["b", "windows"], ["c"]),  # (N * 4, 2, 2, 2)
        node("Conv", ["c", "kernel"], ["d"], pads=[0, 0, 1, 1]),
        node("BatchNormalization", ["d", "w2", "w2", "w2", "v2"], ["e"]),
        node("Shape", ["x"], ["n"], start=0, end=1),
        node("Concat", ["n", "two_rest"], ["back"], axis=0),
        node("Reshape", ["e", "back"], ["f"]),
        node("Transpose", ["f"], ["g"], perm=[0, 3, 1, 4, 2, 5]),
        node("Reshape", ["g", "whole"], ["y"]),
    ],
}
WEIGHTS = {
    "w441": numbers(4, 4, 1),
    "i0": np.array([0]),
    "i1": np.array([1]),
    "gathered": np.array([3, 0, 1]),
    "split23": np.array([2, 3]),
    "to_l_8": np.array([-1, 4, 8]),
    "qkv": numbers(8, 24, seed=1),
    "to_heads": np.array([0, 4, 3, 2, 4]),
    "second": np.int64(2),
    "bias": numbers(1, 2, 4, 4, seed=2),
    "open_8": np.array([-1, 8]),
    "w88": numbers(8, 8, seed=3),
    "w8": numbers(8, seed=4),
    "four_open_8": np.array([4, -1, 8]),
    "four_open_4": np.array([4, -1, 4]),
    "to_windows": np.array([-1, 2, 2, 2, 2, 2]),
    "windows": np.array([-1, 2, 2, 2]),
    "kernel": numbers(2, 2, 2, 2, seed=5),
    "w2": numbers(2, seed=6),
    "v2": 1 + numbers(2, seed=7) ** 2,
    "two_rest": np.array([2, 2, 2, 2, 2]),
    "whole": np.array([0, 2, 4, 4]),
}


@pytest.mark.parametrize("batch", ["N", 1])
@pytest.mark.parametrize("name", MOVED)
def test_the_batch_is_moved_and_merged(tmp_path: Path, name: str, batch: Any):
    """With any number of samples, and in files for one, where any axis of length 1 may be it."""
    used = {given for one in MOVED[name] for given in one.input}
    weights = {key: value for key, value in WEIGHTS.items() if key in used}
    model = model_of(MOVED[name], weights, (batch, 2, 4, 4))
    agrees(model, tmp_path)


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([node("Transpose", ["x"], ["y"], perm=[1, 0, 2, 3])], "with the batch at axis 1"),
        (
            [
                node("Transpose", ["x"], ["a"], perm=[1, 0, 2, 3]),
                node("Conv", ["a", "kernel"], ["y"]),
            ],
            r"\[2, N, 4, 4\], with the batch at axis 1; operators of this kind",
        ),
        (
            [
                node("Transpose", ["x"], ["a"], perm=[1, 0, 2, 3]),
                node("Softmax", ["a"], ["y"], axis=1),
            ],
            "is the batch; samples must be independent",
        ),
        (
            [node("Transpose", ["x"], ["a"], perm=[1, 0, 2, 3]), node("Add", ["a", "x"], ["y"])],
            "are not at one place",
        ),
        ([node("Reshape", ["x", "windows"], ["y"])], r"is \[4\*N, 2, 2, 2\]: it has other axes"),
        (
            [node("Reshape", ["x", "windows"], ["a"]), node("Mul", ["a", "per_window"], ["y"])],
            "broadcasts to samples",
        ),
        ([node("Squeeze", ["x", "i0"], ["y"])], "it would remove the batch"),
    ],
    ids=lambda case: case[-1].op_type if isinstance(case, list) else "",
)
def test_samples_that_would_mix(tmp_path: Path, nodes: list[Any], words: str):
    weights = {**WEIGHTS, "per_window": numbers(4, 1, 1, 1)}
    used = {given for one in nodes for given in one.input}
    weights = {key: value for key, value in weights.items() if key in used}
    with pytest.raises(ModelFormatError, match=words):
        load(model_of(nodes, weights, ("N", 2, 4, 4)), tmp_path)


# --- files for one sample -------------------------------------------------------------------------

ONE = {
    "Flatten of everything": [
        node("Flatten", ["x"], ["a"], axis=0),
        node("Softmax", ["a"], ["y"], axis=-1),
    ],
    "Squeeze": [
        node("Squeeze", ["x", "i0"], ["a"]),
        node("Softmax", ["a"], ["b"], axis=0),
        node("ReduceMax", ["b"], ["c"], axes=[0, 2], keepdims=0),
        node("Unsqueeze", ["c", "i0"], ["d"]),
        node("Gemm", ["d", "w4"], ["y"]),
    ],
    "Squeeze of all": [
        node("ReduceMean", ["x"], ["a"], axes=[2, 3]),
        node("Squeeze", ["a"], ["y"]),
    ],
    "Slice": [
        node("Slice", ["x", "i0", "i1", "i0"], ["a"]),
        node("Reshape", ["a", "open"], ["b"]),
        node("Softmax", ["b"], ["y"], axis=0),
    ],
    "Gather": [
        node("Gather", ["x", "none"], ["a"], axis=0),
        node("Reshape", ["a", "two_open"], ["b"]),
        node("MatMul", ["b", "w16"], ["c"]),
        node("Add", ["c", "column"], ["d"]),
        node("Transpose", ["d"], ["y"], perm=[1, 0]),
    ],
    "rows of one sample": [
        node("Reshape", ["x", "open_4"], ["a"]),
        node("Gemm", ["a", "w4"], ["b"]),
        node("Reshape", ["b", "one_open"], ["y"]),
    ],
}


@pytest.mark.parametrize("name", ONE)
def test_files_for_one_sample(tmp_path: Path, name: str):
    """They are used for any number: each sample is computed as the file says."""
    weights = {
        "i0": np.array([0]),
        "i1": np.array([1]),
        "none": np.int64(0),
        "open": np.array([-1]),
        "two_open": np.array([2, -1]),
        "open_4": np.array([-1, 4]),
        "one_open": np.array([1, -1]),
        "w4": numbers(4, 3),
        "w16": numbers(16, 3),
        "column": numbers(2, 1),
    }
    used = {given for one in ONE[name] for given in one.input}
    weights = {key: value for key, value in weights.items() if key in used}
    agrees(model_of(ONE[name], weights, (1, 2, 4, 4)), tmp_path)


def test_memory_of_rows_counts():
    """``predict`` takes fewer samples at a time if each has many rows."""

    def most(*layers: Any) -> int:
        return Size.of(Sequential(*layers).build((64, 3, 32, 32), device="numpy", seed=0)).most

    rows = most(MergeIntoBatch(64), Conv2d(3, 8, 3, padding=1), SplitFromBatch(64))
    one = most(Reshape((192, 32, 32)), Conv2d(192, 512, 1), Reshape((64, 8, 32, 32)))
    assert rows == one
