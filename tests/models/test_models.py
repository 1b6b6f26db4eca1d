"""The published architectures: counts and structure, PyTorch twins both ways, first weights, files,
and that they learn."""

import inspect
from math import sqrt

import numpy as np
import pytest

import portacnn
from portacnn.errors import ArgumentError, ShapeError, StateError
from portacnn.layers import (
    Branches,
    Conv2d,
    ConvTranspose2d,
    Flatten,
    Linear,
    ReLU,
    Residual,
    Sequential,
)
from portacnn.models import (
    VGG11,
    VGG16,
    AlexNet,
    DeepConvNet,
    EfficientNetB0,
    LeNet5,
    MobileNetV2,
    Model,
    ResNet18,
    ResNet20,
    ResNet50,
    SimpleConvNet,
    UNet,
)
from portacnn.models.lenet5 import C3_TABLE, ScaledTanh, TableConv2d
from portacnn.models.resnet import PadChannels
from portacnn.models.summary import rows
from support.checks import normal, refuses
from support.matrix import Here, needs
from support.nets import bits

ALL = (
    SimpleConvNet, DeepConvNet, LeNet5, AlexNet, VGG11, VGG16, ResNet20, ResNet18, ResNet50,
    MobileNetV2, EfficientNetB0,
)  # fmt: skip


# --- structure ------------------------------------------------------------------------------------

# As published. Multiply-adds: of convolutions and linear maps, as torchvision and the papers that
# compare networks count.
COUNTS = [
    (SimpleConvNet, {}, 433_890, 865_000),
    (DeepConvNet, {}, 123_552, None),
    (LeNet5, {}, 60_000 + 850, None),  # the paper's 60,000, and an affine output layer
    (LeNet5, {"variant": "modern"}, 61_706, 416_520),
    (AlexNet, {}, 60_965_224, 724_406_816),
    (VGG11, {}, 132_863_336, 7_609_090_048),
    (VGG11, {"batch_norm": True}, 132_868_840, 7_609_090_048),
    (VGG16, {}, 138_357_544, 15_470_264_320),
    (VGG16, {"batch_norm": True}, 138_365_992, 15_470_264_320),
    (ResNet20, {}, 269_722, 40_551_040),
    (ResNet20, {"option": "B"}, 272_474, None),
    (ResNet18, {}, 11_689_512, 1_814_073_344),
    (ResNet50, {}, 25_557_032, 4_089_184_256),
    (MobileNetV2, {}, 3_504_872, 300_774_272),
    (EfficientNetB0, {}, 5_288_548, 385_814_752),
    (UNet, {}, 31_037_698, None),
]


@pytest.mark.parametrize(("kind", "arguments", "parameters", "multiply_adds"), COUNTS)
def test_counts_are_as_published(only_planned, kind, arguments, parameters, multiply_adds):
    model = kind(**arguments)
    found = rows(model, model.input_shape)
    assert sum(row.parameters for row in found) == parameters
    assert multiply_adds in (None, sum(row.multiply_adds for row in found))
    total = model.summary(model.input_shape).splitlines()[-1].split()
    assert total[:2] == ["total", f"{parameters:,}"]
    assert multiply_adds in (None, int(total[2].replace(",", "")))


@pytest.mark.parametrize("kind", ALL)
def test_every_model_takes_the_same_words(only_planned, kind):
    words = inspect.signature(kind).parameters
    assert {"num_classes", "in_channels", "device", "seed", "dtype"} <= set(words)
    assert all(
        words[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ("device", "seed", "dtype")
    )
    model = kind(num_classes=7, in_channels=2)
    assert (model.input_shape[0], model.output_shape) == (2, (7,))


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind is not SimpleConvNet])
def test_numbers_out_of_range_are_refused(kind):
    refuses(ArgumentError, kind.__name__, "num_classes", call=lambda: kind(num_classes=0))
    refuses(ArgumentError, kind.__name__, "in_channels", call=lambda: kind(in_channels=1.5))
    refuses(ArgumentError, kind.__name__, "input_size", call=lambda: kind(input_size=-1))


def test_unknown_words_are_refused():
    refuses(ArgumentError, "LeNet5", "variant", "classic", call=lambda: LeNet5(variant="old"))
    refuses(ArgumentError, "LeNet5", "28 or 32", call=lambda: LeNet5(input_size=29))
    refuses(ArgumentError, "ResNet20", "option", "'C'", call=lambda: ResNet20(option="C"))
    refuses(ShapeError, "pool5 (MaxPool2d)", call=lambda: AlexNet(input_size=40))
    refuses(ArgumentError, "Dropout", call=lambda: DeepConvNet(dropout=2))


@needs("torch")
def test_layers_of_lenet_are_as_in_the_paper():
    """The counts of trainable numbers that section II.B gives for each layer."""
    counts = {row.path: row.parameters for row in rows(LeNet5(), (1, 28, 28)) if row.parameters}
    assert counts == {
        "c1": 156,
        "s2": 12,
        "c3": 1516,
        "s4": 32,
        "c5": 48120,
        "f6": 10164,
        "output": 850,
    }
    shapes = {row.path: row.output for row in rows(LeNet5(input_size=32), (1, 32, 32))}
    assert [shapes[name] for name in ("c1", "s2", "c3", "s4", "c5", "f6")] == [
        (6, 28, 28), (6, 14, 14), (16, 10, 10), (16, 5, 5), (120, 1, 1), (84,)
    ]  # fmt: skip
    from support import twins

    assert [list(seen) for seen in C3_TABLE] == twins.C3().seen


# --- first weights --------------------------------------------------------------------------------


def test_initial_weights_of_alexnet_are_as_in_the_paper():
    state = AlexNet(input_size=67, hidden_size=50, num_classes=20, seed=0).state_dict()
    for number, start in enumerate((0, 1, 0, 1, 1), 1):
        assert (state[f"conv{number}.bias"] == start).all()
        assert state[f"conv{number}.weight"].std() == pytest.approx(0.01, rel=0.02)
    for name, start in (("fc6", 1), ("fc7", 1), ("fc8", 0)):
        assert (state[f"{name}.bias"] == start).all()
        assert state[f"{name}.weight"].std() == pytest.approx(0.01, rel=0.1)


def test_initial_weights_of_lenet_are_as_in_the_paper():
    state = LeNet5(seed=0).state_dict()
    fans = {"c1": 25, "s2": 1, "s4": 1, "c5": 400, "f6": 120, "output": 84}
    for name, fan in fans.items():
        for part in ("weight", "bias"):
            assert 0.5 * 2.4 / fan < np.abs(state[f"{name}.{part}"]).max() <= 2.4 / fan
    sizes = [len(seen) for seen in C3_TABLE for _ in seen]
    for size in (3, 4, 6):
        kernels = state["c3.weight"][np.array(sizes) == size]
        assert 0.9 * 2.4 / (25 * size) < np.abs(kernels).max() <= 2.4 / (25 * size)


@pytest.mark.parametrize(
    ("make", "std"),
    [
        (lambda: ResNet18(input_size=32, seed=0), lambda o, i, k: sqrt(2 / (o * k * k))),
        (lambda: ResNet20(option="B", seed=0), lambda o, i, k: sqrt(2 / (i * k * k))),
        (
            lambda: VGG11(input_size=32, hidden_size=8, seed=0),
            lambda o, i, k: sqrt(2 / (o * k * k)),
        ),
        (lambda: DeepConvNet(seed=0), lambda o, i, k: sqrt(2 / (i * k * k))),
    ],
)
def test_convolutions_start_by_hes_rule(make, std):
    state = make().state_dict()
    kernels = {
        path: value for path, value in state.items() if value.ndim == 4 and value.size > 2000
    }  # enough for a spread
    assert len(kernels) > 4
    for path, value in kernels.items():
        assert value.std() == pytest.approx(std(*value.shape[:3]), rel=0.05), path
        assert (
            path.replace("weight", "bias") not in state
            or not state[path.replace("weight", "bias")].any()
        )


# --- their own layers -----------------------------------------------------------------------------


def test_scaled_tanh_agrees_with_its_formula(backend: Here):
    layer = ScaledTanh().build((3,), device=backend.device, dtype="float64")
    y, cache = layer.forward(backend.array([[1.0, -1.0, 0.0]]))
    y = backend.host(y)
    np.testing.assert_allclose(y, [[1, -1, 0]], atol=2e-5)
    dx = backend.host(layer.backward(backend.array([[1.0, 1.0, 1.0]]), cache))
    assert dx[0, 2] == pytest.approx(1.7159 * 2 / 3)


def test_table_convolution_agrees_with_single_convolutions(backend: Here):
    """With one map seeing all and the others one each, against those convolutions."""
    layer = TableConv2d([[0], [0, 1, 2], [2]], (2, 3)).build(
        (3, 4, 5), device=backend.device, dtype="float64", seed=0
    )
    assert {name: p.shape for name, p in layer.params.items()} == {
        "weight": (5, 2, 3),
        "bias": (3,),
    }
    weight, bias = (backend.host(layer.params[name]) for name in ("weight", "bias"))
    x, up = normal(2, 3, 4, 5), normal(2, 3, 3, 3, seed=1)
    expected, dweight, dx = np.zeros((2, 3, 3, 3)), np.zeros((5, 2, 3)), np.zeros(x.shape)
    for k, (o, c) in enumerate([(0, 0), (1, 0), (1, 1), (1, 2), (2, 2)]):
        for i, j in np.ndindex(2, 3):
            expected[:, o] += weight[k, i, j] * x[:, c, i : i + 3, j : j + 3]
            dweight[k, i, j] = (up[:, o] * x[:, c, i : i + 3, j : j + 3]).sum()
            dx[:, c, i : i + 3, j : j + 3] += weight[k, i, j] * up[:, o]
    y, cache = layer.forward(backend.array(x))
    np.testing.assert_allclose(backend.host(y), expected + bias[:, None, None], atol=1e-12)
    np.testing.assert_allclose(
        backend.host(layer.backward(backend.array(up), cache)), dx, atol=1e-12
    )
    np.testing.assert_allclose(backend.host(layer.grads["weight"]), dweight, atol=1e-12)
    np.testing.assert_allclose(backend.host(layer.grads["bias"]), up.sum((0, 2, 3)), atol=1e-12)
    assert layer.multiply_adds() == 5 * 6 * 9
    refuses(
        ShapeError, "at least 3 input channels", call=lambda: TableConv2d([[2]], 1).build((2, 3, 3))
    )
    refuses(ArgumentError, "TableConv2d", "none twice", call=lambda: TableConv2d([[1, 1]], 1))
    refuses(ArgumentError, "TableConv2d", "at least one", call=lambda: TableConv2d([[0], []], 1))


def test_pad_channels_adds_zero_channels(backend: Here):
    layer = PadChannels(5).build((2, 1, 3), device=backend.device, dtype="float64")
    x = normal(2, 2, 1, 3)
    y, cache = layer.forward(backend.array(x))
    y = backend.host(y)
    np.testing.assert_array_equal(y, np.pad(x, ((0, 0), (1, 2), (0, 0), (0, 0))))
    up = normal(2, 5, 1, 3, seed=1)
    np.testing.assert_array_equal(
        backend.host(layer.backward(backend.array(up), cache)), up[:, 1:3]
    )
    refuses(ShapeError, "at most 5 channels", call=lambda: PadChannels(5).build((6, 2, 2)))
    refuses(ArgumentError, "PadChannels", "out_channels", call=lambda: PadChannels(0))


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda **k: SimpleConvNet(num_classes=3, in_channels=2, **k),
        lambda **k: DeepConvNet(3, 2, input_size=(20, 23), hidden_size=7, dropout=0.25, **k),
        lambda **k: LeNet5(3, 2, **k),
        lambda **k: LeNet5(num_classes=3, variant="modern", input_size=32, **k),
        lambda **k: AlexNet(3, input_size=67, hidden_size=11, **k),
        lambda **k: VGG11(
            3, batch_norm=True, input_size=32, hidden_size=11, **{**k, "dtype": "float32"}
        ),
        lambda **k: ResNet20(3, input_size=(16, 12), **k),
        lambda **k: ResNet20(3, 1, option="B", input_size=12, **k),
        lambda **k: ResNet18(3, input_size=33, **{**k, "dtype": "float32"}),
    ],
)
def test_models_can_be_saved_and_loaded(tmp_path, make):
    pytest.importorskip("safetensors")
    model = make(seed=3, device="numpy", dtype="float64")
    model(model.accept(normal(2, *model.input_shape)), train=True)
    model.save(tmp_path / "model.safetensors")
    again = portacnn.load(tmp_path / "model.safetensors", device="numpy")
    assert type(again) is type(model)
    assert bits(again) == bits(model)
    assert repr(again.arguments()[1].get("num_classes")) == "3"
    x = normal(2, *model.input_shape, seed=1)
    assert np.array_equal(again.predict(x), model.predict(x))


def test_one_seed_makes_one_model_on_every_backend(backend: Here):
    for kind in (DeepConvNet, LeNet5, ResNet20):
        assert bits(kind(seed=4, device=backend.device)) == bits(kind(seed=4, device="numpy"))


# --- summary --------------------------------------------------------------------------------------


def block():
    return Model(
        stem=Conv2d(None, 4, 3, padding=1),
        block=Residual(
            Sequential(
                inception=Branches(Conv2d(4, 3, 1), Sequential(ReLU(), Conv2d(4, 5, 3, padding=1)))
            ),
            Conv2d(None, 8, 1, groups=2),
            activation=ReLU(),
        ),
        up=ConvTranspose2d(None, 2, 3, 2, groups=2),
        flatten=Flatten(),
        fc=Linear(None, 3),
    )


def test_summary_rows_are_correct():
    found = {row.path: tuple(row[1:-2]) for row in rows(block(), (2, 4, 5))}
    assert found == {
        "stem": ("Conv2d", (4, 4, 5), 4 * 2 * 9 + 4, 4 * 2 * 9 * 20, 4 * 20 * 4),
        "block": ("Residual", (8, 4, 5), 0, 0, 8 * 20 * 4),
        "block.inception": ("Branches", (8, 4, 5), 0, 0, 8 * 20 * 4),
        "block.inception.0": ("Conv2d", (3, 4, 5), 3 * 4 + 3, 12 * 20, 3 * 20 * 4),
        "block.inception.1.0": ("ReLU", (4, 4, 5), 0, 0, 4 * 20 * 4),
        "block.inception.1.1": ("Conv2d", (5, 4, 5), 5 * 4 * 9 + 5, 5 * 4 * 9 * 20, 5 * 20 * 4),
        "block.downsample": ("Conv2d", (8, 4, 5), 8 * 2 + 8, 8 * 2 * 20, 8 * 20 * 4),
        "block.activation": ("ReLU", (8, 4, 5), 0, 0, 8 * 20 * 4),
        "up": ("ConvTranspose2d", (2, 9, 11), 8 * 9 + 2, 8 * 9 * 20, 2 * 99 * 4),
        "flatten": ("Flatten", (198,), 0, 0, 198 * 4),
        "fc": ("Linear", (3,), 3 * 198 + 3, 3 * 198, 3 * 4),
    }


def test_summary_is_a_table():
    text = block().summary((2, 4, 5), batch_size=8)
    head, counted, names, line, *layers, _, total = text.splitlines()
    assert head == "Model, samples 2x4x5, float32"
    assert counted == "multiply-adds of one sample, activations of a batch of 8"
    assert names.split() == [
        "layer",
        "class",
        "output",
        "parameters",
        "multiply-adds",
        "activations",
    ]
    assert set(line) == {"-"}
    assert len(layers) == 11
    assert layers[0].split() == ["stem", "Conv2d", "4x4x5", "76", "1,440", "2.5", "KiB"]
    found = rows(block(), (2, 4, 5))
    memory = 8 * sum(row.output_bytes for row in found) / 1024
    assert total.split() == [
        "total",
        f"{sum(row.parameters for row in found):,}",
        f"{sum(row.multiply_adds for row in found):,}",
        f"{memory:.1f}",
        "KiB",
    ]
    assert all(not text.endswith(" ") for text in layers)


def test_summary_leaves_no_trace():
    net = block()
    net.summary((2, 4, 5))
    assert net.named_parameters() == {}
    assert net.backend is None
    assert all(
        (layer.path, layer.input_shape, layer.declared) == ("", (), {}) for layer in net.walk()
    )
    refuses(StateError, "not built", call=lambda: net.summary())
    net.build((2, 4, 5), seed=0, dtype="float64")
    before = (
        bits(net),
        [(layer.path, layer.input_shape, layer.output_shape) for layer in net.walk()],
    )
    assert "2x8x8" in net.summary([2, 8, 8])
    refuses(ShapeError, "block.downsample (Conv2d)", call=lambda: Model(
        block=Residual(Conv2d(None, 4, 1), Conv2d(3, 4, 1))).summary((2, 3, 3)))  # fmt: skip
    refuses(ArgumentError, "batch_size", call=lambda: net.summary(batch_size=0))
    assert (
        bits(net),
        [(layer.path, layer.input_shape, layer.output_shape) for layer in net.walk()],
    ) == before
    assert (
        net.summary().splitlines()[-1].split()[1]
        == f"{sum(p.size for p in net.named_parameters().values()):,}"
    )
    assert "float64" in net.summary()


# --- learning -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_resnet20_overfits_random_images():
    rng = np.random.default_rng(0)
    images, labels = rng.random((128, 3, 32, 32), dtype="float32"), rng.integers(0, 10, 128)
    model = ResNet20(seed=0, device="numpy")
    trainer = portacnn.Trainer(
        model,
        images,
        labels,
        images,
        labels,
        epochs=12,
        mini_batch_size=32,
        optimizer_param={"lr": 0.003},
        verbose=False,
    )
    trainer.train()
    assert model.accuracy(images, labels) == 1.0
