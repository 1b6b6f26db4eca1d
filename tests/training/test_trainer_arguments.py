"""The Trainer's arguments: names of other libraries, and values that are refused."""

import re

import pytest

from portacnn import Trainer
from portacnn.errors import ArgumentError, StateError
from portacnn.layers import Conv2d, Flatten, Linear
from portacnn.models import Model
from portacnn.optim import SGD
from support.nets import bits, patches, small_net
from support.small_trainings import trainer

# --- what a run leaves ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": 0.1}, "learning_rate (called lr here)"),
        ({"minibatch_size": 10}, "minibatch_size (called batch_size or mini_batch_size here)"),
        ({"momentum": 0.9}, 'momentum (write optimizer="momentum", optimizer_param={"mome'),
        ({"validation_data": ()}, "validation_data (called x_test and t_test here)"),
        ({"shuffle": True}, "shuffle (training images are shuffled in every epoch, by seed; "),
        (
            {"num_epochs": 3, "ephocs": 1},
            "num_epochs (called epochs here), ephocs (did you mean epochs?)",
        ),
        ({"zzz": 1}, "zzz; it takes model, x_train"),
    ],
)
def test_keywords_of_other_libraries_are_answered(options, words):
    with pytest.raises(TypeError) as caught:
        trainer(small_net(), **options)
    assert f"Trainer does not take {words}" in str(caught.value)
    with pytest.raises(TypeError, match=r"Trainer\.resume does not take "):
        Trainer.resume("nowhere", *patches(5), *patches(5), **options)


def test_names_of_batch_size_and_learning_rate():
    def made(**options):
        return Trainer(small_net(), *patches(30), *patches(5), verbose=False, **options)

    assert made(batch_size=7).batch_size == made(mini_batch_size=7).batch_size == 7
    with pytest.raises(ArgumentError, match="batch_size and mini_batch_size are names of one"):
        made(batch_size=7, mini_batch_size=7)
    with pytest.raises(TypeError, match=r"batch_size \(it comes from the checkpoint; leave it out"):
        Trainer.resume("nowhere", *patches(5), *patches(5), batch_size=7)

    assert made(lr=0.5, batch_size=7).optimizer.lr == 0.5
    both = made(batch_size=7, optimizer="sgd", lr=0.5, optimizer_param={"lr": 0.5, "momentum": 0.5})
    assert (both.optimizer.lr, both.optimizer.momentum) == (0.5, 0.5)
    with pytest.raises(ArgumentError, match=r"lr is 0\.5, but optimizer_param says 0\.25"):
        made(batch_size=7, lr=0.5, optimizer_param={"lr": 0.25})
    with pytest.raises(ArgumentError, match="lr goes with an optimizer's name"):
        made(batch_size=7, lr=0.5, optimizer=SGD(0.5))


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mini_batch_size": 51}, "batch_size is 51, but there are only 50 training images"),
        ({"mini_batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"mini_batch_size": 2.0}, "batch_size must be a whole number of at least 1, got 2.0"),
        ({"epochs": -1}, "epochs must be a whole number of at least 0, got -1"),
        ({"epochs": "3"}, "epochs must be a whole number of at least 0, got '3'"),
        ({"epochs": True}, "epochs must be a whole number"),
        (
            {"evaluate_sample_num_per_epoch": 0},
            "evaluate_sample_num_per_epoch must be a whole number of at least 1",
        ),
        ({"seed": 0.5}, "seed must be a whole number or None, got 0.5"),
        (
            {"optimizer": "adamax"},
            "unknown optimizer 'adamax'; known are sgd, momentum, adagrad, rmsprop, adam, adamw",
        ),
        (
            {"optimizer_param": {"learning_rate": 1}},
            "Adam does not take learning_rate (called lr here)",
        ),
        ({"optimizer_param": {"lr": -1}}, "lr must be a number of 0 or more, got -1"),
    ],
)
def test_invalid_arguments_are_refused(changes, message):
    net = small_net()
    before = bits(net)
    with pytest.raises(ArgumentError, match=re.escape(message)):
        trainer(net, **changes)
    assert bits(net) == before


def test_a_model_that_is_not_built():
    with pytest.raises(StateError, match="Model: not built yet"):
        Trainer(Model(Conv2d(1, 1, 1), Flatten(), Linear(None, 4)), *patches(50), *patches(50))


def test_optimizers_by_name_and_by_hand():
    assert type(trainer(small_net(), optimizer="sgd").optimizer) is SGD
    mine = SGD(0.5)
    assert trainer(small_net(), optimizer=mine, optimizer_param=None).optimizer is mine
    default = Trainer(small_net(), *patches(100), *patches(10))
    assert (type(default.optimizer).__name__, default.optimizer.lr) == ("Adam", 0.001)
    assert (default.epochs, default.batch_size, default.seed, default.verbose) == (
        20,
        100,
        0,
        True,
    )
