"""Layers: planning and building, state, modes, and each layer's numbers against PyTorch and finite
differences."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest

from portacnn.errors import (
    ArgumentError,
    ArrayError,
    ModelFormatError,
    PortacnnError,
    ShapeError,
    StateError,
)
from portacnn.layers import (
    AvgPool2d,
    Conv2d,
    Flatten,
    Layer,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
    Sigmoid,
)
from support.matrix import needs

# Every layer in several forms, with the shape of one sample. The name and arguments are PyTorch's
# too, but for None.
CASES = [
    (Conv2d, (2, 4, 3), {}, (2, 5, 5)),
    (Conv2d, (None, 3, (3, 2)), {"stride": (2, 1), "padding": (1, 0)}, (2, 5, 4)),
    (Conv2d, (4, 6, 3), {"groups": 2, "dilation": 2, "bias": False}, (4, 6, 5)),
    (Conv2d, (2, 2, 3), {"padding": "same"}, (2, 4, 5)),
    (MaxPool2d, (2,), {}, (2, 5, 4)),
    (MaxPool2d, (3, 2, 1), {}, (2, 5, 6)),
    (MaxPool2d, ((2, 3), (3, 2)), {"ceil_mode": True}, (2, 6, 6)),
    (MaxPool2d, (2, 1), {"dilation": 2}, (1, 5, 4)),
    (AvgPool2d, (2,), {}, (2, 5, 4)),
    (AvgPool2d, (3, 2, 1), {"count_include_pad": False}, (2, 5, 6)),
    (AvgPool2d, ((2, 3), (3, 2)), {"ceil_mode": True}, (2, 6, 6)),
    (Linear, (5, 3), {}, (5,)),
    (Linear, (None, 3), {"bias": False}, (5,)),
    (Flatten, (), {}, (2, 3, 4)),
    (ReLU, (), {}, (2, 3, 4)),
    (Sigmoid, (), {}, (6,)),
]


def each_of(cases: list[tuple]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("kind", "args", "kwargs", "shape"),
        cases,
        ids=[f"{case[0].__name__}{i}" for i, case in enumerate(cases)],
    )


every_layer = each_of(CASES)
every_layer_that_computes = each_of([case for case in CASES if case[0] is not Flatten])


def batch(shape, seed=0):
    """Distinct values, no two equal: a maximum and a ReLU's bend are then clear of finite
    differences."""
    count = int(np.prod(shape))
    values = np.random.default_rng(seed).permutation(count) - count / 2 + 0.25
    return values.reshape(shape) / max(count, 1)


def small():
    return Sequential(
        conv1=Conv2d(2, 4, 3, padding=1),
        relu1=ReLU(),
        pool1=MaxPool2d(2),
        body=Sequential(Conv2d(None, 3, 1), Sequential(act=Sigmoid())),
        flatten=Flatten(),
        fc=Linear(None, 5),
    )


# --- planning and building ------------------------------------------------------------------------


def test_paths_and_shapes():
    net = small().build((2, 6, 7), seed=0)
    found = {layer.path: (layer.input_shape, layer.output_shape) for layer in net.walk()}
    assert found == {
        "": ((2, 6, 7), (5,)),
        "conv1": ((2, 6, 7), (4, 6, 7)),
        "relu1": ((4, 6, 7), (4, 6, 7)),
        "pool1": ((4, 6, 7), (4, 3, 3)),
        "body": ((4, 3, 3), (3, 3, 3)),
        "body.0": ((4, 3, 3), (3, 3, 3)),
        "body.1": ((3, 3, 3), (3, 3, 3)),
        "body.1.act": ((3, 3, 3), (3, 3, 3)),
        "flatten": ((3, 3, 3), (27,)),
        "fc": ((27,), (5,)),
    }
    assert {path: p.shape for path, p in net.named_parameters().items()} == {
        "conv1.weight": (4, 2, 3, 3),
        "conv1.bias": (4,),
        "body.0.weight": (3, 4, 1, 1),
        "body.0.bias": (3,),
        "fc.weight": (5, 27),
        "fc.bias": (5,),
    }
    assert net.named_gradients() == {}


def test_constructors_allocate_nothing():
    net = small()
    assert net.named_parameters() == {}
    assert net.backend is None
    with pytest.raises(
        StateError,
        match=r"Sequential: not built yet: call build\(input_shape, "
        r"device=...\)",
    ):
        net.state_dict()
    for layer, x in ((Conv2d(1, 1, 1), batch((1, 1, 2, 2))), (Linear(2, 2), batch((1, 2)))):
        with pytest.raises(StateError, match="not built yet"):
            layer(x)
    with pytest.raises(StateError):
        net.to("numpy")


@pytest.mark.parametrize(
    ("net", "shape", "message"),
    [
        (
            lambda: Sequential(conv1=Conv2d(3, 6, 5), conv2=Conv2d(16, 4, 3)),
            (3, 14, 14),
            r"^conv2 \(Conv2d\): expected 16 input channels, got 6 \(samples \(6, 10, 10\)\)$",
        ),
        (
            lambda: Sequential(a=Sequential(Conv2d(1, 1, 9))),
            (1, 5, 5),
            r"^a\.0 \(Conv2d\): kernel 9x9 is larger than the input 5x5",
        ),
        (
            lambda: Sequential(ReLU(), Linear(4, 2)),
            (5,),
            r"^1 \(Linear\): expected 4 input "
            r"features, got 5$",
        ),
        (
            lambda: Sequential(fc=Linear(4, 2)),
            (1, 2, 2),
            r"^fc \(Linear\): expected samples \(F,\), got \(1, 2, 2\); put a Flatten\(\) before "
            r"it",
        ),
        (
            lambda: Sequential(c=Conv2d(1, 1, 1)),
            (4,),
            r"^c \(Conv2d\): expected samples \(C, H, "
            r"W\), got \(4,\)$",
        ),
        (
            lambda: Sequential(p=MaxPool2d(2)),
            (4,),
            r"^p \(MaxPool2d\): expected samples \(C, H, "
            r"W\)",
        ),
        (lambda: Sequential(p=AvgPool2d(7)), (1, 4, 4), r"^p \(AvgPool2d\): kernel 7x7"),
        (
            lambda: Conv2d(None, 4, 1, groups=2),
            (3, 2, 2),
            "^Conv2d: 3 input channels do not split into 2 groups$",
        ),
        (
            lambda: ReLU(),
            (0, 3),
            r"^ReLU: input_shape must be positive numbers without the batch, "
            r"got \(0, 3\)$",
        ),
    ],
)
def test_shapes_are_checked_when_built(net, shape, message):
    with pytest.raises(ShapeError, match=message) as caught:
        net().build(shape, seed=0)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Conv2d(3, 4, 3, groups=2), "Conv2d: 3 channels do not split into 2 groups"),
        (lambda: Conv2d(0, 4, 3), "in_channels must be at least 1, got 0"),
        (lambda: Conv2d(3, 0, 3), "out_channels"),
        (lambda: Conv2d(3, 4, 0), "kernel_size"),
        (lambda: Conv2d(3, 4, 3, stride=0), "stride"),
        (lambda: Conv2d(3, 4, 3, dilation=(1, 2, 3)), "dilation"),
        (lambda: Conv2d(3, 4, 3, padding="valids").build((3, 5, 5)), "padding must be numbers"),
        (lambda: Linear(-1, 4), "in_features"),
        (lambda: Linear(3, 1.5), "out_features"),
        (lambda: MaxPool2d(2, stride=0), "stride"),
        (lambda: MaxPool2d(2, padding=2).build((1, 4, 4)), "at most half of the kernel"),
        (lambda: AvgPool2d(0), "kernel_size"),
        (
            lambda: Linear(3, 4, weight_init="nobody").build((3,)),
            "unknown weight initializer 'nobody'",
        ),
        (
            lambda: Sequential(ReLU()).build((3,), dtype="float16"),
            'dtype must be "float32" or "float64", got \'float1',
        ),
        (
            lambda: Sequential(ReLU()).build((3,), seed=1.5),
            "seed must be a whole number or None, got 1.5",
        ),
        (lambda: Sequential(ReLU(), 3), "Sequential: '1' must be a layer, got 3"),
        (lambda: Sequential(a="x"), "'a' must be a layer, got 'x'"),
        (lambda: Sequential(ReLU), "must be a layer"),
    ],
)
def test_numbers_without_meaning(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


@pytest.mark.parametrize(
    "bad", [{"device": "nowhere"}, {"dtype": "float16"}, {"seed": "x"}, {"input_shape": (3, 6, 7)}]
)
def test_failed_build_changes_nothing(bad):
    net = small().build((2, 6, 7), seed=0)
    before = net.named_parameters()
    copies = {path: value.copy() for path, value in before.items()}
    shapes = [(layer.path, layer.input_shape, layer.output_shape) for layer in net.walk()]
    with pytest.raises(PortacnnError):
        net.build(**{"input_shape": (2, 4, 4), "seed": 1, **bad})
    after = net.named_parameters()
    assert list(after) == list(before)
    assert all(
        after[path] is value and np.array_equal(value, copies[path])
        for path, value in before.items()
    )
    assert [(layer.path, layer.input_shape, layer.output_shape) for layer in net.walk()] == shapes


def test_building_again_starts_afresh():
    net = small().build((2, 6, 7), seed=0)
    _, cache = net.forward(batch((1, 2, 6, 7)).astype("float32"), train=True)
    net.backward(batch((1, 5)).astype("float32"), cache)
    net.build((2, 8, 8), seed=1)
    assert net.named_gradients() == {}
    again = small().build((2, 8, 8), seed=1).state_dict()
    assert all(np.array_equal(value, again[path]) for path, value in net.state_dict().items())


def test_build_that_fails_late_changes_nothing():
    net = Sequential(conv1=Conv2d(None, 4, 3), flatten=Flatten(), fc=Linear(16, 2)).build(
        (1, 4, 4), seed=0
    )
    with pytest.raises(ShapeError, match=r"^fc \(Linear\): expected 16 input features, got 36"):
        net.build((2, 5, 5), seed=1)
    assert net.children["conv1"].input_shape == (1, 4, 4)


@pytest.mark.parametrize("shape", [5, ("a",), (2.5,)])
def test_input_shape_of_other_things(shape):
    with pytest.raises(PortacnnError):
        Sequential(ReLU()).build(shape)


# --- one seed, the same bits ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_parameters_are_the_same_bits_on_every_backend(backend, dtype):
    here = small().build((2, 6, 7), device=backend.device, dtype=dtype, seed=7)
    numpy = small().build((2, 6, 7), device="numpy", dtype=dtype, seed=7)
    for path, value in numpy.state_dict().items():
        found = here.state_dict()[path]
        assert found.dtype == value.dtype == dtype
        assert found.tobytes() == value.tobytes(), path
    for value in here.named_parameters().values():
        assert value.device == backend.backend.device


def test_parameters_do_not_depend_on_other_layers():
    """A parameter's bits hang on the seed, its path and its shape, and on nothing else."""
    plain = Sequential(fc1=Linear(6, 6), fc2=Linear(6, 6)).build((6,), seed=3).state_dict()
    longer = Sequential(fc0=Linear(6, 6), fc1=Linear(6, 6), relu=ReLU(), fc2=Linear(6, 6)).build(
        (6,), seed=3
    )
    for path, value in plain.items():
        assert np.array_equal(longer.state_dict()[path], value)
    assert not np.array_equal(plain["fc1.weight"], plain["fc2.weight"])
    other = Sequential(fc1=Linear(6, 6), fc2=Linear(6, 6)).build((6,), seed=4).state_dict()
    assert not np.array_equal(plain["fc1.weight"], other["fc1.weight"])
    double = (
        Sequential(fc1=Linear(6, 6), fc2=Linear(6, 6))
        .build((6,), seed=3, dtype="float64")
        .state_dict()
    )
    assert np.array_equal(double["fc1.weight"].astype("float32"), plain["fc1.weight"])
    fresh = [Sequential(fc1=Linear(6, 6)).build((6,)).state_dict()["fc1.weight"] for _ in range(2)]
    assert not np.array_equal(*fresh)


def test_parameters_for_a_seed_stay_what_they_were():
    """These numbers are part of the contract: a seed in a note must still give the same network
    after an upgrade."""
    fc = Sequential(fc=Linear(2, 2)).build((2,), seed=0, dtype="float64").state_dict()["fc.weight"]
    golden = [
        [-0.0010710972889361736, -0.6821165360667084],
        [0.4109048486164908, -0.3535984794856247],
    ]
    np.testing.assert_allclose(fc, golden, rtol=1e-14)


# --- state ----------------------------------------------------------------------------------------


def test_parameters_keep_their_identity(backend):
    net = small().build((2, 6, 7), device=backend.device, seed=0)
    before = net.named_parameters()
    other = small().build((2, 6, 7), seed=1).state_dict()
    net.load_state_dict(other)
    _, cache = net.forward(backend.array(batch((2, 2, 6, 7)), "float32"), train=True)
    net.backward(backend.array(batch((2, 5)), "float32"), cache)
    assert all(net.named_parameters()[path] is value for path, value in before.items())
    for path, value in before.items():
        np.testing.assert_array_equal(backend.host(value), other[path])


def test_state_dict_gives_copies(backend):
    net = small().build((2, 6, 7), device=backend.device, seed=0)
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
    net = small().build((2, 6, 7), device=backend.device, seed=0)
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
    net = small().build((2, 6, 7), device=backend.device, seed=0)
    double = small().build((2, 6, 7), seed=1, dtype="float64").state_dict()
    net.load_state_dict(double)
    for path, value in net.state_dict().items():
        assert value.dtype == "float32"
        np.testing.assert_array_equal(value, double[path].astype("float32"))


def test_gradients_live_in_the_same_arrays(backend):
    net = small().build((2, 6, 7), device=backend.device, dtype="float64", seed=0)
    dy = backend.array(batch((3, 5)))
    found = []
    for seed in (1, 2):
        _, cache = net.forward(backend.array(batch((3, 2, 6, 7), seed)), train=True)
        net.backward(dy, cache)
        grads = net.named_gradients()
        found.append((grads, {path: backend.host(grad) for path, grad in grads.items()}))
    (first, before), (second, after) = found
    assert list(first) == list(net.named_parameters())
    assert all(second[path] is grad for path, grad in first.items())
    # Written, not added up: the second pass alone gives the same.
    again = small().build((2, 6, 7), device=backend.device, dtype="float64", seed=0)
    _, cache = again.forward(backend.array(batch((3, 2, 6, 7), 2)), train=True)
    again.backward(dy, cache)
    for path, grad in again.named_gradients().items():
        np.testing.assert_allclose(after[path], backend.host(grad), rtol=1e-12, err_msg=path)
    assert not np.allclose(before["fc.weight"], after["fc.weight"])


def test_to_another_backend_and_back(backend):
    net = small().build((2, 6, 7), device="numpy", seed=0)
    before = net.state_dict()
    x, dy = batch((1, 2, 6, 7)).astype("float32"), batch((1, 5)).astype("float32")
    _, cache = net.forward(x, train=True)
    net.backward(dy, cache)
    assert net.to(backend.device) is net
    assert net.named_gradients() == {}
    for layer in net.walk():
        assert layer.backend == backend.backend
    y = net(backend.array(batch((1, 2, 6, 7)), "float32"))
    assert y.device == backend.backend.device
    for path, value in net.to("numpy").state_dict().items():
        assert value.tobytes() == before[path].tobytes()


# --- modes and caches -----------------------------------------------------------------------------


@every_layer
def test_backward_needs_a_cache(backend, kind, args, kwargs, shape):
    net = Sequential(mine=kind(*args, **kwargs)).build(shape, device=backend.device, seed=0)
    x = backend.array(batch((2, *shape)), "float32")
    dy = backend.array(batch((2, *net.output_shape)), "float32")
    _, nothing = net.children["mine"].forward(x, train=True, keep=False)
    assert nothing is None
    with pytest.raises(StateError, match="expected a cache, got None"):
        net.children["mine"].backward(dy, nothing)
    with pytest.raises(
        StateError,
        match=r"^Sequential: expected a cache of forward\(x, keep=True\), "
        r"got NoneT",
    ):
        net.backward(dy, net.forward(x, keep=False)[1])
    for train in (False, True):
        _, cache = net.forward(x, train=train)
        net.backward(dy, cache)
        with pytest.raises(StateError, match="this cache has been used"):
            net.backward(dy, cache)


@every_layer
def test_a_forward_pass_leaves_nothing_on_the_layer(backend, kind, args, kwargs, shape):
    layer = kind(*args, **kwargs).build(shape, device=backend.device, seed=0)
    before = {name: (value, copy.copy(value)) for name, value in vars(layer).items()}
    layer.forward(backend.array(batch((2, *shape)), "float32"), train=True)
    assert vars(layer).keys() == before.keys()
    for name, (value, content) in before.items():
        assert vars(layer)[name] is value
        if isinstance(value, dict):
            assert all(value[key] is array for key, array in content.items()), name


def test_inference_between_forward_and_backward_disturbs_nothing(backend):
    def gradients(between):
        net = small().build((2, 6, 7), device=backend.device, dtype="float64", seed=0)
        _, cache = net.forward(backend.array(batch((3, 2, 6, 7))), train=True)
        if between:
            net(backend.array(batch((5, 2, 6, 7), 1)))
            net(backend.array(batch((1, 2, 6, 7), 2)), train=True)
        dx = net.backward(backend.array(batch((3, 5))), cache)
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
    _, cache = net.forward(backend.array(batch((2, 2, 5, 5)), "float32"), train=True)
    assert net.backward(backend.array(batch((2, 4)), "float32"), cache, need_dx=False) is None
    assert found == [(False, None)]  # the first layer's dx was not computed
    assert (early.asked, late.asked) == ([], [(True, None)])
    assert len(net.named_gradients()) == 4


def test_caches_are_let_go_of_on_the_way_back(backend):
    spies = [Spy() for _ in range(3)]
    net = Sequential(Linear(3, 3), *spies).build((3,), device=backend.device, seed=0)
    _, cache = net.forward(backend.array(batch((2, 3)), "float32"))
    for spy in spies:
        spy.kept_by = lambda: len(cache)
    net.backward(backend.array(batch((2, 3)), "float32"), cache)
    assert [spy.asked for spy in spies] == [[(True, 1)], [(True, 2)], [(True, 3)]]


def test_need_dx_changes_no_gradient(backend):
    def gradients(need_dx):
        net = small().build((2, 6, 7), device=backend.device, dtype="float64", seed=0)
        _, cache = net.forward(backend.array(batch((3, 2, 6, 7))), train=True)
        dx = net.backward(backend.array(batch((3, 5))), cache, need_dx=need_dx)
        assert (dx is not None) == need_dx
        return {path: backend.host(grad) for path, grad in net.named_gradients().items()}

    with_dx, without = gradients(True), gradients(False)
    for path, grad in with_dx.items():
        np.testing.assert_allclose(without[path], grad, rtol=1e-13)


def test_need_dx_in_nested_containers(backend):
    spy = Spy()
    net = Sequential(a=Sequential(spy, Sequential(spare=ReLU())), b=Sequential(fc=Linear(3, 2)))
    net.build((3,), device=backend.device, seed=0)
    _, cache = net.forward(backend.array(batch((2, 3)), "float32"), train=True)
    net.backward(backend.array(batch((2, 2)), "float32"), cache, need_dx=False)
    assert spy.asked == []


# --- containers -----------------------------------------------------------------------------------


def test_children_are_named_by_number_or_name():
    net = Sequential(ReLU(), Flatten(), last=ReLU())
    assert list(net.children) == ["0", "1", "last"]
    assert repr(net) == "Sequential(ReLU(), Flatten(), last=ReLU())"
    assert repr(Conv2d(1, 2, kernel_size=3, bias=False)) == (
        "Conv2d(in_channels=1, out_channels=2, kernel_size=3, bias=False)"
    )


def test_an_empty_sequential_hands_on(backend):
    net = Sequential().build((3,), device=backend.device)
    x = backend.array([[1.0, 2.0, 3.0]], "float32")
    assert net(x) is x
    assert net.output_shape == (3,)


def test_a_name_has_one_layer():
    with pytest.raises(ArgumentError):
        Sequential(ReLU(), **{"0": Sigmoid()})


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


@pytest.mark.parametrize("dtype", ["uint8", "int64"])
@every_layer_that_computes
def test_layers_refuse_integers(backend, kind, args, kwargs, shape, dtype):
    net = Sequential(mine=kind(*args, **kwargs)).build(shape, device=backend.device, seed=0)
    with pytest.raises(
        ArrayError,
        match=rf"^mine \({kind.__name__}\): x must be floating point, "
        rf"got .*{dtype}",
    ):
        net(backend.array(np.zeros((2, *shape)), dtype))


def test_layers_refuse_another_librarys_arrays():
    pytest.importorskip("array_api_strict")
    net = Sequential(fc=Linear(3, 2)).build((3,), device="array_api_strict:device1", seed=0)
    with pytest.raises(
        ArrayError,
        match=r"^fc \(Linear\): arrays must be of one library; x is "
        r"1x3, numpy.*strict",
    ):
        net(np.zeros((1, 3), "float32"))
    other = Sequential(fc=Linear(3, 2)).build((3,), device="array_api_strict").backend
    with pytest.raises(ArrayError, match="arrays must be on one device"):
        net(other.asarray(np.zeros((1, 3)), "float32"))


# --- numbers --------------------------------------------------------------------------------------


@needs("torch")
@pytest.mark.parametrize("n", [1, 3])
@every_layer
def test_against_pytorch(backend, kind, args, kwargs, shape, n):
    import torch

    layer = kind(*args, **kwargs).build(shape, device=backend.device, dtype="float64", seed=5)
    twin = getattr(torch.nn, kind.__name__)(
        *(shape[0] if arg is None else arg for arg in args), **kwargs
    ).double()
    twin.load_state_dict(
        {path: torch.tensor(value) for path, value in layer.state_dict().items()}, strict=True
    )
    x = batch((n, *shape), 1)
    xt = torch.tensor(x, requires_grad=True)
    yt = twin(xt)
    dy = batch(tuple(yt.shape), 2)
    yt.backward(torch.tensor(dy))

    x_here, dy_here = backend.array(x), backend.array(dy)
    y, cache = layer.forward(x_here, train=True)
    dx = layer.backward(dy_here, cache)
    assert tuple(y.shape) == (n, *layer.output_shape)
    for array in (y, dx):
        assert array.dtype == backend.backend.dtype("float64")
        assert array.device == backend.backend.device
    np.testing.assert_allclose(backend.host(y), yt.detach().numpy(), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(backend.host(layer(x_here)), backend.host(y), rtol=1e-14)
    np.testing.assert_allclose(backend.host(dx), xt.grad.numpy(), rtol=1e-12, atol=1e-14)
    for name, p in twin.named_parameters():
        np.testing.assert_allclose(
            backend.host(layer.grads[name]), p.grad.numpy(), rtol=1e-12, atol=1e-14
        )
    np.testing.assert_array_equal(backend.host(x_here), x)  # neither input nor gradient was changed
    np.testing.assert_array_equal(backend.host(dy_here), dy)


@every_layer
def test_against_finite_differences(backend, kind, args, kwargs, shape):
    """Along random directions: (f(a + hv) - f(a - hv)) / 2h = <gradient, v>, for the input and
    every parameter."""
    layer = kind(*args, **kwargs).build(shape, device=backend.device, dtype="float64", seed=5)
    x, rng, h = batch((2, *shape), 1), np.random.default_rng(0), 1e-6
    dy = batch((2, *layer.output_shape), 2)
    state = layer.state_dict()

    def f():
        return float(np.sum(backend.host(layer(backend.array(x))) * dy))

    x_here, dy_here = backend.array(x), backend.array(dy)
    _, cache = layer.forward(x_here, train=True)
    gradients = {"x": layer.backward(dy_here, cache), **layer.grads}
    np.testing.assert_array_equal(backend.host(x_here), x)  # neither input nor gradient was changed
    np.testing.assert_array_equal(backend.host(dy_here), dy)
    assert set(gradients) == {"x", *state}
    for name, gradient in gradients.items():
        target = x if name == "x" else state[name]
        v = rng.standard_normal(target.shape)
        values = []
        for step in (h, -h):
            target += step * v
            layer.load_state_dict(state)
            values.append(f())
            target -= step * v
        layer.load_state_dict(state)
        expected = (values[0] - values[1]) / (2 * h)
        assert expected == pytest.approx(
            float(np.sum(backend.host(gradient) * v)), rel=1e-6, abs=1e-8
        ), name


@every_layer
def test_empty_batch(backend, kind, args, kwargs, shape):
    layer = kind(*args, **kwargs).build(shape, device=backend.device, seed=5)
    y, cache = layer.forward(backend.array(np.zeros((0, *shape)), "float32"), train=True)
    assert tuple(y.shape) == (0, *layer.output_shape)
    assert y.dtype == backend.backend.dtype("float32")
    dx = layer.backward(backend.array(np.zeros((0, *layer.output_shape)), "float32"), cache)
    assert tuple(dx.shape) == (0, *shape)
    for name, p in layer.params.items():
        assert tuple(layer.grads[name].shape) == tuple(p.shape)
        assert not backend.host(layer.grads[name]).any()


def test_readers_may_write_layers_of_their_own(backend):
    """The worked example of docs/layers.md: a layer with a parameter, in 20 lines; the page's other
    code runs as well."""
    page = (Path(__file__).parents[2] / "docs" / "layers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    example = next(block for block in blocks if "class Scale" in block)
    assert len(example.strip().splitlines()) <= 20
    names: dict = {
        "x": np.ones((2, 3)),
        "dy": np.ones((2, 3)),
        "layer": ReLU(),
        "__name__": "readers",
    }
    for block in blocks:
        exec(block, names)
    assert names["model"].classes == 3
    net = Sequential(Conv2d(1, 2, 1), mine=names["Scale"]()).build(
        (1, 3, 3), device=backend.device, dtype="float64", seed=0
    )
    net.load_state_dict({**net.state_dict(), "mine.factor": np.full((2, 1, 1), 3.0)})
    y, cache = net.forward(backend.array(batch((4, 1, 3, 3))), train=True)
    net.backward(backend.array(np.ones((4, 2, 3, 3))), cache)
    expected = backend.host(y).sum((0, 2, 3))[:, None, None] / 3.0
    np.testing.assert_allclose(
        backend.host(net.named_gradients()["mine.factor"]), expected, rtol=1e-12
    )
    assert Layer.known.pop("readers.Scale") is names["Scale"]


def test_an_initializer_of_another_shape_is_refused():
    with pytest.raises(
        ArgumentError,
        match=r"fc \(Linear\): the initializer of weight must return "
        r"\(2, 3\), got \(5,\)",
    ):
        Sequential(fc=Linear(3, 2, weight_init=lambda *_: np.zeros(5))).build((3,))


@pytest.mark.parametrize("channels", ["3", 1.5, 0, -1])
def test_channels_that_are_no_count_are_refused(channels):
    with pytest.raises(ArgumentError, match="in_channels"):
        Conv2d(channels, 4, 3)


def test_a_network_can_be_copied(backend):
    net = Sequential(fc=Linear(3, 2)).build((3,), device=backend.device, seed=0)
    twin = copy.deepcopy(net)
    before = net.state_dict()
    twin.load_state_dict({path: 0 * value for path, value in twin.state_dict().items()})
    for path, array in net.named_parameters().items():
        np.testing.assert_array_equal(backend.host(array), before[path])
        assert backend.host(twin.named_parameters()[path]).sum() == 0


@pytest.mark.parametrize("name", ["", "a.b"])
def test_names_that_would_make_paths_collide(name):
    with pytest.raises(ArgumentError, match="must not be empty or contain dots"):
        Sequential(**{name: ReLU()})


def test_a_layer_belongs_to_one_network():
    shared = Linear(2, 2)
    first = Sequential(a=shared).build((2,), seed=0)
    with pytest.raises(
        StateError,
        match=r"[ab] \(Linear\): is part of another network",
    ):
        Sequential(b=shared).build((2,), seed=1)
    assert list(first.state_dict()) == ["a.weight", "a.bias"]


@pytest.mark.parametrize("init", ["hee", -1.0, float("nan")])
def test_initializers_are_checked_by_the_constructor(init):
    for make in (lambda: Linear(2, 3, weight_init=init), lambda: Conv2d(1, 2, 3, bias_init=init)):
        with pytest.raises(ArgumentError, match="initializer"):
            make()
