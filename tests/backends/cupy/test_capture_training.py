"""A network trained with its step captured as a CUDA graph, on the stand-in for CuPy."""

import logging

import numpy as np
import pytest

from portacnn import Trainer, augment, losses, resolve
from portacnn.errors import OutOfMemoryError
from portacnn.layers import BatchNorm2d, Conv2d, Dropout, Flatten, Linear, MaxPool2d, ReLU
from portacnn.losses import constants
from portacnn.models import Model
from portacnn.ops.dispatch import use_kernels
from portacnn.training.feed import Streamed
from support import fake_cupy
from support.cuda_rig import needs_compiler
from support.fake_cupy import log, machine
from support.nets import bits, patches

pytestmark = needs_compiler


@pytest.fixture(autouse=True)
def stand_in():
    with fake_cupy.installed():
        yield


def net(home):
    layers = {
        "conv": Conv2d(1, 3, 3),
        "bn": BatchNorm2d(3),
        "relu": ReLU(),
        "pool": MaxPool2d(2),
        "drop": Dropout(0.3),
    }
    return Model(**layers, flatten=Flatten(), fc=Linear(None, 4)).build(
        (1, 8, 8), device=home, seed=0
    )


def trained(home, compile_step, **changes):
    sets = [*patches(50), *patches(20, seed=1)]
    task = losses.named(changes.get("loss", "cross_entropy")).task
    if task in ("multilabel", "regression"):
        sets[1::2] = [(t[:, None] >= np.arange(4)).astype("uint8") for t in sets[1::2]]
    options = {
        "epochs": 10,
        "mini_batch_size": 20,
        "optimizer_param": {"lr": 0.003},
        "verbose": False,
        **changes,
    }
    run = Trainer(net(home), *sets, **options, compile_step=compile_step)
    run.train()
    return run


def test_a_network_is_trained_to_the_same_bits():
    """30 steps, with dropout, batch norm, Adam and a schedule, and a short batch and an evaluation
    after every two."""
    home = resolve("cuda:1")  # which is not the current device
    with log.watch() as seen:
        captured = trained(home, True, schedule="cosine")
    plain = trained(home, False, schedule="cosine")
    assert captured.updater.compiled.reason is None
    assert captured.updater.compiled.graphs == 2
    assert captured.train_loss_list == plain.train_loss_list
    assert captured.test_acc_list == plain.test_acc_list
    assert bits(captured.model) == bits(plain.model)
    assert captured.train_loss_list[-1] < captured.train_loss_list[0]
    assert len(captured.train_loss_list) == 30
    assert sum(e.kind == "graph" for e in seen) == 30 - 4
    assert sum(e.kind == "h2d" for e in seen) == 6 + 4 + 10, (
        "parameters, the sets, an order an epoch"
    )
    # losses of steps, two accuracies and the test loss an epoch; once what the model is to know
    assert sum(e.kind == "d2h" for e in seen) == 4 * 10 + 1


@pytest.mark.parametrize(
    "changes",
    [
        {"class_weight": {1: 5.0}, "sample_weight": np.linspace(0, 2, 50)},
        {"class_weight": "balanced", "label_smoothing": 0.1, "accumulate": 3},
        {"loss": losses.CrossEntropy(weight=[1.0, 2.0, 3.0, 4.0], ignore_index=2)},
        {"loss": losses.Focal(alpha=[1.0, 2.0, 3.0, 4.0])},
        {"loss": losses.BCEWithLogits(pos_weight=[1.0, 2.0, 3.0, 4.0]), "metrics": ["f1"]},
        {"loss": "huber"},
        {"loss": "nt_xent", "sample_weight": np.linspace(0, 2, 50), "metrics": []},
        {"loss": "triplet", "metrics": []},
        {"loss": losses.Triplet(triplets="all"), "metrics": []},
    ],
    ids=[
        "weights",
        "balanced",
        "ignored",
        "focal",
        "labels",
        "values",
        "contrast",
        "hardest",
        "triplets",
    ],
)
def test_weights_are_on_the_device_before_a_step_is_recorded(changes):
    """And stay there, whatever other losses send afterwards."""
    home = resolve("cuda:1")
    captured, plain = (trained(home, way, epochs=3, **changes) for way in (True, False))
    assert (captured.updater.compiled.reason, captured.updater.compiled.graphs) == (None, 2)
    assert captured.train_loss_list == plain.train_loss_list
    assert bits(captured.model) == bits(plain.model)
    weights = next(
        value for value in (*vars(captured.loss).values(), (1.0, 7.0)) if isinstance(value, tuple)
    )
    like = captured.model.children["fc"].params["bias"]
    sent = constants.on_device(weights, like)
    for number in range(200):
        constants.on_device((float(number), 1.0), like)
    assert constants.on_device(weights, like) is sent


@pytest.mark.parametrize("loss", ["dice", "focal", "cross_entropy"])
def test_maps_are_captured(loss):
    home, (x, _) = resolve("cuda:1"), patches(40)

    def made(compile_step):
        model = Model(conv=Conv2d(1, 2, 3, padding=1)).build((1, 8, 8), device=home, seed=0)
        options = {"loss": loss, "metrics": ["mean_iou"], "epochs": 3, "batch_size": 10}
        t = (x[:, 0] > 0.7).astype("uint8")
        run = Trainer(model, x, t, **options, compile_step=compile_step, verbose=False)
        run.train()
        return run

    captured, plain = made(True), made(False)
    assert (captured.updater.compiled.reason, captured.updater.compiled.graphs) == (None, 1)
    assert bits(captured.model) == bits(plain.model)


def test_augmentation_is_part_of_the_recorded_step(caplog):
    """Epoch and indices are on the device; the tables are sent before a step is recorded."""
    home = resolve("cuda:1")
    transforms = [
        augment.RandomCrop(1),
        augment.HorizontalFlip(),
        augment.Affine(10.0, 0.1, shear=5.0),
        augment.RandomResizedCrop(),
        augment.Brightness(p=0.5),
        augment.Contrast(),
        augment.CutOut(2),
        augment.MixUp(),
        augment.CutMix(p=0.5),
    ]
    with caplog.at_level(logging.WARNING, logger="portacnn"):
        captured = trained(home, True, epochs=4, augment=transforms)
    assert caplog.messages == []
    assert (captured.updater.compiled.reason, captured.updater.compiled.graphs) == (None, 2)
    plain = trained(home, False, epochs=4, augment=transforms)
    assert captured.train_loss_list == plain.train_loss_list
    assert bits(captured.model) == bits(plain.model)
    other = trained(home, False, epochs=4)
    assert plain.train_loss_list != other.train_loss_list


def test_batches_that_are_sent_there_are_captured_too(monkeypatch):
    """A batch may still be on its way while the graph of the one before it runs."""
    home = resolve("cuda:1")
    plain = trained(home, False, epochs=4)
    monkeypatch.setattr(type(home), "free_memory", lambda self: 1000)
    captured = trained(home, True, epochs=4)
    assert isinstance(captured._feed, Streamed)
    assert captured.updater.compiled.graphs == 2
    assert captured.train_loss_list == plain.train_loss_list
    assert bits(captured.model) == bits(plain.model)


def test_a_network_without_kernels_names_its_first_product(caplog):
    home = resolve("cuda")
    with use_kernels("reference"), caplog.at_level(logging.WARNING, logger="portacnn"):
        captured, plain = trained(home, True, epochs=2), trained(home, False, epochs=2)
    assert captured.updater.compiled.reason.startswith("conv: ")
    assert len(caplog.messages) == 1
    assert captured.train_loss_list == plain.train_loss_list
    assert bits(captured.model) == bits(plain.model)


def test_a_network_that_finds_no_room_goes_on_with_smaller_batches():
    home = resolve("cuda:1")
    run = trained(home, True, epochs=1)
    before = bits(run.model)
    x, t = patches(4000)
    large = Trainer(
        run.model,
        x,
        t,
        *patches(20, seed=1),
        mini_batch_size=4000,
        epochs=1,
        compile_step=True,
        verbose=False,
    )
    fake_cupy.capacity[home.device.id] = machine._held[home.device.id] + 3_000_000
    with pytest.raises(
        OutOfMemoryError,
        match=r"step of 4000 images \([\d]+ bytes requested, "
        r"[\d]+ in use\)",
    ):
        large.train()
    assert bits(run.model) == before
    small = Trainer(
        run.model,
        x,
        t,
        *patches(20, seed=1),
        mini_batch_size=100,
        epochs=1,
        compile_step=True,
        verbose=False,
    )
    small.train()
    assert small.updater.compiled.graphs == 1
    assert bits(run.model) != before
