"""Layers with running statistics, options or chance in them: numbers and state against PyTorch's
layers, step by step."""

from typing import Any

import numpy as np
import pytest

from portacnn import layers
from portacnn.errors import ArgumentError, ModelFormatError, ShapeError, StateError
from portacnn.layers import (
    BatchNorm1d,
    BatchNorm2d,
    Conv2d,
    Flatten,
    InstanceNorm2d,
    Linear,
    ReLU,
    Sequential,
)
from portacnn.models import Model, load
from portacnn.runtime import resolve
from support.checks import normal, refuses
from support.matrix import Here, needs

# Every layer of this norms and activations, with PyTorch's own arguments, and the shape of
# one sample.
CASES = [
    ("BatchNorm1d", (4,), {}, (4,)),
    ("BatchNorm1d", (4,), {"affine": False, "momentum": 0.4}, (4, 3)),
    ("BatchNorm2d", (3,), {"eps": 0.1, "momentum": None}, (3, 2, 3)),
    ("BatchNorm2d", (3, 1e-3, 0.7), {"track_running_stats": False}, (3, 2, 3)),
    ("BatchNorm3d", (2,), {}, (2, 2, 3, 2)),
    ("InstanceNorm1d", (3,), {}, (3, 5)),
    ("InstanceNorm2d", (3,), {"affine": True}, (3, 2, 3)),
    (
        "InstanceNorm2d",
        (3,),
        {"affine": True, "track_running_stats": True, "momentum": 0.3},
        (3, 2, 3),
    ),
    ("InstanceNorm3d", (2,), {"track_running_stats": True}, (2, 2, 1, 3)),
    ("GroupNorm", (2, 4), {}, (4, 2, 3)),
    ("GroupNorm", (4, 4), {"affine": False}, (4, 3)),
    ("GroupNorm", (1, 6, 0.01), {}, (6,)),
    ("LayerNorm", (5,), {}, (5,)),
    ("LayerNorm", ((3, 2, 2),), {"eps": 0.01}, (3, 2, 2)),
    ("LayerNorm", ((2,),), {"bias": False}, (3, 2, 2)),
    ("LayerNorm", ([2, 2],), {"elementwise_affine": False}, (3, 2, 2)),
    ("LocalResponseNorm", (3,), {"alpha": 0.5}, (5, 2, 3)),
    ("LocalResponseNorm", (4, 0.1, 0.5, 2), {}, (5, 3)),
    ("LeakyReLU", (), {}, (3, 4)),
    ("LeakyReLU", (0.3,), {}, (3, 4)),
    ("ELU", (), {}, (3, 4)),
    ("ELU", (0.7,), {}, (3,)),
    ("Tanh", (), {}, (3, 4)),
    ("SiLU", (), {}, (3, 2, 4)),
    ("GELU", (), {}, (3, 4)),
    ("GELU", ("tanh",), {}, (3, 4)),
    ("Softplus", (), {}, (3, 4)),
    ("Softplus", (2.0, 1.0), {}, (3, 4)),
    ("Softmax", (1,), {}, (5,)),
    ("Softmax", (), {"dim": -2}, (3, 4)),
    ("LogSoftmax", (1,), {}, (4, 2, 2)),
]
every = pytest.mark.parametrize(
    ("kind", "args", "kwargs", "shape"),
    CASES,
    ids=[f"{case[0]}{i}" for i, case in enumerate(CASES)],
)


def twins(
    here: Here, kind: str, args: tuple, kwargs: dict, shape: tuple, dtype: str = "float64"
) -> tuple[Any, Any, Any]:
    """(torch, our layer, PyTorch's), with the same drawn weights and statistics."""
    import torch

    ours = getattr(layers, kind)(*args, **kwargs).build(
        shape, device=here.device, dtype=dtype, seed=0
    )
    theirs = getattr(torch.nn, kind)(*args, **kwargs).to(getattr(torch, dtype))
    state = {}
    for number, (name, value) in enumerate(theirs.state_dict().items()):
        drawn = normal(*value.shape, seed=number) ** 2 + 0.1
        state[name] = np.asarray(
            7 if "num_" in name else drawn, dtype=str(value.dtype).removeprefix("torch.")
        )
    theirs.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    ours.load_state_dict(state)
    return torch, ours, theirs


def same_state(here: Here, ours: Any, theirs: Any, tolerance: float = 1e-9) -> None:
    expected = {name: value.numpy() for name, value in theirs.state_dict().items()}
    got = ours.state_dict()
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape), name
        np.testing.assert_allclose(got[name], value, rtol=tolerance, atol=tolerance)


@needs("torch")
@every
def test_three_training_steps_and_a_look(
    backend: Here, kind: str, args: tuple, kwargs: dict, shape: tuple
):
    torch, ours, theirs = twins(backend, kind, args, kwargs, shape)
    same_state(backend, ours, theirs)
    for step in range(3):
        host, up = 2 + normal(4, *shape, seed=step), normal(4, *shape, seed=step + 10)
        leaf = torch.tensor(host, requires_grad=True)
        theirs.zero_grad()
        expected = theirs.train()(leaf)
        expected.backward(torch.tensor(up))
        got, cache = ours.forward(backend.array(host), train=True)
        dx = ours.backward(backend.array(up), cache)
        np.testing.assert_allclose(
            backend.host(got), expected.detach().numpy(), rtol=1e-9, atol=1e-9
        )
        np.testing.assert_allclose(backend.host(dx), leaf.grad.numpy(), rtol=1e-9, atol=1e-9)
        for name, parameter in theirs.named_parameters():
            np.testing.assert_allclose(
                backend.host(ours.grads[name]), parameter.grad.numpy(), rtol=1e-9, atol=1e-9
            )
        same_state(backend, ours, theirs)
    expected = theirs.eval()(torch.tensor(host))
    np.testing.assert_allclose(
        backend.host(ours(backend.array(host))), expected.detach().numpy(), rtol=1e-9, atol=1e-9
    )
    same_state(backend, ours, theirs)
    refuses(
        StateError,
        "expected a cache, got None",
        call=lambda: ours.backward(backend.array(up), None),
    )


@needs("torch")
@every
def test_frozen_layers_train(backend: Here, kind: str, args: tuple, kwargs: dict, shape: tuple):
    """keep=True without train: PyTorch's eval mode with gradients."""
    torch, ours, theirs = twins(backend, kind, args, kwargs, shape)
    host, up = normal(3, *shape), normal(3, *shape, seed=1)
    leaf = torch.tensor(host, requires_grad=True)
    theirs.eval()(leaf).backward(torch.tensor(up))
    _, cache = ours.forward(backend.array(host))
    dx = ours.backward(backend.array(up), cache)
    np.testing.assert_allclose(backend.host(dx), leaf.grad.numpy(), rtol=1e-9, atol=1e-9)
    for name, parameter in theirs.named_parameters():
        np.testing.assert_allclose(
            backend.host(ours.grads[name]), parameter.grad.numpy(), rtol=1e-9, atol=1e-9
        )
    same_state(backend, ours, theirs)


@needs("torch")
@every
def test_float32_stays_float32(backend: Here, kind: str, args: tuple, kwargs: dict, shape: tuple):
    torch, ours, theirs = twins(backend, kind, args, kwargs, shape, "float32")
    host = normal(4, *shape).astype("float32")
    x = backend.array(host)
    y, cache = ours.forward(x, train=True)
    dx = ours.backward(y, cache)
    assert (y.dtype, dx.dtype, y.device) == (x.dtype, x.dtype, x.device)
    expected = theirs.train()(torch.tensor(host)).detach().numpy()
    np.testing.assert_allclose(backend.host(y), expected, rtol=1e-4, atol=1e-4)
    same_state(backend, ours, theirs, 1e-4)


@every
def test_a_layer_says_how_it_was_made(kind: str, args: tuple, kwargs: dict, shape: tuple):
    layer = getattr(layers, kind)(*args, **kwargs)
    positional, named = layer.arguments()
    again = type(layer)(*positional, **named)
    assert repr(again) == repr(layer)
    assert repr(layer).startswith(kind)


# --- buffers --------------------------------------------------------------------------------------


def net() -> Model:
    return Model(
        conv=Conv2d(1, 3, 3),
        bn=BatchNorm2d(None),
        relu=ReLU(),
        flatten=Flatten(),
        fc=Linear(None, 4),
        norm=BatchNorm1d(4),
    )


def trained(here: Here) -> Model:
    model = net().build((1, 4, 5), device=here.device, seed=0)
    for step in range(2):
        model(here.array(normal(5, 1, 4, 5, seed=step), "float32"), train=True)
    return model


def bits(model: Any) -> dict:
    return {
        path: (value.dtype, value.shape, value.tobytes())
        for path, value in model.state_dict().items()
    }


def test_buffers_have_pytorchs_names_and_order(backend: Here):
    state = trained(backend).state_dict()
    tail = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert list(state) == [
        "conv.weight", "conv.bias", *(f"bn.{n}" for n in tail), "fc.weight", "fc.bias",
        *(f"norm.{n}" for n in tail)
    ]  # fmt: skip
    for name in ("bn", "norm"):
        count = state[f"{name}.num_batches_tracked"]
        assert (count.dtype, count.shape, int(count)) == (np.dtype("int64"), (), 2)
    assert "bn.running_mean" not in trained(backend).named_parameters()


def test_buffers_travel(backend: Here, tmp_path):
    model = trained(backend)
    before = bits(model)
    again = net().build((1, 4, 5), device=backend.device, seed=5)
    again.load_state_dict(model.state_dict())
    assert bits(again) == before
    assert bits(model.to("numpy")) == before
    assert bits(model.to(resolve("array_api_strict:device1"))) == before
    assert bits(model.to(backend.device)) == before
    model.save(tmp_path / "m.safetensors")
    assert bits(load(tmp_path / "m.safetensors", device=backend.device)) == before
    state = model.state_dict()
    del state["bn.running_var"]
    refuses(ModelFormatError, "missing: bn.running_var", call=lambda: again.load_state_dict(state))
    assert bits(again) == before


def test_buffers_keep_their_arrays(backend: Here):
    model = trained(backend)
    held = dict(model.children["bn"].buffers)
    model(backend.array(normal(5, 1, 4, 5), "float32"), train=True)
    assert all(model.children["bn"].buffers[name] is array for name, array in held.items())


def test_a_new_build_starts_anew(backend: Here):
    model = trained(backend)
    model.build((1, 5, 4), device=backend.device, seed=0)
    state = model.state_dict()
    assert (state["bn.running_mean"] == 0).all()
    assert (state["bn.running_var"] == 1).all()
    assert state["bn.num_batches_tracked"] == 0
    with pytest.raises(ShapeError):
        model.build((1, 1, 1))
    assert bits(model) == {path: (v.dtype, v.shape, v.tobytes()) for path, v in state.items()}


def test_empty_batches_count_for_nothing(backend: Here):
    for momentum in (0.1, None):
        layer = BatchNorm2d(2, momentum=momentum).build((2, 3, 3), device=backend.device, seed=0)
        layer(backend.array(normal(4, 2, 3, 3), "float32"), train=True)
        before = bits(layer)
        y, cache = layer.forward(backend.array(np.zeros((0, 2, 3, 3)), "float32"), train=True)
        assert tuple(y.shape) == (0, 2, 3, 3)
        assert tuple(layer.backward(y, cache).shape) == (0, 2, 3, 3)
        assert bits(layer) == before


def test_a_refused_batch_changes_nothing(backend: Here):
    model = Sequential(bn=BatchNorm2d(2)).build((2, 1, 1), device=backend.device, seed=0)
    before = bits(model)
    one = backend.array(normal(1, 2, 1, 1), "float32")
    refuses(
        ShapeError, "bn (BatchNorm2d)", "more than 1", call=lambda: model.forward(one, train=True)
    )
    assert bits(model) == before
    model(one)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "args", "kwargs", "words"),
    [
        ("BatchNorm2d", (0,), {}, ("num_features", "0")),
        ("BatchNorm2d", (3.5,), {}, ("num_features", "3.5")),
        ("BatchNorm1d", (3,), {"eps": -1.0}, ("eps", "-1.0")),
        ("BatchNorm3d", (3,), {"momentum": 1.5}, ("momentum", "1.5")),
        ("InstanceNorm2d", (3,), {"momentum": None}, ("momentum", "None")),
        ("GroupNorm", (3, 4), {}, ("4 channels", "3 groups")),
        ("GroupNorm", (0, 4), {}, ("num_groups", "0")),
        ("LayerNorm", ((),), {}, ("normalized_shape", "()")),
        ("LayerNorm", ((3, 0),), {}, ("normalized_shape", "(3, 0)")),
        ("LocalResponseNorm", (0,), {}, ("size", "0")),
        ("LocalResponseNorm", (2,), {"k": "1"}, ("k must", "'1'")),
        ("LeakyReLU", ("0.1",), {}, ("negative_slope",)),
        ("ELU", (float("nan"),), {}, ("alpha", "nan")),
        ("GELU", ("fast",), {}, ("approximate", "'fast'")),
        ("Softplus", (-1,), {}, ("beta", "-1")),
        ("Softmax", (None,), {}, ("dim", "None")),
        ("LogSoftmax", (0.5,), {}, ("dim", "0.5")),
    ],
)
def test_constructors_check_their_numbers(kind: str, args: tuple, kwargs: dict, words: tuple):
    refuses(ArgumentError, kind, *words, call=lambda: getattr(layers, kind)(*args, **kwargs))


@pytest.mark.parametrize(
    ("kind", "args", "shape", "words"),
    [
        ("BatchNorm1d", (3,), (3, 2, 2), ("(C,) or (C, L)", "(3, 2, 2)")),
        ("BatchNorm2d", (3,), (4, 2, 2), ("3 channels", "4")),
        ("BatchNorm3d", (None,), (4, 2, 2), ("(C, D, H, W)",)),
        ("InstanceNorm1d", (3,), (3,), ("(C, L)", "(3,)")),
        ("GroupNorm", (3, None), (4, 2), ("4 channels", "3 groups")),
        ("GroupNorm", (2, 4), (6, 2), ("4 channels", "6")),
        ("LayerNorm", (4,), (4, 3), ("(4,)", "(4, 3)")),
        ("LayerNorm", ((2, 4, 3),), (4, 3), ("(2, 4, 3)", "(4, 3)")),
        ("LocalResponseNorm", (2,), (4,), ("(C, *S)", "(4,)")),
        ("Softmax", (3,), (2, 3), ("dim=3", "-3..2")),
    ],
)
def test_shapes_are_checked_when_a_network_is_built(
    kind: str, args: tuple, shape: tuple, words: tuple
):
    model = Sequential(here=getattr(layers, kind)(*args))
    refuses(ShapeError, f"here ({kind})", *words, call=lambda: model.build(shape))


def test_not_built_yet(backend: Here):
    for layer in (BatchNorm2d(2), InstanceNorm2d(2)):
        refuses(
            StateError,
            "not built",
            call=lambda layer=layer: layer(backend.array(normal(2, 2, 2, 2))),
        )


def test_without_a_momentum_every_batch_counts_alike(backend: Here):
    """By hand: the plain average of the batches' means and unbiased variances; an empty batch and a
    prediction do not count."""
    norm = BatchNorm2d(2, momentum=None).build(
        (2, 3, 2), device=backend.device, dtype="float64", seed=0
    )
    batches = [1 + normal(4, 2, 3, 2, seed=seed) for seed in range(3)]
    for x in (batches[0], batches[0][:0], *batches[1:]):
        norm.forward(backend.array(x), train=True)
        norm.forward(backend.array(x + 5))
    means = np.mean([x.mean(axis=(0, 2, 3)) for x in batches], axis=0)
    variances = np.mean([x.var(axis=(0, 2, 3)) for x in batches], axis=0) * 24 / 23
    state = norm.state_dict()
    np.testing.assert_allclose(state["running_mean"], means, rtol=1e-9)
    np.testing.assert_allclose(state["running_var"], variances, rtol=1e-9)
    assert state["num_batches_tracked"] == 3
