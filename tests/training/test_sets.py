"""Images and labels of a training: their dtypes, memory order and place, and what is refused."""

import numpy as np
import pytest

from portacnn import Normalize, Trainer
from portacnn.errors import ArgumentError, ArrayError, LabelError, NotFiniteError, ShapeError
from support.matrix import EACH_LIBRARY
from support.nets import as_bytes, bits, patches, small_net
from support.small_trainings import Recorder, trainer

# --- what a run leaves ----------------------------------------------------------------------------


def test_one_hot_labels_are_integer_labels(backend):
    plain = trainer(small_net(backend.device))
    x, t = patches(50)
    x_test, t_test = patches(20, seed=1)
    eye = np.eye(4, dtype="float32")
    options = {
        "epochs": 2,
        "mini_batch_size": 20,
        "optimizer_param": {"lr": 0.01},
        "verbose": False,
    }
    for labels in ((eye[t], eye[t_test]), (t.astype("uint8"), backend.array(t_test))):
        other = Trainer(small_net(backend.device), x, labels[0], x_test, labels[1], **options)
        other.train()
        if not plain.train_loss_list:
            plain.train()
        assert other.train_loss_list == plain.train_loss_list
        assert other.test_acc_list == plain.test_acc_list


@EACH_LIBRARY
def test_evaluate_sample_num_per_epoch(backend):
    run = trainer(small_net(backend.device), evaluate_sample_num_per_epoch=7, epochs=1)
    run.train()
    x, t = patches(50)
    x_test, t_test = patches(20, seed=1)
    assert run.train_acc_list == [run.model.accuracy(x[:7], t[:7])]
    assert run.test_acc_list == [run.model.accuracy(x_test[:7], t_test[:7])]
    more = trainer(small_net(backend.device), evaluate_sample_num_per_epoch=1000, epochs=1)
    more.train()
    assert more.test_acc_list == [more.model.accuracy(x_test, t_test)]


def test_the_data_stay_untouched_and_may_lie_on_the_device(backend):
    x, t = patches(50)
    here, labels = backend.array(x), backend.array(t)
    runs = [
        Trainer(small_net(backend.device), a, b, a, b, epochs=1, mini_batch_size=20, verbose=False)
        for a, b in ((x, t), (here, labels))
    ]
    for run in runs:
        run.train()
    assert runs[0].train_loss_list == runs[1].train_loss_list
    np.testing.assert_array_equal(backend.host(here), patches(50)[0])
    np.testing.assert_array_equal(x, patches(50)[0])
    np.testing.assert_array_equal(backend.host(labels), t)


@EACH_LIBRARY
def test_batches_of_one_and_of_all(backend):
    for size, steps in ((1, 6), (6, 1)):
        run = trainer(small_net(backend.device), train=6, mini_batch_size=size, epochs=1)
        run.train()
        assert len(run.train_loss_list) == steps


def test_uint8_images_train_as_floats_do(backend):
    """To the bit: images / 255 made beforehand, and images kept as uint8 and divided a batch at a
    time."""
    (x, t), (x_test, t_test) = ((as_bytes(x), t) for x, t in (patches(50), patches(20, seed=1)))
    runs = []
    for images in ("uint8", "uint8 there", "float"):
        net = small_net(backend.device)
        if images != "float":
            net.preprocess = Normalize()
        sets = [
            x.astype("float32") / np.float32(255) if images == "float" else x for x in (x, x_test)
        ]
        if images == "uint8 there":
            sets = [backend.array(x) for x in sets]
        run = Recorder(
            net,
            sets[0],
            t,
            sets[1],
            t_test,
            epochs=2,
            mini_batch_size=20,
            accumulate=2,
            verbose=False,
        )
        run.train()
        assert str(run.x_train.dtype).endswith("uint8" if images != "float" else "float32")
        assert {str(x.dtype).rpartition(".")[2] for x, _ in run.batches} == {"float32"}
        figures = run.train_loss_list, run.train_acc_list, run.test_acc_list
        runs.append((figures, bits(run.model)))
    assert runs[0] == runs[1] == runs[2]
    np.testing.assert_array_equal(x, as_bytes(patches(50)[0]))


@EACH_LIBRARY
def test_a_set_in_any_memory_order(backend):
    """Turned into rows once: NumPy's take would copy the whole of it again for every batch."""
    x, t = as_bytes(patches(50)[0]), np.arange(50) % 4
    figures = []
    for images in (x, x.transpose(2, 3, 1, 0).copy().transpose(3, 2, 0, 1)):
        net = small_net(backend.device)
        net.preprocess = Normalize()
        run = Trainer(net, images, t, images, t, epochs=1, mini_batch_size=20, verbose=False)
        if backend.backend.name == "numpy":
            assert run.x_train.flags.c_contiguous
            assert (run.x_train is x) == (images is x)
        run.train()
        figures.append(run.train_loss_list)
    assert figures[0] == figures[1]


def bad_pixel(value):
    x, _ = patches(50)
    x[3, 0, 2, 1] = value
    return x


# --- bad input ------------------------------------------------------------------------------------


@EACH_LIBRARY
@pytest.mark.parametrize("which", ["train", "test"])
@pytest.mark.parametrize(
    ("x", "t", "error", "message"),
    [
        (
            bad_pixel(float("nan")),
            None,
            NotFiniteError,
            "x_{} contains NaN or infinity (50x1x8x8, numpy float32 on cpu); cl",
        ),
        (bad_pixel(float("inf")), None, NotFiniteError, "x_{} contains NaN or infinity"),
        (
            np.zeros((50, 3, 8, 8), "float32"),
            None,
            ShapeError,
            "SimpleConvNet: expected images (N, 1, 8, 8), got 50x3x8x8",
        ),
        (
            np.zeros((50, 64), "float32"),
            None,
            ShapeError,
            "expected images (N, 1, 8, 8), got 50x64",
        ),
        (
            np.zeros((50, 1, 8, 8), "uint8"),
            None,
            ArrayError,
            "expected floating-point images, got 50x1x8x8, numpy uint8",
        ),
        (
            np.zeros((0, 1, 8, 8), "float32"),
            np.zeros(0, int),
            ArgumentError,
            "x_{} must have at least one image",
        ),
        (
            None,
            np.full(50, 4),
            LabelError,
            "t_{}: label 4 at index 0 is outside 0..3; the network has 4 outputs",
        ),
        (None, np.full(50, -1), LabelError, "t_{}: label -1 at index 0"),
        (
            None,
            np.zeros(49, int),
            LabelError,
            "t_{}: expected a target for each of 50 samples, got shape (49,)",
        ),
        (
            None,
            np.zeros((50, 5)),
            LabelError,
            "or shares of classes (50, 4) for outputs of (4,), got shape (50, 5)",
        ),
        (None, np.zeros((50, 4)), LabelError, "t_{}: CrossEntropy: row 0 is not one-hot"),
        (
            None,
            np.zeros(50),
            LabelError,
            "t_{}: CrossEntropy expects whole numbers 0..3, got float64",
        ),
    ],
)
def test_data_that_do_not_fit_are_refused(backend, which, x, t, error, message):
    net = small_net(backend.device)
    before = bits(net)
    good_x, good_t = patches(50)
    bad = (good_x if x is None else x, good_t if t is None else t)
    sets = (*bad, good_x, good_t) if which == "train" else (good_x, good_t, *bad)
    with pytest.raises(error) as caught:
        Trainer(net, *sets, verbose=False)
    assert message.format(which) in str(caught.value)
    assert bits(net) == before


def test_data_of_another_library():
    strict = pytest.importorskip("array_api_strict")
    x, t = (
        strict.zeros((50, 1, 8, 8), dtype=strict.float32, device=strict.Device("device1")),
        np.zeros(50, int),
    )
    with pytest.raises(
        ArrayError, match="the model is on numpy on cpu, the images are 50x1x8x8, array_api_strict"
    ):
        Trainer(small_net("numpy"), x, t, x, t)
