"""A built network's state, and its passes: caches, need_dx, errors on the way."""

import numpy as np
import pytest

from portacnn.errors import (
    ArrayError,
    ModelFormatError,
    ShapeError,
)
from portacnn.layers import (
    Conv2d,
    Flatten,
    Layer,
    Linear,
    ReLU,
    Sequential,
)
from support.nets import distinct_batch, small_chain


def test_parameters_keep_their_identity(backend):
    net = small_chain().build((2, 6, 7), device=backend.device, seed=0)
    before = net.named_parameters()
    other = small_chain().build((2, 6, 7), seed=1).state_dict()
    net.load_state_dict(other)
    _, cache = net.forward(backend.array(distinct_batch((2, 2, 6, 7)), "float32"), train=True)
    net.backward(backend.array(distinct_batch((2, 5)), "float32"), cache)
    assert all(net.named_parameters()[path] is value for path, value in before.items())
    for path, value in before.items():
        np.testing.assert_array_equal(backend.host(value), other[path])


def test_state_dict_gives_copies(backend):
    net = small_chain().build((2, 6, 7), device=backend.device, seed=0)
    state = net.state_dict()
    assert list(state) == list(net.named_state())
    kept = {path: value.copy() for path, value in state.items()}
    for value in state.values():
        assert isinstance(value, np.ndarray)
        value[...] = 0
    for path, value in net.state_dict().items():
        np.testing.assert_array_equal(value, kept[path])
    net.load_state_dict(kept)
    kept["fc.bias"][...] = 9
    assert not (net.state_dict()["fc.bias"] == 9).any()


def test_load_state_dict_lists_all_that_is_wrong(backend):
    net = small_chain().build((2, 6, 7), device=backend.device, seed=0)
    before = net.state_dict()
    state = {path: value + 1 for path, value in before.items()}
    del state["conv1.bias"]
    state |= {"extra": np.zeros(1), "fc.weight": np.zeros((5, 26))}
    with pytest.raises(ModelFormatError) as caught:
        net.load_state_dict(state)
    message = str(caught.value)
    assert "missing: conv1.bias;" in message
    assert "unexpected: extra;" in message
    assert "of another shape: fc.weight (5, 26) (expected (5, 27))" in message
    for path, value in net.state_dict().items():
        np.testing.assert_array_equal(value, before[path])


def test_load_state_dict_converts(backend):
    net = small_chain().build((2, 6, 7), device=backend.device, seed=0)
    double = small_chain().build((2, 6, 7), seed=1, dtype="float64").state_dict()
    net.load_state_dict(double)
    for path, value in net.state_dict().items():
        assert value.dtype == "float32"
        np.testing.assert_array_equal(value, double[path].astype("float32"))


def test_gradients_live_in_the_same_arrays(backend):
    net = small_chain().build((2, 6, 7), device=backend.device, dtype="float64", seed=0)
    dy = backend.array(distinct_batch((3, 5)))
    found = []
    for seed in (1, 2):
        _, cache = net.forward(backend.array(distinct_batch((3, 2, 6, 7), seed)), train=True)
        net.backward(dy, cache)
        grads = net.named_gradients()
        found.append((grads, {path: backend.host(grad) for path, grad in grads.items()}))
    (first, before), (second, after) = found
    assert list(first) == list(net.named_parameters())
    assert all(second[path] is grad for path, grad in first.items())
    # Written, not added up: the second pass alone gives the same.
    again = small_chain().build((2, 6, 7), device=backend.device, dtype="float64", seed=0)
    _, cache = again.forward(backend.array(distinct_batch((3, 2, 6, 7), 2)), train=True)
    again.backward(dy, cache)
    for path, grad in again.named_gradients().items():
        np.testing.assert_allclose(after[path], backend.host(grad), rtol=1e-12, err_msg=path)
    assert not np.allclose(before["fc.weight"], after["fc.weight"])


def test_to_another_backend_and_back(backend):
    net = small_chain().build((2, 6, 7), device="numpy", seed=0)
    before = net.state_dict()
    x, dy = distinct_batch((1, 2, 6, 7)).astype("float32"), distinct_batch((1, 5)).astype("float32")
    _, cache = net.forward(x, train=True)
    net.backward(dy, cache)
    assert net.to(backend.device) is net
    assert net.named_gradients() == {}
    for layer in net.walk():
        assert layer.backend == backend.backend
    y = net(backend.array(distinct_batch((1, 2, 6, 7)), "float32"))
    assert y.device == backend.backend.device
    for path, value in net.to("numpy").state_dict().items():
        assert value.tobytes() == before[path].tobytes()


def test_inference_between_forward_and_backward_disturbs_nothing(backend):
    def gradients(between):
        net = small_chain().build((2, 6, 7), device=backend.device, dtype="float64", seed=0)
        _, cache = net.forward(backend.array(distinct_batch((3, 2, 6, 7))), train=True)
        if between:
            net(backend.array(distinct_batch((5, 2, 6, 7), 1)))
            net(backend.array(distinct_batch((1, 2, 6, 7), 2)), train=True)
        dx = net.backward(backend.array(distinct_batch((3, 5))), cache)
        return [backend.host(grad) for grad in (dx, *net.named_gradients().values())]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        np.testing.assert_array_equal(one, other)


class Spy(Layer):
    """Hands everything on and writes down what its backward was asked, and what was still kept
    then."""

    def __init__(self):
        self.asked, self.kept_by = [], lambda: None

    def infer(self, shape):
        return shape

    def forward(self, x, *, train=False, keep=True):
        return x, x

    def backward(self, dy, cache, *, need_dx=True):
        self.asked.append((need_dx, self.kept_by()))
        return dy


def test_without_need_of_dx_the_pass_ends_at_the_first_parameters(backend, monkeypatch):
    early, late, conv = Spy(), Spy(), Conv2d(2, 3, 3)
    net = Sequential(early, conv, late, Flatten(), Linear(None, 4)).build(
        (2, 5, 5), device=backend.device, seed=0
    )
    found, original = [], Conv2d.backward
    monkeypatch.setattr(
        Conv2d,
        "backward",
        lambda self, dy, cache, *, need_dx=True: found.append(
            (need_dx, original(self, dy, cache, need_dx=need_dx))
        ),
    )
    _, cache = net.forward(backend.array(distinct_batch((2, 2, 5, 5)), "float32"), train=True)
    assert (
        net.backward(backend.array(distinct_batch((2, 4)), "float32"), cache, need_dx=False) is None
    )
    assert found == [(False, None)]  # the first layer's dx was not computed
    assert (early.asked, late.asked) == ([], [(True, None)])
    assert len(net.named_gradients()) == 4


def test_caches_are_let_go_of_on_the_way_back(backend):
    spies = [Spy() for _ in range(3)]
    net = Sequential(Linear(3, 3), *spies).build((3,), device=backend.device, seed=0)
    _, cache = net.forward(backend.array(distinct_batch((2, 3)), "float32"))
    for spy in spies:
        spy.kept_by = lambda: len(cache)
    net.backward(backend.array(distinct_batch((2, 3)), "float32"), cache)
    assert [spy.asked for spy in spies] == [[(True, 1)], [(True, 2)], [(True, 3)]]


def test_need_dx_changes_no_gradient(backend):
    def gradients(need_dx):
        net = small_chain().build((2, 6, 7), device=backend.device, dtype="float64", seed=0)
        _, cache = net.forward(backend.array(distinct_batch((3, 2, 6, 7))), train=True)
        dx = net.backward(backend.array(distinct_batch((3, 5))), cache, need_dx=need_dx)
        assert (dx is not None) == need_dx
        return {path: backend.host(grad) for path, grad in net.named_gradients().items()}

    with_dx, without = gradients(True), gradients(False)
    for path, grad in with_dx.items():
        np.testing.assert_allclose(without[path], grad, rtol=1e-13)


def test_need_dx_in_nested_containers(backend):
    spy = Spy()
    net = Sequential(a=Sequential(spy, Sequential(spare=ReLU())), b=Sequential(fc=Linear(3, 2)))
    net.build((3,), device=backend.device, seed=0)
    _, cache = net.forward(backend.array(distinct_batch((2, 3)), "float32"), train=True)
    net.backward(backend.array(distinct_batch((2, 2)), "float32"), cache, need_dx=False)
    assert spy.asked == []


def test_an_empty_sequential_hands_on(backend):
    net = Sequential().build((3,), device=backend.device)
    x = backend.array([[1.0, 2.0, 3.0]], "float32")
    assert net(x) is x
    assert net.output_shape == (3,)


def test_errors_in_a_forward_name_the_layer_and_its_input(backend):
    net = Sequential(stem=ReLU(), body=Sequential(conv2=Conv2d(16, 4, 3))).build(
        (16, 8, 8), device=backend.device
    )
    x = backend.array(np.zeros((10, 6, 8, 8)), "float32")
    name, place = str(backend.backend).split(" on ")
    with pytest.raises(ShapeError) as caught:
        net(x)
    assert str(caught.value) == (
        f"body.conv2 (Conv2d): expected 16 input channels, got 6 (input 10x6x8x8, {name} float32 "
        f"on {place})"
    )
    net = Sequential(fc=Linear(4, 2)).build((4,), device=backend.device)
    with pytest.raises(
        ShapeError,
        match=r"^fc \(Linear\): expected 4 input features, got 5 "
        rf"\(input 1x5, {name}",
    ):
        net(backend.array(np.zeros((1, 5)), "float32"))
    with pytest.raises(
        ArrayError,
        match=rf"^fc \(Linear\): .*must be of one dtype.*{name} "
        r"float64",
    ):
        net(backend.array(np.zeros((1, 4)), "float64"))
