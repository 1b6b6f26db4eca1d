"""Averages of weights (EMA)."""

from contextlib import suppress

import numpy as np
import pytest

from portacnn import EarlyStopping, Trainer
from portacnn.callbacks import EMA, Callback
from portacnn.errors import ArgumentError, StateError
from support.callbacks import Weights, train
from support.matrix import EACH_LIBRARY
from support.nets import bits
from support.trainings import data, drawing_net, make, outcome

pytestmark = EACH_LIBRARY

# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"decay": 1.0}, {"decay": -0.1}, {"warm_up": 1}])
def test_invalid_arguments_of_ema_are_refused(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        EMA(**options)


# --- averages of weights --------------------------------------------------------------------------


@pytest.mark.parametrize("warm_up", [False, True])
def test_ema_is_the_average_of_the_weights(backend, warm_up):
    ema, weights = EMA(0.8, warm_up=warm_up), Weights()
    trainer = train(backend.device, [ema, weights], epochs=2, dtype="float64")
    average = dict(weights.after[0])
    for n, after in enumerate(weights.after[1:]):
        decay = min(0.8, (1 + n) / (10 + n)) if warm_up else 0.8
        average = {
            p: decay * average[p] + (1 - decay) * value if value.dtype.kind == "f" else value
            for p, value in after.items()
        }
    own = bits(trainer.model)
    with ema.applied(trainer.model):
        figures = trainer.evaluate(*data("float64")[2:])
        for path, value in trainer.model.state_dict().items():
            np.testing.assert_allclose(value, average[path], rtol=1e-12, atol=1e-14)
    assert bits(trainer.model) == own
    assert trainer.history["test_loss"][-1] == pytest.approx(figures["loss"], rel=1e-12)
    assert trainer.evaluate(*data("float64")[2:])["loss"] != figures["loss"]
    ema.copy_to(trainer.model)
    assert trainer.evaluate(*data("float64")[2:])["loss"] == figures["loss"]


def test_ema_changes_no_training(backend):
    plain, averaged = train(backend.device), train(backend.device, [EMA()])
    silent = train(backend.device, [EMA(evaluate=False)])
    assert bits(plain.model) == bits(averaged.model)
    assert plain.train_loss_list == averaged.train_loss_list
    assert plain.history["test_loss"] != averaged.history["test_loss"]
    assert outcome(silent) == outcome(plain)


def test_ema_gives_the_weights_back_after_an_error(backend):
    ema = EMA()
    trainer = train(backend.device, [ema], epochs=1)
    own = bits(trainer.model)
    with pytest.raises(RuntimeError), ema.applied(trainer.model):
        raise RuntimeError
    assert bits(trainer.model) == own


def test_ema_takes_no_step_that_was_not_finite(backend):
    from portacnn.errors import NotFiniteError

    class Poison(Callback):
        def on_update(self, trainer, ok):
            if trainer.steps_done == 4:
                trainer.x_train[...] = np.nan if "numpy" in backend.name else _nan

    _nan = backend.xp.asarray(float("nan"), dtype=backend.xp.float32, device=backend.backend.device)
    weights, ema = Weights(), EMA(0.5, warm_up=False)
    with suppress(NotFiniteError):
        train(backend.device, [ema, weights, Poison()], epochs=1)
    late = EMA(0.5, warm_up=False)
    trainer = make(backend.device, kind=Trainer, callbacks=[late, Poison()], epochs=1)
    with pytest.raises(NotFiniteError):
        trainer.train()  # its losses are read at the end of the epoch only: three steps too late
    expected = dict(weights.after[0])
    for after in weights.after[1:5]:
        expected = {
            p: 0.5 * expected[p] + 0.5 * value if value.dtype.kind == "f" else value
            for p, value in after.items()
        }
    late.copy_to(trainer.model)
    for path, value in trainer.model.state_dict().items():
        np.testing.assert_allclose(value, expected[path], rtol=1e-5, atol=1e-6)


def test_best_weights_with_ema_are_those_that_were_evaluated():
    trainer = train(callbacks=[EMA()], early_stopping=EarlyStopping(9, "loss"))
    best = min(trainer.test_loss_list)
    assert trainer.evaluate(*data()[2:])["loss"] == pytest.approx(best, rel=1e-6)


def test_ema_without_or_of_another_network():
    with pytest.raises(StateError, match="no averages yet"):
        EMA().copy_to(drawing_net("numpy"))
    ema = EMA()
    train(callbacks=[ema], epochs=1)
    from support.nets import small_net

    with pytest.raises(StateError, match="another network"):
        ema.copy_to(small_net())
