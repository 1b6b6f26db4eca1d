"""Running a network over and over without training it: memory that is used again, and a prepared
way through for a few images.

With a few images it is not the arithmetic that takes the time but each layer's own work in Python:
checking its input, finding its kernel, taking memory. All of that comes out the same for the next
batch of the same shape, so it is done once (``Layer.prepare``), and what is left is a list of
functions.

Each call takes a *lane*, which has all that a call writes to, and puts it back when it has
succeeded. So threads that come at the same time have a lane each, and what an exception has left
half done is dropped with its lane.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

from portacnn.errors import PortacnnError
from portacnn.layers import Layer
from portacnn.ops.dispatch import kernel_choice
from portacnn.ops.workspace import Plan, Workspace, planning, run_in
from portacnn.runtime import Array, backend_of

FEW = 8
"""Images for which a way through is prepared."""
_WAYS = 16  # that a lane keeps: as many shapes, dtypes and choices of kernels


class Inference:
    """What one network needs for it: as many lanes as there were calls at the same time."""

    def __init__(self) -> None:
        self._idle: deque[_Lane] = deque()  # whose ``pop`` and ``append`` are atomic

    def __reduce__(self) -> Any:
        return Inference, ()  # a copy, or one from a pickle, has lanes of its own

    def run(self, network: Layer, x: Array, batch: Callable[[Array], Array], hold: bool) -> Array:
        """The network's output for the batch that ``batch`` makes of x, in memory of its own.

        ``hold``: whether the memory for the layers' outputs may be held for the next time.
        """
        try:
            lane = self._idle.pop()
        except IndexError:
            lane = _Lane()
        try:
            y = lane.run(network, x, batch, hold)
        except PortacnnError:  # images that are refused leave nothing half done
            self._idle.append(lane)
            raise
        self._idle.append(lane)
        return y

    def release(self) -> None:
        """Drop every idle lane, and with it all memory that is held."""
        self._idle.clear()


class _Lane:
    """What one call at a time writes to: a workspace, and prepared ways, which all lie at its
    start."""

    def __init__(self) -> None:
        self._workspace = Workspace()
        self._version = self._workspace.version
        self._ways: dict[Any, _Way] = {}
        # whose arrays at the workspace's start nobody has written to since
        self._last: _Way | None = None

    def run(self, network: Layer, x: Array, batch: Callable[[Array], Array], hold: bool) -> Array:
        self._follow()
        if x.shape[0] <= FEW and (way := self._way(network, x, batch)) is not None:
            if self._last is not way:
                way.plan.restore()
                self._last = way
            return _copy(run_in(self._workspace, way, x, batch, reserved=way.plan.size))
        if not hold:
            return network(batch(x))
        self._last = None
        return _copy(run_in(self._workspace, lambda: network(batch(x))))

    def _follow(self, size: int = 0) -> None:
        """Have an arena of what the last call needed, or of ``size``; drop the ways that lie in one
        that was replaced."""
        self._workspace.grow(size)
        if self._version != self._workspace.version:
            self._ways, self._last = {}, None
            self._version = self._workspace.version

    def _way(self, network: Layer, x: Array, batch: Callable[[Array], Array]) -> "_Way | None":
        """The way for arrays like x; None if somebody wants to see a layer's outputs, which a
        prepared way does not show."""
        key = (type(x), tuple(x.shape), x.dtype, x.device, kernel_choice())
        way = self._ways.get(key)
        if way is not None and way.holds(network.revision):
            return None if way.is_observed(network) else way
        if any(layer.hooks for layer in network.walk()):
            return None
        # Those that hold no longer would keep parameters that the network has left.
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
    """A prepared way through a network, for arrays just like one that has passed all checks.

    It keeps the network's layers, but not the network itself, which keeps the way.
    """

    def __init__(
        self, network: Layer, x: Array, batch: Callable[[Array], Array], plan: Plan
    ) -> None:
        first = batch(x)  # which checks x
        # What is the network's own already is laid out where it is needed.
        self._own = backend_of(x).name == backend_of(first).name and x.dtype == first.dtype
        self.plan = plan
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
        """Whether layers, parameters and buffers are the same: moving, building or changing the
        network makes others."""
        return self._revision == revision and all(
            arrays.get(name) is array for arrays, name, array in self._arrays
        )

    def is_observed(self, network: Layer) -> bool:
        """Whether somebody wants to see a layer's outputs."""
        return bool(network.hooks) or any(layer.hooks for layer in self._below)

    def __call__(self, x: Array, batch: Callable[[Array], Array]) -> Array:
        return self._function(x if self._own else batch(x))


def _copy(y: Array) -> Array:
    return backend_of(y).xp.asarray(y, copy=True)
