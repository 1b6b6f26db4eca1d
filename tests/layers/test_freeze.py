"""``freeze``: what is frozen stays as it is to the bit, the rest trains as in PyTorch with
``requires_grad=False``, and a frozen trunk costs no backward pass."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portacnn
from portacnn import Model, Trainer
from portacnn.errors import ArgumentError, ModelFormatError, StateError
from portacnn.files import load_tensors, save_tensors
from portacnn.layers import (
    Arithmetic,
    BatchNorm2d,
    Branches,
    Conv2d,
    Dropout,
    Flatten,
    InstanceNorm2d,
    Layer,
    Linear,
    MaxPool2d,
    Recompute,
    ReLU,
    Residual,
    Sequential,
    Tanh,
)
from portacnn.layers.passes import without_dx
from portacnn.models import GraphModel
from portacnn.optim import SGD, Adam
from support.checks import refuses
from support.matrix import EACH_LIBRARY, Here, backends, needs
from support.nets import bits, patches

SHAPE = (1, 6, 6)


def net(device: Any = "numpy", dtype: str = "float32", **options: Any) -> Model:
    model = Model(
        stem=Sequential(conv=Conv2d(1, 3, 3, padding=1), bn=BatchNorm2d(3), relu=ReLU()),
        block=Residual(
            Sequential(conv1=Conv2d(3, 3, 3, padding=1), bn1=BatchNorm2d(3)), activation=ReLU()
        ),
        conv2=Conv2d(3, 4, 3),
        relu2=ReLU(),
        pool=MaxPool2d(2),
        flatten=Flatten(),
        fc=Linear(None, 4),
    )
    return model.build(SHAPE, device=device, dtype=dtype, seed=7, **options)


def trainer(model: Model, count: int = 24, **options: Any) -> Trainer:
    x, t = patches(count, shape=model.input_shape, dtype=model.dtype)
    standard = {"epochs": 2, "batch_size": 8, "optimizer": Adam(0.01), "verbose": False}
    return Trainer(model, x, t, **{**standard, **options})


def changed(model: Model, before: dict[str, Any]) -> set[str]:
    now = bits(model)
    return {path for path in now if now[path] != before[path]}


def paths_of(model: Layer, *beginnings: str) -> set[str]:
    return {path for path in model.named_state() if path.startswith(beginnings)}


# --- updates as in PyTorch ------------------------------------------------------------------------


def torch_net(model: Model) -> Any:
    """The same network written in torch.nn alone, with the same weights."""
    torch = pytest.importorskip("torch")
    nn = torch.nn

    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Module()
            self.stem.conv, self.stem.bn = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.block = nn.Module()
            self.block.conv1, self.block.bn1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.conv2, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(16, 4)

        def forward(self, x: Any) -> Any:
            x = self.stem.bn(self.stem.conv(x)).relu()
            x = (self.block.bn1(self.block.conv1(x)) + x).relu()
            x = nn.functional.max_pool2d(self.conv2(x).relu(), 2)
            return self.fc(x.flatten(1))

    twin = Twin().double()
    state = {path: torch.tensor(value) for path, value in model.state_dict().items()}
    twin.load_state_dict(state)
    return twin


FROZEN = {
    "trunk": ["stem", "block", "conv2"],
    "middle": ["block", "conv2"],
    "norms": ["bn*"],
    "weights without statistics": ["bn.weight", "bn1.bias", "conv2.weight"],
    "head": ["fc.*"],
}
KINDS = {
    "sgd": lambda: SGD(0.05, momentum=0.9, weight_decay=0.1),
    "adam": lambda: Adam(0.01, weight_decay=0.1),
}


@needs("torch")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", FROZEN)
def test_frozen_layers_train_as_torchs_without_gradients(backend: Here, what: str, kind: str):
    import torch

    model = net(backend.device, "float64")
    twin, before = torch_net(model), bits(model)
    twin.train()
    model.freeze(FROZEN[what])
    selected = portacnn.optim.selector(FROZEN[what])
    for path, param in twin.named_parameters():
        param.requires_grad_(not selected(path, param))
    for path, module in twin.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d) and selected(f"{path}.running_mean", module):
            module.eval()
    learning = [param for param in twin.parameters() if param.requires_grad]
    theirs = (
        torch.optim.SGD(learning, 0.05, momentum=0.9, weight_decay=0.1)
        if kind == "sgd"
        else torch.optim.Adam(learning, 0.01, weight_decay=0.1)
    )
    mine = trainer(model, 8, epochs=5, optimizer=KINDS[kind](), seed=3)
    mine.train()
    x, t = (torch.tensor(array) for array in patches(8, shape=SHAPE, dtype="float64"))
    for _ in range(5):  # one batch an epoch: its order does not matter
        theirs.zero_grad()
        torch.nn.functional.cross_entropy(twin(x), t).backward()
        theirs.step()
    for path, value in twin.state_dict().items():
        own = model.state_dict()[path]
        np.testing.assert_allclose(own, value.numpy(), rtol=1e-9, atol=1e-11, err_msg=path)
    frozen = {path for path in before if selected(path, None)}
    assert changed(model, before) == before.keys() - frozen
    assert model.named_gradients().keys() == model.named_parameters().keys() - frozen


def test_instance_norm_keeps_its_statistics(backend: Here):
    model = Model(
        norm=InstanceNorm2d(1, track_running_stats=True), flatten=Flatten(), fc=Linear(None, 4)
    ).build(SHAPE, device=backend.device, seed=0)
    model.freeze("norm")
    before = bits(model)
    trainer(model).train()
    assert changed(model, before) == {"fc.weight", "fc.bias"}


# --- no backward pass below -----------------------------------------------------------------------


def caches(kept: Any) -> Iterator[tuple[Layer, Any]]:
    """Each layer that ran, with what it kept."""
    for layer, cache in kept:
        inner = cache[0] if isinstance(cache, tuple) and isinstance(cache[0], list) else cache
        if isinstance(inner, list):
            yield from caches(inner)
        elif layer is not None:
            yield layer, inner


def conv(channels: int = 2) -> Conv2d:
    return Conv2d(channels, 2, 3, padding=1)


CONTAINERS = {
    "sequential": lambda: Sequential(a=conv(), relu=ReLU(), b=conv(), tanh=Tanh(), c=conv()),
    "residual": lambda: Sequential(
        a=Residual(Sequential(inner=conv()), conv(), activation=ReLU()),
        b=Residual(Sequential(a2=conv(), b=conv()), conv(), activation=Tanh()),
        c=conv(),
    ),
    "branches": lambda: Sequential(
        a=Branches(one=conv(), two=Sequential(Tanh(), conv())),
        b=Branches(a=conv(4), b=Sequential(a=conv(4), b=conv()), join="add"),
        c=conv(),
    ),
    "recompute": lambda: Sequential(
        a=Recompute(conv()), b=Recompute(Sequential(a=conv(), relu=ReLU(), b=conv())), c=conv()
    ),
    "norm": lambda: Sequential(a=conv(), b=BatchNorm2d(2), relu=ReLU(), c=conv()),
}


@EACH_LIBRARY
@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("frozen", [["a"], ["a", "b"], ["b"], ["c"]], ids="".join)
def test_nothing_runs_and_nothing_is_kept_below(
    backend: Here, kind: str, frozen: list[str], monkeypatch: pytest.MonkeyPatch
):
    """The gradients of the rest are those of the network without frozen layers; frozen layers that
    nothing to train comes before go neither backward nor keep anything."""
    model = CONTAINERS[kind]().build((2, 4, 4), device=backend.device, dtype="float64", seed=3)
    x = backend.array(np.random.default_rng(0).normal(size=(3, 2, 4, 4)))
    y, kept = model.forward(x)  # outside training: batch norms are as if they were frozen
    model.backward(y, kept)
    full = {path: backend.host(grad) for path, grad in model.named_gradients().items()}
    model.freeze(frozen)
    with without_dx(model):
        same, kept = model.forward(x)
    np.testing.assert_allclose(backend.host(same), backend.host(y), rtol=1e-12)
    before = {"a"} if "a" in frozen else set()
    before |= {"b"} if {"a", "b"} <= set(frozen) else set()
    asleep = [layer for layer in model.walk() if layer.path.split(".")[0] in before]
    for layer, cache in caches(kept):
        if any(layer is one for one in asleep):
            assert cache is None
    for layer in asleep:
        monkeypatch.setattr(type(layer), "backward", type(layer).backward)
        layer.backward = None  # type: ignore[method-assign, assignment]
    assert model.backward(y, kept, need_dx=False) is None
    grads = model.named_gradients()
    chosen = portacnn.optim.selector(frozen)
    assert grads.keys() == {path for path in full if not chosen(path, x)}
    for path, grad in grads.items():
        np.testing.assert_allclose(backend.host(grad), full[path], rtol=1e-10, atol=1e-12)


def test_a_graph_keeps_nothing_below(backend: Here):
    model = GraphModel(
        ("a", conv(), ["input"]),
        ("b", conv(), ["input"]),
        ("sum", Arithmetic("add"), ["a", "b"]),
        ("c", conv(), ["sum"]),
        ("d", conv(), ["a"]),
        ("out", Arithmetic("add"), ["c", "d"]),
    ).build((2, 4, 4), device=backend.device, dtype="float64", seed=3)
    x = backend.array(np.random.default_rng(0).normal(size=(3, 2, 4, 4)))
    y, kept = model.forward(x)
    model.backward(y, kept)
    full = {path: backend.host(grad) for path, grad in model.named_gradients().items()}
    model.freeze("a").freeze("d")
    with without_dx(model):
        y, kept = model.forward(x)
    ((_, trail),) = kept
    none = {chain.output for chain, cache in trail if cache is None}
    assert {"a", "d"} <= none
    assert not {"b", "c"} & none
    model.backward(y, kept, need_dx=False)
    assert model.named_gradients().keys() == paths_of(model, "b", "c")
    for path, grad in model.named_gradients().items():
        np.testing.assert_allclose(backend.host(grad), full[path], rtol=1e-10, atol=1e-12)


def test_the_input_gradient_may_still_be_asked(backend: Here):
    """Outside a training a forward pass keeps what it takes, frozen or not."""
    model = net(backend.device, "float64")
    x = backend.array(np.random.default_rng(0).normal(size=(3, *SHAPE)))
    y, kept = model.forward(x)
    expected = backend.host(model.backward(y, kept))
    y, kept = model.freeze().forward(x)
    assert np.array_equal(backend.host(model.backward(y, kept)), expected)
    assert model.named_gradients() == {}


class Outer(Layer):
    """A container of a user, which knows nothing of ``freeze``."""

    def __init__(self) -> None:
        self.first, self.second = Conv2d(2, 2, 1), Sequential(relu=ReLU(), conv=Conv2d(2, 2, 1))
        self.adopt("first", self.first)
        self.adopt("second", self.second)

    def infer(self, shape: Any) -> Any:
        shape = self.first.plan(shape, self.child_path("first"))
        return self.second.plan(shape, self.child_path("second"))

    def forward(self, x: Any, *, train: bool = False, keep: bool = True) -> Any:
        y, one = self.first.forward(x, train=train, keep=keep)
        y, two = self.second.forward(y, train=train, keep=keep)
        return y, (one, two)

    def backward(self, dy: Any, cache: Any, *, need_dx: bool = True) -> Any:
        one, two = cache
        return self.first.backward(self.second.backward(dy, two), one, need_dx=need_dx)


def test_a_container_that_asks_for_everything_gets_it(backend: Here):
    model = Model(outer=Outer(), flatten=Flatten(), fc=Linear(None, 4))
    model.build((2, 4, 4), device=backend.device, seed=0)
    for frozen in ([], ["second"]):
        if frozen:
            model.freeze(frozen)
        trainer(model).train()


# --- shared and tied ------------------------------------------------------------------------------


def test_a_shared_layer_is_frozen_by_any_of_its_paths(backend: Here):
    shared = Linear(4, 4)
    model = Model(flatten=Flatten(), a=Linear(None, 4), b=shared, c=Sequential(d=shared))
    model.build(SHAPE, device=backend.device, seed=0)
    before = bits(model)
    model.freeze("c.d")
    trainer(model).train()
    assert changed(model, before) == {"a.weight", "a.bias"}


def test_a_tied_parameter_is_its_owners(backend: Here):
    model = Model(flatten=Flatten(), a=Linear(None, 4), b=Linear(4, 4), c=Linear(4, 4))
    model.children["c"].tie("weight", model.children["b"], "weight")
    model.build(SHAPE, device=backend.device, seed=0)
    before = bits(model)
    model.freeze("c")
    trainer(model).train()
    assert changed(model, before) == {"a.weight", "a.bias", "b.bias"}
    model.unfreeze("b.weight")
    trainer(model).train()
    assert changed(model, before) == before.keys() - {"c.bias"}


# --- in one array ---------------------------------------------------------------------------------


@backends(having="views")
def test_no_memory_and_no_launch_for_what_is_frozen(backend: Here):
    model = net(backend.device)
    model.freeze().unfreeze("fc")
    run, calls = trainer(model), []
    apply = run.optimizer.apply

    def counted(p: Any, *rest: Any, **common: Any) -> None:
        calls.append([part.shape for part in p])
        apply(p, *rest, **common)

    run.optimizer.apply = counted  # type: ignore[method-assign]
    run.train()
    assert calls == [[(64,), (4,)]] * 6  # one call; weight and bias, each a stretch of the buffer
    (grads,) = model.named_gradients().flats
    assert grads.whole.shape == (68,)
    assert [flat.whole.shape for flat in run.optimizer._flat.values()] == [(68,)] * 2


@EACH_LIBRARY
def test_stages_of_unfreezing(backend: Here, monkeypatch: pytest.MonkeyPatch):
    """A Trainer follows: at once, with the state that each parameter has; alike whether parameters
    lie in one array or not."""

    def stages() -> tuple[Model, Trainer]:
        model = net(backend.device, "float64")
        sgd = SGD(0.01, momentum=0.9)
        model.freeze(["stem", "block"])
        run = trainer(model, epochs=1, clip_norm=1.0, optimizer=sgd)
        for more in ("block", "stem"):
            run.train()
            model.unfreeze(more)
            run.epochs += 1
        model.freeze("fc")
        run.train()
        return model, run

    model, run = stages()
    assert run.optimizer.counts["conv2.weight"] == 9
    assert run.optimizer.counts["block.conv1.weight"] == 6
    assert run.optimizer.counts["stem.conv.weight"] == 3
    assert run.optimizer.counts["fc.weight"] == 6
    monkeypatch.setattr(type(backend.backend), "views_alias", False)
    apart, _ = stages()
    for path, value in apart.state_dict().items():
        np.testing.assert_allclose(
            model.state_dict()[path], value, rtol=1e-9, atol=1e-11, err_msg=path
        )


# --- what keeps it --------------------------------------------------------------------------------


@EACH_LIBRARY
def test_copies_and_files_hold_it(backend: Here, tmp_path: Path):
    pytest.importorskip("safetensors")
    model = net(backend.device).freeze().unfreeze("fc")
    model.save(tmp_path / "net.safetensors")
    for again in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        portacnn.load(tmp_path / "net.safetensors", device=backend.device),
    ):
        before = bits(again)
        trainer(again).train()
        assert changed(again, before) == {"fc.weight", "fc.bias"}


def test_a_checkpoint_holds_it(backend: Here, tmp_path: Path):
    """Also where the caller gives the model; the rest of the training is the same to the bit."""
    pytest.importorskip("safetensors")
    straight = net(backend.device).freeze(["stem", "bn1"])
    run = trainer(straight)
    run.train()
    stopped = trainer(net(backend.device).freeze(["stem", "bn1"]), checkpoint_dir=tmp_path)
    stopped.epochs = 1
    stopped.train()
    data = patches(24, shape=SHAPE)
    for options in ({"device": backend.device}, {"model": net(backend.device)}):
        again = Trainer.resume(tmp_path, *data, epochs=2, **options)
        again.train()
        assert bits(again.model) == bits(straight)
        assert again.train_loss_list == run.train_loss_list


@pytest.mark.parametrize("frozen", [3, "fc.weight", [1], ["fc.weights"], [["fc.weight"]], {}])
def test_a_damaged_file_is_refused(tmp_path: Path, frozen: Any):
    pytest.importorskip("safetensors")
    path = tmp_path / "net.safetensors"
    net().save(path)
    tensors, header = load_tensors(path)
    save_tensors(path, tensors, {**header, "frozen": frozen})
    refuses(ModelFormatError, "frozen", call=lambda: portacnn.load(path, device="numpy"))


def test_replace_after_freeze(backend: Here):
    model = net(backend.device).freeze()
    model.replace("fc", Linear(None, 4))
    before = bits(model)
    trainer(model).train()
    assert changed(model, before) == {"fc.weight", "fc.bias"}


def test_a_move_keeps_it(backend: Here):
    model = net("numpy").freeze("stem").to(backend.device)
    before = bits(model)
    trainer(model).train()
    assert not changed(model, before) & paths_of(model, "stem")


def test_the_summary_counts():
    model = net().freeze().unfreeze("fc")
    assert model.summary().splitlines()[-1] == "trainable parameters: 68; frozen: 238"
    assert "frozen" not in model.unfreeze().summary()


# --- refusals -------------------------------------------------------------------------------------


def test_wrong_arguments_are_refused():
    model = net()
    refuses(ArgumentError, "'fd'", "fc.weight", call=lambda: model.freeze(["fc", "fd"]))
    refuses(ArgumentError, "patterns", call=lambda: model.freeze(3))  # type: ignore[arg-type]
    assert not any(layer.frozen for layer in model.walk())
    refuses(StateError, "build", call=lambda: Sequential(Linear(2, 2)).freeze())
    run = trainer(model)
    model.freeze()
    refuses(StateError, "unfreeze", call=run.train)
    refuses(StateError, "unfreeze", call=lambda: trainer(model))
    model.unfreeze("fc")
    run.train()


def test_a_part_freezes_what_is_in_it():
    model = net()
    model.block.freeze("*.bias")
    model.conv2.freeze()
    model.freeze(lambda path, array: path.startswith("stem.conv") and array.ndim > 1)
    found = {layer.full_name(name) for layer in model.walk() for name in layer.frozen}
    expected = {"block.conv1.bias", "block.bn1.bias", "conv2.weight", "conv2.bias"}
    assert found == expected | {"stem.conv.weight"}


def test_dropout_in_a_frozen_part_still_drops(backend: Here):
    model = Model(a=Conv2d(1, 2, 1), drop=Dropout(0.5), flatten=Flatten(), fc=Linear(None, 4))
    model.build(SHAPE, device=backend.device, seed=0).freeze("a")
    x = backend.array(np.ones((2, *SHAPE), "float32"))
    seen: list[Any] = []
    model.drop.on_output(lambda y: seen.append(backend.host(y)))
    model.forward(x, train=True)
    assert np.count_nonzero(seen[0]) < seen[0].size
