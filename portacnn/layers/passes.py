"""What holds during a pass through a network, for the thread that makes it: context variables, so
that threads do not meet.

``at_step`` says where training is, ``one_backward_pass`` makes several backward passes count as
one, ``gradients_of`` gives the gradients arrays of their own, and ``recomputing`` repeats a forward
pass.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from portacnn.runtime import Array

if TYPE_CHECKING:
    from portacnn.layers.base import Layer

__all__ = ["at_step", "gradients_of", "one_backward_pass"]

# --- where training is ----------------------------------------------------------------------------


class Moment:
    """Where training is: what layers that draw depend on, beside their seed and path.

    Attributes:
        step: of training; None where each layer counts its own training forward passes.
        first: the position in the global batch of the first sample.
        counts: by layer, how often it has drawn at this step; without a step, the count that it
            draws with next.
    """

    def __init__(self, step: Any, first: Any, counts: Mapping["Layer", int] | None = None) -> None:
        self.step, self.first, self.counts = step, first, dict(counts or {})

    def draw(self, layer: "Layer") -> tuple[Any, Any, str]:
        """Return (step, first, path) for the layer's next draw. A layer in several places draws
        differently in each."""
        count = self.counts.get(layer, 0)
        self.counts[layer] = count + 1
        if self.step is None:
            return count, self.first, layer.path
        return self.step, self.first, f"{layer.path}#{count}" if count else layer.path


_moment: ContextVar[Moment | None] = ContextVar("portacnn_moment", default=None)


@contextmanager
def at_step(step: Any, first: Any = 0) -> Iterator[None]:
    """Within it, training is at this step: what dropout draws in a forward pass depends on it, and
    on no more.

    Outside of it, layers that draw count their training forward passes (``Layer.step``). It holds
    for the current thread.

    Args:
        step: of training.
        first: the position in the global batch of the first sample of the forward pass: for one of
            several pieces of a batch, in gradient accumulation or on another rank.

    Both are numbers, or 0-dimensional integer arrays on the network's device.
    """
    now = Moment(step, first)
    token = _moment.set(now)
    try:
        yield
    finally:
        _moment.reset(token)
        # a thread that was started meanwhile may hold it, and would hold the layers
        now.counts.clear()


def moment() -> Moment | None:
    """Return where training is, or None outside ``at_step``."""
    return _moment.get()


# --- a forward pass made again --------------------------------------------------------------------

_recomputing: ContextVar[bool] = ContextVar("portacnn_recomputing", default=False)


@contextmanager
def recomputing(before: Moment) -> Iterator[None]:
    """Within it, a forward pass repeats one that began at ``before``: it draws the same, and
    changes no running statistics."""
    tokens = _moment.set(before), _recomputing.set(True)
    try:
        yield
    finally:
        _moment.reset(tokens[0])
        _recomputing.reset(tokens[1])


def is_recomputing() -> bool:
    """Return whether this forward pass repeats an earlier one, whose batch running statistics
    already contain."""
    return _recomputing.get()


# --- what a backward pass will ask for ------------------------------------------------------------

_without_dx: "ContextVar[Layer | None]" = ContextVar("portacnn_without_dx", default=None)


@contextmanager
def without_dx(layer: "Layer") -> Iterator[None]:
    """Within it, the backward pass of this layer's forward pass will be called with
    ``need_dx=False``.

    So a container keeps nothing for what comes before its first parameter to train. It holds for
    this layer alone: those inside it are asked for the gradients of their inputs unless their
    container says otherwise.
    """
    token = _without_dx.set(layer)
    try:
        yield
    finally:
        _without_dx.reset(token)


def asks_dx(layer: "Layer") -> bool:
    """Return whether the gradient of the layer's input may be asked for."""
    return _without_dx.get() is not layer


# --- one layer's output ---------------------------------------------------------------------------


class Reached(Exception):  # noqa: N818 (no error)
    """Ends a forward pass at the layer that is watched. Its argument is the layer's output."""


class Watch:
    """Wait for a layer to run, at one of its places.

    Attributes:
        layer: the layer.
        before: how often it still runs before that place.
    """

    def __init__(self, layer: "Layer", before: int) -> None:
        self.layer, self.before = layer, before

    def see(self, y: Array) -> None:
        """Take the layer's output. Raises Reached at its place."""
        if not self.before:
            raise Reached(y)
        self.before -= 1


_watched: ContextVar[Watch | None] = ContextVar("portacnn_watched", default=None)


def watched() -> Watch | None:
    """Return what ``output_of`` waits for, or None."""
    return _watched.get()


def output_of(network: "Layer", layer: "Layer", place: int, x: Array) -> Array | None:
    """Run a network outside training, up to a layer; return the layer's output. None if the network
    did not run it.

    Args:
        place: the number of the layer's place, from 0.
    """
    token = _watched.set(Watch(layer, place))
    try:
        network(x)
    except Reached as reached:
        return reached.args[0]
    finally:
        _watched.reset(token)
    return None


# --- gradients ------------------------------------------------------------------------------------


class Gradients:
    """One backward pass: which gradients it has written, and where they go.

    Attributes:
        written: (layer, name) of the parameters that this pass has reached; what comes to one of
            them again is added.
        own: by (layer, name), arrays that stand for the network's; None where its own take the
            gradients.
    """

    def __init__(self, own: "dict[tuple[Layer, str], Array] | None" = None) -> None:
        self.written: set[tuple[Layer, str]] = set()
        self.own = own


_gradients: ContextVar[Gradients | None] = ContextVar("portacnn_gradients", default=None)


def current_gradients() -> Gradients | None:
    """Return this thread's current backward pass, or None."""
    return _gradients.get()


@contextmanager
def one_backward_pass() -> Iterator[None]:
    """Within it, all backward passes count as one: where several reach a parameter, their gradients
    are added up.

    Every container opens one for itself if there is none, so layers that stand in several places
    add up. Around the passes over the pieces of a batch it gives the batch's gradient.
    """
    if _gradients.get() is not None:
        yield
        return
    current = Gradients()
    token = _gradients.set(current)
    try:
        yield
    finally:
        _gradients.reset(token)
        current.written.clear()  # as in ``at_step``


@contextmanager
def gradients_of(network: "Layer") -> Iterator[dict[str, Array]]:
    """Within it, the backward passes of this thread give a network's gradients arrays of their own,
    and add up.

    The network's own gradients stay as they are, so several threads may go backward through one
    network at once:

        with gradients_of(model) as gradients:
            model.backward(dy, cache)
        optimizer.update(model.named_parameters(), gradients)

    Returns:
        The gradients by the paths of their parameters; filled when the block ends.
    """
    own: dict[tuple[Layer, str], Array] = {}
    found: dict[str, Array] = {}
    token = _gradients.set(Gradients(own))
    try:
        yield found
    finally:
        _gradients.reset(token)
        found |= {
            layer.full_name(name): own[layer, name]
            for layer in network.walk()
            for name in layer.params
            if (layer, name) in own
        }
        own.clear()  # as in ``at_step``
