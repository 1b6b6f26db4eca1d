"""The tutorials' Trainer and loader."""

from collections import OrderedDict

import numpy as np
import pytest

import portacnn
from portacnn import scratch
from portacnn.errors import (
    ArgumentError,
    LabelError,
    NotFiniteError,
)
from support.checks import refuses
from support.matrix import EACH_LIBRARY
from support.scratch_nets import SAMPLE, digits, quick_net


@EACH_LIBRARY
def test_training_reaches_the_same_losses_on_every_backend(backend):
    """From NumPy arrays, on every backend, and to the same losses as the book's optimizer gives on
    NumPy."""
    (x_train, t_train), (x_test, t_test) = digits(400), digits(203, first=1000)
    arguments = (x_train, t_train, x_test, t_test, 3, 40, "Adam", {"lr": 0.01}, 100, False)
    trainer = scratch.Trainer(quick_net(backend.device), *arguments)
    # brought there once
    for array in (trainer.x_train, trainer.t_train, trainer.x_test, trainer.t_test):
        assert array.device == trainer.network.params["W1"].device
    trainer.train()
    assert len(trainer.train_loss_list) == trainer.current_iter == trainer.max_iter == 30
    assert len(trainer.train_acc_list) == len(trainer.test_acc_list) == trainer.current_epoch == 3
    assert trainer.train_loss_list[-1] < 1.2 < 2 < trainer.train_loss_list[0]
    assert trainer.test_acc_list[-1] == trainer.network.accuracy(x_test[:100], t_test[:100]) > 0.5
    again = scratch.Trainer(quick_net("numpy"), *arguments)
    for _ in range(5):
        again.train_step()
    assert np.allclose(again.train_loss_list, trainer.train_loss_list[:5], rtol=1e-4)


def test_accuracy_of_nine_in_ten_after_four_epochs():
    """On the bundled digits, 4,000 to train on and 1,000 to test on, in four epochs."""
    (x_train, t_train), (x_test, t_test) = portacnn.load_mnist_sample()
    trainer = scratch.Trainer(
        quick_net("numpy"),
        x_train,
        t_train,
        x_test,
        t_test,
        4,
        100,
        "adam",
        {"lr": 0.01},
        verbose=False,
    )
    trainer.train()
    assert trainer.test_acc_list[-1] > 0.9


class TwoLayerNet:
    """A network as the chapters before the seventh build it, from layers and NumPy alone."""

    def __init__(self, inputs, hidden, classes, rng):
        self.params = {
            "W1": 0.05 * rng.standard_normal((inputs, hidden)),
            "b1": np.zeros(hidden),
            "gamma": np.ones(hidden),
            "beta": np.zeros(hidden),
            "W2": 0.05 * rng.standard_normal((hidden, classes)),
            "b2": np.zeros(classes),
        }
        p = self.params
        self.layers = OrderedDict()
        self.layers["Affine1"] = scratch.Affine(p["W1"], p["b1"])
        self.layers["BatchNorm"] = scratch.BatchNormalization(p["gamma"], p["beta"])
        self.layers["Relu"] = scratch.Relu()
        self.layers["Dropout"] = scratch.Dropout(0.1, seed=0)
        self.layers["Affine2"] = scratch.Affine(p["W2"], p["b2"])
        self.last = scratch.SoftmaxWithLoss()

    def predict(self, x, train_flg=False):
        for name, layer in self.layers.items():
            x = (
                layer.forward(x, train_flg)
                if name in ("BatchNorm", "Dropout")
                else layer.forward(x)
            )
        return x

    def loss(self, x, t):
        return self.last.forward(self.predict(x, train_flg=True), t)

    def accuracy(self, x, t):
        return np.mean(np.argmax(self.predict(x), axis=1) == np.argmax(t, axis=1))

    def gradient(self, x, t):
        self.loss(x, t)
        dout = self.last.backward()
        for layer in list(self.layers.values())[::-1]:
            dout = layer.backward(dout)
        first, norm, second = (
            self.layers["Affine1"],
            self.layers["BatchNorm"],
            self.layers["Affine2"],
        )
        return {
            "W1": first.dW,
            "b1": first.db,
            "gamma": norm.dgamma,
            "beta": norm.dbeta,
            "W2": second.dW,
            "b2": second.db,
        }


@pytest.mark.parametrize("optimizer", ["SGD", "momentum", "Nesterov", "AdaGrad", "RMSprop", "Adam"])
def test_optimizers_train_a_two_layer_net(optimizer):
    """301 images in batches of 50: the last one is filled up, so that batch normalization never
    sees one image alone."""
    x, t = digits(301)
    x, t = x.reshape(301, 784), np.eye(10)[t]
    net = TwoLayerNet(784, 30, 10, np.random.default_rng(0))
    rate = {"RMSprop": 0.01, "Adam": 0.01}.get(optimizer, 0.1)
    trainer = scratch.Trainer(
        net, x, t, x[:90], t[:90], 10, 50, optimizer, {"lr": rate}, 100, verbose=False
    )
    trainer.train()
    assert trainer.iter_per_epoch == 7
    assert trainer.train_acc_list[-1] > 0.9
    assert trainer.train_loss_list[-1] < trainer.train_loss_list[0]


def test_an_epoch_sees_every_image():
    seen = []

    class Spy:
        def __init__(self):
            self.params = {"w": np.zeros(1)}

        def gradient(self, x, t):
            assert np.array_equal(x[:, 0], t)
            seen.append(t.tolist())
            return {"w": np.zeros(1)}

        def loss(self, x, t):
            return 0.0 if len(seen) < 8 else float("nan")

        def accuracy(self, x, t):
            return len(x)

    x = np.arange(10.0)[:, None]
    trainer = scratch.Trainer(
        Spy(), x, np.arange(10), x, np.arange(10), epochs=2, mini_batch_size=4
    )
    for _ in range(6):
        trainer.train_step()
    for epoch in (seen[:3], seen[3:]):
        numbers = [number for batch in epoch for number in batch]
        assert len(numbers) == 12
        assert set(numbers) == set(range(10))
        assert numbers[10:] == numbers[:2]
    assert seen[:3] != seen[3:]
    assert trainer.train_acc_list == [10, 10]
    trainer.train_step()
    with pytest.raises(NotFiniteError, match="step 8 is nan"):
        trainer.train_step()
    few = scratch.Trainer(
        Spy(), x[:3], np.arange(3), x, np.arange(10), 1, 8, evaluate_sample_num_per_epoch=2
    )
    seen.clear()
    few.train_step()
    assert len(seen[0]) == 8
    assert set(seen[0]) == {0, 1, 2}
    assert few.train_acc_list == [2]


def test_printed_lines(capsys):
    x, t = digits(20)
    scratch.Trainer(quick_net("numpy"), x, t, x, t, 2, 10).train()
    lines = capsys.readouterr().out.splitlines()
    assert [line[:12] for line in lines[:2]] == ["=== epoch:1,", "=== epoch:2,"]
    assert lines[2:] == ["=============== Final Test Accuracy ===============", lines[3]]
    scratch.Trainer(quick_net("numpy"), x, t, x, t, 1, 10, verbose=False).train()
    assert not capsys.readouterr().out


def test_the_trainer_refuses():
    x, t = digits(20)
    net = quick_net("numpy")
    refuses(
        ArgumentError,
        "optimizer",
        "nesterov",
        call=lambda: scratch.Trainer(net, x, t, x, t, optimizer="lion"),
    )
    refuses(
        TypeError,
        "batch_size (called mini_batch_size here)",
        call=lambda: scratch.Trainer(net, x, t, x, t, batch_size=5),
    )
    refuses(
        ArgumentError,
        "mini_batch_size",
        call=lambda: scratch.Trainer(net, x, t, x, t, mini_batch_size=0),
    )
    refuses(LabelError, "train", "19", call=lambda: scratch.Trainer(net, x, t[:19], x, t))
    refuses(LabelError, "test", call=lambda: scratch.Trainer(net, x, t, x[:0], t[:0]))


def test_load_mnist_flattens_as_the_book_does(monkeypatch):
    monkeypatch.setenv("PORTACNN_DATA", str(SAMPLE))
    (x, t), _ = scratch.load_mnist()
    assert (x.shape, x.dtype, t.shape) == ((4000, 784), np.float32, (4000,))
    (x, t), _ = scratch.load_mnist(flatten=False, one_hot_label=True)
    assert (x.shape, t.shape) == ((4000, 1, 28, 28), (4000, 10))
    (x, _), _ = scratch.load_mnist(False, root=SAMPLE)
    assert (x.shape, x.dtype) == ((4000, 784), np.uint8)
