"""How containers run their parts: ``run`` calls a layer's ``forward``, ``Trail`` is a container's
cache, ``Handle`` ends a hook."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from portacnn.errors import PortacnnError, StateError
from portacnn.layers.freezing import learns
from portacnn.layers.passes import is_recomputing, watched, without_dx
from portacnn.runtime import Array, describe

if TYPE_CHECKING:
    from portacnn.layers.base import Layer


def run(layer: "Layer", x: Any, train: bool, keep: bool) -> tuple[Array, Any]:
    """Call ``layer.forward``, then the layer's hooks; return (y, cache).

    An error gets the layer's path, and the input's shape if it does not name it yet.
    """
    try:
        y, cache = layer.forward(x, train=train, keep=keep)
    except PortacnnError as error:
        if not layer.children:
            error.at(layer.where, over=True)
            if "input " not in error.message and not isinstance(x, list):
                error.message += f" (input {describe(x)})"
        raise
    if layer.hooks and not is_recomputing():
        for hook in layer.hooks:
            hook(y)
    watch = watched()
    if watch is not None and watch.layer is layer:
        watch.see(y)
    return y, cache


def run_part(part: "Layer", x: Any, train: bool, keep: bool, asked: bool) -> tuple[Array, Any]:
    """Run a part of a container as ``run`` does; keep nothing if no backward pass will reach it.

    Args:
        asked: whether the part's backward pass will be asked for the gradient of x.
    """
    if asked or not keep:
        return run(part, x, train, keep)
    if not learns(part):
        return run(part, x, train, False)
    with without_dx(part):
        return run(part, x, train, True)


def is_observed(layer: "Layer") -> bool:
    """Return whether somebody looks at the layer's output: it is not fused with others then."""
    watch = watched()
    return bool(layer.hooks) or (watch is not None and watch.layer is layer)


class Trail(list[tuple[Any, Any]]):
    """A container's cache: each part that ran with its own cache, in order. A backward pass removes
    them from the end."""

    used = False

    @staticmethod
    def taken(cache: Any, where: str) -> "Trail":
        """Return the cache that a container's ``backward`` was given, and mark it as used.

        Raises:
            StateError: it was used before, or nothing was kept.
        """
        if not isinstance(cache, Trail):
            raise StateError(
                f"expected what forward kept for backward (keep=True), got {type(cache).__name__}",
                where,
            )
        if cache.used:
            raise StateError(
                "this cache has been used: each backward pass needs a forward pass of its own",
                where,
            )
        cache.used = True
        return cache


class Handle:
    """What ``Layer.on_output`` returns: ``remove`` ends the calls."""

    def __init__(self, layer: "Layer", function: Callable[[Array], object]) -> None:
        self._layer, self._function, self._removed = layer, function, False

    def remove(self) -> None:
        """Stop calling the function."""
        hooks = list(self._layer.hooks)
        # once: a function that was given several times has several handles
        if self._function in hooks and not self._removed:
            hooks.remove(self._function)
        self._layer.hooks, self._removed = tuple(hooks), True
