"""A layer's children, and the attributes that refer to them. Sealed children are changed by
``replace`` only."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from portacnn.errors import StateError

if TYPE_CHECKING:
    from portacnn.layers.base import Layer


class Children(dict[str, "Layer"]):
    """A layer's children by name, in the order in which they run.

    Containers seal their children at the end of the constructor; ``build`` seals all others. Any
    later change except ``put`` raises StateError, because the container's stages were made from
    them.
    """

    sealed = False

    def put(self, name: str, layer: "Layer") -> None:
        """Add or exchange a child, sealed or not. For use by the parent layer only."""
        super().__setitem__(name, layer)

    def _change(self, *args: Any, **kwargs: Any) -> Any:
        raise StateError(
            "the layers of a network are exchanged by network.replace(path, layer); to add or "
            "remove some, make a new network and load the weights with "
            "load_state_dict(state, strict=False)"
        )

    def __setitem__(self, name: str, layer: "Layer") -> None:
        if self.sealed:
            self._change()
        super().__setitem__(name, layer)

    def update(self, *args: Any, **kwargs: Any) -> None:
        if self.sealed:
            self._change()
        for name, layer in dict(*args, **kwargs).items():
            self[name] = layer

    __delitem__ = __ior__ = pop = popitem = clear = setdefault = _change

    def __reduce__(self) -> Any:
        return _restored, (dict(self), self.sealed)


def _restored(layers: Mapping[str, "Layer"], sealed: bool) -> Children:
    """Return the children from a copy or a pickle."""
    made = Children(layers)
    made.sealed = sealed
    return made


def check_alias(layer: "Layer", name: str, held: Any, value: Any) -> None:
    """Raise StateError if ``layer.name = value`` would bypass its sealed children.

    An attribute may refer to a layer that is already in the network. Any other layer would neither
    run nor be trained.

    Args:
        held: the layer that the attribute or child of this name holds now, or None.
        value: the new value: a layer, or any value if ``held`` is a layer.
    """
    if held is not None or all(value is not inner for inner in layer.walk()):
        raise StateError(
            f"the layer {name!r} cannot be set; call network.replace(path, layer), or make a new "
            "network and load the weights with load_state_dict(state, strict=False)",
            layer.where,
        )
