"""Residual and Branches: numbers against PyTorch twins and finite differences, paths, what is kept,
and refusals."""

from collections import OrderedDict

import numpy as np
import pytest

from portacnn.errors import ArgumentError, ShapeError, StateError
from portacnn.layers import (
    AvgPool2d,
    BatchNorm2d,
    Branches,
    Conv2d,
    Dropout,
    Flatten,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    ReLU,
    Residual,
    Sequential,
    Tanh,
)
from portacnn.ops.join import add, concat_channels, split_channels
from portacnn.ops.layout import pack
from portacnn.runtime import resolve
from support.checks import gradient_agrees, normal, refuses, untouched
from support.matrix import Here, needs

# --- blocks, here and in PyTorch ------------------------------------------------------------------


def basic(**k):
    return Sequential(
        conv1=Conv2d(3, 5, 3, 2, 1),
        bn1=BatchNorm2d(5),
        relu=ReLU(),
        conv2=Conv2d(5, 5, 3, padding=1),
        **k,
    )


def torch_basic(nn):
    return OrderedDict(
        conv1=nn.Conv2d(3, 5, 3, 2, 1),
        bn1=nn.BatchNorm2d(5),
        relu=nn.ReLU(),
        conv2=nn.Conv2d(5, 5, 3, padding=1),
    )


# name -> (ours, PyTorch's given torch.nn and the module twins, shape of one sample)
BLOCKS = {
    "residual": (
        lambda: Residual(Sequential(conv=Conv2d(3, 3, 3, padding=1), tanh=Tanh())),
        lambda nn, t: t.Residual(OrderedDict(conv=nn.Conv2d(3, 3, 3, padding=1), tanh=nn.Tanh())),
        (3, 4, 5),
    ),
    "projected": (
        lambda: Residual(
            basic(), Sequential(Conv2d(3, 5, 1, 2), BatchNorm2d(5)), activation=ReLU()
        ),
        lambda nn, t: t.Residual(
            torch_basic(nn), nn.Sequential(nn.Conv2d(3, 5, 1, 2), nn.BatchNorm2d(5)), nn.ReLU()
        ),
        (3, 5, 6),
    ),
    "a leaf for a body": (
        lambda: Sequential(
            block=Residual(Linear(4, 4), Linear(4, 4, bias=False), shortcut_name="skip")
        ),
        lambda nn, t: nn.Sequential(OrderedDict(block=_LeafResidual())),
        (4,),
    ),
    "a body that learns nothing": (
        lambda: Residual(AvgPool2d(3, 1, 1), Conv2d(2, 2, 1)),
        lambda nn, t: t.Residual(OrderedDict(p=nn.AvgPool2d(3, 1, 1)), nn.Conv2d(2, 2, 1)),
        (2, 3, 4),
    ),
    "a shortcut that learns nothing": (
        lambda: Residual(
            Sequential(c=Conv2d(2, 2, 3, 2, 1)), MaxPool2d(2, ceil_mode=True), activation=Tanh()
        ),
        lambda nn, t: t.Residual(
            OrderedDict(c=nn.Conv2d(2, 2, 3, 2, 1)), nn.MaxPool2d(2, ceil_mode=True), nn.Tanh()
        ),
        (2, 5, 4),
    ),
    "inception": (
        lambda: Branches(
            Conv2d(3, 2, 1),
            Sequential(Conv2d(3, 2, 1), ReLU(), Conv2d(2, 4, 3, padding=1)),
            Sequential(Conv2d(3, 1, 1), ReLU(), Conv2d(1, 3, 5, padding=2)),
            Sequential(MaxPool2d(3, 1, 1), Conv2d(3, 1, 1)),
        ),
        lambda nn, t: t.Branches(
            nn.Conv2d(3, 2, 1),
            nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 3, padding=1)),
            nn.Sequential(nn.Conv2d(3, 1, 1), nn.ReLU(), nn.Conv2d(1, 3, 5, padding=2)),
            nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(3, 1, 1)),
        ),
        (3, 4, 5),
    ),
    "added": (
        lambda: Branches(a=Conv2d(2, 2, 1), b=Tanh(), c=Sequential(), join="add"),
        lambda nn, t: t.Added(OrderedDict(a=nn.Conv2d(2, 2, 1), b=nn.Tanh(), c=nn.Identity())),
        (2, 3, 3),
    ),
    "dense": (  # DenseNet's: the input beside what is made of it
        lambda: Sequential(
            Branches(x=Sequential(), new=Linear(3, 2)), Branches(x=Sequential(), new=Linear(5, 2))
        ),
        lambda nn, t: nn.Sequential(
            *(t.Branches(OrderedDict(x=nn.Identity(), new=nn.Linear(n, 2))) for n in (3, 5))
        ),
        (3,),
    ),
    "one branch": (
        lambda: Branches(only=Conv2d(2, 3, 2)),
        lambda nn, t: t.Branches(OrderedDict(only=nn.Conv2d(2, 3, 2))),
        (2, 3, 4),
    ),
    "nested": (
        lambda: Sequential(
            stem=Conv2d(2, 4, 3, padding=1),
            block=Residual(
                Sequential(
                    inner=Residual(Sequential(conv=Conv2d(4, 4, 1), bn=BatchNorm2d(4))),
                    split=Branches(
                        Conv2d(4, 1, 1), Residual(Sequential(act=Tanh(), conv=Conv2d(4, 4, 1)))
                    ),
                ),
                Branches(Conv2d(4, 5, 1), Conv2d(4, 5, 3, padding=1), join="add"),
                activation=Branches(ReLU(), Tanh()),
            ),
            pool=GlobalAvgPool(flatten=True),
        ),
        lambda nn, t: nn.Sequential(
            OrderedDict(
                stem=nn.Conv2d(2, 4, 3, padding=1),
                block=t.Residual(
                    OrderedDict(
                        inner=t.Residual(
                            OrderedDict(conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4))
                        ),
                        split=t.Branches(
                            nn.Conv2d(4, 1, 1),
                            t.Residual(OrderedDict(act=nn.Tanh(), conv=nn.Conv2d(4, 4, 1))),
                        ),
                    ),
                    t.Added(nn.Conv2d(4, 5, 1), nn.Conv2d(4, 5, 3, padding=1)),
                    t.Branches(nn.ReLU(), nn.Tanh()),
                ),
                pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            )
        ),
        (2, 4, 3),
    ),
}
every_block = pytest.mark.parametrize("name", BLOCKS)


def _LeafResidual():  # noqa: N802
    import torch

    class LeafResidual(torch.nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.skip = torch.nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return super().forward(x) + self.skip(x)

    return LeafResidual()


def pair(here: Here, name: str, dtype: str = "float64"):
    """(torch, ours, PyTorch's), with the same weights."""
    import torch

    from support import twins

    make, make_torch, shape = BLOCKS[name]
    ours = make().build(shape, device=here.device, dtype=dtype, seed=0)
    theirs = make_torch(torch.nn, twins).to(getattr(torch, dtype))
    state = ours.state_dict()
    assert list(state) == list(theirs.state_dict())
    theirs.load_state_dict({key: torch.tensor(value) for key, value in state.items()})
    return torch, ours, theirs


# --- numbers --------------------------------------------------------------------------------------


@needs("torch")
@every_block
@pytest.mark.parametrize("mode", ["train", "frozen", "float32"])
def test_values_and_gradients_agree_with_pytorch(backend: Here, name: str, mode: str):
    dtype, tolerance = ("float32", 1e-4) if mode == "float32" else ("float64", 1e-9)
    torch, ours, theirs = pair(backend, name, dtype)
    theirs.train(mode != "frozen")
    forward = {} if mode == "frozen" else {"train": True}
    host = normal(4, *ours.input_shape).astype(dtype)
    leaf = torch.tensor(host, requires_grad=True)
    expected = theirs(leaf)
    up = normal(*expected.shape, seed=1).astype(dtype)
    expected.backward(torch.tensor(up))
    assert ours.output_shape == tuple(expected.shape[1:])
    x, dy = backend.array(host), backend.array(up)
    with untouched(backend, x, dy):
        y, cache = ours.forward(x, **forward)
        dx = ours.backward(dy, cache)
    assert (y.dtype, dx.dtype, y.device) == (x.dtype, x.dtype, x.device)
    np.testing.assert_allclose(
        backend.host(y), expected.detach().numpy(), rtol=tolerance, atol=tolerance
    )
    np.testing.assert_allclose(backend.host(dx), leaf.grad.numpy(), rtol=tolerance, atol=tolerance)
    gradients = {path: backend.host(value) for path, value in ours.named_gradients().items()}
    assert list(gradients) == [path for path, _ in theirs.named_parameters()]
    for path, parameter in theirs.named_parameters():
        np.testing.assert_allclose(
            gradients[path], parameter.grad.numpy(), rtol=tolerance, atol=tolerance
        )
    # Without dx: the same gradients, and nothing is left behind.
    for layer in ours.walk():
        layer.grads = {}
    ours.load_state_dict(
        {path: value.detach().numpy() for path, value in theirs.state_dict().items()}
    )  # batch norm has moved on: it does not show
    _, cache = ours.forward(x, **forward)
    assert ours.backward(dy, cache, need_dx=False) is None
    for path, value in ours.named_gradients().items():
        np.testing.assert_allclose(
            backend.host(value), gradients[path], rtol=tolerance, atol=tolerance
        )
    assert len(ours.named_gradients()) == len(gradients)
    assert ours.forward(x, keep=False)[1] is None


@every_block
def test_gradients_agree_with_numerical_gradients(name: str):
    backend, (make, _, shape) = Here("numpy", resolve("numpy")), BLOCKS[name]
    block = make().build(shape, device=backend.device, dtype="float64", seed=2)
    host = normal(2, *shape, seed=3)
    up = normal(2, *block.output_shape, seed=4)
    weights = backend.array(up)
    _, cache = block.forward(backend.array(host))
    dx = block.backward(weights, cache)
    gradient_agrees(backend, dx, lambda x: backend.xp.sum(block(x) * weights), host)


@every_block
def test_empty_and_single(backend: Here, name: str):
    make, _, shape = BLOCKS[name]
    block = make().build(shape, device=backend.device, dtype="float64", seed=2)
    host = normal(3, *shape)
    whole = backend.host(block(backend.array(host)))
    np.testing.assert_allclose(
        backend.host(block(backend.array(host[1:2]))), whole[1:2], rtol=1e-9, atol=1e-12
    )
    y, cache = block.forward(backend.array(host[:0]))
    assert tuple(y.shape) == (0, *block.output_shape)
    assert tuple(block.backward(y, cache).shape) == (0, *shape)


def test_joined_arrays_lie_as_the_backend_prefers(backend: Here):
    """Batch-last arrays come together, and apart, without being turned round."""
    name = backend.backend.name
    host = normal(3, 2, 4, 5)
    x = pack(backend.array(host))
    joined = concat_channels([x, x, x])
    np.testing.assert_array_equal(backend.host(joined), np.concatenate([host] * 3, axis=1))
    summed = add([x, x, x])
    np.testing.assert_allclose(backend.host(summed), host * 3)
    parts = split_channels(joined, [1, 0, 3, 2])
    assert [tuple(part.shape) for part in parts] == [(3, n, 4, 5) for n in (1, 0, 3, 2)]
    np.testing.assert_array_equal(
        np.concatenate([backend.host(part) for part in parts], axis=1), backend.host(joined)
    )
    for y in (joined, summed, parts[2]):
        if name == "numpy":
            assert y.transpose(1, 2, 3, 0).flags.c_contiguous
        if name == "torch" and y is not parts[2]:
            assert y.is_contiguous()


# --- paths ----------------------------------------------------------------------------------------


def test_paths_of_a_residual_block():
    net = Sequential(
        layer1=Sequential(
            Residual(basic(), Sequential(Conv2d(3, 5, 1, 2), BatchNorm2d(5)), activation=ReLU()),
            Residual(
                Sequential(Residual(Conv2d(5, 5, 1), Conv2d(5, 5, 1)), a=Residual(Conv2d(5, 5, 1)))
            ),
        )
    ).build((3, 6, 6), seed=0)
    assert [path for path in net.state_dict() if "bias" not in path and "_" not in path] == [
        "layer1.0.conv1.weight",
        "layer1.0.bn1.weight",
        "layer1.0.conv2.weight",
        "layer1.0.downsample.0.weight",
        "layer1.0.downsample.1.weight",
        "layer1.1.0.weight",
        "layer1.1.0.downsample.weight",
        "layer1.1.a.weight",
    ]
    shapes = {layer.path: layer.output_shape for layer in net.walk()}
    assert shapes["layer1.0"] == shapes["layer1.0.activation"] == shapes["layer1.1.a"] == (5, 3, 3)


def test_a_residual_block_as_a_network():
    net = Residual(Sequential(conv=Conv2d(1, 1, 1)), Conv2d(1, 1, 1), shortcut_name="skip").build(
        (1, 2, 2), seed=0
    )
    assert list(net.state_dict()) == ["conv.weight", "conv.bias", "skip.weight", "skip.bias"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: Residual(Sequential(downsample=Conv2d(2, 2, 1)), Conv2d(2, 2, 1)),
            ("'r.downsample'", "shortcut_name"),
        ),
        (lambda: Residual(Residual(ReLU(), ReLU()), ReLU()), ("'r.downsample'", "inner")),
        (
            lambda: Residual(Residual(ReLU(), activation=ReLU()), activation=ReLU()),
            ("'r.activation'",),
        ),
        (lambda: Residual(Sequential(x=ReLU()), Dropout(), shortcut_name="x"), ("'r.x'",)),
    ],
)
def test_two_layers_at_one_path(make, words):
    refuses(
        ArgumentError, "r (Residual)", *words, call=lambda: Sequential(r=make()).build((2, 3, 3))
    )


def test_paths_apart_by_a_name():
    net = Residual(Residual(ReLU(), Conv2d(2, 2, 1), shortcut_name="inner"), Conv2d(2, 2, 1)).build(
        (2, 1, 1), seed=0
    )
    assert list(net.state_dict()) == [
        "inner.weight",
        "inner.bias",
        "downsample.weight",
        "downsample.bias",
    ]


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: Residual(Conv2d(3, 5, 1)),
            ("b (Residual)", "(5, 4, 4)", "input itself", "(3, 4, 4)", "shortcut"),
        ),
        (
            lambda: Residual(Conv2d(3, 5, 3), Conv2d(3, 5, 1)),
            ("b (Residual)", "(5, 2, 2)", "(5, 4, 4)"),
        ),
        (
            lambda: Residual(Sequential(c=Conv2d(4, 4, 1))),
            ("b.c (Conv2d)", "4 input channels, got 3"),
        ),
        (
            lambda: Residual(ReLU(), Conv2d(4, 4, 1)),
            ("b.downsample (Conv2d)", "4 input channels, got 3"),
        ),
        (lambda: Residual(ReLU(), activation=Linear(4, 4)), ("b.activation (Linear)", "Flatten")),
        (
            lambda: Branches(Conv2d(3, 2, 1), Conv2d(3, 2, 3)),
            ("b (Branches)", "0 (2, 4, 4)", "1 (2, 2, 2)"),
        ),
        (lambda: Branches(a=ReLU(), f=Flatten()), ("b (Branches)", "a (3, 4, 4)", "f (48,)")),
        (
            lambda: Branches(ReLU(), Conv2d(3, 2, 1), join="add"),
            ("b (Branches)", "one shape", "1 (2, 4, 4)"),
        ),
        (
            lambda: Branches(ReLU(), c=Sequential(Conv2d(5, 2, 1))),
            ("b.c.0 (Conv2d)", "expected 5 input channels"),
        ),
    ],
)
def test_shapes_are_checked_when_built(make, words):
    refuses(ShapeError, *words, call=lambda: Sequential(b=make()).build((3, 4, 4)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Branches(), ("Branches", "at least one")),
        (lambda: Branches(ReLU(), join="mul"), ("Branches", "join", "concat", "add", "'mul'")),
        (lambda: Branches(ReLU(), 3), ("Branches", "'1' must be a layer")),
        (lambda: Residual(None), ("Residual", "'body' must be a layer")),
        (lambda: Residual(ReLU(), "x"), ("Residual", "'downsample' must be a layer")),
        (lambda: Residual(ReLU(), activation=Tanh), ("Residual", "'activation' must be a layer")),
        (lambda: Residual(ReLU(), ReLU(), shortcut_name="body"), ("two layers called 'body'",)),
    ],
)
def test_arguments_out_of_range_are_refused(make, words):
    refuses(ArgumentError, *words, call=make)


def test_nothing_is_broadcast(backend: Here):
    """A batch of another size than the network was built for: what no longer fits is refused, not
    stretched."""
    net = Sequential(r=Residual(Conv2d(2, 2, 3), Sequential(AvgPool2d(3)))).build(
        (2, 3, 3), device=backend.device, seed=0
    )
    x = backend.array(normal(1, 2, 6, 6), "float32")
    refuses(ShapeError, "r (Residual)", "1x2x4x4", "1x2x2x2", call=lambda: net(x))
    net = Sequential(b=Branches(Conv2d(2, 2, 3), AvgPool2d(3))).build(
        (2, 3, 3), device=backend.device, seed=0
    )
    refuses(ShapeError, "b (Branches)", "1x2x4x4", "1x2x2x2", call=lambda: net(x))
    _, cache = net.forward(backend.array(normal(1, 2, 3, 3), "float32"))
    dy = backend.array(normal(1, 5, 1, 1), "float32")
    refuses(
        ShapeError,
        "b (Branches)",
        "expected 4 channels",
        "1x5x1x1",
        call=lambda: net.backward(dy, cache),
    )


def test_backward_needs_a_forward(backend: Here):
    dy = backend.array(normal(1, 2, 3, 3), "float32")
    for make in (
        lambda: Residual(Conv2d(2, 2, 1)),
        lambda: Residual(Sequential(), activation=ReLU()),
        lambda: Branches(ReLU(), join="add"),
        lambda: Branches(Sequential()),
    ):
        block = make().build((2, 3, 3), device=backend.device, seed=0)
        refuses(StateError, "keep=True", call=lambda block=block: block.backward(dy, None))
        _, cache = block.forward(dy)
        block.backward(dy, cache)
        refuses(
            StateError,
            "has been used",
            call=lambda block=block, cache=cache: block.backward(dy, cache),
        )


def test_errors_inside_say_where(backend: Here):
    net = Sequential(r=Residual(Sequential(bn=BatchNorm2d(2)))).build(
        (2, 1, 1), device=backend.device, seed=0
    )
    one = backend.array(normal(1, 2, 1, 1), "float32")
    refuses(
        ShapeError, "r.bn (BatchNorm2d)", "more than 1", call=lambda: net.forward(one, train=True)
    )
