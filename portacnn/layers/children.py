"""``Children``: a layer's children by name. ``replace`` alone changes them once they are sealed."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from portacnn.errors import StateError

if TYPE_CHECKING:
    from portacnn.layers.base import Layer


class Children(dict[str, "Layer"]):
    """A layer's children by name, in the order in which they run.

    Once they are ``sealed``, any change but ``put`` raises StateError: what runs was made of them.
    """

    sealed = False

    def put(self, name: str, layer: "Layer") -> None:
        """Add or exchange a child, sealed or not. Only for the layer that the children belong
        to."""
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
    """Return children that were copied or pickled."""
    made = Children(layers)
    made.sealed = sealed
    return made
