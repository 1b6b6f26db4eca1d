"""Arrays of other libraries at a model's door (DLPack), and weights in files that PyTorch writes
and reads."""

from importlib import import_module

import numpy as np
import pytest

from portacnn import Trainer, models, resolve
from portacnn.errors import ArrayError, ModelFormatError
from portacnn.layers import BatchNorm2d, Conv2d, Flatten, Linear, ReLU
from portacnn.models import Model
from support.matrix import needs
from support.nets import bits, patches, small_net


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("PORTACNN_BACKEND", raising=False)


class Foreign:
    """An array of a library that portacnn has never heard of: all it knows is DLPack."""

    def __init__(self, array, device=None):
        self.array, self.device = array, device

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device or self.array.__dlpack_device__()


def library(name):
    """What brings a NumPy array into a library, its memory shared."""
    if name == "numpy":
        return lambda array: array
    if name == "foreign":
        return Foreign
    module = import_module(name)
    return module.from_numpy if name == "torch" else module.asarray


TORCH = pytest.param("torch", marks=needs("torch"))
libraries = pytest.mark.parametrize("name", ["numpy", "foreign", TORCH, "array_api_strict"])


@libraries
@pytest.mark.parametrize("device", ["numpy", TORCH, "array_api_strict"])
def test_arrays_of_any_library_on_the_models_device_are_accepted(device, name):
    net, (x, t), bring = (
        small_net(device, dtype="float64"),
        patches(20, dtype="float64"),
        library(name),
    )
    home, expected = resolve(device), small_net("numpy", dtype="float64")
    np.testing.assert_allclose(home.to_host(net.predict(bring(x))), expected.predict(x), rtol=1e-12)
    np.testing.assert_allclose(
        home.to_host(net.predict(bring(x[:3]), batch_size=2)), expected.predict(x[:3]), rtol=1e-12
    )
    assert net.loss(bring(x), bring(t)) == pytest.approx(expected.loss(x, t), rel=1e-12)
    assert net.accuracy(bring(x), bring(t)) == expected.accuracy(x, t)
    np.testing.assert_allclose(
        home.to_host(net.gradient(bring(x), bring(t))["fc2.weight"]),
        expected.gradient(x, t)["fc2.weight"],
        rtol=1e-9,
    )
    run = Trainer(
        net, bring(x), bring(t), bring(x), bring(t), epochs=1, mini_batch_size=5, verbose=False
    )
    run.train()
    assert len(run.train_loss_list) == 4


@libraries
@pytest.mark.parametrize("device", ["numpy", TORCH])
@pytest.mark.parametrize("dtype", ["float64", "uint8"])
def test_no_copy_where_none_is_needed(device, name, dtype):
    """A write to the caller's memory is seen in what the model and the Trainer were given."""
    net, x = small_net(device, dtype="float64"), np.zeros((20, 1, 8, 8), dtype)
    net.preprocess = models.Normalize()
    given = library(name)(x)
    inside = [net.accept(given)]
    t = np.zeros(20, int)
    inside.append(Trainer(net, given, t, given, t, mini_batch_size=5, verbose=False).x_train)
    x[3] = 7
    for array in inside:
        assert float(array[3, 0, 0, 0]) == 7


@pytest.mark.parametrize("device", ["numpy", TORCH, "array_api_strict"])
@pytest.mark.parametrize(
    "how", ["read-only", "turned round", "every other", "big-endian", "unaligned"]
)
def test_numpy_arrays_that_are_not_plain(device, how):
    """torch ends the whole process where a stride is negative and warns of memory that may not be
    written to."""
    x, _ = patches(20, dtype="float64")
    plain = x.copy()
    if how == "read-only":
        x.flags.writeable = False
    elif how == "turned round":
        x, plain = x[::-1, :, ::-1], plain[::-1, :, ::-1].copy()
    elif how == "every other":
        x, plain = x[::2], plain[::2].copy()
    elif how == "big-endian":
        x = x.astype(">f8")
    else:
        raw = np.zeros(x.nbytes + 1, np.uint8)[1:]
        raw[...] = np.frombuffer(x.tobytes(), np.uint8)
        x = raw.view(np.float64).reshape(x.shape)
    net, home = small_net(device, dtype="float64"), resolve(device)
    before = x.copy()
    np.testing.assert_array_equal(home.to_host(net.predict(x)), home.to_host(net.predict(plain)))
    if how not in ("big-endian", "unaligned"):
        np.testing.assert_allclose(
            small_net("numpy", dtype="float64").predict(Foreign(x)),
            small_net(dtype="float64").predict(plain),
            rtol=1e-12,
        )
    np.testing.assert_array_equal(x, before)


def test_another_device_is_said():
    strict = pytest.importorskip("array_api_strict")
    x, _ = patches(3)
    cuda = Foreign(x, (2, 1))
    with pytest.raises(
        ArrayError,
        match=r"^SimpleConvNet: the model is on numpy on cpu, the images are "
        r".*Foreign; move one",
    ):
        small_net().predict(cuda)
    with pytest.raises(
        ArrayError,
        match=r"the model is on array_api_strict on device1, the images are .*Foreign; "
        r"move one",
    ):
        small_net("array_api_strict:device1").predict(Foreign(x))
    there = strict.asarray(x, device=strict.Device("device2"))
    for device in ("numpy", "array_api_strict", "array_api_strict:device1"):
        with pytest.raises(
            ArrayError,
            match=r"3x1x8x8, array_api_strict float32 on device2; move "
            r"one of them",
        ):
            small_net(device).predict(there)
    with pytest.raises(ArrayError, match="move one of them"):
        Trainer(small_net(), cuda, np.zeros(3, int), x, np.zeros(3, int))


@needs("torch")
def test_what_a_library_does_not_hand_over():
    import torch

    for x in (
        torch.zeros((2, 1, 8, 8), requires_grad=True),
        torch.zeros((2, 1, 8, 8), dtype=torch.bfloat16),
    ):
        with pytest.raises(
            ArrayError,
            match=r"2x1x8x8, torch .* cannot be shared with numpy on "
            r"cpu by DLPack: ",
        ):
            small_net().predict(x)
    with pytest.raises(ArrayError, match="expected an array of"):
        small_net().predict([[1.0]])


# --- files of PyTorch's ---------------------------------------------------------------------------


def counted():
    """One with batch norm, whose state has a count among its floats."""
    net = Model(
        conv=Conv2d(1, 3, 3), bn=BatchNorm2d(3), relu=ReLU(), flatten=Flatten(), fc=Linear(None, 4)
    )
    return net.build((1, 8, 8), device="numpy", seed=0)


def torch_counted(torch):
    from collections import OrderedDict

    nn = torch.nn
    parts = OrderedDict(
        conv=nn.Conv2d(1, 3, 3),
        bn=nn.BatchNorm2d(3),
        relu=nn.ReLU(),
        flatten=nn.Flatten(),
        fc=nn.Linear(108, 4),
    )
    return nn.Sequential(parts)


@needs("torch")
def test_safetensors_files_are_exchanged_with_pytorch(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    x, t = patches(12)
    twin, net = torch_counted(torch), counted()
    twin.train()
    for _ in range(3):
        twin(torch.from_numpy(x))
    save_file(twin.state_dict(), tmp_path / "theirs.safetensors")
    assert net.load_weights(tmp_path / "theirs.safetensors") == ([], [])
    twin.eval()
    with torch.no_grad():
        np.testing.assert_allclose(
            net.predict(x), twin(torch.from_numpy(x)).numpy(), rtol=1e-4, atol=1e-6
        )
    assert net.state_dict()["bn.num_batches_tracked"] == 3
    assert net.state_dict()["bn.num_batches_tracked"].dtype == np.int64

    Trainer(net, x, t, x, t, epochs=2, mini_batch_size=6, verbose=False).train()
    net.save(tmp_path / "ours.safetensors")
    other = torch_counted(torch)
    other.load_state_dict(load_file(tmp_path / "ours.safetensors"), strict=True)
    assert int(other.bn.num_batches_tracked) == 3 + 4
    other.eval()
    with torch.no_grad():
        np.testing.assert_allclose(
            net.predict(x), other(torch.from_numpy(x)).numpy(), rtol=1e-4, atol=1e-6
        )


@needs("torch")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_half_precision_files_of_pytorch_load(tmp_path, dtype):
    import torch
    from safetensors.torch import save_file

    twin, net = torch_counted(torch).to(getattr(torch, dtype)), counted()
    save_file(twin.state_dict(), tmp_path / "theirs")
    net.load_weights(tmp_path / "theirs")
    for path, value in twin.state_dict().items():
        np.testing.assert_array_equal(
            net.state_dict()[path], value.float().numpy().astype("float32")
        )


@needs("torch")
def test_every_model_and_pytorch_have_the_same_state(tmp_path):
    from safetensors.torch import load_file, save_file

    net = models.ResNet20(device="numpy", seed=0)
    from support.twins import ResNet20

    twin = ResNet20(10, 3, "A")
    net.save(tmp_path / "ours")
    twin.load_state_dict(load_file(tmp_path / "ours"), strict=True)
    save_file({path: value + 1 for path, value in twin.state_dict().items()}, tmp_path / "theirs")
    net.load_weights(tmp_path / "theirs")
    for path, value in twin.state_dict().items():
        np.testing.assert_array_equal(net.state_dict()[path], (value + 1).numpy())


def test_strict_false_loads_what_matches():
    net = small_net()
    before, state = bits(net), {"fc2.bias": np.full(4, 3.0, "float32"), "extra": np.zeros(2)}
    with pytest.raises(ModelFormatError, match=r"missing: conv1\.weight, .*; unexpected: extra"):
        net.load_state_dict(state)
    assert bits(net) == before
    mismatch = net.load_state_dict(state, strict=False)
    assert mismatch.unexpected_keys == ["extra"]
    assert mismatch.missing_keys == [path for path in before if path != "fc2.bias"]
    assert net.state_dict()["fc2.bias"].tolist() == [3.0] * 4
    assert {path: value for path, value in bits(net).items() if path != "fc2.bias"} == {
        path: value for path, value in before.items() if path != "fc2.bias"
    }
    with pytest.raises(
        ModelFormatError,
        match=r"of another shape: fc2\.bias \(5,\) \(expected "
        r"\(4,\)\)",
    ):
        net.load_state_dict({"fc2.bias": np.zeros(5)}, strict=False)
