"""ONNX files that say one thing in several ways, or lie beside what they need: read as the runtime
does, or refused."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import portacnn.onnx
from portacnn.errors import ModelFormatError
from portacnn.layers import BatchNorm2d, Dropout
from portacnn.layers.base import run
from support.onnx_files import model_of, numbers

node = helper.make_node
X = numbers(3, 2, 5, 5, seed=4)


def write(path: Path, model: Any) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def refused(path: Path, model: Any, match: str) -> None:
    with pytest.raises(ModelFormatError, match=match):
        portacnn.onnx.load(write(path, model))


def of_the_runtime(path: Path, x: np.ndarray) -> np.ndarray:
    runtime = pytest.importorskip("onnxruntime")
    return runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )[0]


# --- operators that train -------------------------------------------------------------------------

STATE = {
    "s": 1 + numbers(2) ** 2,
    "b": numbers(2, seed=1),
    "m": numbers(2, seed=2),
    "v": 1 + numbers(2, seed=3) ** 2,
}


def batch_norm(opset: int, outputs: int = 1, **attributes: Any) -> Any:
    names = ["y", "mean", "var", "saved_mean", "saved_var"][:outputs]
    return model_of(
        [node("BatchNormalization", ["x", *STATE], names, **attributes)], STATE, opset=opset
    )


def affine(x: np.ndarray, mean: np.ndarray, var: np.ndarray) -> np.ndarray:
    scale, bias = (STATE[name][:, None, None] for name in "sb")
    return (x - mean) / np.sqrt(var + 1e-5) * scale + bias


@pytest.mark.parametrize(
    ("opset", "outputs", "attributes"),
    [
        (6, 1, {"is_test": 0}),
        (6, 5, {"is_test": 0}),
        *((opset, 5, {}) for opset in (7, 8, 9, 13)),
        (14, 3, {"training_mode": 1}),
        (15, 3, {"training_mode": 1}),
    ],
)
def test_batch_norm_in_training_mode(
    path: Path,
    opset: int,
    outputs: int,
    attributes: dict[str, int],
    caplog: pytest.LogCaptureFixture,
):
    """It learns: a training pass gives what the runtime gives, by the batch's own statistics; a
    prediction takes the running ones, and a note says so."""
    write(path, batch_norm(opset, outputs, **attributes))
    model = portacnn.onnx.load(path)
    assert "in training mode; predictions use its running statistics: node 'y'" in caplog.text
    m, v = (STATE[name][:, None, None] for name in "mv")
    np.testing.assert_allclose(model.predict(X), affine(X, m, v), rtol=1e-4, atol=1e-5)
    batch = affine(X, X.mean((0, 2, 3), keepdims=True), X.var((0, 2, 3), keepdims=True))
    got = run(model, X, True, False)[0]
    np.testing.assert_allclose(got, batch, rtol=1e-4, atol=1e-5)
    if opset > 6:
        np.testing.assert_allclose(got, of_the_runtime(path, X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opset", [6, 8])
def test_batch_norm_of_each_element(path: Path, opset: int):
    """spatial=0, before opset 9: each element of a sample has its own statistics."""
    state = {name: np.broadcast_to(a[:, None, None], (2, 5, 5)) for name, a in STATE.items()}
    state = {name: a + 0.1 * numbers(2, 5, 5, seed=7) ** 2 for name, a in state.items()}
    nodes = [node("BatchNormalization", ["x", *state], ["y"], spatial=0)]
    write(path, model_of(nodes, state, opset=opset))
    s, b, m, v = state.values()
    expected = (X - m) / np.sqrt(v + 1e-5) * s + b
    np.testing.assert_allclose(portacnn.onnx.load(path).predict(X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opset", [6, 7, 9, 13, 14, 17])
def test_batch_norm_for_inference_loads(path: Path, opset: int):
    attributes: dict[str, int] = {"is_test": 1, "spatial": 1} if opset == 6 else {}
    write(path, batch_norm(opset, **attributes))
    s, b, m, v = (value[:, None, None] for value in STATE.values())
    np.testing.assert_allclose(
        portacnn.onnx.load(path).predict(X),
        (X - m) / np.sqrt(v + 1e-5) * s + b,
        rtol=1e-4,
        atol=1e-5,
    )
    if opset > 6:
        np.testing.assert_allclose(
            portacnn.onnx.load(path).predict(X), of_the_runtime(path, X), rtol=1e-4, atol=1e-5
        )
    model = batch_norm(opset, **attributes)
    model.graph.node[0].output.extend(["", "", "", ""])  # left out by name
    assert portacnn.onnx.load(write(path, model))
    if opset > 6:
        refused(path, batch_norm(opset, is_test=0), "is_test")


TRAINS = {"r": np.float32(0.5), "t": np.bool_(True)}


@pytest.mark.parametrize(
    "model",
    [
        model_of([node("Dropout", ["x"], ["y"], ratio=0.5, is_test=0)], opset=6),
        model_of([node("Dropout", ["x", "r", "t"], ["y"])], TRAINS, opset=12),
        model_of([node("Dropout", ["x", "r", "t"], ["y"])], TRAINS, opset=22),
    ],
    ids=["is_test=0", "opset 12", "opset 22"],
)
def test_dropout_in_training_mode(path: Path, model: Any, caplog: pytest.LogCaptureFixture):
    ours = portacnn.onnx.load(write(path, model), seed=0)
    assert "Dropout is in training mode; predictions drop nothing: node 'y'" in caplog.text
    np.testing.assert_array_equal(ours.predict(X), X)
    dropped = run(ours, X, True, False)[0]
    assert set(np.unique(dropped / X).round(3)) == {0.0, 2.0}


def test_dropout_for_inference_has_no_note(path: Path, caplog: pytest.LogCaptureFixture):
    model = model_of([node("Dropout", ["x"], ["y"], ratio=0.5, is_test=1)], opset=6)
    portacnn.onnx.load(write(path, model))
    refused(path, model_of([node("Dropout", ["x"], ["y"], is_test=1)], opset=7), "opset 6")
    assert not caplog.text


# --- opsets ---------------------------------------------------------------------------------------


def test_an_opset_that_is_said_twice(path: Path):
    for domains in (["", ""], ["", "ai.onnx"], ["ai.onnx", "", "ai.onnx"], ["ai.onnx"]):
        model = model_of([node("Relu", ["x"], ["y"])])
        del model.opset_import[:]
        model.opset_import.extend(helper.make_opsetid(domain, 17) for domain in domains)
        np.testing.assert_array_equal(
            portacnn.onnx.load(write(path, model)).predict(X), np.maximum(X, 0)
        )
        np.testing.assert_array_equal(of_the_runtime(path, X), np.maximum(X, 0))
    model.opset_import.append(helper.make_opsetid("", 12))
    refused(path, model, "expected one opset")


# --- attributes that are for training -------------------------------------------------------------


@pytest.mark.parametrize(
    ("opset", "given", "momentum"), [(8, {}, 0.1), (15, {}, 0.1), (15, {"momentum": 0.75}, 0.25)]
)
def test_momentum_counts_the_other_way_round(path: Path, opset: int, given: Any, momentum: float):
    """In ONNX it is the share of the running statistics that stays. No prediction shows it."""
    model = portacnn.onnx.load(write(path, batch_norm(opset, **given)))
    (norm,) = (layer for layer in model.walk() if isinstance(layer, BatchNorm2d))
    assert norm.momentum == pytest.approx(momentum)
    x = X + 1
    run(model, x, True, False)
    expected = (1 - momentum) * STATE["m"] + momentum * x.mean(axis=(0, 2, 3))
    np.testing.assert_allclose(norm.buffers["running_mean"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("opset", "nodes", "share"),
    [
        (7, [node("Dropout", ["x"], ["y"])], 0.5),
        (7, [node("Dropout", ["x"], ["y"], ratio=0.25)], 0.25),
        (13, [node("Dropout", ["x"], ["y"])], 0.5),
        (13, [node("Dropout", ["x", "quarter"], ["y"])], 0.25),
    ],
)
def test_the_share_that_dropout_drops(path: Path, opset: int, nodes: list[Any], share: float):
    constants = {"quarter": np.float32(0.25)}
    model = portacnn.onnx.load(write(path, model_of(nodes, constants, opset=opset)), seed=0)
    (dropout,) = (layer for layer in model.walk() if isinstance(layer, Dropout))
    assert dropout.p == share


@pytest.mark.parametrize(
    ("axis", "count", "sizes"), [(2, 2, [3, 2]), (2, 3, [2, 2, 1]), (1, 2, [1, 1])]
)
def test_a_split_that_does_not_come_out_even(path: Path, axis: int, count: int, sizes: list[int]):
    """The last part is the smaller one."""
    parts = [f"part{i}" for i in range(count)]
    nodes = [
        node("Split", ["x"], parts, axis=axis, num_outputs=count),
        node("Concat", parts[::-1], ["y"], axis=axis),
    ]
    model = portacnn.onnx.load(write(path, model_of(nodes, opset=18)))
    cuts = np.cumsum(sizes)[:-1]
    expected = np.concatenate(np.split(X, cuts, axis=axis)[::-1], axis=axis)
    np.testing.assert_array_equal(model(X), expected)


@pytest.mark.parametrize(
    ("start", "end", "step", "cells"),
    [(4, -6, -1, [4, 3, 2, 1, 0]), (-1, -(1 << 63), -2, [4, 2, 0]), (3, 0, -1, [3, 2, 1])],
)
def test_a_constants_slice_that_is_turned_round(
    path: Path, start: int, end: int, step: int, cells: list[int]
):
    """An end before the first cell takes that in, too."""
    row = np.arange(5, dtype=np.float32)
    numbers_of = {"start": start, "end": end, "axis": 0, "step": step}
    constants = {name: np.array([value], np.int64) for name, value in numbers_of.items()}
    nodes = [
        node("Slice", ["row", *numbers_of], ["part"]),
        node("ReduceMean", ["x"], ["mean"], axes=[2, 3]),
        node("Add", ["mean", "part"], ["y"]),
    ]
    model = portacnn.onnx.load(write(path, model_of(nodes, constants | {"row": row})))
    expected = X.mean(axis=(2, 3), keepdims=True) + row[cells]
    np.testing.assert_allclose(model(X), expected, rtol=1e-5)


# --- the number of samples ------------------------------------------------------------------------

SIZES = [node("Shape", ["x"], ["shape"]), node("Gather", ["shape", "zero"], ["n"])]
CONSTANTS = {
    "zero": np.int64(0),
    "two": np.int64(2),
    "axis": np.array([1]),
    "row": np.array([0]),
    "rest": np.array([50]),
    "five": np.array([5]),
}


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Mul", ["n", "two"], ["m"])],
        [node("Add", ["n", "two"], ["m"])],
        [node("Sub", ["two", "n"], ["m"])],
        [node("Div", ["n", "two"], ["m"])],
        [node("Max", ["n", "two"], ["m"])],
        [node("Min", ["two", "n"], ["m"])],
        [node("Sum", ["n", "two", "two"], ["m"])],
        [node("Neg", ["n"], ["m"])],
        [node("Mul", ["n", "n"], ["m"])],
    ],
    ids=lambda nodes: nodes[0].op_type,
)
def test_a_reshape_by_what_is_computed_from_the_number_of_samples(path: Path, nodes: list[Any]):
    """It would move numbers from one sample to another, for any other number of samples."""
    nodes = [
        *SIZES,
        *nodes,
        node("Unsqueeze", ["m", "row"], ["m1"]),
        node("Concat", ["m1", "rest"], ["to"], axis=0),
        node("Reshape", ["x", "to"], ["y"]),
    ]
    refused(
        path,
        model_of(nodes, CONSTANTS),
        rf"\({nodes[2].op_type}\): it computes with the number of samples|"
        r"reshaping \[N, 2, 5, 5\] to .*N.*, 50\] would move elements",
    )


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Slice", ["x", "n1", "five", "axis"], ["y"])],
        [node("Slice", ["x", "row", "n1", "axis"], ["y"])],
        [node("Add", ["x", "n"], ["y"])],
        [node("Mul", ["x", "n"], ["y"])],
        [node("Max", ["x", "n"], ["y"])],
        [node("Clip", ["x", "n"], ["y"])],
        [node("Dropout", ["x", "n"], ["y"])],
        [node("Cast", ["n"], ["f"], to=1), node("Div", ["x", "f"], ["y"])],
        [node("ConstantOfShape", ["n1"], ["c"]), node("Add", ["x", "c"], ["y"])],
        [node("Gather", ["x", "n"], ["y"], axis=1)],
        [node("Pad", ["x", "n8"], ["y"])],
        [node("Split", ["x", "n2"], ["y", "z"], axis=1)],
    ],
    ids=lambda nodes: nodes[0].op_type,
)
def test_the_number_of_samples_is_no_number_in_between(path: Path, nodes: list[Any]):
    """It is not known: what stands for it must not be taken for a number anywhere."""
    given = [
        *SIZES,
        node("Unsqueeze", ["n", "row"], ["n1"]),
        node("Concat", ["n1", "n1"], ["n2"], axis=0),
        node("Concat", ["n2"] * 4, ["n8"], axis=0),
        *nodes,
    ]
    refused(
        path, model_of(given, CONSTANTS), "samples|type 1|beyond|shape or value|bound|numbers|cells"
    )


def test_shapes_that_keep_the_samples_are_read(path: Path):
    nodes = [
        *SIZES,
        node("Slice", ["shape", "row", "axis"], ["again"]),
        node("Squeeze", ["again", "row"], ["same"]),
        node("Cast", ["same"], ["cast"], to=7),
        node("Unsqueeze", ["cast", "row"], ["n1"]),
        node("Identity", ["n1"], ["id"]),
        node("Concat", ["id", "rest"], ["to"], axis=0),
        node("Reshape", ["x", "to"], ["y"]),
    ]
    model = portacnn.onnx.load(write(path, model_of(nodes, CONSTANTS)))
    np.testing.assert_array_equal(model.predict(X), X.reshape(3, 50))


# --- external data --------------------------------------------------------------------------------


def tensor(name: str, location: str, *dims: int, offset: int = 0) -> Any:
    made = TensorProto(
        name=name, data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL
    )
    made.external_data.add(key="location", value=location)
    made.external_data.add(key="offset", value=str(offset))
    return made


def with_external(*tensors: Any, nodes: Any = None) -> Any:
    model = model_of(nodes or [node("Add", ["x", "w"], ["y"])])
    model.graph.initializer.extend(tensors)
    return model


def test_bfloat16_is_charged_as_the_float32_it_becomes(path: Path):
    """Two tensors of the same 2 n bytes take 6 n each, of 8 n that the file allows."""
    count = 1 << 16
    (path.parent / "w.bin").write_bytes(bytes(2 * count))
    tensors = [tensor(name, "w.bin", count) for name in ("a", "b")]
    for each in tensors:
        each.data_type = TensorProto.BFLOAT16
    nodes = [node("Gather", [name, "zero"], [f"{name}0"]) for name in ("a", "b")]
    nodes += [node("Add", ["a0", "b0"], ["sum"]), node("Add", ["x", "sum"], ["y"])]
    model = with_external(*tensors, nodes=nodes)
    model.graph.initializer.append(numpy_helper.from_array(np.int64(0), "zero"))
    write(path, model)
    np.testing.assert_array_equal(portacnn.onnx.load(path, max_extra_bytes=5 * count).predict(X), X)
    with pytest.raises(ModelFormatError, match="its arrays need"):
        portacnn.onnx.load(path, max_extra_bytes=0)


@pytest.fixture
def cache(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A model and its data as the Hugging Face cache has them: links, each to a file in another
    folder."""
    snapshot, blobs = tmp_path / "snapshots" / "x" / "onnx", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    values = numbers(2, 5, 5, seed=9)
    write(blobs / "aaa", with_external(tensor("w", "model.onnx_data", 2, 5, 5)))
    (blobs / "bbb").write_bytes(values.tobytes())
    (snapshot / "model.onnx").symlink_to("../../../blobs/aaa")
    (snapshot / "model.onnx_data").symlink_to("../../../blobs/bbb")
    return snapshot / "model.onnx", values


def test_external_data_may_be_beside_a_link(
    cache: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
):
    path, values = cache
    np.testing.assert_allclose(portacnn.onnx.load(path).predict(X), X + values, rtol=1e-6)
    monkeypatch.chdir(path.parent)
    np.testing.assert_allclose(portacnn.onnx.load("model.onnx").predict(X), X + values, rtol=1e-6)
    # A link to the model alone: the data lie beside what it points to.
    (path.parent / "model.onnx_data").unlink()
    (path.parents[3] / "blobs" / "model.onnx_data").write_bytes(values.tobytes())
    np.testing.assert_allclose(portacnn.onnx.load(path).predict(X), X + values, rtol=1e-6)


def test_data_that_links_lead_away_from_are_refused(cache: tuple[Path, np.ndarray], tmp_path: Path):
    path, values = cache
    (tmp_path / "secret").write_bytes(values.tobytes())
    (path.parent / "model.onnx_data").unlink()
    for target in ("../../../secret", tmp_path / "secret", "../../../blobs/../secret"):
        (path.parent / "model.onnx_data").symlink_to(target)
        with pytest.raises(ModelFormatError, match="outside the model's folder"):
            portacnn.onnx.load(path)
        (path.parent / "model.onnx_data").unlink()
    (path.parents[3] / "blobs" / "model.onnx_data").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelFormatError, match="outside the model's folder"):
        portacnn.onnx.load(path)


@pytest.mark.parametrize("spelled", ["w.bin", "each its own", "hard links"])
def test_tensors_that_name_the_same_bytes_are_charged(path: Path, spelled: str):
    """300 tensors of 1 MiB out of one file of 1 MiB: they may not take 300 MiB."""
    (path.parent / "w.bin").write_bytes(bytes(1 << 20))
    places = ["./" * i + "w.bin" if spelled == "each its own" else "w.bin" for i in range(300)]
    if spelled == "hard links":
        places = [f"{i}.bin" for i in range(300)]
        for place in places:
            os.link(path.parent / "w.bin", path.parent / place)
    tensors = [tensor(f"w{i}", place, 1 << 18) for i, place in enumerate(places)]
    # Of each only one number is used, so that nothing but reading them takes memory.
    nodes = [node("Gather", [f"w{i}", "zero"], [f"g{i}"]) for i in range(300)]
    nodes += [node("Sum", [f"g{i}" for i in range(300)], ["sum"]), node("Add", ["x", "sum"], ["y"])]
    model = with_external(*tensors, nodes=nodes)
    model.graph.initializer.append(numpy_helper.from_array(np.int64(0), "zero"))
    refused(path, model, "its arrays need 1048576 more bytes")


def test_data_that_are_replaced_while_they_are_read(path: Path, monkeypatch: pytest.MonkeyPatch):
    """Both tensors are of the file that was there first."""
    data = path.parent / "w.bin"
    data.write_bytes(np.ones(100, "<f4").tobytes())
    nodes = [node("Mul", ["x", "a"], ["t"]), node("Add", ["t", "b"], ["y"])]
    write(
        path,
        with_external(
            tensor("a", "w.bin", 2, 5, 5), tensor("b", "w.bin", 2, 5, 5, offset=200), nodes=nodes
        ),
    )
    read = portacnn.onnx.reading.Source.array

    def reading(source: Any, tensor: Any) -> Any:
        array = read(source, tensor)
        (path.parent / "new").write_bytes(np.full(100, 7, "<f4").tobytes())
        os.replace(path.parent / "new", data)
        return array

    monkeypatch.setattr(portacnn.onnx.reading.Source, "array", reading)
    np.testing.assert_allclose(portacnn.onnx.load(path).predict(X), X + 1, rtol=1e-6)


def test_each_tensor_may_have_its_own_file(path: Path):
    """More of them than a process may have open."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    nodes, names = [], ["x", *(f"t{i}" for i in range(99)), "y"]
    for i in range(100):
        (path.parent / f"w{i}").write_bytes(np.full(2, i, "<f4").tobytes())
        nodes.append(node("Add", [names[i], f"w{i}"], [names[i + 1]]))
    write(
        path, with_external(*(tensor(f"w{i}", f"w{i}", 2, 1, 1) for i in range(100)), nodes=nodes)
    )
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        model = portacnn.onnx.load(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    np.testing.assert_allclose(model.predict(X), X + 4950, rtol=1e-5)


# --- text -----------------------------------------------------------------------------------------


def test_names_cannot_steer_a_terminal(path: Path, caplog: pytest.LogCaptureFixture):
    evil = "\x1b[2J\r\nforged\u202e" + "n" * 3000
    for model in (
        model_of([node(evil, ["x"], ["y"], evil)]),
        model_of([node("Relu", [evil], ["y"], evil)]),
        model_of([node("Relu", ["x"], ["y"], domain=evil)]),
        model_of([node("Relu", ["x"], [evil])], output=evil + "z"),
        model_of([node("Pad", ["x", "p"], ["y"], evil, mode=evil)], {"p": np.zeros(8, "int64")}),
        model_of([node("Add", ["x", evil], ["y"], evil)], {evil: numbers(7)}),
    ):
        with pytest.raises(ModelFormatError) as caught:
            portacnn.onnx.load(write(path, model))
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 4000
    nodes = [
        node("Gemm", ["x", "w"], ["t"], evil, transB=1),
        node("Gemm", ["t", "w"], ["y"], evil + "2"),
    ]
    portacnn.onnx.load(write(path, model_of(nodes, {"w": numbers(2, 2)}, ("N", 2))))
    assert "in different forms" in caplog.text
    assert "\x1b" not in caplog.text
    assert len(caplog.text) < 2000
