"""Planning and building a network: paths, shapes, first weights from one seed."""

import copy

import numpy as np
import pytest

from portacnn.errors import (
    ArgumentError,
    PortacnnError,
    ShapeError,
    StateError,
)
from portacnn.layers import (
    AvgPool2d,
    Conv2d,
    Dropout,
    Flatten,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
    Sigmoid,
)
from support.nets import distinct_batch, small_chain


def test_paths_and_shapes():
    net = small_chain().build((2, 6, 7), seed=0)
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
    net = small_chain()
    assert net.named_parameters() == {}
    assert net.backend is None
    with pytest.raises(
        StateError,
        match=r"Sequential: not built yet: call build\(input_shape, "
        r"device=...\)",
    ):
        net.state_dict()
    for layer, x in (
        (Conv2d(1, 1, 1), distinct_batch((1, 1, 2, 2))),
        (Linear(2, 2), distinct_batch((1, 2))),
    ):
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
    net = small_chain().build((2, 6, 7), seed=0)
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
    net = small_chain().build((2, 6, 7), seed=0)
    _, cache = net.forward(distinct_batch((1, 2, 6, 7)).astype("float32"), train=True)
    net.backward(distinct_batch((1, 5)).astype("float32"), cache)
    net.build((2, 8, 8), seed=1)
    assert net.named_gradients() == {}
    again = small_chain().build((2, 8, 8), seed=1).state_dict()
    assert all(np.array_equal(value, again[path]) for path, value in net.state_dict().items())
    drop, ones = Dropout(0.5).build((40,), seed=0), np.ones((1, 40), "float32")
    first, second = (drop(ones, train=True) for _ in range(2))
    assert not np.array_equal(first, second)
    drop.build((40,), seed=0)
    assert np.array_equal(drop(ones, train=True), first)


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
    here = small_chain().build((2, 6, 7), device=backend.device, dtype=dtype, seed=7)
    numpy = small_chain().build((2, 6, 7), device="numpy", dtype=dtype, seed=7)
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


# --- containers -----------------------------------------------------------------------------------


def test_children_are_named_by_number_or_name():
    net = Sequential(ReLU(), Flatten(), last=ReLU())
    assert list(net.children) == ["0", "1", "last"]
    assert repr(net) == "Sequential(ReLU(), Flatten(), last=ReLU())"
    assert repr(Conv2d(1, 2, kernel_size=3, bias=False)) == (
        "Conv2d(in_channels=1, out_channels=2, kernel_size=3, bias=False)"
    )


def test_a_name_has_one_layer():
    with pytest.raises(ArgumentError):
        Sequential(ReLU(), **{"0": Sigmoid()})


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
