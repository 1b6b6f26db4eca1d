"""A network's state as arrays by path: compare it with a network, load, copy and pickle it."""

from collections.abc import Container, Mapping
from contextvars import ContextVar
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple

from portacnn.errors import ModelFormatError
from portacnn.layers.network import Network, lay_flat
from portacnn.layers.specs import Shape
from portacnn.runtime import taken
from portacnn.text import listed

if TYPE_CHECKING:
    from portacnn.layers.base import Layer

# "forward" and "backward": functions assigned in place of the methods
_NOT_COPIED = {"belongs_to", "constant_arrays", "hooks", "grads", "forward", "backward"}

_without_arrays: ContextVar[bool] = ContextVar("portacnn_without_arrays", default=False)


class Mismatch(NamedTuple):
    """The paths that a state lacks, and its paths that the network does not have."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_state(layer: "Layer", state: Mapping[str, Any], strict: bool) -> Mismatch:
    """See ``Layer.load_state_dict``."""
    home, own = layer.home, layer.named_state()
    shapes = {path: tuple(array.shape) for path, array in own.items()}
    mismatch = check_state(shapes, state, layer.where, strict, optional_paths(layer))
    with home.active():
        arrays = {
            path: taken(home, state[path], array.dtype, f"{layer.where}: {path}")
            for path, array in own.items()
            if path in state
        }
        for path, array in arrays.items():
            own[path][...] = array
    return mismatch


def optional_paths(layer: "Layer") -> set[str]:
    """Return the paths of buffers that a state may lack."""
    return {
        inner.full_name(name)
        for inner in layer.walk()
        for name, declared in inner.declared_buffers.items()
        if declared.optional
    }


def check_state(
    own: Mapping[str, Shape],
    state: Mapping[str, Any],
    where: str,
    strict: bool = True,
    optional: Container[str] = (),
) -> Mismatch:
    """Compare a state with a network; return the missing and unexpected paths.

    Args:
        own: the shapes of the network's arrays by path.
        state: arrays by path.
        where: the layer, for the error.
        strict: whether missing and unexpected paths are errors.
        optional: paths that may be missing.

    Raises:
        ModelFormatError: the state does not fit; lists every path that is missing or unexpected (if
            ``strict``), has a wrong shape, or is not an array of numbers.
    """
    if not isinstance(state, Mapping):
        raise ModelFormatError(
            f"expected arrays by path, as state_dict() returns them, got a {type(state).__name__}",
            where,
        )
    mismatch = Mismatch(
        [path for path in own if path not in state and path not in optional],
        [path for path in state if path not in own],
    )
    common = [path for path in own if path in state]
    foreign = {path for path in common if isinstance(getattr(state[path], "dtype", ""), str)}
    problems = {
        "missing": mismatch.missing_keys if strict else [],
        "unexpected": mismatch.unexpected_keys if strict else [],
        "not an array (convert it with numpy.asarray)": [
            f"{path}, a {type(state[path]).__name__}"
            for path in common
            if not hasattr(state[path], "shape")
        ],
        "of another shape": [
            f"{path} {tuple(state[path].shape)} (expected {own[path]})"
            for path in common
            if path not in foreign
            and hasattr(state[path], "shape")
            and tuple(state[path].shape) != own[path]
        ],
        "a dtype that NumPy does not support (convert it to float32)": [
            f"{path} ({state[path].dtype})"
            for path in common
            if path in foreign and hasattr(state[path], "dtype")
        ],
    }
    if any(problems.values()):
        named = "; ".join(f"{what}: {listed(paths)}" for what, paths in problems.items() if paths)
        raise ModelFormatError(f"the state does not fit this network. {named}", where)
    return mismatch


# --- copies and pickles ---------------------------------------------------------------------------


def pickled(layer: "Layer") -> dict[str, Any]:
    """Return the contents of a copy or pickle of this layer: parameters and buffers as NumPy
    arrays, and the backend's name.

    Gradients, hooks and the network around the layer are not included.
    """
    state = {name: value for name, value in vars(layer).items() if name not in _NOT_COPIED}
    if layer.backend is not None and not _without_arrays.get():
        for kind in ("params", "buffers"):
            state[kind] = {
                name: layer.backend.to_host(array) for name, array in state[kind].items()
            }
    # An initializer may be a function that cannot be pickled. ``build`` declares parameters again.
    state["declared"] = {
        name: declared._replace(init="default") for name, declared in layer.declared.items()
    }
    state["is_root"] = layer.is_root
    if _without_arrays.get():
        state |= {"params": {}, "buffers": {}, "backend": None, "is_root": False}
    return state


def outline(layer: "Layer") -> "Layer":
    """Return an unbuilt copy without arrays, to plan it while other threads run the layer."""
    token = _without_arrays.set(True)
    try:
        return deepcopy(layer)
    finally:
        _without_arrays.reset(token)


def unpickle(layer: "Layer", state: Mapping[str, Any]) -> None:
    """Restore a layer from what ``pickled`` returned."""
    # __copy__ and pickles of protocol 0 and 1 do not call __new__
    layer.grads, layer.hooks, layer.constant_arrays, layer.belongs_to = {}, (), {}, None
    own = dict(state)
    is_root = own.pop("is_root")
    vars(layer).update(own)
    if layer.backend is not None:
        for arrays in (layer.params, layer.buffers):
            for name, array in arrays.items():
                arrays[name] = layer.backend.asarray(array)
    if is_root:
        network = Network.of(layer)
        for inner in layer.walk():
            inner.belongs_to = network
        lay_flat(layer)
