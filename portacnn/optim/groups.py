"""Groups of parameters: learning rates and weight decay by patterns of their paths."""

from collections.abc import Mapping
from dataclasses import dataclass
from glob import escape
from typing import Any

from portacnn.arguments import not_negative, positive, told
from portacnn.errors import ArgumentError
from portacnn.runtime import Array

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


def checked_groups(groups: Any) -> dict[str, dict[str, float]]:
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
