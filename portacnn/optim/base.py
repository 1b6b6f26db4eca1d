"""``Optimizer``: learning rate, weight decay, step counts, and state per parameter."""

import json
from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any, ClassVar

from portacnn.arguments import AnswersKeywords, not_negative, plain
from portacnn.errors import ArgumentError, ShapeError, StateError
from portacnn.flat import Flat, Named, runs
from portacnn.ops.dispatch import check_arrays
from portacnn.optim.groups import Groups, checked_groups
from portacnn.optim.state import checked_state, on_host
from portacnn.runtime import Array, backend_of, where
from portacnn.selection import Selection, name_patterns, selector


class Optimizer(AnswersKeywords):
    """Base class of the optimizers: a learning rate, weight decay, step counts, and state per
    parameter.

    Args:
        lr: the learning rate, 0 or more.
        weight_decay: factor of the L2 penalty's gradient, or of decoupled decay, depending on the
            optimizer.
        no_decay: parameters without weight decay (see ``Selection``), whatever their group says.
        groups: by pattern (see ``selector``), {"lr_factor": a factor of the learning rate,
            "weight_decay": instead of the optimizer's}; either may be left out. The first pattern
            that matches a parameter counts.

    Attributes:
        steps: number of updates made. ``counts``: number of updates per parameter, by key.
        state: for each of ``slots``, an array per parameter, of its shape, by the parameter's key.

    Raises:
        ArgumentError: if an argument is out of range.
    """

    known: ClassVar[dict[str, type["Optimizer"]]] = {}
    """Every optimizer class by name, for reading optimizers from files."""

    slots: tuple[str, ...] = ()

    def __init_subclass__(cls) -> None:
        Optimizer.known[cls.kind()] = cls

    @classmethod
    def kind(cls) -> str:
        """Return the class's name in files: the bare name for classes of this package, else module
        and name."""
        return (
            cls.__name__
            if cls.__module__.startswith(f"{__package__}.")
            else f"{cls.__module__}.{cls.__qualname__}"
        )

    def __init__(
        self,
        lr: float,
        weight_decay: float = 0.0,
        no_decay: Selection = (),
        groups: Groups | None = None,
    ) -> None:
        self.lr = lr
        self.weight_decay = not_negative("weight_decay", weight_decay)
        self.no_decay = no_decay if callable(no_decay) else name_patterns(no_decay)
        self.groups = checked_groups(groups)
        self.steps = 0
        self.counts: dict[str, int] = {}
        self.state: dict[str, dict[str, Array]] = {slot: {} for slot in self.slots}
        # by key, for the keys seen so far
        self._decay: dict[str, float] = {}
        self._factor: dict[str, float] = {}
        self._spared: set[str] = set()  # those that ``no_decay`` selects
        # by slot: the flat buffer of the state, if the parameters are in one
        self._flat: dict[str, Flat] = {}
        self._took_part: list[str] = []  # the keys of the last update

    @property
    def lr(self) -> float:
        """The learning rate. It may be set between steps. Raises ArgumentError if the value is not
        a finite number of 0 or more."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = not_negative("lr", value)

    def update(
        self,
        params: Mapping[str, Array],
        grads: Mapping[str, Array],
        ok: Array | None = None,
        *,
        lr: Any = None,
        count: Any = None,
    ) -> None:
        """Run one step: change every parameter in place.

        Parameters that lie in one array, as a network's do, are updated together.

        Args:
            params: arrays by key.
            grads: their gradients, by the same keys. A parameter without a gradient is not changed.
            ok: 0-dimensional boolean array. If it is false, parameters and state are not changed.
                The counts are kept on the host, which cannot see ``ok``, and increase anyway.
            lr: learning rate of this step only, instead of ``self.lr``: a number, or a
                0-dimensional float64 array.
            count: number of this update, ``steps + 1``, if the caller counts with ``advance``
                afterwards. It may be a 0-dimensional int64 array. None counts here.

        Raises:
            ArgumentError: if params and grads have no key in common.
            ShapeError, ArrayError: if a gradient differs from its parameter in shape or kind, or an
                array holds integers.
            StateError: if a parameter has another shape than before.
        """
        keys = [key for key in params if key in grads]
        if not keys:
            if grads:
                raise ArgumentError(
                    f"params and grads have no key in common: {', '.join(params)} and "
                    f"{', '.join(grads)}"
                )
            return
        for key in keys:
            if tuple(grads[key].shape) != tuple(params[key].shape):
                shapes = f"{tuple(params[key].shape)}, its gradient {tuple(grads[key].shape)}"
                raise ShapeError(f"parameter {key} has shape {shapes}", type(self).__name__)
            for arrays in self.state.values():
                if key in arrays and tuple(arrays[key].shape) != tuple(params[key].shape):
                    raise StateError(
                        f"{key} has shape {tuple(params[key].shape)}, but its state has "
                        f"{tuple(arrays[key].shape)}: the network was changed; make a new "
                        "optimizer",
                        type(self).__name__,
                    )
            if key not in self.counts:
                check_arrays(
                    type(self).__name__, **{key: params[key], f"gradient of {key}": grads[key]}
                )
        self.check(params)
        # keys that one call of the rule can take
        alike: dict[tuple[float, float, int], list[str]] = {}
        with where(params[keys[0]]):
            for key in keys:
                if key not in self.counts:
                    # first: if memory runs out here, the key is still unknown
                    self._make_state(key, params, keys)
                    self.counts[key] = 0
                late = self.steps - self.counts[key]
                alike.setdefault((self._decay[key], self._factor[key], late), []).append(key)
            number = self.steps + 1 if count is None else count
            rate = self.lr if lr is None else lr
            for (decay, factor, late), group in alike.items():
                p, g, state = self._together(group, params, grads)
                own = number - late if late else number
                own_rate = rate if factor == 1.0 else rate * factor
                self.apply(p, g, state, own, lr=own_rate, weight_decay=decay, ok=ok)
        self._took_part = keys
        if count is None:
            self.advance()

    def advance(self) -> None:
        """Count one more update of the parameters of the last ``update`` that was given a ``count``
        or was replayed."""
        counts = self.counts | {key: self.counts[key] + 1 for key in self._took_part}
        self.steps, self.counts = self.steps + 1, counts  # together, whatever may interrupt

    def _make_state(
        self,
        key: str,
        params: Mapping[str, Array],
        keys: Iterable[str],
        first: Mapping[str, Array] | None = None,
    ) -> None:
        """Create the state of a parameter, from ``first`` (by slot) if given; laid out as the
        parameters are.

        Args:
            keys: those that have state by the end of this update: frozen ones need no memory.
        """
        flat = params.flats[0] if isinstance(params, Named) and len(params.flats) == 1 else None
        for slot, arrays in self.state.items():
            fresh = self.fresh(slot, params[key]) if first is None else first[slot]
            if flat is not None:
                own = self._flat.get(slot)
                if own is None or own.family is not flat.family or key not in own.views:
                    own = self._laid_out(slot, flat, keys)
                own.views[key][...] = fresh
                fresh = own.views[key]
            elif first is not None:
                fresh = backend_of(fresh).xp.asarray(fresh, copy=True)
            arrays[key] = fresh

    def _laid_out(self, slot: str, flat: Flat, keys: Iterable[str]) -> Flat:
        """Return a new flat buffer for the state of these keys, and of those that have one in the
        buffer so far: that moves."""
        before, arrays = self._flat.get(slot), self.state[slot]
        held = before.views if before is not None and before.family is flat.family else {}
        made = flat.like([*keys, *held])
        for key, view in held.items():
            made.views[key][...] = view
        self._flat[slot] = made
        arrays |= {key: made.views[key] for key, view in held.items() if arrays.get(key) is view}
        return made

    def _together(
        self, keys: list[str], params: Mapping[str, Array], grads: Mapping[str, Array]
    ) -> tuple[list[Array], list[Array], dict[str, list[Array]]]:
        """Return parameters, gradients and state as matching lists: flat stretches of memory if all
        lie alike."""
        if (
            isinstance(params, Named)
            and isinstance(grads, Named)
            and len(params.flats) == len(grads.flats) == 1
        ):
            p, g = params.flats[0], grads.flats[0]
            state = {slot: self._flat[slot] for slot in self.slots if slot in self._flat}
            alike = all(flat.family is p.family for flat in (g, *state.values())) and len(
                state
            ) == len(self.slots)
            ours = all(
                self.state[slot][key] is flat.views.get(key)
                for slot, flat in state.items()
                for key in keys
            )
            if alike and ours:
                stretches = runs(keys, p)
                return (
                    [p.stretch(names) for names in stretches],
                    [g.stretch(names) for names in stretches],
                    {
                        slot: [flat.stretch(names) for names in stretches]
                        for slot, flat in state.items()
                    },
                )
        return (
            [params[key] for key in keys],
            [grads[key] for key in keys],
            {slot: [arrays[key] for key in keys] for slot, arrays in self.state.items()},
        )

    def check(self, params: Mapping[str, Array]) -> None:
        """Determine weight decay and learning rate of these parameters; nothing else changes.

        Raises:
            ArgumentError: if a name in ``no_decay`` or ``groups`` matches none of them.
        """
        new = [key for key in params if key not in self._decay]
        if not new:
            return
        if not self._decay:
            named = () if callable(self.no_decay) else self.no_decay
            for word, patterns in (("no_decay", named), ("groups", tuple(self.groups))):
                for pattern in patterns:
                    if not any(selector(pattern)(key, params[key]) for key in params):
                        raise ArgumentError(
                            f"{word}: {pattern!r} matches none of the parameters "
                            f"{', '.join(params)}"
                        )
        spared = selector(self.no_decay)
        choices = [(selector(pattern), group) for pattern, group in self.groups.items()]
        decay, factor = {}, {}
        for key in new:
            own = next((group for chosen, group in choices if chosen(key, params[key])), {})
            factor[key] = own.get("lr_factor", 1.0)
            decay[key] = (
                0.0 if spared(key, params[key]) else own.get("weight_decay", self.weight_decay)
            )
        self._spared |= {key for key in new if spared(key, params[key])}
        self._factor |= factor
        self._decay |= decay

    def fresh(self, slot: str, p: Array) -> Array:
        """Return the initial state of a parameter: zeros."""
        return backend_of(p).xp.zeros_like(p)

    def apply(
        self,
        params: list[Array],
        grads: list[Array],
        state: dict[str, list[Array]],
        step: Any,
        **common: Any,
    ) -> None:
        """Apply the update rule to matching lists of arrays.

        Args:
            params, grads: parameters and their gradients.
            state: a list for every slot.
            step: number of this step for these parameters, from 1; an int, or a 0-dimensional int64
                array.
            common: ``lr``, ``weight_decay`` and ``ok``, which every op of ``ops.update`` takes.
        """
        raise NotImplementedError

    # --- copies and pickles -----------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle holds: the state as NumPy arrays, each with its
        backend."""
        state = {**vars(self), "_flat": {}}
        state["state"] = {
            slot: {key: on_host(array) for key, array in arrays.items()}
            for slot, arrays in self.state.items()
        }
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.state = {
            slot: {key: home.asarray(host) for key, (home, host) in arrays.items()}
            for slot, arrays in state["state"].items()
        }

    # --- to and from files ------------------------------------------------------------------------

    def description(self) -> dict[str, Any]:
        """Return the class and the constructor's arguments as JSON values; ``rebuild_optimizer``
        reads them.

        If ``no_decay`` is a function, it is described by the paths that it has selected.

        Raises:
            ArgumentError: if an argument has no attribute of its name, or JSON cannot hold it.
        """
        kind = type(self)
        try:
            arguments = {
                name: plain(getattr(self, name))
                for name in signature(kind).parameters
                if name != "no_decay"
            }
            json.dumps(arguments)
        except (AttributeError, TypeError) as error:
            raise ArgumentError(f"cannot be saved: {error}", kind.__name__) from error
        spared: dict[str, list[str]] = (
            {"paths": [key for key in self._decay if key in self._spared]}
            if callable(self.no_decay)
            else {"patterns": list(self.no_decay)}
        )
        return {"class": self.kind(), "arguments": arguments, "no_decay": spared}

    def state_dict(self) -> dict[str, Any]:
        """Return copies of everything that later steps depend on, except the constructor's
        arguments.

        Returns:
            ``optimizer``, the class's name; ``lr``; ``steps``; ``counts``, by key; and ``arrays``,
            NumPy arrays by slot and key, such as "velocity.conv1.weight". JSON can hold everything
            but the arrays.
        """
        return {
            "optimizer": type(self).__name__,
            "lr": self.lr,
            "steps": self.steps,
            "counts": {
                key: count for key, count in self.counts.items() if count
            },  # 0: its first update was interrupted
            "arrays": {
                f"{slot}.{key}": backend_of(array).to_host(array)
                for slot, arrays in self.state.items()
                for key, array in arrays.items()
                if self.counts[key]
            },
        }

    def load_state_dict(self, state: Mapping[str, Any], params: Mapping[str, Array]) -> None:
        """Load a state, so that the next update continues from where ``state_dict`` was called.

        Args:
            state: from ``state_dict`` of an optimizer made with the same arguments.
            params: the parameters that ``update`` will get. The state moves to their devices and
                takes their dtypes.

        Raises:
            ModelFormatError: if it is another optimizer's state or does not fit these parameters.
                Nothing has changed then.
        """
        lr, steps, counts, loaded = checked_state(type(self).__name__, self.slots, state, params)
        self.lr, self.steps, self.counts = lr, steps, counts
        for own in self.state.values():
            for key in [key for key in own if key not in counts]:
                del own[key]
        for key, first in loaded.items():
            if any(key not in own for own in self.state.values()):
                self._make_state(key, params, counts, first)
            else:
                for slot, array in first.items():
                    self.state[slot][key][...] = array
