"""Models, layers, optimizers and Trainers in pickles and copies: what comes back goes on as the
original does."""

import copy
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

from portacnn import Normalize, errors, scratch
from portacnn.errors import BackendError, StateError
from portacnn.layers import (
    Arithmetic,
    BatchNorm2d,
    Branches,
    Conv2d,
    Dropout,
    Flatten,
    Graph,
    Linear,
    MaxPool2d,
    ReLU,
    Residual,
    Sequential,
)
from portacnn.models import LeNet5, Model, ResNet20
from portacnn.optim import SGD, Adam, biases_and_norms
from portacnn.schedules import CosineAnnealingLR
from portacnn.training import Trainer
from support.matrix import EACH_LIBRARY
from support.nets import bits, patches, small_net


def round_trip(thing):
    return pickle.loads(pickle.dumps(thing))


both_ways = pytest.mark.parametrize(
    "copied", [round_trip, copy.deepcopy, copy.copy], ids=["pickle", "deep", "shallow"]
)


def mixed(device, **options):
    return Model(
        stem=Sequential(Conv2d(1, 4, 3, padding=1, bias=False), BatchNorm2d(4), ReLU()),
        block=Residual(Sequential(conv=Conv2d(4, 4, 3, padding=1)), activation=ReLU()),
        forked=Branches(Conv2d(4, 2, 1), MaxPool2d(3, 1, 1)),
        graph=Graph(("a", ReLU(), ["input"]), ("b", Arithmetic("add"), ["a", "input"])),
        drop=Dropout(0.25),
        flat=Flatten(),
        fc=Linear(None, 4),
    ).build((1, 8, 8), device=device, seed=5, **options)


def trainer_of(model, count=40, **options):
    x, t = patches(count)
    options = {
        "epochs": 3,
        "mini_batch_size": 10,
        "verbose": False,
        "optimizer": Adam(0.01),
        **options,
    }
    return Trainer(model, x, t, x[:12], t[:12], **options)


@EACH_LIBRARY
@both_ways
def test_a_copy_predicts_and_learns_as_the_original(backend, copied):
    model = mixed(backend.device)
    model.preprocess = Normalize()
    trainer_of(model, 20, epochs=1).train()
    before = bits(model)
    twin = copied(model)
    assert type(twin) is Model
    assert twin.backend == model.backend
    assert twin.preprocess == model.preprocess
    assert bits(twin) == before
    x, _ = patches(9, seed=3)
    np.testing.assert_array_equal(backend.host(twin.predict(x)), backend.host(model.predict(x)))
    assert twin.summary() == model.summary()
    trainer_of(model, 20, epochs=1).train()
    assert bits(twin) == before  # nothing is shared
    trainer_of(twin, 20, epochs=1).train()
    assert bits(twin) == bits(model)  # dropout's masks too


@both_ways
def test_what_every_layer_needs_is_in_the_copy(copied):
    """Networks whose weights are drawn by functions, deep ones, and one that is not built."""
    for model in (LeNet5(seed=0), ResNet20(10, seed=0)):
        twin = copied(model)
        assert bits(twin) == bits(model)
        assert len(twin.named_parameters().flats) == 1  # one update for all of them, as before
        assert repr(twin) == repr(model)
    plan = copied(Sequential(conv=Conv2d(None, 2, 3), relu=ReLU()))
    assert plan.backend is None
    assert bits(plan.build((1, 5, 5), seed=1)) == bits(
        Sequential(conv=Conv2d(None, 2, 3), relu=ReLU()).build((1, 5, 5), seed=1)
    )


def test_a_part_is_pickled_without_the_network_around_it(backend):
    model = small_net(backend.device, hidden_size=3000)
    conv = model.children["conv1"]
    assert len(pickle.dumps(conv)) < 3000 < len(pickle.dumps(model))
    twin = round_trip(conv)
    x, _ = patches(2)
    y = [backend.host(layer(backend.array(x))) for layer in (conv, twin)]
    np.testing.assert_array_equal(*y)


def test_a_pickle_holds_no_gradients_and_no_caches():
    model = small_net()
    size = len(pickle.dumps(model))
    x, t = patches(50)
    model.gradient(x, t)
    model(model.accept(x), train=True)
    model.predict(x)
    assert len(pickle.dumps(model)) < size + 500
    assert round_trip(model).named_gradients() == {}


def test_every_pickle_protocol_restores_the_model():
    model = small_net()
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        twin = pickle.loads(pickle.dumps(model, protocol))
        assert bits(twin) == bits(model)
        trainer_of(twin, epochs=1).train()


def test_an_observer_stays_with_its_layer():
    model = small_net()
    seen, relu = [], model.children["relu1"]
    relu.on_output(seen.append)
    copy.deepcopy(model).predict(patches(2)[0])
    assert not seen


def test_an_optimizer_goes_on(backend):
    def step(optimizer, params):
        optimizer.update(params, {key: array * 0.5 for key, array in params.items()})

    for optimizer in (
        SGD(0.1, 0.9, weight_decay=0.1, no_decay=biases_and_norms),
        Adam(0.1, no_decay=("b",)),
    ):
        params = {
            "w": backend.backend.asarray(np.ones((2, 3), "float32")),
            "b": backend.backend.asarray(np.ones(3)),
        }
        step(optimizer, params)
        twin = round_trip(optimizer)
        others = {
            key: backend.backend.asarray(backend.host(array)) for key, array in params.items()
        }
        step(optimizer, params)
        step(twin, others)
        for key in params:
            np.testing.assert_array_equal(backend.host(others[key]), backend.host(params[key]))
        assert (twin.steps, twin.counts) == (2, {"w": 2, "b": 2})


@EACH_LIBRARY
def test_a_trainer_goes_on_in_the_middle_of_an_epoch(backend):
    straight, broken = (
        trainer_of(mixed(backend.device), 30, schedule=CosineAnnealingLR(9), compile_step=False)
        for _ in range(2)
    )
    straight.train()

    def interrupt(x, t, state, step=broken.step):
        if state.step == 4:
            broken.stop()
        return step(x, t, state)

    broken.step = interrupt
    broken.train()
    assert (broken.epoch, broken.batch) == (1, 2)
    del broken.step
    for twin in (round_trip(broken), copy.deepcopy(broken)):
        twin.train()
        assert twin.train_loss_list == straight.train_loss_list
        assert twin.test_acc_list == straight.test_acc_list
        assert bits(twin.model) == bits(straight.model)


def test_a_process_pool_predicts():
    model, (x, _) = small_net(), patches(6)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(model.predict, [x[:3], x[3:]]))
    np.testing.assert_array_equal(
        np.concatenate(parts), np.concatenate([model.predict(x[:3]), model.predict(x[3:])])
    )


def test_a_backend_is_pickled_by_its_name(backend, monkeypatch):
    monkeypatch.setenv("PORTACNN_BACKEND", "nobody")
    data = pickle.dumps(backend.backend)
    assert len(data) < 150
    assert pickle.loads(data) == backend.backend
    monkeypatch.setattr("portacnn.runtime._BUILT_IN", {})
    with pytest.raises(BackendError):
        pickle.loads(data)


def test_errors_come_out_of_other_processes():
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.PortacnnError):
            error = round_trip(kind("what", "where"))
            assert (type(error), str(error)) == (kind, "where: what")


def test_scratch_networks_can_be_pickled():
    net, (x, t) = (
        scratch.SimpleConvNet(
            (1, 8, 8), {"filter_num": 2, "filter_size": 3, "pad": 0, "stride": 1}, 5, 4
        ),
        patches(4),
    )
    twin = round_trip(net)
    np.testing.assert_array_equal(twin.predict(x), net.predict(x))
    assert twin.gradient(x, t).keys() == net.gradient(x, t).keys()


def test_a_copy_cannot_be_edited_either():
    with pytest.raises(StateError):
        copy.deepcopy(small_net()).children["fc2"] = Linear(None, 3)
