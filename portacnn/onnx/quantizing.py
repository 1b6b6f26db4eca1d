"""``export(quantize="int8")``: weights of eight bits, and nodes that quantize what they meet.

Convolutions, linear layers and products with a matrix are quantized. Their weight is stored as int8
with a scale for each output channel, followed by a DequantizeLinear node. Their input passes
through a pair of QuantizeLinear and DequantizeLinear (QDQ), with the scale that covers the values
that calibration images have there. A runtime replaces these nodes by integer kernels. All other
layers compute in float32.

Calibration: Jacob et al., 2018, "Quantization and training of neural networks for efficient
integer-arithmetic-only inference".
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np

from portacnn import layers as L
from portacnn.arguments import one_of
from portacnn.errors import ArgumentError
from portacnn.layers import Layer
from portacnn.models import Model
from portacnn.onnx.builder import GraphBuilder
from portacnn.runtime import Array, HostArray, backend_of

# The axis of the output channels in the weight of a layer.
_CHANNELS: dict[type[Layer], int] = {
    **dict.fromkeys((L.Conv1d, L.Conv2d, L.Conv3d, L.Linear), 0),
    **dict.fromkeys((L.ConvTranspose1d, L.ConvTranspose2d, L.ConvTranspose3d, L.MatMulWith), 1),
}
_MOST = 127  # weights are -127..127: symmetric
_BATCH = 64  # images in one forward pass of the calibration


class Span(NamedTuple):
    """The smallest and the largest of some values."""

    low: float
    high: float

    def scale_and_zero(self) -> tuple[np.float32, np.int8]:
        """Return scale and zero point of int8, with 0 exactly represented."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        scale = np.float32((high - low) / 255) if high > low else np.float32(1.0)
        return scale, np.int8(np.clip(round(-128 - low / float(scale)), -128, 127))


Spans = dict[tuple[Layer, int], Span]
"""By layer and the number of its place, the span of its outputs."""


def check_quantize(quantize: str | None, calibration: Any, dtype: str) -> None:
    """Raise ArgumentError for arguments of ``export`` that do not go together."""
    if quantize is None:
        if calibration is not None:
            raise ArgumentError('calibration is for quantize="int8", got it without')
        return
    one_of("quantize", quantize, "int8")
    if calibration is None:
        raise ArgumentError(
            'quantize="int8" needs calibration=images: some hundred samples as predict takes them'
        )
    if dtype != "float32":
        raise ArgumentError(f'quantize="int8" is for dtype "float32", got "{dtype}"')


def calibrate(model: Layer, images: Any) -> tuple[Span, Spans]:
    """Return the span of the network's input, and of the output of each layer, for some images.

    Raises ArrayError, ShapeError, NotFiniteError as ``Model.predict`` does.
    """
    found: Spans = {}
    calls: dict[Layer, int] = {}

    def watch(layer: Layer) -> Callable[[Array], None]:
        def see(y: Array) -> None:
            calls[layer] = number = calls.get(layer, -1) + 1
            key = layer, number % max(len(layer.places), 1)
            found[key] = _wider(found.get(key), y)

        return see

    span: Span | None = None
    with ExitStack() as stack:
        for layer in set(model.walk()):
            stack.callback(layer.on_output(watch(layer)).remove)
        for x in _batches(model, images):
            calls.clear()
            span = _wider(span, x)
            model(x)
    if span is None:
        raise ArgumentError("calibration must be at least one image, got none")
    return span, found


def _batches(model: Layer, images: Any) -> Iterator[Array]:
    """Yield batches as the network takes them."""
    if isinstance(model, Model):
        images = model.accept(images)
    for start in range(0, images.shape[0], _BATCH):
        part = images[start : start + _BATCH, ...]
        yield (
            model.batch(part)
            if isinstance(model, Model)
            else model.home.asarray(np.asarray(part), model.dtype)
        )


def _wider(span: Span | None, values: Array) -> Span:
    home = backend_of(values)
    low, high = (float(home.to_host(f(values))) for f in (home.xp.min, home.xp.max))
    return Span(low, high) if span is None else Span(min(span.low, low), max(span.high, high))


class QuantizedGraph(GraphBuilder):
    """A graph whose convolutions and products are quantized.

    Args:
        opset: version of ONNX's operators.
        spans: of the outputs of the layers.
    """

    def __init__(self, opset: int, spans: Spans) -> None:
        super().__init__(opset, "float32")
        self._spans = spans
        self._of_value: dict[str, Span] = {}
        self._pairs: dict[str, str] = {}  # the quantized form of a value
        self._layer: Layer | None = None
        self._input_scale: np.float32 | None = None

    def spans(self, value: str, span: Span) -> None:
        """Set the span of a value."""
        self._of_value[value] = span

    def layer(self, layer: Layer, *inputs: str) -> str:
        number = self._places.get(layer, 0)
        with self._quantizing(layer):
            if self._layer is layer and inputs[0] in self._of_value:
                inputs = (self._pair(inputs[0]),)
            y = super().layer(layer, *inputs)
        if (layer, number) in self._spans:
            self._of_value[y] = self._spans[layer, number]
        return y

    @contextmanager
    def _quantizing(self, layer: Layer) -> Iterator[None]:
        """Quantize the weights of the layer within the context, if it is of a kind for that."""
        before = self._layer, self._input_scale
        self._layer = layer if type(layer) in _CHANNELS else None
        self._input_scale = None
        try:
            yield
        finally:
            self._layer, self._input_scale = before

    def _pair(self, x: str) -> str:
        """Add QuantizeLinear and DequantizeLinear for a value, once."""
        scale, zero = self._of_value[x].scale_and_zero()
        self._input_scale = scale
        if x not in self._pairs:
            numbers = [
                self.constant(float(scale)),
                self.constant(int(zero), dtype="int8"),
            ]
            q = self.add("QuantizeLinear", [x, *numbers])
            self._pairs[x] = self.add("DequantizeLinear", [q, *numbers])
        return self._pairs[x]

    def weight(self, layer: Layer, name: str) -> str:
        if layer is not self._layer or name not in ("weight", "bias") or name in layer.tied:
            return super().weight(layer, name)
        path = layer.full_name(name)
        if path in self._weights:
            return self._weights[path]
        values = layer.home.to_host(layer.params[name])
        axis = _CHANNELS[type(layer)]
        if getattr(layer, "groups", 1) > 1 and axis == 1:
            axis = 0  # (C, O/groups, *K): the output channels of several groups share an index
        weight = layer.home.to_host(layer.params["weight"])
        others = tuple(i for i in range(weight.ndim) if i != axis)
        largest = np.abs(weight).max(axis=others) if weight.size else np.zeros(weight.shape[axis])
        scale = np.where(largest > 0, largest / _MOST, 1.0).astype(np.float32)
        if name == "bias":
            return self._bias(layer, path, values, scale)
        column = scale.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
        q = np.clip(np.round(values / column), -_MOST, _MOST)
        return self._dequantized(path, q, scale, "int8", axis)

    def _bias(self, layer: Layer, path: str, bias: HostArray, scale: HostArray) -> str:
        """Store the bias in units of the products, as integer kernels add it. It stays float32 if
        these differ from place to place, or are unknown."""
        if self._input_scale is None or len(layer.places) > 1 or scale.shape != bias.shape:
            return super().weight(layer, "bias")
        unit = (scale * self._input_scale).astype(np.float32)
        q = np.round(bias.astype(np.float64) / unit)
        if np.abs(q).max(initial=0.0) >= 1 << 31:
            return super().weight(layer, "bias")
        return self._dequantized(path, q, unit, "int32", 0)

    def _dequantized(self, path: str, q: HostArray, scale: HostArray, dtype: str, axis: int) -> str:
        """Store integers and their scales; return the name of the floats."""
        stored = self.stored_once(path, lambda: q, dtype)
        factor = self.initializer(f"{path}_scale", scale)
        zeros = self.initializer(f"{path}_zero_point", np.zeros(scale.shape), dtype)
        self._weights[path] = self.add("DequantizeLinear", [stored, factor, zeros], axis=axis)
        return self._weights[path]
