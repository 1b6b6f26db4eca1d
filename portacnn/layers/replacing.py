"""Find a layer of a network by its path and exchange it for another: ``Layer.replace``."""

from typing import TYPE_CHECKING

from portacnn.errors import ArgumentError, ShapeError
from portacnn.layers.building import Arrays, check_free, check_ties, drawn, settle, snapshot
from portacnn.layers.network import Network, lay_flat
from portacnn.runtime import Backend
from portacnn.text import listed, quoted

if TYPE_CHECKING:
    from portacnn.layers.base import Layer

Chain = list[tuple["Layer", str]]
"""The layers from a root down to a layer, each the parent of the next, with their paths."""


def replace(root: "Layer", path: str, layer: "Layer") -> "Layer":
    """Replace the layer at ``path``; return the old one. See ``Layer.replace``.

    Args:
        root: the root of a network, built or not.
    """
    chain, name = find(root, path)
    holder, before = chain[-1][0], list(root.walk())
    old, coming = holder.children[name], list(layer.walk())
    if any(above in coming for above, _ in chain):
        raise ArgumentError("a layer cannot be put into itself", layer.where)
    for inner in coming:
        check_free(inner, root.belongs_to)
    restore = snapshot([*before, *coming])
    new: dict[Layer, Arrays] = {}
    holder.adopt(name, layer)
    aliases = _aliases(root, old)
    _refer(aliases, layer)
    try:
        if root.backend is not None:
            new = _planned_again(root, root.backend)
    except BaseException:
        holder.adopt(name, old)
        _refer(aliases, old)
        restore()
        raise
    gone = set(before) - set(root.walk())
    for one in gone:
        _leave(one)
    for inner, arrays in new.items():
        inner.seed = root.seed
        settle(inner, Network.of(root), root.home, root.dtype, arrays)
    if root.backend is not None:
        for inner in root.walk():
            inner.grads = {}
        lay_flat(root)
    _note(chain, path, layer)
    root.revision += 1
    return old


def _aliases(root: "Layer", old: "Layer") -> list[tuple["Layer", str]]:
    """Return the attributes that refer to the layer that was replaced."""
    layers = list(root.walk())
    if old in layers:
        return []
    return [(layer, name) for layer in layers for name, v in vars(layer).items() if v is old]


def _refer(aliases: list[tuple["Layer", str]], layer: "Layer") -> None:
    """Make these attributes refer to ``layer``."""
    for holder, name in aliases:
        vars(holder)[name] = layer


def _planned_again(root: "Layer", backend: Backend) -> dict["Layer", Arrays]:
    """Plan a built network after a change; return the arrays of its new layers.

    Raises:
        ShapeError: a layer that keeps its weights would need another shape.
    """
    root.plan(root.input_shape)
    layers = list(root.walk())
    check_ties(layers)
    new = {
        layer: drawn(layer, backend, root.dtype, root.seed, None)
        for layer in layers
        if not layer.is_built()
    }
    for layer in layers:
        if layer.is_built():
            _check_fits(layer)
            if layer.belongs_to is not root.belongs_to:
                new[layer] = _brought(layer, backend, root.dtype)
    return new


def find(root: "Layer", path: str) -> tuple[Chain, str]:
    """Return the layers from ``root`` down to the one whose child has this path, and that child's
    name.

    Raises:
        ArgumentError: there is no layer at this path.
    """
    waiting: list[Chain] = [[(root, root.path)]]
    seen = set()
    while waiting:
        chain = waiting.pop()
        holder, own = chain[-1]
        if (holder, own) in seen:
            continue
        seen.add((holder, own))
        # it may have no path yet, or be used in several places
        kept, holder.path = holder.path, own
        try:
            paths = {name: holder.child_path(name) for name in holder.children}
            names = {name: holder.full_name(name) for name in holder.children}
        finally:
            holder.path = kept
        for name, found in paths.items():
            # a child that adds no segment to paths is found by its name
            if path in (found or None, names[name]):
                return chain, name
        below = (
            (name, found)
            for name, found in paths.items()
            if not found or path.startswith(f"{found}.")
        )
        waiting.extend(
            [*chain, (holder.children[name], found)] for name, found in reversed(list(below))
        )
    known = [layer.path for layer in root.walk() if layer.path] or list(root.children)
    raise ArgumentError(
        f"there is no layer at {quoted(path)}; there are {listed(known, 32)}", root.where
    )


def _check_fits(layer: "Layer") -> None:
    """Raise ShapeError if the layer's arrays do not have the declared shapes."""
    for specs, arrays in ((layer.declared, layer.params), (layer.declared_buffers, layer.buffers)):
        needed = {name: spec.shape for name, spec in specs.items()}
        has = {name: tuple(array.shape) for name, array in arrays.items()}
        if needed != has:
            raise ShapeError(
                f"keeps its weights {has}, but needs {needed} after the change; replace this "
                "layer too",
                layer.where,
            )


def _brought(layer: "Layer", backend: Backend, dtype: str) -> Arrays:
    """Return copies of a built layer's parameters and buffers on another backend."""
    to_host = layer.home.to_host
    return Arrays(
        {
            name: backend.asarray(to_host(array), dtype)
            for name, array in layer.own_params().items()
        },
        {
            name: backend.asarray(to_host(array), layer.declared_buffers[name].dtype or dtype)
            for name, array in layer.buffers.items()
        },
    )


def _leave(layer: "Layer") -> None:
    """Remove the layer from its network, with its own copies of its arrays."""
    layer.belongs_to, layer.grads, layer.tied = None, {}, {}
    if layer.backend is not None:
        with layer.backend.active():
            for arrays in (layer.params, layer.buffers):
                for name, array in arrays.items():
                    arrays[name] = layer.backend.xp.asarray(array, copy=True)


def _note(chain: Chain, path: str, layer: "Layer") -> None:
    """Record a replacement for model files, in ``replaced`` of the layer whose constructor made the
    old one."""
    maker, own = next(
        (pair for pair in chain if not pair[0].is_described_by_children()), (None, "")
    )
    if maker is None or any(above in maker.replaced.values() for above, _ in chain):
        return
    path = path.removeprefix(f"{own}.") if own else path
    below = [other for other in maker.replaced if other == path or other.startswith(f"{path}.")]
    for other in below:
        del maker.replaced[other]
    maker.replaced[path] = layer
