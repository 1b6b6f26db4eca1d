"""Spoilt ONNX files, and graphs that are none: each is read rightly or refused with
ModelFormatError."""

import logging
from pathlib import Path
from random import Random

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import portacnn.onnx
from support import onnx_files
from support.onnx_files import MODELS, model_of, numbers, spoil_bytes, spoil_parts
from support.onnx_refused import refused, write
from tools import fuzz

node = helper.make_node


def test_the_models_load_as_they_are(path: Path):
    for make in MODELS.values():
        assert portacnn.onnx.load(write(path, make())).state_dict()


@pytest.fixture(scope="module")
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


SPOIL = settings(
    max_examples=100,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
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


# --- spoilt files ---------------------------------------------------------------------------------


@SPOIL
@given(name=st.sampled_from(sorted(CONTENTS)), share=st.floats(0, 1, exclude_max=True))
def test_cut_files_are_refused_or_load(path: Path, quiet: None, name: str, share: float):
    attempted(path, CONTENTS[name][: int(share * len(CONTENTS[name]))])


@SPOIL
@given(name=st.sampled_from(sorted(CONTENTS)), at=st.integers(0, 1 << 20), bit=st.integers(0, 7))
def test_files_with_a_flipped_bit_are_refused_or_load(
    path: Path, quiet: None, name: str, at: int, bit: int
):
    content = bytearray(CONTENTS[name])
    content[at % len(content)] ^= 1 << bit
    attempted(path, bytes(content))


@SPOIL
@given(content=st.binary(max_size=300))
def test_random_bytes_are_refused_or_load(path: Path, quiet: None, content: bytes):
    attempted(path, content)


@SPOIL
@given(name=st.sampled_from(sorted(CONTENTS)), seed=st.integers(0, 1 << 30))
def test_files_with_changed_bytes_are_refused_or_load(
    path: Path, quiet: None, name: str, seed: int
):
    attempted(path, spoil_bytes(CONTENTS[name], Random(seed)))


@SPOIL
@given(name=st.sampled_from(sorted(CONTENTS)), seed=st.integers(0, 1 << 30))
def test_files_with_changed_fields_are_refused_or_load(
    path: Path, quiet: None, name: str, seed: int
):
    attempted(path, spoil_parts(MODELS[name](), Random(seed)))


@pytest.mark.slow
def test_the_fuzzer_finds_nothing(tmp_path: Path, quiet: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert fuzz.main("onnx", "60", "0") == 0


# --- what a graph may not be ----------------------------------------------------------------------


def test_a_missing_file_and_a_file_without_a_graph_raise_errors(path: Path):
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


def test_inputs_that_a_network_cannot_have(path: Path):
    model = model_of([node("Add", ["x", "z"], ["y"])], shape=(2, 2, 5, 5))
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [3, 2, 5, 5]))
    refused(path, model, "x, z are for different numbers of samples")
    refused(path, model_of([node("Relu", ["w"], ["y"])], {"w": numbers(2)}), "with an input")
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
    """All of them are named at once, with their nodes; not those that no output needs."""
    refused(
        path,
        model_of(
            [
                node("Einsum", ["x"], ["a"], "blocks/7", equation="ij->ji"),
                node("LSTM", ["a", "w", "w"], ["b"], "cell"),
                node("Einsum", ["b"], ["c"], "blocks/8", equation="ij->ji"),
                node("Relu", ["c"], ["d"], domain="ai.tools"),
                node("CumSum", ["d", "w"], ["y"], "sums"),
                node("Det", ["x"], ["z"]),
            ],
            {"w": numbers(2)},
        ),
        "Einsum (2 nodes, first 'blocks/7'), LSTM (node 'cell'), ai.tools.Relu (node 'd'), "
        "CumSum (node 'sums'); LSTM: recurrent networks are outside of what portacnn is for",
    )
    inner = helper.make_graph([], "inner", [], [helper.make_tensor_value_info("x", 1, None)])
    refused(path, model_of([node("Relu", ["x"], ["y"], body=inner)]), "unknown attribute 'body'")
    model = model_of([node("Relu", ["x"], ["y"])])
    model.functions.append(helper.make_function("", "Relu", ["x"], ["y"], [], model.opset_import))
    refused(path, model, "functions")
    model = model_of([node("Relu", ["x"], ["y"])])
    model.graph.sparse_initializer.append(onnx.SparseTensorProto())
    refused(path, model, "sparse")


@pytest.mark.parametrize("version", [0, 5, 29, 1 << 40, -1])
def test_unknown_opsets_are_refused(path: Path, version: int):
    model = model_of([node("Relu", ["x"], ["y"])])
    model.opset_import[0].version = version
    refused(path, model, "opset")
    del model.opset_import[:]
    refused(path, model, "opset")


def test_wrong_attributes_are_refused(path: Path):
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
