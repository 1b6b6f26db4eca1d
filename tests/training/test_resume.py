"""A training that was stopped anywhere continues, to the bit, as if it had not been."""

import numpy as np
import pytest

import portacnn
from portacnn import EarlyStopping, Model, Normalize
from portacnn.errors import ArgumentError, BackendError, ModelFormatError
from portacnn.layers import at_step
from portacnn.optim import biases_and_norms
from portacnn.schedules import (
    SCHEDULES,
    CosineAnnealingLR,
    MultiStepLR,
    OneCycleLR,
    PerEpoch,
    StepLR,
    warm_up,
)
from portacnn.training import folder
from portacnn.training import trainer as trainer_module
from support.matrix import EACH_LIBRARY, needs
from support.nets import as_bytes, bits
from support.trainings import (
    EPOCHS,
    SIZE,
    STEPS,
    TEST,
    Watched,
    data,
    drawing_net,
    make,
    outcome,
    resumed,
    rewrite,
    stopped,
    uninterrupted,
)

pytestmark = EACH_LIBRARY

# --- to the bit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [6, 8])
def test_a_training_continues_as_if_it_had_not_stopped(backend, tmp_path, step):
    whole = uninterrupted(backend.device)
    stopped(tmp_path, step, device=backend.device)
    again = resumed(tmp_path, device=backend.device)
    assert (again.epoch, again.batch) == divmod(step, STEPS)
    again.train()
    assert outcome(again) == outcome(whole)


@pytest.mark.parametrize("step", range(1, EPOCHS * STEPS + 1))
def test_a_training_continues_after_every_step(tmp_path, step):
    whole = uninterrupted()
    assert len(whole.train_loss_list) == EPOCHS * STEPS
    stopped(tmp_path, step)
    again = resumed(tmp_path)
    assert (again.epoch, again.batch) == divmod(step, STEPS)
    again.train()
    assert outcome(again) == outcome(whole)
    assert len(again.batches) == EPOCHS * STEPS - step
    for (x, t), (expected, label) in zip(again.batches, whole.batches[step:], strict=True):
        np.testing.assert_array_equal(x, expected)
        np.testing.assert_array_equal(t, label)


def test_a_stopped_training_continues_in_place(tmp_path):
    whole = uninterrupted()
    part = stopped(tmp_path, 5)
    part.train()
    assert outcome(part) == outcome(whole)


def test_stopped_without_a_folder():
    whole, part = uninterrupted(), make()
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


def test_a_run_stopped_again_and_again_resumes_exactly(tmp_path):
    whole = uninterrupted()
    trainer = stopped(tmp_path, 2)
    while not trainer.finished:
        trainer = resumed(tmp_path)
        trainer.stop_after = 3
        trainer.train()
    assert outcome(trainer) == outcome(whole)


def test_losses_that_were_not_fetched_yet(tmp_path, monkeypatch):
    for every in (2, 3):
        monkeypatch.setattr(trainer_module, "LOG_EVERY", every)
        test_writing_checkpoints_changes_nothing(tmp_path / str(every))


def test_writing_checkpoints_changes_nothing(tmp_path):
    """That writing them changes nothing, and that each of them is of its moment."""
    whole = uninterrupted()
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
def test_every_optimizer_resumes_exactly(tmp_path, name):
    again, whole = check(tmp_path, optimizer=name, optimizer_param={"lr": 0.01, **OWN[name]})
    assert type(again.optimizer) is type(whole.optimizer)
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
def test_every_schedule_comes_back(tmp_path, schedule, unit):
    trainer = make(schedule=schedule, schedule_unit=unit)
    rates = [trainer.lr(step) for step in range(EPOCHS * STEPS)]
    trainer.checkpoint(tmp_path / "one")
    again = resumed(tmp_path / "one")
    again.checkpoint(tmp_path / "again")  # and once more
    third = resumed(tmp_path / "again")
    for each in (again, third):
        assert [each.lr(step) for step in range(EPOCHS * STEPS)] == rates
    assert third.schedule == again.schedule


@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_a_schedule_continues_where_it_was(tmp_path, unit):
    check(tmp_path, schedule="one_cycle", schedule_unit=unit)


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
def test_every_option_resumes_exactly(tmp_path, options):
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
def test_early_stopping(tmp_path, monitor):
    """One whose best epoch is not its last, stopped before it and after."""
    stopping = EarlyStopping(2, monitor)
    options = {"early_stopping": stopping, "optimizer_param": {"lr": 0.15}, "epochs": 6}
    whole = make(**options)
    whole.train()
    figures = whole.test_acc_list if monitor == "accuracy" else whole.test_loss_list
    assert stopping.best_epoch(figures) < whole.epoch
    for step in (3, 12, 16, 34):
        folder = tmp_path / str(step)
        trainer = make(checkpoint_dir=folder, **options)
        trainer.stop_after = step
        trainer.train()
        again = resumed(folder)
        assert again.early_stopping == stopping
        again.train()
        assert outcome(again) == outcome(whole), step


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


def test_a_training_resumes_with_more_epochs(tmp_path):
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
    whole = uninterrupted(dtype="float64")
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
def test_a_training_resumes_on_the_device_asked_for_or_its_own(tmp_path, monkeypatch):
    stopped(tmp_path, 1, device="torch")
    assert resumed(tmp_path).backend.name == "torch"
    assert resumed(tmp_path, device="numpy").backend.name == "numpy"
    monkeypatch.setenv("PORTACNN_BACKEND", "numpy")
    assert resumed(tmp_path).backend.name == "numpy"
    assert resumed(tmp_path, device="torch").backend.name == "torch"


def test_a_device_that_is_missing_here_is_told(tmp_path):
    path = stopped(tmp_path, 1).last_checkpoint
    rewrite(path, lambda header: header.update(place="array_api_strict:device9"))
    with pytest.raises(
        BackendError,
        match=r"training run was on array_api_strict:device9; .* Or choose "
        r"another device: resume",
    ):
        resumed(path)
    assert resumed(path, device="numpy").steps_done == 1


def test_a_precision_that_is_not_supported_here(tmp_path):
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
