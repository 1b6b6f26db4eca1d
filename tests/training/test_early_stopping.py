"""Early stopping: the best epoch, the weights that are restored, and the figures it watches."""

import numpy as np
import pytest

from portacnn.errors import ArgumentError
from portacnn.metrics import F1, Accuracy, ConfusionMatrix, RocAuc
from portacnn.training import EarlyStopping, Trainer
from support.bright_rows import COUNT, digits, net, same, trainer, weights
from support.matrix import EACH_LIBRARY

pytestmark = EACH_LIBRARY

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
def test_early_stopping_stops_and_restores_the_best_weights(monitor, restore):
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


def test_the_best_weights_are_restored_at_the_end_too():
    run = trainer(kind=Scripted, early_stopping=4, epochs=5)
    run.train()
    assert not run.stopped_early
    assert run.epoch == 5
    same(weights(run.model), run.seen[1])


def test_early_stopping_stops_where_nothing_gets_better(backend):
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


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{"patience": 0}, {"monitor": 3}, {"min_delta": -0.1}])
def test_invalid_arguments_of_early_stopping_are_refused(arguments):
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
