"""Whole training steps on PyTorch: compiled on the CPU, and as CUDA graphs on a stand-in for them."""

import logging
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from portacnn import Model, Trainer
from portacnn.backends.torch import steps
from portacnn.layers import BatchNorm2d, Conv2d, Dropout, Flatten, Linear, ReLU
from portacnn.runtime import resolve
from support.capture_rig import Fit, State, data, run


class Tape(TorchDispatchMode):
    """Records operations as a CUDA graph does: what writes to memory that is there is not done,
    and a value is not read on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        if func._schema.is_mutable:
            self.calls.append((func, args, kwargs, None))
            return args[0]
        clones = func is torch.ops.aten.native_batch_norm.default  # it writes to running statistics
        found = func(*(tree_map(_clone, args) if clones else args), **kwargs)
        if not any(a.alias_info is not None for a in func._schema.arguments):  # no view
            self.calls.append((func, args, kwargs, found))
        return found


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


class Graph:
    """torch.cuda.CUDAGraph"""

    made: list["Graph"] = []

    def __init__(self) -> None:
        self.tape = Tape()
        self.replayed = 0
        Graph.made.append(self)

    def replay(self) -> None:
        self.replayed += 1
        for func, args, kwargs, found in self.tape.calls:
            fresh = func(*args, **kwargs)
            outputs = found if isinstance(found, tuple | list) else [found]
            results = fresh if isinstance(fresh, tuple | list) else [fresh]
            for there, result in zip(outputs, results, strict=True):
                if there is not None:
                    there.copy_(result)


@contextmanager
def capture(graph: Graph, *, pool: Any, capture_error_mode: str):
    """torch.cuda.graph"""
    assert (pool, capture_error_mode) == ("a pool", "thread_local")
    with graph.tape:
        yield


@pytest.fixture
def home():
    return resolve("torch")


@pytest.fixture
def graphs(monkeypatch):
    """Steps on the CPU as if it were a CUDA device."""
    Graph.made.clear()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "a pool")
    monkeypatch.setattr(steps, "_compiled", steps._graph)
    return Graph.made


@pytest.fixture
def traced(monkeypatch):
    """The traced operations as they are, without the compiler."""
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)


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


def net(home) -> Model:
    layers = {"conv": Conv2d(1, 4, 3), "bn": BatchNorm2d(4), "relu": ReLU(), "flat": Flatten()}
    layers |= {"drop": Dropout(0.4), "fc": Linear(None, 3)}
    return Model(**layers).build((1, 8, 8), device=home, seed=2)


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


def test_other_devices_say_so(caplog):
    elsewhere = SimpleNamespace(device=SimpleNamespace(type="mps"))
    step = steps.WholeStep(elsewhere, lambda x, state: x + 1)  # type: ignore[arg-type]
    x = torch.ones(2)
    for _ in range(4):
        assert torch.equal(step(x, State(0, 0.1, torch.tensor(True))), x + 1)
    (record,) = warnings_of(caplog)
    assert "it is supported on CUDA and on the CPU" in record.getMessage()


@pytest.mark.slow
def test_the_compilers_step_is_the_steps(home):
    """Needs a C++ compiler; within what the summation order moves."""
    done, plain = trained(home, epochs=2), trained(home, compile_step=False, epochs=2)
    if (reason := done.updater.compiled.reason) is not None:
        pytest.skip(reason)
    assert done.updater.compiled.graphs >= 1
    np.testing.assert_allclose(done.train_loss_list, plain.train_loss_list, rtol=1e-4)
    for path, value in plain.model.state_dict().items():
        found = done.model.state_dict()[path]
        np.testing.assert_allclose(found, value, rtol=1e-3, atol=1e-4, err_msg=path)
