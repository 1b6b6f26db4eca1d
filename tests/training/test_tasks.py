"""The Trainer with other losses, metrics, weights and sets than those of plain classification."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from portacnn import Trainer, losses
from portacnn.errors import ArgumentError, LabelError
from portacnn.metrics import METRICS, Metric
from portacnn.training import evaluating
from portacnn.training import trainer as trainer_module
from support.matrix import EACH_LIBRARY, backends, needs
from support.nets import bits
from support.tasks import CLASSES, TASKS, X, figures, made, net, sets_of

pytestmark = EACH_LIBRARY


@pytest.mark.parametrize("task", TASKS)
def test_each_task_learns_and_reads_nothing_back_in_a_step(backend, task):
    """On device1 a step that reads raises. The figures of each epoch are there."""
    run = made(task, backend.device)
    run.train()
    assert run.history["train_loss"][-1] < run.history["train_loss"][0]
    names = [f"{part}_{name}" for name in run.metrics for part in ("train", "test")]
    assert list(run.history) == [
        *("train_loss", "test_loss", *names, "lr", "seconds", "images_per_second")
    ]
    assert {len(figures) for figures in run.history.values()} == {3}
    found = run.evaluate(X[:12], TASKS[task][0][:12])
    assert found["loss"] == pytest.approx(run.history["test_loss"][-1], rel=1e-6)
    for name in run.metrics:
        np.testing.assert_allclose(found[name], run.history[f"test_{name}"][-1], rtol=1e-6)


def test_there_is_a_task_for_every_word():
    assert {TASKS[task][2].get("loss", task) for task in TASKS} == set(losses.LOSSES)
    used = {name for task in TASKS for name in made(task).metrics}
    assert used == set(METRICS)


@pytest.mark.parametrize("task", TASKS)
@backends("strict-device1", "torch", "cupy")  # in NumPy's memory, images are looked at as well
def test_only_losses_and_figures_are_read(backend, task, monkeypatch):
    """Not within a step or when a metric sees a batch, and after an epoch once for the losses of
    its steps, once for the test loss and once for each metric of a set."""
    home, where = type(backend.backend), ["a set"]
    to_host, step, update = home.to_host, Trainer.step, Metric.update

    def reading(self, array):
        assert where[-1] != "inside"
        where.append("read")
        return to_host(self, array)

    def inside(function):
        def call(*arguments, **options):
            where.append("inside")
            try:
                return function(*arguments, **options)
            finally:
                where.append("outside")

        return call

    run = made(task, backend.device, epochs=2)
    run.train()
    monkeypatch.setattr(home, "to_host", reading)
    monkeypatch.setattr(Trainer, "step", inside(step))
    monkeypatch.setattr(Metric, "update", inside(update))
    run.epochs = 3
    run.train()
    assert where.count("inside") >= 3
    assert where.count("read") <= 2 + 2 * len(run.metrics)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_resumed_at_any_step_gives_the_same_bits(backend, tmp_path, task):
    device = backend.device
    folders = {"checkpoint_dir": tmp_path / "one", "checkpoint_every": 1, "keep": 9}
    whole = made(task, device, epochs=2, **folders)
    whole.train()
    files = sorted(tmp_path.glob("one/checkpoint-*"))
    for file in files:
        again = Trainer.resume(
            file, *sets_of(task), device=device, checkpoint_dir=tmp_path / "more"
        )
        assert (again.loss, list(again.metrics)) == (whole.loss, [*whole.metrics])
        if not again.finished:
            again.train()
        assert bits(again.model) == bits(whole.model)
        assert again.train_loss_list == whole.train_loss_list
        assert str(figures(again)) == str(figures(whole))  # 1 is not 1.0
    assert len(files) == 6


@needs("torch")
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("weights", ["classes", "balanced", "samples", "both"])
def test_weights_are_those_of_pytorch(backend, weights, accumulate):
    """In float64, over parts of a batch that count differently, by plain gradient steps."""
    import torch
    from torch import nn

    t = np.array([0, 0, 0, 0, 0, 1, 2, 3] * 2)
    x = X[: len(t)].astype("float64")
    each = np.linspace(0, 2, len(t)) if weights in ("samples", "both") else None
    classes = {"classes": {1: 5.0}, "both": [1.0, 2.0, 0.5, 4.0]}.get(weights)
    by_class = np.array([1.0, 5, 1, 1] if weights == "classes" else classes or [1.0] * 4)
    if weights == "balanced":
        by_class, classes = len(t) / (4 * np.bincount(t)), "balanced"
    model = net(4, backend.device, dtype="float64")
    twin = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)).double()
    twin.load_state_dict(
        {
            {"conv": "0", "fc": "3"}[name.split(".")[0]] + "." + name.split(".")[1]: torch.tensor(v)
            for name, v in model.state_dict().items()
        }
    )
    run = Trainer(
        *(model, x, t),
        epochs=3,
        batch_size=len(t),
        optimizer="sgd",
        lr=0.1,
        accumulate=accumulate,
        class_weight=classes,
        sample_weight=each,
        verbose=False,
    )
    run.train()
    steps = torch.optim.SGD(twin.parameters(), lr=0.1)
    factor = torch.tensor(by_class)[torch.tensor(t)]
    factor = factor if each is None else factor * torch.tensor(each)
    expected = []
    for _ in range(3):
        entropy = nn.functional.cross_entropy(
            twin(torch.tensor(x)), torch.tensor(t), reduction="none"
        )
        loss = (factor * entropy).sum() / factor.sum()
        expected.append(loss.item())
        steps.zero_grad()
        loss.backward()
        steps.step()
    np.testing.assert_allclose(run.train_loss_list, expected, rtol=1e-10)
    weight = backend.host(model.children["fc"].params["weight"])
    np.testing.assert_allclose(weight, twin[3].weight.detach().numpy(), rtol=1e-9, atol=1e-12)


def test_a_test_set_may_be_left_out_or_split_off(backend):
    run = Trainer(net(4, backend.device), X, CLASSES, epochs=1, batch_size=20, verbose=False)
    run.train()
    assert [name for name in run.history if name.startswith("test")] == []
    assert (run.x_test, run.test_acc_list) == (None, [])
    given = {"epochs": 1, "batch_size": 8, "validation_split": 0.2, "verbose": False}
    for seed in (0, 0, 1):
        run = Trainer(net(4, backend.device), X, CLASSES, seed=seed, **given)
        train, test = (backend.host(x).reshape(-1, 64) for x in (run.x_train, run.x_test))
        assert (len(train), len(test)) == (32, 8)
        places = [np.flatnonzero((X.reshape(40, -1) == row).all(axis=1))[0] for row in test]
        assert places == sorted(places)
        np.testing.assert_array_equal(backend.host(run.t_test), CLASSES[places])
        np.testing.assert_array_equal(train, np.delete(X.reshape(40, -1), places, axis=0))
    with pytest.raises(ArgumentError, match=r"pass x_test and t_test, or validation_split"):
        Trainer(net(4), X, CLASSES, X, CLASSES, **given)
    with pytest.raises(ArgumentError, match=r"would leave 0 to test on and 40 to train on"):
        Trainer(net(4), X, CLASSES, **{**given, "validation_split": 0.001})
    with pytest.raises(ArgumentError, match=r"x_test needs t_test"):
        Trainer(net(4), X, CLASSES, X)


def test_predictions(backend):
    run = made("cross_entropy", backend.device)
    probabilities = backend.host(run.predict_proba(X))
    logits = backend.host(run.model.predict(X)).astype("float64")
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)
    np.testing.assert_array_equal(backend.host(run.predict_classes(X)), logits.argmax(axis=1))
    run = made("bce_with_logits", backend.device)
    logits = backend.host(run.model.predict(X)).astype("float64")
    np.testing.assert_allclose(
        backend.host(run.predict_proba(X)), 1 / (1 + np.exp(-logits)), rtol=1e-5
    )
    np.testing.assert_array_equal(backend.host(run.predict_classes(X)), logits > 0)
    with pytest.raises(ArgumentError, match=r"MSE has no classes; use model\.predict"):
        made("mse").predict_classes(X)


class Largest(Metric):
    """The largest output, as somebody might write it."""

    def __init__(self):
        self.reset()

    def for_loss(self, loss):
        return Largest()

    def reset(self):
        self.seen = []

    def _take(self, y, t):
        self.seen.append(float(np.max(y)))

    def compute(self):
        return max(self.seen)


class Cubed(losses.Loss):
    def forward(self, y, t, weight=None):
        return ((y[:, 0] - t[:, 0]) ** 4).mean(), (y, t)

    def backward(self, cache, dloss=1.0):
        y, t = cache
        return 4 * (y - t) ** 3 * (dloss / len(y))

    def _checked(self, t, shape, dtype):
        return t.reshape(-1, 1).astype(dtype)


def test_a_loss_and_a_metric_of_ones_own_are_given_again(tmp_path):
    t = CLASSES / 3
    own = {"loss": Cubed(), "metrics": {"top": Largest()}}
    run = made("mse", checkpoint_dir=tmp_path, **own)
    run.train()
    assert run.history["train_loss"][-1] < run.history["train_loss"][0]
    assert run.evaluate(X[:5], t[:5])["top"] == float(run.model.predict(X[:5]).max())
    with pytest.raises(ArgumentError, match=r"a loss that a file cannot hold .* resume\(.*, loss="):
        Trainer.resume(tmp_path, X, t, X[:12], t[:12])
    with pytest.raises(ArgumentError, match=r"metrics that a file cannot hold"):
        Trainer.resume(tmp_path, X, t, X[:12], t[:12], loss=Cubed())
    again = Trainer.resume(tmp_path, X, t, X[:12], t[:12], **own)
    assert (again.finished, bits(again.model)) == (True, bits(run.model))
    other = {"loss": Cubed(), "metrics": {"best": Largest()}}
    with pytest.raises(ArgumentError, match=r"had the metrics top, got best; pass the same"):
        Trainer.resume(tmp_path, X, t, X[:12], t[:12], **other)


@pytest.mark.parametrize(
    ("task", "changes", "error", "message"),
    [
        ("mse", {"class_weight": "balanced"}, ArgumentError, "option of the cross-entropy"),
        ("mse", {"label_smoothing": 0.1}, ArgumentError, "option of the cross-entropy"),
        ("mse", {"metrics": ["accuracy"]}, ArgumentError, "its metrics are mae, rmse, r2"),
        ("mse", {"metrics": [Largest]}, ArgumentError, "got its class; write Largest(...)"),
        ("mse", {"metrics": Largest}, ArgumentError, "got its class; write Largest(...)"),
        ("mse", {"loss": losses.MSE}, ArgumentError, "got its class; write MSE(...)"),
        ("cross_entropy", {"loss": "hinge"}, ArgumentError, "unknown loss 'hinge'; known are"),
        ("cross_entropy", {"metrics": ["auc"]}, ArgumentError, "unknown metric 'auc'; known"),
        ("cross_entropy", {"sample_weight": "balanced"}, ArgumentError, 'class_weight="balanced"'),
        ("cross_entropy", {"sample_weight": [1.0]}, ArgumentError, "each of 40 samples"),
        ("cross_entropy", {"class_weight": [1, 2]}, ArgumentError, "each of 4 classes, got 2"),
        ("cross_entropy", {"class_weight": 5}, ArgumentError, "a number for each class, got 5"),
        (
            "cross_entropy",
            {"loss": "bce_with_logits", "metrics": None},
            LabelError,
            'use loss="cross_entropy"',
        ),
        ("cross_entropy", {"metrics": ["f1", "f1"]}, ArgumentError, "two metrics called f1"),
        ("cross_entropy", {"metrics": {"loss": "f1"}}, ArgumentError, "another name"),
        *(
            ("cross_entropy", {"validation_split": split}, ArgumentError, "above 0 and below 1")
            for split in (0.0, 1.0)
        ),
        ("cross_entropy", {"metrics": 5}, ArgumentError, "list of names or metrics, got 5"),
    ],
)
def test_what_does_not_fit_is_refused(task, changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        made(task, **changes)


def test_balanced_weights_are_of_what_is_trained_on():
    t = np.where(np.arange(40) < 25, 0, CLASSES)
    run = Trainer(
        *(net(4), X, t), batch_size=10, validation_split=0.3, class_weight="balanced", verbose=False
    )
    counts = np.bincount(run.t_train)
    assert counts.sum() == 28
    np.testing.assert_allclose(run.loss.weight, 28 / (4 * counts))
    given = losses.CrossEntropy(weight=[1.0, 2.0, 1.0, 1.0])
    with pytest.raises(ArgumentError, match="the loss has class weights already"):
        Trainer(net(4), X, t, loss=given, class_weight="balanced", verbose=False)


def test_an_epoch_has_the_rate_of_its_last_step_and_the_speed_of_its_steps(tmp_path, monkeypatch):
    """The schedule is asked once for each step; an epoch that was resumed is timed from there."""
    clock, asked = [0.0], []

    class Timed(Trainer):
        def step(self, x, t, state, weight=None):
            clock[0] += 2.0
            if state.step == 4:
                self.stop()
            return super().step(x, t, state, weight)

        def _evaluate(self, *given):
            clock[0] += 50.0
            return super()._evaluate(*given)

    def falling(step, lr):
        asked.append(step)
        return lr / (1 + step)

    for module in (trainer_module, evaluating):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    run = made("mse", kind=Timed, schedule=falling, checkpoint_dir=tmp_path)
    asked.clear()
    run.train()
    assert asked == [0, 1, 2, 3, 4]
    t = TASKS["mse"][0]
    again = Timed.resume(tmp_path, X, t, X[:12], t[:12], schedule=falling)
    again.train()
    history = again.history
    assert history["lr"] == [0.01 / 3, 0.01 / 6, 0.01 / 9]
    assert history["seconds"] == [106.0, 102.0, 106.0]
    assert history["images_per_second"] == [40 / 6, 8 / 2, 40 / 6]  # 16, 16 and 8


def test_a_repr_says_what_it_is():
    run = made("cross_entropy")
    assert repr(run) == (
        "Trainer(Model on numpy on cpu, CrossEntropy, Adam(lr=0.01), 40 training images, "
        "batch_size=16, 0 of 3 epochs done)"
    )
    run.train()
    assert ", 3 of 3 epochs done, train_loss " in repr(run)
