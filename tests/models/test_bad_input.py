"""Images, labels and batch sizes that a model refuses, and what it says."""

import re

import numpy as np
import pytest

from portacnn import Normalize, Trainer
from portacnn.errors import (
    ArgumentError,
    ArrayError,
    LabelError,
    ModelFormatError,
    ShapeError,
)
from portacnn.layers import AdaptiveAvgPool2d, Conv2d, Flatten, Linear, MaxPool2d
from portacnn.models import Model, ModelInfo, SimpleConvNet
from support.matrix import needs
from support.nets import as_bytes, bits, patches, small_net

CALLS = {
    "predict": lambda net, x: net.predict(x),
    "loss": lambda net, x: net.loss(x, np.zeros(x.shape[0], int)),
    "accuracy": lambda net, x: net.accuracy(x, np.zeros(x.shape[0], int)),
    "gradient": lambda net, x: net.gradient(x, np.zeros(x.shape[0], int)),
}


every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@every_call
def test_wrong_images_are_refused_with_a_fix(backend, call):
    net = small_net(backend.device)
    for shape, hint in (
        ((5, 3, 8, 8), "; make the channels one: x.mean(1)[:, None]"),
        (
            (5, 1, 9, 8),
            "; flatten (Flatten) fits this size only",
        ),
        ((5, 8, 8), "; add a channel axis: x[:, None]"),
        ((5, 64), "; x.reshape(-1, 1, 8, 8)"),
        ((5, 1, 8, 8, 1), ""),
        ((5,), ""),
    ):
        with pytest.raises(ShapeError) as caught:
            call(net, np.zeros(shape, "float32"))
        size = "x".join(map(str, shape))
        expected = (
            f"SimpleConvNet: expected images (N, 1, 8, 8), got {size}, numpy float32 on cpu{hint}"
        )
        assert str(caught.value) == expected
    for dtype in ("uint8", "int64", "bool"):
        with pytest.raises(
            ArrayError,
            match=rf"^SimpleConvNet: expected floating-point images, got 5x1x8x8, numpy {dtype} on "
            r"cpu; scale",
        ) as caught:
            call(net, np.zeros((5, 1, 8, 8), dtype))
        assert "x.astype('float32') / 255" in str(caught.value)
    with pytest.raises(
        ArrayError,
        match=r"expected floating-point .* model\.preprocess = "
        r"portacnn\.Normalize\(\)",
    ):
        call(net, backend.array(np.zeros((5, 1, 8, 8)), "uint8"))
    net.preprocess = Normalize()
    call(net, np.zeros((5, 1, 8, 8), "uint8"))
    for dtype in ("int8", "int32", "int64", "bool"):
        for x in (np.zeros((5, 1, 8, 8), dtype), backend.array(np.zeros((5, 1, 8, 8)), dtype)):
            with pytest.raises(
                ArrayError,
                match=r"expected images of uint8 or floating point, "
                rf"got .*{dtype} on",
            ):
                call(net, x)
    with pytest.raises(
        ShapeError,
        match=r"expected images \(N, 1, 8, 8\), got 5x3x8x8, numpy "
        r"uint8",
    ):
        call(net, np.zeros((5, 3, 8, 8), "uint8"))


@every_call
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize(
    ("sample", "shape", "cure"),
    [
        ((3, 8, 9), (3, 8, 9), "x[None]"),
        ((3, 8, 9), (5, 8, 9, 3), "x.transpose(0, 3, 1, 2)"),
        ((3, 8, 9), (8, 9, 3), "x[None].transpose(0, 3, 1, 2)"),
        ((1, 8, 9), (5, 8, 9), "x[:, None]"),
        ((1, 8, 9), (8, 9), "x[None, None]"),
        ((1, 8, 9), (5, 8, 9, 1), "x.transpose(0, 3, 1, 2)"),
        ((3, 8, 9), (5, 216), "x.reshape(-1, 3, 8, 9)"),
        ((3, 8, 9), (5, 1, 8, 9), "x[:, [0, 0, 0]]"),
        ((3, 8, 9), (5, 8, 9), "x[:, None][:, [0, 0, 0]]"),
        ((3, 8, 9), (8, 9), "x[None, None][:, [0, 0, 0]]"),
        ((3, 8, 9), (5, 4, 8, 9), "x[:, :3]"),
        ((3, 8, 9), (5, 8, 9, 4), "x[..., :3].transpose(0, 3, 1, 2)"),
    ],
)
def test_the_cure_that_is_told_is_one(call, sample, shape, cure, dtype):
    """Whatever else may be wrong (bytes without a preprocess), the shape is said first."""
    net = Model(Flatten(), Linear(None, 4)).build(sample, seed=0, device="numpy")
    x = np.zeros(shape, dtype)
    with pytest.raises(ShapeError) as caught:
        call(net, x)
    assert str(caught.value).endswith(
        f"numpy {dtype} on cpu; {caught.value.message.rpartition('; ')[2]}"
    )
    assert caught.value.message.endswith(cure)
    net.preprocess = Normalize()
    call(net, eval(cure, {"x": x}))


def test_images_of_another_size_or_with_too_many_channels_are_refused():
    net = Model(Flatten(), Linear(None, 4)).build((3, 8, 9), seed=0, device="numpy")
    with pytest.raises(ShapeError, match=r"fits this size only$"):
        net.predict(np.zeros((2, 3, 8, 8), "float32"))
    gray = Model(Flatten(), Linear(None, 4)).build((1, 8, 9), seed=0, device="numpy")
    gray.preprocess = Normalize()
    for x, cure in (
        (np.ones((2, 3, 8, 9), "float32"), "x.mean(1)[:, None]"),
        (np.full((2, 3, 8, 9), 255, "uint8"), "x.mean(1)[:, None].astype(x.dtype)"),
    ):
        with pytest.raises(ShapeError, match=re.escape(f"the channels one: {cure}") + "$"):
            gray.predict(x)
        close = gray.predict(eval(cure, {"x": x})) - gray.predict(np.ones((2, 1, 8, 9), "float32"))
        assert np.abs(close).max() < 1e-5


def test_images_on_another_scale_than_those_of_the_training(backend, caplog):
    """A model without a preprocess knows from its training what its images were."""
    x, t = patches(20)
    net = small_net(backend.device)
    net.predict(255 * x)
    Trainer(net, x, t, epochs=1, batch_size=10, verbose=False).train()
    least, largest = net.info.input_range
    assert (least, largest) == (float(x.min()), float(x.max()))
    net.predict(x), net.predict(0 * x), net.predict(3 * x)
    assert not caplog.messages
    net.predict(255 * x), net.predict(255 * x)
    again = small_net(backend.device)
    again.info = net.info
    again.predict(backend.array(255 * x)), again.predict(255 * x)
    assert len(caplog.messages) == 2
    assert all("trained on images of" in m and "x / 255" in m for m in caplog.messages)
    caplog.clear()
    net = small_net(backend.device)
    net.info = ModelInfo(input_range=(0.0, 255.0))
    net.predict(0 * x), net.predict(200 * x[:1])
    assert not caplog.messages
    net.predict(x / x.max())
    assert len(caplog.messages) == 1
    assert "x * 255" in caplog.messages[0]


def test_the_scale_of_few_images_is_checked_too(backend, caplog):
    """Few images take a prepared path, which an evaluation of as many has made; and evaluations of
    a training do not count as the first images on a device."""
    x, t = patches(5)
    net = small_net(backend.device)
    Trainer(net, x, t, x, t, epochs=3, batch_size=5, verbose=False).train()
    net.predict(backend.array(255 * x))
    assert ["trained on images of" in message for message in caplog.messages] == [True]


@needs("torch")
def test_the_fix_is_in_terms_of_torch():
    import torch

    net = Model(Flatten(), Linear(None, 4)).build((3, 8, 9), seed=0, device="torch")
    with pytest.raises(ShapeError, match=r"x\.permute\(0, 3, 1, 2\)$"):
        net.predict(torch.zeros(5, 8, 9, 3))


def test_a_channels_last_input_shape_is_refused():
    for build in (
        lambda: SimpleConvNet((32, 32, 3), device="numpy"),
        lambda: Model(Conv2d(3, 4, 5), Flatten(), Linear(None, 2)).build(
            (32, 32, 3), device="numpy"
        ),
    ):
        with pytest.raises(
            ShapeError,
            match=r"\(C, H, W\): did you mean \(3, 32, 32\) instead of "
            r"\(32, 32, 3\)\?$",
        ):
            build()
    with pytest.raises(ShapeError, match=r"larger than the input 3x3; [^.]* or a larger input$"):
        SimpleConvNet((3, 3, 3), device="numpy")


def test_floats_that_look_like_bytes_are_said_once(backend, caplog):
    """To a model that was made for bytes: it would take them as 255 times too bright."""
    x, t = patches(20)
    stored = as_bytes(x)
    for call in (
        lambda net, x: net.predict(x),
        lambda net, x: net.predict(x[:2, ...]),
        lambda net, x: net.loss(x, t),
        lambda net, x: Trainer(net, x, t, x, t, epochs=1, mini_batch_size=10, verbose=False),
    ):
        net = small_net(backend.device)
        caplog.clear()
        call(net, 255 * x)  # without a preprocess nothing is known of them
        net.preprocess = Normalize()
        call(net, stored)
        call(net, x)
        assert not caplog.messages
        net = small_net(backend.device)
        net.preprocess = Normalize()
        for images in (stored.astype("float32"), backend.array(stored, "float32")):
            call(net, images)
            call(net, images)
        (message,) = caplog.messages
        assert "SimpleConvNet: preprocess does not apply to floating-point images" in message
        assert "x.astype('uint8')" in message
    net.preprocess = Normalize(scale=1.0)  # floats of 0..255 are what that makes
    net._warned = False
    caplog.clear()
    net.predict(stored.astype("float32"))
    assert not caplog.messages


@every_call
def test_images_of_another_library_or_device_are_refused(call):
    strict = pytest.importorskip("array_api_strict")
    images = strict.zeros((5, 1, 8, 8), dtype=strict.float32, device=strict.Device("device1"))
    with pytest.raises(
        ArrayError,
        match=r"^SimpleConvNet: the model is on numpy on cpu, the images are 5x1x8x8, "
        r"array_api_strict float32 on device1; "
        "move one of them",
    ):
        call(small_net("numpy"), images)
    with pytest.raises(ArrayError, match=r"the model is on array_api_strict on device1, the"):
        call(
            small_net("array_api_strict:device1"), strict.zeros((5, 1, 8, 8), dtype=strict.float32)
        )


@pytest.mark.parametrize("call", ["predict", "loss", "accuracy"])
def test_images_that_are_no_array(call):
    net = small_net()
    arguments = () if call == "predict" else (np.array([0]),)
    for thing in ([[[[1.0]]]], None, np.float32(1.0)):
        with pytest.raises((ArrayError, ShapeError)):
            getattr(net, call)(thing, *arguments)


@pytest.mark.parametrize(
    ("t", "message"),
    [
        ([0, 1, 4], "label 4 at index 2 is outside 0..3; the network has 4 outputs"),
        ([0, -1, 3], "label -1 at index 1 is outside 0..3"),
        ([0, 1], r"got shape \(2,\)"),
        ([0, 1, 2, 3], r"got shape \(4,\)"),
        (np.zeros((3, 4, 1), int), r"got shape \(3, 4, 1\)"),
        (1, r"got shape \(\)|got a single number"),
        (np.eye(3), r"must have 4 columns, .* got 3|\(3, 4\) for outputs of \(4,\)"),
        (np.eye(4)[:2], r"got shape \(2, 4\)"),
        (np.zeros((3, 4)), "row 0 is not one-hot"),
        (np.eye(4)[:3] * 0.5, "row 0 is not one-hot"),
        ([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0]], "row 2 is not one-hot"),
        ([0.0, 1.0, 2.0], r"whole numbers 0\.\.3, got float64"),
        ([True, False, True], "got bool"),
    ],
)
def test_wrong_labels_are_refused(backend, t, message):
    net = small_net(backend.device)
    x, _ = patches(3)
    for call in (net.loss, net.accuracy, net.gradient):
        for form in [np.asarray(t)] + [backend.array(t)] * (np.ndim(t) > 0):
            with pytest.raises(LabelError, match=message) as caught:
                call(x, form)
            assert isinstance(caught.value, ValueError)


def test_lists_say_which_they_are_and_what_to_do():
    net, (x, t) = small_net(), patches(4)
    told = (
        r"expected an array of numpy, .*; got builtins\.list \(numpy\.asarray\(\.\.\.\) makes "
        r"an array of it\)"
    )
    for call in (net.loss, net.accuracy, net.gradient):
        call(x, t.tolist())  # labels may be lists
        with pytest.raises(ArrayError, match=rf"^SimpleConvNet: x: {told}"):
            call(list(x), t)
    with pytest.raises(ArrayError, match=rf"^SimpleConvNet: x: {told}"):
        net.predict(x.tolist())
    for place, name in ((0, "x_train"), (2, "x_test")):
        given = [x, t.tolist(), x, t.tolist()]
        given[place] = list(given[place])
        with pytest.raises(ArrayError, match=rf"^SimpleConvNet: {name}: {told}"):
            Trainer(net, *given, mini_batch_size=2, verbose=False)


def test_a_state_of_lists_says_what_is_wrong():
    net = small_net()
    before = bits(net)
    state = net.state_dict()
    for wrong, message in (
        (
            {**state, "fc2.bias": [0.0] * 4},
            r"not an array \(convert it with numpy\.asarray\): "
            r"fc2\.bias, a list",
        ),
        ({**state, "fc2.bias": None}, r"fc2\.bias, a NoneType"),
        (list(state.values()), "expected arrays by path, as state_dict"),
        (None, "got a NoneType"),
    ):
        with pytest.raises(ModelFormatError, match=message):
            net.load_state_dict(wrong)
    assert bits(net) == before


def test_numpys_integers_and_arrays_of_them_are_whole_numbers(tmp_path):
    """Where a number or several are taken; and they are saved."""
    a, n = np.array, np.int64
    net = Model(
        Conv2d(n(1), n(3), a([3, 3]), a([1, 1]), padding=a([1, 1])),
        MaxPool2d(a([2, 2])),
        Conv2d(None, 3, a(3), padding=a([[1, 0], [0, 1]])),
        AdaptiveAvgPool2d(a([2, 2])),
        Flatten(),
        Linear(None, a(4)),
    )
    plain = Model(
        Conv2d(1, 3, (3, 3), (1, 1), padding=(1, 1)),
        MaxPool2d((2, 2)),
        Conv2d(None, 3, 3, padding=((1, 0), (0, 1))),
        AdaptiveAvgPool2d((2, 2)),
        Flatten(),
        Linear(None, 4),
    )
    net.build(a([1, 8, 8]), seed=n(0), device="numpy")
    plain.build((1, 8, 8), seed=0, device="numpy")
    x, _ = patches(9)
    net.save(tmp_path / "net")
    expected = plain.predict(x)
    for one in (net, Model.load(tmp_path / "net", device="numpy")):
        np.testing.assert_array_equal(one.predict(x, n(4)), one.predict(x, 4))
        np.testing.assert_array_equal(one.predict(x), expected)
    for wrong in (
        a([3.0, 3.0]),
        a([True, True]),
        np.True_,
        a([[3, 3]]),
        a(["3"]),
        10**400,
        1.5,
        "3",
    ):
        with pytest.raises(ArgumentError, match="kernel_size"):
            Conv2d(1, 1, wrong)
        with pytest.raises((ArgumentError, ShapeError)):
            Linear(None, wrong)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, "4", True, np.array([2, 2]), np.float32(2)])
def test_a_batch_size_out_of_range_is_refused(batch_size):
    net = small_net()
    x, t = patches(4)
    with pytest.raises(
        ArgumentError, match="SimpleConvNet: batch_size must be a whole number of at least 1, got"
    ):
        net.predict(x, batch_size)
    with pytest.raises(ArgumentError):
        net.accuracy(x, t, batch_size)
