"""Checkpoints: a training that was stopped anywhere goes on as if it had not been."""

import dataclasses
import logging
import os
import signal
import threading

import numpy as np
import pytest

import portacnn
from portacnn import EarlyStopping, Model, Normalize, Trainer
from portacnn.errors import (
    ArgumentError,
    BackendError,
    CheckpointError,
    ModelFormatError,
    NotFiniteError,
)
from portacnn.layers import Dropout, Flatten, Linear, at_step
from portacnn.optim import SGD, Adam, AdamW, Optimizer, biases_and_norms
from portacnn.schedules import (
    SCHEDULES,
    CosineAnnealingLR,
    MultiStepLR,
    OneCycleLR,
    PerEpoch,
    StepLR,
    warm_up,
)
from portacnn.training import folder, stopping_on_signals
from portacnn.training import trainer as trainer_module
from support.matrix import needs
from support.nets import as_bytes, bits, small_net
from support.trainings import (
    EPOCHS,
    SIZE,
    STEPS,
    TEST,
    Watched,
    data,
    drawing_net,
    make,
    names,
    outcome,
    resumed,
    rewrite,
    stopped,
)

pytest.importorskip("safetensors")


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("PORTACNN_BACKEND", raising=False)


# --- to the bit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 6, 7, 8, 20])
def test_it_goes_on_as_if_it_had_not_stopped(backend, tmp_path, step):
    whole = make(backend.device)
    whole.train()
    assert len(whole.train_loss_list) == EPOCHS * STEPS
    stopped(tmp_path, step, device=backend.device)
    again = resumed(tmp_path, device=backend.device)
    assert (again.epoch, again.batch) == divmod(step, STEPS)
    again.train()
    assert outcome(again) == outcome(whole)
    assert len(again.batches) == EPOCHS * STEPS - step
    for (x, t), (expected, label) in zip(again.batches, whole.batches[step:], strict=True):
        np.testing.assert_array_equal(x, expected)
        np.testing.assert_array_equal(t, label)


@pytest.mark.parametrize("step", range(1, EPOCHS * STEPS + 1))
def test_after_every_step(tmp_path, step):
    whole = make()
    whole.train()
    stopped(tmp_path, step)
    again = resumed(tmp_path)
    again.train()
    assert outcome(again) == outcome(whole)


def test_a_stopped_one_goes_on_in_place(tmp_path):
    whole = make()
    whole.train()
    part = stopped(tmp_path, 5)
    part.train()
    assert outcome(part) == outcome(whole)


def test_stopped_without_a_folder():
    whole, part = make(), make()
    whole.train()
    part.stop_after = 9
    part.train()
    assert part.steps_done == 9
    assert not part.finished
    part.train()
    assert outcome(part) == outcome(whole)


def test_a_stop_before_it_begins_makes_one_step():
    trainer = make()
    trainer.stop()
    trainer.train()
    assert trainer.steps_done == 1


def test_a_stop_that_comes_between_two_steps_has_its_checkpoint(tmp_path, monkeypatch):
    """A signal may come at any moment, such as when the losses are fetched, which takes longest."""
    monkeypatch.setattr(trainer_module, "LOG_EVERY", 2)
    trainer = make(checkpoint_dir=tmp_path, checkpoint_every=10**9)

    class Interrupted(trainer_module.Progress):
        def show(self, *figures, **more):
            if trainer.steps_done == 4:
                trainer.stop()

    monkeypatch.setattr(trainer_module, "Progress", Interrupted)
    trainer.train()
    assert trainer.steps_done in (4, 5)
    assert f"-step-{trainer.steps_done}-" in trainer.last_checkpoint.name
    assert resumed(tmp_path).steps_done == trainer.steps_done


def test_stopped_again_and_again(tmp_path):
    whole = make()
    whole.train()
    trainer = stopped(tmp_path, 2)
    while not trainer.finished:
        trainer = resumed(tmp_path)
        trainer.stop_after = 3
        trainer.train()
    assert outcome(trainer) == outcome(whole)


def test_losses_that_were_not_fetched_yet(tmp_path, monkeypatch):
    for every in (2, 3, 50):
        monkeypatch.setattr(trainer_module, "LOG_EVERY", every)
        test_it_is_the_same_with_checkpoints(tmp_path / str(every))


def test_it_is_the_same_with_checkpoints(tmp_path):
    """That writing them changes nothing, and that each of them is of its moment."""
    whole = make()
    whole.train()
    watched = make(checkpoint_dir=tmp_path, checkpoint_every=4, keep=100)
    watched.train()
    assert outcome(watched) == outcome(whole)
    files = folder.checkpoints(tmp_path)
    steps = [int(found.path.name.split("-")[3]) for found in files]
    assert steps == [4, 8, 12, 16, 20, 21]
    for step, found in zip(steps, files, strict=True):
        trainer = resumed(found.path)
        assert trainer.train_loss_list == whole.train_loss_list[:step]
        trainer.train()
        assert outcome(trainer) == outcome(whole)


OWN = {
    "sgd": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01, "no_decay": ["bias", "bn*"]},
    "momentum": {"nesterov": True},
    "adagrad": {"lr_decay": 0.1, "initial_accumulator_value": 0.1},
    "rmsprop": {"momentum": 0.5, "centered": True},
    "adam": {"beta1": 0.8, "weight_decay": 0.01, "decoupled_weight_decay": True},
    "adamw": {"weight_decay": 0.1, "no_decay": biases_and_norms},
}


def check(path, step=9, **options):
    """Stopped and resumed it is as uninterrupted; gives both."""
    whole = make(**options)
    whole.train()
    stopped(path, step, **options)
    again = resumed(path)
    again.train()
    assert outcome(again) == outcome(whole)
    return again, whole


@pytest.mark.parametrize("name", OWN)
def test_every_optimizer(tmp_path, name):
    again, whole = check(tmp_path, optimizer=name, optimizer_param={"lr": 0.01, **OWN[name]})
    assert type(again.optimizer) is type(whole.optimizer)
    assert again.optimizer._decay == whole.optimizer._decay
    ours, theirs = again.optimizer.state_dict(), whole.optimizer.state_dict()
    arrays, expected = ours.pop("arrays"), theirs.pop("arrays")
    assert ours == theirs
    assert {key: value.tobytes() for key, value in arrays.items()} == {
        k: v.tobytes() for k, v in expected.items()
    }


def test_a_learning_rate_that_was_changed_on_the_way(tmp_path):
    def run(trainer):
        trainer.stop_after = 4
        trainer.train()
        trainer.optimizer.lr = 0.5
        return trainer

    whole = run(make())
    whole.train()
    run(make()).checkpoint(tmp_path / "one")
    again = resumed(tmp_path / "one")
    again.train()
    assert outcome(again) == outcome(whole)


@pytest.mark.parametrize(
    ("schedule", "unit"),
    [
        *((name, unit) for name in SCHEDULES for unit in ("step", "epoch")),
        (warm_up(5, CosineAnnealingLR(16)), "step"),
        (MultiStepLR(np.array([2, 9, 9])), "step"),
        (PerEpoch(StepLR(np.int64(1), 0.5), STEPS), "step"),
        (OneCycleLR(21, anneal_strategy="linear", three_phase=True), "step"),
        (StepLR(1, 0.5), "epoch"),
    ],
)
def test_every_schedule(tmp_path, schedule, unit):
    again, whole = check(tmp_path, schedule=schedule, schedule_unit=unit)
    rates = [whole.lr(step) for step in range(EPOCHS * STEPS)]
    assert [again.lr(step) for step in range(EPOCHS * STEPS)] == rates
    again.checkpoint(tmp_path / "again")  # and once more
    third = resumed(tmp_path / "again")
    assert [third.lr(step) for step in range(EPOCHS * STEPS)] == rates
    assert third.schedule == again.schedule


@pytest.mark.parametrize(
    "options",
    [
        {"clip_norm": 0.1},
        {"accumulate": 3},
        {"label_smoothing": 0.1, "evaluate_sample_num_per_epoch": 7},
        {"compile_step": True},
        {"drop_last": True},
        {"seed": None},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_option(tmp_path, options):
    if "seed" in options:
        stopped(tmp_path, 3, **options)
        once, twice = resumed(tmp_path), resumed(tmp_path)
        once.train()
        twice.train()
        assert outcome(once) == outcome(twice)
        return
    again, whole = check(tmp_path, **options)
    for name in {*options, "loss", "seed", "epochs", "batch_size"} - {"label_smoothing"}:
        assert getattr(again, name) == getattr(whole, name)


@pytest.mark.parametrize("older", [1, 2])
def test_a_checkpoint_of_an_older_format_is_refused_in_one_sentence(tmp_path, older):
    path = stopped(tmp_path, 3).last_checkpoint
    rewrite(path, lambda header: header.update(checkpoint=older))
    with pytest.raises(ModelFormatError, match=rf"format {older}, but this version reads 3; "):
        resumed(path)


@pytest.mark.parametrize("monitor", ["accuracy", "loss"])
@pytest.mark.parametrize("step", [3, 12, 16, 34])
def test_early_stopping(tmp_path, monitor, step):
    """One whose best epoch is not its last, stopped before it and after."""
    stopping = EarlyStopping(2, monitor)
    options = {"early_stopping": stopping, "optimizer_param": {"lr": 0.15}, "epochs": 6}
    whole = make(**options)
    whole.train()
    figures = whole.test_acc_list if monitor == "accuracy" else whole.test_loss_list
    assert stopping.best_epoch(figures) < whole.epoch
    trainer = make(checkpoint_dir=tmp_path, **options)
    trainer.stop_after = step
    trainer.train()
    again = resumed(tmp_path)
    assert again.early_stopping == stopping
    again.train()
    assert outcome(again) == outcome(whole)


def test_the_best_weights_of_a_training_that_was_over(tmp_path):
    """Killed between its last checkpoint and the moment that gives the model its best weights."""
    options = {"early_stopping": 1, "optimizer_param": {"lr": 0.2}, "epochs": 6}
    whole = make(checkpoint_dir=tmp_path, **options)
    whole.train()
    again = resumed(tmp_path)
    assert again.finished
    assert outcome(again) == outcome(whole)
    again.train()
    assert outcome(again) == outcome(whole)


def test_more_epochs(tmp_path):
    whole = make(epochs=5)
    whole.train()
    make(checkpoint_dir=tmp_path, epochs=2).train()
    again = resumed(tmp_path, epochs=5)
    again.train()
    assert outcome(again) == outcome(whole)


def test_images_that_stayed_bytes(tmp_path):
    x, t, v, _ = data()
    sets = as_bytes(x), t, as_bytes(v), t[:TEST]

    def run(**options):
        net = drawing_net("numpy")
        net.preprocess = Normalize(std=0.5)
        return Watched(net, *sets, epochs=2, mini_batch_size=SIZE, verbose=False, **options)

    whole, part = run(), run()
    whole.train()
    part.stop_after = 4
    part.train()
    part.checkpoint(tmp_path / "one")
    again = Watched.resume(tmp_path / "one", *sets)
    assert again.model.preprocess == Normalize(std=0.5)
    again.train()
    assert outcome(again) == outcome(whole)


# --- elsewhere ------------------------------------------------------------------------------------


@needs("torch")
def test_from_backend_to_backend(tmp_path):
    pytest.importorskip("array_api_strict")
    whole = make(dtype="float64")
    whole.train()
    stopped(tmp_path, 4, dtype="float64")
    batches = []
    for device, step in (("torch", 5), ("array_api_strict:device1", 6), ("numpy", 0)):
        trainer = resumed(tmp_path, dtype="float64", device=device)
        assert str(trainer.backend).startswith(device.partition(":")[0])
        trainer.stop_after = step
        trainer.train()
        batches += trainer.batches
    assert trainer.finished
    for (x, t), (expected, label) in zip(batches, whole.batches[4:], strict=True):
        np.testing.assert_array_equal(x, expected)
        np.testing.assert_array_equal(t, label)
    np.testing.assert_allclose(trainer.train_loss_list, whole.train_loss_list, rtol=1e-9)
    assert trainer.test_acc_list == whole.test_acc_list
    for path, value in whole.model.state_dict().items():
        np.testing.assert_allclose(trainer.model.state_dict()[path], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "device", [pytest.param("torch", marks=needs("torch")), "array_api_strict:device1"]
)
def test_masks_are_the_same_elsewhere(tmp_path, device):
    """The first forward pass after going on, dropout and all."""
    stopped(tmp_path, 4)
    masks = []
    for place in ("numpy", device):
        trainer = resumed(tmp_path, device=place)
        drop, home = trainer.model.children["drop"], trainer.backend
        with at_step(trainer.steps_done):
            masks.append(
                home.to_host(drop(home.asarray(np.ones((SIZE, 3, 6, 6), "float32")), train=True))
                == 0
            )
    np.testing.assert_array_equal(*masks)
    assert 0.2 < masks[0].mean() < 0.6


@needs("torch")
def test_where_it_goes_on(tmp_path, monkeypatch):
    stopped(tmp_path, 1, device="torch")
    assert resumed(tmp_path).backend.name == "torch"
    assert resumed(tmp_path, device="numpy").backend.name == "numpy"
    monkeypatch.setenv("PORTACNN_BACKEND", "numpy")
    assert resumed(tmp_path).backend.name == "numpy"
    assert resumed(tmp_path, device="torch").backend.name == "torch"


def test_where_it_was_is_not_here(tmp_path):
    path = stopped(tmp_path, 1).last_checkpoint
    rewrite(path, lambda header: header.update(place="array_api_strict:device9"))
    with pytest.raises(
        BackendError,
        match=r"training was on array_api_strict:device9; .* Or choose "
        r"another device: resume",
    ):
        resumed(path)
    assert resumed(path, device="numpy").steps_done == 1


def test_a_precision_that_is_not_to_be_had_here(tmp_path):
    """From a GPU's tensor cores to a CPU."""
    path = stopped(tmp_path, 1).last_checkpoint
    rewrite(path, lambda header: header["options"].update(precision="tf32"))
    with pytest.raises(
        ArgumentError,
        match=r"precision=\'tf32\' is not supported .* resume\(..., "
        r'precision="float32"\)',
    ):
        resumed(path)
    again = resumed(path, precision="float32")
    assert (again.steps_done, again.precision) == (1, "float32")
    with pytest.raises(ArgumentError, match="precision must be one of"):
        resumed(path, precision="float8")


def test_a_model_out_of_a_checkpoint(tmp_path):
    trainer = stopped(tmp_path, 4)
    net = portacnn.load(trainer.last_checkpoint)
    assert type(net) is Model
    assert bits(net) == bits(trainer.model)


# --- what no file can hold ------------------------------------------------------------------------


def halving(step, lr):
    return lr * 0.5**step


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


def test_an_optimizer_of_ones_own(tmp_path):
    whole = make(optimizer=Signs(0.01, 0.5), optimizer_param=None)
    whole.train()
    stopped(tmp_path, 3, optimizer=Signs(0.01, 0.5), optimizer_param=None)
    again = resumed(tmp_path)
    assert type(again.optimizer) is Signs
    again.train()
    assert outcome(again) == outcome(whole)


def test_one_that_does_not_tell_its_arguments_is_refused_at_once(tmp_path):
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
def test_other_data(tmp_path, change, message):
    stopped(tmp_path, 3)
    with pytest.raises(ArgumentError, match=f"the data differ from those of .*{message}"):
        Watched.resume(tmp_path, *change(*data()))
    x, t, v, u = data()
    with pytest.raises(NotFiniteError):
        Watched.resume(tmp_path, x * np.nan, t, v, u)


# --- the folder -----------------------------------------------------------------------------------


def test_an_epoch_each_by_default_and_the_last_three(tmp_path):
    trainer = make(checkpoint_dir=tmp_path / "a" / "b", epochs=5)
    trainer.train()
    run = trainer.run
    kept = [f"checkpoint-{n:06d}-step-{n * STEPS}-{run}.safetensors" for n in (3, 4, 5)]
    assert names(tmp_path / "a" / "b") == [*kept, "latest"]
    assert (tmp_path / "a" / "b" / "latest").read_text() == f"{kept[-1]}\n"
    assert trainer.last_checkpoint.name == kept[-1]
    assert resumed(tmp_path / "a" / "b" / "latest").finished


def test_older_ones_go_only_when_the_new_one_is_safe(tmp_path, monkeypatch):
    trainer = make(checkpoint_dir=tmp_path, keep=1)
    seen = []
    save = trainer_module.save_tensors
    monkeypatch.setattr(
        trainer_module,
        "save_tensors",
        lambda *args: (seen.append(names(tmp_path)), save(*args), seen.append(names(tmp_path))),
    )
    trainer.train()
    counts = [len([name for name in there if name.startswith("checkpoint")]) for there in seen]
    assert counts == [0, 1, 1, 2, 1, 2]
    assert len(folder.checkpoints(tmp_path)) == 1


def test_another_trainings_files_are_left_alone(tmp_path):
    first, second = make(checkpoint_dir=tmp_path), make(checkpoint_dir=tmp_path, keep=1)
    first.train()
    second.train()
    runs = [found.run for found in folder.checkpoints(tmp_path)]
    assert runs == [first.run] * 3 + [second.run]
    assert resumed(tmp_path).run == second.run  # the newest


def test_one_that_goes_on_clears_up_behind_itself(tmp_path):
    trainer = stopped(tmp_path, 3, keep=1)
    left_over = (
        tmp_path / f".checkpoint-000009-step-1-{trainer.run}.safetensors.0123456789abcdef.tmp"
    )
    others = [
        tmp_path / ".checkpoint-000009-step-1-ffffff.safetensors.0123456789abcdef.tmp",
        tmp_path / "notes.txt",
    ]
    for file in (left_over, *others):
        file.write_bytes(b"half")
    again = resumed(tmp_path)
    assert left_over.exists()
    again.train()
    assert len(folder.checkpoints(tmp_path)) == again.keep == 1
    assert not left_over.exists()
    assert all(file.exists() for file in others)


def test_it_goes_on_in_the_same_folder_if_no_other_is_named(tmp_path):
    trainer = stopped(tmp_path / "one", 3)
    assert resumed(tmp_path / "one").checkpoint_dir == tmp_path / "one"
    assert resumed(trainer.last_checkpoint).checkpoint_dir == tmp_path / "one"
    again = resumed(tmp_path / "one", checkpoint_dir=tmp_path / "two", checkpoint_every=2, keep=9)
    again.train()
    assert len(names(tmp_path / "one")) == 2
    steps = [int(found.path.name.split("-")[3]) for found in folder.checkpoints(tmp_path / "two")]
    assert steps == [6, 8, 10, 12, 14, 16, 18, 20, 21]


def test_an_abandoned_branch_is_not_the_newest(tmp_path):
    """Gone on from an older checkpoint on purpose: what is written then is newer than later steps
    of before."""
    make(checkpoint_dir=tmp_path, keep=9).train()
    older = folder.checkpoints(tmp_path)[0].path
    again = resumed(older, checkpoint_every=1)
    again.stop_after = 1
    again.train()
    assert resumed(tmp_path).steps_done == STEPS + 1


def test_nothing_to_go_on_from(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        resumed(tmp_path)
    with pytest.raises(FileNotFoundError):
        resumed(tmp_path / "missing")


def test_a_broken_one_is_passed_over(tmp_path, caplog):
    make(checkpoint_dir=tmp_path).train()
    *_, middle, last = [found.path for found in folder.checkpoints(tmp_path)]
    last.write_bytes(last.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING, "portacnn"):
        trainer = resumed(tmp_path)
    assert trainer.steps_done == 2 * STEPS
    assert "skipped a broken checkpoint" in caplog.text
    assert last.name in caplog.text
    assert f"resuming from {middle}" in caplog.text
    for found in folder.checkpoints(tmp_path):
        found.path.write_bytes(b"")
    with pytest.raises(ModelFormatError, match=last.name):
        resumed(tmp_path)


def test_numbers_that_mean_nothing(tmp_path):
    for options in ({"checkpoint_every": 0}, {"keep": 0}, {"checkpoint_every": 1.5}):
        with pytest.raises(ArgumentError, match=next(iter(options))):
            make(checkpoint_dir=tmp_path, **options)
    with pytest.raises(ArgumentError, match="there is no checkpoint_dir"):
        make().checkpoint()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot create the folder .* for checkpoints"):
        make(checkpoint_dir=tmp_path / "file")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_training_gone_wrong_writes_none(tmp_path):
    wild = {"optimizer": "sgd", "optimizer_param": {"lr": 1e30}}
    trainer = make(net=small_net, **wild, checkpoint_dir=tmp_path, checkpoint_every=1)
    with pytest.raises(NotFiniteError):
        trainer.train()
    files = folder.checkpoints(tmp_path)
    assert all(
        np.isfinite(value).all()
        for found in files
        for value in portacnn.load(found.path).state_dict().values()
    )


# --- signals --------------------------------------------------------------------------------------


class Work:
    stops = 0

    def stop(self):
        self.stops += 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_request(number):
    mine = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        work = Work()
        with stopping_on_signals(work) as caught:
            assert caught.exit_status == 0
            signal.raise_signal(number)
            assert work.stops == 1
            assert caught.number == number
            assert caught.exit_status == 128 + number
            assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
        with pytest.raises(KeyError), stopping_on_signals(work):
            raise KeyError
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    finally:
        signal.signal(signal.SIGTERM, mine)


def test_a_second_ctrl_c_is_meant():
    work = Work()
    # a shell starts background jobs with it ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stopping_on_signals(work):
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert work.stops == 1


def test_in_other_threads_signals_are_left_alone():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def elsewhere():
        with stopping_on_signals(Work()) as caught:
            seen.append((signal.getsignal(signal.SIGINT), caught.number))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [(before, None)]


# --- what is in the file --------------------------------------------------------------------------


def test_the_rewriting_of_these_tests_is_right(tmp_path):
    path = stopped(tmp_path, 3).last_checkpoint
    before = path.read_bytes()
    rewrite(path, lambda header: None)
    assert resumed(path).steps_done == 3
    assert path.read_bytes()[-500:] == before[-500:]


def test_it_is_a_safetensors_file_that_others_can_read(tmp_path):
    from safetensors.numpy import load_file

    trainer = stopped(tmp_path, 9, early_stopping=2)
    tensors = load_file(trainer.last_checkpoint)
    assert tensors["steps.loss"].tolist() == trainer.train_loss_list
    assert tensors["history.test_accuracy"].tolist() == trainer.test_acc_list
    np.testing.assert_array_equal(
        tensors["model.fc.weight"], trainer.model.state_dict()["fc.weight"]
    )
    assert {name.split(".")[0] for name in tensors} == {
        *("model", "optimizer", "best", "history", "steps")
    }


def test_a_model_is_no_checkpoint(tmp_path):
    small_net().save(tmp_path / "net")
    with pytest.raises(ModelFormatError, match="net: it is not a checkpoint"):
        resumed(tmp_path / "net")


def test_options_come_back():
    """None of the Trainer's arguments has been forgotten here."""
    from inspect import signature

    from portacnn.training.checkpoint import _OPTIONS

    apart = {"self", "model", "x_train", "t_train", "x_test", "t_test", "sample_weight"}
    described = {"optimizer", "optimizer_param", "lr", "schedule", "early_stopping"}
    described |= {"checkpoint_dir", "loss", "class_weight", "label_smoothing", "metrics"}
    apart |= {"mini_batch_size", "callbacks"}  # another name of batch_size; objects
    assert set(signature(Trainer.__init__).parameters) == {*_OPTIONS, *apart, *described}
    assert {field.name for field in dataclasses.fields(EarlyStopping)} == {
        "patience",
        "monitor",
        "min_delta",
        "restore_best",
        "better",
    }
    assert all(kind in Optimizer.known.values() for kind in (SGD, Adam, AdamW))


def test_a_disk_that_is_full_stops_training_and_no_more(tmp_path, monkeypatch):
    whole = make()
    whole.train()
    trainer = make(checkpoint_dir=tmp_path, checkpoint_every=4)
    good = os.replace
    calls = []

    def replace(source, target):
        calls.append(target)
        # three files are given their names at a checkpoint: this is the second one's first
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        good(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(
        CheckpointError, match=r"checkpoint of step 8 could not be written to .*No space left"
    ) as caught:
        trainer.train()
    assert caught.value.errno == 28
    assert isinstance(caught.value, OSError)
    assert "free some disk space and call train() to continue" in str(caught.value)
    assert [name.split("-")[3] for name in names(tmp_path) if name != "latest"] == ["4"]
    assert resumed(tmp_path).steps_done == 4
    trainer.train()
    assert outcome(trainer) == outcome(whole)


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


def test_keep_holds_in_a_training_that_is_resumed(tmp_path):
    stopped(tmp_path, 3, keep=5)
    resumed(tmp_path, checkpoint_every=1, keep=2).train()
    assert len([name for name in names(tmp_path) if name.startswith("checkpoint-")]) == 2
