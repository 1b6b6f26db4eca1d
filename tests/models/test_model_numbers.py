"""Models and Trainers on numbers that are none: NaN, values beyond float32, masks; and NumPy's
warnings about them."""

import warnings

import numpy as np
import pytest

from portacnn import EarlyStopping, Trainer, ops, scratch
from portacnn.errors import ArrayError, ModelFormatError, NotFiniteError
from portacnn.layers.join import MatMul, MatMulWith
from portacnn.layers.shape import Reduce, Take
from portacnn.optim import make_optimizer
from support.checks import refuses
from support.nets import bits, patches, small_net


def test_outputs_of_nan_are_never_right(backend):
    model = small_net(backend.device)
    images, labels = patches(300)
    right = model.accuracy(images, labels)
    assert right > 0
    whole = np.full_like(images, np.nan)
    assert model.accuracy(whole, np.zeros(300, dtype=int)) == 0.0
    images[::3] = np.nan  # one in three, whose outputs are all NaN: argmax calls them class 0
    rest = [i for i in range(300) if i % 3]
    assert model.accuracy(images, np.where(np.arange(300) % 3, labels, 0)) == pytest.approx(
        model.accuracy(images[rest], labels[rest]) * 200 / 300
    )
    logits = backend.array(
        np.asarray([[1.0, 2.0], [np.nan, 2.0], [1.0, np.inf], [-np.inf, -np.inf]])
    )
    hits = ops.is_correct(logits, backend.array(np.asarray([1, 1, 1, 0])))
    assert backend.host(hits).tolist() == [True, False, True, True]


def test_pixels_beyond_the_range_of_float32_are_refused(backend):
    images, labels = patches(20, dtype="float64")
    images[3, 0, 1, 1] = -1e300
    model, wide = small_net(backend.device), small_net(backend.device, dtype="float64")
    words = "float64", "1e+300", "range of float32", "3.4e+38"
    for call in (
        lambda: model.predict(images),
        lambda: model.accept(images),
        lambda: model.loss(images, labels),
    ):
        refuses(NotFiniteError, "SimpleConvNet", *words, "dtype='float64'", call=call)
    refuses(
        NotFiniteError,
        "x_train",
        *words,
        call=lambda: Trainer(model, images, labels, images, labels),
    )
    assert wide.accept(images).dtype == backend.xp.float64
    # what is infinite already stays so, and predict may be asked about it
    images[3, 0, 1, 1] = np.inf
    model.predict(images)


def test_weights_beyond_the_range_of_float32_are_refused(backend):
    model, wide = small_net(backend.device), small_net("numpy", dtype="float64")
    before, state = bits(model), wide.state_dict()
    state["fc1.bias"][2] = 1e300
    refuses(
        ModelFormatError,
        "fc1.bias",
        "1e+300",
        "range of float32",
        call=lambda: model.load_state_dict(state),
    )
    state["fc1.bias"] = np.ma.masked_greater(np.zeros(6), 1.0)
    refuses(ArrayError, "MaskedArray", "filled", call=lambda: model.load_state_dict(state))
    assert bits(model) == before


def test_an_optimizer_state_beyond_the_range_of_float32_is_refused():
    params = {"a": np.ones(3, np.float32), "b": np.ones(2, np.float32)}
    optimizer = make_optimizer("momentum", {"lr": 0.1})
    optimizer.update(params, {name: np.ones_like(p) for name, p in params.items()})
    state = optimizer.state_dict()
    state["arrays"]["velocity.b"] = np.asarray([1.0, 1e39])
    state["lr"] = 0.5
    refuses(
        ModelFormatError,
        "velocity.b",
        "1e+39",
        call=lambda: optimizer.load_state_dict(state, params),
    )
    assert optimizer.lr == 0.1


def test_masked_images_and_labels_are_refused(backend):
    model, (images, labels) = small_net(backend.device), patches(20)
    masked, hidden = np.ma.masked_greater(images, 1.0), np.ma.masked_equal(labels, 3)
    for call in (
        lambda: model.predict(masked),
        lambda: model.accuracy(masked, labels),
        lambda: model.accuracy(images, hidden),
        lambda: model.loss(images, hidden),
        lambda: Trainer(model, masked, labels, images, labels),
        lambda: Trainer(model, images, labels, images, hidden),
        lambda: scratch.SimpleConvNet((1, 8, 8), {"filter_num": 2}, output_size=4).loss(
            masked, labels
        ),
        lambda: scratch.SimpleConvNet((1, 8, 8), {"filter_num": 2}, output_size=4).accuracy(
            images, hidden
        ),
        lambda: scratch.cross_entropy_error(images[:, 0, 0, :4], hidden),
    ):
        refuses(ArrayError, "MaskedArray", "filled", call=call)


def test_nan_logits_are_wrong_in_the_books_accuracy():
    network = scratch.SimpleConvNet((1, 8, 8), {"filter_num": 2}, output_size=4, seed=0)
    images, _ = patches(20)
    assert network.accuracy(np.full_like(images, np.nan), np.zeros(20, dtype=int)) == 0.0


def test_numpys_warnings_change_nothing():
    """Trained with errors for all that NumPy can warn of, also where the loss runs away."""
    images, labels = patches(60)

    def trained(lr: float) -> tuple:
        model = small_net()
        options = {"epochs": 2, "mini_batch_size": 20, "clip_norm": 1e6, "verbose": False}
        how = {
            "optimizer": "sgd",
            "optimizer_param": {"lr": lr},
            "early_stopping": EarlyStopping(monitor="loss"),
        }
        run = Trainer(model, images, labels, images, labels, **options, **how)
        try:
            run.train()
        except NotFiniteError as error:
            return bits(model), str(error)
        return (
            bits(model),
            run.train_loss_list,
            model.predict(images[:1]).tolist(),
            model.accuracy(images, labels),
        )

    for lr in (0.1, 1e30):
        with np.errstate(all="ignore"):
            expected = trained(lr)
        with warnings.catch_warnings(), np.errstate(all="raise"):
            warnings.simplefilter("error")
            before = np.geterr()
            assert trained(lr) == expected
            assert np.geterr() == before
    assert "Lower the learning rate" in expected[1]


def test_layers_by_themselves_do_not_warn(backend):
    """Those that compute without an op."""
    host = np.asarray([[3e38, np.inf, -np.inf], [np.nan, 1e-45, 3e38]])
    x = backend.array(host, "float32")
    own, both, chosen, mean = MatMulWith(3), MatMul(), Take([0, 0, 2], 1), Reduce("mean", [1])
    own.build((3,), device=backend.device, seed=0)
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        for layer, given in (
            (own, x),
            (both, [x, backend.xp.matrix_transpose(x)]),
            (chosen, x),
            (mean, x),
        ):
            y, cache = layer.forward(given, train=True)
            layer.backward(y, cache)
            assert np.isnan(backend.host(y)).any()
