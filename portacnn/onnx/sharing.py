"""Initializers that several nodes use: one shared layer, or tied parameters."""

from collections.abc import Sequence
from typing import Any

from portacnn.layers import Layer
from portacnn.layers.graph import Node
from portacnn.onnx.importer import Importer
from portacnn.onnx.values import Known


def shared(nodes: Sequence[Node], importer: Importer) -> tuple[list[Node], dict[str, list[str]]]:
    """Merge nodes that have the same initializers and operation into one shared layer; tie
    parameters of others.

    Returns:
        The nodes; and the initializers that are used in several forms (transposed in one node, for
        example), with the names of their nodes. These cannot be shared.
    """
    layers: dict[Any, Layer] = {}
    owners: dict[Any, tuple[Layer, str]] = {}
    forms: dict[str, dict[Any, list[str]]] = {}
    found = []
    for node in nodes:
        state = {
            key: (_form(known), known.learn)
            for key, known in importer.made.get(node.name, {}).items()
        }
        learnt: dict[str, tuple[str, Any]] = {}
        for key, (form, learn) in state.items():
            if learn and key in node.layer.declared:
                # two parameters of one layer cannot be one
                learnt[key] = (form[0], (form[1], key)) if form in learnt.values() else form
        alike = (
            type(node.layer),
            repr(node.layer),
            tuple(sorted((key, form) for key, (form, _) in state.items())),
        )
        layer = layers.setdefault(alike, node.layer) if learnt else node.layer
        found.append(node._replace(layer=layer))
        for key, form in learnt.items():
            forms.setdefault(form[0], {}).setdefault(form, []).append(node.name)
            owner, name = owners.setdefault(form, (layer, key))
            if (owner, name) != (layer, key) and key not in layer.tied:
                layer.tie(key, owner, name)
    several = {
        name: [user for users in kinds.values() for user in users]
        for name, kinds in forms.items()
        if len(kinds) > 1
    }
    several.pop("", None)
    return found, several


def _form(known: Known) -> tuple[str, Any]:
    """Return the key of a parameter's values: the initializer's name, and the memory that
    the array views."""
    array = known.array
    if not known.name and array.size == 1:
        return "", (array.dtype.str, array.tobytes())
    return known.name, (
        array.__array_interface__["data"][0],
        array.shape,
        array.strides,
        array.dtype.str,
    )
