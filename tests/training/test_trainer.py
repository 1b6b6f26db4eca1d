"""The Trainer: what one step does, what a run leaves behind, and that it is the same run on every
backend."""

import re
from dataclasses import replace

import numpy as np
import pytest

from portacnn import Normalize, Trainer, load_mnist_sample
from portacnn.errors import (
    ArgumentError,
    ArrayError,
    LabelError,
    NotFiniteError,
    ShapeError,
    StateError,
)
from portacnn.layers import BatchNorm2d, Conv2d, Dropout, Flatten, Linear
from portacnn.models import Model, SimpleConvNet
from portacnn.optim import SGD
from portacnn.seeds import permutation
from portacnn.training import StepState, progress
from portacnn.training import trainer as trainer_module
from support.nets import as_bytes, bits, patches, small_net


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("PORTACNN_BACKEND", raising=False)


def trainer(net, train=50, test=20, kind=Trainer, **changes):
    options = {
        "epochs": 2,
        "mini_batch_size": 20,
        "optimizer_param": {"lr": 0.01},
        "verbose": False,
    }
    dtype = net.dtype
    return kind(
        net,
        *patches(train, dtype=dtype),
        *patches(test, seed=1, dtype=dtype),
        **{**options, **changes},
    )


class Recorder(Trainer):
    """Keeps what its steps were given."""

    def __init__(self, *args, **kwargs):
        self.batches = []
        super().__init__(*args, **kwargs)

    def step(self, x, t, state):
        self.batches.append((x, t))
        return super().step(x, t, state)


# --- what a run leaves ----------------------------------------------------------------------------


def test_lists(backend):
    run = trainer(small_net(backend.device), kind=Recorder, epochs=3)
    run.train()
    # 50 images by 20: two whole batches and a short one an epoch
    assert len(run.train_loss_list) == 9
    assert [tuple(t.shape) for _, t in run.batches] == [(20,), (20,), (10,)] * 3
    assert len(run.train_acc_list) == len(run.test_acc_list) == run.epoch == 3
    for value in run.train_loss_list + run.train_acc_list + run.test_acc_list:
        assert type(value) is float
    assert run.optimizer.steps == 9
    assert run.model.accuracy(*patches(50)) == run.train_acc_list[-1]
    assert run.model.accuracy(*patches(20, seed=1)) == run.test_acc_list[-1]


def test_it_learns(backend):
    run = trainer(
        small_net(backend.device, seed=1), train=80, epochs=8, optimizer_param={"lr": 0.03}
    )
    run.train()
    assert run.train_loss_list[-1] < 0.3 * run.train_loss_list[0]
    assert run.test_acc_list[-1] > 0.9


def test_losses_are_those_of_the_weights_before_each_step(backend):
    run = trainer(
        small_net(backend.device), optimizer="sgd", optimizer_param={"lr": 0.0}, kind=Recorder
    )
    run.train()
    for (x, t), loss in zip(run.batches, run.train_loss_list, strict=True):
        assert run.model.loss(x, t) == pytest.approx(loss, rel=1e-6)


def test_a_run_by_hand(backend):
    """SGD over the same batches, written out with ``gradient``."""
    run = trainer(
        small_net(backend.device, dtype="float64"),
        optimizer="sgd",
        optimizer_param={"lr": 0.1},
        seed=5,
    )
    run.train()
    net, (x, t), losses = small_net("numpy", dtype="float64"), patches(50, dtype="float64"), []
    for epoch in range(2):
        order = permutation(5, epoch, 50)
        for chosen in (order[:20], order[20:40], order[40:]):
            losses.append(net.loss(x[chosen], t[chosen]))
            gradient = net.gradient(x[chosen], t[chosen])
            for path, value in net.named_parameters().items():
                value -= 0.1 * gradient[path]
    np.testing.assert_allclose(run.train_loss_list, losses, rtol=1e-11)
    for path, value in net.state_dict().items():
        np.testing.assert_allclose(run.model.state_dict()[path], value, rtol=1e-9, atol=1e-12)


def test_each_epoch_sees_every_image_once(backend):
    x = np.arange(50, dtype="float32").reshape(50, 1, 1, 1) * np.ones((1, 8, 8), "float32") / 50
    t = np.arange(50) % 4
    net = small_net(backend.device)
    run = Recorder(net, x, t, x, t, epochs=2, mini_batch_size=20, verbose=False)
    run.train()
    seen = [np.rint(backend.host(x)[:, 0, 0, 0] * 50).astype(int) for x, _ in run.batches]
    labels = np.concatenate([backend.host(t) for _, t in run.batches])
    epochs = np.concatenate(seen).reshape(2, 50)
    for order in epochs:
        assert sorted(order) == list(range(50))
        assert order.tolist() != sorted(order)
    assert epochs[0].tolist() != epochs[1].tolist()
    assert (labels == epochs.reshape(-1) % 4).all()


def test_the_same_seed_twice(backend):
    def run(seed):
        made = trainer(small_net(backend.device), seed=seed, epochs=1)
        made.train()
        return made.train_loss_list, made.train_acc_list, made.test_acc_list, bits(made.model)

    assert run(1) == run(1)
    assert run(1)[0] != run(2)[0]
    assert run(None)[0] != run(None)[0]


def test_going_on(backend):
    whole = trainer(small_net(backend.device), epochs=3)
    whole.train()
    parts = trainer(small_net(backend.device), epochs=1)
    parts.train()
    parts.train()  # nothing left to do
    assert parts.epoch == 1
    parts.epochs = 3
    parts.train()
    assert parts.train_loss_list == whole.train_loss_list
    assert (parts.train_acc_list, parts.test_acc_list) == (
        whole.train_acc_list,
        whole.test_acc_list,
    )
    assert bits(parts.model) == bits(whole.model)
    none = trainer(small_net(backend.device), epochs=0)
    none.train()
    assert none.train_loss_list == none.test_acc_list == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "all 2 epochs are done; set a larger trainer.epochs to continue"),
        ({"epochs": 0}, "all 0 epochs are done"),
        (
            {"early_stopping": 1, "optimizer_param": {"lr": 0.0}, "epochs": 9},
            "early stopping has ended the training; make a new Trainer",
        ),
    ],
)
def test_a_training_that_is_over_says_so(caplog, options, words):
    run = trainer(small_net(), **options)
    run.train()
    done = run.steps_done
    if done:
        assert not caplog.messages
        run.train()
    (message,) = caplog.messages
    assert "train() has nothing to do" in message
    assert words in message
    assert run.steps_done == done


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


def test_going_on_after_an_interruption():
    class Interrupted(Trainer):
        def step(self, x, t, state):
            if self.optimizer.steps == 4 and not hasattr(self, "stopped"):
                self.stopped = True
                raise KeyboardInterrupt
            return super().step(x, t, state)

    run = trainer(small_net(), kind=Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.train()
    assert len(run.train_loss_list) == 6


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


# --- one step -------------------------------------------------------------------------------------


def test_one_forward_and_one_backward_a_step(backend):
    net = small_net(backend.device)
    calls = []

    def spy(layer, name):
        original = getattr(layer, name)

        def called(*args, **kwargs):
            named = "Model" if layer is net else getattr(layer, "name", layer.path)
            calls.append((named, name, kwargs.get("train", False), kwargs.get("need_dx", True)))
            return original(*args, **kwargs)

        setattr(layer, name, called)

    for part in (net, *net.stages):
        spy(part, "forward")
        spy(part, "backward")
    run = trainer(net, train=40, epochs=1)
    run.run_batch(run.backend.asarray(np.arange(20)))
    forward = ["Model", "conv1 + relu1 + pool1", "flatten", "fc1 + relu2", "fc2"]
    assert [part for part, name, train, _ in calls if name == "forward" and train] == forward
    assert len(calls) == 10
    backward = [(part, need_dx) for part, name, _, need_dx in calls if name == "backward"]
    assert [part for part, _ in backward] == ["Model", *forward[:0:-1]]
    assert [need_dx for _, need_dx in backward] == [False, True, True, True, False]


def test_losses_are_read_at_intervals_only(backend, monkeypatch):
    """12 steps, and three reads of losses and of what was finite: at 5, at 10, and at the end of
    the epoch."""
    monkeypatch.setattr(trainer_module, "LOG_EVERY", 5)
    kind, events = type(backend.backend), []
    original = kind.to_host

    def to_host(self, array):
        events.append(tuple(array.shape))
        return original(self, array)

    run = trainer(small_net(backend.device), train=24, mini_batch_size=2, epochs=1)
    monkeypatch.setattr(kind, "to_host", to_host)
    evaluate = run._evaluate
    run._evaluate = lambda *given: events.append("evaluate") or evaluate(*given)
    run.train()
    # counts of the metrics, the test set's loss, and once a training the range of its images
    sets = ["evaluate", (2,), "evaluate", (1,), (2,), (2,)]
    assert events == [(5, 2), (5, 2), (2, 2), *sets]
    assert len(run.train_loss_list) == 12


class Peeking(Trainer):
    """What must not happen: it looks at the loss in every step."""

    def step(self, x, t, state):
        loss, ok = super().step(x, t, state)
        self.seen = float(loss)
        return loss, ok


def test_the_trap_catches_a_transfer_in_the_step():
    pytest.importorskip("array_api_strict")
    trainer(small_net("array_api_strict:device1")).train()
    with pytest.raises(
        AssertionError,
        match=r"unplanned transfer to the host: __float__ of an "
        r"array on .*device1",
    ):
        trainer(small_net("array_api_strict:device1"), kind=Peeking).train()
    trainer(small_net("array_api_strict"), kind=Peeking).train()  # the trap is device1's


def test_a_backend_may_take_the_step(backend, monkeypatch):
    taken = []

    def compile_step(self, step, example):
        chosen, state = example
        taken.append([tuple(array.shape) for array in (chosen, state.ok)])
        return lambda *arguments: taken.append("ran") or step(*arguments)

    monkeypatch.setattr(type(backend.backend), "compile_step", compile_step)
    trainer(small_net(backend.device), epochs=1).train()
    assert taken == []  # only where it is asked for
    trainer(small_net(backend.device), epochs=1, compile_step=True).train()
    assert taken == [[(20,), ()], "ran", "ran", "ran"]


def test_a_step_takes_its_numbers_from_the_device(backend, monkeypatch):
    """Step, learning rate and count as 0-dimensional arrays: the same run, with dropout, batch
    statistics and Adam."""

    def compile_step(self, step, example):
        def run(chosen, state):
            numbers = {
                name: self.asarray(np.asarray(getattr(state, name)))
                for name in ("step", "lr", "count")
            }
            return step(chosen, replace(state, **numbers))

        return run

    def net():
        layers = {
            "conv": Conv2d(1, 3, 3),
            "bn": BatchNorm2d(3),
            "flatten": Flatten(),
            "drop": Dropout(0.4),
        }
        return Model(**layers, fc=Linear(None, 4)).build(
            (1, 8, 8), device=backend.device, seed=2, dtype="float64"
        )

    monkeypatch.setattr(type(backend.backend), "compile_step", compile_step)
    options = {
        "optimizer": "adamw",
        "schedule": "cosine",
        "optimizer_param": {"lr": 0.05},
        "clip_norm": 1.0,
    }
    runs = [trainer(net(), compile_step=choice, **options) for choice in (False, True)]
    for run in runs:
        run.train()
    np.testing.assert_allclose(runs[0].train_loss_list, runs[1].train_loss_list, rtol=1e-12)
    for path, value in runs[0].model.state_dict().items():
        np.testing.assert_allclose(
            runs[1].model.state_dict()[path], value, rtol=1e-9, atol=1e-12, err_msg=path
        )
    assert runs[1].optimizer.counts == runs[0].optimizer.counts


def test_parameters_and_gradients_keep_their_arrays(backend):
    run = trainer(small_net(backend.device), epochs=1)
    params = run.model.named_parameters()
    run.run_batch(run.backend.asarray(np.arange(20)))
    gradients = run.model.named_gradients()
    run.train()
    assert all(run.model.named_parameters()[path] is value for path, value in params.items())
    assert all(run.model.named_gradients()[path] is value for path, value in gradients.items())


# --- the same on every backend --------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rel"), [("float32", 1e-4), ("float64", 1e-9)])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_the_same_run_on_every_backend(backend, dtype, rel, optimizer):
    def run(device):
        made = trainer(
            small_net(device, dtype=dtype),
            train=100,
            epochs=4,
            kind=Recorder,
            seed=3,
            optimizer=optimizer,
        )
        before = bits(made.model)
        made.train()
        batches = [
            made.backend.to_host(array).tobytes() for batch in made.batches for array in batch
        ]
        return before, batches, made.train_loss_list

    (before, batches, losses), (before_here, batches_here, losses_here) = (
        run("numpy"),
        run(backend.device),
    )
    assert len(losses) == 20
    assert before_here == before
    assert batches_here == batches
    np.testing.assert_allclose(losses_here, losses, rtol=rel)
    assert losses[-1] < losses[0]


# --- where training cannot go on ------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_divergence_stops_before_the_step_that_failed(backend, optimizer):
    run = trainer(
        small_net(backend.device), kind=Recorder, optimizer=optimizer, optimizer_param={"lr": 1e30}
    )
    with pytest.raises(NotFiniteError) as caught:
        run.train()
    assert isinstance(caught.value, FloatingPointError)
    finite = np.isfinite(run.train_loss_list)
    bad = int(np.argmin(finite))
    assert 0 < bad < 3
    assert re.fullmatch(
        rf"the loss of step {bad + 1} \(epoch 1\) is (nan|inf); the weights are those before that "
        r"step\. "
        r"Lower the learning rate \(1e\+30\)",
        str(caught.value),
    )
    state = run.model.state_dict()
    assert all(np.isfinite(value).all() for value in state.values())
    # The same steps up to the bad one, and no further.
    again = trainer(small_net(backend.device), optimizer=optimizer, optimizer_param={"lr": 1e30})
    order = again.backend.asarray(permutation(0, 0, 50))
    for step in range(bad):
        again.run_batch(order[20 * step : 20 * step + 20])
    for path, value in again.model.state_dict().items():
        np.testing.assert_array_equal(value, state[path])


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_training_can_go_on_after_divergence():
    run = trainer(small_net(), optimizer="sgd", optimizer_param={"lr": 1e30})
    with pytest.raises(NotFiniteError):
        run.train()
    run.model.load_state_dict(small_net().state_dict())
    run.optimizer.lr = 0.1
    run.train()
    assert bits(run.model) != bits(small_net())


def test_a_batch_that_gives_nan_changes_no_weight(backend):
    """The loss of the second step is NaN: after it nothing moves, though its gradients are NaN."""
    run = trainer(small_net(backend.device))
    batch = run.backend.asarray(np.arange(20))
    run.run_batch(batch)
    before = bits(run.model)
    x, t = run.x_train[:20, ...], run.t_train[:20]
    _, ok = run.step(x * float("nan"), t, StepState(1, 0.1, 2, run.updater.ok))
    assert not backend.host(ok)
    assert bits(run.model) == before
    _, ok = run.step(x, t, StepState(2, 0.1, 3, ok))
    assert not backend.host(ok)
    assert bits(run.model) == before


# --- bad input ------------------------------------------------------------------------------------


def bad_pixel(value):
    x, _ = patches(50)
    x[3, 0, 2, 1] = value
    return x


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
def test_bad_data(backend, which, x, t, error, message):
    net = small_net(backend.device)
    before = bits(net)
    good_x, good_t = patches(50)
    bad = (good_x if x is None else x, good_t if t is None else t)
    sets = (*bad, good_x, good_t) if which == "train" else (good_x, good_t, *bad)
    with pytest.raises(error) as caught:
        Trainer(net, *sets, verbose=False)
    assert message.format(which) in str(caught.value)
    assert bits(net) == before


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
def test_numbers_without_meaning(changes, message):
    net = small_net()
    before = bits(net)
    with pytest.raises(ArgumentError, match=re.escape(message)):
        trainer(net, **changes)
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


# --- what is shown --------------------------------------------------------------------------------


def test_silence(capfd, caplog):
    trainer(small_net(), verbose=False).train()
    assert capfd.readouterr() == ("", "")
    assert not caplog.messages


def test_lines_where_tqdm_is_missing(capfd, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tqdm.auto", None)
    monkeypatch.setattr(progress, "is_watched", lambda stream: True)
    run = trainer(small_net(), verbose=True)
    run.train()
    out, err = capfd.readouterr()
    assert out.splitlines() == epoch_lines(run)
    assert err == ""


def epoch_lines(run):
    sizes, losses = (20, 20, 10), run.train_loss_list
    mean = [np.average(losses[:3], weights=sizes), np.average(losses[3:], weights=sizes)]
    return [
        f"epoch {i + 1}: loss {mean[i]:.4f}, train accuracy {run.train_acc_list[i]:.4f}, "
        f"test accuracy {run.test_acc_list[i]:.4f}"
        for i in range(2)
    ]


# --- real digits ----------------------------------------------------------------------------------


def test_real_digits():
    """Two epochs over 2,000 of the bundled digits, with a small net: far above chance, and above
    its first epoch."""
    (x_train, t_train), (x_test, t_test) = load_mnist_sample()
    net = SimpleConvNet(
        (1, 28, 28), {"filter_num": 6}, 50, weight_init_std="he", device="numpy", seed=0
    )
    options = {
        "epochs": 2,
        "mini_batch_size": 50,
        "optimizer_param": {"lr": 0.003},
        "verbose": False,
    }
    data = (x_train[:2000], t_train[:2000], x_test[:500], t_test[:500])
    run = Trainer(net, *data, evaluate_sample_num_per_epoch=500, **options)
    run.train()
    assert net.accuracy(x_test, t_test) > 0.85
    assert len(run.train_loss_list) == 80
    assert run.test_acc_list[1] > run.test_acc_list[0] > 0.7
