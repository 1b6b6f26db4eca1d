"""Optimizers. Each writes new values into the parameters' own arrays; the rules themselves are ops, in ``ops.update``.

As in the tutorials, ``optimizer.update(params, grads)`` takes two dictionaries with the same keys. State (velocities, running
means) is kept by key, and made when a key first comes.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any

from portacnn import ops
from portacnn.errors import ArgumentError
from portacnn.runtime import Array, backend_of


class Optimizer:
    """What every optimizer has: a learning rate, a count of steps, and state by name and parameter.

    Attributes:
        lr: the learning rate; may be set between steps.
        steps: how many updates were made.
        state: for each of ``slots``, an array like each parameter, by the parameter's key.
    """

    slots: tuple[str, ...] = ()

    def __init__(self, lr: float) -> None:
        self.lr = _positive("lr", lr)
        self.steps = 0
        self.state: dict[str, dict[str, Array]] = {slot: {} for slot in self.slots}

    def update(self, params: Mapping[str, Array], grads: Mapping[str, Array], ok: Array | None = None) -> None:
        """One step: change every parameter in place.

        Args:
            params: arrays by key.
            grads: their gradients, by the same keys; a parameter without one stays as it is.
            ok: a 0-dimensional boolean array; where it is false, parameters and state stay as they are.
        """
        keys = [key for key in params if key in grads]
        if not keys:
            return
        self.steps += 1
        for slot in self.state.values():
            for key in keys:
                if key not in slot:
                    slot[key] = backend_of(params[key]).xp.zeros_like(params[key])
        state = [[slot[key] for key in keys] for slot in self.state.values()]
        self.step([params[key] for key in keys], [grads[key] for key in keys], *state, ok=ok)

    def step(self, params: list[Array], grads: list[Array], *state: list[Array], ok: Array | None) -> None:
        """Apply the rule to lists of arrays that belong together."""
        raise NotImplementedError


class SGD(Optimizer):
    """Stochastic gradient descent: p -= lr * g."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__(lr)

    def step(self, params: list[Array], grads: list[Array], *state: list[Array], ok: Array | None) -> None:
        ops.sgd_update(params, grads, lr=self.lr, ok=ok)


class Momentum(Optimizer):
    """SGD with momentum, as torch.optim.SGD(momentum=...): v = momentum * v + g; p -= lr * v."""

    slots = ("velocity",)

    def __init__(self, lr: float = 0.01, momentum: float = 0.9) -> None:
        super().__init__(lr)
        self.momentum = _fraction("momentum", momentum)

    def step(self, params: list[Array], grads: list[Array], *state: list[Array], ok: Array | None) -> None:
        ops.momentum_update(params, grads, *state, lr=self.lr, momentum=self.momentum, ok=ok)


class Adam(Optimizer):
    """Adam (Kingma and Ba, 2015), as torch.optim.Adam."""

    slots = ("mean", "mean_square")

    def __init__(self, lr: float = 0.001, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> None:
        super().__init__(lr)
        self.beta1, self.beta2 = _fraction("beta1", beta1), _fraction("beta2", beta2)
        self.eps = _positive("eps", eps)

    def step(self, params: list[Array], grads: list[Array], *state: list[Array], ok: Array | None) -> None:
        rates = {"lr": self.lr, "beta1": self.beta1, "beta2": self.beta2, "eps": self.eps}
        ops.adam_update(params, grads, *state, **rates, step=self.steps, ok=ok)


OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": SGD, "momentum": Momentum, "adam": Adam}


def make_optimizer(name: "str | Optimizer", param: Mapping[str, Any] | None = None) -> Optimizer:
    """An optimizer by its name and its constructor's arguments; one that is made already is itself.

    Raises:
        ArgumentError: an unknown name, an argument the optimizer does not take, or a value without a meaning.
    """
    if isinstance(name, Optimizer):
        if param:
            raise ArgumentError(f"optimizer_param goes with an optimizer's name; {type(name).__name__} is made already")
        return name
    if not isinstance(name, str) or name.lower() not in OPTIMIZERS:
        raise ArgumentError(f"unknown optimizer {name!r}; known are {', '.join(OPTIMIZERS)}")
    kind = OPTIMIZERS[name.lower()]
    unknown = set(param or {}) - set(signature(kind).parameters)
    if unknown:
        raise ArgumentError(
            f"{kind.__name__} takes {', '.join(signature(kind).parameters)}; got {', '.join(sorted(unknown))}"
        )
    return kind(**(param or {}))


def _positive(name: str, value: float) -> float:
    if not isinstance(value, int | float) or not 0.0 <= value < float("inf"):
        raise ArgumentError(f"{name} must be a number of 0 or more, got {value!r}")
    return float(value)


def _fraction(name: str, value: float) -> float:
    if not isinstance(value, int | float) or not 0.0 <= value < 1.0:
        raise ArgumentError(f"{name} must lie in 0 <= {name} < 1, got {value!r}")
    return float(value)
