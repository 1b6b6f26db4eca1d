"""Operators read from files: values against onnxruntime, values and gradients against PyTorch in
float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from portacnn.errors import ModelFormatError
from support.matrix import needs
from support.onnx_files import model_of, numbers
from support.onnx_load import load, runtime

pytestmark = needs("onnxruntime", "torch")
torch = pytest.importorskip("torch", reason="PyTorch is the oracle")
F = torch.nn.functional
node = helper.make_node
Row = tuple[list[Any], dict[str, np.ndarray], Callable[[Any], Any]]


def of(op: str, inputs: str, by_torch: Callable[[Any], Any], **more: Any) -> Row:
    """A row for one operator. ``inputs`` are its inputs' names; those of ``more`` that are among
    them are constants, the others are attributes."""
    names = inputs.split(",")
    constants = {name: np.asarray(more.pop(name)) for name in names if name in more}
    return [node(op, names, ["y"], **more)], constants, by_torch


def wide(array: Any) -> np.ndarray:
    """In float64. Scales are of float32 in any file."""
    return array.astype(np.float64) if array.dtype == np.float32 else array


def agree(row: Row, folder: Path, shape: Any = (3, 4, 5, 6), opset: int = 18) -> None:
    """Values as onnxruntime's in float32; values and the gradient of x as PyTorch's in float64."""
    nodes, constants, by_torch = row
    x = numbers(*shape, seed=3)
    sample = ("N", *shape[1:])
    model = model_of(nodes, constants, sample, opset=opset)
    np.testing.assert_allclose(
        load(model, folder).predict(x), runtime(model, x), rtol=1e-4, atol=1e-5
    )
    constants = {n: a if n == "scales" else wide(a) for n, a in constants.items()}
    ours = load(model_of(nodes, constants, sample, opset=opset, dtype=TensorProto.DOUBLE), folder)
    x = wide(x)
    leaf = torch.tensor(x, requires_grad=True)
    expected = by_torch(leaf)
    y, cache = ours.forward(x, keep=True)
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-9, atol=1e-9)
    dy = wide(numbers(*y.shape, seed=5))
    if expected.requires_grad:
        expected.backward(torch.tensor(dy))
        assert leaf.grad is not None
        gradient = leaf.grad.numpy()
    else:
        gradient = np.zeros(shape)
    np.testing.assert_allclose(ours.backward(dy, cache), gradient, rtol=1e-9, atol=1e-9)


# --- interpolation --------------------------------------------------------------------------------


def resized(mode: str, place: str, by_torch: Any, rounding: str | None = None, **given: Any) -> Row:
    """Resize of the last two axes to ``sizes``, or by ``scales``, beside F.interpolate."""
    how = {"coordinate_transformation_mode": place, "nearest_mode": rounding}
    return of(
        "Resize",
        "x,,,sizes" if "sizes" in given else "x,,scales",
        lambda x: F.interpolate(x, **by_torch),
        mode=mode,
        axes=[2, 3],
        **{name: value for name, value in how.items() if value is not None},
        **{name: np.array(v, np.float32 if name == "scales" else int) for name, v in given.items()},
    )


BILINEAR = {"mode": "bilinear"}
RESIZED = {
    "nearest": resized("nearest", "asymmetric", {"scale_factor": (2, 3)}, "floor", scales=(2, 3)),
    "nearest to sizes": resized("nearest", "asymmetric", {"size": (7, 4)}, "floor", sizes=(7, 4)),
    "nearest-exact": resized(
        *("nearest", "half_pixel", {"size": (8, 4), "mode": "nearest-exact"}, "round_prefer_ceil"),
        sizes=(8, 4),
    ),
    "linear": resized("linear", "half_pixel", {"size": (7, 4), **BILINEAR}, sizes=(7, 4)),
    "linear by scales": resized(
        "linear", "half_pixel", {"scale_factor": (2, 0.5), **BILINEAR}, scales=(2, 0.5)
    ),
    "pytorch_half_pixel": resized(
        "linear", "pytorch_half_pixel", {"size": (7, 4), **BILINEAR}, sizes=(7, 4)
    ),
    "align_corners": resized(
        *("linear", "align_corners", {"size": (7, 1), "align_corners": True, **BILINEAR}),
        sizes=(7, 1),
    ),
}


@pytest.mark.parametrize("name", RESIZED)
def test_interpolation_as_pytorch_has_it(name: str, tmp_path: Path):
    agree(RESIZED[name], tmp_path)


@pytest.mark.parametrize("rounding", [None, "floor", "ceil", "round_prefer_floor"])
@pytest.mark.parametrize(
    "place", ["asymmetric", "half_pixel", "align_corners", "pytorch_half_pixel"]
)
def test_interpolation_as_onnxruntime_has_it(place: str, rounding: str | None, tmp_path: Path):
    """None is linear interpolation. Sizes and scales, up and down, to a single cell."""
    how = {"coordinate_transformation_mode": place, "nearest_mode": rounding or "floor"}
    how["mode"] = "nearest" if rounding else "linear"
    x = numbers(2, 2, 5, 7)
    for sizes, scales in [((3, 20), None), ((1, 9), None), (None, (2, 3)), (None, (0.6, 1.5))]:
        if place == "align_corners" and scales == (0.6, 1.5):
            continue  # 7 * 1.5 cells: the ONNX package and onnxruntime differ
        if (rounding, place, sizes) == ("floor", "half_pixel", (1, 9)):
            continue  # 2 is rounded down to 1 in float32
        constants = {"c": np.array([2, 2, *sizes] if sizes else [1, 1, *scales])}
        if scales:
            constants["c"] = constants["c"].astype(np.float32)
        model = model_of(
            [node("Resize", ["x", "", "", "c"] if sizes else ["x", "", "c"], ["y"], **how)],
            constants,
            x.shape,
        )
        np.testing.assert_allclose(
            load(model, tmp_path).predict(x), runtime(model, x), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("shape", "scales", "mode"),
    [
        ((2, 5, 7, 3), (1, 2, 2, 1), "linear"),  # channels last
        ((2, 4, 3, 3), (1, 2, 1, 1), "nearest"),  # channels
        ((2, 7), (1, 2), "nearest"),
        ((2, 5, 7), (1, 2, 3), "linear"),
    ],
)
@pytest.mark.parametrize("opset", [10, 13])
def test_axes_that_are_not_spatial(shape: Any, scales: Any, mode: str, opset: int, tmp_path: Path):
    constants = {"s": np.array(scales, np.float32)}
    inputs = ["x", "", "s"] if opset > 10 else ["x", "s"]
    model = model_of([node("Resize", inputs, ["y"], mode=mode)], constants, shape, opset=opset)
    x = numbers(*shape)
    np.testing.assert_allclose(
        load(model, tmp_path).predict(x), runtime(model, x), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("scale", [2.0, 0.5])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_interpolation_before_opset_11(mode: str, scale: float, tmp_path: Path):
    """The attribute of Upsample, its input, and Resize, which rounds up what it shrinks."""
    scales, x = [1.0, 1.0, scale, scale], numbers(2, 2, 5, 7)
    constants = {"s": np.array(scales, np.float32)}
    rows = [(10, node("Resize", ["x", "s"], ["y"], mode=mode), constants)]
    if scale > 1:
        rows += [
            (7, node("Upsample", ["x"], ["y"], mode=mode, scales=scales), {}),
            (9, node("Upsample", ["x", "s"], ["y"], mode=mode), constants),
        ]
    for opset, one, given in rows:
        model = model_of([one], given, opset=opset, shape=x.shape)
        np.testing.assert_allclose(
            load(model, tmp_path).predict(x), runtime(model, x), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize(
    ("attributes", "scales", "words"),
    [
        ({"mode": "cubic"}, (1, 1, 2, 2), "mode must be nearest or linear"),
        ({"antialias": 1, "mode": "linear"}, (1, 1, 2, 2), "antialias"),
        ({}, (2, 1, 2, 2), "resize the batch"),
        ({}, (1, 1, 2), "expected 4 scales or sizes"),
        ({"coordinate_transformation_mode": "tf_crop_and_resize"}, (1, 1, 2, 2), "expected one of"),
        ({}, (1, 1, 2, -1), "above 0"),
        ({}, (1, 2, 2, 2), None),
    ],
)
def test_interpolation_that_is_refused(attributes: Any, scales: Any, words: Any, tmp_path: Path):
    constants = {"s": np.array(scales, np.float32)}
    model = model_of([node("Resize", ["x", "", "s"], ["y"], **attributes)], constants, opset=18)
    if words is None:  # three axes
        load(model, tmp_path)
        return
    with pytest.raises(ModelFormatError, match=words):
        load(model, tmp_path)
