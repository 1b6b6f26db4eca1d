"""Models exported and loaded again."""

from pathlib import Path

import numpy as np
import pytest

import portacnn
import portacnn.models as M
import portacnn.onnx
from support.checks import normal
from support.onnx_files import classifier, numbers
from support.onnx_load import load, runtime

OURS = {
    "SimpleConvNet": lambda **given: M.SimpleConvNet(weight_init_std="he", **given),
    "LeNet5": lambda **given: M.LeNet5(variant="modern", **given),
    "DeepConvNet": lambda **given: M.DeepConvNet(**given),
    "ResNet20": lambda **given: M.ResNet20(**given),
    "AlexNet": lambda **given: M.AlexNet(hidden_size=64, num_classes=10, **given),
    "VGG11": lambda **given: M.VGG11(input_size=32, hidden_size=64, num_classes=10, **given),
    "ResNet18": lambda **given: M.ResNet18(input_size=64, num_classes=10, **given),
    "ResNet50": lambda **given: M.ResNet50(input_size=64, num_classes=10, **given),
}


SMALL = {"SimpleConvNet", "LeNet5", "DeepConvNet"}


@pytest.mark.parametrize(
    "name", [n if n in SMALL else pytest.param(n, marks=pytest.mark.slow) for n in OURS]
)
def test_a_round_trip_keeps_paths_values_and_training(name: str, tmp_path: Path):
    """The model that comes back has the same paths, says the same, and trains the same: ten steps
    in float64, to 1e-9.

    Dropout is on: its masks follow from seed and path, and the paths are in the file.
    """
    path = tmp_path / "model.onnx"
    model = OURS[name](device="numpy", seed=0)
    portacnn.onnx.export(model, path)
    again = portacnn.onnx.load(path)
    x = normal(16, *model.input_shape)
    expected = model.predict(x.astype("float32"))
    got = again.predict(x.astype("float32"))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    model = OURS[name](device="numpy", seed=0, dtype="float64")
    portacnn.onnx.export(model, path)
    again = portacnn.onnx.load(path, seed=0)
    assert set(again.state_dict()) == set(model.state_dict())
    losses = []
    for each in (model, again):
        trainer = portacnn.Trainer(
            each,
            *(x, np.arange(16) % 10, x[:1], np.zeros(1, int)),
            epochs=5,
            mini_batch_size=8,
            optimizer="momentum",
            optimizer_param={"lr": 1e-4},
            evaluate_sample_num_per_epoch=1,
            verbose=False,
        )
        trainer.train()
        losses.append(trainer.train_loss_list)
    assert len(losses[0]) == 10
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-9, atol=1e-9)
    if name in SMALL:
        for key, array in model.state_dict().items():
            np.testing.assert_allclose(
                again.state_dict()[key], array, rtol=1e-9, atol=1e-9, err_msg=key
            )


def test_the_papers_lenet_comes_back_as_it_computes(tmp_path: Path):
    """Its table of connections is a full convolution in the file, so it says the same, but would
    not train the same."""
    model = M.LeNet5(device="numpy", seed=0)
    portacnn.onnx.export(model, tmp_path / "model.onnx")
    x = numbers(5, *model.input_shape)
    np.testing.assert_allclose(
        portacnn.onnx.load(tmp_path / "model.onnx").predict(x),
        model.predict(x),
        rtol=1e-5,
        atol=1e-5,
    )


def test_what_came_in_goes_out_again(tmp_path: Path):
    model = load(classifier(), tmp_path)
    portacnn.onnx.export(model, tmp_path / "out.onnx")
    x = numbers(4, 2, 5, 5)
    np.testing.assert_allclose(
        runtime(tmp_path / "out.onnx", x), model.predict(x), rtol=1e-4, atol=1e-5
    )
    again = portacnn.onnx.load(tmp_path / "out.onnx")
    np.testing.assert_allclose(again.predict(x), model.predict(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halved_files_come_back(dtype: str, tmp_path: Path):
    model = M.SimpleConvNet(weight_init_std="he", device="numpy", seed=0)
    portacnn.onnx.export(model, tmp_path / "model.onnx", dtype=dtype)
    again = portacnn.onnx.load(tmp_path / "model.onnx")
    assert set(again.named_parameters()) == set(model.named_parameters())
    x = numbers(5, *model.input_shape)
    np.testing.assert_allclose(
        again.predict(x), runtime(tmp_path / "model.onnx", x), rtol=1e-4, atol=1e-5
    )
