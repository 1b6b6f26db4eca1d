"""A network of containers, saved and trained: the same numbers on every backend."""

from collections import OrderedDict

import numpy as np
import pytest

import portacnn
from portacnn import ops
from portacnn.layers import (
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
)
from portacnn.models import Model
from portacnn.optim import SGD
from portacnn.runtime import resolve
from support.checks import normal
from support.matrix import EACH_LIBRARY, Here, needs
from support.nets import bits


def net(dropout: float = 0.3) -> Model:
    """Dropout, batch norm, residuals with and without a shortcut, branches."""
    return Model(
        conv=Conv2d(None, 4, 3, padding=1, bias=False),
        bn=BatchNorm2d(4),
        relu=ReLU(),
        block1=Residual(
            Sequential(
                conv1=Conv2d(4, 4, 3, padding=1),
                bn1=BatchNorm2d(4),
                relu=ReLU(),
                drop=Dropout(dropout),
            ),
            activation=ReLU(),
        ),
        block2=Residual(
            Sequential(conv1=Conv2d(4, 6, 3, 2, 1), bn1=BatchNorm2d(6), drop=Dropout(dropout)),
            Sequential(Conv2d(4, 6, 1, 2, bias=False), BatchNorm2d(6)),
            activation=ReLU(),
        ),
        inception=Branches(
            Conv2d(6, 2, 1), Sequential(MaxPool2d(3, 1, 1), Conv2d(6, 3, 1)), skip=Sequential()
        ),
        pool=GlobalAvgPool(flatten=True),
        drop=Dropout(dropout),
        fc=Linear(None, 4),
    )


def steps(device, count: int, dtype: str, dropout: float = 0.3):
    """(losses, gradients of the last step, state) after training steps, as host arrays."""
    model = net(dropout).build((2, 6, 5), device=device, dtype=dtype, seed=1)
    home, optimizer = model.backend, SGD(0.1, momentum=0.9)
    losses = []
    for step in range(count):
        x = home.asarray(normal(8, 2, 6, 5, seed=step), dtype)
        labels = home.asarray((np.arange(8) + step) % 4)
        logits, kept = model.forward(x, train=True)
        loss, cache = ops.softmax_cross_entropy(logits, labels)
        model.backward(ops.softmax_cross_entropy_backward(1.0, cache), kept, need_dx=False)
        optimizer.update(model.named_parameters(), model.named_gradients())
        losses.append(loss)
    gradients = {path: home.to_host(value) for path, value in model.named_gradients().items()}
    return np.array([home.to_host(loss) for loss in losses]), gradients, model.state_dict()


@pytest.fixture(scope="module")
def on_numpy():
    return {
        dtype: steps(resolve("numpy"), count, dtype)
        for dtype, count in (("float64", 20), ("float32", 1))
    }


@EACH_LIBRARY
def test_twenty_float64_steps_are_the_same_everywhere(backend: Here, on_numpy):
    losses, gradients, state = steps(backend.device, 20, "float64")
    expected = on_numpy["float64"]
    assert len(set(np.round(losses, 6))) == 20
    np.testing.assert_allclose(losses, expected[0], rtol=1e-9)
    for got, wanted in ((gradients, expected[1]), (state, expected[2])):
        assert list(got) == list(wanted)
        for path, value in wanted.items():
            np.testing.assert_allclose(got[path], value, rtol=1e-9, atol=1e-9, err_msg=path)


def test_one_float32_steps_gradients_are_the_same_everywhere(backend: Here, on_numpy):
    losses, gradients, _ = steps(backend.device, 1, "float32")
    np.testing.assert_allclose(losses, on_numpy["float32"][0], rtol=1e-5)
    exact = steps(backend.device, 1, "float64")[1]
    for wanted in (on_numpy["float32"][1], exact):
        for path, value in wanted.items():
            assert gradients[path].dtype == np.float32
            np.testing.assert_allclose(gradients[path], value, rtol=1e-4, atol=1e-4, err_msg=path)


@needs("torch")
def test_twenty_float64_steps_are_pytorchs(backend: Here):
    """The same net without dropout, whose masks are our own, against autograd and torch.optim."""
    import torch

    from support import twins

    nn = torch.nn
    theirs = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(2, 4, 3, padding=1, bias=False),
            bn=nn.BatchNorm2d(4),
            relu=nn.ReLU(),
            block1=twins.Residual(
                OrderedDict(
                    conv1=nn.Conv2d(4, 4, 3, padding=1), bn1=nn.BatchNorm2d(4), relu=nn.ReLU()
                ),
                None,
                nn.ReLU(),
            ),
            block2=twins.Residual(
                OrderedDict(conv1=nn.Conv2d(4, 6, 3, 2, 1), bn1=nn.BatchNorm2d(6)),
                nn.Sequential(nn.Conv2d(4, 6, 1, 2, bias=False), nn.BatchNorm2d(6)),
                nn.ReLU(),
            ),
            inception=twins.Branches(
                OrderedDict(
                    [
                        ("0", nn.Conv2d(6, 2, 1)),
                        ("1", nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(6, 3, 1))),
                        ("skip", nn.Identity()),
                    ]
                )
            ),
            pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            fc=nn.Linear(11, 4),
        )
    ).double()
    start = net(0.0).build((2, 6, 5), device="numpy", dtype="float64", seed=1).state_dict()
    theirs.load_state_dict({key: torch.tensor(value) for key, value in start.items()})
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9)
    losses, gradients, state = steps(backend.device, 20, "float64", dropout=0.0)
    for step in range(20):
        optimizer.zero_grad()
        logits = theirs.train()(torch.tensor(normal(8, 2, 6, 5, seed=step)))
        loss = nn.functional.cross_entropy(logits, torch.tensor((np.arange(8) + step) % 4))
        loss.backward()
        optimizer.step()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-9)
    for path, parameter in theirs.named_parameters():
        np.testing.assert_allclose(
            gradients[path], parameter.grad.numpy(), rtol=1e-9, atol=1e-9, err_msg=path
        )
    for path, value in theirs.state_dict().items():
        np.testing.assert_allclose(state[path], value.numpy(), rtol=1e-9, atol=1e-9, err_msg=path)


def test_containers_can_be_saved_and_loaded(backend: Here, tmp_path):
    pytest.importorskip("safetensors")
    model = net().build((2, 6, 5), device=backend.device, seed=1)
    model(backend.array(normal(4, 2, 6, 5), "float32"), train=True)
    model.save(tmp_path / "net.safetensors")
    again = portacnn.load(tmp_path / "net.safetensors", device=backend.device)
    assert repr(again) == repr(model)
    assert bits(again) == bits(model)
    x = normal(3, 2, 6, 5, seed=1).astype("float32")
    np.testing.assert_array_equal(backend.host(again.predict(x)), backend.host(model.predict(x)))
    other = Model(
        b=Branches(Residual(ReLU(), Conv2d(1, 1, 1), shortcut_name="s"), join="add"), f=Flatten()
    )
    other.build((1, 2, 2), device=backend.device, seed=0).save(tmp_path / "other.safetensors")
    again = portacnn.load(tmp_path / "other.safetensors", device=backend.device)
    assert (list(again.state_dict()), again.children["b"].join) == (
        ["b.0.s.weight", "b.0.s.bias"],
        "add",
    )
