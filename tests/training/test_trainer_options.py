"""The Trainer's options: against PyTorch's own loop, and what each promises by itself."""

import csv
from functools import cache

import numpy as np
import pytest

from portacnn import cli, schedules
from portacnn.errors import ArgumentError, NotFiniteError, ShapeError, StateError
from portacnn.layers import (
    BatchNorm1d,
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    Linear,
    MaxPool2d,
    ReLU,
)
from portacnn.metrics import F1, Accuracy, ConfusionMatrix, RocAuc
from portacnn.models import Model
from portacnn.optim import SGD, biases_and_norms
from portacnn.schedules import ConstantLR, CosineAnnealingLR, OneCycleLR, PerEpoch, StepLR, warm_up
from portacnn.seeds import permutation
from portacnn.training import EarlyStopping, StepState, Trainer
from portacnn.training.feed import part_sizes
from support.matrix import needs

COUNT, SIZE, EPOCHS = 50, 20, 4  # 3 steps an epoch, the last with 10 images


def digits(count, seed=0):
    """Noise with a bright row whose place is the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    images = 0.3 * rng.random((count, 1, 8, 8))
    images[np.arange(count), :, labels, :] += 1.0
    return images, labels


def net(device="numpy", dtype="float64"):
    layers = {
        "conv1": Conv2d(1, 3, 3),
        "relu1": ReLU(),
        "pool1": MaxPool2d(2),
        "flatten": Flatten(),
        "fc1": Linear(27, 4),
    }
    return Model(**layers).build((1, 8, 8), device=device, dtype=dtype, seed=0)


def trainer(model=None, kind=Trainer, **changes):
    options = {
        "epochs": EPOCHS,
        "mini_batch_size": SIZE,
        "optimizer": "sgd",
        "optimizer_param": {"lr": 0.1},
        "seed": 5,
    }
    return kind(
        model or net(), *digits(COUNT), *digits(20, seed=1), verbose=False, **{**options, **changes}
    )


def weights(model):
    return {path: value.copy() for path, value in model.state_dict().items()}


def same(one, other, tolerance=0.0):
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_allclose(
            one[path], other[path], rtol=tolerance, atol=tolerance, err_msg=path
        )


# --- against PyTorch ------------------------------------------------------------------------------


@cache
def torch_run(name):
    """The run of this name in PyTorch alone: its losses, and the weights at the end."""
    kind, arguments, _, unit, clip_norm, smoothing = RUNS[name]
    import torch

    nn = torch.nn
    named = {
        "conv1": nn.Conv2d(1, 3, 3),
        "relu1": nn.ReLU(),
        "pool1": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
    }
    twin = nn.Sequential()
    for path, layer in {**named, "fc1": nn.Linear(27, 4)}.items():
        twin.add_module(path, layer)
    twin.double().load_state_dict(
        {path: torch.tensor(value) for path, value in net().state_dict().items()}
    )
    groups = [
        {"params": [p for p in twin.parameters() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in twin.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = getattr(torch.optim, kind)(groups, **arguments)
    schedule = TORCH_SCHEDULES[name](torch.optim.lr_scheduler, optimizer)
    x, t = (torch.tensor(values) for values in digits(COUNT))
    losses = []
    for epoch in range(EPOCHS):
        order = permutation(5, epoch, COUNT)
        for first in range(0, COUNT, SIZE):
            chosen = torch.tensor(order[first : first + SIZE])
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(
                twin(x[chosen]), t[chosen], label_smoothing=smoothing
            )
            loss.backward()
            if clip_norm:
                nn.utils.clip_grad_norm_(twin.parameters(), clip_norm)
            optimizer.step()
            if unit == "step":
                schedule.step()
            losses.append(float(loss.detach()))
        if unit == "epoch":
            schedule.step()
    return losses, {path: value.numpy() for path, value in twin.state_dict().items()}


RUNS = {
    "sgd": (
        "SGD",
        {"lr": 0.3, "momentum": 0.9, "nesterov": True},
        warm_up(4, CosineAnnealingLR(10)),
        "step",
        0.5,
        0.1,
    ),
    "adamw": ("AdamW", {"lr": 0.02}, OneCycleLR(12), "step", 1.0, 0.0),
    "rmsprop": ("RMSprop", {"lr": 0.01, "centered": True}, StepLR(2), "epoch", None, 0.2),
}
TORCH_SCHEDULES = {
    "sgd": lambda torch, o: torch.SequentialLR(
        o, [torch.LinearLR(o, 1e-3, 1.0, 4), torch.CosineAnnealingLR(o, 10)], [4]
    ),
    "adamw": lambda torch, o: torch.OneCycleLR(o, 0.02, 12, cycle_momentum=False),
    "rmsprop": lambda torch, o: torch.StepLR(o, 2),
}


@needs("torch")
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", RUNS)
# torch's SequentialLR warns of itself
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")
def test_the_whole_run_as_in_torch(backend, name, accumulate):
    _, arguments, schedule, unit, clip_norm, smoothing = RUNS[name]
    losses, end = torch_run(name)
    run = trainer(
        net(backend.device),
        optimizer=name,
        optimizer_param={**arguments, "weight_decay": 0.05, "no_decay": biases_and_norms},
        schedule=schedule,
        schedule_unit=unit,
        clip_norm=clip_norm,
        label_smoothing=smoothing,
        accumulate=accumulate,
    )
    run.train()
    np.testing.assert_allclose(run.train_loss_list, losses, rtol=1e-9)
    same(run.model.state_dict(), end, 1e-9)


# --- accumulation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [2, 3, 7, 20])
def test_parts_add_up_to_the_batch(backend, accumulate):
    whole, parts = trainer(net(backend.device)), trainer(net(backend.device), accumulate=accumulate)
    whole.train()
    parts.train()
    np.testing.assert_allclose(parts.train_loss_list, whole.train_loss_list, rtol=1e-9)
    same(parts.model.state_dict(), whole.model.state_dict(), 1e-9)
    gradients, expected = parts.model.named_gradients(), whole.model.named_gradients()
    same(
        {path: backend.host(g) for path, g in gradients.items()},
        {p: backend.host(g) for p, g in expected.items()},
        1e-9,
    )


def test_sizes_of_parts():
    """A batch of 20 in 3 parts is 7, 7, 6; the short one of 10 has as few parts as are no larger:
    5, 5."""

    class Recorder(Dropout):
        def forward(self, x, *, train=False, keep=True):
            if train:
                seen.append(self.draw()[:2])
            return x, ()

        def backward(self, dy, cache, *, need_dx=True):
            return dy

    seen, sizes = [], []
    model = Model(recorder=Recorder(), flatten=Flatten(), fc=Linear(None, 4)).build(
        (1, 8, 8), device="numpy", seed=0
    )
    model.on_output(lambda y: sizes.append(y.shape[0]))
    run = trainer(model, accumulate=3, epochs=2, evaluate_sample_num_per_epoch=1)
    run.train()
    assert [size for size in sizes if size > 1] == [7, 7, 6, 7, 7, 6, 5, 5] * 2
    firsts = [(0, 0), (0, 7), (0, 14), (1, 0), (1, 7), (1, 14), (2, 0), (2, 5)]
    assert seen == firsts + [(step + 3, first) for step, first in firsts]


@pytest.mark.parametrize(
    ("count", "most", "sizes"),
    [(7, 3, [3, 2, 2]), (7, 7, [7]), (8, 2, [2, 2, 2, 2]), (1, 3, [1]), (20, 7, [7, 7, 6])],
)
def test_parts_are_alike_in_size(count, most, sizes):
    assert part_sizes(count, most) == sizes


# --- the last batch -------------------------------------------------------------------------------


def normed(spatial=False, device="numpy"):
    """A batch norm over one value of each channel and image, or over 36 of them."""
    layers = (
        [Conv2d(1, 3, 3), BatchNorm2d(3), Flatten()]
        if spatial
        else [Flatten(), Linear(None, 5), BatchNorm1d(5)]
    )
    return Model(*layers, Linear(None, 4)).build((1, 8, 8), device=device, dtype="float64", seed=0)


def over(count, model, **options):
    x, t = digits(count)
    return Trainer(model, x, t, x[:8], t[:8], epochs=2, seed=1, verbose=False, **options)


@pytest.mark.parametrize(
    ("count", "options", "words"),
    [
        (
            101,
            {"mini_batch_size": 10},
            [
                "the last batch of 101 images by batch_size=10 would have 1;",
                "another batch_size or drop_last=True",
            ],
        ),
        (
            10,
            {"mini_batch_size": 1},
            ["the batches of 10 images by batch_size=1 would have 1;"],
        ),
        (
            12,
            {"mini_batch_size": 4, "accumulate": 4},
            ["in parts of 1, 1, 1, 1 (accumulate=4); choose another", "or accumulate"],
        ),
        (
            13,
            {"mini_batch_size": 10, "accumulate": 5},
            ["would have 3, in parts of 2, 1 (accumulate=5)", "drop_last"],
        ),
        (1, {"mini_batch_size": 1, "drop_last": True}, ["the batches of 1 images"]),
    ],
)
def test_batches_of_one_that_a_batch_norm_cannot_take(count, options, words):
    """Said before the first step, not after ten."""
    model = normed()
    before = weights(model)
    with pytest.raises(ArgumentError) as caught:
        over(count, model, **options)
    assert str(caught.value).startswith(
        "2 (BatchNorm1d): batch norm needs more than one value per channel"
    )
    for text in words:
        assert text in str(caught.value)
    same(weights(model), before)
    # many values of each channel in every image
    over(count, normed(spatial=True), **options).train()


def untracked(device="numpy"):
    """A batch norm that has no running statistics, over one value of each channel and image."""
    norm = BatchNorm1d(5, track_running_stats=False)
    net = Model(Flatten(), Linear(None, 5), norm, Linear(None, 4))
    return net.build((1, 8, 8), device=device, dtype="float64", seed=0)


@pytest.mark.parametrize(
    ("tested", "options", "words"),
    [
        (1, {}, "x_test would be evaluated on one; give more images"),
        (
            8,
            {"evaluate_sample_num_per_epoch": 1},
            "x_train would be evaluated on one; give more images (",
        ),
    ],
)
def test_evaluation_on_one_image_that_a_batch_norm_cannot_take(tested, options, words):
    """Said before the first epoch, not after it."""
    x, t = digits(20)
    with pytest.raises(
        ArgumentError,
        match=r"^2 \(BatchNorm1d\): without running "
        r"statistics",
    ) as caught:
        Trainer(
            untracked(),
            x,
            t,
            x[:tested],
            t[:tested],
            epochs=1,
            mini_batch_size=10,
            verbose=False,
            **options,
        )
    assert words in str(caught.value)
    Trainer(
        normed(),
        x,
        t,
        x[:tested],
        t[:tested],
        epochs=1,
        mini_batch_size=10,
        verbose=False,
        **options,
    ).train()


def test_evaluation_that_would_end_on_one_image(backend):
    """257 images go through 256 at a time; batch norm without running statistics takes the last
    with those before it."""
    x, t = digits(257)
    net = untracked(backend.device)
    run = Trainer(net, x, t, x, t, epochs=1, mini_batch_size=100, verbose=False)
    run.train()
    assert len(run.test_acc_list) == 1
    assert np.isfinite(net.loss(x, t))
    logits = np.asarray(run.backend.to_host(net.predict(x, batch_size=4)))
    assert logits.shape == (257, 4)
    np.testing.assert_allclose(
        logits[252:], run.backend.to_host(net.predict(x[252:])), rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(
        logits[248:252], run.backend.to_host(net.predict(x[248:252])), rtol=1e-9, atol=1e-12
    )
    for size, begin in ((2, 2), (3, 3), (4, 0)):  # where the last images of 5 begin
        end = run.backend.to_host(net.predict(x[:5], batch_size=size))[begin:]
        expected = run.backend.to_host(net.predict(x[begin:5]))
        np.testing.assert_allclose(end, expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(ShapeError, match="one value has no variance"):
        net.predict(x[:1])
    with pytest.raises(ShapeError, match="one value has no variance"):
        net.predict(x[:3], batch_size=1)


def test_the_cures_are_cures(backend):
    for options in ({"drop_last": True}, {"mini_batch_size": 11}):
        run = over(101, normed(device=backend.device), **{"mini_batch_size": 10, **options})
        run.train()
        assert len(run.train_loss_list) == 20
        assert run.finished


def test_drop_last_leaves_out_what_makes_no_whole_batch():
    seen = []

    class Recorder(Trainer):
        def step(self, x, t, state):
            seen.append(x[:, 0, 0, 0].tolist())
            return super().step(x, t, state)

    x, t = digits(50)
    x[:, 0, 0, 0] = np.arange(50)
    run = Recorder(
        net(), x, t, x, t, epochs=2, mini_batch_size=20, drop_last=True, seed=5, verbose=False
    )
    run.train()
    orders = [permutation(5, epoch, 50) for epoch in (0, 1)]
    assert seen == [order[first : first + 20].tolist() for order in orders for first in (0, 20)]
    losses = np.reshape(run.train_loss_list, (2, 2))
    np.testing.assert_allclose(run.epoch_loss_list, losses.mean(axis=1), rtol=1e-12)
    with pytest.raises(ArgumentError, match="drop_last must be True or False, got 'no'"):
        trainer(drop_last="no")


def test_gradients_keep_their_arrays(backend):
    run = trainer(net(backend.device), accumulate=3, clip_norm=0.1, epochs=1)
    run.train()
    gradients = run.model.named_gradients()
    run.epochs = 2
    run.train()
    assert all(run.model.named_gradients()[path] is array for path, array in gradients.items())


# --- schedules ------------------------------------------------------------------------------------


class Rates(Trainer):
    """Notes the states that its steps get."""

    def step(self, x, t, state):
        assert isinstance(state, StepState)
        self.states = [*getattr(self, "states", []), state]
        return super().step(x, t, state)


@pytest.mark.parametrize(
    ("schedule", "unit", "expected"),
    [
        (None, "step", ConstantLR()),
        (StepLR(5), "step", StepLR(5)),
        (StepLR(2, 0.5), "epoch", PerEpoch(StepLR(2, 0.5), 3)),
        ("cosine", "step", CosineAnnealingLR(12)),
        ("cosine", "epoch", PerEpoch(CosineAnnealingLR(4), 3)),
        ("one_cycle", "step", OneCycleLR(12)),
        (lambda step, lr: lr / (step + 1), "step", lambda step, lr: lr / (step + 1)),
        (lambda step, lr: np.float32(lr), "step", lambda step, lr: float(np.float32(lr))),
    ],
)
def test_the_rate_of_each_step(schedule, unit, expected):
    run = trainer(kind=Rates, schedule=schedule, schedule_unit=unit)
    run.train()
    assert [state.lr for state in run.states] == [expected(step, 0.1) for step in range(12)]
    assert [state.step for state in run.states] == list(range(12))
    assert all(type(state.lr) is float for state in run.states)
    assert run.optimizer.lr == 0.1


def test_a_schedule_goes_on_where_it_was():
    whole, parts = (
        trainer(kind=Rates, schedule=CosineAnnealingLR(12), optimizer="momentum") for _ in range(2)
    )
    whole.train()
    for epochs in (1, 3, 4):
        parts.epochs = epochs
        parts.train()
    assert [state.lr for state in parts.states] == [state.lr for state in whole.states]
    assert parts.train_loss_list == whole.train_loss_list
    same(parts.model.state_dict(), whole.model.state_dict())


# --- early stopping -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "figures", "best", "over"),
    [
        ({"patience": 2}, [], 0, False),
        ({"patience": 2}, [0.5], 1, False),
        ({"patience": 2}, [0.5, 0.5], 1, False),
        ({"patience": 2}, [0.5, 0.5, 0.5], 1, True),
        ({"patience": 2}, [0.5, 0.4, 0.6], 3, False),
        ({"patience": 2}, [0.5, 0.4, 0.6, 0.6, 0.55], 3, True),
        ({"patience": 1}, [0.5, 0.4], 1, True),
        ({"patience": 2, "min_delta": 0.1}, [0.5, 0.55, 0.59], 1, True),
        ({"patience": 2, "min_delta": 0.1}, [0.5, 0.55, 0.65], 3, False),
        ({"patience": 3, "monitor": "loss"}, [2.0, 1.0, 3.0], 2, False),
        ({"patience": 1, "monitor": "loss", "min_delta": 0.5}, [2.0, 1.6], 1, True),
        ({"patience": 2, "monitor": "loss"}, [float("nan"), float("nan")], 0, True),
        ({"patience": 2, "monitor": "loss"}, [float("nan"), 3.0], 2, False),
        ({"patience": 2, "monitor": "loss"}, [-1.0, -1.0], 1, False),
    ],
)
def test_best_epoch(arguments, figures, best, over):
    stopping = EarlyStopping(**arguments)
    assert stopping.best_epoch(figures) == best
    assert stopping.is_over(figures) is over


class Scripted(Trainer):
    """Its figures over the test images are given; it notes the weights after each epoch."""

    figures = (0.3, 0.6, 0.5, 0.6, 0.4, 0.9)

    def _evaluate(self, samples, loss):
        if loss is None:
            return {"accuracy": 0.0}
        self.seen = [*getattr(self, "seen", []), weights(self.model)]
        figure = self.figures[len(self.test_acc_list)]
        return {"accuracy": figure, "loss": 1.0 - figure}


@pytest.mark.parametrize("monitor", ["accuracy", "loss"])
@pytest.mark.parametrize("restore", [True, False])
def test_it_stops_and_restores(monitor, restore):
    stopping = EarlyStopping(patience=3, monitor=monitor, restore_best=restore)
    run = trainer(kind=Scripted, early_stopping=stopping, epochs=6)
    run.train()
    assert run.stopped_early
    assert run.epoch == len(run.test_acc_list) == 5
    assert len(run.train_loss_list) == 15
    assert run.test_loss_list == [1.0 - figure for figure in Scripted.figures[:5]]
    same(weights(run.model), run.seen[1 if restore else 4])
    run.train()  # it is over
    assert run.epoch == 5


def test_it_restores_at_the_end_too():
    run = trainer(kind=Scripted, early_stopping=4, epochs=5)
    run.train()
    assert not run.stopped_early
    assert run.epoch == 5
    same(weights(run.model), run.seen[1])


def test_early_stopping_for_real(backend):
    """With a rate of 0 nothing gets better: one epoch, and as many as there is patience."""
    for stopping in (2, EarlyStopping(2, "loss")):
        run = trainer(
            net(backend.device), early_stopping=stopping, optimizer_param={"lr": 0.0}, epochs=9
        )
        run.train()
        assert run.epoch == 3
    x, t = digits(20, seed=1)
    assert run.test_loss_list == pytest.approx([run.model.loss(x, t)] * 3)


def test_early_stopping_watches_the_loss_without_smoothing(backend):
    """By hand: the mean of -log softmax at the labels, over more images than a batch of
    ``predict``."""
    x, t = digits(300, seed=1)
    t[290:] = (t[290:] + 1) % 4
    options = {
        "label_smoothing": 0.3,
        "early_stopping": EarlyStopping(9, "loss", restore_best=False),
    }
    run = Trainer(
        net(backend.device),
        *digits(COUNT),
        x,
        t,
        epochs=2,
        mini_batch_size=20,
        verbose=False,
        **options,
    )
    run.train()
    logits = backend.host(run.model.predict(x))
    shifted = logits - logits.max(axis=1, keepdims=True)
    expected = np.mean(np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(300), t])
    assert run.test_loss_list[-1] == pytest.approx(expected, rel=1e-9)
    assert run.test_acc_list[-1] == np.mean(logits.argmax(axis=1) == t)


# --- figures, and what is not finite --------------------------------------------------------------


def test_epoch_losses_are_means_over_images():
    run = trainer()
    run.train()
    for epoch, mean in enumerate(run.epoch_loss_list):
        a, b, c = run.train_loss_list[3 * epoch : 3 * epoch + 3]
        assert mean == pytest.approx((20 * a + 20 * b + 10 * c) / 50)
    assert len(run.epoch_loss_list) == EPOCHS


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_gradients_that_are_not_finite(backend):
    """The loss of the third step is fine, its gradients are not: with clipping that is found before
    any harm."""
    run = trainer(net(backend.device), clip_norm=1.0, optimizer="momentum", accumulate=2)
    backward, calls = run.model.backward, []

    def spoiled(dy, cache, **options):
        calls.append(0)
        return backward(dy * float("inf") if len(calls) == 5 else dy, cache, **options)

    run.model.backward = spoiled
    with pytest.raises(
        NotFiniteError,
        match=r"of step 3 \(epoch 1\) is \d.*, but its gradients or running statistics are not",
    ):
        run.train()
    again = trainer(net(backend.device), clip_norm=1.0, optimizer="momentum", accumulate=2)
    order = again.backend.asarray(permutation(5, 0, COUNT))
    for first in (0, SIZE):
        again.run_batch(order[first : first + SIZE])
    same(run.model.state_dict(), again.model.state_dict())
    run.model.backward = backward
    run.train()  # begins the epoch anew
    assert len(run.train_loss_list) == 3 * EPOCHS


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "cosinus"}, "unknown schedule"),
        ({"schedule": 0.1}, "unknown schedule"),
        ({"schedule": lambda step, lr: -lr}, "the schedule's learning rate at step 0 must be"),
        (
            {"schedule": lambda step, lr: lr if step < 11 else float("nan")},
            "the schedule's learning rate at step 11",
        ),
        ({"schedule": lambda step, lr: "fast"}, "the schedule's learning rate at step 0"),
        ({"schedule": OneCycleLR(11)}, "steps 0 to 10, got step 11"),
        ({"schedule_unit": "epochs"}, "schedule_unit must be"),
        ({"clip_norm": 0}, "clip_norm must be a number above 0"),
        ({"clip_norm": True}, "clip_norm"),
        ({"label_smoothing": 1.5}, "label_smoothing must lie in"),
        ({"accumulate": 0}, "accumulate must be a whole number"),
        ({"accumulate": 21}, "accumulate must be at most batch_size=20, got 21"),
        ({"accumulate": 1.0}, "accumulate must be a whole number"),
        ({"precision": "half"}, 'precision must be one of "float32", "tf32"'),
        (
            {"precision": "tf32"},
            "precision='tf32' is not supported for a float64 model on numpy on cpu",
        ),
        ({"early_stopping": 0}, "patience"),
        ({"early_stopping": 2.5}, "patience"),
        ({"optimizer_param": {"weight_decay": -1}}, "weight_decay"),
        (
            {"optimizer_param": {"weight_decay": 0.1, "no_decay": ("biases",)}},
            "no_decay: 'biases' matches none of the parameters",
        ),
        (
            {"optimizer": SGD(0.1), "optimizer_param": {"lr": 1.0}},
            "optimizer_param goes with an optimizer's name, got it together with a made SGD",
        ),
    ],
)
def test_numbers_without_a_meaning(changes, message):
    model = net()
    before = weights(model)
    with pytest.raises(ArgumentError) as caught:
        trainer(model, **changes)
    assert message in str(caught.value)
    same(weights(model), before)


@pytest.mark.parametrize("arguments", [{"patience": 0}, {"monitor": 3}, {"min_delta": -0.1}])
def test_early_stopping_without_a_meaning(arguments):
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        EarlyStopping(**arguments)


class Smaller(Accuracy):
    better = "lower"


def test_early_stopping_watches_a_figure_that_there_is():
    with pytest.raises(ArgumentError, match=r"'acc', but the figures are loss, accuracy; add it"):
        trainer(early_stopping=EarlyStopping(monitor="acc"))
    assert trainer(early_stopping=2).early_stopping.monitor == "accuracy"
    run = trainer(early_stopping=EarlyStopping(monitor="test_f1"), metrics=["f1"])
    assert (run.early_stopping.monitor, run.early_stopping.best_epoch([0.1, 0.3, 0.2])) == ("f1", 2)
    for better, best in ((None, 1), ("higher", 2)):  # what was asked for, not what the metric says
        stopping = EarlyStopping(monitor="mine", better=better)
        run = trainer(early_stopping=stopping, metrics={"mine": Smaller()})
        assert run.early_stopping.best_epoch([0.1, 0.3, 0.2]) == best
    for metric in (F1(average="none"), ConfusionMatrix(), RocAuc(average="none")):
        with pytest.raises(ArgumentError, match="'mine', which is not one number"):
            trainer(early_stopping=EarlyStopping(monitor="mine"), metrics={"mine": metric})
    assert trainer(early_stopping=2, metrics=["f1"]).early_stopping.better == "lower"


# --- from the command line ------------------------------------------------------------------------


def test_command_line(monkeypatch, tmp_path, capsys):
    made = []

    class Noted(Trainer):
        def __init__(self, *args, **options):
            super().__init__(*args, **options, accumulate=2)
            made.append(self)

    x, t = digits(COUNT)
    monkeypatch.setattr(
        cli,
        "load_mnist_sample",
        lambda normalize: ((x.astype("float32"), t), (x[:20].astype("float32"), t[:20])),
    )
    monkeypatch.setattr(cli, "Trainer", Noted)
    words = f"--epochs 2 --batch-size 20 --seed 0 --device numpy --out {tmp_path}".split()
    words += ["--optimizer", "sgd", "--lr", "0.2"]
    assert (
        cli.train_main(
            [*words, "--momentum", "0.8", "--weight-decay", "0.01", "--schedule", "one_cycle"]
        )
        == 0
    )
    (run,) = made
    assert (run.optimizer.lr, run.optimizer.momentum, run.optimizer.weight_decay) == (
        0.2,
        0.8,
        0.01,
    )
    assert run.schedule == OneCycleLR(6)
    with open(tmp_path / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == pytest.approx(run.epoch_loss_list, abs=1e-6)
    assert (
        cli.train_main([*words, "--optimizer", "adagrad", "--momentum", "0.8"]) == cli.USAGE_ERROR
    )
    assert "AdaGrad does not take momentum; it takes lr, lr_decay" in capsys.readouterr().err
    assert set(schedules.SCHEDULES) == {"constant", "step", "cosine", "warmup_cosine", "one_cycle"}


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_running_statistics_are_those_of_the_last_good_step_too(backend):
    net = Model(
        conv=Conv2d(1, 4, 3), bn=BatchNorm2d(4), relu=ReLU(), flatten=Flatten(), fc=Linear(None, 4)
    )
    net.build((1, 8, 8), device=backend.device, seed=0)
    x, t = np.random.default_rng(0).random((60, 1, 8, 8)).astype("float32"), np.arange(60) % 4
    x[40:] *= 1e30  # their squares overflow
    run = Trainer(net, x, t, x[:8], t[:8], epochs=1, mini_batch_size=20, seed=0, verbose=False)
    run.run_batch(run.backend.asarray(np.arange(20)))
    before = net.state_dict()
    run.run_batch(run.backend.asarray(np.arange(40, 60)))
    run.run_batch(run.backend.asarray(np.arange(20, 40)))
    for path, value in net.state_dict().items():
        np.testing.assert_array_equal(value, before[path])
    with pytest.raises(NotFiniteError, match="step 2"):
        run._read_losses()


def test_a_finite_loss_with_gradients_that_are_not_changes_nothing(backend):
    net = Model(flatten=Flatten(), a=Linear(None, 3), b=Linear(None, 4)).build(
        (1, 2, 2), device=backend.device, seed=0
    )
    state = {path: 0 * value for path, value in net.state_dict().items()}
    state["b.weight"] = np.where(np.arange(12).reshape(4, 3) % 2, 2e38, -2e38).astype("float32")
    net.load_state_dict(state)
    x, t = (
        100 * np.random.default_rng(0).standard_normal((20, 1, 2, 2)).astype("float32"),
        np.arange(20) % 4,
    )
    run = Trainer(net, x, t, x, t, epochs=1, mini_batch_size=20, verbose=False)
    with (
        pytest.raises(NotFiniteError, match="its gradients or running statistics are not finite"),
        np.errstate(all="ignore"),
    ):
        run.train()
    for path, value in net.state_dict().items():
        np.testing.assert_array_equal(value, state[path])


def test_a_model_that_was_moved_wants_a_new_trainer():
    pytest.importorskip("array_api_strict")
    net = Model(flatten=Flatten(), fc=Linear(None, 4)).build((1, 2, 2), device="numpy", seed=0)
    x, t = np.zeros((8, 1, 2, 2), "float32"), np.arange(8) % 4
    run = Trainer(net, x, t, x, t, epochs=1, mini_batch_size=4, verbose=False)
    net.to("array_api_strict")
    with pytest.raises(
        StateError,
        match="was moved from numpy on cpu to array_api_strict on cpu; make a new Trainer",
    ):
        run.train()
