"""The Trainer: what a run leaves behind, and that it is the same run on every backend."""

import sys

import numpy as np
import pytest

from portacnn import Trainer, load_mnist_sample
from portacnn.losses import CrossEntropy
from portacnn.models import SimpleConvNet
from portacnn.seeds import permutation
from portacnn.training import progress
from support.matrix import EACH_LIBRARY
from support.nets import bits, patches, small_net
from support.small_trainings import Recorder, trainer

pytestmark = EACH_LIBRARY

# --- what a run leaves ----------------------------------------------------------------------------


def test_lists_have_an_entry_for_each_step_or_epoch(backend):
    run = trainer(small_net(backend.device), kind=Recorder, epochs=3)
    run.train()
    # 50 images by 20: two whole batches and a short one an epoch
    assert len(run.train_loss_list) == 9
    assert [tuple(t.shape) for _, t in run.batches] == [(20,), (20,), (10,)] * 3
    assert len(run.train_acc_list) == len(run.test_acc_list) == run.epoch == 3
    for value in run.train_loss_list + run.train_acc_list + run.test_acc_list:
        assert type(value) is float
    assert run.optimizer.steps == 9
    assert run.model.accuracy(*patches(50)) == run.train_acc_list[-1]
    assert run.model.accuracy(*patches(20, seed=1)) == run.test_acc_list[-1]


def test_without_metrics_the_training_set_is_not_evaluated(backend):
    """It would cost a forward pass of all images after each epoch."""
    options = {"epochs": 2, "batch_size": 50, "metrics": (), "compile_step": False}
    run = Trainer(small_net(backend.device), *patches(50), verbose=False, **options)
    seen = []
    run.model.layer_at("fc1").on_output(lambda y: seen.append(y.shape[0]))
    run.train()
    assert seen == [50, 50]
    assert len(run.history["train_loss"]) == 2


def test_training_lowers_the_loss(backend):
    run = trainer(
        small_net(backend.device, seed=1), train=80, epochs=6, optimizer_param={"lr": 0.04}
    )
    run.train()
    assert run.train_loss_list[-1] < 0.3 * run.train_loss_list[0]
    assert run.test_acc_list[-1] > 0.9


def test_losses_are_those_of_the_weights_before_each_step(backend):
    run = trainer(
        small_net(backend.device), optimizer="sgd", optimizer_param={"lr": 0.0}, kind=Recorder
    )
    run.train()
    for (x, t), loss in zip(run.batches, run.train_loss_list, strict=True):
        assert run.model.loss(x, t) == pytest.approx(loss, rel=1e-6)


def test_a_run_by_hand(backend):
    """SGD over the same batches, written out with ``gradient``."""
    run = trainer(
        small_net(backend.device, dtype="float64"),
        optimizer="sgd",
        optimizer_param={"lr": 0.1},
        seed=5,
    )
    run.train()
    net, (x, t), losses = small_net("numpy", dtype="float64"), patches(50, dtype="float64"), []
    for epoch in range(2):
        order = permutation(5, epoch, 50)
        for chosen in (order[:20], order[20:40], order[40:]):
            losses.append(net.loss(x[chosen], t[chosen]))
            gradient = net.gradient(x[chosen], t[chosen])
            for path, value in net.named_parameters().items():
                value -= 0.1 * gradient[path]
    np.testing.assert_allclose(run.train_loss_list, losses, rtol=1e-11)
    for path, value in net.state_dict().items():
        np.testing.assert_allclose(run.model.state_dict()[path], value, rtol=1e-9, atol=1e-12)


def test_label_smoothing_reaches_the_training(backend):
    """The loss of the first batch by hand; a loss with its own smoothing is the same training."""
    one = {"epochs": 1, "mini_batch_size": 50, "optimizer_param": {"lr": 0.1}}
    net = small_net(backend.device, dtype="float64")
    logits, (_, t) = backend.host(net.predict(patches(50, dtype="float64")[0])), patches(50)
    run = trainer(net, label_smoothing=0.3, **one)
    run.train()
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    losses = -(0.7 * np.log(p[np.arange(50), t]) + 0.3 * np.log(p).mean(axis=1))
    assert run.train_loss_list == pytest.approx([losses.mean()], rel=1e-6)
    other = trainer(
        small_net(backend.device, dtype="float64"), loss=CrossEntropy(label_smoothing=0.3), **one
    )
    other.train()
    assert bits(other.model) == bits(run.model)


def test_each_epoch_sees_every_image_once(backend):
    x = np.arange(50, dtype="float32").reshape(50, 1, 1, 1) * np.ones((1, 8, 8), "float32") / 50
    t = np.arange(50) % 4
    net = small_net(backend.device)
    run = Recorder(net, x, t, x, t, epochs=2, mini_batch_size=20, verbose=False)
    run.train()
    seen = [np.rint(backend.host(x)[:, 0, 0, 0] * 50).astype(int) for x, _ in run.batches]
    labels = np.concatenate([backend.host(t) for _, t in run.batches])
    epochs = np.concatenate(seen).reshape(2, 50)
    for order in epochs:
        assert sorted(order) == list(range(50))
        assert order.tolist() != sorted(order)
    assert epochs[0].tolist() != epochs[1].tolist()
    assert (labels == epochs.reshape(-1) % 4).all()


def test_the_same_seed_twice(backend):
    def run(seed):
        made = trainer(small_net(backend.device), seed=seed, epochs=1)
        made.train()
        return made.train_loss_list, made.train_acc_list, made.test_acc_list, bits(made.model)

    assert run(1) == run(1)
    assert run(1)[0] != run(2)[0]
    assert run(None)[0] != run(None)[0]


def test_training_continues_for_more_epochs(backend):
    whole = trainer(small_net(backend.device), epochs=3)
    whole.train()
    parts = trainer(small_net(backend.device), epochs=1)
    parts.train()
    parts.train()  # nothing left to do
    assert parts.epoch == 1
    parts.epochs = 3
    parts.train()
    assert parts.train_loss_list == whole.train_loss_list
    assert (parts.train_acc_list, parts.test_acc_list) == (
        whole.train_acc_list,
        whole.test_acc_list,
    )
    assert bits(parts.model) == bits(whole.model)
    none = trainer(small_net(backend.device), epochs=0)
    none.train()
    assert none.train_loss_list == none.test_acc_list == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "all 2 epochs are done; set a larger trainer.epochs to continue"),
        ({"epochs": 0}, "all 0 epochs are done"),
        (
            {"early_stopping": 1, "optimizer_param": {"lr": 0.0}, "epochs": 9},
            "early stopping has ended the training run; make a new Trainer",
        ),
    ],
)
def test_a_training_that_is_over_says_so(caplog, options, words):
    run = trainer(small_net(), **options)
    run.train()
    done = run.steps_done
    if done:
        assert not caplog.messages
        run.train()
    (message,) = caplog.messages
    assert "train() has nothing to do" in message
    assert words in message
    assert run.steps_done == done


def test_training_continues_after_an_interruption():
    class Interrupted(Trainer):
        def step(self, x, t, state):
            if self.optimizer.steps == 4 and not hasattr(self, "stopped"):
                self.stopped = True
                raise KeyboardInterrupt
            return super().step(x, t, state)

    run = trainer(small_net(), kind=Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.train()
    assert len(run.train_loss_list) == 6


# --- the same on every backend --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "dtype", "rel"),
    [("sgd", "float64", 1e-9), ("momentum", "float32", 1e-4), ("adam", "float64", 1e-9)],
)
def test_the_same_run_on_every_backend(backend, dtype, rel, optimizer):
    def run(device):
        made = trainer(
            small_net(device, dtype=dtype),
            train=100,
            epochs=2,
            kind=Recorder,
            seed=3,
            optimizer=optimizer,
        )
        before = bits(made.model)
        made.train()
        batches = [
            made.backend.to_host(array).tobytes() for batch in made.batches for array in batch
        ]
        return before, batches, made.train_loss_list

    (before, batches, losses), (before_here, batches_here, losses_here) = (
        run("numpy"),
        run(backend.device),
    )
    assert len(losses) == 10
    assert before_here == before
    assert batches_here == batches
    np.testing.assert_allclose(losses_here, losses, rtol=rel)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


# --- what is shown --------------------------------------------------------------------------------


def test_verbose_false_prints_nothing(capfd, caplog):
    trainer(small_net(), verbose=False).train()
    assert capfd.readouterr() == ("", "")
    assert not caplog.messages


def test_lines_where_tqdm_is_missing(capfd, monkeypatch):
    for name in ("tqdm", "tqdm.auto"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(progress, "is_watched", lambda stream: True)
    run = trainer(small_net(), verbose=True)
    run.train()
    out, err = capfd.readouterr()
    assert out.splitlines() == epoch_lines(run)
    assert err == ""


def epoch_lines(run):
    sizes, losses = (20, 20, 10), run.train_loss_list
    mean = [np.average(losses[:3], weights=sizes), np.average(losses[3:], weights=sizes)]
    return [
        f"epoch {i + 1}: loss {mean[i]:.4f}, train accuracy {run.train_acc_list[i]:.4f}, "
        f"test accuracy {run.test_acc_list[i]:.4f}"
        for i in range(2)
    ]


# --- real digits ----------------------------------------------------------------------------------


def test_real_digits():
    """Two epochs over 2,000 of the bundled digits, with a small net: far above chance, and above
    its first epoch."""
    (x_train, t_train), (x_test, t_test) = load_mnist_sample()
    net = SimpleConvNet(
        (1, 28, 28), {"filter_num": 6}, 50, weight_init_std="he", device="numpy", seed=0
    )
    options = {
        "epochs": 2,
        "mini_batch_size": 50,
        "optimizer_param": {"lr": 0.003},
        "verbose": False,
    }
    data = (x_train[:2000], t_train[:2000], x_test[:500], t_test[:500])
    run = Trainer(net, *data, evaluate_sample_num_per_epoch=500, **options)
    run.train()
    assert net.accuracy(x_test, t_test) > 0.85
    assert len(run.train_loss_list) == 80
    assert run.test_acc_list[1] > run.test_acc_list[0] > 0.7
