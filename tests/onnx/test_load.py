"""ONNX files as models: against onnxruntime, trained on every backend, and the arguments of
load."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import portacnn
import portacnn.models as M
import portacnn.onnx
from portacnn import layers as L
from portacnn.errors import ArgumentError, BackendError
from portacnn.onnx.folding import FOLDED
from portacnn.onnx.importer import OPERATORS
from portacnn.onnx.supported import CONTROL
from support.checks import normal
from support.matrix import Here, needs
from support.onnx_files import MODELS, classifier, model_of, numbers
from support.onnx_load import load, runtime

node = helper.make_node


# --- against onnxruntime --------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_small_models_agree_on_every_backend(backend: Here, name: str, tmp_path: Path):
    model = MODELS[name]()
    ours = load(model, tmp_path, device=backend.device)
    for count in (1, 7):
        x = normal(count, *ours.input_shape).astype("float32")
        got, expected = backend.host(ours.predict(x)), runtime(model, x)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("end", [(1 << 31) - 1, (1 << 63) - 1])
def test_a_slice_of_all_samples_is_allowed(end: int, tmp_path: Path):
    """What converters write for "to the end": the largest int32, or int64."""
    weights = {"from": np.array([0, 1]), "to": np.array([end, end]), "axes": np.array([0, 1])}
    model = model_of([node("Slice", ["x", "from", "to", "axes"], ["y"])], weights, ("N", 4))
    x = normal(3, 4).astype("float32")
    np.testing.assert_array_equal(load(model, tmp_path).predict(x), x[:, 1:])


@pytest.mark.parametrize("across", [0, 1])
@pytest.mark.parametrize("bias", [numbers(3, seed=1), numbers(1, 3, seed=2), numbers(1, seed=3)])
def test_gemm_as_specified(bias: np.ndarray, across: int, tmp_path: Path):
    """alpha * x @ w + beta * b."""
    w = numbers(4, 3)
    nodes = [node("Gemm", ["x", "w", "b"], ["y"], transB=across, alpha=0.5, beta=-3.0)]
    model = model_of(nodes, {"w": w.T.copy() if across else w, "b": bias}, ("N", 4))
    x = normal(5, 4).astype("float32")
    np.testing.assert_allclose(
        load(model, tmp_path).predict(x), 0.5 * (x @ w) - 3 * bias, rtol=1e-4, atol=1e-5
    )


def with_opset(version: int) -> Any:
    """Pooling, a flattening by shapes, Softmax over the last axis, Clip and Dropout, as each opset
    writes them."""
    nodes = [
        node("Conv", ["x", "c.weight", "c.bias"], ["a"]),
        node("Clip", ["a", "least", "most"], ["b"])
        if version >= 11
        else node("Clip", ["a"], ["b"], min=-1.0, max=1.0),
        node("Dropout", ["b", "ratio"], ["c"])
        if version >= 12
        else node("Dropout", ["b"], ["c"], ratio=0.3),
        node("Unsqueeze", ["c", "two"], ["d"])
        if version >= 13
        else node("Unsqueeze", ["c"], ["d"], axes=[2]),
        node("Squeeze", ["d", "two"], ["e"])
        if version >= 13
        else node("Squeeze", ["d"], ["e"], axes=[2]),
        node("ReduceMean", ["e", "three"], ["f"])
        if version >= 18
        else node("ReduceMean", ["e"], ["f"], axes=[3]),
        node("Pad", ["f", "pads"], ["g"])
        if version >= 11
        else node("Pad", ["f"], ["g"], pads=[0, 0, 0, 1, 0, 0, 0, 1]),
        node("Slice", ["g", "from", "to", "three"], ["h"])
        if version >= 10
        else node("Slice", ["g"], ["h"], axes=[3], starts=[1], ends=[2]),
        node("Softmax", ["h"], ["i"], axis=1)
        if version < 13
        else node("Softmax", ["i0"], ["i1"], axis=-1),
        node("Flatten", ["i"], ["y"]),
    ]
    if version >= 13:  # one axis of all from then on
        nodes[8:9] = [
            node("Flatten", ["h"], ["i0"]),
            nodes[8],
            node("Reshape", ["i1", "shape"], ["i"]),
        ]
    weights = {
        "c.weight": numbers(4, 2, 3, 3),
        "c.bias": numbers(4, seed=1),
        "shape": np.array([0, 4, 3, 1]),
    }
    weights |= {
        "two": np.array([2]),
        "three": np.array([3]),
        "from": np.array([1]),
        "to": np.array([2]),
    }
    weights |= {"least": np.float32(-1), "most": np.float32(1), "ratio": np.float32(0.3)}
    weights["pads"] = np.array([0, 0, 0, 1, 0, 0, 0, 1])
    used = {name for one in nodes for name in one.input}
    return model_of(
        nodes, {name: array for name, array in weights.items() if name in used}, opset=version
    )


@pytest.mark.parametrize("version", range(7, 29))
def test_every_opset_computes_the_same(version: int, tmp_path: Path):
    """They all say the same; onnxruntime is asked where it knows the opset."""
    model = with_opset(version)
    x = numbers(3, 2, 5, 5, seed=7)
    got = load(model, tmp_path).predict(x)
    np.testing.assert_allclose(got, load(with_opset(12), tmp_path).predict(x), rtol=1e-6)
    if version <= 22:
        np.testing.assert_allclose(got, runtime(model, x), rtol=1e-5, atol=1e-6)


# --- training -------------------------------------------------------------------------------------


def test_a_loaded_model_trains_on_every_backend(backend: Here, tmp_path: Path):
    """What is in the file learns; weights are parameters, statistics are buffers, constants are
    neither."""
    model = load(classifier(), tmp_path, device=backend.device, dtype="float64", seed=0)
    assert set(model.named_parameters()) == {
        *(
            "conv1.weight",
            "conv1.bias",
            "bn.weight",
            "bn.bias",
            "conv2.weight",
            "fc.weight",
            "fc.bias",
        )
    }
    assert set(model.named_buffers()) == {
        *("bn.running_mean", "bn.running_var", "bn.num_batches_tracked", "mul.value")
    }
    x, t = normal(30, 2, 5, 5), np.arange(30) % 3
    x[np.arange(30), 0, t, t] += 5.0
    trainer = portacnn.Trainer(
        model,
        x,
        t,
        x,
        t,
        epochs=30,
        mini_batch_size=10,
        optimizer="adam",
        optimizer_param={"lr": 0.01},
        verbose=False,
    )
    trainer.train()
    assert trainer.train_loss_list[-1] < 0.5 * trainer.train_loss_list[0]
    assert trainer.train_acc_list[-1] >= 0.9
    model.save(tmp_path / "m.safetensors")
    again = portacnn.load(tmp_path / "m.safetensors")
    np.testing.assert_allclose(
        again.predict(x), backend.host(model.predict(x)), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", ["classifier", "oddities", "windows"])
def test_gradients_agree_with_finite_differences(backend: Here, name: str, tmp_path: Path):
    """By finite differences on NumPy, and on every backend the same."""
    model = MODELS[name]()
    reference = load(model, tmp_path, dtype="float64", seed=0)
    for layer in reference.walk():
        if hasattr(layer, "p"):
            layer.p = 0.0
    x, t = 0.7 * normal(3, *reference.input_shape, seed=4), np.array([0, 2, 1])
    if backend.name == "numpy":
        by_hand = reference.numerical_gradient(x, t, 1e-5)
        for path, gradient in reference.gradient(x, t).items():
            np.testing.assert_allclose(gradient, by_hand[path], rtol=1e-4, atol=1e-7, err_msg=path)
    other = load(model, tmp_path, dtype="float64", device=backend.device, seed=0)
    expected = reference.gradient(x, t)
    for path, gradient in other.gradient(x, t).items():
        np.testing.assert_allclose(
            backend.host(gradient), expected[path], rtol=1e-8, atol=1e-9, err_msg=path
        )


def shared_weights() -> Any:
    """A convolution twice, alike; affine maps of one matrix: with two biases, and one that is
    transposed."""
    nodes = [
        node("Conv", ["x", "w", "b"], ["a"], "first"),
        node("Tanh", ["a"], ["t"]),
        node("Conv", ["t", "w", "b"], ["c"], "second"),
        node("Flatten", ["c"], ["f"]),
        node("Gemm", ["f", "m", "v"], ["g"], "up", transB=1),
        node("Tanh", ["g"], ["h"]),
        node("Gemm", ["h", "m", "u"], ["i"], "again", transB=1),
        node("Gemm", ["i", "m", "u"], ["y"], "across"),
    ]
    initializers = {
        "w": numbers(2, 2, 1, 1),
        "b": numbers(2),
        "m": numbers(8, 8),
        "v": numbers(8, seed=1),
        "u": numbers(8, seed=2),
    }
    return model_of(nodes, initializers, ("N", 2, 2, 2))


@needs("torch")
def test_shared_weights_are_one_parameter(
    backend: Here, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """With PyTorch's gradients for parameters used twice. A matrix that is transposed in one place
    is a parameter of its own."""
    import torch

    model = load(shared_weights(), tmp_path, dtype="float64", device=backend.device)
    assert model.layer_at("first") is model.layer_at("second")
    names = ["first.weight", "first.bias", "up.weight", "up.bias", "again.bias", "across.weight"]
    assert list(model.state_dict()) == names
    assert "'m' is used in different forms by up, again, across" in caplog.text
    state = {
        name: torch.tensor(value, requires_grad=True) for name, value in model.state_dict().items()
    }
    w, b, m, v, u, transposed = state.values()
    F = torch.nn.functional
    host, t = normal(3, 2, 2, 2), np.arange(3)
    hidden = F.conv2d(torch.tanh(F.conv2d(torch.tensor(host), w, b)), w, b).flatten(1)
    y = F.linear(F.linear(torch.tanh(F.linear(hidden, m, v)), m, u), transposed, u)
    F.cross_entropy(y, torch.tensor(t)).backward()
    np.testing.assert_allclose(backend.host(model.predict(host)), y.detach().numpy(), rtol=1e-9)
    gradients = model.gradient(host, t)
    assert list(gradients) == names
    for name, array in gradients.items():
        np.testing.assert_allclose(
            backend.host(array), state[name].grad.numpy(), rtol=1e-8, atol=1e-12, err_msg=name
        )


def test_shared_layers_are_written_once(tmp_path: Path):
    """Our own export, loaded again: the same layers, parameters and numbers."""
    conv, tied = L.Conv2d(2, 2, 3, padding=1), L.Linear(6, 6, bias=False)
    first = L.Linear(None, 6)
    tied.tie("weight", square := L.Linear(6, 6))
    parts = [conv, L.MaxPool2d(2, ceil_mode=True), conv, L.Flatten(), first, square, L.Tanh(), tied]
    network = M.Model(*parts).build((2, 5, 5), device="numpy", seed=0)
    portacnn.onnx.export(network, tmp_path / "m.onnx")
    written = onnx.load(tmp_path / "m.onnx")
    names = ["0.weight", "0.bias", "4.weight", "4.bias", "5.weight", "5.bias"]
    assert [tensor.name for tensor in written.graph.initializer] == names
    again = portacnn.onnx.load(tmp_path / "m.onnx")
    assert list(again.state_dict()) == names
    x = numbers(3, 2, 5, 5)
    np.testing.assert_allclose(again.predict(x), network.predict(x), rtol=1e-5, atol=1e-6)


def test_shapes_of_another_library_do_not_matter(tmp_path: Path):
    """Files written for a batch of one take any; names that are taken are numbered."""
    nodes = [
        node("Conv", ["x", "w"], ["a"], "same"),
        node("Relu", ["a"], ["b"], "same"),
        node("Relu", ["b"], ["b1"], "input"),
        node("Reshape", ["b1", "to"], ["y"]),
    ]
    model = load(
        model_of(nodes, {"w": numbers(3, 2, 1, 1), "to": np.array([1, -1])}, (1, 2, 5, 5)), tmp_path
    )
    assert list(model.children["graph"].children) == ["same", "same_1", "input_1", "reshape"]
    assert model.predict(numbers(4, 2, 5, 5)).shape == (4, 75)


# --- arguments and papers -------------------------------------------------------------------------


def test_arguments_set_dtype_and_input_shape(tmp_path: Path):
    model = classifier()
    assert load(model, tmp_path).dtype == "float32"
    assert load(model, tmp_path, dtype="float64").dtype == "float64"
    wide = model_of([node("Relu", ["x"], ["y"])], dtype=TensorProto.DOUBLE)
    assert load(wide, tmp_path).dtype == "float64"
    for wrong in (
        {"dtype": "float16"},
        {"max_extra_bytes": -1},
        {"input_shape": (0,)},
        {"seed": "a"},
    ):
        with pytest.raises(ArgumentError):
            load(model, tmp_path, **wrong)
    with pytest.raises(BackendError):
        load(model, tmp_path, device="abacus")


def test_the_table_of_operators_is_whole():
    """docs/onnx.md lists what is read, and nothing else."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "onnx.md").read_text(encoding="utf-8")
    table = text.split("### Supported operators", 1)[1].split("\n### ", 1)[0]
    listed = [
        name
        for row in re.findall(
            r"^\| [^|]+ \| ([^|]+) "
            r"\|",
            table,
            re.M,
        )
        for name in re.findall(r"`([\w.]+)`", row)
    ]
    assert sorted(listed) == sorted({*OPERATORS, *FOLDED, *CONTROL})
