"""Files that onnxruntime has optimized: the operators of com.microsoft."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

import portacnn.onnx
from portacnn import layers as L
from portacnn.errors import ModelFormatError
from portacnn.models import Model
from support.checks import normal
from support.matrix import needs
from support.onnx_files import model_of, numbers
from support.onnx_load import load, runtime

pytestmark = needs("onnxruntime")
node = helper.make_node


def optimized(model: Any, folder: Path) -> tuple[Path, list[str]]:
    """The file that onnxruntime's optimizer writes, and its operators."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    path = folder / "optimized.onnx"
    return path, [one.op_type for one in onnx.load(path).graph.node]


def conv(activation: Any) -> list[Any]:
    return [node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1]), activation]


GELU = [
    node("Div", ["m", "root"], ["d"]),
    node("Erf", ["d"], ["e"]),
    node("Add", ["e", "one"], ["p"]),
    node("Mul", ["m", "p"], ["q"]),
    node("Mul", ["q", "half"], ["y"]),
]
CONSTANTS = {
    "w": numbers(2, 2, 3, 3),
    "b": numbers(2, seed=1),
    "m4": numbers(5, 4, seed=2),
    "v4": numbers(4, seed=3),
    "root": np.float32(np.sqrt(2)),
    "one": np.float32(1),
    "half": np.float32(0.5),
    "low": np.float32(-0.5),
    "eighth": np.float32(0.125),
    "alpha": np.float32(1.702),
    "k": numbers(50, 3, seed=4),
    "k3": numbers(3, seed=5),
}
FUSED = {
    "Gelu": ([node("Identity", ["x"], ["m"]), *GELU], "Gelu"),
    "BiasGelu": (
        [node("MatMul", ["x", "m4"], ["l"]), node("Add", ["l", "v4"], ["m"]), *GELU],
        "BiasGelu",
    ),
    "QuickGelu": (
        [
            node("Mul", ["x", "alpha"], ["a"]),
            node("Sigmoid", ["a"], ["s"]),
            node("Mul", ["x", "s"], ["y"]),
        ],
        "QuickGelu",
    ),
    "FusedConv Relu": (conv(node("Relu", ["c"], ["y"])), "FusedConv"),
    "FusedConv LeakyRelu": (conv(node("LeakyRelu", ["c"], ["y"], alpha=0.3)), "FusedConv"),
    "FusedConv HardSigmoid": (conv(node("HardSigmoid", ["c"], ["y"])), "FusedConv"),
    "FusedConv Clip": (conv(node("Clip", ["c", "low", "half"], ["y"])), "FusedConv"),
    "FusedConv Tanh": (conv(node("Tanh", ["c"], ["y"])), "FusedConv"),
    "FusedMatMul": (
        [
            node("Transpose", ["x"], ["t"], perm=[0, 1, 3, 2]),
            node("MatMul", ["x", "t"], ["p"]),
            node("Mul", ["p", "eighth"], ["y"]),
        ],
        "FusedMatMul",
    ),
    "FusedGemm": (
        [
            node("Flatten", ["x"], ["f"]),
            node("Gemm", ["f", "k", "k3"], ["g"]),
            node("LeakyRelu", ["g"], ["y"], alpha=0.2),
        ],
        "FusedGemm",
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_what_the_optimizer_writes(name: str, tmp_path: Path):
    """The optimized file computes the same, and has the same gradient as the one it was made of."""
    nodes, kind = FUSED[name]
    used = {name for one in nodes for name in one.input}
    model = model_of(nodes, {k: v for k, v in CONSTANTS.items() if k in used})
    path, operators = optimized(model, tmp_path)
    assert kind in operators
    x = numbers(3, 2, 5, 5, seed=7)
    ours = portacnn.onnx.load(path, dtype="float64")
    np.testing.assert_allclose(ours.predict(x), runtime(path, x), rtol=1e-4, atol=1e-5)
    plain = load(model, tmp_path, dtype="float64")
    wide, gradients = x.astype(np.float64), []
    for each in (ours, plain):
        y, cache = each.forward(wide, keep=True)
        gradients.append(each.backward(normal(*y.shape, seed=8), cache))
    # the optimizer rounds what it computes to float32
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-6)


def contrib(one: Any, constants: dict[str, Any]) -> Any:
    model = model_of([one], constants)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    [
        ("Gelu", ["x"], {}),
        ("FastGelu", ["x"], {}),
        ("FastGelu", ["x", "v"], {}),
        ("BiasGelu", ["x", "v"], {}),
        ("QuickGelu", ["x"], {"alpha": 1.0}),
        ("QuickGelu", ["x"], {"alpha": 0.6}),
        ("FusedConv", ["x", "w", "b", "x"], {"activation": "Relu", "pads": [1, 1, 1, 1]}),
        ("FusedMatMul", ["x", "s"], {"transA": 1, "transB": 1, "alpha": 0.5}),
        ("FusedMatMul", ["s", "x"], {"transA": 1, "alpha": -2.0}),
    ],
)
def test_operators_as_onnxruntime_has_them(
    op: str, inputs: list[str], attributes: dict[str, Any], tmp_path: Path
):
    constants = CONSTANTS | {"v": numbers(5), "s": numbers(5, 5, seed=1)}
    model = contrib(
        node(op, inputs, ["y"], domain="com.microsoft", **attributes),
        {name: constants[name] for name in inputs if name in constants},
    )
    x = numbers(3, 2, 5, 5, seed=7)
    # onnxruntime's FastGelu has five digits
    np.testing.assert_allclose(
        load(model, tmp_path).predict(x), runtime(model, x), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "words"),
    [
        ("FusedConv", ["x", "w"], {"activation": "Softmax"}, "activation must be one of"),
        ("FusedConv", ["x", "w"], {"activation": "Clip"}, "Clip has 0 parameters"),
        ("FusedMatMul", ["x", "x"], {"transBatchA": 1}, "transBatchA"),
        ("BiasGelu", ["x"], {}, "input 1 is missing"),
        ("Attention", ["x"], {}, "com.microsoft.Attention"),
    ],
)
def test_what_is_refused(
    op: str, inputs: list[str], attributes: dict[str, Any], words: str, tmp_path: Path
):
    one = node(op, inputs, ["y"], domain="com.microsoft", **attributes)
    with pytest.raises(ModelFormatError, match=words):
        load(contrib(one, {"w": CONSTANTS["w"]} if "w" in inputs else {}), tmp_path)


def test_an_optimized_model_of_ours_loads(tmp_path: Path):
    import onnx

    model = Model(
        conv1=L.Conv2d(2, 4, 3),
        bn1=L.BatchNorm2d(4),
        act=L.LeakyReLU(0.1),
        flat=L.Flatten(),
        fc1=L.Linear(None, 8),
        gelu=L.GELU(),
        fc2=L.Linear(8, 3),
    )
    model.build((2, 5, 5), device="numpy", seed=0)
    portacnn.onnx.export(model, tmp_path / "model.onnx")
    path, operators = optimized(onnx.load(tmp_path / "model.onnx"), tmp_path)
    assert "FusedConv" in operators
    x = numbers(3, 2, 5, 5, seed=7)
    np.testing.assert_allclose(
        portacnn.onnx.load(path).predict(x), model.predict(x), rtol=1e-4, atol=1e-5
    )
