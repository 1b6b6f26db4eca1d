"""The onnx package's own cases, and the models that it ships."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import portacnn
import portacnn.onnx
from portacnn.errors import ModelFormatError
from portacnn.onnx.importer import OPERATORS
from support.checks import normal
from support.onnx_load import load, runtime

node = helper.make_node


DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"


def with_constants(case_model: Any, inputs: list[Any]) -> Any:
    """The case's model with its first input alone: the others are what they are in a network,
    initializers."""
    model = onnx.ModelProto()
    model.CopyFrom(case_model)
    held = {tensor.name for tensor in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in held]
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(array), name)
        for name, array in list(zip(names, inputs, strict=False))[1:]
    )
    del model.graph.output[1:]  # masks, places of maxima, statistics
    return model


def with_one_input(case_model: Any, inputs: list[Any]) -> tuple[Any, Any]:
    """The case's model with all of its inputs, which have one batch, side by side in one; and that
    one."""
    model = onnx.ModelProto()
    model.CopyFrom(case_model)
    count = inputs[0].shape[0]
    widths = [int(np.prod(array.shape[1:])) for array in inputs]
    nodes = [node("Split", ["all", "widths"], [f"part{i}" for i in range(len(inputs))], axis=1)]
    model.graph.initializer.append(numpy_helper.from_array(np.array(widths), "widths"))
    for i, (value, array) in enumerate(zip(case_model.graph.input, inputs, strict=True)):
        model.graph.initializer.append(
            numpy_helper.from_array(np.array([0, *array.shape[1:]]), f"shape{i}")
        )
        nodes.append(node("Reshape", [f"part{i}", f"shape{i}"], [value.name]))
    nodes.extend(case_model.graph.node)
    del model.graph.node[:], model.graph.input[:], model.graph.output[1:]
    model.graph.node.extend(nodes)
    kind = case_model.graph.input[0].type.tensor_type.elem_type
    whole = helper.make_tensor_value_info("all", kind, [count, sum(widths)])
    model.graph.input.append(whole)
    return model, np.concatenate([array.reshape(count, -1) for array in inputs], axis=1)


def agrees(
    case_model: Any, inputs: list[Any], expected: Any, rtol: float, atol: float, folder: Path
) -> None:
    """Our model of it gives what is expected; the first reason why it is refused is raised."""
    try:
        ours = load(with_constants(case_model, inputs), folder)
        with np.errstate(all="ignore"):
            got = ours.predict(np.asarray(inputs[0]))
    except ModelFormatError:
        alike = len({np.asarray(array).shape[:1] for array in inputs}) == 1
        if (
            len(inputs) < 2
            or not alike
            or any(np.asarray(a).dtype.kind != "f" or a.ndim < 2 for a in inputs)
        ):
            raise
        model, x = with_one_input(case_model, inputs)
        got = load(model, folder).predict(x)
    if np.shape(got) == (1, *np.shape(expected)):  # it removes the batch of its one sample
        expected = np.asarray(expected)[None]
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


OF_ELEMENTS = {
    *(
        "Max",
        "Min",
        "Sum",
        "Abs",
        "Celu",
        "Clip",
        "Cos",
        "Elu",
        "Exp",
        "Gelu",
        "HardSigmoid",
        "LeakyRelu",
        "Log",
        "Mish",
        "Neg",
    ),
    *("Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Cosh", "Floor", "Mod", "Round"),
    *(
        "Sign",
        "Sinh",
        "Tan",
        "Reciprocal",
        "Selu",
        "Sigmoid",
        "Sin",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Swish",
        "Tanh",
    ),
}


def with_an_axis(case_model: Any, arrays: list[Any]) -> tuple[Any, list[Any]]:
    """A case of rows of numbers as one of as many samples of one number."""
    if any(np.ndim(array) != 1 for array in arrays):
        return case_model, arrays
    model = onnx.ModelProto()
    model.CopyFrom(case_model)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim.add(dim_value=1)
    return model, [array[:, None] for array in arrays]


@pytest.fixture(scope="module")
def cases() -> dict[str, list[Any]]:
    """The cases of one supported operator each, on floating point that has a batch, by operator. It
    takes a while to make them."""
    from onnx.backend.test.case.node import collect_testcases

    found: dict[str, list[Any]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in collect_testcases(None):
            nodes = case.model.graph.node if case.model is not None else []
            inputs = case.data_sets[0][0] if len(nodes) == 1 else []
            first = inputs[0] if inputs else None
            if (
                isinstance(first, np.ndarray)
                and not any(isinstance(array, onnx.TensorProto) for array in inputs)
                and first.dtype.kind == "f"
                and first.ndim > (nodes[0].op_type not in OF_ELEMENTS)
            ):
                found.setdefault(nodes[0].op_type, []).append(case)
    return found


# What is said of cases that no network of independent samples can hold.
RIGHTLY_REFUSED = (
    "operates on the batch",
    "several samples",
    "from one sample to another",
    "adds samples to the batch",
    "moves the batch away",
    "also remove the batch",
    "expected a constant that broadcasts to samples",
    "samples (F,) and no transA",
    "expected a bias of 1 or",
    "does not depend on the network's input",
    "is computed from the network's input",
    "expected a matrix as weight",
    "cast only to floating point",
    # interpolation that portacnn does not have
    "mode must be nearest or linear",
    "'tf_crop_and_resize' with 'round_prefer_floor' is not supported",
    "'align_corners' is not supported for scales with a fractional output size",
    "antialias and keep_aspect_ratio_policy are not supported",
    "would be empty, or is given twice",
    "expected at most 2 sizes",
    "must have fmod=1",
    "it must quantize to one of",
    "block_size is supported for constants only",
    "data type",
    "has only the batch axis",
    "does not state a sample's shape",
    "a shape contains 0",
    "has other axes merged with the batch",
    "with the batch at axis",
    "does not depend on the input",
)


WITHOUT_CASES = {
    *("Constant", "ConstantOfShape", "Cast", "CastLike", "Shape", "Size"),
    *("And", "Equal", "Not", "Or", "Where", "Xor"),  # theirs are of truth values and integers
    *("GatherND", "Tile"),  # theirs add or choose samples
    "DequantizeLinear",  # theirs take integers
    *(name for name in OPERATORS if name.startswith("com.microsoft")),
}


@pytest.mark.slow
@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_the_cases_of_the_onnx_package_agree_or_are_refused(
    operator: str, cases: dict[str, list[Any]], tmp_path: Path
):
    """Each within its own tolerances, or refused for a reason that is one."""
    agreed = 0
    for case in cases.get(operator, []):
        inputs, outputs = case.data_sets[0]
        model, arrays = case.model, [*inputs, outputs[0]]
        if "training" in case.name or "train" in case.name:
            continue  # what predicts is inference: see test_spellings
        if operator in OF_ELEMENTS:
            model, arrays = with_an_axis(model, arrays)
        try:
            agrees(model, arrays[:-1], arrays[-1], case.rtol, case.atol, tmp_path)
            agreed += 1
        except ModelFormatError as error:
            refusal = str(error)
            if not any(words in refusal for words in RIGHTLY_REFUSED):
                raise
        except AssertionError as error:
            error.add_note(case.name)
            raise
    print(f"{operator}: {agreed} of {len(cases.get(operator, []))} agree")
    assert agreed or operator in WITHOUT_CASES


def array_of(path: Path) -> Any:
    return numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))


SHIPPED = sorted(
    path.parent
    for kind in ("pytorch-converted", "pytorch-operator")
    for path in (DATA / kind).glob("*/model.onnx")
)


NOT_SHIPPED_FOR_US = {
    "test_Embedding": "data type 7",
    "test_Embedding_sparse": "data type 7",
    "test_PoissonNLLLLoss_no_reduce": "expected a constant that broadcasts to samples",
    "test_operator_addmm": "computed from the network's input",
    "test_operator_basic": "has only the batch axis",
    "test_operator_chunk": "has only the batch axis",
    "test_operator_non_float_params": "data type 7",
    "test_operator_params": "expected a constant that broadcasts to samples",
    "test_operator_symbolic_override_nested": "has only the batch axis",
    "test_operator_view": "has only the batch axis",
}


@pytest.mark.parametrize(
    "folder", SHIPPED, ids=lambda folder: f"{folder.parent.name}/{folder.name}"
)
def test_models_of_the_onnx_package_agree(folder: Path, tmp_path: Path):
    """Outputs that PyTorch gave, within onnx's own tolerances."""
    model = onnx.load(folder / "model.onnx")
    data = folder / "test_data_set_0"
    inputs = [array_of(path) for path in sorted(data.glob("input_*.pb"))]
    expected = array_of(data / "output_0.pb")
    if folder.name == "test_operator_index":  # it removes the batch of its one sample
        expected = expected[None]
    try:
        agrees(model, inputs, expected, 1e-3, 1e-7, tmp_path)
    except ModelFormatError as error:
        if folder.name not in NOT_SHIPPED_FOR_US or NOT_SHIPPED_FOR_US[folder.name] not in str(
            error
        ):
            raise
        pytest.skip(f"refused, as it should be: {str(error).split('model.onnx: ')[1][:100]}")
    assert folder.name not in NOT_SHIPPED_FOR_US


LIGHT = sorted((DATA / "light").glob("*.onnx"))


LARGE = {"light_bvlc_alexnet", "light_vgg19", "light_zfnet512"}


@pytest.mark.slow
@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.stem)
def test_light_models_of_the_onnx_package_agree_with_onnxruntime(path: Path, tmp_path: Path):
    """Their weights are one number each, made by ConstantOfShape; here each gets weights of its
    own, but in the largest."""
    model = onnx.load(path)
    if path.stem not in LARGE:
        shapes = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        rng, kept = np.random.default_rng(0), []
        for one in model.graph.node:
            if one.op_type != "ConstantOfShape":
                kept.append(one)
                continue
            shape = shapes[one.input[0]]
            values = rng.standard_normal(shape)
            values = (
                np.abs(1.0 + 0.1 * values)
                if len(shape) == 1
                else values / np.sqrt(np.prod(shape[1:]))
            )
            model.graph.initializer.append(
                numpy_helper.from_array(values.astype(np.float32), one.output[0])
            )
        del model.graph.node[:]
        model.graph.node.extend(kept)
    onnx.save(model, tmp_path / "model.onnx")
    ours = portacnn.onnx.load(tmp_path / "model.onnx", max_extra_bytes=2 << 30)
    x = normal(1, *ours.input_shape).astype("float32")
    expected = runtime(tmp_path / "model.onnx", x)
    assert path.stem in LARGE or np.ptp(expected) > 1e-4
    np.testing.assert_allclose(
        ours.predict(x), expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max()
    )
    if path.stem in LARGE:
        with pytest.raises(ModelFormatError, match="max_extra_bytes="):
            portacnn.onnx.load(path)
