"""Plain data about a layer: what it declares of its state, and the places where it stands."""

from typing import NamedTuple

from portacnn.init import Initializer

Shape = tuple[int, ...]
"""The shape of one sample: (C, H, W) or (F,)."""


class Parameter(NamedTuple):
    """A parameter as ``infer`` declares it, before its array exists."""

    shape: Shape
    init: Initializer
    fan_in: int
    fan_out: int


class Buffer(NamedTuple):
    """A buffer as ``infer`` declares it: state that is not trained. All its elements start with the
    same value."""

    shape: Shape
    value: float
    dtype: str | None  # None: the network's
    optional: bool  # whether a state without it is complete; loading then leaves it as it is


class Place(NamedTuple):
    """One of the places where a layer stands in its network, and the shapes of one sample there."""

    path: str
    input_shape: Shape
    output_shape: Shape
