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


# --- comparisons, choices, reductions -------------------------------------------------------------

C = numbers(5, 6, seed=8)
V = numbers(6, seed=9)
BOOL, FLOAT = TensorProto.BOOL, TensorProto.FLOAT
TRUE = np.array([True, False, True, False, True, True])


def masked(nodes: list[Any], constants: dict[str, Any], by_torch: Callable[[Any], Any]) -> Row:
    """x where the truth value "m" that the nodes compute is true, else -x."""
    chosen = [*nodes, node("Neg", ["x"], ["n"]), node("Where", ["m", "x", "n"], ["y"])]
    given = {name: np.asarray(value) for name, value in constants.items()}
    return chosen, given, lambda x: torch.where(by_torch(x), x, -x)


def compared(op: str, by_torch: str) -> Row:
    return masked(
        [node(op, ["x", "c"], ["m"])], {"c": C}, lambda x: getattr(torch, by_torch)(x, t(C))
    )


def t(array: Any) -> Any:
    return torch.tensor(np.asarray(array, np.float64))


ABOVE = [node("Greater", ["x", "c"], ["a"]), node("Less", ["x", "v"], ["b"])]
LOGIC = {"c": C, "v": V}


def logic(op: str, by_torch: Callable[[Any, Any], Any]) -> Row:
    return masked(
        [*ABOVE, node(op, ["a", "b"], ["m"])], LOGIC, lambda x: by_torch(x > t(C), x < t(V))
    )


def reduced(op: str, by_torch: Callable[[Any], Any], **more: Any) -> Row:
    return of(op, "x,axes", by_torch, axes=[1, -1], **more)


CHOSEN = {
    **{
        op: compared(op, by_torch)
        for op, by_torch in {
            "Equal": "eq",
            "Greater": "gt",
            "GreaterOrEqual": "ge",
            "Less": "lt",
            "LessOrEqual": "le",
        }.items()
    },
    "And": logic("And", torch.logical_and),
    "Or": logic("Or", torch.logical_or),
    "Xor": logic("Xor", torch.logical_xor),
    "Not": masked([*ABOVE[:1], node("Not", ["a"], ["m"])], {"c": C}, lambda x: ~(x > t(C))),
    "And with a constant": masked(
        [*ABOVE[:1], node("And", ["a", "k"], ["m"])],
        {"c": C, "k": TRUE},
        lambda x: (x > t(C)) & torch.tensor(TRUE),
    ),
    "Cast to bool and back": (
        [
            node("Relu", ["x"], ["r"]),
            node("Cast", ["r"], ["m"], to=BOOL),
            node("Cast", ["m"], ["f"], to=FLOAT),
            node("Mul", ["f", "x"], ["y"]),
        ],
        {},
        lambda x: x * (torch.relu(x) != 0).double(),
    ),
    "Where with constants": of(
        "Where", "k,x,c", lambda x: torch.where(torch.tensor(TRUE), x, t(C)), k=TRUE, c=C
    ),
    "Where of a constant": (
        [node("Greater", ["x", "c"], ["a"]), node("Where", ["a", "zero", "x"], ["y"])],
        {"c": C, "zero": np.float32(0)},
        lambda x: torch.where(x > t(C), 0.0, x),
    ),
    "Mod": of("Mod", "x,c", lambda x: torch.fmod(x, t(C)), c=C, fmod=1),
    "Sign": ([node("Sign", ["x"], ["s"]), node("Mul", ["s", "x"], ["y"])], {}, torch.abs),
    **{
        op: ([node(op, ["x"], ["s"]), node("Mul", ["s", "x"], ["y"])], {}, by_torch)
        for op, by_torch in {
            "Floor": lambda x: x * torch.floor(x),
            "Ceil": lambda x: x * torch.ceil(x),
            "Round": lambda x: x * torch.round(x),
        }.items()
    },
    "Atan": of("Atan", "x", torch.atan),
    "Asinh": of("Asinh", "x", torch.asinh),
    "Sinh": of("Sinh", "x", torch.sinh),
    "ReduceMax": reduced("ReduceMax", lambda x: x.amax((1, 3), keepdim=True)),
    "ReduceMin": reduced("ReduceMin", lambda x: x.amin((1, 3)), keepdims=0),
    "ReduceL1": reduced("ReduceL1", lambda x: x.abs().sum((1, 3)), keepdims=0),
    "ReduceL2": reduced(
        "ReduceL2", lambda x: torch.linalg.vector_norm(x, dim=(1, 3), keepdim=True)
    ),
    "ReduceProd": reduced("ReduceProd", lambda x: x.prod(3).prod(1), keepdims=0),
    "ReduceSumSquare": reduced("ReduceSumSquare", lambda x: (x * x).sum((1, 3)), keepdims=0),
    "ReduceLogSumExp": reduced("ReduceLogSumExp", lambda x: x.logsumexp((1, 3)), keepdims=0),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_choices_and_reductions(name: str, tmp_path: Path):
    agree(CHOSEN[name], tmp_path)


# --- shapes ---------------------------------------------------------------------------------------

TOKEN, PLACES = numbers(1, 4, 5, 2, seed=10), np.array([[[0, 2], [3, 4], [-1, 0]]])
SHAPES = {
    "Expand": (
        [
            node("ReduceMean", ["x", "axes"], ["m"]),
            node("Expand", ["m", "sizes"], ["e"]),
            node("Mul", ["e", "x"], ["y"]),
        ],
        {"axes": np.array([3]), "sizes": np.array([1, 4, 1, 6])},
        lambda x: x.mean(3, keepdim=True) * x,
    ),
    "Concat with a constant": (
        [
            node("Shape", ["x"], ["n"], end=1),
            node("Concat", ["n", "sizes"], ["to"], axis=0),
            node("Expand", ["k", "to"], ["ks"]),
            node("Relu", ["x"], ["r"]),
            node("Concat", ["r", "ks", "x"], ["y"], axis=3),
        ],
        {"k": TOKEN, "sizes": np.array([4, 5, 2])},
        lambda x: torch.cat([torch.relu(x), t(TOKEN).expand(3, -1, -1, -1), x], 3),
    ),
    "Slice backwards": of(
        *("Slice", "x,starts,ends,axes,steps", lambda x: x[:, :, 1:4:2].flip(3)[..., ::2]),
        **{"starts": [1, -1], "ends": [4, -100], "axes": [2, 3], "steps": [2, -2]},
    ),
    "Pad by less": of(
        "Pad", "x,pads", lambda x: F.pad(x, (-1, 2, 1, -2)), pads=[0, 0, 1, -1, 0, 0, -2, 2]
    ),
    "Pad by less, reflected": of(
        *("Pad", "x,pads", lambda x: F.pad(x[..., 1:], (0, 2, 0, 0), "reflect")),
        pads=[0, 0, 0, -1, 0, 0, 0, 2],
        mode="reflect",
    ),
    "Pad with -inf": (
        [
            node("Pad", ["x", "pads", "v"], ["p"]),
            node("MaxPool", ["p"], ["y"], kernel_shape=[3, 3], strides=[2, 2]),
        ],
        {"pads": np.array([0, 0, 1, 1] * 2), "v": np.float32(-np.inf)},
        lambda x: F.max_pool2d(x, 3, 2, 1),
    ),
    "GatherND": of(
        "GatherND", "x,k", lambda x: x[:, [0, 3, 3], [2, 4, 0]], k=PLACES.repeat(3, 0), batch_dims=1
    ),
    "Tile": of("Tile", "x,k", lambda x: x.repeat(1, 2, 1, 3), k=[1, 2, 1, 3]),
    "DepthToSpace": of(
        "DepthToSpace", "x", lambda x: F.pixel_shuffle(x, 2), blocksize=2, mode="CRD"
    ),
    "DepthToSpace DCR": of(
        *("DepthToSpace", "x", lambda x: F.pixel_shuffle(x, 2)),
        blocksize=2,  # one channel
    ),
    "SpaceToDepth": (
        [node("Pad", ["x", "pads"], ["p"]), node("SpaceToDepth", ["p"], ["y"], blocksize=2)],
        {"pads": np.array([0, -3, 0, 0, 0, 0, 1, 0])},
        lambda x: F.pixel_unshuffle(F.pad(x[:, 3:], (0, 0, 0, 1)), 2),
    ),
}
MATRICES = numbers(4, 6, 2, seed=1)
SCALE = numbers(5, 1, seed=11)
PRODUCTS = {
    "LayerNormalization with one scale": of(
        *("LayerNormalization", "x,s,b", lambda x: F.layer_norm(x, (6,)) * 1.5 + t(V)),
        s=np.array([1.5], np.float32),
        b=V,
    ),
    "LayerNormalization with a scale along another axis": of(
        *("LayerNormalization", "x,s", lambda x: F.layer_norm(x, (6,)) * t(SCALE)), s=SCALE
    ),
    "MatMul with a vector": of("MatMul", "x,v", lambda x: x @ t(V), v=V),
    "MatMul of a vector": of("MatMul", "v,x", lambda x: t(V[:5]) @ x, v=V[:5]),
    "MatMul of a matrix": of("MatMul", "c,x", lambda x: t(C.T) @ x, c=C.T.copy()),
    "MatMul with matrices": of("MatMul", "x,k", lambda x: x @ t(MATRICES), k=MATRICES),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, tmp_path: Path):
    agree(SHAPES[name], tmp_path)


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str, tmp_path: Path):
    agree(PRODUCTS[name], tmp_path)


def test_a_vector_with_a_vector(tmp_path: Path):
    agree(of("MatMul", "x,v", lambda x: x @ t(V), v=V), tmp_path, (3, 6))


def test_constants_that_are_weights_learn(tmp_path: Path):
    """A class token that is concatenated, and matrices; constants to choose from do not."""
    nodes, constants, _ = SHAPES["Concat with a constant"]
    assert len(load(model_of(nodes, constants, ("N", 4, 5, 6)), tmp_path).named_parameters()) == 1
    nodes, constants, _ = PRODUCTS["MatMul of a matrix"]
    assert len(load(model_of(nodes, constants, ("N", 4, 5, 6)), tmp_path).named_parameters()) == 1
    nodes, constants, _ = CHOSEN["Where with constants"]
    assert not load(model_of(nodes, constants, ("N", 4, 5, 6)), tmp_path).named_parameters()


def test_instance_norm_of_single_elements(tmp_path: Path):
    """It is the bias, for any x."""
    s, b = np.abs(numbers(4)), numbers(4, seed=1)
    nodes = [node("InstanceNormalization", ["x", "s", "b"], ["n"]), node("Add", ["n", "x"], ["y"])]
    row = nodes, {"s": s, "b": b}, lambda x: x + t(b)[:, None, None]
    agree(row, tmp_path, (3, 4, 1, 1))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (of("Slice", "x,s,e,a,p", None, s=[1], e=[3], a=[2], p=[-1]), "empty"),
        (of("Pad", "x,k", None, k=[0, 0, -3, 0, 0, 0, -2, 0]), "leave nothing"),
        (of("Pad", "x,k", None, k=[-1, 0, 0, 0, 0, 0, 0, 0]), "batch"),
        (of("Tile", "x,k", None, k=[2, 1, 1, 1]), "batch"),
        (of("Tile", "x,k", None, k=[1, 1, 1, 1 << 16]), "repeated"),
        (of("Expand", "x,k", None, k=[2, 4, 5, 6]), "batch"),
        (of("Expand", "x,k", None, k=[1, 4, 5, 7]), "expanded"),
        (of("GatherND", "x,k", None, k=[[0, 1]]), "batch"),
        (of("GatherND", "x,k", None, k=[[[0, 9]]] * 3, batch_dims=1), "beyond"),
        (of("MatMul", "c,x", None, c=C), r"\*S, P, Q"),
        (of("Mod", "x,c", None, c=C), "fmod=1"),
        (of("Where", "x,x", None), "3 inputs"),
        (of("ReduceMax", "x", None), "batch"),
    ],
    ids=lambda value: value[0][0].op_type if isinstance(value, tuple) else "",
)
def test_what_is_refused(row: Row, words: str, tmp_path: Path):
    nodes, constants, _ = row
    with pytest.raises(ModelFormatError, match=words):
        load(model_of(nodes, constants, (3, 4, 5, 6), opset=18), tmp_path)
