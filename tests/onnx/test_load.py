"""ONNX files as models: the onnx package's own cases, the models it ships, onnxruntime, and our own
files again."""

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portacnn
import portacnn.models as M
import portacnn.onnx
from portacnn import layers as L
from portacnn.errors import ArgumentError, BackendError, ModelFormatError
from portacnn.models import GraphModel
from portacnn.onnx.importer import OPERATORS
from support.checks import normal
from support.matrix import Here, needs

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from support.onnx_files import MODELS, classifier, model_of, numbers  # noqa: E402

node = helper.make_node
DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"


def load(model: Any, folder: Path, **options: Any) -> GraphModel:
    onnx.save(model, folder / "model.onnx")
    return portacnn.onnx.load(folder / "model.onnx", **options)


def runtime(model: Any, x: np.ndarray) -> np.ndarray:
    """What onnxruntime makes of it."""
    ort = pytest.importorskip("onnxruntime")
    ort.set_default_logger_severity(3)
    content = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


# --- the onnx package's own cases -----------------------------------------------------------------


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
    *("Reciprocal", "Selu", "Sigmoid", "Sin", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh"),
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
    "training_mode",
    # interpolation that portacnn does not have
    "mode must be nearest or linear",
    "is not supported; expected 'asymmetric' and 'floor'",
    "linear with 'asymmetric' is not supported",
    "linear with 'tf_crop_and_resize' is not supported",
    "linear with 'half_pixel_symmetric' is not supported",
    "'align_corners' is not supported for scales with a fractional output size",
    "'pytorch_half_pixel' with an output size of 1 is not supported",
    "antialias and keep_aspect_ratio_policy are not supported",
    "would be empty or reversed",
    "has only the batch axis",
    "does not state a sample's shape",
    "a shape contains 0",
    "does not depend on the input",
)
WITHOUT_CASES = {"Constant", "ConstantOfShape", "Cast", "Shape"}


@pytest.mark.slow
@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_the_packages_own_cases(operator: str, cases: dict[str, list[Any]], tmp_path: Path):
    """Each within its own tolerances, or refused for a reason that is one."""
    agreed = 0
    for case in cases.get(operator, []):
        inputs, outputs = case.data_sets[0]
        model, arrays = case.model, [*inputs, outputs[0]]
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
    "test_operator_index": "operates on the batch",
    "test_operator_non_float_params": "data type 7",
    "test_operator_params": "expected a constant that broadcasts to samples",
    "test_operator_repeat": "'Tile'",
    "test_operator_repeat_dim_overflow": "'Tile'",
    "test_operator_symbolic_override_nested": "has only the batch axis",
    "test_operator_view": "has only the batch axis",
}


@pytest.mark.parametrize(
    "folder", SHIPPED, ids=lambda folder: f"{folder.parent.name}/{folder.name}"
)
def test_models_that_the_package_ships(folder: Path, tmp_path: Path):
    """Outputs that PyTorch gave, within onnx's own tolerances."""
    model = onnx.load(folder / "model.onnx")
    data = folder / "test_data_set_0"
    inputs = [array_of(path) for path in sorted(data.glob("input_*.pb"))]
    try:
        agrees(model, inputs, array_of(data / "output_0.pb"), 1e-3, 1e-7, tmp_path)
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
def test_light_models(path: Path, tmp_path: Path):
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


# --- against onnxruntime --------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_small_models(backend: Here, name: str, tmp_path: Path):
    model = MODELS[name]()
    ours = load(model, tmp_path, device=backend.device)
    for count in (1, 7):
        x = normal(count, *ours.input_shape).astype("float32")
        got, expected = backend.host(ours.predict(x)), runtime(model, x)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("end", [(1 << 31) - 1, (1 << 63) - 1])
def test_a_slice_of_all_samples(end: int, tmp_path: Path):
    """What converters write for "to the end": the largest int32, or int64."""
    weights = {"from": np.array([0, 1]), "to": np.array([end, end]), "axes": np.array([0, 1])}
    model = model_of([node("Slice", ["x", "from", "to", "axes"], ["y"])], weights, ("N", 4))
    x = normal(3, 4).astype("float32")
    np.testing.assert_array_equal(load(model, tmp_path).predict(x), x[:, 1:])


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
def test_every_opset(version: int, tmp_path: Path):
    """They all say the same; onnxruntime is asked where it knows the opset."""
    model = with_opset(version)
    x = numbers(3, 2, 5, 5, seed=7)
    got = load(model, tmp_path).predict(x)
    np.testing.assert_allclose(got, load(with_opset(12), tmp_path).predict(x), rtol=1e-6)
    if version <= 22:
        np.testing.assert_allclose(got, runtime(model, x), rtol=1e-5, atol=1e-6)


# --- training -------------------------------------------------------------------------------------


def test_it_trains_on_every_backend(backend: Here, tmp_path: Path):
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


@pytest.mark.parametrize("name", ["classifier", "oddities"])
def test_gradients(backend: Here, name: str, tmp_path: Path):
    """By finite differences on NumPy, and on every backend the same."""
    model = MODELS[name]()
    reference = load(model, tmp_path, dtype="float64", seed=0)
    for layer in reference.walk():
        if hasattr(layer, "p"):
            layer.p = 0.0
    x, t = 0.7 * normal(3, 2, 5, 5, seed=4), np.array([0, 2, 1])
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


# --- our own files --------------------------------------------------------------------------------

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
def test_there_and_back(name: str, tmp_path: Path):
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


# --- arguments and papers -------------------------------------------------------------------------


def test_arguments(tmp_path: Path):
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
        for name in re.findall(r"`(\w+)`", row)
    ]
    assert sorted(listed) == sorted(OPERATORS)
