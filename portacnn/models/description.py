"""Describe a network as JSON values, the class and constructor arguments of each layer, and rebuild
it.

A rebuilt network consists of known layer classes and JSON values: reading a description executes
nothing else.
"""

import json
from contextlib import nullcontext
from importlib import import_module
from inspect import signature
from typing import Any

from portacnn.arguments import plain
from portacnn.errors import ArgumentError, ModelFormatError
from portacnn.layers import Layer
from portacnn.layers.building import not_building
from portacnn.layers.limits import count_layer
from portacnn.text import shown

_NOT_SAVED = ("device", "seed", "dtype")


Described = dict[Layer, dict[str, Any]]


def describe_layer(layer: Layer, known: Described | None = None) -> dict[str, Any]:
    """Return a layer as JSON values: its class and its constructor's arguments, including layers
    among them.

    A layer that occurs in several places is described once, under a name, and the other places
    refer to it. ``replaced`` holds, by path, the replacements of layers made by the constructor
    (``Layer.replace``).

    Args:
        known: the layers described so far; this one is added.

    Raises:
        ArgumentError: if JSON cannot hold an argument.
    """
    known = {} if known is None else known
    if layer in known:
        taken = {described.get("name") for described in known.values()}
        choices = (
            name
            for name in (layer.path, *map(str, range(len(known) + 1)))
            if name and name not in taken
        )
        return {"shared": known[layer].setdefault("name", next(choices))}
    described = known[layer] = {"class": layer.kind()}
    several, named = layer.arguments()
    explicit = signature(type(layer)).parameters
    listed = [
        _plain(value, known) for value in several
    ]  # first, because rebuilding makes them first
    described["arguments"] = {
        name: _plain(value, known)
        for name, value in named.items()
        if not (name in _NOT_SAVED and name in explicit)
    }
    if several:
        described["layers"] = listed
    if layer.replaced:
        _check_apart(layer)
        described["replaced"] = {
            path: describe_layer(new, known) for path, new in layer.replaced.items()
        }
    try:
        json.dumps(described)
    except TypeError as error:
        raise ArgumentError(f"cannot be saved: {error}", layer.where) from error
    return described


def needs_format_2(known: Described) -> bool:
    """Return whether these descriptions use what format 1 lacks: shared or replaced layers."""
    return any("name" in described or "replaced" in described for described in known.values())


def _check_apart(layer: Layer) -> None:
    """Raise ArgumentError if a layer is both in a replacement and in a layer that the constructor
    makes.

    The layer in the constructor's part has no name to refer to.
    """
    new = list(layer.replaced.values())
    inside = {inner for one in new for inner in one.walk()}
    waiting, seen = [layer], set()
    while waiting:
        for child in waiting.pop().children.values():
            if child not in new and child not in seen:
                seen.add(child)
                waiting.append(child)
    if inside & seen:
        both = next(iter(inside & seen))
        raise ArgumentError(
            "cannot be saved: it is in a layer passed to replace and also elsewhere in "
            f"{type(layer).__name__}",
            both.where,
        )


def _plain(value: Any, known: Described) -> Any:
    """Return an argument as JSON values, with layers described."""
    return plain(
        value, lambda inner: describe_layer(inner, known) if isinstance(inner, Layer) else None
    )


def known_class(name: Any) -> type[Layer] | None:
    """Return the layer class of a name. portacnn's own networks are imported when a name is
    unknown; a name from a file imports nothing.
    """
    if name not in Layer.known:
        import_module("portacnn.models.graph_model")
        import_module("portacnn.models.registry")
    return Layer.known.get(name)


def rebuild_layer(described: Any, names: dict[str, Layer] | None = None, **building: Any) -> Layer:
    """Return the layer that ``describe_layer`` described. Only known layer classes are made, from
    JSON values.

    Args:
        names: the named layers made so far; new ones are added.
        building: device, seed and dtype, for constructors that take them.

    Raises:
        ModelFormatError: if the class is unknown. Also whatever the constructor raises.
    """
    names = {} if names is None else names
    kind = known_class(described["class"])
    if kind is None:
        raise ModelFormatError(
            f"unknown class {shown(repr(described['class']))}; import the module that defines it "
            "first"
        )
    count_layer(-1)  # layers described one by one are limited by the file's size

    def made(value: Any) -> Any:
        if isinstance(value, list):
            return [made(inner) for inner in value]
        if isinstance(value, dict):
            if "class" in value and "arguments" in value:
                return rebuild_layer(value, names)
            if value.keys() == {"shared"}:
                return names[value["shared"]]
            return {name: made(inner) for name, inner in value.items()}
        return value

    layers = [made(value) for value in described.get("layers", ())]
    arguments = {name: made(value) for name, value in described["arguments"].items()}
    takes = signature(kind).parameters if building else {}
    arguments |= {name: value for name, value in building.items() if name in takes}
    replaced = described.get("replaced")
    with not_building() if replaced else nullcontext():
        layer = kind(*layers, **arguments)
        for path, new in (replaced or {}).items():
            layer.replace(path, made(new))
    if "name" in described:
        names[described["name"]] = layer
    return layer
