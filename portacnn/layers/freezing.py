"""Frozen state: parameters that training does not change, and batch norms that do not update their
running statistics.

A layer's ``frozen`` holds the names of its own frozen parameters and buffers. A frozen parameter
gets no gradient, so optimizers skip it. A norm with frozen buffers normalizes with them in training
too. A backward pass stops at the first layer with a trainable parameter.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from portacnn.errors import ArgumentError, ModelFormatError
from portacnn.selection import Selection, name_patterns, selector
from portacnn.text import listed, quoted

if TYPE_CHECKING:
    from portacnn.layers.base import Layer


def is_frozen(layer: "Layer", name: str) -> bool:
    """Return whether a parameter of the layer is frozen. A tied parameter is frozen if its owner's
    is."""
    owner, key = layer.tied.get(name, (layer, name))
    return key in owner.frozen


def learns(layer: "Layer") -> bool:
    """Return whether the layer or one below it has a trainable parameter."""
    return any(not is_frozen(inner, name) for inner in layer.walk() for name in inner.params)


def change(layer: "Layer", what: Selection, frozen: bool) -> None:
    """See ``Layer.freeze`` and ``Layer.unfreeze``."""
    layer.check_built()
    network = layer.belongs_to
    chosen: dict[Layer, set[str]] = {}
    for part in [what] if callable(what) else name_patterns(what):
        found = _selected(layer, part)
        if not found:
            word = "freeze" if frozen else "unfreeze"
            names = list(layer.named_state())
            raise ArgumentError(
                f"{word}: {part!r} matches none of {listed(names, 32)}", layer.where
            )
        for owner, name in found:
            chosen.setdefault(owner, set()).add(name)
    for owner, own in chosen.items():
        owner.frozen = owner.frozen | own if frozen else owner.frozen - own
    if network is not None:
        network.changed_frozen()


def _selected(layer: "Layer", what: Selection) -> set[tuple["Layer", str]]:
    """Return the selected parameters and buffers below a layer, each with the layer that owns it.
    Either all buffers of a layer are selected, or none."""
    choose = selector(what)

    def chosen(inner: "Layer", arrays: Any) -> list[str]:
        paths = {place.path for place in inner.places} or {inner.path}
        return [
            name
            for name, array in arrays.items()
            if any(choose(f"{path}.{name}" if path else name, array) for path in paths)
        ]

    found = set()
    for inner in layer.walk():
        for name in chosen(inner, inner.params):
            found.add(inner.tied.get(name, (inner, name)))
        if chosen(inner, inner.buffers):
            found |= {(inner, name) for name in inner.buffers}
    return found


def frozen_paths(root: "Layer") -> list[str]:
    """Return the paths of all frozen parameters and buffers, in the order of the state."""
    return [
        layer.full_name(name)
        for layer in root.walk()
        for name in (*layer.own_params(), *layer.buffers)
        if name in layer.frozen
    ]


def restore(root: "Layer", paths: Any) -> None:
    """Freeze exactly the given ``frozen_paths``, for a network read from a file.

    Raises:
        ModelFormatError: ``paths`` is not a list of paths of this network's state.
    """
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ModelFormatError("the frozen parameters must be a list of paths")
    places = {
        layer.full_name(name): (layer, name)
        for layer in root.walk()
        for name in (*layer.own_params(), *layer.buffers)
    }
    if unknown := [path for path in paths if path not in places]:
        raise ModelFormatError(
            f"{quoted(unknown[0])} is frozen in the file, but the network has no such parameter"
        )
    _set(root, (places[path] for path in paths))


def _set(root: "Layer", frozen: Iterable[tuple["Layer", str]]) -> None:
    names: dict[Layer, set[str]] = {layer: set() for layer in root.walk()}
    for layer, name in frozen:
        names[layer].add(name)
    for layer, own in names.items():
        layer.frozen = frozenset(own)
    if root.belongs_to is not None:
        root.belongs_to.changed_frozen()
