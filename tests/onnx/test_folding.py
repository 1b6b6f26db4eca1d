"""Operators on constants: computed when the file is read, as onnxruntime computes them. Branches
and sequences that are known."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from portacnn.errors import ModelFormatError
from portacnn.layers import ArithmeticWith
from portacnn.onnx.folding import FOLDED
from portacnn.onnx.importer import OPERATORS
from support.onnx_files import model_of, numbers
from support.onnx_load import load, runtime

node, value = helper.make_node, helper.make_tensor_value_info
X = numbers(3, 2, 5, 5, seed=4)
ROW = np.array([7, -3, 2, 5, -8])
IMAGE = numbers(2, 2, 5, 5, seed=1)

# by name: the operator's inputs and attributes; its output is reduced to a number and added to x
CASES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "Abs": ([ROW], {}),
    "Add": ([ROW, ROW[:1]], {}),
    "And": ([ROW > 0, ROW > 3], {}),
    "Cast": ([IMAGE], {"to": TensorProto.INT32}),
    "Cast bool": ([ROW - 2], {"to": TensorProto.BOOL}),
    "CastLike": ([ROW, np.float64(1)], {}),
    "Ceil": ([IMAGE], {}),
    "Concat": ([ROW, ROW], {"axis": 0}),
    "ConstantOfShape": ([np.array([2, 3])], {}),
    "CumSum": ([ROW, np.int64(0)], {}),
    "Div": ([ROW, np.array([2, 2, -2, 3, 3])], {}),
    "Div floats": ([IMAGE, IMAGE[:1] + 3], {}),
    "Dropout": ([IMAGE], {}),
    "Equal": ([ROW, ROW[::-1]], {}),
    "Expand": ([ROW[:, None], np.array([2, 1, 3])], {}),
    "Flatten": ([IMAGE], {"axis": 2}),
    "Floor": ([IMAGE], {}),
    "Gather": ([IMAGE, np.array([[1, -1]])], {"axis": 2}),
    "Greater": ([ROW, ROW[::-1]], {}),
    "GreaterOrEqual": ([ROW, ROW[::-1]], {}),
    "Identity": ([ROW], {}),
    "Less": ([ROW, ROW[::-1]], {}),
    "LessOrEqual": ([ROW, ROW[::-1]], {}),
    "MatMul": ([IMAGE, IMAGE], {}),
    "Max": ([ROW, ROW[::-1], ROW[:1]], {}),
    "Min": ([ROW, ROW[::-1]], {}),
    "Mod": ([ROW, np.array([2, 2, -3, 3, 3])], {}),
    "Mod fmod": ([ROW, np.array([2, 2, -3, 3, 3])], {"fmod": 1}),
    "Mul": ([ROW, ROW[::-1]], {}),
    "Neg": ([ROW], {}),
    "Not": ([ROW > 0], {}),
    "Or": ([ROW > 0, ROW > 3], {}),
    "Pow": ([ROW, np.array([2])], {}),
    "Pow floats": ([np.abs(IMAGE), np.float32(1.5)], {}),
    "Range": ([np.int64(7), np.int64(-4), np.int64(-3)], {}),
    "ReduceL1": ([IMAGE], {"axes": [0, 2]}),
    "ReduceL2": ([IMAGE], {"axes": [0, 2]}),
    "ReduceMax": ([IMAGE], {"axes": [-1]}),
    "ReduceMean": ([IMAGE], {}),
    "ReduceMin": ([IMAGE], {"axes": [0, 1], "keepdims": 0}),
    "ReduceProd": ([IMAGE], {"axes": [0]}),
    "ReduceSum": ([IMAGE, np.array([0, 3])], {}),
    "ReduceSumSquare": ([IMAGE], {"axes": [0, 2]}),
    "Reshape": ([IMAGE, np.array([5, -1, 0])], {}),
    "Round": ([IMAGE * 2], {}),
    "Shape": ([IMAGE], {"start": 1}),
    "Sign": ([ROW], {}),
    "Size": ([IMAGE], {}),
    "Slice": ([ROW, np.array([-2]), np.array([-6]), np.array([0]), np.array([-2])], {}),
    "Split": ([ROW, np.array([5])], {"axis": 0}),
    "Sqrt": ([np.abs(IMAGE)], {}),
    "Squeeze": ([IMAGE[:1, :, :1], np.array([0, 2])], {}),
    "Sub": ([ROW, ROW[::-1]], {}),
    "Sum": ([IMAGE, IMAGE, IMAGE], {}),
    "Tile": ([ROW, np.array([3])], {}),
    "Transpose": ([IMAGE], {"perm": [3, 1, 0, 2]}),
    "Trilu": ([IMAGE, np.int64(1)], {"upper": 0}),
    "Unsqueeze": ([ROW, np.array([0, 2])], {}),
    "Where": ([ROW > 0, ROW, -ROW[:1]], {}),
    "Xor": ([ROW > 0, ROW > 3], {}),
    # those that are run as layers
    "AveragePool": ([IMAGE], {"kernel_shape": [2, 3], "strides": [2, 1]}),
    "BatchNormalization": ([IMAGE, *(np.abs(numbers(2, seed=i)) for i in range(4))], {}),
    "Clip": ([IMAGE, np.float32(-0.5)], {}),
    "Conv": ([IMAGE, numbers(3, 2, 3, 3), numbers(3)], {"pads": [1, 1, 0, 0]}),
    "Erf": ([IMAGE], {}),
    "Exp": ([np.float32(0.5)], {}),
    "Gemm": ([IMAGE[0, 0], numbers(5, 3)], {}),
    "GlobalMaxPool": ([IMAGE], {}),
    "Relu": ([IMAGE], {}),
    "Resize": ([IMAGE, np.zeros(0, "float32"), np.float32([1, 1, 2, 2])], {}),
    "Softmax": ([IMAGE], {"axis": 1}),
    "Tanh": ([ROW.astype("float32")], {}),
}


@pytest.mark.parametrize("name", CASES)
def test_constants_are_computed(tmp_path: Path, name: str):
    inputs, attributes = CASES[name]
    kind = name.split()[0]
    constants = {f"c{i}": np.asarray(array) for i, array in enumerate(inputs)}
    nodes = [
        node(kind, list(constants), ["made"], **attributes),
        node("Cast", ["made"], ["float"], to=TensorProto.FLOAT),
        node("Shape", ["made"], ["sizes"]),
        node("Cast", ["sizes"], ["sizes_f"], to=TensorProto.FLOAT),
        node("ReduceSum", ["sizes_f"], ["size"], keepdims=0),
        node("Reshape", ["float", "all"], ["row"]),
        node("Mul", ["row", "ramp"], ["weighted"]),
        node("ReduceSum", ["weighted"], ["sum"], keepdims=0),
        node("Add", ["sum", "size"], ["number"]),
        node("Add", ["x", "number"], ["y"]),
    ]
    constants["all"] = np.array([-1, 1])  # each element has its own weight
    constants["ramp"] = np.float32([[1.0, 0.0, -0.5]])
    model = model_of(nodes, constants)
    expected = runtime(model, X)
    np.testing.assert_allclose(load(model, tmp_path).predict(X), expected, rtol=1e-4, atol=2e-4)


def test_every_operator_on_constants_is_tried():
    assert {name.split()[0] for name in CASES} >= FOLDED
    assert len({name.split()[0] for name in CASES} & set(OPERATORS) - FOLDED) > 8


def test_weights_that_are_computed_learn(tmp_path: Path):
    """Also through operators: they come from initializers."""
    nodes = [
        node("ReduceMean", ["w"], ["mean"], axes=[1, 2, 3]),
        node("Sub", ["w", "mean"], ["centred"]),
        node("Conv", ["x", "centred"], ["a"]),
        node("Reshape", ["b", "column"], ["bias"]),
        node("Add", ["a", "bias"], ["y"]),
    ]
    w = numbers(3, 2, 2, 2)
    weights = {"w": w, "b": numbers(3, seed=1), "column": np.array([3, 1, 1])}
    model = load(model_of(nodes, weights), tmp_path)
    assert [tuple(p.shape) for p in model.named_parameters().values()] == [(3, 2, 2, 2), (3, 1, 1)]
    np.testing.assert_allclose(
        model.named_parameters()["a.weight" if "a.weight" in model.state_dict() else "conv.weight"],
        w - w.mean((1, 2, 3), keepdims=True),
        rtol=1e-5,
        atol=1e-6,
    )


def test_which_constants_learn(tmp_path: Path):
    """Not the mean and standard deviation of images; ``Constant`` nodes if asked for."""
    constant = helper.make_tensor("value", TensorProto.FLOAT, [3, 1, 1], [1.0, 2.0, 3.0])
    nodes = [
        node("Sub", ["x", "mean"], ["a"]),
        node("Div", ["a", "std"], ["b"]),
        node("Conv", ["b", "w"], ["c"], "conv"),
        node("Add", ["c", "shift"], ["d"], "shift"),
        node("Constant", [], ["scale"], value=constant),
        node("Mul", ["d", "scale"], ["y"], "scale"),
    ]
    weights = {
        "mean": numbers(1, 3, 1, 1),
        "std": 1 + numbers(3, 1, 1, seed=1) ** 2,
        "w": numbers(3, 3, 1, 1, seed=2),
        "shift": numbers(3, 1, 1, seed=3),
    }
    model = model_of(nodes, weights, ("N", 3, 4, 4))
    plain = load(model, tmp_path)
    assert list(plain.named_parameters()) == ["conv.weight", "shift.value"]
    learning = load(model, tmp_path, learn_constants=True)
    assert list(learning.named_parameters()) == ["conv.weight", "shift.value", "scale.value"]
    frozen = [part for part in learning.walk() if isinstance(part, ArithmeticWith)][:2]
    assert not any(part.learn for part in frozen)
    x = numbers(2, 3, 4, 4)
    for each in (plain, learning):
        np.testing.assert_allclose(each.predict(x), runtime(model, x), rtol=1e-4, atol=1e-5)


# --- branches -------------------------------------------------------------------------------------


def branching(condition: list[Any], weights: dict[str, np.ndarray]) -> Any:
    """An If in an If. Names within the branches are those of other branches, too."""

    def graph(name: str, nodes: list[Any], initializers: Any = ()) -> Any:
        tensors = [helper.make_tensor("w", 1, [1], list(initializers))] if initializers else []
        return helper.make_graph(nodes, name, [], [value("out", 1, None)], tensors)

    deep = node(
        "If",
        ["yes"],
        ["out"],
        "deep",
        then_branch=graph("a", [node("Mul", ["inner", "w"], ["out"])], [2.0]),
        else_branch=graph("b", [node("Mul", ["x", "w"], ["out"])], [3.0]),
    )
    then = graph("then", [node("Relu", ["x"], ["inner"]), deep])
    other = graph(
        "else", [node("Add", ["x", "w"], ["inner"]), node("Neg", ["inner"], ["out"])], [5.0]
    )
    nodes = [
        *condition,
        node("If", ["c"], ["a"], "first", then_branch=then, else_branch=other),
        node("If", ["c"], ["b"], "second", then_branch=other, else_branch=then),
        node("Sub", ["a", "b"], ["y"]),
    ]
    return model_of(nodes, {"yes": np.bool_(True), **weights})


CONDITIONS = {
    "a constant": ([node("Identity", ["no"], ["c"])], {"no": np.bool_(False)}),
    "a rank": (
        [
            node("Shape", ["x"], ["s"]),
            node("Size", ["s"], ["r"]),
            node("Equal", ["r", "four"], ["c"]),
        ],
        {"four": np.int64(4)},
    ),
    "for any number of samples": (
        [
            node("Shape", ["x"], ["s"], end=1),
            node("Squeeze", ["s", "axis"], ["n"]),
            node("Greater", ["n", "zero"], ["c"]),
        ],
        {"zero": np.int64(0), "axis": np.array([0])},
    ),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_branch_whose_condition_is_known(tmp_path: Path, name: str):
    model = branching(*CONDITIONS[name])
    np.testing.assert_allclose(load(model, tmp_path).predict(X), runtime(model, X), rtol=1e-5)


def test_conditions_that_are_not_known(tmp_path: Path):
    of_values = [
        node("ReduceMax", ["x"], ["most"], keepdims=0, axes=[1, 2, 3]),
        node("Greater", ["most", "zero"], ["c"]),
    ]
    of_samples = [node("Shape", ["x"], ["n"], end=1), node("Equal", ["n", "two"], ["c"])]
    for nodes, weights, words in (
        (of_values, {"zero": np.float32(0)}, "'first' .If.: its condition depends on the network"),
        (of_samples, {"two": np.array([2])}, "computes with the number of samples"),
    ):
        with pytest.raises(ModelFormatError, match=words):
            load(branching(nodes, weights), tmp_path)
    missing = branching(*CONDITIONS["a constant"])
    (other,) = (a.g for a in missing.graph.node[1].attribute if a.name == "else_branch")
    other.node[0].input[1] = "nowhere"
    with pytest.raises(ModelFormatError, match="no node computes 'nowhere'"):
        load(missing, tmp_path)
