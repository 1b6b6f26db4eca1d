"""Networks with several inputs and outputs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portacnn
import portacnn.onnx
from portacnn.errors import ArgumentError, LabelError, ShapeError
from portacnn.losses import MSE, CrossEntropy, PerOutput, describe_loss, rebuild_loss
from support.matrix import Here, needs
from support.onnx_files import numbers, several
from support.onnx_load import load

X = {"x": numbers(7, 2, 5, 5, seed=3), "z": numbers(7, 4, seed=4)}
NAMES = ["y", "a", "scores"]


def of_the_runtime(model: Any, x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(NAMES, session.run(NAMES, x), strict=True))


def test_all_outputs_by_name(backend: Here, tmp_path: Path):
    model = load(several(), tmp_path, device=backend.device)
    got, expected = model.predict(X, batch_size=3), of_the_runtime(several(), X)
    assert list(got) == NAMES
    for name in NAMES:
        np.testing.assert_allclose(
            backend.host(got[name]), expected[name], rtol=1e-4, atol=1e-5, err_msg=name
        )
    model.save(tmp_path / "m.safetensors")
    portacnn.onnx.export(model, tmp_path / "again.onnx")
    for again in (
        portacnn.load(tmp_path / "m.safetensors"),
        portacnn.onnx.load(tmp_path / "again.onnx"),
    ):
        for name, part in again.predict(X).items():
            np.testing.assert_allclose(part, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_some_outputs(tmp_path: Path):
    expected = of_the_runtime(several(), X)
    model = load(several(), tmp_path, outputs="y")
    np.testing.assert_allclose(model.predict(X), expected["y"], rtol=1e-4, atol=1e-5)
    model = load(several(), tmp_path, outputs=["a"])  # which needs one input only
    assert model.input_shape == (2, 5, 5)
    assert list(model.named_parameters()) == ["conv.weight"]
    np.testing.assert_allclose(model.predict(X["x"]), expected["a"], rtol=1e-4, atol=1e-5)
    assert list(load(several(), tmp_path, outputs=["scores", "y"]).output_shapes) == ["scores", "y"]
    for wrong in ("x", [], ["y", "y"]):
        with pytest.raises(ArgumentError, match="outputs"):
            load(several(), tmp_path, outputs=wrong)


def test_inputs_that_do_not_fit(tmp_path: Path):
    model = load(several(), tmp_path)
    for wrong, error, words in (
        ({"x": X["x"]}, ArgumentError, "a dictionary of x, z"),
        ({"x": X["x"], "z": X["z"][:, 1:]}, ShapeError, r"z: expected \(N, 4\)"),
        ({"x": X["x"], "z": X["z"][1:]}, ShapeError, r"\[6, 7\] samples"),
        (X["x"], ShapeError, r"expected images \(N, 54\)"),
    ):
        with pytest.raises(error, match=words):
            model.predict(wrong)
    with pytest.raises(ShapeError, match="y, a, scores; load it with outputs="):
        model.accuracy(X, np.zeros(7, int))
    with pytest.raises(ArgumentError, match="no inputs"):
        load(several(), tmp_path, outputs="a").predict({"x": X["x"]})


@needs("torch")
def test_a_loss_for_each_output(backend: Here, tmp_path: Path):
    """One step of a training run with plain SGD, in parts and with weights: PyTorch's gradients."""
    import torch

    model = load(several(), tmp_path, device=backend.device, dtype="float64")
    x = {name: array.astype("float64") for name, array in X.items()}
    t = {"scores": np.arange(7) % 3, "y": numbers(7, 6, seed=5, dtype="float64")}
    weight = np.linspace(0.5, 2, 7)
    before = {k: backend.host(v).copy() for k, v in model.named_parameters().items()}
    loss = PerOutput.of(model, {"y": "mse", "scores": 0.3 * CrossEntropy(label_smoothing=0.1)})
    trainer = portacnn.Trainer(
        model,
        x,
        t,
        loss=loss,
        metrics=(),
        epochs=1,
        mini_batch_size=7,
        accumulate=3,
        optimizer="sgd",
        optimizer_param={"lr": 0.1},
        sample_weight=weight,
        verbose=False,
    )
    trainer.train()

    p = {k: torch.tensor(v, requires_grad=True) for k, v in before.items()}
    F, w = torch.nn.functional, torch.tensor(weight)
    a = F.conv2d(torch.tensor(x["x"]), p["conv.weight"])
    c = a.mean((2, 3))
    d = F.linear(torch.tensor(x["z"]), p["fc.weight"], p["fc.bias"])
    y = torch.cat([c, d.tanh()], 1)
    mse = ((y - torch.tensor(t["y"])) ** 2).mean(1)
    entropy = F.cross_entropy(
        c - d, torch.tensor(t["scores"]), reduction="none", label_smoothing=0.1
    )
    total = ((mse + 0.3 * entropy) * w).sum() / w.sum()
    total.backward()
    assert trainer.train_loss_list[0] == pytest.approx(total.item(), rel=1e-9)
    for name, array in model.named_parameters().items():
        expected = before[name] - 0.1 * p[name].grad.numpy()
        np.testing.assert_allclose(
            backend.host(array), expected, rtol=1e-8, atol=1e-10, err_msg=name
        )


def test_targets_and_losses_that_do_not_fit(tmp_path: Path):
    model = load(several(), tmp_path)
    loss = PerOutput.of(model, {"scores": "cross_entropy", "a": MSE()})
    labels, maps = np.arange(7) % 3, numbers(7, 3, 4, 4)
    made = loss.check_targets({"scores": labels, "a": maps}, model.output_shape, count=7)
    assert made.shape == (7, 49)
    again = loss.check_targets(made, model.output_shape, count=7)  # as a checkpoint does
    np.testing.assert_array_equal(again, made)
    for wrong, words in (
        ({"scores": labels}, "expected targets of a, scores, got scores"),
        ({"scores": labels + 1, "a": maps}, r"\['scores'\]"),
        ({"scores": labels, "a": maps[:, :2]}, r"\['a'\]"),
        (labels, "expected a dictionary"),
        ({"scores": np.eye(3)[labels] * 0.5 + 1 / 6, "a": maps}, "as before"),
    ):
        with pytest.raises(LabelError, match=words):
            loss.check_targets(wrong, model.output_shape, count=7)
    assert rebuild_loss(describe_loss(loss)) == loss
    for wrong in ({"b": "mse"}, {}):
        with pytest.raises(ArgumentError):
            PerOutput.of(model, wrong)
