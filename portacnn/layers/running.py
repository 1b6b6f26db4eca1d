"""Run the parts of containers: ``run`` calls a layer's ``forward``, ``back`` its ``backward``,
``Trail`` is a container's cache, ``Handle`` removes a hook."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from portacnn.errors import PortacnnError, StateError
from portacnn.layers.freezing import learns
from portacnn.layers.passes import is_recomputing, watched, without_dx
from portacnn.ops.dispatch import no_cache
from portacnn.ops.fused import Bounds, add_clip
from portacnn.runtime import Array, describe

if TYPE_CHECKING:
    from portacnn.layers.base import Layer


def run(layer: "Layer", x: Any, train: bool, keep: bool) -> tuple[Array, Any]:
    """Call ``layer.forward``, then the layer's hooks; return (y, cache).

    Adds the layer's path to an error, and the input shape if the message lacks it.
    """
    try:
        y, cache = layer.forward(x, train=train, keep=keep)
    except PortacnnError as error:
        _locate(error, layer, x)
        raise
    if layer.hooks and not is_recomputing():
        for hook in layer.hooks:
            hook(y)
    watch = watched()
    if watch is not None and watch.layer is layer:
        watch.see(y)
    return y, cache


def _locate(error: PortacnnError, layer: "Layer", x: Any) -> None:
    """Add the layer's path to an error that it raised, and the input shape."""
    if not layer.children:
        error.at(layer.where, over=True)
        if "input " not in error.message and not isinstance(x, list):
            error.message += f" (input {describe(x)})"


def run_joined(layer: "Layer", parts: list[Array], bounds: Bounds) -> Array:
    """Call ``layer.joined``, or if the layer is observed, run it by itself and add then.

    An error of the sum has no path; the caller adds it.
    """
    if is_observed(layer):
        return apart(layer, parts, bounds)
    try:
        return layer.joined(parts, bounds)
    except PortacnnError as error:
        if error.where is not None:
            _locate(error, layer, parts[0])
        raise


def apart(layer: "Layer", parts: list[Array], bounds: Bounds) -> Array:
    """Run the layer and add the residual then, see ``Layer.joined``."""
    x, residual = parts
    y, _ = run(layer, x, False, False)
    return add_clip([y, residual], bounds)


class Prepared:
    """A prepared function of a container, with the result for the example, which preparing its
    parts has computed."""

    __slots__ = ("_function", "result")

    def __init__(self, function: Callable[[Any], Array], result: Array) -> None:
        self._function, self.result = function, result

    def __call__(self, x: Any) -> Array:
        return self._function(x)


def first_result(function: Callable[[Any], Array], x: Any) -> Array:
    """Return the result of a function that was just prepared for x. Containers have it already, so
    nested ones do not run their parts once per level."""
    if isinstance(function, Prepared):
        result, function.result = function.result, None
        return result
    return function(x)


def run_part(part: "Layer", x: Any, train: bool, keep: bool, asked: bool) -> tuple[Array, Any]:
    """Run a part of a container like ``run``, without a cache if no backward pass will reach the
    part.

    Args:
        asked: whether the backward pass needs the gradient of x.
    """
    if asked or not keep:
        return run(part, x, train, keep)
    if not learns(part):
        return run(part, x, train, False)
    with without_dx(part):
        return run(part, x, train, True)


def back(layer: "Layer", dy: Array, cache: Any, need_dx: bool = True) -> Any:
    """Call ``layer.backward``; return the input's gradient."""
    watch = watched()
    if watch is not None and watch.layer is layer:
        watch.see_gradient(dy)
    return layer.backward(dy, cache, need_dx=need_dx)


def is_observed(layer: "Layer") -> bool:
    """Return whether the layer's output is observed, by a hook or a ``Watch``. Such a layer is
    not fused."""
    watch = watched()
    return bool(layer.hooks) or (watch is not None and watch.layer is layer)


class Trail(list[tuple[Any, Any]]):
    """A container's cache: (part, cache) in the order of the forward pass. The backward pass
    removes the items from the end."""

    used = False

    @staticmethod
    def taken(cache: Any, where: str) -> "Trail":
        """Return a container's cache and mark it as used.

        Raises:
            StateError: the cache was used before, or the forward pass ran with keep=False.
        """
        if not isinstance(cache, Trail):
            raise no_cache(cache, "forward", where)
        if cache.used:
            raise StateError(
                "this cache has been used; run forward again before each backward pass",
                where,
            )
        cache.used = True
        return cache


class Handle:
    """The handle of a hook (``Layer.on_output``). ``remove`` removes the hook."""

    def __init__(self, layer: "Layer", function: Callable[[Array], object]) -> None:
        self._layer, self._function, self._removed = layer, function, False

    def remove(self) -> None:
        """Stop calling the function."""
        hooks = list(self._layer.hooks)
        # one entry: a function registered several times has several handles
        if self._function in hooks and not self._removed:
            hooks.remove(self._function)
        self._layer.hooks, self._removed = tuple(hooks), True
