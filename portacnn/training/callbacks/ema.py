"""``EMA``: exponential moving averages of a network's weights."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from portacnn.arguments import as_int, flag, fraction
from portacnn.errors import ArgumentError, ModelFormatError, StateError
from portacnn.flat import Named
from portacnn.layers.state import check_state
from portacnn.models import Model
from portacnn.runtime import Array, HostArray, backend_of, is_float
from portacnn.training.callbacks.base import Callback

if TYPE_CHECKING:
    from portacnn.training.trainer import Trainer


class EMA(Callback):
    """Average the weights over the steps: average = decay * average + (1 - decay) * weights.

    Running statistics (batch norm) are averaged too. The averages begin with the weights at the
    first ``train()``. ``train`` leaves the trained weights in the model; ``copy_to`` and
    ``applied`` put the averages there. Averages need the memory of one more copy of the weights,
    and of a second one during an evaluation.

    Args:
        decay: weight of the old average, 0 <= decay < 1. Near 1 it averages over about 1 / (1 -
            decay) steps.
        warm_up: use at most (1 + n) / (10 + n) as the decay at step n, counted from 0, so that the
            random initial weights lose their effect quickly.
        evaluate: evaluate each epoch with the averages. Early stopping then keeps them as the best
            weights.

    Raises:
        ArgumentError: if an argument is out of range.
    """

    def __init__(
        self, decay: float = 0.999, *, warm_up: bool = True, evaluate: bool = True
    ) -> None:
        self.decay = fraction("decay", decay)
        self.warm_up = flag("warm_up", warm_up)
        self.evaluate = flag("evaluate", evaluate)
        self.updates = 0
        self._averages: tuple[Named, ...] = ()  # of parameters and of buffers, on the device
        self._loaded: dict[str, HostArray] = {}  # to be sent to the device
        self._pairs: list[tuple[Array, Array]] = []  # during ``train``: (average, weights)

    def on_train_begin(self, trainer: "Trainer") -> None:
        self._pairs = self._with_weights(trainer.model, begin=True)

    def on_train_end(self, trainer: "Trainer") -> None:
        self._pairs = []

    def on_update(self, trainer: "Trainer", ok: Array) -> None:
        n, xp = self.updates, trainer.backend.xp
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warm_up else self.decay
        for average, weights in self._pairs:
            if not is_float(xp, weights.dtype):  # a norm's number of batches
                average[...] = weights
                continue
            # 0 after a step that was not finite
            intake = xp.astype(ok, average.dtype) * (1.0 - decay)
            change = weights - average
            change *= intake
            average += change
        self.updates = n + 1

    def evaluating(self, trainer: "Trainer") -> AbstractContextManager[Any]:
        return self.applied(trainer.model) if self.evaluate else nullcontext()

    def copy_to(self, model: Model) -> None:
        """Write the averages into the model.

        Raises:
            StateError: if there are no averages yet, or they belong to another network.
        """
        pairs = self._with_weights(model)
        with model.home.active():
            for average, weights in pairs:
                weights[...] = average

    @contextmanager
    def applied(self, model: Model) -> Iterator[None]:
        """Set the averages as the model's weights within the context; restore its own weights at
        the end.

        Raises:
            StateError: as ``copy_to``.
        """
        pairs, home = self._with_weights(model), model.home
        with home.active():
            own = [home.xp.asarray(weights, copy=True) for _, weights in pairs]
        try:
            self.copy_to(model)
            yield
        finally:
            with home.active():
                for (_, weights), before in zip(pairs, own, strict=True):
                    weights[...] = before

    def _with_weights(self, model: Model, begin: bool = False) -> list[tuple[Array, Array]]:
        """Return pairs of averages and weights, arrays of as many elements as possible.

        Args:
            begin: begin with this model's weights if there are no averages yet.
        """
        weights = (model.named_parameters(), model.named_buffers())
        paths = [path for named in weights for path in named]
        known = [*self._loaded, *(path for named in self._averages for path in named)]
        if not known and not begin:
            raise StateError("there are no averages yet; they begin with the first train()", "EMA")
        if self._loaded:
            own = {path: tuple(array.shape) for named in weights for path, array in named.items()}
            check_state(own, self._loaded, "EMA")
        elif known and sorted(known) != sorted(paths):
            raise StateError("the averages belong to another network; make a new EMA", "EMA")
        if not known or self._loaded:
            loaded, home = self._loaded, model.home
            with home.active():
                self._averages = tuple(_copies(named, home.xp) for named in weights)
                for path, average in ((p, a) for named in self._averages for p, a in named.items()):
                    if loaded:
                        average[...] = home.asarray(loaded[path])
            self._loaded = {}
        return [
            pair
            for averages, named in zip(self._averages, weights, strict=True)
            for pair in zip(averages.wholes(), named.wholes(), strict=True)
        ]

    # --- checkpoints, copies ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the averages by path, and the options."""
        return {
            "decay": self.decay,
            "warm_up": self.warm_up,
            "updates": self.updates,
            **{f"average.{path}": value for path, value in self._on_host().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises:
            ArgumentError: if the options differ.
            ModelFormatError: if the state is invalid.
        """
        for name in ("decay", "warm_up"):
            if state.get(name) != getattr(self, name):
                raise ArgumentError(
                    f"the training run averages with {name}={state.get(name)!r:.80}, got "
                    f"{getattr(self, name)!r}; pass the same",
                    "EMA",
                )
        updates = as_int(state.get("updates"))
        if updates is None or updates < 0:
            raise ModelFormatError(
                f"the number of updates must be a whole number, got {state.get('updates')!r:.80}",
                "EMA",
            )
        loaded = {
            key.removeprefix("average."): value
            for key, value in state.items()
            if key.startswith("average.")
        }
        if not all(hasattr(value, "shape") for value in loaded.values()):
            raise ModelFormatError("the averages must be arrays", "EMA")
        self.updates = updates
        self._loaded, self._averages = {p: value.copy() for p, value in loaded.items()}, ()

    def _on_host(self) -> dict[str, HostArray]:
        return self._loaded or {
            path: backend_of(value).to_host(value)
            for named in self._averages
            for path, value in named.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_loaded": self._on_host(), "_averages": (), "_pairs": []}


def _copies(named: Named, xp: Any) -> Named:
    """Return copies of arrays, in the same memory layout."""
    if not named.flats:
        return Named({path: xp.asarray(value, copy=True) for path, value in named.items()})
    flats = [flat.like() for flat in named.flats]
    for copy, flat in zip(flats, named.flats, strict=True):
        copy.whole[...] = flat.whole
    return Named.of({path: flat.views[path] for flat in flats for path in flat.views}, flats)
