"""Quantized files: written for onnxruntime, read back, and read as others write them."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

import portacnn
import portacnn.onnx
from portacnn import layers as L
from portacnn.errors import ArgumentError, ModelFormatError
from portacnn.models import Model
from support.matrix import Here, needs
from support.onnx_files import model_of, numbers
from support.onnx_load import load, runtime

node = helper.make_node
X = 3 * numbers(4, 3, 5, 6, seed=3)


# --- reading --------------------------------------------------------------------------------------

KINDS = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767), "uint16": (0, 65535)}


@pytest.mark.parametrize("axis", [None, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_simulated(backend: Here, kind: str, axis: int | None, tmp_path: Path):
    """As onnxruntime computes, also beyond the range and at halves; the gradient is PyTorch's."""
    if backend.name not in ("numpy", "strict-device1", "torch"):
        return
    count = 1 if axis is None else X.shape[axis]
    spread = 65535 if kind.endswith("16") else 255
    scale = ((2 + np.arange(count)) / spread).astype(np.float32)
    low, high = KINDS[kind]
    zero = np.array([(low + high) // 2 + 3 * i for i in range(count)], kind)
    if axis is None:
        scale, zero = scale.reshape(()), zero.reshape(())
    constants = {"s": scale, "z": zero}
    how = {} if axis is None else {"axis": axis}
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"], **how),
        node("DequantizeLinear", ["q", "s", "z"], ["y"], **how),
    ]
    model = model_of(nodes, constants, ("N", 3, 5, 6), opset=21)
    x = X.copy()
    x[0, 0, 0, :4] = scale.reshape(-1)[0] * np.array([0.5, 1.5, 2.5, -0.5])
    ours = load(model, tmp_path, device=backend.device)
    if backend.name == "numpy":
        pytest.importorskip("onnxruntime")
        np.testing.assert_allclose(ours.predict(x), runtime(model, x), rtol=1e-6, atol=1e-7)
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle")
    leaf = torch.tensor(x, requires_grad=True)
    s, z = torch.tensor(scale), torch.tensor(zero.astype(np.int32))
    if axis is None:
        expected = torch.fake_quantize_per_tensor_affine(leaf, s, z, low, high)
    else:
        expected = torch.fake_quantize_per_channel_affine(leaf, s, z, axis, low, high)
    y, cache = ours.forward(backend.array(x), keep=True)
    np.testing.assert_allclose(backend.host(y), expected.detach(), rtol=1e-5, atol=1e-6)
    dy = numbers(*x.shape, seed=4)
    expected.backward(torch.tensor(dy))
    dx = backend.host(ours.backward(backend.array(dy), cache))
    np.testing.assert_allclose(dx, leaf.grad, rtol=1e-5, atol=1e-6)
    assert 0 < np.count_nonzero(dx) < dx.size


W8 = np.random.default_rng(0).integers(-127, 128, (2, 3, 3, 3)).astype(np.int8)
CONV = node("Conv", ["x", "w", "b"], ["y"])


@pytest.mark.parametrize("form", ["channels", "one scale", "without zero point", "quantized there"])
def test_weights_are_read_as_floats(form: str, tmp_path: Path):
    """They learn: int8, and an int32 bias, are parameters like others."""
    pytest.importorskip("onnxruntime")
    scale = np.array([0.01, 0.02], np.float32)
    constants: dict[str, Any] = {"q": W8, "s": scale, "z": np.array([0, 3], np.int8)}
    how: dict[str, Any] = {"axis": 0}
    if form != "channels":
        constants |= {"s": np.float32(0.01), "z": np.int8(3)}
        how = {}
    if form == "without zero point":
        del constants["z"]
    constants |= {"b32": np.array([7, -9], np.int32), "bs": scale}
    quantized = ["q", *(name for name in ("s", "z") if name in constants)]
    nodes = [
        node("DequantizeLinear", quantized, ["w"], **how),
        node("DequantizeLinear", ["b32", "bs"], ["b"], axis=0),
        CONV,
    ]
    if form == "quantized there":
        constants["f"] = W8 * np.float32(0.0113)
        nodes.insert(0, node("QuantizeLinear", ["f", "s", "z"], ["q"]))
        del constants["q"]
    model = model_of(nodes, constants, ("N", 3, 5, 6), opset=13)
    ours = load(model, tmp_path)
    np.testing.assert_allclose(ours.predict(X), runtime(model, X), rtol=1e-4, atol=1e-4)
    assert sorted(a.shape for a in ours.named_parameters().values()) == [(2,), (2, 3, 3, 3)]


def test_blocks_of_a_weight(tmp_path: Path):
    """From opset 21, each block of an axis may have its own scale."""
    q = np.arange(-12, 12, dtype=np.int8).reshape(6, 4)
    s = np.arange(1, 9, dtype=np.float32).reshape(2, 4) / 8
    nodes = [
        node("DequantizeLinear", ["q", "s"], ["w"], axis=0, block_size=3),
        node("MatMul", ["x", "w"], ["y"]),
    ]
    model = model_of(nodes, {"q": q, "s": s}, ("N", 3, 5, 6), opset=21)
    np.testing.assert_allclose(
        load(model, tmp_path).predict(X), X @ (q * s.repeat(3, 0)), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("constants", "how", "words"),
    [
        ({"s": np.float32(0)}, {}, "above 0"),
        ({"s": np.float32(1), "z": np.zeros(2, np.int8)}, {}, "zero point"),
        ({"s": np.ones(5, np.float32)}, {"axis": 0}, "2 of them"),
        ({"s": np.ones(2, np.float32)}, {"axis": 9}, "axis 9"),
        ({"s": np.ones((1, 3), np.float32)}, {"axis": 0, "block_size": -1}, "its scale must be"),
        ({"s": np.float32(1), "q": W8.astype(np.float32)}, {}, "integers"),
    ],
)
def test_quantized_weights_that_are_refused(constants: Any, how: Any, words: str, tmp_path: Path):
    constants = {"q": W8, "b": np.zeros(2, np.float32), **constants}
    names = ["q", *(name for name in ("s", "z") if name in constants)]
    nodes = [node("DequantizeLinear", names, ["w"], **how), CONV]
    with pytest.raises(ModelFormatError, match=words):
        load(model_of(nodes, constants, ("N", 3, 5, 6), opset=21), tmp_path)


def test_a_large_file_of_bytes_needs_no_other_limit(tmp_path: Path):
    """Its floats take four times its size; one that is dequantized again and again is charged."""
    q = np.zeros((2048, 2048), np.int8)
    constants = {"q": q, "s": np.float32(1)}
    nodes = [node("DequantizeLinear", ["q", "s"], ["w"]), node("MatMul", ["x", "w"], ["y"])]
    load(model_of(nodes, constants, ("N", 2048)), tmp_path, max_extra_bytes=1 << 16)
    again = [
        *(node("DequantizeLinear", ["q", "s"], [f"w{i}"]) for i in range(3)),
        *(node("MatMul", [f"x{i}" if i else "x", f"w{i}"], [f"x{i + 1}"]) for i in range(3)),
        node("Identity", ["x3"], ["y"]),
    ]
    with pytest.raises(ModelFormatError, match="max_extra_bytes"):
        load(model_of(again, constants, ("N", 2048)), tmp_path, max_extra_bytes=1 << 16)


# --- writing --------------------------------------------------------------------------------------


def network() -> Model:
    model = Model(
        conv1=L.Conv2d(3, 16, 3, padding=1),
        bn=L.BatchNorm2d(16),
        act=L.ReLU(),
        pool=L.MaxPool2d(2),
        up=L.ConvTranspose2d(16, 8, 2, 2),
        conv2=L.Conv2d(8, 32, 3, groups=2, padding=1, padding_mode="reflect"),
        relu=L.ReLU(),
        flat=L.Flatten(),
        fc=L.Linear(None, 10),
    )
    model.build((3, 8, 8), device="numpy", seed=0)
    return model


IMAGES = numbers(50, 3, 8, 8, seed=6)


@needs("onnxruntime")
@pytest.mark.parametrize("opset", [13, 21])
def test_a_quantized_export(opset: int, tmp_path: Path):
    """onnxruntime runs it, and what is read back computes what it does, from the same paths."""
    model, path = network(), tmp_path / "model.onnx"
    portacnn.onnx.export(model, tmp_path / "float.onnx", opset=opset)
    portacnn.onnx.export(model, path, opset=opset, quantize="int8", calibration=IMAGES)
    onnx.checker.check_model(str(path), full_check=True)
    assert path.stat().st_size < 0.4 * (tmp_path / "float.onnx").stat().st_size
    types = {t.name: t.data_type for t in onnx.load(path).graph.initializer}
    assert {types[f"{name}.weight"] for name in ("conv1", "up", "conv2", "fc")} == {3}
    assert {types[f"{name}.bias"] for name in ("conv1", "up", "fc")} == {6}
    expected, got = model.predict(IMAGES), runtime(path, IMAGES)
    assert np.abs(got - expected).max() < 0.1 * np.abs(expected).max()
    assert np.abs(got - expected).max() > 0
    again = portacnn.onnx.load(path)
    # a value beside an edge may be rounded to the other side
    step = np.abs(expected).max() / 127
    np.testing.assert_allclose(again.predict(IMAGES), got, atol=4 * step)
    assert np.abs(again.predict(IMAGES) - got).mean() < 0.4 * step
    assert set(again.named_parameters()) == set(model.named_parameters())
    portacnn.onnx.export(again, tmp_path / "again.onnx", opset=opset)
    np.testing.assert_allclose(
        runtime(tmp_path / "again.onnx", IMAGES), again.predict(IMAGES), atol=4 * step
    )


@needs("onnxruntime")
def test_layers_in_several_places_and_uint8_images(tmp_path: Path):
    conv = L.Conv2d(3, 3, 3, padding=1)
    model = Model(a=conv, b=L.Tanh(), c=L.Residual(L.Sequential(conv, L.ReLU())), d=L.Flatten())
    model.build((3, 8, 8), device="numpy", seed=0)
    model.preprocess = portacnn.Normalize(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 8, 8), np.uint8)
    path = tmp_path / "model.onnx"
    portacnn.onnx.export(model, path, preprocess=True, quantize="int8", calibration=images)
    expected = model.predict(images)
    assert np.abs(runtime(path, images) - expected).max() < 0.05 * np.abs(expected).max()
    assert {t.name: t.data_type for t in onnx.load(path).graph.initializer}["a.bias"] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantize": "int4", "calibration": IMAGES}, '"int8"'),
        ({"quantize": "int8"}, "calibration=images"),
        ({"calibration": IMAGES}, 'quantize="int8"'),
        ({"quantize": "int8", "calibration": IMAGES, "dtype": "float16"}, "float32"),
        ({"quantize": "int8", "calibration": IMAGES[:0]}, "at least one"),
    ],
)
def test_wrong_arguments(options: Any, words: str, tmp_path: Path):
    with pytest.raises(ArgumentError, match=words):
        portacnn.onnx.export(network(), tmp_path / "model.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_no_hook_is_left(tmp_path: Path):
    model = network()
    portacnn.onnx.export(model, tmp_path / "model.onnx", quantize="int8", calibration=IMAGES[:2])
    assert not any(layer.hooks for layer in model.walk())


@pytest.mark.slow
@needs("onnxruntime", "mnist")
def test_mnist_keeps_its_accuracy(tmp_path: Path):
    """Within half a point on all of the test set, in a quarter of the bytes; read back, too."""
    from portacnn.data import load_mnist
    from support.matrix import MNIST

    (x, t), (x_test, t_test) = load_mnist(root=MNIST)
    model = portacnn.SimpleConvNet(weight_init_std="he", device="numpy", seed=0)
    portacnn.Trainer(
        *(model, x[:12000], t[:12000], x_test[:100], t_test[:100]),
        epochs=1,
        optimizer="adam",
        verbose=False,
    ).train()
    path = tmp_path / "int8.onnx"
    portacnn.onnx.export(model, tmp_path / "float.onnx")
    portacnn.onnx.export(model, path, quantize="int8", calibration=x[:300])
    assert path.stat().st_size < 0.26 * (tmp_path / "float.onnx").stat().st_size
    accuracy = [
        float((y.argmax(axis=1) == t_test).mean())
        for y in (
            model.predict(x_test),
            runtime(path, x_test),
            portacnn.onnx.load(path).predict(x_test),
        )
    ]
    print("float, int8, read back:", accuracy)
    assert accuracy[0] > 0.9
    assert max(accuracy) - min(accuracy) < 0.005
