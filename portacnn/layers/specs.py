"""Plain data about a layer: its declared parameters and buffers, and its places in the network."""

from typing import NamedTuple

from portacnn.init import Initializer

Shape = tuple[int, ...]
"""The shape of one sample: (C, H, W) or (F,)."""


class Parameter(NamedTuple):
    """A parameter declared by ``infer``, before its array exists."""

    shape: Shape
    init: Initializer
    fan_in: int
    fan_out: int


class Buffer(NamedTuple):
    """A buffer declared by ``infer``: state that is not trained. All elements start with the same
    value."""

    shape: Shape
    value: float
    dtype: str | None  # None: the network's
    optional: bool  # whether a state to load may lack it; the buffer then keeps its value


class Place(NamedTuple):
    """One place of a layer in its network, and the shapes of one sample there."""

    path: str
    input_shape: Shape
    output_shape: Shape
