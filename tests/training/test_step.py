"""One step of a training: its passes, what it reads from the device, and a loss that is not
finite."""

import re
from dataclasses import replace

import numpy as np
import pytest

from portacnn import Trainer
from portacnn.errors import NotFiniteError
from portacnn.layers import BatchNorm2d, Conv2d, Dropout, Flatten, Linear
from portacnn.models import Model
from portacnn.seeds import permutation
from portacnn.training import StepState
from portacnn.training import trainer as trainer_module
from support.matrix import EACH_LIBRARY
from support.nets import bits, small_net
from support.small_trainings import Recorder, trainer

pytestmark = EACH_LIBRARY

# --- one step -------------------------------------------------------------------------------------


def test_one_forward_and_one_backward_a_step(backend):
    net = small_net(backend.device)
    calls = []

    def spy(layer, name):
        original = getattr(layer, name)

        def called(*args, **kwargs):
            named = "Model" if layer is net else getattr(layer, "name", layer.path)
            calls.append((named, name, kwargs.get("train", False), kwargs.get("need_dx", True)))
            return original(*args, **kwargs)

        setattr(layer, name, called)

    for part in (net, *net.stages):
        spy(part, "forward")
        spy(part, "backward")
    run = trainer(net, train=40, epochs=1, compile_step=False)
    run.run_batch(run.backend.asarray(np.arange(20)))
    forward = ["Model", "conv1 + relu1 + pool1", "flatten", "fc1 + relu2", "fc2"]
    assert [part for part, name, train, _ in calls if name == "forward" and train] == forward
    assert len(calls) == 10
    backward = [(part, need_dx) for part, name, _, need_dx in calls if name == "backward"]
    assert [part for part, _ in backward] == ["Model", *forward[:0:-1]]
    assert [need_dx for _, need_dx in backward] == [False, True, True, True, False]


def test_losses_are_read_at_intervals_only(backend, monkeypatch):
    """12 steps, and three reads of losses and of what was finite: at 5, at 10, and at the end of
    the epoch."""
    monkeypatch.setattr(trainer_module, "LOG_EVERY", 5)
    kind, events = type(backend.backend), []
    original = kind.to_host

    def to_host(self, array):
        events.append(tuple(array.shape))
        return original(self, array)

    run = trainer(small_net(backend.device), train=24, mini_batch_size=2, epochs=1)
    monkeypatch.setattr(kind, "to_host", to_host)
    run.train()
    # counts of the metrics, the test set's loss, and once a training the range of its images
    assert events == [(5, 2), (5, 2), (2, 2), (2,), (1,), (2,), (2,)]
    assert len(run.train_loss_list) == 12


class Peeking(Trainer):
    """What must not happen: it looks at the loss in every step."""

    def step(self, x, t, state):
        loss, ok = super().step(x, t, state)
        self.seen = float(loss)
        return loss, ok


def test_the_trap_catches_a_transfer_in_the_step():
    pytest.importorskip("array_api_strict")
    trainer(small_net("array_api_strict:device1")).train()
    with pytest.raises(
        AssertionError,
        match=r"unplanned transfer to the host: __float__ of an "
        r"array on .*device1",
    ):
        trainer(small_net("array_api_strict:device1"), kind=Peeking).train()
    trainer(small_net("array_api_strict"), kind=Peeking).train()  # the trap is device1's


def test_a_backend_may_take_the_step(backend, monkeypatch):
    taken = []

    def compile_step(self, step, example):
        chosen, state = example
        taken.append([tuple(array.shape) for array in (chosen, state.ok)])
        return lambda *arguments: taken.append("ran") or step(*arguments)

    monkeypatch.setattr(type(backend.backend), "compile_step", compile_step)
    trainer(small_net(backend.device), epochs=1, compile_step=False).train()
    assert taken == []
    trainer(small_net(backend.device), epochs=1).train()
    assert bool(taken) == backend.backend.compiles  # by default
    taken.clear()
    trainer(small_net(backend.device), epochs=1, compile_step=True).train()
    assert taken == [[(20,), ()], "ran", "ran", "ran"]


def test_a_step_takes_its_numbers_from_the_device(backend, monkeypatch):
    """Step, learning rate and count as 0-dimensional arrays: the same run, with dropout, batch
    statistics and Adam."""

    def compile_step(self, step, example):
        def run(chosen, state):
            numbers = {
                name: self.asarray(np.asarray(getattr(state, name)))
                for name in ("step", "lr", "count")
            }
            return step(chosen, replace(state, **numbers))

        return run

    def net():
        layers = {
            "conv": Conv2d(1, 3, 3),
            "bn": BatchNorm2d(3),
            "flatten": Flatten(),
            "drop": Dropout(0.4),
        }
        return Model(**layers, fc=Linear(None, 4)).build(
            (1, 8, 8), device=backend.device, seed=2, dtype="float64"
        )

    monkeypatch.setattr(type(backend.backend), "compile_step", compile_step)
    options = {
        "optimizer": "adamw",
        "schedule": "cosine",
        "optimizer_param": {"lr": 0.05},
        "clip_norm": 1.0,
    }
    runs = [trainer(net(), compile_step=choice, **options) for choice in (False, True)]
    for run in runs:
        run.train()
    np.testing.assert_allclose(runs[0].train_loss_list, runs[1].train_loss_list, rtol=1e-12)
    for path, value in runs[0].model.state_dict().items():
        np.testing.assert_allclose(
            runs[1].model.state_dict()[path], value, rtol=1e-9, atol=1e-12, err_msg=path
        )
    assert runs[1].optimizer.counts == runs[0].optimizer.counts


def test_parameters_and_gradients_keep_their_arrays(backend):
    run = trainer(small_net(backend.device), epochs=1)
    params = run.model.named_parameters()
    run.run_batch(run.backend.asarray(np.arange(20)))
    gradients = run.model.named_gradients()
    run.train()
    assert all(run.model.named_parameters()[path] is value for path, value in params.items())
    assert all(run.model.named_gradients()[path] is value for path, value in gradients.items())


# --- where training cannot go on ------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_divergence_stops_before_the_step_that_failed(backend, optimizer):
    run = trainer(
        small_net(backend.device), kind=Recorder, optimizer=optimizer, optimizer_param={"lr": 1e30}
    )
    with pytest.raises(NotFiniteError) as caught:
        run.train()
    assert isinstance(caught.value, FloatingPointError)
    finite = np.isfinite(run.train_loss_list)
    bad = int(np.argmin(finite))
    assert 0 < bad < 3
    assert re.fullmatch(
        rf"the loss of step {bad + 1} \(epoch 1\) is (nan|inf); the weights are those before that "
        r"step\. "
        r"Lower the learning rate \(1e\+30\)",
        str(caught.value),
    )
    state = run.model.state_dict()
    assert all(np.isfinite(value).all() for value in state.values())
    # The same steps up to the bad one, and no further.
    again = trainer(
        small_net(backend.device),
        optimizer=optimizer,
        optimizer_param={"lr": 1e30},
        compile_step=False,
    )
    order = again.backend.asarray(permutation(0, 0, 50))
    for step in range(bad):
        again.run_batch(order[20 * step : 20 * step + 20])
    for path, value in again.model.state_dict().items():
        np.testing.assert_array_equal(value, state[path])


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_training_can_continue_after_divergence():
    run = trainer(small_net(), optimizer="sgd", optimizer_param={"lr": 1e30})
    with pytest.raises(NotFiniteError):
        run.train()
    run.model.load_state_dict(small_net().state_dict())
    run.optimizer.lr = 0.1
    run.train()
    assert bits(run.model) != bits(small_net())


def test_a_batch_that_gives_nan_changes_no_weight(backend):
    """The loss of the second step is NaN: after it nothing moves, though its gradients are NaN."""
    run = trainer(small_net(backend.device))
    batch = run.backend.asarray(np.arange(20))
    run.run_batch(batch)
    before = bits(run.model)
    x, t = run.x_train[:20, ...], run.t_train[:20]
    _, ok = run.step(
        x * float("nan"), t, StepState(1, 0.1, 2, run.backend.asarray(np.asarray(True)))
    )
    assert not backend.host(ok)
    assert bits(run.model) == before
    _, ok = run.step(x, t, StepState(2, 0.1, 3, ok))
    assert not backend.host(ok)
    assert bits(run.model) == before
