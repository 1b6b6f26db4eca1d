"""A network as JSON: the class of each layer and what its constructor was called with; and back.

What comes back is made of known classes of layers and of JSON's own values: reading a description runs nothing else.
"""

import json
from inspect import signature
from typing import Any

from portacnn.arguments import plain
from portacnn.errors import ArgumentError, ModelFormatError
from portacnn.layers import Layer
from portacnn.layers.limits import count_layer
from portacnn.text import shown

_NOT_SAVED = ("device", "seed", "dtype")


def describe_layer(layer: Layer) -> dict[str, Any]:
    """A layer as JSON: its class and its constructor's arguments, layers among them described in turn."""
    several, named = layer.arguments()
    explicit = signature(type(layer)).parameters
    described: dict[str, Any] = {
        "class": layer.kind(),
        "arguments": {
            name: _plain(value) for name, value in named.items() if not (name in _NOT_SAVED and name in explicit)
        },
    }
    if several:
        described["layers"] = [_plain(value) for value in several]
    try:
        json.dumps(described)
    except TypeError as error:
        raise ArgumentError(f"cannot be saved: {error}", layer.where) from error
    return described


def _plain(value: Any) -> Any:
    """An argument as JSON has it, layers described."""
    return plain(value, lambda inner: describe_layer(inner) if isinstance(inner, Layer) else None)


def rebuild_layer(described: Any, **building: Any) -> Layer:
    """The layer that ``describe_layer`` described. Only classes of layers can come of it, made from JSON's own values."""
    kind = Layer.known.get(described["class"])
    if kind is None:
        raise ModelFormatError(
            f"unknown class {shown(repr(described['class']))}; import the module that defines it first"
        )
    count_layer(-1)  # what a file describes layer by layer has paid for it in bytes

    def made(value: Any) -> Any:
        if isinstance(value, list):
            return [made(inner) for inner in value]
        if isinstance(value, dict):
            if "class" in value and "arguments" in value:
                return rebuild_layer(value)
            return {name: made(inner) for name, inner in value.items()}
        return value

    layers = [made(value) for value in described.get("layers", ())]
    takes = signature(kind).parameters if building else {}
    taken = {name: value for name, value in building.items() if name in takes}
    return kind(*layers, **{name: made(value) for name, value in described["arguments"].items()}, **taken)
