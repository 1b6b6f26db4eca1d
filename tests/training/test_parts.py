"""The parts that a Trainer owns: its attributes are theirs, and a part may be replaced."""

import copy
import pickle

import numpy as np

from portacnn import Trainer
from portacnn.optim import SGD
from portacnn.training.step import Updater
from support.nets import bits, patches, small_net


def made(**options):
    options = {"epochs": 2, "batch_size": 20, "verbose": False, **options}
    return Trainer(small_net("numpy"), *patches(40), **options)


def test_an_updater_may_be_replaced():
    class Twice(Updater):
        """Changes nothing, but sees each batch."""

        seen = ()

        def step(self, x, t, state, weight=None):
            self.seen = (*self.seen, (int(state.step), x.shape[0]))
            return super().step(x, t, state, weight)

    usual, other = made(), made()
    own = other.updater
    other.updater = Twice.__new__(Twice)
    other.updater.__setstate__(own.__getstate__())
    usual.train()
    other.train()
    assert other.updater.seen == ((0, 20), (1, 20), (2, 20), (3, 20))
    assert other.train_loss_list == usual.train_loss_list
    assert bits(other.model) == bits(usual.model)


def test_a_step_sees_an_optimizer_that_was_set():
    trainer = made(optimizer="adam", lr=0.1)
    trainer.run_batch(np.arange(20))
    before = bits(trainer.model)
    trainer.optimizer = SGD(lr=1e-30)
    trainer.run_batch(np.arange(20))
    assert bits(trainer.model) == before
    assert trainer.updater.optimizer.steps == 1


def test_copies_have_parts_of_their_own():
    trainer = made()
    trainer.run_batch(np.arange(20))
    for again in (copy.copy(trainer), copy.deepcopy(trainer), pickle.loads(pickle.dumps(trainer))):
        for part in ("updater", "_history", "_saver"):
            assert getattr(again, part) is not getattr(trainer, part)
        again.run_batch(np.arange(20))
        assert trainer._history.count == 1
        assert again._history.count == 2
