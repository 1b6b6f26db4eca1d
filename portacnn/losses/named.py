"""Losses by name, and as JSON for files."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from portacnn.arguments import plain, told
from portacnn.errors import ArgumentError, ModelFormatError
from portacnn.losses.base import Loss
from portacnn.losses.centers import CenterDetection
from portacnn.losses.classes import CrossEntropy, Dice, Focal
from portacnn.losses.embeddings import NTXent, Triplet
from portacnn.losses.labels import BCEWithLogits
from portacnn.losses.several import PerOutput
from portacnn.losses.sums import Sum
from portacnn.losses.values import L1, MSE, Huber, SmoothL1

LOSSES: dict[str, Callable[[], Loss]] = {
    "cross_entropy": CrossEntropy,
    "bce_with_logits": BCEWithLogits,
    "mse": MSE,
    "l1": L1,
    "huber": Huber,
    "smooth_l1": SmoothL1,
    "dice": Dice,
    "focal": Focal,
    "nt_xent": NTXent,
    "triplet": Triplet,
}
"""The losses by name, with their default arguments."""

_KINDS: dict[str, type[Loss]] = {
    kind.__name__: kind
    for kind in (
        CrossEntropy,
        BCEWithLogits,
        MSE,
        L1,
        Huber,
        SmoothL1,
        Dice,
        Focal,
        NTXent,
        Triplet,
        CenterDetection,
        PerOutput,
        Sum,
    )
}


def named(what: str | Loss) -> Loss:
    """Return the loss called ``what``, or ``what`` if it is a ``Loss``. Raises ArgumentError if the
    name is unknown."""
    if isinstance(what, Loss):
        return what
    if not isinstance(what, str) or what not in LOSSES:
        if isinstance(what, type) and issubclass(what, Loss):
            raise ArgumentError(f"expected a loss, got its class; write {what.__name__}(...)")
        raise ArgumentError(
            f"unknown loss {told(what)}; known are {', '.join(LOSSES)}, or a portacnn.losses.Loss"
        )
    return LOSSES[what]()


def describe_loss(loss: Loss) -> dict[str, Any]:
    """Return a loss as JSON values: its class and its fields, including nested losses.

    Raises:
        ArgumentError: it is a custom loss, which files cannot store.
    """
    kind = type(loss)
    if _KINDS.get(kind.__name__) is not kind:
        raise ArgumentError(
            f"a file can store the losses {', '.join(_KINDS)}, got {kind.__qualname__}"
        )
    values = {field.name: getattr(loss, field.name) for field in fields(loss)}  # type: ignore[arg-type]
    return {
        "class": kind.__name__,
        "arguments": plain(
            values, lambda value: describe_loss(value) if isinstance(value, Loss) else None
        ),
    }


def rebuild_loss(described: Any) -> Loss:
    """Return the loss described by ``describe_loss``. Raises the constructor's errors."""
    if described["class"] not in _KINDS:
        raise ModelFormatError(f"unknown loss {told(described['class'])}; upgrade portacnn")

    def made(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(made(inner) for inner in value)
        return rebuild_loss(value) if isinstance(value, dict) else value

    return _KINDS[described["class"]](
        **{name: made(value) for name, value in described["arguments"].items()}
    )
