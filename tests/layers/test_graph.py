"""Graphs, and the layers that they are made of beside those of Sequential. The oracle is PyTorch in
float64."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portacnn
from portacnn import layers as L
from portacnn.errors import ArgumentError, ArrayError, ShapeError, StateError
from portacnn.layers import Graph
from portacnn.models import GraphModel
from support.checks import agree, laid_out, normal, refuses, untouched
from support.matrix import Here, backends

torch = pytest.importorskip("torch")
F = torch.nn.functional


def small(*shape: int, seed: int = 0) -> np.ndarray:
    """Between 0.2 and 2.2: where every function has a derivative."""
    return 0.2 + 2.0 * np.random.default_rng(seed).random(shape)


def filled(layer: Any, here: Here, seed: int = 9) -> dict[str, np.ndarray]:
    """Give a built layer's parameters and buffers other numbers than their first ones; gives
    those."""
    state = {
        path: small(*array.shape, seed=seed + i)
        for i, (path, array) in enumerate(layer.state_dict().items())
    }
    layer.load_state_dict(state)
    return state


def checked(
    here: Here, network: Any, host: np.ndarray, twin: Callable[..., Any], layout: str = "packed"
) -> None:
    """Value and all gradients of a built network are those of ``twin(x, **state)`` in torch."""
    state = filled(network, here)
    x = laid_out(here, host, "float64", layout)
    tx = torch.tensor(host, requires_grad=True)
    names = list(network.named_parameters())
    tstate = {
        name: torch.tensor(value, requires_grad=name in names) for name, value in state.items()
    }
    ty = twin(tx, *tstate.values())
    up = normal(*ty.shape, seed=5)
    ty.backward(torch.tensor(up))
    with untouched(here, x):
        y, cache = network.forward(x, train=True)
        agree(here, y, ty.detach().numpy(), x)
        dx = network.backward(here.array(up, "float64"), cache)
    agree(here, dx, tx.grad.numpy(), x)
    for name in names:
        agree(here, network.named_gradients()[name], tstate[name].grad.numpy(), x)
    # Without dx, and without keeping.
    _, cache = network.forward(x)
    network.backward(here.array(up, "float64"), cache, need_dx=False)
    for name in names:
        agree(here, network.named_gradients()[name], tstate[name].grad.numpy(), x)
    agree(here, network.prepare(x)(x), ty.detach().numpy(), x)
    dy = here.array(up, "float64")
    refuses(StateError, "expected", "keep=True", call=lambda: network.backward(dy, None))


ONE = [
    (L.SELU(), F.selu),
    (L.SELU(1.2, 0.7), lambda x: 0.7 * F.elu(x, 1.2)),
    # torch's own is in float32
    (L.CELU(0.6), lambda x: torch.where(x > 0, x, 0.6 * torch.expm1(x / 0.6))),
    (L.HardSigmoid(), lambda x: torch.clamp(x / 6 + 0.5, 0, 1)),
    (L.HardSigmoid(0.2, 0.5), lambda x: torch.clamp(0.2 * x + 0.5, 0, 1)),
    (L.HardSwish(), F.hardswish),
    (L.Clip(-0.5, 0.7), lambda x: torch.clamp(x, -0.5, 0.7)),
    (L.Clip(None, 0.7), lambda x: torch.clamp(x, max=0.7)),
    (L.Clip(0), lambda x: torch.clamp(x, min=0)),
    (L.Clip(), lambda x: x),
    (L.PReLU(), F.prelu),
    (L.PReLU((3, 1, 1)), lambda x, w: F.prelu(x, w.reshape(-1))),
    (L.PReLU((3, 4, 5)), lambda x, w: torch.where(x > 0, x, w * x)),
    (L.Elementwise("mish"), F.mish),
    (L.Elementwise("softsign"), F.softsign),
    (L.Elementwise("erf"), torch.erf),
    (L.Elementwise("exp"), torch.exp),
    (L.Elementwise("abs"), torch.abs),
    (L.Elementwise("negative"), torch.neg),
    (L.Elementwise("sin"), torch.sin),
    (L.Elementwise("cos"), torch.cos),
    (L.Elementwise("reciprocal"), torch.reciprocal),
    (L.Reshape((5, 12)), lambda x: x.reshape(-1, 5, 12)),
    (L.Permute((0, 2, 3, 1)), lambda x: x.permute(0, 2, 3, 1)),
    (L.MergeIntoBatch(3), lambda x: x.flatten(0, 1)),
    (L.Sequential(L.MergeIntoBatch(3), L.Softmax(1), L.SplitFromBatch(3)), lambda x: x.softmax(2)),
    (L.Pad(((0, 0), (1, 2), (0, 3)), "zeros", 1.5), lambda x: F.pad(x, (0, 3, 1, 2), value=1.5)),
    (L.Pad(((0, 0), (1, 2), (0, 3)), "reflect"), lambda x: F.pad(x, (0, 3, 1, 2), mode="reflect")),
    (L.Slice((0, 1, 0), (2, 4, 5), (1, 2, 3)), lambda x: x[:, 0:2, 1:4:2, 0:5:3]),
    (L.Take([2, 0, 0, 1], 3), lambda x: x[..., [2, 0, 0, 1]]),
    (L.Take([1], 1), lambda x: x[:, 1:2]),
    (L.Reduce("mean", (1, 3)), lambda x: x.mean((1, 3))),
    (L.Reduce("sum", (2,), keepdims=True), lambda x: x.sum(2, keepdim=True)),
    (L.MatMulWith(6), torch.matmul),
    (L.AvgPool2d(2, 1, dilation=2), lambda x: _dilated_mean(x)),
    *(
        (L.ArithmeticWith(kind, (3, 1, 1)), function)
        for kind, function in [("add", torch.add), ("multiply", torch.mul)]
    ),
    (L.ArithmeticWith("subtract", (5,), constant_first=True), lambda x, c: c - x),
    (L.ArithmeticWith("divide", (4, 1)), torch.div),
    (L.ArithmeticWith("divide", (), constant_first=True, learn=False), lambda x, c: c / x),
    (L.ArithmeticWith("maximum", (3, 1, 5)), torch.maximum),
    (L.ArithmeticWith("add", (3, 1, 1), learn=False), torch.add),
]


def _dilated_mean(x: Any) -> Any:
    return (x[:, :, :-2, :-2] + x[:, :, 2:, :-2] + x[:, :, :-2, 2:] + x[:, :, 2:, 2:]) / 4


@pytest.mark.parametrize(
    ("layer", "twin"), ONE, ids=lambda a: repr(a) if isinstance(a, L.Layer) else ""
)
@pytest.mark.parametrize("layout", ["packed", "batch_last"])
def test_layers_of_one_value(backend: Here, layer: Any, twin: Callable[..., Any], layout: str):
    fresh = copy.deepcopy(layer)
    fresh.build((3, 4, 5), device=backend.device, dtype="float64", seed=0)
    checked(backend, fresh, normal(2, 3, 4, 5), twin, layout)


def test_the_gradient_of_a_taken_cell_is_its_own(backend: Here):
    """An infinite one, too, stays where it belongs; a cell that nobody takes gets 0."""
    layer: Any = L.Take([2, 0, 2, 2], 1).build((4, 2), device=backend.device, seed=0)
    _, cache = layer.forward(backend.array(normal(1, 4, 2), "float32"), train=True)
    dy = np.array([[[1, 2], [np.inf, 3], [4, 5], [6, np.nan]]], "float32")
    dx = backend.host(layer.backward(backend.array(dy), cache))
    np.testing.assert_array_equal(dx, [[[np.inf, 3], [0, 0], [11, np.nan], [0, 0]]])


@pytest.mark.parametrize(
    ("layer", "twin"),
    [
        (L.Elementwise("log"), torch.log),
        (L.Elementwise("sqrt"), torch.sqrt),
        (L.ArithmeticWith("power", ()), torch.pow),
        (L.ArithmeticWith("power", (3, 1, 1), constant_first=True), lambda x, c: c**x),
    ],
    ids=lambda a: repr(a) if isinstance(a, L.Layer) else "",
)
def test_layers_of_positive_values(backend: Here, layer: Any, twin: Callable[..., Any]):
    fresh = copy.deepcopy(layer)
    fresh.build((3, 4, 5), device=backend.device, dtype="float64", seed=0)
    checked(backend, fresh, small(2, 3, 4, 5), twin)


TWO = [
    *(
        (L.Arithmetic(kind), function)
        for kind, function in [
            ("add", torch.add),
            ("subtract", torch.sub),
            ("multiply", torch.mul),
            ("divide", torch.div),
            ("power", torch.pow),
            ("maximum", torch.maximum),
            ("minimum", torch.minimum),
        ]
    ),
    (L.Concat(), lambda a, b: torch.cat((a, b), 1)),
    (L.Concat(3), lambda a, b: torch.cat((a, b), 3)),
]


@pytest.mark.parametrize(
    ("layer", "twin"), TWO, ids=lambda a: repr(a) if isinstance(a, L.Layer) else ""
)
def test_joins(backend: Here, layer: Any, twin: Callable[..., Any]):
    """Of a value and of a function of it, whose gradients come together again."""
    fresh = copy.deepcopy(layer)
    graph = Graph(
        ("e", L.Elementwise("sqrt"), ["input"]),
        ("s", L.Sigmoid(), ["input"]),
        ("j", fresh, ["e", "s"]),
    ).build((3, 4, 5), device=backend.device, dtype="float64", seed=0)
    checked(backend, graph, small(2, 3, 4, 5), lambda x: twin(torch.sqrt(x), torch.sigmoid(x)))


def test_joins_broadcast(backend: Here):
    graph = Graph(
        ("mean", L.GlobalAvgPool(), ["input"]),
        ("gate", L.Sigmoid(), ["mean"]),
        ("scaled", L.Arithmetic("multiply"), ["input", "gate"]),
        ("less", L.Arithmetic("subtract"), ["mean", "scaled"]),
    ).build((3, 4, 5), device=backend.device, dtype="float64", seed=0)

    def twin(x: Any) -> Any:
        mean = x.mean((2, 3), keepdim=True)
        return mean - x * torch.sigmoid(mean)

    checked(backend, graph, normal(2, 3, 4, 5), twin)


def test_products_of_values_are_correct(backend: Here):
    graph = Graph(
        ("t", L.Permute((0, 1, 3, 2)), ["input"]), ("m", L.MatMul(), ["t", "input"])
    ).build((3, 4, 5), device=backend.device, dtype="float64", seed=0)
    checked(backend, graph, normal(2, 3, 4, 5), lambda x: x.transpose(2, 3) @ x)
    assert graph.children["m"].multiply_adds() == 3 * 5 * 5 * 4


def test_equal_values_share_the_gradient_of_a_maximum(backend: Here):
    graph = Graph(("m", L.Arithmetic("maximum"), ["input", "input"])).build(
        (4,), device=backend.device, dtype="float64"
    )
    checked(backend, graph, normal(2, 4), lambda x: torch.maximum(x, x))


def branching() -> tuple[Any, ...]:
    return (
        ("stem.conv", L.Conv2d(2, 4, 3, padding=1), ["input"]),
        ("stem.relu", L.ReLU(), ["stem.conv"]),
        ("pool", L.MaxPool2d(2), ["stem.relu"]),
        ("left", L.Conv2d(4, 4, 1), ["pool"]),
        ("right", L.Conv2d(4, 4, 3, padding=1), ["pool"]),
        ("norm", L.BatchNorm2d(4), ["right"]),
        ("sum", L.Arithmetic("add"), ["left", "norm"]),
        ("again", L.Arithmetic("multiply"), ["sum", "pool"]),
        ("all", L.Concat(), ["again", "left", "pool"]),
        ("flat", L.Flatten(), ["all"]),
        ("fc", L.Linear(None, 3), ["flat"]),
    )


class Twin(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.ModuleDict({"conv": torch.nn.Conv2d(2, 4, 3, padding=1)})
        self.left, self.right = torch.nn.Conv2d(4, 4, 1), torch.nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.fc = torch.nn.BatchNorm2d(4), torch.nn.Linear(12 * 9, 3)

    def forward(self, x: Any) -> Any:
        pool = F.max_pool2d(torch.relu(self.stem["conv"](x)), 2)
        left = self.left(pool)
        joined = torch.cat([(left + self.norm(self.right(pool))) * pool, left, pool], 1)
        return self.fc(joined.flatten(1))


def test_a_branching_graph(backend: Here):
    """State by torch's own names, values and gradients in training and out of it."""
    graph = Graph(*branching()).build((2, 6, 6), device=backend.device, dtype="float64", seed=3)
    twin = Twin().double()
    assert set(twin.state_dict()) == set(graph.state_dict())
    twin.load_state_dict({name: torch.tensor(array) for name, array in graph.state_dict().items()})
    host, up = normal(3, 2, 6, 6), normal(3, 3, seed=1)
    x = backend.array(host, "float64")
    for train in (True, False):
        twin.train(train).zero_grad()
        tx = torch.tensor(host, requires_grad=True)
        ty = twin(tx)
        ty.backward(torch.tensor(up))
        y, cache = graph.forward(x, train=train)
        agree(backend, y, ty.detach().numpy(), x)
        agree(backend, graph.backward(backend.array(up, "float64"), cache), tx.grad.numpy(), x)
        for name, parameter in twin.named_parameters():
            agree(backend, graph.named_gradients()[name], parameter.grad.numpy(), x)
    agree(backend, graph.prepare(x)(x), ty.detach().numpy(), x)


def test_a_graph_is_trained_saved_and_moved(backend: Here, tmp_path: Path):
    model = GraphModel(*branching()).build(
        (2, 6, 6), device=backend.device, dtype="float64", seed=3
    )
    x, t = normal(40, 2, 6, 6), np.arange(40) % 3
    x[np.arange(40), 0, t, t] += 6.0
    trainer = portacnn.Trainer(
        model,
        x,
        t,
        x,
        t,
        epochs=12,
        mini_batch_size=20,
        optimizer="momentum",
        optimizer_param={"lr": 0.01},
        verbose=False,
    )
    trainer.train()
    assert trainer.train_acc_list[-1] >= 0.9
    model.save(tmp_path / "m.safetensors")
    again = portacnn.load(tmp_path / "m.safetensors", device="numpy")
    assert type(again) is GraphModel
    assert list(again.state_dict()) == list(model.state_dict())
    for n in (3, 40):  # by a prepared way, and by a forward
        np.testing.assert_allclose(
            again.predict(x[:n]), backend.host(model.predict(x[:n])), rtol=1e-9, atol=1e-9
        )
    model.to("numpy")
    np.testing.assert_allclose(again.predict(x), model.predict(x), rtol=1e-9, atol=1e-9)
    assert "stem.conv" in again.summary()
    assert "Graph " not in again.summary().split("\n", 1)[1]


@backends("numpy")
def test_a_numerical_gradient(backend: Here):
    model = GraphModel(*branching()).build(
        (2, 6, 6), device=backend.device, dtype="float64", seed=3
    )
    x, t = normal(4, 2, 6, 6), np.array([0, 1, 2, 0])
    by_hand, backward = model.numerical_gradient(x, t), model.gradient(x, t)
    for path, expected in by_hand.items():
        np.testing.assert_allclose(backward[path], expected, rtol=1e-5, atol=1e-8, err_msg=path)


def test_what_nobody_asks_for_is_left_out(backend: Here):
    """No gradient goes into a part that learns nothing when nobody asks for dx."""

    class Watched(L.ReLU):
        asked: int = 0

        def backward(self, dy: Any, cache: Any, *, need_dx: bool = True) -> Any:
            Watched.asked += 1
            return super().backward(dy, cache, need_dx=need_dx)

    graph = Graph(
        ("first", Watched(), ["input"]),
        ("two", L.Arithmetic("add"), ["first", "input"]),
        ("fc", L.Linear(None, 2), ["two"]),
    ).build((4,), device=backend.device, dtype="float64", seed=0)
    x, up = backend.array(normal(3, 4), "float64"), backend.array(normal(3, 2), "float64")
    _, cache = graph.forward(x, train=True)
    assert graph.backward(up, cache, need_dx=False) is None
    assert Watched.asked == 0
    assert set(graph.named_gradients()) == {"fc.weight", "fc.bias"}
    refuses(StateError, "has been used", call=lambda: graph.backward(up, cache))
    _, cache = graph.forward(x, train=True)
    assert graph.backward(up, cache) is not None
    assert Watched.asked == 1
    L.Layer.known.pop(Watched.kind())


def test_errors_say_where(backend: Here):
    graph = Graph(("a", L.ReLU(), ["input"]), ("b.c", L.Linear(4, 2), ["a"]))
    refuses(
        ShapeError,
        "b.c (Linear)",
        "expected 4",
        call=lambda: graph.build((5,), device=backend.device),
    )
    graph.build((4,), device=backend.device)
    refuses(
        ArrayError,
        "b.c (Linear)",
        "float64",
        call=lambda: graph(backend.array(normal(2, 4), "float64")),
    )


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([], "at least one"),
        ([("a", L.ReLU)], "expected nodes"),
        ([("a", "relu", ["input"])], "must be a layer"),
        ([("", L.ReLU, ["input"])], "empty"),
        ([("input", L.ReLU, ["input"])], "input"),
        ([("a", L.ReLU, "input")], "list of names"),
        ([("a", L.ReLU, ["b"])], "not an earlier node"),
        ([("a", L.ReLU, ["a"])], "not an earlier node"),
        ([("a", L.ReLU, ["input"]), ("a", L.ReLU, ["a"])], "two nodes"),
        ([("a", L.ReLU, ["input", "input"])], "takes one input"),
        ([("a", L.MatMul, ["input"])], "expected 2 inputs"),
        ([("a", L.ReLU, ["input"]), ("b", L.ReLU, ["input"])], "is not used"),
    ],
)
def test_bad_graphs_are_refused(nodes: list[Any], words: str):
    made = [(n[0], n[1]() if isinstance(n[1], type) else n[1], *n[2:]) for n in nodes]
    with pytest.raises((ArgumentError, ShapeError), match=words):
        Graph(*made)


def test_paths_that_meet():
    inner = L.Sequential(b=L.Linear(4, 4))
    graph = Graph(("a", inner, ["input"]), ("a.b", L.Linear(4, 4), ["a"]))
    refuses(ArgumentError, "a.b.weight", call=lambda: graph.build((4,)))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: L.Reshape((5,)), (4,)),
        (lambda: L.Permute((0, 2, 1)), (4,)),
        (lambda: L.Slice((0,), (5,), (1,)), (4,)),
        (lambda: L.Take([4], 1), (4,)),
        (lambda: L.Take([0], 2), (4,)),
        (lambda: L.Reduce("sum", (2,)), (4,)),
        (lambda: L.ArithmeticWith("add", (3,)), (4,)),
        (lambda: L.ArithmeticWith("add", (1, 4)), (4,)),
        (lambda: L.PReLU((2,)), (4,)),
        (lambda: L.Pad(((1, 1),)), (4, 4)),
    ],
)
def test_shapes_that_do_not_fit(make: Callable[[], Any], shape: tuple[int, ...]):
    with pytest.raises(ShapeError):
        make().build(shape)


@pytest.mark.parametrize(
    "make",
    [
        lambda: L.Reshape((0,)),
        lambda: L.Permute((1, 0)),
        lambda: L.Pad(((1,),)),
        lambda: L.Pad(((1, 1),), "mirror"),
        lambda: L.Pad(((1, 1),), "reflect", 1.0),
        lambda: L.Slice((0,), (1,), (0,)),
        lambda: L.Reduce("product", (1,)),
        lambda: L.Take([], 1),
        lambda: L.Take([-1], 1),
        lambda: L.Take([0], 0),
        lambda: L.Reduce("sum", ()),
        lambda: L.Arithmetic("modulo"),
        lambda: L.ArithmeticWith("modulo", ()),
        lambda: L.ArithmeticWith("add", (0,)),
        lambda: L.Concat(0),
        lambda: L.MatMulWith(0),
        lambda: L.Elementwise("tangent"),
        lambda: L.Clip(float("nan")),
        lambda: L.CELU(0),
        lambda: L.HardSigmoid("a"),
        lambda: L.PReLU((-1,)),
    ],
)
def test_arguments_out_of_range_are_refused(make: Callable[[], Any]):
    with pytest.raises(ArgumentError):
        make()
