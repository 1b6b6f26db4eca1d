"""The learning-rate range test."""

import numpy as np
import pytest

from portacnn import Trainer
from portacnn.callbacks import Callback, lr_range_test
from portacnn.errors import ArgumentError
from support.matrix import EACH_LIBRARY, backends
from support.nets import bits
from support.trainings import make, outcome

pytestmark = EACH_LIBRARY


def test_a_range_test_leaves_no_trace(backend):
    def run(test):
        trainer = make(backend.device, kind=Trainer, optimizer="momentum", epochs=2)
        trainer.epochs = 1
        trainer.train()
        trainer.epochs = 2
        if test:
            lr_range_test(trainer, 1e-4, 10.0, steps=12)
        trainer.train()
        return trainer

    tested, plain = run(True), run(False)
    assert outcome(tested) == outcome(plain)
    assert tested.optimizer.steps == plain.optimizer.steps


@backends("numpy")
def test_a_range_test_on_a_known_loss(backend):
    """With SGD from the same weights, each step's loss is that of a training written out here."""
    from portacnn.optim import SGD

    trainer = make(kind=Trainer, optimizer="sgd", dtype="float64")
    result = lr_range_test(trainer, 0.01, 1.0, steps=9)
    np.testing.assert_allclose(result.rates, np.geomspace(0.01, 1.0, 9), rtol=1e-12)

    class Growing(Callback):
        def on_epoch_begin(self, trainer):
            trainer.schedule = lambda step, lr: np.geomspace(0.01, 1.0, 9)[min(step, 8)]

    growing = {"optimizer": SGD(0.1), "optimizer_param": None, "callbacks": [Growing()]}
    again = make(kind=Trainer, **growing, dtype="float64", epochs=2)
    again.train()
    np.testing.assert_allclose(result.losses, again.train_loss_list[:9], rtol=1e-9)


def test_a_range_test_ends_where_the_loss_diverges():
    trainer = make(kind=Trainer, optimizer="sgd", loss="cross_entropy")
    before = bits(trainer.model)
    result = lr_range_test(trainer, 1e-3, 1e38, steps=40)
    assert len(result.losses) == len(result.rates) == len(result.smoothed) < 40
    assert np.isfinite(result.losses).all()
    assert bits(trainer.model) == before
    assert trainer.train_loss_list == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lowest": 0.0}, "lowest must be a number above 0"),
        ({"lowest": 2.0}, "lowest must be below highest"),
        ({"steps": 1}, "steps must be a whole number of at least 2"),
    ],
)
def test_invalid_arguments_of_a_range_test_are_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        lr_range_test(make(kind=Trainer), **arguments)


def test_the_suggested_rate_is_that_of_the_steepest_fall():
    """On losses made up: a logistic fall around 0.01 with noise."""
    trainer = make(kind=Trainer)
    rng, calls = np.random.default_rng(0), []

    def run_batch(*batch, **size):
        rate = trainer.lr(0)
        calls.append(rate)
        trainer.train_loss_list.append(2.0 - 1.5 / (1 + (0.01 / rate) ** 1.5) + 0.02 * rng.normal())

    trainer.run_batch, trainer._read_losses = run_batch, lambda: None
    result = lr_range_test(trainer, 1e-5, 1.0, steps=100)
    assert 0.005 < result.suggestion < 0.02
    assert len(calls) == 100


def test_the_picture_of_a_range_test(tmp_path):
    pytest.importorskip("matplotlib")
    result = lr_range_test(make(kind=Trainer, optimizer="sgd"), steps=30)
    figure = result.plot(tmp_path / "rates.png")
    curve, smoothed, *_ = figure.axes[0].lines
    np.testing.assert_allclose(curve.get_xydata(), np.c_[result.rates, result.losses])
    np.testing.assert_allclose(smoothed.get_ydata(), result.smoothed)
    assert figure.axes[0].get_xscale() == "log"
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
