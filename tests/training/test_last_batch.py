"""The last batch of an epoch and of an evaluation: batch norm over one image, and drop_last."""

import numpy as np
import pytest

from portacnn.errors import ArgumentError, ShapeError
from portacnn.layers import BatchNorm1d, BatchNorm2d, Conv2d, Flatten, Linear
from portacnn.models import Model
from portacnn.seeds import permutation
from portacnn.training import Trainer
from support.bright_rows import digits, net, same, trainer, weights
from support.matrix import EACH_LIBRARY

pytestmark = EACH_LIBRARY


def normed(spatial=False, device="numpy"):
    """A batch norm over one value of each channel and image, or over 36 of them."""
    layers = (
        [Conv2d(1, 3, 3), BatchNorm2d(3), Flatten()]
        if spatial
        else [Flatten(), Linear(None, 5), BatchNorm1d(5)]
    )
    return Model(*layers, Linear(None, 4)).build((1, 8, 8), device=device, dtype="float64", seed=0)


def over(count, model, **options):
    x, t = digits(count)
    return Trainer(model, x, t, x[:8], t[:8], epochs=2, seed=1, verbose=False, **options)


@pytest.mark.parametrize(
    ("count", "options", "words"),
    [
        (
            101,
            {"mini_batch_size": 10},
            [
                "the last batch of 101 images by batch_size=10 would have 1;",
                "another batch_size or drop_last=True",
            ],
        ),
        (
            10,
            {"mini_batch_size": 1},
            ["the batches of 10 images by batch_size=1 would have 1;"],
        ),
        (
            12,
            {"mini_batch_size": 4, "accumulate": 4},
            ["in parts of 1, 1, 1, 1 (accumulate=4); choose another", "or accumulate"],
        ),
        (
            13,
            {"mini_batch_size": 10, "accumulate": 5},
            ["would have 3, in parts of 2, 1 (accumulate=5)", "drop_last"],
        ),
        (1, {"mini_batch_size": 1, "drop_last": True}, ["the batches of 1 images"]),
    ],
)
def test_batches_of_one_that_a_batch_norm_cannot_take(count, options, words):
    """Said before the first step, not after ten."""
    model = normed()
    before = weights(model)
    with pytest.raises(ArgumentError) as caught:
        over(count, model, **options)
    assert str(caught.value).startswith(
        "2 (BatchNorm1d): batch norm needs more than one value per channel"
    )
    for text in words:
        assert text in str(caught.value)
    same(weights(model), before)
    # many values of each channel in every image
    over(count, normed(spatial=True), **options).train()


def untracked(device="numpy"):
    """A batch norm that has no running statistics, over one value of each channel and image."""
    norm = BatchNorm1d(5, track_running_stats=False)
    net = Model(Flatten(), Linear(None, 5), norm, Linear(None, 4))
    return net.build((1, 8, 8), device=device, dtype="float64", seed=0)


@pytest.mark.parametrize(
    ("tested", "options", "words"),
    [
        (1, {}, "x_test would be evaluated on one; pass more images"),
        (
            8,
            {"evaluate_sample_num_per_epoch": 1},
            "x_train would be evaluated on one; pass more images (",
        ),
    ],
)
def test_evaluation_on_one_image_that_a_batch_norm_cannot_take(tested, options, words):
    """Said before the first epoch, not after it."""
    x, t = digits(20)
    with pytest.raises(
        ArgumentError,
        match=r"^2 \(BatchNorm1d\): without running "
        r"statistics",
    ) as caught:
        Trainer(
            untracked(),
            x,
            t,
            x[:tested],
            t[:tested],
            epochs=1,
            mini_batch_size=10,
            verbose=False,
            **options,
        )
    assert words in str(caught.value)
    Trainer(
        normed(),
        x,
        t,
        x[:tested],
        t[:tested],
        epochs=1,
        mini_batch_size=10,
        verbose=False,
        **options,
    ).train()


def test_evaluation_that_would_end_on_one_image(backend):
    """257 images go through 256 at a time; batch norm without running statistics takes the last
    with those before it."""
    x, t = digits(257)
    net = untracked(backend.device)
    run = Trainer(net, x, t, x, t, epochs=1, mini_batch_size=100, verbose=False)
    run.train()
    assert len(run.test_acc_list) == 1
    assert np.isfinite(net.loss(x, t))
    logits = np.asarray(run.backend.to_host(net.predict(x, batch_size=4)))
    assert logits.shape == (257, 4)
    np.testing.assert_allclose(
        logits[252:], run.backend.to_host(net.predict(x[252:])), rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(
        logits[248:252], run.backend.to_host(net.predict(x[248:252])), rtol=1e-9, atol=1e-12
    )
    for size, begin in ((2, 2), (3, 3), (4, 0)):  # where the last images of 5 begin
        end = run.backend.to_host(net.predict(x[:5], batch_size=size))[begin:]
        expected = run.backend.to_host(net.predict(x[begin:5]))
        np.testing.assert_allclose(end, expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(ShapeError, match="one value has no variance"):
        net.predict(x[:1])
    with pytest.raises(ShapeError, match="one value has no variance"):
        net.predict(x[:3], batch_size=1)


def test_the_advice_for_the_last_batch_works(backend):
    for options in ({"drop_last": True}, {"mini_batch_size": 11}):
        run = over(101, normed(device=backend.device), **{"mini_batch_size": 10, **options})
        run.train()
        assert len(run.train_loss_list) == 20
        assert run.finished


def test_drop_last_leaves_out_what_makes_no_whole_batch():
    seen = []

    class Recorder(Trainer):
        def step(self, x, t, state):
            seen.append(x[:, 0, 0, 0].tolist())
            return super().step(x, t, state)

    x, t = digits(50)
    x[:, 0, 0, 0] = np.arange(50)
    run = Recorder(
        net(), x, t, x, t, epochs=2, mini_batch_size=20, drop_last=True, seed=5, verbose=False
    )
    run.train()
    orders = [permutation(5, epoch, 50) for epoch in (0, 1)]
    assert seen == [order[first : first + 20].tolist() for order in orders for first in (0, 20)]
    losses = np.reshape(run.train_loss_list, (2, 2))
    np.testing.assert_allclose(run.epoch_loss_list, losses.mean(axis=1), rtol=1e-12)
    with pytest.raises(ArgumentError, match="drop_last must be True or False, got 'no'"):
        trainer(drop_last="no")
