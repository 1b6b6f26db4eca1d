"""Build a network: plan all shapes first, then draw the parameters.

``plan`` walks the tree from the root, sets every layer's path and checks every shape. It allocates
nothing. ``build`` draws the parameters only if all shapes fit, each from the seed and its own path.
So an error changes nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

from portacnn.arguments import told, wholes
from portacnn.errors import ArgumentError, PortacnnError, ShapeError, StateError
from portacnn.init import rule
from portacnn.layers.limits import count_layer, count_output, count_taps
from portacnn.layers.network import Network, lay_flat
from portacnn.layers.specs import Place, Shape
from portacnn.layers.state import check_state, optional_paths
from portacnn.runtime import Array, Backend, HostArray, resolve
from portacnn.seeds import check_seed, generator

if TYPE_CHECKING:
    from portacnn.layers.base import Layer

# --- from a file ----------------------------------------------------------------------------------

_not_building: ContextVar[bool] = ContextVar("portacnn_not_building", default=False)


@contextmanager
def not_building() -> Iterator[None]:
    """Disable ``build`` within the context, so that a model that builds itself can be changed
    before it is built."""
    token = _not_building.set(True)
    try:
        yield
    finally:
        _not_building.reset(token)


_state: ContextVar[Mapping[str, HostArray] | None] = ContextVar("portacnn_state", default=None)


@contextmanager
def building_from(state: Mapping[str, HostArray]) -> Iterator[None]:
    """Let ``build`` take the parameters from ``state`` within the context, instead of drawing them.
    ``state`` is checked before anything is allocated."""
    token = _state.set(state)
    try:
        yield
    finally:
        _state.reset(token)


# --- building -------------------------------------------------------------------------------------


def build(
    root: "Layer",
    input_shape: Sequence[int],
    device: str | Backend | None,
    dtype: str,
    seed: int | None,
) -> None:
    """See ``Layer.build``."""
    if _not_building.get():
        return
    if dtype not in ("float32", "float64"):
        hint = "; layers and models are real" if "complex" in str(dtype) else ""
        raise ArgumentError(f'dtype must be "float32" or "float64", got {dtype!r}{hint}')
    shape = _sample_shape(input_shape, root.where)
    count_output(shape)
    backend, seed = resolve(device), check_seed(seed)
    layers = list(root.walk())
    network = root.belongs_to if root.is_root else None
    for layer in layers:
        check_free(layer, network)
    restore = snapshot(layers)
    try:
        root.plan(shape)
        check_ties(layers)
        state = _state.get()
        if state is not None:
            declared = {
                layer.full_name(name): spec.shape
                for layer in layers
                for specs in (layer.declared, layer.declared_buffers)
                for name, spec in specs.items()
                if name not in layer.tied
            }
            check_state(declared, state, root.where, optional=optional_paths(root))
    except PortacnnError:
        restore()
        raise
    network = Network.of(root)
    for layer in layers:
        layer.seed, layer.step = seed, 0
        settle(layer, network, backend, dtype, drawn(layer, backend, dtype, seed, state))
    lay_flat(root)
    root.revision += 1


def move(root: "Layer", device: str | Backend) -> None:
    """See ``Layer.to``."""
    backend = resolve(device)
    for layer in root.walk():
        home = layer.home
        for arrays in (layer.params, layer.buffers):
            for name, array in arrays.items():
                if name not in layer.tied:
                    arrays[name] = backend.asarray(home.to_host(array))
        layer.backend, layer.grads, layer.constant_arrays = backend, {}, {}
    lay_flat(root)


def check_free(layer: "Layer", network: Network | None) -> None:
    """Raise StateError if the layer is part of a network other than this one."""
    if layer.belongs_to is not None and layer.belongs_to is not network:
        raise StateError(
            "is part of another network; use a new layer, or first remove it from the other "
            "network: network.replace(path, another_layer)",
            layer.where,
        )


class Arrays(NamedTuple):
    """A layer's parameters and buffers by name."""

    params: dict[str, Array]
    buffers: dict[str, Array]


def drawn(
    layer: "Layer", backend: Backend, dtype: str, seed: int, state: Mapping[str, HostArray] | None
) -> Arrays:
    """Return initial values of the declared parameters and buffers: from ``state``, or newly
    drawn."""
    params, buffers = {}, {}
    for name, (shape, init, fan_in, fan_out) in layer.declared.items():
        if name in layer.tied:
            continue
        path = layer.full_name(name)
        values = (
            rule(init)(generator(seed, path), shape, fan_in, fan_out)
            if state is None
            else state[path]
        )
        if tuple(values.shape) != shape:
            raise ArgumentError(
                f"the initializer of {name} must return {shape}, got {values.shape}", layer.where
            )
        params[name] = _first(backend, values, dtype)
    with backend.active():
        for name, (shape, value, own, _) in layer.declared_buffers.items():
            given = None if state is None else state.get(layer.full_name(name))
            buffers[name] = (
                backend.xp.full(
                    shape, value, dtype=backend.dtype(own or dtype), device=backend.device
                )
                if given is None
                else _first(backend, given, own or dtype)
            )
    return Arrays(params, buffers)


def _first(backend: Backend, host: HostArray, dtype: str) -> Array:
    """Return an array with these initial values. Makes no copy if ``lay_flat`` will make one."""
    if backend.views_alias and str(host.dtype) == dtype:
        return backend.share(host)
    return backend.asarray(host, dtype)


def settle(layer: "Layer", network: Network, backend: Backend, dtype: str, arrays: Arrays) -> None:
    """Set the layer's arrays, and make it part of this network."""
    layer.belongs_to, layer.backend, layer.dtype = network, backend, dtype
    layer.children.sealed = True
    layer.params, layer.buffers = arrays
    layer.grads, layer.constant_arrays = {}, {}


# --- planning -------------------------------------------------------------------------------------

_planned: ContextVar["set[Layer] | None"] = ContextVar("portacnn_planned", default=None)
"""The layers that already have their path, while a network is planned."""


def plan(layer: "Layer", shape: Shape, path: str) -> Shape:
    """See ``Layer.plan``."""
    done = _planned.get()
    if done is None:
        token = _planned.set(set())
        try:
            return plan(layer, shape, path)
        finally:
            _planned.reset(token)
    if layer in done:
        return _plan_again(layer, shape, path)
    done.add(layer)
    layer.path, layer.declared, layer.declared_buffers, layer.places = path, {}, {}, []
    output = _inferred(layer, shape)
    layer.input_shape, layer.output_shape = shape, output
    layer.places.append(Place(path, shape, output))
    return output


def _inferred(layer: "Layer", shape: Shape) -> Shape:
    try:
        kernel = getattr(layer, "kernel_size", ())
        count_taps(kernel if isinstance(kernel, tuple) else ())  # a child may have this name
        output = layer.infer(shape)
        count_output(output)
    except PortacnnError as error:
        raise error.at(layer.where)
    return output


def _plan_again(layer: "Layer", shape: Shape, path: str) -> Shape:
    """Plan a further place of a layer. Its parameters must fit there too."""
    # nested layers that are each used in two places multiply: 2**depth
    count_layer()
    first = layer.declared, layer.declared_buffers
    layer.declared, layer.declared_buffers = {}, {}
    try:
        output = _inferred(layer, shape)
        needed = [
            {name: spec.shape for specs in both for name, spec in specs.items()}
            for both in (first, (layer.declared, layer.declared_buffers))
        ]
    finally:
        layer.declared, layer.declared_buffers = first
    if needed[0] != needed[1]:
        raise ShapeError(
            f"is used in several places, which need the same parameters; for samples {shape} at "
            f"{path!r} it would have {needed[1]}, it has {needed[0]}",
            layer.where,
        )
    layer.places.append(Place(path, shape, output))
    return output


@contextmanager
def planned(root: "Layer", input_shape: Sequence[int]) -> Iterator[None]:
    """See ``Layer.planned``."""
    shape = _sample_shape(input_shape, root.where)
    restore = snapshot(list(root.walk()))
    try:
        root.plan(shape)
        yield
    finally:
        restore()


def snapshot(layers: list["Layer"]) -> Callable[[], None]:
    """Return a function that undoes what ``plan`` changes."""
    names = ("path", "input_shape", "output_shape", "places", "declared", "declared_buffers")
    before = [[getattr(layer, name) for name in names] for layer in layers]

    def restore() -> None:
        for layer, values in zip(layers, before, strict=True):
            for name, value in zip(names, values, strict=True):
                setattr(layer, name, value)

    return restore


def check_ties(layers: list["Layer"]) -> None:
    """Check that each tied parameter belongs to another of these layers and has the expected shape.

    Raises:
        StateError: the parameter belongs to none of these layers.
        ShapeError: the shapes differ.
    """
    for layer in layers:
        for name, (owner, owner_name) in layer.tied.items():
            if (
                name not in layer.declared
                or owner not in layers
                or owner_name not in owner.declared
            ):
                raise StateError(
                    f"{name} is tied to {owner_name} of {owner.where}, but they are not two "
                    "parameters of this network",
                    layer.where,
                )
            own, other = layer.declared[name].shape, owner.declared[owner_name].shape
            if own != other:
                raise ShapeError(
                    f"{name} must have the shape of {owner.full_name(owner_name)}, to which it is "
                    f"tied: expected {other}, got {own}",
                    layer.where,
                )


def _sample_shape(shape: Sequence[int], where: str) -> Shape:
    try:
        return wholes("input_shape", shape, 1)
    except ArgumentError as error:
        raise ShapeError(
            f"input_shape must be positive numbers without the batch, got {told(shape)}", where
        ) from error
