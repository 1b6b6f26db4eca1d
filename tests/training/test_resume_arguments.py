"""What resume() takes and asks for: options, data, and what no file can hold."""

import dataclasses

import numpy as np
import pytest

from portacnn import EarlyStopping, Model, Trainer
from portacnn.errors import ArgumentError, ModelFormatError, NotFiniteError
from portacnn.layers import Dropout, Flatten, Linear
from portacnn.optim import SGD, Adam, AdamW, Optimizer
from portacnn.schedules import StepLR, warm_up
from support.matrix import needs
from support.nets import small_net
from support.trainings import EPOCHS, Watched, data, make, outcome, resumed, stopped


def halving(step, lr):
    return lr * 0.5**step


# --- what no file can hold ------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_a_schedule_of_ones_own_is_given_again(tmp_path, unit):
    whole = make(schedule=halving, schedule_unit=unit)
    whole.train()
    stopped(tmp_path, 3, schedule=halving, schedule_unit=unit)
    with pytest.raises(
        ArgumentError,
        match=r"with a schedule that a file cannot hold \(a file cannot hold .*halving.*pass it "
        r"again: res",
    ):
        resumed(tmp_path)
    again = resumed(tmp_path, schedule=halving)
    again.train()
    assert outcome(again) == outcome(whole)
    with pytest.raises(ArgumentError, match="file cannot hold"):
        stopped(tmp_path / "within", 1, schedule=warm_up(3, halving)) and resumed(
            tmp_path / "within"
        )


def own_init(rng, shape, fan_in, fan_out):
    return 0.1 * rng.standard_normal(shape)


def test_a_model_that_no_file_can_build_is_given(tmp_path):
    def net(device, dtype="float32"):
        layers = {
            "flatten": Flatten(),
            "drop": Dropout(0.3),
            "fc": Linear(None, 4, weight_init=own_init),
        }
        return Model(**layers).build((1, 8, 8), device=device, dtype=dtype, seed=8)

    whole = make(net=net)
    whole.train()
    stopped(tmp_path, 3, net=net)
    with pytest.raises(
        ArgumentError,
        match=r"does not describe its model "
        r".*resume\(\.\.\., model=model\)",
    ):
        resumed(tmp_path)
    other = Model(flatten=Flatten(), drop=Dropout(0.3), fc=Linear(None, 4)).build((1, 8, 8), seed=1)
    again = resumed(tmp_path, model=other)
    again.train()
    assert outcome(again) == outcome(whole)
    with pytest.raises(ModelFormatError, match="does not fit this network"):
        resumed(tmp_path, model=small_net())


class Signs(Optimizer):
    """An optimizer of somebody's own."""

    def __init__(self, lr, scale=1.0):
        self.scale = scale
        super().__init__(lr)

    def apply(self, params, grads, state, step, *, lr, weight_decay, ok):
        for p, g in zip(params, grads, strict=True):
            p[...] = p - lr * self.scale * np.sign(g)


class Forgetful(Signs):
    def __init__(self, lr, mystery=1):
        super().__init__(lr)


def test_an_optimizer_that_you_write_resumes(tmp_path):
    whole = make(optimizer=Signs(0.01, 0.5), optimizer_param=None)
    whole.train()
    stopped(tmp_path, 3, optimizer=Signs(0.01, 0.5), optimizer_param=None)
    again = resumed(tmp_path)
    assert type(again.optimizer) is Signs
    again.train()
    assert outcome(again) == outcome(whole)


def test_an_optimizer_that_does_not_tell_its_arguments_is_refused_at_once(tmp_path):
    with pytest.raises(ArgumentError, match=r"Forgetful: cannot be saved: .*mystery"):
        make(optimizer=Forgetful(0.1), optimizer_param=None, checkpoint_dir=tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- the data -------------------------------------------------------------------------------------


@needs("torch")
def test_the_same_data_in_another_form(tmp_path):
    import torch

    stopped(tmp_path, 3)
    x, t, v, u = data()
    Watched.resume(tmp_path, x.astype("float64"), np.eye(4)[t], v, u)
    Watched.resume(tmp_path, torch.tensor(x), torch.tensor(t), v, u, device="torch")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x, t, v, u: (x[:-1], t[:-1], v, u),
            r"expected x_train of shape \[50, 1, 8, 8\], got \[49, 1, 8, 8\]",
        ),
        (lambda x, t, v, u: (x, t, v[:5], u[:5]), "x_test of shape"),
        (lambda x, t, v, u: (x, t[::-1], v, u), "t_train has other labels or another order"),
        (lambda x, t, v, u: (x[::-1], t, v, u), "x_train has other images or another order"),
        (lambda x, t, v, u: (x, t, v + 1, u), "x_test has other images"),
    ],
)
def test_other_data_are_refused(tmp_path, change, message):
    stopped(tmp_path, 3)
    with pytest.raises(ArgumentError, match=f"the data differ from those of .*{message}"):
        Watched.resume(tmp_path, *change(*data()))
    x, t, v, u = data()
    with pytest.raises(NotFiniteError):
        Watched.resume(tmp_path, x * np.nan, t, v, u)


# --- what is in the file --------------------------------------------------------------------------


def test_options_come_back():
    """None of the Trainer's arguments has been forgotten here."""
    from inspect import signature

    from portacnn.training.checkpoint import _OPTIONS

    apart = {"self", "model", "x_train", "t_train", "x_test", "t_test", "sample_weight"}
    described = {"optimizer", "optimizer_param", "lr", "schedule", "early_stopping"}
    described |= {"checkpoint_dir", "loss", "class_weight", "label_smoothing", "metrics", "augment"}
    # another name of batch_size; objects; where to train
    apart |= {"mini_batch_size", "callbacks", "distributed"}
    assert set(signature(Trainer.__init__).parameters) == {*_OPTIONS, *apart, *described}
    assert {field.name for field in dataclasses.fields(EarlyStopping)} == {
        "patience",
        "monitor",
        "min_delta",
        "restore_best",
        "better",
    }
    assert all(kind in Optimizer.known.values() for kind in (SGD, Adam, AdamW))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("epochs", EPOCHS + 4),
        ("checkpoint_every", 2),
        ("keep", 1),
        ("compile_step", True),
        ("verbose", True),
        ("schedule", StepLR(3, 0.5)),
    ],
)
def test_options_that_resume_takes(tmp_path, option, value):
    """Each one replaces the checkpoint's, and no other one."""
    stopped(tmp_path, 3, keep=5)
    plain, changed = resumed(tmp_path), resumed(tmp_path, **{option: value})
    assert getattr(plain, option) != value
    assert getattr(changed, option) == value
    for other in ("epochs", "checkpoint_every", "keep", "compile_step", "verbose", "precision"):
        assert other == option or getattr(changed, other) == getattr(plain, other)
