"""Export of layers of one's own: emitters."""

import sys

import pytest

import portacnn.onnx
from portacnn import layers as L
from portacnn import models as M
from portacnn.errors import ArgumentError, ModelFormatError
from portacnn.layers import Conv2d, Layer, Linear, ReLU, Sequential
from portacnn.onnx import export as public_export
from portacnn.runtime import backend_of
from support.checks import refuses
from support.onnx_export import agrees, export, filled, nodes

exporting, building = sys.modules["portacnn.onnx.export"], sys.modules["portacnn.onnx.builder"]


@pytest.fixture
def known(monkeypatch):
    """Layers and emitters that a test makes are forgotten after it."""
    monkeypatch.setattr(Layer, "known", dict(Layer.known))
    monkeypatch.setattr(building, "_emitters", dict(building._emitters))


def square_layer():
    class Square(Layer):
        def infer(self, shape):
            self.declare("factor", (shape[0],), "ones")
            return shape

        def forward(self, x, *, train=False, keep=True):
            shape = (-1, *(1 for _ in x.shape[2:]))
            return x * x * backend_of(x).xp.reshape(self.params["factor"], shape), None

    return Square


def test_a_layer_without_an_emitter_is_refused_by_its_path(known, tmp_path):
    kind = square_layer()
    network = Sequential(Linear(3, 2), inner=Sequential(odd=kind())).build((3,), device="numpy")
    words = ("inner.odd (Square)", "no ONNX emitter", "@portacnn.onnx.emitter(Square)")
    refuses(ArgumentError, *words, call=lambda: public_export(network, tmp_path / "m.onnx"))
    assert not list(tmp_path.iterdir())


def test_a_registered_emitter_writes_the_layer(known, tmp_path):
    kind = square_layer()

    @portacnn.onnx.emitter(kind)
    def square(graph, layer, x):
        factor = graph.reshape(graph.weight(layer, "factor"), (*layer.input_shape[:1], 1, 1))
        assert graph.weight(layer, "factor") == graph.weight(layer, "factor")
        return graph.add("Mul", [graph.add("Mul", [x, x]), factor])

    network = Sequential(conv=Conv2d(1, 2, 3), odd=kind(), act=ReLU()).build(
        (1, 5, 5), device="numpy", seed=0
    )
    agrees(filled(network), tmp_path)
    names = [node.name for node in nodes(tmp_path / "model.onnx")]
    assert names == ["conv/Conv", "odd/Constant", "odd/Reshape", "odd/Mul", "odd/Mul_1", "act/Relu"]


@pytest.mark.parametrize("name", ["Mul", "input", "output"])
def test_parameters_called_as_something_else_is(name, known, tmp_path):
    """A node makes way for them. The file's input and output do not."""

    class Scaled(Layer):
        def infer(self, shape):
            self.declare(name, (1,), "ones")
            return shape

        def forward(self, x, *, train=False, keep=True):
            return x * self.params[name], None

    @portacnn.onnx.emitter(Scaled)
    def scaled(graph, layer, x):
        return graph.add("Sigmoid", [graph.add("Mul", [x, graph.weight(layer, name)])])

    layer = Scaled().build((3,), device="numpy")
    if name == "Mul":
        assert [node.name for node in nodes(export(layer, tmp_path))] == ["Mul_1", "Sigmoid"]
    else:
        refuses(
            ArgumentError,
            "Scaled",
            f"got '{name}' twice",
            call=lambda: export(layer, tmp_path),
        )


def test_an_output_that_is_not_the_last_value(known, tmp_path):
    class Doubled(Layer):
        def infer(self, shape):
            return shape

        def forward(self, x, *, train=False, keep=True):
            return x + x, None

    @portacnn.onnx.emitter(Doubled)
    def doubled(graph, layer, x):
        y = graph.add("Add", [x, x])
        graph.add("Neg", [y])
        return y

    agrees(Doubled().build((3,), device="numpy"), tmp_path)


def test_emitters_that_make_no_sense(known, tmp_path):
    network = Sequential(odd=square_layer()()).build((2, 3), device="numpy")
    call = lambda: public_export(network, tmp_path / "m.onnx")  # noqa: E731
    portacnn.onnx.emitter(type(network.children["odd"]))(lambda graph, layer, x: None)
    refuses(ArgumentError, "odd (Square)", "None", "name of a value", call=call)
    portacnn.onnx.emitter(type(network.children["odd"]))(
        lambda graph, layer, x: graph.add("Sqare", [x])
    )
    refuses(ModelFormatError, "Sqare", call=call)
    portacnn.onnx.emitter(type(network.children["odd"]))(
        lambda graph, layer, x: graph.add("ReduceMax", [x], keepdims=0)
    )
    refuses(ModelFormatError, "not be valid", call=call)
    assert not list(tmp_path.iterdir())


def test_a_derived_layer_is_written_like_its_base(known, tmp_path):
    class Same(L.LeakyReLU):
        def __init__(self):
            super().__init__(0.2)

    class Other(ReLU):
        def forward(self, x, *, train=False, keep=True):
            return x, None

    class Net(M.Model):
        def __init__(self):
            super().__init__(fc=Linear(3, 2), act=Same())

    agrees(filled(Net().build((3,), device="numpy")), tmp_path)
    network = Sequential(act=Other()).build((3,), device="numpy")
    words = ("act (Other)", "derives from ReLU", "overrides forward", "emitter(Other)")
    refuses(ArgumentError, *words, call=lambda: public_export(network, tmp_path / "m.onnx"))
