"""Arithmetic of two arrays and functions of one: values against NumPy's, gradients where two values
are equal or a base is 0. All other gradients: tests/layers/test_gradients.py."""

import numpy as np
import pytest
from scipy import special

from portacnn.ops import arithmetic, arithmetic_backward, elementwise
from support.checks import agree, normal, with_each_kernel
from support.matrix import Here

KINDS = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "power": np.power,
    "maximum": np.maximum,
    "minimum": np.minimum,
}
FUNCTIONS = {
    "abs": np.abs,
    "cos": np.cos,
    "erf": special.erf,
    "exp": np.exp,
    "log": np.log,
    "mish": lambda x: x * np.tanh(np.logaddexp(0.0, x)),
    "negative": np.negative,
    "reciprocal": np.reciprocal,
    "sin": np.sin,
    "softsign": lambda x: x / (1 + np.abs(x)),
    "sqrt": np.sqrt,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shapes", [((2, 3, 4), (2, 3, 4)), ((2, 3, 1), (3, 4)), ((4,), (2, 1, 4))])
@with_each_kernel
def test_values_of_arithmetic(backend: Here, kind: str, shapes: tuple):
    a, b = (np.abs(normal(*shape, seed=i)) + 0.1 for i, shape in enumerate(shapes))
    y, _ = arithmetic(backend.array(a), backend.array(b), kind)
    agree(backend, y, KINDS[kind](a, b), backend.array(a))


@pytest.mark.parametrize("kind", ["maximum", "minimum"])
def test_equals_share_the_gradient(backend: Here, kind: str):
    a, b, dy = np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0]), np.array([4.0, 8.0, 16.0])
    y, cache = arithmetic(backend.array(a), backend.array(b), kind)
    first = [2.0, 0.0, 16.0] if kind == "maximum" else [2.0, 8.0, 0.0]
    da, db = arithmetic_backward(backend.array(dy), cache)
    agree(backend, da, np.array(first), y)
    agree(backend, db, dy - first, y)


def test_powers_of_0(backend: Here):
    """0**0 is 1 and does not change with its base; the exponent's gradient takes log(0) for 0."""
    a, b = backend.array([0.0, 0.0, 2.0]), backend.array([0.0, 2.0, 0.0])
    y, cache = arithmetic(a, b, "power")
    agree(backend, y, np.array([1.0, 0.0, 1.0]), a)
    da, db = arithmetic_backward(backend.array(np.ones(3)), cache)
    agree(backend, da, np.zeros(3), a)
    agree(backend, db, np.array([0.0, 0.0, np.log(2.0)]), a)


@pytest.mark.parametrize("need", [(True, False), (False, True)])
def test_only_what_is_needed_is_made(backend: Here, need: tuple[bool, bool]):
    a, b = backend.array(normal(2, 3)), backend.array(normal(3, seed=1))
    y, cache = arithmetic(a, b, "multiply")
    found = arithmetic_backward(y, cache, need=need)
    assert [each is not None for each in found] == list(need)


@pytest.mark.parametrize("function", FUNCTIONS)
@with_each_kernel
def test_values_of_functions(backend: Here, function: str):
    x = normal(3, 4)
    x = np.abs(x) + 0.1 if function in ("log", "sqrt", "reciprocal") else x
    y, _ = elementwise(backend.array(x), function)
    agree(backend, y, FUNCTIONS[function](x), backend.array(x))
