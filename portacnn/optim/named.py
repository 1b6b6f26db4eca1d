"""Optimizers by name, and from their descriptions in files."""

from collections.abc import Mapping
from inspect import signature
from typing import Any

from portacnn.arguments import keyword_problem, told
from portacnn.errors import ArgumentError, ModelFormatError
from portacnn.optim.base import Optimizer
from portacnn.optim.groups import Paths
from portacnn.optim.rules import SGD, AdaGrad, Adam, AdamW, Momentum, RMSprop

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
