"""The network inside the page, for its drawing pad: layers as JSON, all weights as one array.

The page computes in float32 what ``Model.predict`` does. Batch norm is a factor and a term for each
channel there. Inputs are in units of pixels, 0..255: the page maps a pixel p to p*scale + shift.
"""

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np

from portacnn.layers import (
    AvgPool2d,
    BatchNorm1d,
    BatchNorm2d,
    Conv2d,
    Dropout,
    Dropout2d,
    Flatten,
    GlobalAvgPool,
    GlobalMaxPool,
    Layer,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
)
from portacnn.models import GraphModel, Model
from portacnn.ops.windows import pads_of
from portacnn.runtime import HostArray

MOST_BYTES = 2_000_000
EXAMPLES = 20


class NotInPageError(Exception):
    """Says why a page can't hold a network."""


class _Weights:
    """The weights of all layers, one after the other."""

    def __init__(self) -> None:
        self.parts: list[HostArray] = []
        self.count = 0

    def put(self, values: Any) -> int:
        """Append values; return where they begin."""
        flat = np.asarray(values, np.float32).reshape(-1)
        begin, self.count = self.count, self.count + flat.size
        self.parts.append(flat)
        return begin


def network(model: Model, test: Any = None, names: Any = ()) -> dict[str, Any]:
    """Return what the page's script needs: network, weights, class names, examples.

    Args:
        test: a Dataset for the examples, or None.
        names: of the classes.

    Raises:
        NotInPageError: if the page cannot hold it, with the reason.
    """
    shape = model.input_shape
    if len(shape) != 3 or shape[0] != 1:
        raise NotInPageError(
            "one draws images of one channel; this network's samples are "
            f"{'x'.join(map(str, shape))}"
        )
    if len(model.output_shape) != 1:
        raise NotInPageError("the network has no output for each class")
    size = 4 * sum(array.size for array in model.state_dict().values())
    if size > MOST_BYTES:
        raise NotInPageError(
            f"its weights have {size / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:.0f} MB"
        )
    if isinstance(model, GraphModel) or type(model).forward is not Model.forward:
        raise NotInPageError("its layers do not run one after the other")
    weights = _Weights()
    layers = list(_layers(model, weights))
    scale, shift = _pixels(model)
    content = np.concatenate([*weights.parts, np.zeros(0, np.float32)]).astype("<f4")
    found: dict[str, Any] = {
        "input": list(shape),
        "layers": layers,
        "weights": base64.b64encode(content.tobytes()).decode(),
        "names": [str(name) for name in names],
        "scale": scale,
        "shift": shift,
        "light": False,
        "examples": [],
    }
    if test is not None:
        images = np.asarray(test.images[:EXAMPLES, ...])
        pixels = images if images.dtype == np.uint8 else (images.astype(float) - shift) / scale
        edge = np.concatenate([pixels[..., 0, :].ravel(), pixels[..., -1, :].ravel()])
        found["light"] = bool(np.median(edge) > 127)
        labels = np.asarray(test.labels[:EXAMPLES])
        for image, label in zip(pixels, labels, strict=True):
            kind = "<u1" if images.dtype == np.uint8 else "<f4"
            coded = base64.b64encode(image.astype(kind).tobytes()).decode()
            index = int(label.argmax()) if label.ndim else int(label)
            found["examples"].append({"label": index, "kind": kind[1], "pixels": coded})
    return found


def _pixels(model: Model) -> tuple[float, float]:
    """Return scale and shift: the network's input is pixel * scale + shift."""
    if model.preprocess is not None:
        mean, std = model.preprocess.in_pixels(1)
        return 1.0 / std[0], -mean[0] / std[0]
    low, high = model.info.input_range or (0.0, 1.0)
    return ((high - low) / 255.0 if high > low else 1 / 255), low


def _layers(parent: Layer, weights: _Weights) -> Iterator[dict[str, Any]]:
    for layer in parent.children.values():
        if type(layer) is Sequential:
            yield from _layers(layer, weights)
        elif not isinstance(layer, Dropout | Dropout2d):
            described = _layer(layer, weights)
            out = list(layer.output_shape)
            yield {"path": layer.path, "in": list(layer.input_shape), "out": out, **described}


def _layer(layer: Layer, weights: _Weights) -> dict[str, Any]:
    """Return what the page needs to know about a layer. Raises NotInPageError."""
    kind = type(layer)
    params = {name: layer.home.to_host(array) for name, array in layer.params.items()}
    if kind is ReLU:
        return {"kind": "relu"}
    if kind is Flatten:
        return {"kind": "flatten"}
    if kind in (GlobalAvgPool, GlobalMaxPool):
        return {"kind": "global", "mean": kind is GlobalAvgPool}
    if kind is Linear:
        assert isinstance(layer, Linear)
        return {"kind": "linear", **_weight(params, layer.out_features, weights)}
    if kind is Conv2d and layer.padding_mode == "zeros":
        more = {"groups": layer.groups, **_weight(params, layer.out_channels, weights)}
        return {"kind": "conv", **_windows(layer), **more}
    if kind is MaxPool2d:
        return {"kind": "max", **_windows(layer)}
    if kind is AvgPool2d and not layer.ceil_mode and layer.divisor_override is None:
        found = _windows(layer)
        if layer.count_include_pad or found["pad"] == [0, 0]:
            return {"kind": "mean", **found}
    if kind in (BatchNorm1d, BatchNorm2d) and "running_mean" in layer.buffers:
        mean, var = (
            layer.home.to_host(layer.buffers[f"running_{name}"]).astype(np.float64)
            for name in ("mean", "var")
        )
        factor = params.get("weight", 1.0) / np.sqrt(var + layer.eps)
        term = params.get("bias", 0.0) - mean * factor
        return {"kind": "norm", "factor": weights.put(factor), "term": weights.put(term)}
    raise NotInPageError(f"the page does not know how to compute {layer.where}")


def _weight(params: dict[str, HostArray], outputs: int, weights: _Weights) -> dict[str, int]:
    bias = params.get("bias", np.zeros(outputs))
    return {"weight": weights.put(params["weight"]), "bias": weights.put(bias)}


def _windows(layer: Any) -> dict[str, Any]:
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    pads = pads_of(layer.padding, layer.input_shape[1:], kernel, stride, dilation)
    return {
        "kernel": list(kernel),
        "stride": list(stride),
        "dilation": list(dilation),
        "pad": [before for before, _ in pads],
    }
