"""Training on several ranks, which are threads here: equal to one process with the whole batch.
Ranks that are processes: tests/distributed."""

from dataclasses import dataclass

import numpy as np
import pytest

from portacnn import Model, SimpleConvNet, Trainer
from portacnn.augment import HorizontalFlip, MixUp, Transform
from portacnn.callbacks import EMA
from portacnn.errors import StateError
from portacnn.layers import (
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    InstanceNorm2d,
    Linear,
    Recompute,
    ReLU,
    Residual,
    Sequential,
)
from portacnn.losses import CenterDetection, CrossEntropy, PerOutput
from portacnn.training import reducing
from portacnn.training.shares import Split
from support.matrix import backends
from support.nets import patches
from support.ranks import on_ranks
from support.tasks import TASKS
from support.tasks import net as net_of_task

X, T = patches(22, dtype="float64")
WEIGHTS = np.random.default_rng(3).random(22)


def deep_net(device="numpy", dtype="float64", seed=3):
    """With batch norm, fused with ReLU and alone, dropout, a residual, a shared layer."""
    twice = Conv2d(3, 3, 3, padding=1)
    net = Model(
        conv1=Conv2d(1, 3, 3, bias=False),
        bn1=BatchNorm2d(3),
        relu1=ReLU(),
        drop=Dropout(0.3),
        again=Sequential(twice, ReLU(), twice, BatchNorm2d(3, momentum=None)),
        block=Residual(Sequential(Conv2d(3, 3, 3, padding=1, bias=False), BatchNorm2d(3))),
        flatten=Flatten(),
        fc=Linear(None, 4),
    )
    return net.build((1, 8, 8), device=device, dtype=dtype, seed=seed)


def train(communicator, net=deep_net, data=(X, T, X[:9], T[:9]), device="numpy", **options):
    """A training whose last batch is uneven: of 22 images by 8, it has 6."""
    standard = {
        "epochs": 2,
        "batch_size": 8,
        "optimizer": "momentum",
        "lr": 0.05,
        "sync_batch_norm": True,
        "verbose": False,
    }
    made = {key: value() if callable(value) else value for key, value in options.items()}
    trainer = Trainer(net(device), *data, distributed=communicator, **{**standard, **made})
    trainer.train()
    return trainer


def figures(trainer):
    own = {n: v for n, v in trainer.history.items() if not n.startswith(("seconds", "images"))}
    return {"steps": trainer.train_loss_list, **own}


def assert_alike(one, several, tolerance=1e-9):
    """Figures and weights of one process, and bitwise the same on all ranks."""
    first = several[0]
    for name, expected in figures(one).items():
        for each in several:
            np.testing.assert_allclose(
                figures(each)[name], expected, rtol=tolerance, atol=tolerance, err_msg=name
            )
    state = first.model.state_dict()
    for each in several[1:]:
        assert each.history == first.history  # with what rank 0's clock says
        for path, array in each.model.state_dict().items():
            np.testing.assert_array_equal(array, state[path], path)
    for path, array in one.model.state_dict().items():
        np.testing.assert_allclose(
            state[path], array, rtol=1e3 * tolerance, atol=1e3 * tolerance, err_msg=path
        )


@backends("numpy", "strict-device1", "torch", "torch-cuda", "cupy", "cupy-emulated")
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_train_as_one_process(backend, ranks, monkeypatch):
    """A deep net with dropout, augmentation that mixes images, synchronised batch norm, and
    gradients in many buckets."""
    monkeypatch.setattr(reducing, "BUCKET", 200)
    options = {
        "device": backend.device,
        "augment": ["mixup", "rotation=10", "cutmix"],
        "metrics": ["accuracy", "roc_auc", "confusion_matrix"],
    }
    assert_alike(train(None, **options), on_ranks(ranks, lambda c: train(c, **options)))


OPTIONS = {
    "parts": {"accumulate": 2},
    "parts of a mixed batch": {"accumulate": 2, "augment": [MixUp(), MixUp(alpha=1.0)]},
    "clipped": {"clip_norm": 0.1},
    "weights": {"sample_weight": WEIGHTS, "class_weight": {1: 3.0}},
    "ignored": {"loss": CrossEntropy(ignore_index=2)},
    "averages": {"callbacks": lambda: EMA(0.9), "early_stopping": 1, "epochs": 3},
    "split": {"data": (X, T), "validation_split": 0.3, "batch_size": 5, "drop_last": True},
    "few evaluated": {"evaluate_sample_num_per_epoch": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_a_training_on_three_ranks(options):
    options = {"epochs": 1, **options}
    assert_alike(train(None, **options), on_ranks(3, lambda c: train(c, **options)))


@pytest.mark.slow
def test_four_ranks_and_more_steps():
    options = {"epochs": 17, "batch_size": 9}
    assert_alike(train(None, **options), on_ranks(4, lambda c: train(c, **options)))


def test_float32_and_the_tutorials_network():
    def net(device):
        return SimpleConvNet((1, 8, 8), {"filter_num": 3, "filter_size": 3}, device=device, seed=1)

    options = {"net": net, "data": (X.astype("float32"), T), "epochs": 5}
    one, several = train(None, **options), on_ranks(3, lambda c: train(c, **options))
    np.testing.assert_allclose(several[0].train_loss_list, one.train_loss_list, rtol=1e-5)


@pytest.mark.parametrize("task", [name for name in TASKS if name not in ("nt_xent", "triplet")])
def test_every_loss_and_metric(task):
    """As one process has them. The embedding losses compare the images of each process."""
    t, outputs, options = TASKS[task]
    maps = np.asarray(t).ndim > 2
    x = patches(40)[0].astype("float64")

    def run(communicator):
        def net(device):
            return net_of_task(outputs, device, maps=maps, dtype="float64")

        own = {"loss": task, **options, "epochs": 1, "batch_size": 17}
        return train(communicator, net, (x, t, x[:7], t[:7]), **own)

    assert_alike(run(None), on_ranks(3, run))


def test_detection_where_a_rank_has_no_object():
    """Its loss is divided by the number of cells with objects, at least 1, of the whole batch."""
    t = np.zeros((22, 5, 6, 6))
    t[::8, 0, 2:4, 3] = 1 + np.arange(2)
    t[:, 1:] = np.random.default_rng(0).random((22, 4, 6, 6))

    def net(device):
        model = Model(conv=Conv2d(1, 4, 3), relu=ReLU(), out=Conv2d(4, 7, 1))
        return model.build((1, 8, 8), device=device, dtype="float64", seed=0)

    losses = [CenterDetection(), 0.5 * CenterDetection() + CenterDetection(box_weight=3.0)]
    for loss in losses:
        options = {"net": net, "data": (X, t), "loss": loss, "metrics": ()}
        assert_alike(train(None, **options), on_ranks(3, lambda c, o=options: train(c, **o)))


def test_several_outputs():
    loss = PerOutput((("a", (4,), CrossEntropy()), ("b", (2,), None), ("c", (1,), CrossEntropy())))
    assert loss.whole_count((3, 4)) == (3, 4)


def frozen_net(device):
    net = deep_net(device)
    net.freeze(("conv1", "bn1", "block.0"))
    return net


def tied_net(device):
    first, last = Linear(64, 64), Linear(64, 64)
    last.tie("weight", first)
    net = Model(flat=Flatten(), a=first, r=ReLU(), b=last, c=Linear(64, 4))
    return net.build((1, 8, 8), device=device, dtype="float64", seed=0)


def recomputed_net(device):
    net = Model(
        a=Recompute(Sequential(Conv2d(1, 3, 3), BatchNorm2d(3), ReLU(), Dropout(0.2))),
        norm=InstanceNorm2d(3, affine=True, track_running_stats=True),
        flat=Flatten(),
        c=Linear(None, 4),
    )
    return net.build((1, 8, 8), device=device, dtype="float64", seed=0)


@pytest.mark.parametrize("net", [frozen_net, tied_net, recomputed_net])
def test_networks(net, monkeypatch):
    monkeypatch.setattr(reducing, "BUCKET", 100)
    several = on_ranks(3, lambda c: train(c, net, epochs=1))
    assert_alike(train(None, net, epochs=1), several)
    before, after = net("numpy"), several[0].model.state_dict()
    for path, array in before.state_dict().items():
        if path.split(".")[0] in ("bn1", "conv1") and net is frozen_net:
            np.testing.assert_array_equal(after[path], array)  # to the bit


def test_local_batch_norm():
    """Each rank normalizes by its own statistics. The running ones are the mean over the images,
    by which all ranks evaluate."""

    def one_step(communicator):
        return train(communicator, epochs=1, batch_size=22, lr=0.0, sync_batch_norm=False)

    several = on_ranks(3, one_step)
    assert_alike(several[0], several)
    order, rank_means = several[0].order(0), []
    conv = deep_net().state_dict()["conv1.weight"]
    for part in np.split(X[order], [8, 15]):
        windows = np.lib.stride_tricks.sliding_window_view(part[:, 0], (3, 3), axis=(1, 2))
        rank_means.append(np.einsum("nhwij,oij->onhw", windows, conv[:, 0]).mean((1, 2, 3)))
    expected = 0.1 * np.average(rank_means, axis=0, weights=[8, 7, 7])
    found = several[0].model.state_dict()["bn1.running_mean"]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_norms_that_differ_between_ranks(monkeypatch):
    """By their last bits, with another number of threads; here by more."""
    count, usual = iter(range(1000)), reducing.global_norm
    monkeypatch.setattr(
        reducing, "global_norm", lambda grads: usual(grads) * (1 + 1e-6 * next(count))
    )
    several = on_ranks(3, lambda c: train(c, epochs=1, clip_norm=0.1))
    assert_alike(several[0], several)


def test_layers_frozen_during_a_training():
    """The gradients of those that learn get another layout."""

    def run(communicator):
        trainer = train(communicator, epochs=1)
        trainer.model.freeze("again.0")
        trainer.epochs = 2
        trainer.train()
        return trainer

    assert_alike(run(None), on_ranks(2, run))


class Halves(Linear):
    """Writes its gradient in one or in two pieces, step by step."""

    pieces = (2, 1, 1)
    step = 0

    def backward(self, dy, cache, *, need_dx=True):
        pieces, self.step = self.pieces[self.step], self.step + 1
        for _ in range(pieces):
            dx = super().backward(dy / pieces, cache, need_dx=need_dx)
        return dx


class MoreHalves(Halves):
    pieces = (1, 2, 2)


def halves_net(device, kind=Halves):
    net = Model(flat=Flatten(), a=Linear(64, 8), b=kind(8, 4))
    return net.build((1, 8, 8), device=device, dtype="float64", seed=0)


def test_gradients_that_are_written_less_often_are_summed_at_the_end(monkeypatch):
    monkeypatch.setattr(reducing, "BUCKET", 100)
    options = {"epochs": 1, "data": (X, T)}
    ranks = on_ranks(2, lambda c: train(c, halves_net, **options))
    assert_alike(train(None, halves_net, **options), ranks)


def test_gradients_that_are_written_more_often_are_an_error(monkeypatch):
    monkeypatch.setattr(reducing, "BUCKET", 100)
    with pytest.raises(StateError, match=r"the gradient of b\.\w+ was written more often"):
        on_ranks(2, lambda c: train(c, lambda d: halves_net(d, MoreHalves), epochs=1))


class Fails(Linear):
    fails = False

    def backward(self, dy, cache, *, need_dx=True):
        if self.fails:
            raise ValueError(self.path)
        return super().backward(dy, cache, need_dx=need_dx)


def test_sums_of_a_step_that_failed_end_before_the_next(monkeypatch):
    """Rank 1 fails in layer b, when the sums of c have started; rank 0 later, in layer a."""
    monkeypatch.setattr(reducing, "BUCKET", 100)

    def run(communicator):
        rank, started = communicator.rank, []
        start = communicator.start_all_reduce

        def starting(array, **options):
            pending = start(array, **options)
            started.append([array.shape, False])
            wait, mine = pending.wait, started[-1]

            def waiting():
                mine[1] = True
                wait()

            pending.wait = waiting
            return pending

        communicator.start_all_reduce = starting
        net = Model(flat=Flatten(), a=Fails(64, 8), b=Fails(8, 8), c=Linear(8, 4))
        net.build((1, 8, 8), device="numpy", dtype="float64", seed=0)
        own = np.asarray(Split(8, rank, 2).of(8).positions())
        trainer = Trainer(net, X, T, distributed=communicator, lr=0.05, verbose=False, batch_size=8)
        for _ in range(2):
            trainer.run_batch(own, size=8)
        failing = getattr(net, "ab"[rank])
        failing.fails = True
        with pytest.raises(ValueError, match=failing.path):
            trainer.run_batch(own, size=8)
        failing.fails = False
        before = len(started)
        assert not all(ended for _, ended in started)
        trainer.run_batch(own, size=8)
        return started, list(net.state_dict().values()), before

    (first, weights, some), (second, others, fewer) = on_ranks(2, run)
    assert fewer < some
    assert first == second
    assert all(ended for _, ended in first)
    for one, other in zip(weights, others, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_first_step_with_fewer_parts():
    """As after resuming with the last batch of an epoch."""

    def run(communicator):
        trainer = train(communicator, epochs=0, accumulate=2)
        if communicator is None:
            batches = [np.arange(4), np.arange(4, 12)]
        else:
            own = [Split(4, communicator.rank, 2).of(size).positions() for size in (4, 8)]
            batches = [np.asarray(own[0]), 4 + np.asarray(own[1])]
        for size, batch in zip((4, 8), batches, strict=True):
            trainer.run_batch(batch, size=size)
        trainer._read_losses()
        return trainer

    assert_alike(run(None), on_ranks(2, run))


def test_gradients_may_be_rounded_on_their_way():
    """To float16, gradients only: the loss and the running statistics stay exact."""

    def first(communicator):
        trainer = train(communicator, epochs=1, batch_size=22, compress_gradients="float16")
        return trainer, trainer.model.state_dict()

    (several, state), (_, other) = on_ranks(2, first)
    alone = train(None, epochs=1, batch_size=22)
    np.testing.assert_allclose(several.train_loss_list, alone.train_loss_list, rtol=1e-12)
    for path, expected in alone.model.state_dict().items():
        np.testing.assert_array_equal(state[path], other[path])
        exact = "running" in path
        np.testing.assert_allclose(state[path], expected, rtol=0, atol=1e-12 if exact else 1e-3)
    rounded = np.abs(state["fc.weight"] - alone.model.state_dict()["fc.weight"]).max()
    assert rounded > 1e-7


@dataclass(frozen=True)
class Doubled(Transform):
    """Adds the image two places before."""

    p: float = 1.0
    looks_back = 2

    def apply(self, batch, draw):
        batch.images = batch.images + np.roll(batch.images, 2, axis=0)


def test_a_transform_of_ones_own_that_looks_back():
    options = {"augment": [Doubled(), HorizontalFlip()], "epochs": 1}
    assert_alike(train(None, **options), on_ranks(3, lambda c: train(c, **options)))


def test_gradients_are_summed_while_the_backward_pass_runs(monkeypatch):
    """From the second step on: all buckets but the last before the first layer's backward pass."""
    monkeypatch.setattr(reducing, "BUCKET", 200)
    events = {}

    def run(communicator):
        net = deep_net()
        first = net.children["conv1"]

        def backward(dy, cache, *, need_dx=True, backward=first.backward):
            communicator.log.append("first layer")
            return backward(dy, cache, need_dx=need_dx)

        first.backward = backward
        train(communicator, lambda device: net, epochs=1, sync_batch_norm=False)
        events[communicator.rank] = communicator.log

    on_ranks(2, run)
    assert events[0] == events[1]
    steps = [list(each) for each in _split(events[0], "first layer")]
    starts = [[event for event in step if event[0] == "start"] for step in steps]
    assert [len(each) for each in starts] == [1, 6, 6, 1]
    total = sum(array.size for array in deep_net().named_parameters().values())
    sizes = [shape[0] for _, shape in starts[2][-4:]]
    assert 0 < total - sum(sizes) < total


def _split(events, word):
    part = []
    for event in events:
        if event == word:
            yield part
            part = []
        else:
            part.append(event)
    yield part
