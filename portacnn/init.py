"""Rules for initial weights. A rule takes a generator, a shape and the fans, and returns host
values.

fan_in is the number of inputs per output, fan_out the number of outputs per input: C/G * KH * KW
and O/G * KH * KW for a convolution of C channels to O in G groups (PyTorch's fan_out counts all O),
F and O for a linear layer.

>>> import numpy as np
>>> from portacnn.init import rule
>>> rule("ones")(np.random.default_rng(0), (2, 3), 3, 2)
array([[1., 1., 1.],
       [1., 1., 1.]])
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
    """Return a rule: normal with mean 0 and this standard deviation."""
    return lambda rng, shape, fan_in, fan_out: std * rng.standard_normal(shape)


def uniform(bound: float) -> Rule:
    """Uniform within ``bound`` of 0."""
    return lambda rng, shape, fan_in, fan_out: _uniform(rng, shape, bound)


def constant(value: float) -> Rule:
    """Return a rule: the same value everywhere."""
    return lambda rng, shape, fan_in, fan_out: np.full(shape, value)


def he(rng: np.random.Generator, shape: Sequence[int], fan_in: int, fan_out: int) -> HostArray:
    """Draw from a normal distribution with std sqrt(2 / fan_in), for layers before a ReLU.

    He et al., 2015, equation 10: activations keep their variance.
    """
    return sqrt(2.0 / fan_in) * rng.standard_normal(shape)


def he_fan_out(
    rng: np.random.Generator, shape: Sequence[int], fan_in: int, fan_out: int
) -> HostArray:
    """Draw from a normal distribution with std sqrt(2 / fan_out), as torchvision's ResNets do.

    He et al., 2015, equation 14: gradients keep their variance.
    """
    return sqrt(2.0 / fan_out) * rng.standard_normal(shape)


def he_uniform(
    rng: np.random.Generator, shape: Sequence[int], fan_in: int, fan_out: int
) -> HostArray:
    """Draw uniformly within sqrt(6 / fan_in) of 0, with the variance of ``he``."""
    return _uniform(rng, shape, sqrt(6.0 / fan_in))


def he_uniform_fan_out(
    rng: np.random.Generator, shape: Sequence[int], fan_in: int, fan_out: int
) -> HostArray:
    """Draw uniformly within sqrt(6 / fan_out) of 0, with the variance of ``he_fan_out``."""
    return _uniform(rng, shape, sqrt(6.0 / fan_out))


def xavier(rng: np.random.Generator, shape: Sequence[int], fan_in: int, fan_out: int) -> HostArray:
    """Draw from a normal distribution with std sqrt(1 / fan_in), for layers before a sigmoid.

    The tutorials' form of Glorot and Bengio, 2010.
    """
    return sqrt(1.0 / fan_in) * rng.standard_normal(shape)


def xavier_normal(
    rng: np.random.Generator, shape: Sequence[int], fan_in: int, fan_out: int
) -> HostArray:
    """Draw from a normal distribution with std sqrt(2 / (fan_in + fan_out)) (Glorot and Bengio,
    2010, equation 12).
    """
    return sqrt(2.0 / (fan_in + fan_out)) * rng.standard_normal(shape)


def xavier_uniform(
    rng: np.random.Generator, shape: Sequence[int], fan_in: int, fan_out: int
) -> HostArray:
    """Draw uniformly within sqrt(6 / (fan_in + fan_out)) of 0 (Glorot and Bengio, 2010,
    equation 16).
    """
    return _uniform(rng, shape, sqrt(6.0 / (fan_in + fan_out)))


def fan_in_uniform(
    rng: np.random.Generator, shape: Sequence[int], fan_in: int, fan_out: int
) -> HostArray:
    """Draw uniformly within 1 / sqrt(fan_in) of 0: PyTorch's default for Conv and Linear, weights
    and biases.
    """
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
    """Return the rule for a number (a standard deviation), a name such as he or xavier_uniform, or
    a rule.

    Raises:
        ArgumentError: if a name is unknown, or a standard deviation is negative or not finite.
    """
    if callable(what):
        return what
    if isinstance(what, str):
        if what.lower() not in _BY_NAME:
            raise ArgumentError(
                f"unknown weight initializer {what!r}; expected one of {', '.join(_BY_NAME)}, or a "
                "number"
            )
        return _BY_NAME[what.lower()]
    deviation = as_float(what)
    if not 0.0 <= deviation < float("inf"):
        raise ArgumentError(
            "a weight initializer must be a standard deviation (at least 0), a name or a rule; got "
            f"{told(what)}"
        )
    return normal(deviation)
