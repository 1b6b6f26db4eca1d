"""The rules by which weights are first drawn. A rule takes a generator, the shape and the fans, and
gives host values.

The fans are the number of inputs that one output sees and the number of outputs that one input
reaches: C/G * KH * KW and O/G * KH * KW for a convolution of C channels to O in G groups (PyTorch's
fan_out counts all O), F and O for a linear map.
"""

from collections.abc import Callable, Sequence
from math import sqrt

import numpy as np

from portacnn.arguments import as_float, told
from portacnn.errors import ArgumentError
from portacnn.runtime import HostArray

Rule = Callable[[np.random.Generator, Sequence[int], int, int], HostArray]
Initializer = float | str | Rule


def normal(std: float) -> Rule:
    """Normal with mean 0 and this standard deviation."""
    return lambda rng, shape, fan_in, fan_out: std * rng.standard_normal(shape)


def uniform(bound: float) -> Rule:
    """Uniform within ``bound`` of 0."""
    return lambda rng, shape, fan_in, fan_out: _uniform(rng, shape, bound)


def constant(value: float) -> Rule:
    """The same value everywhere."""
    return lambda rng, shape, fan_in, fan_out: np.full(shape, value)


def he(rng: np.random.Generator, shape: Sequence[int], fan_in: int, fan_out: int) -> HostArray:
    """Normal, std sqrt(2 / fan_in), for layers before a ReLU (He et al., 2015, equation 10):
    activations keep their size."""
    return sqrt(2.0 / fan_in) * rng.standard_normal(shape)


def he_fan_out(
    rng: np.random.Generator, shape: Sequence[int], fan_in: int, fan_out: int
) -> HostArray:
    """Normal, std sqrt(2 / fan_out) (He et al., 2015, equation 14): gradients keep their size. That
    of torchvision's ResNets."""
    return sqrt(2.0 / fan_out) * rng.standard_normal(shape)


def he_uniform(
    rng: np.random.Generator, shape: Sequence[int], fan_in: int, fan_out: int
) -> HostArray:
    """Uniform with the spread of ``he``: within sqrt(6 / fan_in) of 0."""
    return _uniform(rng, shape, sqrt(6.0 / fan_in))


def he_uniform_fan_out(
    rng: np.random.Generator, shape: Sequence[int], fan_in: int, fan_out: int
) -> HostArray:
    """Uniform with the spread of ``he_fan_out``: within sqrt(6 / fan_out) of 0."""
    return _uniform(rng, shape, sqrt(6.0 / fan_out))


def xavier(rng: np.random.Generator, shape: Sequence[int], fan_in: int, fan_out: int) -> HostArray:
    """Normal, std sqrt(1 / fan_in), for layers before a sigmoid, in the tutorials' form of Glorot
    and Bengio, 2010."""
    return sqrt(1.0 / fan_in) * rng.standard_normal(shape)


def xavier_normal(
    rng: np.random.Generator, shape: Sequence[int], fan_in: int, fan_out: int
) -> HostArray:
    """Normal, std sqrt(2 / (fan_in + fan_out)): Glorot and Bengio's own variance (2010, equation
    12)."""
    return sqrt(2.0 / (fan_in + fan_out)) * rng.standard_normal(shape)


def xavier_uniform(
    rng: np.random.Generator, shape: Sequence[int], fan_in: int, fan_out: int
) -> HostArray:
    """Uniform within sqrt(6 / (fan_in + fan_out)) of 0 (Glorot and Bengio, 2010, equation 16)."""
    return _uniform(rng, shape, sqrt(6.0 / (fan_in + fan_out)))


def fan_in_uniform(
    rng: np.random.Generator, shape: Sequence[int], fan_in: int, fan_out: int
) -> HostArray:
    """Uniform within 1 / sqrt(fan_in) of 0: the default of PyTorch's Conv and Linear, weights and
    biases."""
    return _uniform(rng, shape, 1.0 / sqrt(fan_in))


def _uniform(rng: np.random.Generator, shape: Sequence[int], bound: float) -> HostArray:
    return rng.uniform(-bound, bound, shape)


_BY_NAME: dict[str, Rule] = {
    "he": he,
    "relu": he,
    "he_normal": he,
    "he_fan_out": he_fan_out,
    "he_uniform": he_uniform,
    "he_uniform_fan_out": he_uniform_fan_out,
    "xavier": xavier,
    "sigmoid": xavier,
    "xavier_normal": xavier_normal,
    "xavier_uniform": xavier_uniform,
    "default": fan_in_uniform,
    "zeros": constant(0.0),
    "ones": constant(1.0),
}


def rule(what: Initializer) -> Rule:
    """A number is a standard deviation; a name one of those above, such as he or xavier_uniform; a
    rule is itself.

    Raises:
        ArgumentError: an unknown name, or a standard deviation that is negative or not finite.
    """
    if callable(what):
        return what
    if isinstance(what, str):
        if what.lower() not in _BY_NAME:
            raise ArgumentError(
                f"unknown weight initializer {what!r}; known are {', '.join(_BY_NAME)}, or a number"
            )
        return _BY_NAME[what.lower()]
    deviation = as_float(what)
    if not 0.0 <= deviation < float("inf"):
        raise ArgumentError(
            "a weight initializer is a standard deviation of 0 or more, a name or a rule; got "
            f"{told(what)}"
        )
    return normal(deviation)
