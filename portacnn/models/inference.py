"""Running a network over and over without training it: memory that is used again, and for a few images a prepared way through.

With a few images it is not the arithmetic that takes the time but each layer's own work in Python: checking its input, finding
its kernel, making room. All of that comes out the same for the next batch of the same shape, so it is done once
(``Layer.prepare``), and what is left is a list of functions.
"""

from collections.abc import Callable
from threading import Lock
from typing import Any

from portacnn.layers import Layer
from portacnn.ops.dispatch import kernel_choice
from portacnn.ops.workspace import Workspace, workspace
from portacnn.runtime import Array, backend_of

FEW = 8
"""Images for which a way through is prepared."""
_WAYS = 16  # that are kept: as many shapes, dtypes and choices of kernels


class Inference:
    """What one network needs for it. A second thread that comes at the same time does without."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._workspace = Workspace()
        self._ways: dict[Any, _Way] = {}

    def __reduce__(self) -> Any:
        return Inference, ()  # a copy of the network, or one from a pickle, begins anew

    def run(self, network: Layer, x: Array, batch: Callable[[Array], Array], hold: bool) -> Array:
        """The network's output for the batch that ``batch`` makes of x, in memory of its own.

        ``hold``: whether the memory for the layers' outputs may be held for the next time.
        """
        if not self._lock.acquire(blocking=False):
            return network(batch(x))
        try:
            if x.shape[0] <= FEW and (way := self._way(network, x, batch)) is not None:
                return way(x)
            if not hold:
                return network(batch(x))
            with workspace(self._workspace):
                return _copy(network(batch(x)))
        finally:
            self._lock.release()

    def _way(self, network: Layer, x: Array, batch: Callable[[Array], Array]) -> "_Way | None":
        """The way for arrays like x; None if somebody wants to see a layer's outputs, which a prepared way does not show."""
        key = (type(x), tuple(x.shape), x.dtype, x.device, kernel_choice())
        way = self._ways.get(key)
        if way is not None and way.holds():
            return None if way.is_observed() else way
        if any(layer.hooks for layer in network.walk()):
            return None
        # Those that hold no longer would keep parameters of a device that the network has left.
        self._ways = {other: kept for other, kept in self._ways.items() if kept.holds()}
        if len(self._ways) >= _WAYS:
            self._ways.clear()
        way = self._ways[key] = _Way(network, x, batch)
        return way


class _Way:
    """A prepared way through a network, for arrays just like one that has passed all checks."""

    def __init__(self, network: Layer, x: Array, batch: Callable[[Array], Array]) -> None:
        first = batch(x)  # which checks x
        own = backend_of(x).name == backend_of(first).name and x.dtype == first.dtype
        self._batch = None if own else batch  # what is the network's own already is laid out where it is needed
        self._function = network.prepare(x if own else first)
        self._network, self._revision = network, network.revision
        self._layers = list(network.walk())
        self._arrays = [
            (arrays, name, array)
            for layer in self._layers
            for arrays in (layer.params, layer.buffers)
            for name, array in arrays.items()
        ]

    def holds(self) -> bool:
        """Whether layers, parameters and buffers are the same: moving or building the network makes new arrays."""
        return self._network.revision == self._revision and all(
            arrays.get(name) is array for arrays, name, array in self._arrays
        )

    def is_observed(self) -> bool:
        """Whether somebody wants to see a layer's outputs."""
        return any(layer.hooks for layer in self._layers)

    def __call__(self, x: Array) -> Array:
        return _copy(self._function(x if self._batch is None else self._batch(x)))


def _copy(y: Array) -> Array:
    return backend_of(y).xp.asarray(y, copy=True)
