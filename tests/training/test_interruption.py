"""Training interrupted: Ctrl-C waits for the step's end, and what does not wait leaves a Trainer
that goes on."""

import signal
import sys

import numpy as np
import pytest

from portacnn.optim import AdamW, biases_and_norms
from support.nets import bits
from support.trainings import EPOCHS, HISTORY, STEPS, Watched, make, outcome, resumed


@pytest.fixture(autouse=True)
def usual_ctrl_c(monkeypatch):
    monkeypatch.delenv("PORTACNN_BACKEND", raising=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # it was put back
    signal.signal(signal.SIGINT, before)


class Interrupting(AdamW):
    """Does something in the middle of an update: the parameters that decay have taken it, the
    others not yet."""

    calls, at, act = 0, 0, staticmethod(lambda: None)

    def apply(self, params, grads, state, step, **common):
        super().apply(params, grads, state, step, **common)
        self.calls += 1
        if self.calls == 2 * self.at - 1:
            type(self).act()


def interrupting(step, act, **options):
    Interrupting.act = staticmethod(act)
    trainer = make(
        optimizer=Interrupting(0.01, no_decay=biases_and_norms), optimizer_param=None, **options
    )
    trainer.optimizer.at = step
    return trainer


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("step", [1, 5, STEPS, STEPS + 1, EPOCHS * STEPS])
def test_ctrl_c_in_the_middle_of_an_update_waits_for_the_step(tmp_path, step):
    """A user's own ``except KeyboardInterrupt``, and train() again: to the bit as if nothing had
    happened."""
    whole = interrupting(0, ctrl_c)
    whole.train()
    trainer = interrupting(step, ctrl_c, checkpoint_dir=tmp_path, checkpoint_every=10**9)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.steps_done == trainer.optimizer.steps == len(trainer.train_loss_list) == step
    assert np.isfinite(trainer.train_loss_list).all()
    again = resumed(trainer.last_checkpoint)  # written before the KeyboardInterrupt came
    assert outcome(again) == outcome(trainer)
    for goes_on in (trainer, again):
        if not goes_on.finished:
            goes_on.train()
        assert outcome(goes_on) == outcome(whole)


class AtLine:
    """Within it, Ctrl-C comes before the n-th line that portacnn runs; it counts the lines."""

    def __init__(self, number):
        self.number, self.count = number, 0

    def _trace(self, frame, event, _):
        if "portacnn" not in frame.f_code.co_filename:
            return None
        if event == "line":
            self.count += 1
            if self.count == self.number:
                ctrl_c()
        return self._trace

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)


def test_ctrl_c_at_any_line_leaves_a_whole_state():
    """Nothing is lost, and nothing is done twice, wherever it comes."""
    options = {"epochs": 1, "mini_batch_size": 25}
    whole, traced = make(**options), make(**options)
    whole.train()
    with AtLine(0) as lines:
        traced.train()
    stopped_at = set()
    for number in np.linspace(1, 0.98 * lines.count, 20, dtype=int):
        trainer = make(**options)
        with pytest.raises(KeyboardInterrupt), AtLine(number):
            trainer.train()
        stopped_at.add(trainer.steps_done)
        if not trainer.finished:
            trainer.train()
        assert outcome(trainer) == outcome(whole), number
    assert stopped_at >= {1, 2}


def test_a_second_ctrl_c_does_not_wait():
    def twice():
        ctrl_c()
        ctrl_c()

    trainer = interrupting(5, twice)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.optimizer.steps == 4
    trainer.train()
    assert len(trainer.train_loss_list) == EPOCHS * STEPS


def test_an_interrupted_first_update(tmp_path):
    """The optimizer has made its state, and no step has been counted: a checkpoint of that can be
    resumed."""

    def act():
        raise KeyboardInterrupt

    trainer = interrupting(1, act)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.checkpoint(tmp_path / "one")
    again = resumed(tmp_path / "one")
    assert again.steps_done == again.optimizer.steps == 0
    again.train()
    assert again.finished


def test_a_handler_of_ones_own_is_left_alone():
    class MineError(Exception):
        pass

    def mine(number, frame):
        raise MineError

    signal.signal(signal.SIGINT, mine)
    try:
        trainer = interrupting(5, ctrl_c)
        with pytest.raises(MineError):
            trainer.train()
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("where", ["forward", "update", "evaluation"])
@pytest.mark.parametrize("options", [{}, {"early_stopping": 9}], ids=["plain", "early stopping"])
def test_what_does_not_wait_leaves_whole_steps(tmp_path, where, options):
    """The epoch is begun anew. Lists, counts and checkpoints know nothing of the one that was
    broken off."""

    class Broken(Watched):
        def _evaluate(self, samples, loss):
            if (
                where == "evaluation"
                and loss is not None
                and self.epoch == 1
                and not hasattr(self, "done")
            ):
                self.done = True
                raise KeyboardInterrupt
            return super()._evaluate(samples, loss)

    def act():
        if where == "update":
            raise KeyboardInterrupt

    trainer = interrupting(STEPS + 4, act, kind=Broken, **options)
    before = {}
    forward = trainer.model.forward

    def interrupted(x, **arguments):
        if where == "forward" and trainer.optimizer.steps == STEPS + 3 and not before:
            before.update(bits(trainer.model))
            forward(x, **arguments)  # its running statistics have moved
            raise KeyboardInterrupt
        return forward(x, **arguments)

    trainer.model.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    if where == "forward":
        assert bits(trainer.model) == before
    trainer.checkpoint(tmp_path / "one")
    del trainer.model.forward
    again = resumed(tmp_path / "one")
    assert (again.epoch, again.batch, again.steps_done) == (1, 0, STEPS)
    assert [len(getattr(again, name)) for name in HISTORY] == [STEPS, 1, 1, 1, 1]
    assert again.train_loss_list == trainer.train_loss_list[:STEPS]
    for goes_on in (trainer, again):
        goes_on.train()
        assert [len(getattr(goes_on, name)) for name in HISTORY] == [
            EPOCHS * STEPS,
            EPOCHS,
            EPOCHS,
            EPOCHS,
            EPOCHS,
        ]
    assert outcome(again) == outcome(trainer)


@pytest.mark.parametrize("step", [4, STEPS + 5])
def test_a_checkpoint_after_an_interrupted_epoch(tmp_path, step):
    """Losses of the epoch that begins anew are in no file: the file goes on as the Trainer does."""

    def act():
        raise KeyError("an error in the middle of an epoch")

    trainer = interrupting(step, act, checkpoint_dir=tmp_path / "own", checkpoint_every=2)
    with pytest.raises(KeyError):
        trainer.train()
    assert len(trainer.train_loss_list) > trainer.steps_done  # those that were read before it
    again = resumed(trainer.checkpoint(tmp_path / "one"), checkpoint_dir=tmp_path / "again")
    assert again.steps_done == len(again.train_loss_list) == (step - 1) // STEPS * STEPS
    for each in (trainer, again):
        each.train()
    assert outcome(again) == outcome(trainer)
