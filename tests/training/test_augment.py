"""``Trainer(augment=...)``: what the network sees, what is evaluated, and how it resumes."""

from dataclasses import dataclass

import numpy as np
import pytest

from portacnn import Normalize, Trainer, losses, seeds
from portacnn.augment import (
    Affine,
    Brightness,
    Contrast,
    CutMix,
    CutOut,
    HorizontalFlip,
    MixUp,
    RandomCrop,
    Shift,
    Transform,
    apply,
    standard,
)
from portacnn.errors import ArgumentError, ShapeError
from portacnn.layers import AdaptiveAvgPool2d, Conv2d, Flatten, Linear
from portacnn.models import Model
from portacnn.training import trainer as trainer_module
from portacnn.training.feed import Resident, Streamed
from support.matrix import EACH_LIBRARY
from support.nets import as_bytes, bits, patches, small_net
from support.trainings import (
    EPOCHS,
    SIZE,
    STEPS,
    TRAIN,
    Watched,
    data,
    make,
    outcome,
    resumed,
    rewrite,
    stopped,
    uninterrupted,
)

pytestmark = EACH_LIBRARY

LIST = (
    Shift(1),
    Affine(10.0, 0.1),
    Brightness(),
    Contrast(p=0.5),
    CutOut(2),
    MixUp(),
    CutMix(p=0.3),
)


@pytest.mark.parametrize("feed", [Resident, Streamed])
def test_batches_are_changed_and_sets_that_are_evaluated_are_not(backend, monkeypatch, feed):
    if feed is Streamed:
        if backend.backend.name == "numpy":
            monkeypatch.setattr(trainer_module, "make_feed", Streamed)
        monkeypatch.setattr(type(backend.backend), "free_memory", lambda self: 1000)
    trainer = make(backend.device, augment=LIST, epochs=2)
    assert type(trainer._feed) is feed
    trainer.train()
    x, t, x_test, t_test = data()
    ends = float(x.min()), float(x.max())
    for number, (seen, targets) in enumerate(trainer.batches):
        epoch, batch = divmod(number, STEPS)
        chosen = seeds.permutation(5, epoch, TRAIN)[batch * SIZE : (batch + 1) * SIZE]
        expected = apply(
            LIST, x[chosen], t[chosen], seed=5, epoch=epoch, indices=chosen, classes=4,
            input_range=ends,
        )  # fmt: skip
        np.testing.assert_allclose(seen, expected.images, atol=1e-5)
        np.testing.assert_allclose(targets, expected.targets, atol=1e-6)
    for name, images, labels in (("train", x, t), ("test", x_test, t_test)):
        figures = trainer.evaluate(images, labels)
        assert trainer.history[f"{name}_accuracy"][-1] == figures["accuracy"]
    assert trainer.history["test_loss"][-1] == pytest.approx(figures["loss"], rel=1e-6)


def test_it_resumes_to_the_bit(backend, tmp_path):
    whole = uninterrupted(backend.device, augment=LIST)
    stopped(tmp_path, STEPS + 2, device=backend.device, augment=LIST)
    again = resumed(tmp_path, device=backend.device)
    assert again.augment == LIST
    again.train()
    assert outcome(again) == outcome(whole)


def test_it_resumes_after_any_step(tmp_path):
    whole = uninterrupted("numpy", augment=LIST)
    for step in (1, STEPS - 1, STEPS, STEPS + 1, EPOCHS * STEPS - 1):
        stopped(tmp_path / str(step), step, augment=LIST)
        again = resumed(tmp_path / str(step))
        again.train()
        assert outcome(again) == outcome(whole)


def test_another_backend_continues_with_the_same_batches(backend, tmp_path):
    stopped(tmp_path, 5, augment=LIST)
    again = resumed(tmp_path, device=backend.device)
    again.train()
    whole = uninterrupted("numpy", augment=LIST)
    for (x, t), (expected, label) in zip(again.batches, whole.batches[5:], strict=True):
        np.testing.assert_allclose(x, expected, atol=1e-5)
        np.testing.assert_allclose(t, label, atol=1e-6)


def weighted(device, kind=Trainer, **options):
    x, t = patches(40)
    options = {"epochs": 2, "batch_size": 20, "verbose": False, "augment": LIST, **options}
    return kind(small_net(device), x, t, **options)


def test_parts_of_a_batch_are_parts_of_one_augmented_batch(backend):
    weight = np.linspace(0.0, 2.0, 40)
    whole, parts = (
        weighted(backend.device, sample_weight=weight, accumulate=count) for count in (1, 4)
    )
    for trainer in (whole, parts):
        trainer.train()
    np.testing.assert_allclose(parts.train_loss_list, whole.train_loss_list, rtol=2e-5)


def test_weights_are_mixed_with_the_images(backend):
    seen = []

    class Kept(Trainer):
        def step(self, x, t, state, weight):
            seen.append(self.backend.to_host(weight))
            return super().step(x, t, state, weight)

    x, t = patches(20)
    x[:] = np.arange(20)[:, None, None, None]  # an image is its weight
    options = {"augment": MixUp(1.0), "batch_size": 20, "epochs": 1, "verbose": False}
    trainer = Kept(small_net(backend.device), x, t, sample_weight=np.arange(20.0), **options)
    trainer.train()
    order = seeds.permutation(0, 0, 20)
    mixed = apply(MixUp(1.0), x[order], indices=order).images[:, 0, 0, 0]
    np.testing.assert_allclose(seen[0], mixed, atol=1e-4)


def test_frozen_layers_stay(backend):
    trainer = weighted(backend.device)
    trainer.model.freeze("conv1")
    before = bits(trainer.model)
    trainer.train()
    after = bits(trainer.model)
    same = {path for path, value in before.items() if after[path] == value}
    assert same == {"conv1.weight", "conv1.bias"}


def test_black_is_what_preprocess_makes_of_0(backend):
    """And white what it makes of 255; for floats they are the ends of the first images."""
    x, t = patches(40, shape=(2, 8, 8))
    crop = RandomCrop((8, 0), fill=0.0), RandomCrop((8, 0), fill=1.0)
    for fill, expected in ((0, [-0.5, -0.25]), (1, [1.5, 0.25])):
        net = small_net(backend.device, input_dim=(2, 8, 8))
        net.preprocess = Normalize(mean=(0.25, 0.5), std=(0.5, 2.0))
        options = {"batch_size": 40, "epochs": 1, "verbose": False, "augment": crop[fill]}
        trainer = Seen(net, as_bytes(x), t, **options)
        trainer.train()
        edges = trainer.seen[:, :, [0, -1], 0].max(axis=(0, 2)), trainer.seen.min(axis=(0, 2, 3))
        np.testing.assert_allclose(edges[1 - fill], expected, atol=1e-6)
        trainer = Seen(small_net(backend.device, input_dim=(2, 8, 8)), x, t, **options)
        trainer.train()
        edge = trainer.seen[:, :, [0, -1], 0]
        assert (edge == (x.max() if fill else x.min())).any(axis=(1, 2)).mean() > 0.8


class Seen(Trainer):
    seen = None

    def step(self, x, t, state):
        self.seen = self.backend.to_host(x)
        return super().step(x, t, state)


def mask_net(device, classes=3):
    return Model(conv=Conv2d(1, classes, 3, padding=1)).build((1, 6, 6), device=device, seed=0)


@pytest.mark.parametrize("loss", [losses.CrossEntropy(ignore_index=255), losses.Dice()])
def test_masks_move_with_their_images(backend, loss):
    """The loss's ignore_index is outside; CutMix needs no soft masks."""
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 3, (12, 6, 6)).astype("uint8")
    images = (masks[:, None] + 1).astype("float32")
    kept = []

    class Kept(Trainer):
        def step(self, x, t, state):
            kept.append((self.backend.to_host(x), self.backend.to_host(t)))
            return super().step(x, t, state)

    transforms = [Shift(2), HorizontalFlip(), CutMix()]
    options = {"loss": loss, "batch_size": 6, "epochs": 2, "verbose": False}
    Kept(mask_net(backend.device), images, masks, augment=transforms, **options).train()
    outside = 0
    for x, t in kept:
        expected = np.where(x[:, 0] == 1.0, 0, x[:, 0] - 1)
        known = t != 255
        np.testing.assert_array_equal(t[known], expected[known])
        outside += (~known).sum()
    assert (outside > 0) == (loss.ignore_index == 255)


def test_a_crop_to_another_size_needs_a_network_that_takes_it(backend):
    x, t = patches(20, shape=(1, 10, 10))
    layers = {"conv": Conv2d(1, 3, 3), "pool": AdaptiveAvgPool2d(1), "flatten": Flatten()}
    net = Model(**layers, fc=Linear(None, 4)).build((1, 10, 10), device=backend.device, seed=0)
    options = {"batch_size": 10, "epochs": 1, "verbose": False}
    trainer = Seen(net, x, t, augment=RandomCrop(0, 8), **options)
    trainer.train()
    assert trainer.seen.shape == (10, 1, 8, 8)
    with pytest.raises(ShapeError, match=r"augment=.*RandomCrop.*expected images \(N, 1, 8, 8\)"):
        Trainer(small_net(backend.device), *patches(20), augment=RandomCrop(0, 6), **options)
    with pytest.raises(ShapeError, match=r"RandomCrop: images .8, 8. .* are smaller"):
        Trainer(small_net(backend.device), *patches(20), augment=RandomCrop(0, 9), **options)


def test_images_are_not_moved_without_their_boxes():
    """The maps of centres would stay where they are."""
    layers = [Conv2d(1, 8, 3, 2, padding=1)]
    model = Model(*layers).build((1, 8, 8), seed=0)
    options = {"loss": losses.CenterDetection(), "epochs": 1, "verbose": False, "batch_size": 2}
    x, t = np.zeros((4, 1, 8, 8), "float32"), np.zeros((4, 5, 4, 4), "float32")
    with pytest.raises(ArgumentError, match="Shift moves the images, but not the boxes"):
        Trainer(model, x, t, augment=[Brightness(), Shift(1)], **options)
    Trainer(model, x, t, augment=[Brightness()], **options).train()


@pytest.mark.parametrize("transform", [MixUp(), CutMix()])
def test_losses_that_take_no_mixed_targets(transform):
    options = {"batch_size": 10, "epochs": 1, "verbose": False, "augment": [Shift(1), transform]}
    hard = {
        "Focal": losses.Focal(),
        "NTXent": losses.NTXent(),
        "CrossEntropy with ignore_index=3": losses.CrossEntropy(ignore_index=3),
        "Sum": losses.CrossEntropy() + losses.Focal(),
    }
    x, t = patches(20)
    for name, loss in hard.items():
        message = f"{type(transform).__name__} makes targets .* which {name} does not take"
        with pytest.raises(ArgumentError, match=message):
            Trainer(small_net(), x, t, loss=loss, **options)
    values = np.random.default_rng(0).random((20, 4))
    soft = {
        losses.CrossEntropy(label_smoothing=0.1): t,
        losses.CrossEntropy() + losses.CrossEntropy(weight=(1, 2, 3, 4)): t,
        losses.BCEWithLogits(): (values > 0.5).astype("uint8"),
        losses.Focal(multilabel=True): (values > 0.5).astype("uint8"),
        losses.Huber(): values,
    }
    for loss, targets in soft.items():
        trainer = Trainer(small_net(), x, targets, loss=loss, **options)
        trainer.train()
        assert len(trainer.train_loss_list) == 2


def test_words_and_nonsense():
    x, t = patches(20)
    options = {"batch_size": 10, "epochs": 1, "verbose": False}
    trainer = Trainer(small_net(), x, t, augment="standard", **options)
    assert trainer.augment == tuple(standard((1, 8, 8)))
    assert Trainer(small_net(), x, t, **options).augment == ()
    with pytest.raises(ArgumentError, match=r"unknown transform 'mirror'; known are "):
        Trainer(small_net(), x, t, augment="mirror", **options)
    for given in ([3], 3.0, [HorizontalFlip]):
        with pytest.raises(ArgumentError, match="augment must be a list of transforms"):
            Trainer(small_net(), x, t, augment=given, **options)


@dataclass(frozen=True)
class Halved(Transform):
    """A transform that files cannot hold."""

    p: float = 1.0

    def apply(self, batch, draw):
        batch.images = batch.images * 0.5


def test_resuming_with_transforms_of_your_own(tmp_path):
    whole = uninterrupted("numpy", augment=(Halved(), Shift(1)))
    stopped(tmp_path, 4, augment=[Halved(), Shift(1)])
    with pytest.raises(ArgumentError, match=r"was made with augment that .*Halved.*augment=\.\.\."):
        resumed(tmp_path)
    again = resumed(tmp_path, augment=[Halved(), Shift(1)])
    again.train()
    assert outcome(again) == outcome(whole)


def test_what_a_checkpoint_says_of_it(tmp_path):
    stopped(tmp_path, 2, augment=[Shift((2, 1), p=0.5)])
    with pytest.raises(ArgumentError, match=r"the training run has augment=.*leave it out"):
        resumed(tmp_path, augment=[Shift(3)])
    assert resumed(tmp_path, augment=Shift((2, 1), p=0.5)).augment == (Shift((2, 1), p=0.5),)
    (file,) = tmp_path.glob("*.safetensors")

    def older(header):
        header.pop("augment")

    def damaged(header):
        header["augment"] = [{"class": "Trainer", "arguments": {}}]

    rewrite(file, older)
    assert resumed(tmp_path).augment == ()  # written before there was augmentation
    rewrite(file, damaged)
    with pytest.raises(Exception, match=r"no intact checkpoint|unknown transform 'Trainer'"):
        resumed(tmp_path)


def test_the_same_seed_is_the_same_training():
    runs = [make(kind=Watched, augment=LIST, epochs=1, seed=seed) for seed in (5, 5, 6)]
    for run in runs:
        run.train()
    assert outcome(runs[0]) == outcome(runs[1])
    assert outcome(runs[0]) != outcome(runs[2])
