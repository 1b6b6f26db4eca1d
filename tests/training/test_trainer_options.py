"""The Trainer's options: against PyTorch's own loop, and what each promises by itself."""

from functools import cache

import numpy as np
import pytest

from portacnn.errors import ArgumentError, StateError
from portacnn.layers import Dropout, Flatten, Linear
from portacnn.models import Model
from portacnn.optim import SGD, biases_and_norms
from portacnn.schedules import ConstantLR, CosineAnnealingLR, OneCycleLR, PerEpoch, StepLR, warm_up
from portacnn.seeds import permutation
from portacnn.training import StepState, Trainer
from portacnn.training.shares import part_sizes
from support.bright_rows import COUNT, EPOCHS, SIZE, digits, net, same, trainer, weights
from support.matrix import EACH_LIBRARY, needs

pytestmark = EACH_LIBRARY


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


# --- against PyTorch ------------------------------------------------------------------------------


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


def test_parts_add_up_to_the_batch(backend):
    whole = trainer(net(backend.device), epochs=2)
    whole.train()
    for accumulate in (2, 3, 7, 20):
        parts = trainer(net(backend.device), accumulate=accumulate, epochs=2)
        parts.train()
        np.testing.assert_allclose(
            parts.train_loss_list, whole.train_loss_list, rtol=1e-9, err_msg=str(accumulate)
        )
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


def test_gradients_keep_their_arrays(backend):
    run = trainer(net(backend.device), accumulate=3, clip_norm=0.1, epochs=1)
    run.train()
    gradients = run.model.named_gradients()
    run.epochs = 2
    run.train()
    assert all(run.model.named_gradients()[path] is array for path, array in gradients.items())


class Rates(Trainer):
    """Notes the states that its steps get."""

    def step(self, x, t, state):
        assert isinstance(state, StepState)
        self.states = [*getattr(self, "states", []), state]
        return super().step(x, t, state)


# --- schedules ------------------------------------------------------------------------------------


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


# --- figures, and what is not finite --------------------------------------------------------------


def test_epoch_losses_are_means_over_images():
    run = trainer()
    run.train()
    for epoch, mean in enumerate(run.epoch_loss_list):
        a, b, c = run.train_loss_list[3 * epoch : 3 * epoch + 3]
        assert mean == pytest.approx((20 * a + 20 * b + 10 * c) / 50)
    assert len(run.epoch_loss_list) == EPOCHS


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
def test_invalid_options_are_refused(changes, message):
    model = net()
    before = weights(model)
    with pytest.raises(ArgumentError) as caught:
        trainer(model, **changes)
    assert message in str(caught.value)
    same(weights(model), before)


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
