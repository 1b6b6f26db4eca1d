"""``Callbacks``: the callbacks of one training run, called in the order in which they were
given."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from portacnn.arguments import told
from portacnn.errors import ArgumentError, ModelFormatError
from portacnn.files import within
from portacnn.runtime import Array, HostArray
from portacnn.training.callbacks.base import Callback
from portacnn.training.early_stopping import EarlyStopping


class Callbacks:
    """Callbacks by unique name: the class name, with a number from the second on.

    Args:
        given: the callbacks.
        is_first: whether this process is rank 0, on which all are called. Others call those with
            ``every_rank``.

    Attributes:
        every_step: whether one of them needs the loss of each step.
        inside_step: whether one of them needs code inside each step.
        raised: whether the last ``train()`` stopped at an exception of a callback between two
            steps.

    Raises:
        ArgumentError: if one is not a ``Callback``, or occurs twice, or defines ``on_step_end``
            without ``every_step``.
    """

    def __init__(self, given: Iterable[Callback], is_first: bool = True) -> None:
        self.named: dict[str, Callback] = {}
        kinds: list[str] = []
        for each in given:
            kind = type(each).__name__
            if not isinstance(each, Callback):
                raise _not_callbacks(each)
            if any(each is other for other in self.named.values()):
                raise ArgumentError(f"callbacks has the same {kind} object twice; make two")
            if _defines(each, "on_step_end") and not each.every_step:
                raise ArgumentError(
                    "it defines on_step_end, which needs every_step = True in the class",
                    kind,
                )
            kinds.append(kind)
            number = kinds.count(kind)
            self.named[kind if number == 1 else f"{kind}-{number}"] = each
        # also of those not called here: all processes must read losses at the same steps
        self.every_step = any(each.every_step for each in self)
        self.inside_step = any(each.inside_step for each in self)
        self._called = [each for each in self if is_first or each.every_rank]
        self._updating = [each for each in self._called if _defines(each, "on_update")]
        self.raised = False

    def __iter__(self) -> Iterator[Callback]:
        return iter(self.named.values())

    @contextmanager
    def training(self, trainer: Any) -> Iterator[None]:
        """Call ``on_train_begin`` before the block, and ``on_train_end`` after it in any case."""
        self.raised = False
        with ExitStack() as stack:
            for each in self._called:
                each.on_train_begin(trainer)
                stack.callback(each.on_train_end, trainer)
            yield

    @contextmanager
    def evaluating(self, trainer: Any) -> Iterator[None]:
        """Enter the evaluation contexts of all callbacks."""
        with ExitStack() as stack:
            for each in self._called:
                stack.enter_context(each.evaluating(trainer))
            yield

    def epoch_begins(self, trainer: Any) -> None:
        with self._between_steps():
            for each in self._called:
                each.on_epoch_begin(trainer)

    def updated(self, trainer: Any, ok: Array) -> None:
        if self._updating:
            with self._between_steps():
                for each in self._updating:
                    each.on_update(trainer, ok)

    def step_ends(self, trainer: Any, loss: float) -> None:
        with self._between_steps():
            for each in self._called:
                if each.every_step:
                    each.on_step_end(trainer, loss)

    def epoch_ends(self, trainer: Any, figures: Mapping[str, Any]) -> None:
        with self._between_steps():
            for each in self._called:
                each.on_epoch_end(trainer, dict(figures))

    @contextmanager
    def _between_steps(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.raised = True
            raise

    # --- checkpoints ------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, HostArray], dict[str, dict[str, Any]]]:
        """Return all states: the arrays by callback and name, and the rest by callback.

        Raises:
            ArgumentError: if a file cannot store a state.
        """
        arrays: dict[str, HostArray] = {}
        rest: dict[str, dict[str, Any]] = {}
        for name, each in self.named.items():
            state = each.state_dict()
            own = {key for key, value in state.items() if hasattr(value, "shape")}
            arrays |= {f"{name}.{key}": state[key] for key in own}
            rest[name] = {key: value for key, value in state.items() if key not in own}
            try:
                json.dumps(rest[name])
            except (TypeError, ValueError) as error:
                raise ArgumentError(
                    f"state_dict must return NumPy arrays and JSON values: {error}", name
                ) from error
        return arrays, rest

    def load(self, arrays: Mapping[str, HostArray], rest: Mapping[str, Mapping[str, Any]]) -> None:
        """Load what ``state`` returned.

        Raises:
            ArgumentError: if the callbacks differ.
            ModelFormatError: if the states are invalid.
        """
        if not (
            isinstance(rest, Mapping) and all(isinstance(each, Mapping) for each in rest.values())
        ):
            raise ModelFormatError(f"callbacks must be states by name, got {told(rest)}")
        if rest.keys() != self.named.keys():
            raise ArgumentError(
                f"the training run has the callbacks {_listed(rest)}, got {_listed(self.named)}; "
                "pass the same kinds: resume(..., callbacks=[...])"
            )
        for name, each in self.named.items():
            each.load_state_dict({**rest[name], **within(name, arrays)})


def split(
    given: Any, stopping: EarlyStopping | int | None = None
) -> tuple[tuple[Any, ...], EarlyStopping | int | None]:
    """Return the callbacks, and early stopping, which may be among them.

    Raises:
        ArgumentError: if early stopping is given twice, or these are not callbacks.
    """
    if isinstance(given, Callback | EarlyStopping):
        given = (given,)
    if given is None:
        given = ()
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise _not_callbacks(given)
    given = tuple(given)
    found = [each for each in given if isinstance(each, EarlyStopping)]
    if len(found) + (stopping is not None) > 1:
        raise ArgumentError(
            "expected one EarlyStopping, got several: early_stopping=... or among the callbacks"
        )
    others = tuple(each for each in given if not isinstance(each, EarlyStopping))
    return others, found[0] if found else stopping


def _not_callbacks(given: Any) -> ArgumentError:
    """Return the error for what is neither a callback nor a list of them."""
    made = given.__name__ if isinstance(given, type) else "CSVLogger"
    return ArgumentError(
        "callbacks must be a list of portacnn.callbacks objects, such as "
        f"callbacks=[{made}(...)], got {told(given)}"
    )


def _defines(callback: Callback, method: str) -> bool:
    return getattr(type(callback), method) is not getattr(Callback, method)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"{name!s:.80}" for name in names) or "none"
