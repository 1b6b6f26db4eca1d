"""Optimizers. Each updates the arrays of the parameters in place. The update rules are ops, in
``ops.update``.

As in the tutorials, ``optimizer.update(params, grads)`` takes two dictionaries with the same keys.
State (velocities, running means) is stored by key and created when a key is first used. Rules,
names and defaults are those of torch.optim.

``groups`` sets learning rate and weight decay for parameters, by patterns of their paths:
``SGD(0.01, groups={"fc.*": {"lr_factor": 10.0, "weight_decay":
0.0}})``. If several patterns match a parameter, the first one is used. ``layerwise`` makes such
groups.

``no_decay`` selects the parameters without weight decay, for example ``AdamW(weight_decay=0.05,
no_decay=biases_and_norms)`` or ``SGD(0.1, weight_decay=5e-4, no_decay=("bias", "bn*"))``.

    >>> import numpy as np
    >>> w = np.array([1.0, 2.0])
    >>> optimizer = SGD(lr=0.1)
    >>> optimizer.update({"w": w}, {"w": np.array([10.0, 0.0])})
    >>> w.tolist()
    [0.0, 2.0]
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from glob import escape
from inspect import signature
from typing import Any, ClassVar

from portacnn import ops
from portacnn.arguments import (
    AnswersKeywords,
    flag,
    fraction,
    keyword_problem,
    not_negative,
    plain,
    positive,
    told,
    whole,
)
from portacnn.errors import ArgumentError, ModelFormatError, ShapeError, StateError
from portacnn.flat import Flat, Named, runs
from portacnn.ops.dispatch import check_arrays
from portacnn.ops.update import count_as_float
from portacnn.runtime import Array, Backend, backend_of, taken, where
from portacnn.selection import Selection, name_patterns, selector

Groups = Mapping[str, Mapping[str, float]]
"""Options of parameters by pattern, see ``Optimizer``."""


def biases_and_norms(path: str, array: Array) -> bool:
    """Return whether a parameter has at most one axis, as biases and the weights of normalizations
    have."""
    return array.ndim <= 1


@dataclass(frozen=True)
class Paths:
    """A selection of parameters by their whole paths: the result of any selection for one
    network."""

    paths: tuple[str, ...]

    def __call__(self, path: str, array: Array) -> bool:
        return path in self.paths


def layerwise(model: Any, factor: float) -> dict[str, dict[str, float]]:
    """Return ``groups`` with a learning rate for each layer: those near the input learn slower.

    The model's last child that has parameters has the full learning rate, the one before it
    ``factor`` of that, the next ``factor`` squared, and so on (Howard and Ruder, 2018).

        >>> from portacnn import SimpleConvNet
        >>> net = SimpleConvNet((1, 8, 8), {"filter_size": 3}, device="cpu")
        >>> for pattern, group in layerwise(net, 0.5).items():
        ...     print(pattern, group["lr_factor"])
        conv1.* 0.25
        fc1.* 0.5
        fc2.* 1.0

    Args:
        model: a built network, whose children's names are the first parts of their paths.
        factor: above 0.

    Raises:
        ArgumentError: if the factor is out of range.
    """
    factor = positive("factor", factor)
    names = list(dict.fromkeys(path.partition(".")[0] for path in model.named_parameters()))
    return {
        f"{escape(name)}.*": {"lr_factor": factor**depth}
        for depth, name in zip(reversed(range(len(names))), names, strict=True)
    }


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
        """Return the class's name in files: the bare name for classes of this module, else module
        and name."""
        return (
            cls.__name__ if cls.__module__ == __name__ else f"{cls.__module__}.{cls.__qualname__}"
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
        self.groups = _checked_groups(groups)
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
            slot: {
                key: (_home(array), _home(array).to_host(array)) for key, array in arrays.items()
            }
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
        where = type(self).__name__
        lacking = [
            name for name in ("optimizer", "lr", "steps", "counts", "arrays") if name not in state
        ]
        if lacking:
            raise ModelFormatError(
                f"it is not an optimizer's state: {', '.join(lacking)} missing", where
            )
        if state["optimizer"] != where:
            raise ModelFormatError(
                f"expected the state of {where}, got that of {state['optimizer']}", where
            )
        counts, arrays = state["counts"], state["arrays"]
        for name in ("counts", "arrays"):
            if not isinstance(state[name], Mapping):
                raise ModelFormatError(
                    f"{name} must be a dictionary by key, got {told(state[name])}", where
                )
        shapes = {
            f"{slot}.{key}": params[key].shape
            for slot in self.slots
            for key in counts
            if key in params
        }
        problems = {
            "unknown parameters": [key for key in counts if key not in params],
            "missing": [name for name in shapes if name not in arrays],
            "unexpected": [name for name in arrays if name not in shapes],
            "no NumPy array": [
                name for name, array in arrays.items() if not hasattr(array, "shape")
            ],
            "of another shape": [
                f"{name} {tuple(arrays[name].shape)} (expected {tuple(shape)})"
                for name, shape in shapes.items()
                if hasattr(arrays.get(name), "shape") and tuple(arrays[name].shape) != tuple(shape)
            ],
        }
        if any(problems.values()):
            listed = "; ".join(
                f"{what}: {', '.join(names)}" for what, names in problems.items() if names
            )
            raise ModelFormatError(f"the state does not fit these parameters. {listed}", where)
        try:
            lr, steps = not_negative("lr", state["lr"]), whole("steps", state["steps"], 0)
            counts = {
                key: whole(f"the count of {key}", count, 1, most=steps)
                for key, count in counts.items()
            }
        except ArgumentError as error:
            raise ModelFormatError(error.message, where) from error
        loaded: dict[str, dict[str, Array]] = {}
        for key in counts if self.slots else ():
            p = params[key]
            home = _home(p)
            names = {slot: f"{slot}.{key}" for slot in self.slots}
            loaded[key] = {
                slot: taken(home, arrays[name], p.dtype, f"{type(self).__name__}: {name}")
                for slot, name in names.items()
            }
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


def _checked_groups(groups: Any) -> dict[str, dict[str, float]]:
    """Return a copy of ``groups``. Raises ArgumentError for what is no such mapping."""
    if groups is None:
        return {}
    example = '{"fc.*": {"lr_factor": 10.0, "weight_decay": 0.0}}'
    if not isinstance(groups, Mapping) or not all(
        isinstance(pattern, str) and isinstance(group, Mapping) for pattern, group in groups.items()
    ):
        raise ArgumentError(f"groups must be options by pattern, {example}, got {told(groups)}")
    for pattern, group in groups.items():
        if unknown := [name for name in group if name not in ("lr_factor", "weight_decay")]:
            raise ArgumentError(
                f"groups[{pattern!r}]: unknown option {unknown[0]!r}; known are lr_factor and "
                f"weight_decay, as in {example}"
            )
    return {
        pattern: {
            name: not_negative(f"groups[{pattern!r}]: {name}", value)
            for name, value in group.items()
        }
        for pattern, group in groups.items()
    }


def _home(array: Array) -> Backend:
    """Return an array's backend, on the array's own device."""
    return replace(backend_of(array), device=array.device)


class SGD(Optimizer):
    """Stochastic gradient descent, as torch.optim.SGD.

    p -= lr * g. With momentum: v = momentum * v + g; p -= lr * v. The first v is g.

    Args:
        lr: the learning rate.
        momentum: share of the velocity that is kept, 0 <= momentum < 1; 0 stores no velocity.
        dampening: share of the gradient that is not added to the velocity.
        nesterov: use Nesterov's momentum: p -= lr * (g + momentum * v).
        weight_decay: factor of the L2 penalty. ``no_decay``: the parameters without it.
        groups: learning rates and weight decay by pattern, see ``Optimizer``.

    Raises:
        ArgumentError: if a number is out of range, or nesterov is used without momentum or with
            dampening.
    """

    def __init__(
        self,
        lr: float = 0.01,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        no_decay: Selection = (),
        groups: Groups | None = None,
    ) -> None:
        self.momentum, self.dampening = (
            fraction("momentum", momentum),
            fraction("dampening", dampening),
        )
        self.nesterov = flag("nesterov", nesterov)
        if nesterov and (not momentum or dampening):
            raise ArgumentError(
                f"nesterov needs momentum above 0 and no dampening, got momentum={momentum!r}, "
                f"dampening={dampening!r}"
            )
        self.slots = ("velocity",) if self.momentum else ()
        super().__init__(lr, weight_decay, no_decay, groups)

    def apply(
        self,
        params: list[Array],
        grads: list[Array],
        state: dict[str, list[Array]],
        step: Any,
        **common: Any,
    ) -> None:
        if not self.momentum:
            ops.sgd_update(params, grads, **common)
            return
        rates = {"momentum": self.momentum, "dampening": self.dampening, "nesterov": self.nesterov}
        first = step == 1 if self.dampening else False  # else it makes no difference
        ops.momentum_update(params, grads, state["velocity"], **rates, first=first, **common)


class Momentum(SGD):
    """``SGD`` under the tutorials' name, with momentum 0.9: v = momentum * v + g; p -= lr * v."""

    def __init__(
        self,
        lr: float = 0.01,
        momentum: float = 0.9,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        no_decay: Selection = (),
        groups: Groups | None = None,
    ) -> None:
        super().__init__(lr, momentum, dampening, nesterov, weight_decay, no_decay, groups)


class AdaGrad(Optimizer):
    """AdaGrad (Duchi, Hazan and Singer, 2011), as torch.optim.Adagrad.

    s += g^2; p -= lr * g / (sqrt(s) + eps).

    Args:
        lr: the learning rate. At a parameter's step t (from 1) it is lr / (1 + (t - 1) * lr_decay).
        lr_decay: see lr.
        weight_decay: factor of the L2 penalty. ``no_decay``: the parameters without it.
        groups: learning rates and weight decay by pattern, see ``Optimizer``.
        initial_accumulator_value: initial value of s.
        eps: avoids division by 0.

    Raises:
        ArgumentError: if a number is out of range.
    """

    slots = ("square_sum",)

    def __init__(
        self,
        lr: float = 0.01,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        no_decay: Selection = (),
        groups: Groups | None = None,
    ) -> None:
        super().__init__(lr, weight_decay, no_decay, groups)
        self.lr_decay = not_negative("lr_decay", lr_decay)
        self.initial_accumulator_value = not_negative(
            "initial_accumulator_value", initial_accumulator_value
        )
        self.eps = not_negative("eps", eps)

    def fresh(self, slot: str, p: Array) -> Array:
        """Return the initial state of a parameter: ``initial_accumulator_value``."""
        return backend_of(p).xp.full_like(p, self.initial_accumulator_value)

    def apply(
        self,
        params: list[Array],
        grads: list[Array],
        state: dict[str, list[Array]],
        step: Any,
        **common: Any,
    ) -> None:
        if self.lr_decay:
            common["lr"] = common["lr"] / (1.0 + (count_as_float(step) - 1.0) * self.lr_decay)
        ops.adagrad_update(params, grads, state["square_sum"], eps=self.eps, **common)


class RMSprop(Optimizer):
    """RMSprop (Hinton's lecture 6e), as torch.optim.RMSprop.

    s = alpha * s + (1 - alpha) * g^2; p -= lr * g / (sqrt(s) + eps).

    Args:
        lr: the learning rate.
        alpha: share of the running means that is kept, 0 <= alpha < 1.
        eps: avoids division by 0.
        weight_decay: factor of the L2 penalty. ``no_decay``: the parameters without it.
        groups: learning rates and weight decay by pattern, see ``Optimizer``.
        momentum: share of the velocity that is kept; 0 stores no velocity.
        centered: divide by the standard deviation, with the mean subtracted (Graves, 2013).

    Raises:
        ArgumentError: if a number is out of range.
    """

    def __init__(
        self,
        lr: float = 0.01,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        no_decay: Selection = (),
        groups: Groups | None = None,
    ) -> None:
        self.alpha, self.momentum = fraction("alpha", alpha), fraction("momentum", momentum)
        self.eps, self.centered = not_negative("eps", eps), flag("centered", centered)
        self.slots = (
            "mean_square",
            *(("mean",) if self.centered else ()),
            *(("velocity",) if self.momentum else ()),
        )
        super().__init__(lr, weight_decay, no_decay, groups)

    def apply(
        self,
        params: list[Array],
        grads: list[Array],
        state: dict[str, list[Array]],
        step: Any,
        **common: Any,
    ) -> None:
        rates = {"alpha": self.alpha, "eps": self.eps, "momentum": self.momentum}
        slots = (state["mean_square"], state.get("mean"), state.get("velocity"))
        ops.rmsprop_update(params, grads, *slots, **rates, **common)


class Adam(Optimizer):
    """Adam (Kingma and Ba, 2015), as torch.optim.Adam.

    m = beta1 * m + (1 - beta1) * g; s = beta2 * s + (1 - beta2) * g^2; at step t, from 1, p -= lr *
    (m / (1 - beta1^t)) / (sqrt(s / (1 - beta2^t)) + eps).

        >>> Adam(lr=0.01).lr
        0.01

    Args:
        lr: the learning rate.
        beta1, beta2: shares of the running means of gradients and of their squares that are kept.
        eps: avoids division by 0.
        weight_decay: factor of the L2 penalty, or of AdamW's decay with ``decoupled_weight_decay``.
            ``no_decay``: the parameters without it.
        groups: learning rates and weight decay by pattern, see ``Optimizer``.

    Raises:
        ArgumentError: if a number is out of range.
    """

    slots = ("mean", "mean_square")

    def __init__(
        self,
        lr: float = 0.001,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        no_decay: Selection = (),
        groups: Groups | None = None,
    ) -> None:
        super().__init__(lr, weight_decay, no_decay, groups)
        self.beta1, self.beta2 = fraction("beta1", beta1), fraction("beta2", beta2)
        self.eps = not_negative("eps", eps)
        self.decoupled_weight_decay = flag("decoupled_weight_decay", decoupled_weight_decay)

    def apply(
        self,
        params: list[Array],
        grads: list[Array],
        state: dict[str, list[Array]],
        step: Any,
        **common: Any,
    ) -> None:
        rates = {
            "beta1": self.beta1,
            "beta2": self.beta2,
            "eps": self.eps,
            "decoupled": self.decoupled_weight_decay,
        }
        ops.adam_update(
            params, grads, state["mean"], state["mean_square"], step=step, **rates, **common
        )


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019), as torch.optim.AdamW.

    Before Adam's update, p -= lr * weight_decay * p. Arguments: see ``Adam``.
    """

    def __init__(
        self,
        lr: float = 0.001,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        no_decay: Selection = (),
        groups: Groups | None = None,
    ) -> None:
        super().__init__(lr, beta1, beta2, eps, weight_decay, True, no_decay, groups)


OPTIMIZERS: dict[str, type[Optimizer]] = {
    "sgd": SGD,
    "momentum": Momentum,
    "adagrad": AdaGrad,
    "rmsprop": RMSprop,
    "adam": Adam,
    "adamw": AdamW,
}


def make_optimizer(
    name: "str | Optimizer", param: Mapping[str, Any] | None = None, *, lr: float | None = None
) -> Optimizer:
    """Return an optimizer by its name; an ``Optimizer`` is returned as it is.

    Args:
        name: a key of ``OPTIMIZERS``, in any case, or an ``Optimizer``.
        param: the constructor's arguments.
        lr: the learning rate, if ``param`` does not say it.

    Raises:
        ArgumentError: if the name or an argument is unknown, a value is out of range, ``lr`` and
            ``param`` differ, or an ``Optimizer`` is given together with arguments.
    """
    if isinstance(name, Optimizer):
        if param or lr is not None:
            kind, word = type(name).__name__, "optimizer_param" if lr is None else "lr"
            raise ArgumentError(
                f"{word} goes with an optimizer's name, got it together with a made {kind}; give "
                f"it to {kind}(...) instead"
            )
        return name
    if not isinstance(name, str) or name.lower() not in OPTIMIZERS:
        raise ArgumentError(f"unknown optimizer {name!r}; known are {', '.join(OPTIMIZERS)}")
    if param is not None and not isinstance(param, Mapping):
        raise ArgumentError(
            f'optimizer_param must be a dictionary such as {{"lr": 0.01}}, got {param!r}'
        )
    arguments = dict(param or {})
    if lr is not None and arguments.setdefault("lr", lr) != lr:
        raise ArgumentError(
            f"lr is {told(lr)}, but optimizer_param says {told(arguments['lr'])}; pass one of them"
        )
    chosen = OPTIMIZERS[name.lower()]
    if problem := keyword_problem(chosen, map(str, arguments), chosen.__name__):
        raise ArgumentError(problem)
    return chosen(**arguments)


def rebuild_optimizer(described: Any) -> Optimizer:
    """Return the optimizer that ``Optimizer.description`` described. Raises the constructor's
    errors."""
    kind = Optimizer.known.get(described["class"])
    if kind is None:
        raise ModelFormatError(
            f"unknown optimizer {described['class']!r}; import the module that defines it first"
        )
    arguments = dict(described["arguments"])
    if "no_decay" in signature(kind).parameters:
        spared = described["no_decay"]
        by_paths = "paths" in spared
        arguments["no_decay"] = (
            Paths(tuple(spared["paths"])) if by_paths else tuple(spared["patterns"])
        )
    return kind(**arguments)
