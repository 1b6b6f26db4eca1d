"""State of one forward or backward pass. It is held in context variables, so each thread has its
own.

``at_step`` sets the training step, ``one_backward_pass`` adds up the gradients of several backward
passes, ``gradients_of`` collects gradients in separate arrays, and ``recomputing`` repeats a
forward pass.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from portacnn.runtime import Array

if TYPE_CHECKING:
    from portacnn.layers.base import Layer

__all__ = ["at_step", "gradients_of", "one_backward_pass"]

# --- the training step ----------------------------------------------------------------------------


class Moment:
    """The position in training. Random draws depend on it and on the layer's seed and path.

    Attributes:
        step: of training; None if each layer counts its own training forward passes.
        first: the first sample's position in the global batch.
        counts: by layer, the number of draws at this step; if ``step`` is None, the count used by
            its next draw.
    """

    def __init__(self, step: Any, first: Any, counts: Mapping["Layer", int] | None = None) -> None:
        self.step, self.first, self.counts = step, first, dict(counts or {})

    def draw(self, layer: "Layer") -> tuple[Any, Any, str]:
        """Return (step, first, path) for the layer's next draw. A layer used in several places
        draws differently in each."""
        count = self.counts.get(layer, 0)
        self.counts[layer] = count + 1
        if self.step is None:
            return count, self.first, layer.path
        return self.step, self.first, f"{layer.path}#{count}" if count else layer.path


_moment: ContextVar[Moment | None] = ContextVar("portacnn_moment", default=None)


@contextmanager
def at_step(step: Any, first: Any = 0) -> Iterator[None]:
    """Set the training step within the context. Dropout masks then depend on the step, not on the
    number of forward passes.

    Outside of it, dropout layers count their training forward passes (``Layer.step``). It applies
    to the current thread.

    Args:
        step: of training.
        first: the position in the global batch of the forward pass's first sample, for gradient
            accumulation or several ranks.

    Both arguments are whole numbers or 0-dimensional integer arrays on the network's device.
    """
    now = Moment(step, first)
    token = _moment.set(now)
    try:
        yield
    finally:
        _moment.reset(token)
        # a thread started within the context may still refer to it, which would keep the layers
        # alive
        now.counts.clear()


def moment() -> Moment | None:
    """Return the current position in training, or None outside ``at_step``."""
    return _moment.get()


# --- repeating a forward pass ---------------------------------------------------------------------

_recomputing: ContextVar[bool] = ContextVar("portacnn_recomputing", default=False)


@contextmanager
def recomputing(before: Moment) -> Iterator[None]:
    """Repeat a forward pass that began at ``before`` within the context. It draws the same masks
    and updates no running statistics."""
    tokens = _moment.set(before), _recomputing.set(True)
    try:
        yield
    finally:
        _moment.reset(tokens[0])
        _recomputing.reset(tokens[1])


def is_recomputing() -> bool:
    """Return whether this forward pass repeats an earlier one, so that running statistics already
    include the batch."""
    return _recomputing.get()


# --- whether dx is needed -------------------------------------------------------------------------

_without_dx: "ContextVar[Layer | None]" = ContextVar("portacnn_without_dx", default=None)


@contextmanager
def without_dx(layer: "Layer") -> Iterator[None]:
    """Declare within the context that this layer's backward pass will be called with
    ``need_dx=False``.

    A container then keeps no caches for the layers before its first trainable parameter. The
    declaration applies to this layer only; a container decides for the layers inside it.
    """
    token = _without_dx.set(layer)
    try:
        yield
    finally:
        _without_dx.reset(token)


def asks_dx(layer: "Layer") -> bool:
    """Return whether the backward pass may need the gradient of the layer's input."""
    return _without_dx.get() is not layer


# --- one layer's output ---------------------------------------------------------------------------


class Reached(Exception):  # noqa: N818 (no error)
    """Stops a pass at the watched layer. Its argument is the layer's output, or its gradient."""


class Watch:
    """Wait for a layer to run, at one of its places.

    Attributes:
        layer: the layer.
        before: how often the layer still runs before that place.
    """

    def __init__(self, layer: "Layer", before: int) -> None:
        self.layer, self.before = layer, before

    def see(self, y: Array) -> None:
        """Receive the layer's output. Raises Reached at the watched place."""
        if not self.before:
            raise Reached(y)
        self.before -= 1

    def see_gradient(self, dy: Array) -> None:
        """Receive the gradient of the layer's output, in the backward pass."""


class GradientWatch(Watch):
    """Keep a layer's output at one of its places, and wait for the gradient there.

    Attributes:
        output: the layer's output at that place; None before it has run.
    """

    def __init__(self, layer: "Layer", place: int) -> None:
        super().__init__(layer, place)
        self.output: Array | None = None

    def see(self, y: Array) -> None:
        if is_recomputing():  # Recompute repeats its part of the forward pass
            return
        if not self.before:
            self.output = y
        self.before -= 1

    def see_gradient(self, dy: Array) -> None:
        """Receive a gradient; the last place comes first. Raises Reached at the watched place."""
        self.before += 1
        if not self.before:
            raise Reached(dy)


_watched: ContextVar[Watch | None] = ContextVar("portacnn_watched", default=None)


def watched() -> Watch | None:
    """Return this thread's current ``Watch``, or None."""
    return _watched.get()


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Show the outputs of one layer, and their gradients, to ``watch`` within the context."""
    token = _watched.set(watch)
    try:
        yield
    finally:
        _watched.reset(token)


def output_of(network: "Layer", layer: "Layer", place: int, x: Array) -> Array | None:
    """Run a network outside training up to a layer, and return the layer's output. Returns None if
    the network did not run the layer.

    Args:
        place: the index of the layer's place, from 0.
    """
    try:
        with watching(Watch(layer, place)):
            network(x)
    except Reached as reached:
        return reached.args[0]
    return None


# --- gradients ------------------------------------------------------------------------------------


class Gradients:
    """The gradients written in one backward pass, and their target arrays.

    Attributes:
        written: (layer, name) of the parameters that have a gradient in this pass; further
            gradients are added.
        own: arrays that receive the gradients, by (layer, name); None to write into the network's
            own.
        wrote: is called after each write into the network's own gradients; see
            ``one_backward_pass``.
    """

    def __init__(
        self,
        own: "dict[tuple[Layer, str], Array] | None" = None,
        wrote: "Callable[[Layer, str], None] | None" = None,
    ) -> None:
        self.written: set[tuple[Layer, str]] = set()
        self.own, self.wrote = own, wrote


_gradients: ContextVar[Gradients | None] = ContextVar("portacnn_gradients", default=None)


def current_gradients() -> Gradients | None:
    """Return this thread's current backward pass, or None."""
    return _gradients.get()


@contextmanager
def one_backward_pass(wrote: "Callable[[Layer, str], None] | None" = None) -> Iterator[None]:
    """Treat all backward passes within the context as one: their gradients are added.

    Every container enters it if it is not active, so the gradients of a layer used in several
    places are added. Around the passes over the parts of a batch, the sum is the batch's gradient.

    Args:
        wrote: is called after each write into a gradient, with the layer and the parameter's name.
            A parameter used in several places is written several times.
    """
    if _gradients.get() is not None:
        yield
        return
    current = Gradients(wrote=wrote)
    token = _gradients.set(current)
    try:
        yield
    finally:
        _gradients.reset(token)
        current.written.clear()  # as in ``at_step``


@contextmanager
def gradients_of(network: "Layer") -> Iterator[dict[str, Array]]:
    """Collect the gradients of this thread's backward passes in separate arrays within the context,
    added up.

    The network's own gradients do not change, so several threads may run backward passes of one
    network at once:

        with gradients_of(model) as gradients:
            model.backward(dy, cache)
        optimizer.update(model.named_parameters(), gradients)

    Returns:
        The gradients by parameter path. The dictionary is filled when the block ends.
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
