"""What explicit caches make possible: one layer in several places, several threads in one network,
recomputing. And hooks."""

import copy
import pickle
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portacnn
from portacnn import Model, Trainer, ops
from portacnn.errors import ModelFormatError, ShapeError, StateError
from portacnn.files import save_tensors
from portacnn.layers import (
    Arithmetic,
    BatchNorm2d,
    Branches,
    Conv2d,
    Dropout,
    Flatten,
    GlobalAvgPool,
    Graph,
    Layer,
    Linear,
    MaxPool2d,
    Recompute,
    ReLU,
    Residual,
    Sequential,
    Tanh,
    at_step,
    gradients_of,
    one_backward_pass,
)
from portacnn.models import ResNet20
from portacnn.models.summary import rows
from portacnn.optim import SGD
from support.checks import agree, normal, refuses
from support.matrix import EACH_LIBRARY, Here, needs
from support.nets import bits

# --- shared weights -------------------------------------------------------------------------------


def siamese() -> tuple[Model, Layer]:
    """One encoder on both halves of the channels; its convolution stands in two places of the
    encoder, too."""
    conv = Conv2d(2, 2, 3, padding=1)
    encoder = Sequential(conv=conv, act=Tanh(), again=conv, flatten=Flatten(), fc=Linear(None, 3))
    halves = [Conv2d(4, 2, 1, bias=False, weight_init=half(first)) for first in (0, 2)]
    return Model(
        pair=Branches(
            left=Sequential(take=halves[0], enc=encoder),
            right=Sequential(take=halves[1], enc=encoder),
        ),
        out=Linear(6, 2),
    ), encoder


def half(first: int) -> Any:
    return lambda rng, shape, *_: np.eye(4)[first : first + 2].reshape(shape)


@needs("torch")
def test_a_siamese_pair_has_pytorchs_gradients(backend: Here):
    import torch

    model, _ = siamese()
    model.build((4, 4, 4), device=backend.device, dtype="float64", seed=0)
    state = model.state_dict()
    assert list(state) == [
        "pair.left.take.weight",
        "pair.left.enc.conv.weight",
        "pair.left.enc.conv.bias",
        "pair.left.enc.fc.weight",
        "pair.left.enc.fc.bias",
        "pair.right.take.weight",
        "out.weight",
        "out.bias",
    ]
    theirs = {path: torch.tensor(value, requires_grad=True) for path, value in state.items()}
    F = torch.nn.functional

    def encode(x: Any) -> Any:
        weight, bias = theirs["pair.left.enc.conv.weight"], theirs["pair.left.enc.conv.bias"]
        y = F.conv2d(torch.tanh(F.conv2d(x, weight, bias, padding=1)), weight, bias, padding=1)
        return F.linear(
            y.flatten(1), theirs["pair.left.enc.fc.weight"], theirs["pair.left.enc.fc.bias"]
        )

    x, dy = normal(3, 4, 4, 4), normal(3, 2, seed=1)
    leaf = torch.tensor(x, requires_grad=True)
    parts = [
        encode(F.conv2d(leaf, theirs[f"pair.{side}.take.weight"])) for side in ("left", "right")
    ]
    expected = F.linear(torch.cat(parts, 1), theirs["out.weight"], theirs["out.bias"])
    expected.backward(torch.tensor(dy))
    for _ in range(2):  # the second pass writes, and does not add to the first
        y, cache = model.forward(backend.array(x))
        agree(backend, y, expected.detach().numpy(), y)
        agree(backend, model.backward(backend.array(dy), cache), leaf.grad.numpy(), y)
        with gradients_of(model) as apart:
            model.backward(backend.array(dy), model.forward(backend.array(x))[1])
        for gradients in (model.named_gradients(), apart):
            assert list(gradients) == list(state)
            for path, gradient in gradients.items():
                agree(backend, gradient, theirs[path].grad.numpy(), y, 1e-10)


def test_gradients_of_copies_an_array_that_two_parameters_get(backend: Here):
    """A layer may hand over one array as the gradient of two parameters. In the second place of the
    layer more is added to each, and not to the array itself."""

    class Same(Linear):
        def backward(self, dy: Any, cache: Any, *, need_dx: bool = True) -> Any:
            self.add_grads(weight=dy, bias=dy)
            return dy

    same = Same(1, 1)
    net = Sequential(first=same, second=same).build((1,), device=backend.device, seed=0)
    dy = backend.array(np.array([[3.0]]), "float32")
    _, cache = net.forward(backend.array(np.ones((1, 1)), "float32"))
    with gradients_of(net) as found:
        net.backward(dy, cache)
    assert {path: backend.host(array).item() for path, array in found.items()} == {
        "first.weight": 6.0,
        "first.bias": 6.0,
    }
    assert backend.host(dy).item() == 3.0


def test_a_layer_in_two_nodes_of_a_graph(backend: Here):
    fc = Linear(3, 3)
    graph = Graph(
        ("a", fc, ["input"]),
        ("t", Tanh(), ["a"]),
        ("b", fc, ["t"]),
        ("sum", Arithmetic("add"), ["a", "b"]),
    ).build((3,), device=backend.device, dtype="float64", seed=0)
    assert list(graph.state_dict()) == ["a.weight", "a.bias"]
    x, w, b = normal(4, 3), *graph.state_dict().values()
    y, cache = graph.forward(backend.array(x))
    hidden = np.tanh(x @ w.T + b)
    agree(backend, y, x @ w.T + b + hidden @ w.T + b, y)
    dy = normal(4, 3, seed=2)
    graph.backward(backend.array(dy), cache)
    into = dy @ w * (1 - hidden**2) + dy
    agree(backend, graph.named_gradients()["a.weight"], dy.T @ hidden + into.T @ x, y)
    agree(backend, graph.named_gradients()["a.bias"], (dy + into).sum(0), y)
    agree(backend, graph.prepare(backend.array(x))(backend.array(x)), backend.host(y), y)


def test_shared_layers_train_are_saved_and_are_copied(backend: Here, tmp_path: Path):
    pytest.importorskip("safetensors")
    relu = ReLU()
    block = Residual(
        Sequential(conv=Conv2d(2, 2, 3, padding=1), bn=BatchNorm2d(2)), activation=relu
    )
    model = Model(block, block, relu, Flatten(), Linear(None, 4)).build(
        (2, 4, 4), device=backend.device, seed=0
    )
    x, t = normal(40, 2, 4, 4).astype("float32"), np.arange(40) % 4
    Trainer(model, x, t, x[:4], t[:4], epochs=1, mini_batch_size=20, verbose=False).train()
    assert model.state_dict()["0.bn.num_batches_tracked"] == 4  # twice in each of two steps
    model.save(tmp_path / "shared.safetensors")
    again = portacnn.load(tmp_path / "shared.safetensors", device=backend.device)
    for other in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert bits(other) == bits(model)
        assert other.children["0"] is other.children["1"]
        assert other.children["0"].activation is other.children["2"]
        assert backend.host(other.predict(x)).tobytes() == backend.host(model.predict(x)).tobytes()


def test_a_summary_counts_a_shared_layers_parameters_once():
    conv = Conv2d(2, 2, 3, padding=1)
    model = Model(conv, MaxPool2d(2), conv, Flatten(), Linear(None, 3))
    found = [
        (row.path, row.output, row.parameters, row.multiply_adds, row.shared)
        for row in rows(model, (2, 4, 4))
    ]
    assert found == [
        ("0", (2, 4, 4), 38, 36 * 16, False),
        ("1", (2, 2, 2), 0, 0, False),
        ("2", (2, 2, 2), 0, 36 * 4, True),
        ("3", (8,), 0, 0, False),
        ("4", (3,), 27, 24, False),
    ]
    line = next(line for line in model.summary((2, 4, 4)).splitlines() if line.startswith("2 "))
    assert line.split()[3] == "shared"


def test_the_second_place_must_fit():
    fc = Linear(None, 4)
    refuses(
        ShapeError,
        "0 (Linear)",
        "several places",
        "'1'",
        call=lambda: Sequential(fc, fc).build((3,)),
    )
    conv = Conv2d(2, 4, 1)
    words = ("0 (Conv2d)", "expected 2 input channels, got 4")
    refuses(ShapeError, *words, call=lambda: Sequential(conv, conv).build((2, 3, 3)))


def test_a_shared_dropout_draws_anew_in_each_place(backend: Here):
    drop = Dropout(0.5)
    both = Branches(drop, drop).build((40,), device=backend.device, seed=3)
    x = backend.array(np.ones((3, 40)), "float32")
    with at_step(2):
        y = backend.host(both(x, train=True))
    with at_step(2):
        np.testing.assert_array_equal(backend.host(both(x, train=True)), y)
    assert not np.array_equal(y[:, :40], y[:, 40:])
    single = Branches(Dropout(0.5)).build((40,), device=backend.device, seed=3)
    with at_step(2):
        np.testing.assert_array_equal(backend.host(single(x, train=True)), y[:, :40])


def test_tied_parameters_are_one(backend: Here, tmp_path: Path):
    pytest.importorskip("safetensors")
    first, second = Linear(3, 3), Linear(3, 3, bias=False)
    second.tie("weight", first)
    model = Model(first=first, act=Tanh(), second=second).build(
        (3,), device=backend.device, dtype="float64", seed=0
    )
    assert list(model.state_dict()) == ["first.weight", "first.bias"]
    assert [row.parameters for row in rows(model, (3,))] == [9 + 3, 0, 0]
    x, dy = normal(4, 3), normal(4, 3, seed=1)
    w, b = model.state_dict().values()
    y, cache = model.forward(backend.array(x))
    hidden = np.tanh(x @ w.T + b)
    agree(backend, y, hidden @ w.T, y)
    model.backward(backend.array(dy), cache)
    into = dy @ w * (1 - hidden**2)
    agree(backend, model.named_gradients()["first.weight"], dy.T @ hidden + into.T @ x, y)
    model.to(backend.device)
    SGD(0.5).update(model.named_parameters(), {"first.weight": backend.array(np.ones((3, 3)))})
    agree(backend, model.children["second"].params["weight"], w - 0.5, y)
    model.save(tmp_path / "tied.safetensors")
    again = portacnn.load(tmp_path / "tied.safetensors", device=backend.device)
    for other in (again, pickle.loads(pickle.dumps(model))):
        assert bits(other) == bits(model)
        assert other.children["second"].params["weight"] is other.children["first"].params["weight"]
        y, cache = other.forward(backend.array(x))
        other.backward(backend.array(dy), cache)
        assert list(other.named_gradients()) == ["first.weight", "first.bias"]
    third = Linear(4, 3)
    third.tie("weight", first)
    refuses(
        StateError,
        "third (Linear)",
        "not two parameters",
        call=lambda: Sequential(third=third).build((4,)),
    )
    refuses(StateError, "before", call=lambda: first.tie("weight", second))


def test_a_small_file_cannot_ask_for_a_large_network(tmp_path: Path):
    """Each of 40 layers stands twice in the next one: 2**40 to run."""
    pytest.importorskip("safetensors")
    layer: dict[str, Any] = {"class": "ReLU", "arguments": {}, "name": "0"}
    for number in range(1, 41):
        twice = [layer, {"shared": layer["name"]}]
        layer = {"class": "Sequential", "arguments": {}, "layers": twice, "name": str(number)}
    for model in (
        layer,
        {"class": "Model", "arguments": {}, "layers": [layer], "replaced": {"nowhere": layer}},
    ):
        header = {"format": 2, "model": model, "input_shape": [2], "dtype": "float32"}
        save_tensors(tmp_path / "net", {"a": np.ones(1)}, header)
        with pytest.raises(ModelFormatError):
            Layer.known["Model"].load(tmp_path / "net")


# --- threads --------------------------------------------------------------------------------------


def test_two_threads_go_through_one_network(backend: Here):
    """Forward and backward at once, each with its own images: each gets the gradients of its
    own."""
    model = Model(
        conv=Conv2d(2, 3, 3),
        relu=ReLU(),
        pool=MaxPool2d(2),
        drop=Dropout(0.5),
        flatten=Flatten(),
        fc=Linear(None, 3),
    ).build((2, 8, 8), device=backend.device, dtype="float64", seed=0)
    inputs = [(normal(4, 2, 8, 8, seed=seed), np.arange(4) % 3) for seed in range(2)]
    turns, met, wrong = threading.Barrier(2, timeout=60), [], []

    def gradients(number: int) -> dict[str, Any]:
        x, t = inputs[number]
        with at_step(number):
            y, kept = model.forward(backend.array(x), train=True)
        if met:
            turns.wait()  # both caches are alive
        _, cache = ops.softmax_cross_entropy(y, backend.array(t))
        with gradients_of(model) as found:
            model.backward(ops.softmax_cross_entropy_backward(1.0, cache), kept)
            if met:
                turns.wait()
        return {path: backend.host(array) for path, array in found.items()}

    expected = [gradients(number) for number in range(2)]
    assert list(expected[0]) == list(model.named_parameters())
    assert model.named_gradients() == {}
    assert not np.allclose(expected[0]["fc.weight"], expected[1]["fc.weight"])
    met.append(True)

    def work(number: int) -> None:
        try:
            for _ in range(5):
                for path, array in gradients(number).items():
                    np.testing.assert_array_equal(array, expected[number][path], err_msg=path)
        except BaseException as error:
            wrong.append(error)
            turns.abort()

    workers = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_several_backward_passes_as_one(backend: Here):
    fc = Linear(3, 2).build((3,), device=backend.device, dtype="float64", seed=0)
    xs, dys = (
        [normal(4, 3, seed=seed) for seed in (0, 1)],
        [normal(4, 2, seed=seed) for seed in (2, 3)],
    )
    with one_backward_pass():
        for x, dy in zip(xs, dys, strict=True):
            _, cache = fc.forward(backend.array(x))
            fc.backward(backend.array(dy), cache)
    like = fc.params["weight"]
    agree(backend, fc.grads["weight"], dys[0].T @ xs[0] + dys[1].T @ xs[1], like)
    _, cache = fc.forward(backend.array(xs[0]))
    fc.backward(backend.array(dys[0]), cache)
    agree(backend, fc.grads["weight"], dys[0].T @ xs[0], like)


# --- hooks ----------------------------------------------------------------------------------------


def test_hooks_see_every_output(backend: Here):
    """Of layers in all containers, of containers, and of the network, in training, predictions and
    while it is evaluated."""
    leaf, inner = Linear(4, 4), Sequential(Linear(4, 4), ReLU())
    model = Model(leaf, Residual(inner, activation=ReLU()), Branches(Recompute(leaf)), Linear(4, 3))
    model.build((4,), device=backend.device, seed=0)
    seen: dict[str, list[int]] = {"leaf": [], "inner": [], "model": [], "activation": []}
    parts = {
        "leaf": leaf,
        "inner": inner,
        "model": model,
        "activation": model.children["1"].activation,
    }
    for name, part in parts.items():
        part.on_output(lambda y, name=name: seen[name].append(y.shape[0]))
    x, t = normal(20, 4).astype("float32"), np.arange(20) % 3
    model.predict(x[:1])
    model.loss(x[:2], t[:2])
    model.gradient(x[:3], t[:3])  # recomputing calls no hooks
    model(backend.array(x[:4]))
    once = [1, 2, 3, 4]
    assert seen == {
        "leaf": [n for n in once for _ in range(2)],
        "inner": once,
        "model": once,
        "activation": once,
    }
    Trainer(model, x, t, x[:5], t[:5], epochs=1, mini_batch_size=20, verbose=False).train()
    assert seen["model"][4:] == [20, 20, 5]


# --- recomputing ----------------------------------------------------------------------------------


def blocks(wrap: Any) -> Model:
    def block(stride: int) -> Layer:
        body = Sequential(
            conv1=Conv2d(4, 4, 3, stride, 1),
            bn1=BatchNorm2d(4),
            relu=ReLU(),
            drop=Dropout(0.3),
            conv2=Conv2d(4, 4, 3, 1, 1),
        )
        return Residual(body, MaxPool2d(stride) if stride > 1 else None, activation=ReLU())

    return Model(
        stem=wrap(
            Sequential(conv=Conv2d(2, 4, 3, 1, 1), bn=BatchNorm2d(4, momentum=None), relu=ReLU())
        ),
        block1=wrap(block(1)),
        block2=wrap(wrap(block(2))),
        pool=GlobalAvgPool(flatten=True),
        fc=Linear(4, 3),
    )


def trained(device: Any, wrap: Any, by_hand: bool) -> tuple[Model, list[Any]]:
    model = blocks(wrap).build((2, 6, 6), device=device, seed=0)
    x, t = normal(30, 2, 6, 6).astype("float32"), np.arange(30) % 3
    if not by_hand:
        run = Trainer(
            model, x, t, x[:3], t[:3], epochs=1, mini_batch_size=20, accumulate=2, verbose=False
        )
        run.train()
        return model, run.train_loss_list
    losses, home, optimizer = [], model.backend, SGD(0.1)
    for _ in range(2):  # dropout counts for itself
        y, kept = model.forward(model.batch(model.accept(x)), train=True)
        loss, cache = ops.softmax_cross_entropy(y, model.labels(t, 30))
        model.backward(ops.softmax_cross_entropy_backward(1.0, cache), kept, need_dx=False)
        optimizer.update(model.named_parameters(), model.named_gradients())
        losses.append(float(home.to_host(loss)))
    return model, losses


@EACH_LIBRARY
@pytest.mark.parametrize("by_hand", [False, True], ids=["trainer", "by hand"])
def test_recomputing_gives_the_same_bits(backend: Here, by_hand: bool):
    plain, losses = trained(backend.device, lambda layer: layer, by_hand)
    again, losses2 = trained(backend.device, Recompute, by_hand)
    assert losses == losses2
    assert bits(plain) == bits(again)
    if by_hand:
        assert [layer.step for layer in plain.walk() if isinstance(layer, Dropout)] == [2, 2]
        assert [layer.step for layer in again.walk() if isinstance(layer, Dropout)] == [2, 2]


def test_recomputing_keeps_the_input_alone():
    block = Recompute(Sequential(*(Linear(8, 8) for _ in range(4)))).build(
        (8,), device="numpy", seed=0
    )
    x = np.ones((2, 8), "float32")
    _, cache = block.forward(x, train=True)
    ((_, kept),) = cache
    assert kept[0] is x
    assert not any(isinstance(part, np.ndarray) for part in kept[1:])
    assert list(block.state_dict())[:2] == ["0.weight", "0.bias"]
    block.backward(x, cache)
    refuses(StateError, "has been used", call=lambda: block.backward(x, cache))


def test_recomputing_around_a_block_of_a_built_network(tmp_path: Path):
    """It keeps its weights, a kept forward pass holds less, the gradients are the same, and so is
    the file's network."""
    pytest.importorskip("safetensors")
    held, found, x, t = [], [], normal(8, 3, 16, 16).astype("float32"), np.arange(8) % 10
    for wrap in (False, True):
        model = ResNet20(input_size=16, device="numpy", seed=0)
        if wrap:
            model.replace("layer1", Recompute(model.layer_at("layer1")))
        found.append({path: gradient.tobytes() for path, gradient in model.gradient(x, t).items()})
        tracemalloc.start()  # once all kernels are compiled
        _, kept = model.forward(model.batch(model.accept(x)))
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert kept
    assert found[0] == found[1]
    assert held[1] < 0.7 * held[0]  # the first of three stages
    model.save(tmp_path / "net.safetensors")
    again = portacnn.load(tmp_path / "net.safetensors")
    assert isinstance(again.children["layer1"], Recompute)
    assert bits(again) == bits(model)


def test_recomputing_in_a_file(backend: Here, tmp_path: Path):
    pytest.importorskip("safetensors")
    model = blocks(Recompute).build((2, 6, 6), device=backend.device, seed=0)
    model.save(tmp_path / "net.safetensors")
    again = portacnn.load(tmp_path / "net.safetensors", device=backend.device)
    assert bits(again) == bits(model)
    plain = blocks(lambda layer: layer).build((2, 6, 6), device=backend.device, seed=1)
    plain.load_weights(tmp_path / "net.safetensors")
    x = normal(9, 2, 6, 6).astype("float32")
    for images in (x, x[:2]):
        np.testing.assert_array_equal(
            backend.host(plain.predict(images)), backend.host(again.predict(images))
        )
