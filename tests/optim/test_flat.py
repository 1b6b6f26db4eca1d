"""A network's arrays in one: they are views of it, stay so, and training does not depend on it."""

from copy import deepcopy

import numpy as np
import pytest

from portacnn import Trainer, ops
from portacnn.flat import Flat, Named, runs
from portacnn.runtime import resolve
from support.matrix import backends
from support.nets import bits, patches, small_net
from support.nets import normed_net as net


@pytest.fixture
def flat_here(backend):
    return backend


def train(model, **changes):
    options = {
        "epochs": 2,
        "mini_batch_size": 20,
        "optimizer_param": {"lr": 0.01},
        "verbose": False,
        **changes,
    }
    run = Trainer(
        model, *patches(50, dtype=model.dtype), *patches(20, seed=1, dtype=model.dtype), **options
    )
    run.train()
    return run


@backends(having="views")
def test_parameters_are_views_of_one_array(flat_here):
    model = net(flat_here.device)
    (flat,) = model.named_parameters().flats
    host = flat_here.host(flat.whole)
    assert host.shape == (3 * 9 + 3 + 3 + 3 + 4 * 108 + 4,)
    # what decays stands first
    order = ["fc.weight", "conv.weight", "fc.bias", "conv.bias", "bn.weight", "bn.bias"]
    expected = np.concatenate([model.state_dict()[path].ravel() for path in order])
    assert np.array_equal(host, expected)
    flat.whole[...] = flat_here.xp.zeros_like(flat.whole)
    assert not any(value.any() for path, value in model.state_dict().items() if path in order)


@backends(having="views")
def test_buffers_are_views_of_one_array_a_dtype(flat_here):
    named = net(flat_here.device).named_buffers()
    kinds = {str(whole.dtype).rpartition(".")[2]: whole.shape[0] for whole in named.wholes()}
    assert kinds == {"float32": 6, "int64": 1}


@backends(having="views")
def test_gradients_lie_as_the_parameters(flat_here):
    model = net(flat_here.device)
    assert model.named_gradients() == {}
    images, t = patches(8)
    gradients = model.gradient(images, t)
    assert model.named_gradients() == {}  # those are arrays of their own
    logits, kept = model.forward(model.batch(model.accept(images)))
    _, cache = ops.softmax_cross_entropy(logits, model.labels(t, 8))
    model.backward(ops.softmax_cross_entropy_backward(1.0, cache), kept)
    (flat,) = model.named_gradients().flats
    whole = model.named_parameters().flats[0]
    assert flat.parts == whole.parts
    assert flat.family is whole.family
    for path, gradient in gradients.items():
        begin, end = flat.parts[path]
        assert np.array_equal(
            flat_here.host(flat.whole)[begin:end], flat_here.host(gradient).ravel()
        )


@backends(having="views")
def test_training_is_the_same_apart(flat_here, monkeypatch):
    together = train(net(flat_here.device, "float64"), optimizer="momentum")
    monkeypatch.setattr(type(flat_here.backend), "views_alias", False)
    apart = train(net(flat_here.device, "float64"), optimizer="momentum")
    assert apart.model.named_parameters().flats == ()
    assert together.model.named_parameters().flats != ()
    np.testing.assert_allclose(together.train_loss_list, apart.train_loss_list, rtol=1e-12)
    for path, value in apart.model.state_dict().items():
        np.testing.assert_allclose(
            together.model.state_dict()[path], value, rtol=1e-10, atol=1e-12, err_msg=path
        )


@backends(having="views")
def test_an_array_put_in_by_hand_is_used(flat_here):
    """Then nothing is done to the whole: the network's array is not in it."""
    model = small_net(flat_here.device)
    own = flat_here.backend.asarray(np.ones((4, 6), "float32"))
    model.children["fc2"].params["weight"] = own
    assert model.named_parameters().flats == ()
    train(model)
    assert model.named_parameters()["fc2.weight"] is own
    assert not np.array_equal(flat_here.host(own), np.ones((4, 6)))


@backends(having="views")
def test_after_a_move_they_lie_together_again(flat_here):
    model = small_net(flat_here.device)
    train(model)
    before = bits(model)
    model.to(flat_here.device)
    assert len(model.named_parameters().flats) == 1
    assert bits(model) == before
    train(model)


@backends(having="views")
def test_a_copy_trains_by_itself(flat_here):
    model = small_net(flat_here.device)
    twin, before = deepcopy(model), bits(model)
    train(twin)
    assert bits(model) == before
    train(model)
    assert bits(model) == bits(twin)


def test_runs():
    flat = Flat(resolve("numpy"), {"a": (2,), "w": (2, 2), "b": (), "v": (1, 3)}, "float64")
    assert list(flat.parts) == ["w", "v", "a", "b"]
    assert runs(["b", "w", "v"], flat) == [["w", "v"], ["b"]]
    assert runs(["a", "b", "v", "w"], flat) == [["w", "v", "a", "b"]]
    assert flat.stretch(["v", "a"]).shape == (5,)
    some = Named.of({name: flat.views[name] for name in ("w", "a", "b")}, [flat])
    assert some.flats == (flat,)
    assert [part.shape for part in some.wholes()] == [(4,), (3,)]
    assert Named.of({"w": flat.views["w"] + 0.0}, [flat]).flats == ()


def test_a_buffer_for_some_of_the_names_has_their_order():
    flat = Flat(resolve("numpy"), {"b": (2,), "v": (1, 3), "w": (2, 2), "a": (2,)}, "float64")
    some = flat.without({"v", "b"})
    assert some.parts == {"w": (0, 4), "a": (4, 6)}
    assert some.family is flat.family
    assert some.whole.shape == (6,)
