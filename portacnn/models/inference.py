"""Run a network repeatedly: reuse memory, and prepare the calls for small batches.

For a few images, most of the time is Python overhead in each layer: checks of the input, kernel
selection, memory allocation. The results are the same for every batch of one shape, so this work is
done once (``Layer.prepare``). What remains is a list of functions.

Each call takes a *lane*, which holds all memory that a call writes to, and puts it back on success.
An exception drops the lane. Training steps take it too, so that one arena serves both.

The calls of a process take turns, batch by batch (``turns``). One call at a time uses all cores.
"""

from collections import deque
from collections.abc import Callable
from typing import Any
from weakref import ref

from portacnn.errors import PortacnnError
from portacnn.layers import Layer
from portacnn.models.turns import in_turn
from portacnn.ops.dispatch import kernel_choice
from portacnn.ops.workspace import Plan, Workspace, planning, run_in
from portacnn.runtime import Array, backend_of

FEW = 8
"""Largest number of images for which a prepared path is used."""
_WAYS = 16  # prepared paths per lane: combinations of shape, dtype and kernel choice


class Inference:
    """The lanes of one network: one, unless calls are nested."""

    def __init__(self) -> None:
        self._idle: deque[_Lane] = deque()  # ``pop`` and ``append`` are atomic

    def __reduce__(self) -> Any:
        return Inference, ()  # a copy or an unpickled object starts without lanes

    def run(self, network: Layer, x: Array, batch: Callable[[Array], Array], hold: bool) -> Array:
        """Return the network's output for ``batch(x)``, in its own memory.

        Args:
            hold: keep the memory of the layers' outputs for the next call.
        """
        return in_turn(self._run, network, x, batch, hold)

    def _run(self, *arguments: Any) -> Array:
        return self._with_lane(_Lane.run, *arguments)

    def train(self, function: Callable[..., Any], /, *arguments: Any) -> Any:
        """Return ``function(*arguments)``, a part of a training step: its kernels allocate memory
        where the kernels of predictions do.
        """
        return self._with_lane(_Lane.train, function, *arguments)

    def _with_lane(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            lane = self._idle.pop()
        except IndexError:
            lane = _Lane()
        try:
            y = call(lane, *arguments)
        except PortacnnError:  # rejected images leave the lane intact
            self._idle.append(lane)
            raise
        self._idle.append(lane)
        return y

    def release(self) -> None:
        """Drop every idle lane, and the memory that it holds."""
        self._idle.clear()


class _Lane:
    """The memory of one call at a time: a workspace, and prepared paths that all start at its
    beginning."""

    def __init__(self) -> None:
        self._workspace = Workspace()
        self._version = self._workspace.version
        self._ways: dict[Any, _Way] = {}
        # the path whose arrays at the workspace's start are still intact
        self._last: _Way | None = None

    def run(self, network: Layer, x: Array, batch: Callable[[Array], Array], hold: bool) -> Array:
        self._follow()
        few = x.shape[0] <= FEW or network.home.compiles
        if few and (way := self._way(network, x, batch)) is not None:
            if self._last is not way:
                way.plan.restore()
                self._last = way
            return _copy(run_in(self._workspace, way, x, batch, reserved=way.plan.size))
        if not hold:
            return network(batch(x))
        self._last = None
        return _copy(run_in(self._workspace, lambda: network(batch(x))))

    def train(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self._follow()
        self._last = None
        return run_in(self._workspace, function, *arguments)

    def _follow(self, size: int = 0) -> None:
        """Grow the arena to the size of the last call, or to ``size``; drop the prepared paths of a
        replaced arena."""
        self._workspace.grow(size)
        if self._version != self._workspace.version:
            self._ways, self._last = {}, None
            self._version = self._workspace.version

    def _way(self, network: Layer, x: Array, batch: Callable[[Array], Array]) -> "_Way | None":
        """Return the prepared path for arrays like x; None if a hook observes a layer's output.

        A prepared path does not call hooks.
        """
        key: Any = kernel_choice()  # the backend compiles for each kind of batch by itself
        if not network.home.compiles:
            key = (type(x), tuple(x.shape), x.dtype, x.device, key)
        way = self._ways.get(key)
        if way is not None and way.holds(network.revision):
            if way.is_observed(network):
                return None
            self._follow(way.plan.size)  # an output that a hook keeps may lie there
            if key in self._ways:
                return way
        if any(layer.hooks for layer in network.walk()):
            return None
        # Outdated paths would keep old parameters alive.
        self._ways = {
            other: kept for other, kept in self._ways.items() if kept.holds(network.revision)
        }
        if len(self._ways) >= _WAYS:
            self._ways = {}
        self._last = None
        way = _Way(network, x, batch, Plan())
        if way.plan.size:
            self._follow(way.plan.size)
            way = _Way(network, x, batch, Plan(self._workspace, way.plan.kept))
        self._ways[key] = way
        return way


class _Way:
    """A prepared path through a network, for arrays like one that has passed all checks.

    It refers to the network's layers but not to the network, which refers to it.
    """

    def __init__(
        self, network: Layer, x: Array, batch: Callable[[Array], Array], plan: Plan
    ) -> None:
        first = batch(x)  # this checks x
        # Inputs of the network's own library and dtype are packed where needed.
        self._own = backend_of(x).name == backend_of(first).name and x.dtype == first.dtype
        self.plan = plan
        home = network.home
        if home.compiles:
            network_of, self._own = ref(network), False
            self._function = home.compile_pass(lambda x: network_of()(x))  # type: ignore[misc]
        else:
            with planning(plan):
                self._function = network.prepare(x if self._own else first)
        self._revision = network.revision
        layers = list(network.walk())
        self._below = layers[1:]
        self._arrays = [
            (arrays, name, array)
            for layer in layers
            for arrays in (layer.params, layer.buffers)
            for name, array in arrays.items()
        ]

    def holds(self, revision: int) -> bool:
        """Return whether layers, parameters and buffers are the same: moving, building or changing
        replaces them."""
        return self._revision == revision and all(
            arrays.get(name) is array for arrays, name, array in self._arrays
        )

    def is_observed(self, network: Layer) -> bool:
        """Return whether a hook observes a layer's output."""
        return bool(network.hooks) or any(layer.hooks for layer in self._below)

    def __call__(self, x: Array, batch: Callable[[Array], Array]) -> Array:
        return self._function(x if self._own else batch(x))


def _copy(y: Array) -> Array:
    return backend_of(y).xp.asarray(y, copy=True)
