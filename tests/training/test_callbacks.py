"""Callbacks: when they are called, their exceptions, and what is refused."""

import copy
from functools import cache

import numpy as np
import pytest

from portacnn import EarlyStopping, Trainer
from portacnn.callbacks import EMA, Callback
from portacnn.errors import ArgumentError
from support.callbacks import EachStep, Weights, train
from support.matrix import EACH_LIBRARY
from support.trainings import STEPS, make, outcome

pytestmark = EACH_LIBRARY


class Seen(Callback):
    """Writes down what it is called with."""

    def __init__(self):
        self.calls = []

    def on_train_begin(self, trainer):
        self.calls.append("train begins")

    def on_epoch_begin(self, trainer):
        self.calls.append(f"epoch {trainer.epoch} begins")

    def on_epoch_end(self, trainer, figures):
        self.calls.append(figures)

    def on_train_end(self, trainer):
        self.calls.append("train ends")


class Breaking(Callback):
    """Raises once, in the method and at the step that it is told."""

    every_step = True

    def __init__(self, method, step):
        self.method, self.step, self.error = method, step, RuntimeError("mine")

    def _at(self, method, trainer):
        if (method, trainer.steps_done) == (self.method, self.step) and self.error:
            error, self.error = self.error, None
            raise error

    def on_train_begin(self, trainer):
        self._at("on_train_begin", trainer)

    def on_epoch_begin(self, trainer):
        self._at("on_epoch_begin", trainer)

    def on_update(self, trainer, ok):
        self._at("on_update", trainer)

    def on_step_end(self, trainer, loss):
        self._at("on_step_end", trainer)

    def on_epoch_end(self, trainer, figures):
        self._at("on_epoch_end", trainer)

    def on_train_end(self, trainer):
        self._at("on_train_end", trainer)


# --- calls ----------------------------------------------------------------------------------------


def test_when_they_are_called(backend):
    seen = Seen()
    trainer = train(backend.device, [seen], epochs=2)
    first, second = (
        {name: values[epoch] for name, values in trainer.history.items()} for epoch in (0, 1)
    )
    begins = ("epoch 0 begins", "epoch 1 begins")
    assert seen.calls == ["train begins", begins[0], first, begins[1], second, "train ends"]


def test_each_step_is_read_only_where_one_asks(backend, monkeypatch):
    kind, reads = type(backend.backend), []
    original = kind.to_host

    def to_host(self, array):
        reads.append(tuple(array.shape))
        return original(self, array)

    monkeypatch.setattr(kind, "to_host", to_host)
    plain = train(backend.device, [Seen(), EMA()], epochs=1)
    assert [shape for shape in reads if shape[1:] == (2,)] == [(STEPS, 2)]
    reads.clear()
    each = EachStep()
    trainer = train(backend.device, each, epochs=1)
    assert [shape for shape in reads if shape[1:] == (2,)] == [(1, 2)] * STEPS
    assert each.losses == trainer.train_loss_list == plain.train_loss_list


@pytest.mark.parametrize("looks", [False, True])
def test_what_looks_inside_a_step_has_it_run_as_usual(backend, monkeypatch, looks):
    class Inside(Callback):
        inside_step = looks

        def on_train_begin(self, trainer):
            self.outputs = []
            layer = trainer.model.layer_at("fc")
            self.handle = layer.on_output(lambda y: self.outputs.append(y.shape))

        def on_train_end(self, trainer):
            self.handle.remove()

    taken = []

    def compile_step(self, step, example):
        taken.append("taken")
        return step

    monkeypatch.setattr(type(backend.backend), "compile_step", compile_step)
    inside = Inside()
    trainer = train(backend.device, [inside, EMA()], epochs=1, compile_step=True)
    assert taken == ([] if looks else ["taken"])
    assert inside.outputs.count((8, 4)) >= STEPS - 1
    assert not trainer.model.layer_at("fc").hooks


def test_stop_from_a_callback_continues_exactly():
    class StopAt(EachStep):
        def on_step_end(self, trainer, loss):
            if trainer.steps_done in (3, STEPS):
                trainer.stop()

    trainer = train(callbacks=[StopAt()])
    assert trainer.steps_done == 3
    trainer.train()
    assert (trainer.steps_done, trainer.epoch) == (STEPS, 1)  # the epoch's end is not left out
    trainer.train()
    assert outcome(trainer) == outcome(train())


# --- exceptions -----------------------------------------------------------------------------------


@cache
def watched(device):
    """A training that nothing stops, and the weights after each of its steps."""
    weights = Weights()
    return weights, train(device, [EMA(), weights])


@pytest.mark.parametrize(
    ("method", "step", "steps", "epochs"),
    [
        ("on_train_begin", 0, 0, 0),
        ("on_epoch_begin", STEPS, STEPS, 1),
        ("on_update", 4, 4, 0),
        ("on_step_end", 4, 4, 0),
        ("on_step_end", STEPS, STEPS, 0),
        ("on_epoch_end", 2 * STEPS, 2 * STEPS, 2),
        ("on_epoch_end", 3 * STEPS, 3 * STEPS, 3),
        ("on_train_end", 3 * STEPS, 3 * STEPS, 3),
    ],
)
def test_an_exception_stops_between_two_steps(tmp_path, backend, method, step, steps, epochs):
    """The weights are those after so many steps, and all goes on as if nothing had happened."""
    weights, whole = watched(backend.device)
    broken, ema, seen = Breaking(method, step), EMA(), Seen()
    trainer = make(
        backend.device, kind=Trainer, callbacks=[ema, seen, broken], checkpoint_dir=tmp_path
    )
    with pytest.raises(RuntimeError, match="mine"):
        trainer.train()
    assert trainer.train_loss_list == whole.train_loss_list[:steps]
    assert trainer.epoch == epochs
    assert all(len(values) == epochs for values in trainer.history.values())
    for path, value in trainer.model.state_dict().items():
        np.testing.assert_array_equal(value, weights.after[steps][path])
    if method != "on_train_begin":
        assert seen.calls[-1] == "train ends"
    trainer.checkpoint(tmp_path / "own")
    if not trainer.finished:
        trainer.train()
    if (method, step) != ("on_step_end", STEPS):
        assert outcome(trainer) == outcome(whole)


def test_the_best_weights_are_there_after_an_exception_at_the_end():
    options = {"early_stopping": EarlyStopping(2), "optimizer_param": {"lr": 0.15}, "epochs": 6}
    whole = train(**options)
    assert whole.stopped_early
    trainer = make(kind=Trainer, callbacks=[Breaking("on_epoch_end", whole.steps_done)], **options)
    with pytest.raises(RuntimeError, match="mine"):
        trainer.train()
    assert outcome(trainer) == outcome(whole)


class Silent(Callback):
    def on_step_end(self, trainer, loss):
        pass


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"callbacks": [EMA]}, r"callbacks=\[EMA\(...\)\], got <class"),
        ({"callbacks": EMA}, r"callbacks=\[EMA\(...\)\], got <class"),
        ({"callbacks": [print]}, "must be a list of portacnn.callbacks objects"),
        ({"callbacks": 3}, "must be a list of portacnn.callbacks objects, .* got 3"),
        ({"callbacks": "csv"}, r"callbacks=\[CSVLogger\(...\)\], got 'csv'"),
        ({"callbacks": [Seen()] * 2}, "the same Seen object twice"),
        ({"callbacks": [Silent()]}, "Silent: it defines on_step_end.*every_step = True"),
        ({"callbacks": [EarlyStopping(2)], "early_stopping": 3}, "expected one EarlyStopping"),
        ({"callbacks": [EarlyStopping(2), EarlyStopping(3)]}, "expected one EarlyStopping"),
    ],
)
def test_what_is_no_callback_is_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        make(**options)


def test_early_stopping_among_the_callbacks_is_early_stopping():
    options = {"optimizer_param": {"lr": 0.15}, "epochs": 6}
    one = train(callbacks=[EarlyStopping(2), Seen()], **options)
    assert one.stopped_early
    assert outcome(one) == outcome(train(early_stopping=EarlyStopping(2), **options))


# --- averages of weights --------------------------------------------------------------------------


def test_a_copy_of_a_trainer_has_callbacks_of_its_own(backend):
    trainer = make(backend.device, kind=Trainer, callbacks=[EMA(), EachStep()], epochs=1)
    trainer.train()
    trainer.epochs = 2
    again = copy.deepcopy(trainer)
    ema, mine = next(iter(trainer.callbacks)), next(iter(again.callbacks))
    before = mine.state_dict()
    trainer.train()
    for name, value in mine.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    again.train()
    for name, value in ema.state_dict().items():
        np.testing.assert_array_equal(mine.state_dict()[name], value)
