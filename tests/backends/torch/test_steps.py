"""Whole training steps on PyTorch: compiled on the CPU, and as CUDA graphs on a stand-in."""

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from portacnn import Model, Trainer
from portacnn.backends.torch import steps
from portacnn.errors import StateError
from portacnn.layers import BatchNorm2d, Conv2d, Dropout, Flatten, Layer, Linear, ReLU
from portacnn.runtime import resolve
from support import torch_graphs
from support.capture_rig import Fit, State, data, run


@pytest.fixture
def home():
    return resolve("torch")


@pytest.fixture
def graphs(monkeypatch):
    return torch_graphs.install(monkeypatch)


@pytest.fixture
def traced():
    """As the suite has it: the traced operations as they are, without the compiler."""


@pytest.fixture(params=["graphs", "traced"])
def whole(request):
    return request.getfixturevalue(request.param)


def test_steps_of_two_kinds_are_those_of_the_step_itself(whole, home):
    plain, recorded = Fit(home), Fit(home)
    step = home.compile_step(recorded, ())
    for size, first in ((8, 0), (5, 6), (8, 12)):
        assert run(home, step, 6, size, first) == run(home, plain, 6, size, first)
    assert recorded.weights() == plain.weights()
    assert (step.graphs, step.reason) == (2, None)
    assert recorded.called == 6  # two as usual and one recorded, of each kind


def test_a_graph_is_replayed_and_its_results_are_the_callers(graphs, home):
    step = home.compile_step(Fit(home), ())
    run(home, step, 3)
    (x, y), ok = (map(home.asarray, data(9))), torch.tensor(True)
    first, _ = step(x, y, State(9, 0.1, ok))
    before = first.clone()
    step(x + 1, y, State(10, 0.1, ok))
    assert torch.equal(first, before)
    assert [graph.replayed for graph in graphs] == [3]


def test_more_kinds_than_are_kept_run_as_usual(traced, home):
    fit = Fit(home)
    step = home.compile_step(fit, ())
    for size in range(2, 8):
        run(home, step, 4, size)
    assert step.graphs == steps.MOST
    assert fit.called == 3 * steps.MOST + 4 * 2


def net(home, dtype: str = "float32") -> Model:
    layers = {"conv": Conv2d(1, 4, 3), "bn": BatchNorm2d(4), "relu": ReLU(), "flat": Flatten()}
    layers |= {"drop": Dropout(0.4), "fc": Linear(None, 3)}
    return Model(**layers).build((1, 8, 8), device=home, seed=2, dtype=dtype)


def trained(home, kind: type[Trainer] = Trainer, compile_step: bool = True, **options: Any):
    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((44, 1, 8, 8)).astype("float32"), rng.integers(0, 3, 44)
    options = {"optimizer": "adamw", "schedule": "cosine", "clip_norm": 1.0, **options}
    settings: dict[str, Any] = {"epochs": 3, "batch_size": 8, "seed": 1, "verbose": False}
    settings |= options
    done = kind(net(home), x, t, x[:8], t[:8], compile_step=compile_step, **settings)
    done.train()
    return done


def same(one: Trainer, other: Trainer) -> None:
    assert one.train_loss_list == other.train_loss_list
    for path, value in one.model.state_dict().items():
        np.testing.assert_array_equal(other.model.state_dict()[path], value, err_msg=path)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"augment": "standard"}], ids=str)
def test_a_training_is_the_same_bit_by_bit(whole, home, options):
    """With batch norm, dropout and a schedule; the last batch of an epoch is shorter."""
    recorded = trained(home, **options)
    same(trained(home, compile_step=False, **options), recorded)
    step = recorded.updater.compiled
    assert (step.graphs, step.reason) == (2, None)


def warnings_of(caplog) -> list[logging.LogRecord]:
    return [r for r in caplog.records if (r.name, r.levelno) == ("portacnn", logging.WARNING)]


class Peeking(Trainer):
    def step(self, x, t, state, weight=None):
        loss, ok = super().step(x, t, state, weight)
        self.seen = float(loss)
        return loss, ok


def test_a_step_that_reads_a_value_is_named_once_and_goes_on(whole, home, caplog):
    done = trained(home, Peeking)
    same(trained(home, Peeking, compile_step=False), done)
    (record,) = warnings_of(caplog)
    assert "Trainer._whole_step: " in record.getMessage()
    assert ("reads a value" in record.getMessage()) == (whole is None)
    assert "torch on cpu cannot be compiled; training continues" in record.getMessage()
    assert done.updater.compiled.graphs == 0


def test_without_a_compiler(monkeypatch, home, caplog):
    def compiler(module: Any, **_: Any) -> Any:
        def call(*arguments: Any) -> Any:
            raise RuntimeError("no working C++ compiler found: g++\nmore lines")

        return call

    monkeypatch.setattr(torch, "compile", compiler)
    done = trained(home)
    same(trained(home, compile_step=False), done)
    (record,) = warnings_of(caplog)
    assert "RuntimeError: no working C++ compiler found: g++" in record.getMessage()
    assert "more lines" not in record.getMessage()


def test_an_error_of_the_step_itself_is_the_callers(traced, home, caplog):
    def step(x, state):
        raise ValueError("mine")

    compiled = home.compile_step(step, ())
    for _ in range(4):
        with pytest.raises(ValueError, match="mine"):
            compiled(torch.ones(2), State(0, 0.1, torch.tensor(True)))
    assert compiled.reason is None
    assert not warnings_of(caplog)


class Own:
    """A step with state of its own."""

    def __init__(self) -> None:
        self.mean, self.kept = torch.zeros(2), [torch.zeros(2)]

    def replaces(self, x, state):
        self.mean = self.mean * 0.5 + x
        return self.mean * 2.0

    def replaces_and_reads_a_value(self, x, state):
        self.mean = self.mean * 0.5 + x
        return x + float(x.sum())

    def observes(self, x, state):
        self.mean = x * 3.0
        return self.mean

    def collects(self, x, state):
        self.kept.append(x * 3.0)
        return x + 1.0


@pytest.mark.parametrize("name", ["replaces", "replaces_and_reads_a_value", "collects"])
def test_a_step_that_needs_an_array_which_it_made_is_refused(whole, home, name):
    """Replayed, it would read the same old array in each step, and keep an array without values."""
    own = Own()
    step, x, ok = home.compile_step(getattr(own, name), ()), torch.ones(2), torch.tensor(True)
    for number in range(2):
        step(x, State(number, 0.1, ok))
    holder = "a list" if name == "collects" else "Own.mean"
    for number in range(2, 4):
        with pytest.raises(StateError, match=rf"\({holder}\).* or make the Trainer with comp"):
            step(x, State(number, 0.1, ok))


def test_a_step_that_makes_an_array_for_others_runs_as_usual(whole, home, caplog):
    own = Own()
    step, ok = home.compile_step(own.observes, ()), torch.tensor(True)
    for number in range(5):
        step(torch.full((2,), float(number)), State(number, 0.1, ok))
        assert own.mean.tolist() == [3.0 * number] * 2
    (record,) = warnings_of(caplog)
    assert "it keeps an array that it makes: Own.mean" in record.getMessage()


@pytest.mark.parametrize("whole", ["traced"], indirect=True)
def test_a_layer_that_replaces_an_array_stops_the_training(whole, home):
    class Centred(Layer):
        def infer(self, shape):
            self.mean = None
            return shape

        def forward(self, x, *, train, keep):
            mean = x.mean(axis=0)
            self.mean = mean if self.mean is None else self.mean * 0.5 + mean
            return x - self.mean, None

        def backward(self, dy, cache):
            return dy

    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((40, 1, 8, 8)).astype("float32"), rng.integers(0, 3, 40)
    layers = {"own": Centred(), "flat": Flatten(), "fc": Linear(None, 3)}
    model = Model(**layers).build((1, 8, 8), device=home, seed=2)
    run = Trainer(model, x, t, x[:8], t[:8], batch_size=8, verbose=False, compile_step=True)
    with pytest.raises(StateError, match=r"Centred\.mean"):
        run.train()


def test_other_devices_say_so(caplog):
    elsewhere = SimpleNamespace(device=SimpleNamespace(type="mps"))
    step = steps.WholeStep(elsewhere, lambda x, state: x + 1)  # type: ignore[arg-type]
    x = torch.ones(2)
    for _ in range(4):
        assert torch.equal(step(x, State(0, 0.1, torch.tensor(True))), x + 1)
    (record,) = warnings_of(caplog)
    assert "it is supported on CUDA and on the CPU" in record.getMessage()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PyTorch's own
def test_the_compilers_step_is_the_steps(monkeypatch, home):
    """Needs a C++ compiler. In float64, where the order of sums moves nothing."""
    monkeypatch.setattr(torch, "compile", torch_graphs.COMPILE)
    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((24, 1, 8, 8)), rng.integers(0, 3, 24)
    found = []
    for compiled in (False, True):
        run = Trainer(
            *(net(home, "float64"), x, t, x[:8], t[:8]),
            **{"epochs": 2, "batch_size": 8, "seed": 1, "verbose": False},
            compile_step=compiled,
        )
        run.train()
        found.append(run)
    if (reason := found[1].updater.compiled.reason) is not None:
        pytest.skip(reason)
    assert found[1].updater.compiled.graphs == 1
    plain, other = (run.model.state_dict() for run in found)
    for path, value in plain.items():
        np.testing.assert_allclose(other[path], value, rtol=1e-9, atol=1e-12, err_msg=path)
