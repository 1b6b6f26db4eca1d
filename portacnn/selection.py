"""Select parameters by patterns of their paths, or by a function."""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from itertools import combinations

from portacnn.errors import ArgumentError
from portacnn.runtime import Array

Selection = Callable[[str, Array], bool] | str | Iterable[str]
"""A selection of parameters: a function of a parameter's path and array, or patterns of names (see
``selector``)."""


def selector(what: Selection) -> Callable[[str, Array], bool]:
    """Return a selection as a function of path and array. A function is returned as it is.

    A pattern may contain the shell's ``*``, ``?`` and ``[...]``. It selects a parameter if it
    matches its path, or some consecutive names in it: "bias" selects conv1.bias, "bn*" everything
    in layer1.0.bn2, "layer1.0" everything in that block, "fc?.weight" fc1.weight.

        >>> import numpy as np
        >>> selector("bn*")("layer1.0.bn2.weight", np.zeros(3))
        True

    Raises:
        ArgumentError: if it is neither a function nor names.
    """
    if callable(what):
        return what
    patterns = name_patterns(what)

    def matches(path: str, array: Array) -> bool:
        parts = path.split(".")
        runs = {
            ".".join(parts[first:last]) for first, last in combinations(range(len(parts) + 1), 2)
        }
        return any(fnmatchcase(run, pattern) for run in runs for pattern in patterns)

    return matches


def name_patterns(what: str | Iterable[str]) -> tuple[str, ...]:
    """Return one pattern or several as a tuple. Raises ArgumentError if they are not text."""
    patterns = (
        (what,) if isinstance(what, str) else tuple(what) if isinstance(what, Iterable) else (what,)
    )
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ArgumentError(
            "parameters are selected by a function of (path, array) or by name patterns, got "
            f"{what!r}"
        )
    return patterns
