"""Networks that files describe: small files stay small and quick. And the children of a network,
which stay what runs."""

import json
import struct
import time
import tracemalloc
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import portacnn
from portacnn.errors import ArgumentError, ModelFormatError, PortacnnError, StateError
from portacnn.layers import (
    AvgPool2d,
    Branches,
    Conv2d,
    Flatten,
    Graph,
    Linear,
    MaxPool1d,
    ReLU,
    Residual,
    Sequential,
)
from portacnn.models import Model
from portacnn.ops.windows import Windows
from support.nets import bits, patches
from tools import fuzz


def described(input_shape, *layers_, model="Model", **arguments):
    """A file that holds nothing but this description."""
    model = {
        "class": model,
        "arguments": arguments,
        **({"layers": list(layers_)} if layers_ else {}),
    }
    header = {"format": 1, "dtype": "float32", "input_shape": input_shape, "model": model}
    text = json.dumps({"__metadata__": {"portacnn": json.dumps(header)}}).encode()
    return struct.pack("<Q", len(text)) + text


def layer(kind, **arguments):
    return {"class": kind, "arguments": arguments}


class Tower(Model):
    """A class of networks that makes its layers out of a number."""

    def __init__(self, layers):
        super().__init__(*(ReLU() for _ in range(layers)))


HUGE = 1 << 29
SMALL_FILES = {
    "pooling": described([1, 2000, 2000], layer("MaxPool2d", kernel_size=2000)),
    "convolution": described(
        [1, 3000, 3000], layer("Conv2d", in_channels=1, out_channels=1, kernel_size=3000)
    ),
    "transposed": described(
        [1, 9, 9], layer("ConvTranspose2d", in_channels=1, out_channels=1, kernel_size=3000)
    ),
    "three axes": described([1, 90, 90, 90], layer("AvgPool3d", kernel_size=90)),
    "together": described(
        [1, 300, 300], *[layer("MaxPool2d", kernel_size=256, stride=1, padding=127)] * 3
    ),
    "absurd": described([1, HUGE], layer("MaxPool1d", kernel_size=HUGE)),
    "padding": described(
        [1, 3, 3], layer("Conv2d", in_channels=1, out_channels=1, kernel_size=1, padding=1 << 30)
    ),
    "pad": described([1, 3, 3], layer("Pad", pads=[[0, 0], [0, 1 << 30], [0, 1 << 30]])),
    "input": described([1 << 20, 1 << 20]),
    "outputs on one axis": described([1, 2], layer("AdaptiveAvgPool1d", output_size=1 << 18)),
    "outputs": described([1, 2, 2], layer("AdaptiveAvgPool2d", output_size=1 << 20)),
    "many layers": described([2], model="test_limits.Tower", layers=1 << 20),
    "table": described([1, 3000, 3000], layer("TableConv2d", table=[[0]], kernel_size=3000)),
}


@pytest.mark.parametrize("content", SMALL_FILES.values(), ids=SMALL_FILES)
def test_small_files_cost_little(tmp_path, content):
    assert len(content) < 1000
    (tmp_path / "net").write_bytes(content)
    started = time.process_time()
    with pytest.raises(ModelFormatError) as caught:
        portacnn.load(tmp_path / "net")
    assert time.process_time() - started < 1
    assert str(tmp_path / "net") in str(caught.value)
    tracemalloc.start()
    try:
        with pytest.raises(ModelFormatError):
            portacnn.load(tmp_path / "net")
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_a_limit_says_what_is_too_large_and_where(tmp_path):
    (tmp_path / "net").write_bytes(SMALL_FILES["pooling"])
    with pytest.raises(
        ModelFormatError,
        match=r"0 \(MaxPool2d\): .*131072 elements.*2000x2000\); build the network in Python",
    ):
        portacnn.load(tmp_path / "net")


def test_classes_that_others_derive_from_are_no_layers(tmp_path):
    """They have no op, or nothing to run: found by spoiling files at random."""
    for kind, more in (
        ("Activation", {}),
        ("_ScaledELU", {}),
        ("Join", {}),
        ("Layer", {}),
        ("Conv", {"in_channels": 1}),
    ):
        (tmp_path / "net").write_bytes(described([1, 3], layer(kind, **more)))
        with pytest.raises(ModelFormatError, match=f"unknown class '{kind}'"):
            portacnn.load(tmp_path / "net")
    abstract = {
        "Activation",
        "AvgPool",
        "Conv",
        "ConvTranspose",
        "Join",
        "Layer",
        "MaxPool",
    }
    assert abstract.isdisjoint(portacnn.layers.Layer.known)
    public = {name: getattr(portacnn.layers, name) for name in portacnn.layers.__all__}
    classes = {
        name
        for name, value in public.items()
        if isinstance(value, type) and issubclass(value, portacnn.layers.Layer)
    }
    assert classes - abstract <= set(portacnn.layers.Layer.known)


def test_many_layers_take_a_time_that_grows_with_their_number(tmp_path):
    def seconds(count):
        net = Model(*(ReLU() for _ in range(count))).build((2,), seed=0)
        net.save(tmp_path / "net")
        best = []
        for _ in range(3):
            started = time.process_time()
            loaded = portacnn.load(tmp_path / "net")
            best.append(time.process_time() - started)
        assert len(loaded.children) == count
        return min(best)

    assert seconds(2000) < 8 * seconds(500)  # twice what is due: it was 16 times


def test_programs_have_no_limits():
    """What a program builds by itself is its own affair: planning a large kernel costs nothing."""
    started = time.process_time()
    assert Sequential(MaxPool1d(1 << 20)).build((1, 1 << 21)).output_shape == (1, 2)
    assert AvgPool2d(3000, 1).build((1, 3001, 3002)).output_shape == (1, 2, 3)
    assert time.process_time() - started < 1


axis = st.tuples(
    *(st.integers(*span) for span in ((1, 9), (1, 5), (1, 5), (0, 7), (0, 7), (1, 12)))
)


@settings(max_examples=150)
@given(axes=st.lists(axis, min_size=1, max_size=2), ceil_mode=st.booleans(), data=st.data())
def test_windows_against_every_cell_one_by_one(axes, ceil_mode, data):
    size, kernel, stride, before, after, dilation = map(list, zip(*axes, strict=True))
    try:
        whole = Windows.of(
            size, kernel, stride, list(zip(before, after, strict=True)), dilation, ceil_mode
        )
    except PortacnnError:
        return
    first = data.draw(st.integers(0, whole.out[0] - 1))
    last = data.draw(st.integers(first + 1, whole.out[0]))
    for windows, begin in ((whole, 0), (whole.part(first, last), first)):
        seen, found = {}, {}
        for o in product(*map(range, windows.out)):
            for number, k in enumerate(product(*map(range, kernel))):
                at = [
                    (o[a] + (begin if a == 0 else 0)) * stride[a] + k[a] * dilation[a] - before[a]
                    for a in range(len(size))
                ]
                if all(0 <= i < n for i, n in zip(at, size, strict=True)):
                    seen[o, number] = tuple(at)
        for tap in windows.taps:
            outputs = product(
                *(range(windows.out[a])[tap.reaches[a + 1]] for a in range(len(size)))
            )
            inputs = product(*(range(size[a])[tap.reads[a + 1]] for a in range(len(size))))
            found.update({(o, tap.index): i for o, i in zip(outputs, inputs, strict=True)})
        outputs = list(product(*map(range, windows.out)))
        assert found == seen
        assert windows.covers == (len(seen) == len(outputs) * np.prod(kernel))
        assert windows.blind == (len({o for o, _ in seen}) < len(outputs))


@pytest.mark.slow
def test_files_spoilt_at_random(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fuzz.main("safetensors", "60", "0") == 0


# --- children -------------------------------------------------------------------------------------


def unbuilt():
    return Model(conv=Conv2d(None, 2, 3), relu=ReLU(), flat=Flatten(), fc=Linear(None, 4))


CHANGES = {
    "set": lambda net: net.children.__setitem__("fc", Linear(None, 3)),
    "new": lambda net: net.children.__setitem__("more", Linear(None, 3)),
    "delete": lambda net: net.children.__delitem__("fc"),
    "pop": lambda net: net.children.pop("fc"),
    "popitem": lambda net: net.children.popitem(),
    "update": lambda net: net.children.update(fc=Linear(None, 3)),
    "clear": lambda net: net.children.clear(),
    "setdefault": lambda net: net.children.setdefault("more", ReLU()),
    "or": lambda net: net.children.__ior__({"fc": Linear(None, 3)}),
    "all": lambda net: setattr(net, "children", {"fc": Linear(None, 3)}),
    "attribute": lambda net: setattr(net, "fc", Linear(None, 3)),
    "new attribute": lambda net: setattr(net, "head", Linear(None, 3)),
}


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_network_keeps_its_layers(change, built):
    """What runs, what learns, what is saved and what is printed would no longer be the same
    layers."""
    net, x = unbuilt(), patches(3)[0]
    if built:
        net.build((1, 8, 8), seed=0)
    with pytest.raises(StateError, match=r"network\.replace\(path, layer\)"):
        change(net)
    if not built:
        net.build((1, 8, 8), seed=0)
    assert bits(net) == bits(unbuilt().build((1, 8, 8), seed=0))
    assert net.predict(x).shape == (3, 4)
    assert "head" not in vars(net)


def test_so_do_blocks_and_graphs():
    block = Residual(Conv2d(2, 2, 1), activation=ReLU())
    with pytest.raises(StateError, match="'body' cannot be set"):
        block.body = Conv2d(2, 2, 3, padding=1)
    with pytest.raises(StateError, match="'activation' cannot be set"):
        block.activation = None
    with pytest.raises(StateError, match="'activation' cannot be removed"):
        del block.activation
    block.body = block.body
    for holder in (
        block,
        Branches(Conv2d(2, 2, 1)),
        Graph(("0", ReLU(), ["input"])),
        Sequential(ReLU()),
    ):
        with pytest.raises(StateError):
            holder.children["0"] = ReLU()


class Net(Model):
    def __init__(self):
        super().__init__(flat=Flatten(), fc=Linear(None, 3))
        self.head = self.children["fc"]  # another name for what is there
        self.note = "anything"


class Own(portacnn.layers.Layer):
    """As layer authors write them: children put in by hand."""

    def __init__(self):
        self.children["a"] = ReLU()
        self.children.update(b=ReLU())

    def infer(self, shape):
        for name, child in self.children.items():
            shape = child.plan(shape, self.child_path(name))
        return shape


def test_what_stays_allowed():
    net = Net().build((2, 2), seed=0)
    assert net.head is net.children["fc"]
    with pytest.raises(StateError):
        net.head = Linear(4, 3)
    own = Own()
    own.children["c"] = ReLU()
    own.build((3,))
    assert list(own.children) == ["a", "b", "c"]
    other = Own()
    other.children = {"only": ReLU()}
    assert list(other.build((3,)).children) == ["only"]
    with pytest.raises(StateError):
        other.children = {}
    with pytest.raises(StateError):
        own.children["d"] = ReLU()
    with pytest.raises(ArgumentError, match="two layers"):
        Sequential(ReLU(), **{"0": ReLU()})
