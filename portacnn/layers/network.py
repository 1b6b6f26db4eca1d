"""``Network``: the data shared by all layers of a built network, mainly the flat arrays of their
state. Also writes gradients.

If the library's slices are views, all parameters of a network lie in one flat array, all gradients
in another, and the buffers of each dtype in one more. An optimizer then updates all parameters at
once.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING
from weakref import ref

from portacnn.flat import Flat
from portacnn.layers.passes import Gradients, current_gradients
from portacnn.layers.specs import Shape
from portacnn.runtime import Array, Backend, dtype_name

if TYPE_CHECKING:
    from portacnn.layers.base import Layer


class Network:
    """The data shared by all layers of a built network. It holds a weak reference to the root,
    because the root refers to its network and a cycle would keep both alive.

    Attributes:
        params, buffers, grads: the flat arrays, if the library's slices are views. ``grads`` is
            made in the first backward pass.
        root: a weak reference: returns the root, or None if it was deleted.
        changes: how often a recorded step became outdated: by ``freeze``, ``unfreeze`` or a new
            hook.
    """

    def __init__(self) -> None:
        self.params: tuple[Flat, ...] = ()
        self.buffers: tuple[Flat, ...] = ()
        self.grads: tuple[Flat, ...] = ()
        self.root: Callable[[], Layer | None] = lambda: None
        self.changes = 0

    def changed_frozen(self) -> None:
        """Drop all gradients. Frozen parameters have none, so the flat layout of the others
        changes."""
        self.changes += 1
        self.grads = ()
        root = self.root()
        for layer in () if root is None else root.walk():
            layer.grads = {}

    @staticmethod
    def of(root: "Layer") -> "Network":
        """Return the network of a root layer; create it if there is none."""
        if root.belongs_to is not None and root.is_root:
            return root.belongs_to
        network = Network()
        network.root = ref(root)
        return network


def lay_flat(root: "Layer") -> None:
    """Move all parameters into one flat array and the buffers of each dtype into another, if the
    library's slices are views. A tied parameter becomes its owner's array."""
    backend, layers, network = root.home, list(root.walk()), root.belongs_to or Network()
    network.params = _flat(
        backend, _places((layer, layer.params, layer.own_params()) for layer in layers)
    )
    network.buffers = _flat(
        backend, _places((layer, layer.buffers, layer.buffers) for layer in layers)
    )
    network.grads = ()
    for layer in layers:
        for name, (owner, owner_name) in layer.tied.items():
            layer.params[name] = owner.params[owner_name]


def _places(
    held: Iterable[tuple["Layer", dict[str, Array], Iterable[str]]],
) -> dict[str, tuple[dict[str, Array], str]]:
    """Return the dictionary and the name of each array, by its path."""
    return {
        layer.full_name(name): (arrays, name) for layer, arrays, names in held for name in names
    }


def _flat(backend: Backend, places: Mapping[str, tuple[dict[str, Array], str]]) -> tuple[Flat, ...]:
    """Move arrays into one flat array per dtype, and return the flat arrays.

    Args:
        places: by path, the dictionary that holds the array, and its name there.
    """
    if not backend.views_alias:
        return ()
    kinds: dict[str, dict[str, Shape]] = {}
    for path, (holder, name) in places.items():
        kinds.setdefault(dtype_name(holder[name]), {})[path] = tuple(holder[name].shape)
    flats = tuple(Flat(backend, shapes, dtype) for dtype, shapes in kinds.items())
    with backend.active():
        for flat in flats:
            for path, view in flat.views.items():
                holder, name = places[path]
                view[...] = holder[name]
                holder[name] = view
    return flats


# --- gradients ------------------------------------------------------------------------------------


def add_grads(layer: "Layer", grads: Mapping[str, Array]) -> None:
    """See ``Layer.add_grads``."""
    current = current_gradients()
    with layer.home.active():
        for name, grad in grads.items():
            owner, key = layer.tied.get(name, (layer, name))
            if key not in owner.frozen:
                _add_grad(owner, key, grad, current)


def _add_grad(layer: "Layer", name: str, grad: Array, current: Gradients | None) -> None:
    place, arrays = (layer, name), layer.grads
    if current is not None and current.own is not None:
        if place in current.own:
            current.own[place] += grad
        else:  # a copy, because the given array may lie in a workspace
            current.own[place] = layer.home.xp.asarray(grad, copy=True)
        return
    if current is not None and place in current.written:
        arrays[name] += grad
    else:
        if name not in arrays:
            arrays[name] = _array_for_grad(layer, name)
        arrays[name][...] = grad
    if current is not None:
        current.written.add(place)
        if current.wrote is not None:
            current.wrote(layer, name)


def _array_for_grad(layer: "Layer", name: str) -> Array:
    """Return the array for a parameter's gradient: a view of the flat gradients if the parameter is
    a view of the flat parameters."""
    network, path, param = layer.belongs_to or Network(), layer.full_name(name), layer.params[name]
    for number, flat in enumerate(network.params):
        if flat.views.get(path) is param:
            if not network.grads:
                frozen = _frozen(network)
                network.grads = tuple(flat.without(frozen) for flat in network.params)
            return network.grads[number].views[path]
    return layer.home.xp.empty_like(param)


def _frozen(network: Network) -> set[str]:
    """Return the paths of the frozen parameters: they need no memory for gradients."""
    root = network.root()
    return (
        set()
        if root is None
        else {layer.full_name(name) for layer in root.walk() for name in layer.frozen}
    )
