"""What an exported file says: names, shapes, opsets, dtypes and the preprocessing."""

import sys

import numpy as np
import onnx
import pytest
from onnx import reference

from portacnn import layers as L
from portacnn import models as M
from portacnn.errors import ArgumentError, ShapeError, StateError
from portacnn.layers import Conv2d, Flatten, Linear, ReLU, Residual, Sequential
from portacnn.onnx import export as public_export
from support.checks import refuses
from support.onnx_export import (
    MODELS,
    NEWEST,
    OPSETS,
    agrees,
    close,
    export,
    filled,
    images,
    nodes,
    run,
)

exporting, building = sys.modules["portacnn.onnx.export"], sys.modules["portacnn.onnx.builder"]


# --- names and shapes -----------------------------------------------------------------------------


def test_names_are_paths(tmp_path):
    model = M.ResNet20(device="numpy", seed=0)
    file = onnx.load(export(model, tmp_path))
    state = {
        name: array
        for name, array in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in file.graph.initializer}
    assert list(found) == list(state)
    assert all(np.array_equal(found[name], state[name]) for name in state)
    names = [node.name for node in file.graph.node]
    assert names[:3] == ["conv1/Conv", "bn1/BatchNormalization", "relu/Relu"]
    assert {"layer2.0.conv1/Conv", "layer2.0/Add", "layer2.0.activation/Relu", "fc/Gemm"} <= set(
        names
    )
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("dynamic", "batch"), [(True, "N"), (False, 1)])
def test_the_file_has_one_input_and_one_output(dynamic, batch, tmp_path):
    model = M.SimpleConvNet(device="numpy", seed=0)
    file = onnx.load(export(model, tmp_path, dynamic_batch=dynamic))
    given, made = (
        (
            value.name,
            [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim],
        )
        for value in (*file.graph.input, *file.graph.output)
    )
    assert given == ("input", [batch, 1, 28, 28])
    assert made == ("output", [batch, 10])
    x = images(model, 1)
    close(run(tmp_path / "model.onnx", x), model.predict(x))


def test_layers_may_have_the_names_of_the_input_and_output(tmp_path):
    network = Sequential(
        input=Linear(4, 4), output=Sequential(input=Linear(4, 3), **{"input/Gemm": ReLU()})
    )
    agrees(filled(network.build((4,), device="numpy", seed=0)), tmp_path)


def test_parameters_and_nodes_whose_names_are_near_each_other(tmp_path):
    network = Residual(Linear(4, 4, bias=False), Linear(4, 4), shortcut_name="Gemm")
    agrees(filled(network.build((4,), device="numpy", seed=0)), tmp_path)


def test_a_part_of_a_network_can_be_exported(tmp_path):
    model = M.VGG11(input_size=32, hidden_size=8, device="numpy", seed=0)
    part = model.children["classifier"]
    path = export(part, tmp_path)
    assert nodes(path)[0].name == "0/Gemm"
    assert part.path == "classifier"
    x = images(part, 3)
    close(run(path, x), part(x))


def test_the_network_stays_as_it_was(tmp_path):
    model = M.ResNet20(device="numpy", seed=0)
    before, rows = model.state_dict(), [(layer.path, layer.input_shape) for layer in model.walk()]
    export(model, tmp_path, input_shape=(3, 40, 24))
    assert [(layer.path, layer.input_shape) for layer in model.walk()] == rows
    assert all(np.array_equal(before[name], array) for name, array in model.state_dict().items())


def test_every_backend_exports_the_same_values(backend, tmp_path):
    model = M.SimpleConvNet(device=backend.device, seed=0)
    x = images(model, 3)
    path = export(model, tmp_path)
    close(run(path, x), backend.host(model.predict(backend.array(x))))


# --- other samples, opsets, dtypes ----------------------------------------------------------------


def test_other_samples_than_it_was_built_for(tmp_path):
    model = M.ResNet20(device="numpy", seed=0)
    path = export(model, tmp_path, input_shape=(3, 48, 40))
    x = np.random.default_rng(0).standard_normal((2, 3, 48, 40)).astype("float32")
    close(run(path, x), model(x))


def test_other_samples_that_the_weights_do_not_fit(tmp_path):
    model = M.SimpleConvNet(device="numpy", seed=0)
    words = ("fc1 (Linear)", "weight must have shape (100, 5880)", "has (100, 4320)")
    refuses(
        ShapeError,
        *words,
        call=lambda: public_export(model, tmp_path / "m.onnx", input_shape=(1, 32, 32)),
    )
    refuses(
        ShapeError,
        "conv1 (Conv2d)",
        "(30, 3, 5, 5)",
        call=lambda: public_export(model, tmp_path / "m.onnx", input_shape=(3, 28, 28)),
    )
    assert not list(tmp_path.iterdir())


def test_a_network_that_is_not_built(tmp_path):
    network = Sequential(Conv2d(None, 2, 3), Flatten(), Linear(None, 4))
    refuses(
        StateError,
        "not built",
        "input_shape",
        call=lambda: public_export(network, tmp_path / "m.onnx"),
    )
    path = export(network, tmp_path, input_shape=(3, 5, 6))
    x = images(network, 2)
    close(run(path, x), network(x))


@pytest.mark.parametrize("opset", [12, NEWEST + 1, 17.0, True, "18"])
def test_opsets_that_are_refused(opset, tmp_path):
    words = (str(13), str(NEWEST)) if type(opset) is int else ("opset", repr(opset))
    network = Linear(3, 2).build((3,), device="numpy")
    refuses(
        ArgumentError, *words, call=lambda: public_export(network, tmp_path / "m.onnx", opset=opset)
    )


@pytest.mark.parametrize("opset", OPSETS)
def test_the_file_names_its_opset(opset, tmp_path):
    network = Sequential(
        L.GELU(), L.LayerNorm(4), Conv2d(2, 2, 3, padding=1, padding_mode="circular")
    )
    path = export(network.build((2, 3, 4), device="numpy"), tmp_path, opset=opset)
    assert onnx.load(path).opset_import[0].version == opset
    used = {node.op_type for node in nodes(path)}
    assert ("Gelu" in used) == (opset >= 20)
    assert ("LayerNormalization" in used) == (opset >= 17)
    assert ("Pad" in used) == (opset >= 19)  # which had no "wrap" before


@pytest.mark.parametrize("name", ["SimpleConvNet", "LeNet5", "ResNet20"])
def test_float64_models_export_in_float64(name, tmp_path):
    """onnx's reference evaluator runs it: onnxruntime has no float64 for some operators."""
    model = MODELS[name](device="numpy", seed=0, dtype="float64")
    path = export(model, tmp_path)
    x = images(model, 2, "float64")
    (y,) = reference.ReferenceEvaluator(str(path)).run(None, {"input": x})
    assert y.dtype == np.float64
    np.testing.assert_allclose(
        y, model.predict(x), rtol=1e-6, atol=1e-6 * np.abs(y).max()
    )  # epsilon is a float32 there


def test_dtype_sets_the_arithmetic_of_the_file(tmp_path):
    model = M.SimpleConvNet(device="numpy", seed=0, dtype="float64")
    path = export(model, tmp_path, dtype="float32")
    x = images(model, 3)
    close(run(path, x), model.predict(x).astype("float32"))


def as_bfloat16(values):
    """By definition: the nearest numbers with 8 significant bits, of two the even one."""
    finite = np.where(np.isfinite(values), values, 0).astype("float64")
    exponents = np.maximum(np.frexp(finite)[1], -125)  # below, numbers are subnormal
    nearest = np.ldexp(np.rint(np.ldexp(finite, 8 - exponents)), exponents - 8)
    return np.where(np.isfinite(values), nearest, values).astype("float32")


@pytest.mark.parametrize(
    ("code", "rounded"), [(10, lambda a: a.astype("float16").astype("float32")), (16, as_bfloat16)]
)
def test_weights_are_stored_in_half_the_bytes(code, rounded, tmp_path):
    dtype = {10: "float16", 16: "bfloat16"}[code]
    model = filled(M.ResNet20(device="numpy", seed=0))
    whole = export(model, tmp_path).stat().st_size
    path = export(model, tmp_path, dtype=dtype)
    assert path.stat().st_size < 0.55 * whole
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}
    assert kinds["layer1.0.conv1.weight"] == code
    assert kinds["bn1.running_var"] == kinds["fc.bias"] == 1
    x = images(model, 7)
    exact = model.predict(x)
    model.load_state_dict(
        {
            name: rounded(array) if array.ndim > 1 else array
            for name, array in model.state_dict().items()
        }
    )
    got = run(path, x)
    close(got, model.predict(x))
    assert not np.allclose(got, exact, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_rounded_to_the_nearest(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**32, 4096, dtype="uint64").astype("uint32")
    values = np.concatenate(
        [bits.view("float32"), np.float32([0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3.3e38])]
    )
    values = np.concatenate(
        [values, np.uint32([0x7FFFFFFF, 0xFFFFFFFF, 0x3F808000, 0x3F818000]).view("float32")]
    )
    values = values[np.isnan(values) | np.isinf(values) | (np.abs(values) < 3.3e38)]
    network = Linear(len(values), 1, bias=False).build((len(values),), device="numpy")
    network.load_state_dict({"weight": values[None]})
    (tensor,) = onnx.load(export(network, tmp_path, dtype="bfloat16")).graph.initializer
    got = (np.frombuffer(tensor.raw_data, "<u2").astype("uint32") << 16).view("float32")
    np.testing.assert_array_equal(got, as_bfloat16(values))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_that_are_infinite_stay_so(dtype, tmp_path):
    network = Linear(2, 1, bias=False).build((2,), device="numpy")
    network.load_state_dict({"weight": np.array([[np.inf, 1.0]])})
    assert run(export(network, tmp_path, dtype=dtype), np.ones((1, 2), "float32")) == np.inf


def test_weights_too_large_for_their_dtype_are_refused(tmp_path):
    network = Sequential(fc=Linear(2, 1)).build((2,), device="numpy", dtype="float64")
    network.load_state_dict({"fc.weight": np.array([[7e4, -1e39]]), "fc.bias": np.zeros(1)})
    for dtype in ("float16", "float32", "bfloat16"):
        words = ("fc (Linear)", "fc.weight", "1e+39", dtype)
        refuses(
            ArgumentError,
            *words,
            call=lambda dtype=dtype: public_export(network, tmp_path / "m", dtype=dtype),
        )
    refuses(
        ArgumentError,
        "dtype",
        "int8",
        call=lambda: public_export(network, tmp_path / "m", dtype="int8"),
    )
    assert not list(tmp_path.iterdir())


# --- preprocessing --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "normalize",
    [
        M.Normalize(),
        M.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        M.Normalize(1.0, 3.0, 2.0),
        M.Normalize(mean=(0.0, 0.456, 0.0)),  # a mean of 0 in some channels
    ],
    ids=["scale", "torchvision", "numbers", "some"],
)
def test_preprocess_becomes_part_of_the_file(normalize, tmp_path):
    model = M.ResNet20(device="numpy", seed=0)
    model.preprocess = normalize
    path = export(model, tmp_path, preprocess=True)
    for count in (1, 7):
        x = np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype="uint8")
        close(run(path, x), model.predict(x))
    x = images(model, 2)
    close(run(export(model, tmp_path), x), model.predict(x))  # left out where it is not asked for


def test_preprocess_that_is_not_there(tmp_path):
    for network in (
        M.SimpleConvNet(device="numpy", seed=0),
        Linear(3, 2).build((3,), device="numpy"),
    ):
        call = lambda network=network: public_export(network, tmp_path / "m.onnx", preprocess=True)  # noqa: E731
        refuses(StateError, type(network).__name__, "no preprocess", "Normalize", call=call)
