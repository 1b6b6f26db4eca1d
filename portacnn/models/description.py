"""A network as JSON: the class of each layer and what its constructor was called with; and back.

What comes back is made of known classes of layers and of JSON's own values: reading a description
runs nothing else.
"""

import json
from contextlib import nullcontext
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
    """A layer as JSON: its class and its constructor's arguments, layers among them described in
    turn.

    A layer in several places is described in the first, under a name, and referred to by it in the
    others. ``replaced`` has, by path, the layers that took the place of those that the constructor
    makes (``Layer.replace``).

    Args:
        known: the layers described so far, to which it adds.
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
    listed = [_plain(value, known) for value in several]  # first, as a rebuilding makes them first
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
    """Whether these descriptions say what readers of format 1 do not know: layers in several
    places, or replaced."""
    return any("name" in described or "replaced" in described for described in known.values())


def _check_apart(layer: Layer) -> None:
    """Raise ArgumentError if a layer is both in what was replaced and in what the constructor
    makes: the latter has no name."""
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
            "cannot be saved: it stands in a layer given to replace, and elsewhere in "
            f"{type(layer).__name__}",
            both.where,
        )


def _plain(value: Any, known: Described) -> Any:
    """An argument as JSON has it, layers described."""
    return plain(
        value, lambda inner: describe_layer(inner, known) if isinstance(inner, Layer) else None
    )


def rebuild_layer(described: Any, names: dict[str, Layer] | None = None, **building: Any) -> Layer:
    """The layer that ``describe_layer`` described. Only classes of layers can come of it, made from
    JSON's own values.

    Args:
        names: the named layers made so far, to which it adds.
        building: device, seed and dtype, for constructors that take them.
    """
    names = {} if names is None else names
    kind = Layer.known.get(described["class"])
    if kind is None:
        raise ModelFormatError(
            f"unknown class {shown(repr(described['class']))}; import the module that defines it "
            "first"
        )
    count_layer(-1)  # what a file describes layer by layer has paid for it in bytes

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
