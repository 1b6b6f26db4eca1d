"""Arithmetic of two arrays and functions of one: values against NumPy's, gradients where two values
are equal or a base is 0. All other gradients: tests/layers/test_gradients.py."""

import numpy as np
import pytest
from scipy import special

from portacnn.ops import (
    arithmetic,
    arithmetic_backward,
    elementwise,
    reduce,
    reduce_backward,
    select,
    select_backward,
)
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
    "fmod": np.fmod,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
}
TRUTH = list(KINDS)[8:]
REDUCED = {
    "sum": np.sum,
    "mean": np.mean,
    "max": np.max,
    "min": np.min,
    "prod": np.prod,
    "l1": lambda x, axis: np.abs(x).sum(axis),
    "l2": lambda x, axis: np.sqrt((x * x).sum(axis)),
    "sum_square": lambda x, axis: (x * x).sum(axis),
    "log_sum": lambda x, axis: np.log(x.sum(axis)),
    "log_sum_exp": special.logsumexp,
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
    "acos": np.arccos,
    "acosh": np.arccosh,
    "asin": np.arcsin,
    "asinh": np.arcsinh,
    "atan": np.arctan,
    "atanh": np.arctanh,
    "ceil": np.ceil,
    "cosh": np.cosh,
    "floor": np.floor,
    "logical_not": np.logical_not,
    "nonzero": np.not_equal,
    "round": np.round,
    "sign": np.sign,
    "sinh": np.sinh,
    "tan": np.tan,
}
STEPS = ("logical_not", "nonzero", "round", "sign", "floor", "ceil")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shapes", [((2, 3, 4), (2, 3, 4)), ((2, 3, 1), (3, 4)), ((4,), (2, 1, 4))])
@with_each_kernel
def test_values_of_arithmetic(backend: Here, kind: str, shapes: tuple):
    a, b = (np.abs(normal(*shape, seed=i)) + 0.1 for i, shape in enumerate(shapes))
    y, _ = arithmetic(backend.array(a), backend.array(b), kind)
    agree(backend, y, KINDS[kind](a, b).astype(np.float64), backend.array(a))


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
    if function in ("log", "sqrt", "reciprocal", "acosh"):
        x = np.abs(x) + (1.1 if function == "acosh" else 0.1)
    elif function in ("acos", "asin", "atanh"):
        x = np.tanh(x)
    elif function in STEPS:  # 0, and halves to both sides
        x = np.array([-2.5, -1.5, -1.0, -0.5, -0.25, 0.0, 0.5, 0.75, 1.5, 2.5])
    expected = np.not_equal(x, 0) if function == "nonzero" else FUNCTIONS[function](x)
    y, _ = elementwise(backend.array(x), function)
    agree(backend, y, expected.astype(np.float64), backend.array(x))


@pytest.mark.parametrize("kind", [*TRUTH, "fmod"])
def test_comparisons_of_equal_and_negative_values(backend: Here, kind: str):
    """Truth values are numbers, and any number but 0 is true."""
    a = np.array([-2.5, 0.0, 0.0, 1.0, 3.0, -7.25, 7.25])
    b = np.array([-2.5, 0.0, -1.0, 0.0, 2.5, 2.5, -2.5])
    if kind == "fmod":
        a, b = a[4:], b[4:]
    y, cache = arithmetic(backend.array(a), backend.array(b), kind)
    agree(backend, y, KINDS[kind](a, b).astype(np.float64), y)
    if kind in TRUTH:
        for gradient in arithmetic_backward(y, cache):
            agree(backend, gradient, np.zeros(7), y)


def test_a_choice(backend: Here):
    condition, a, b = np.array([[1.0], [0.0], [-0.5]]), normal(3, 2), normal(2, seed=1)
    y, cache = select(*map(backend.array, (condition, a, b)))
    agree(backend, y, np.where(condition != 0, a, b), y)
    da, db = select_backward(backend.array(np.ones((3, 2))), cache)
    agree(backend, da, np.array([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]), y)
    agree(backend, db, np.ones(2), y)


@pytest.mark.parametrize("kind", REDUCED)
@with_each_kernel
def test_values_of_reductions(backend: Here, kind: str):
    x = np.abs(normal(3, 4, 5)) if kind == "log_sum" else normal(3, 4, 5)
    y, _ = reduce(backend.array(x), kind, [0, 2])
    agree(backend, y, REDUCED[kind](x, axis=(0, 2)), backend.array(x))
    y, _ = reduce(backend.array(x), kind, [1], True)
    agree(backend, y, REDUCED[kind](x, axis=(1,))[:, None], backend.array(x))


@pytest.mark.parametrize(
    ("kind", "x", "gradient"),
    [
        ("max", [1.0, 3.0, 3.0], [0.0, 1.0, 1.0]),
        ("min", [1.0, 1.0, 3.0], [1.0, 1.0, 0.0]),
        ("l2", [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
        ("prod", [2.0, 0.0, 3.0], [0.0, 12.0, 0.0]),
        ("prod", [0.0, 0.0, 3.0], [0.0, 0.0, 0.0]),
        ("l1", [-2.0, 0.0, 3.0], [-2.0, 0.0, 2.0]),
        ("log_sum_exp", [-np.inf, 0.0, -np.inf], [0.0, 2.0, 0.0]),
    ],
)
def test_gradients_of_reductions_at_the_edges(backend: Here, kind: str, x: list, gradient: list):
    """As PyTorch has them: equal extremes share it."""
    y, cache = reduce(backend.array(x), kind, [0], True)
    agree(backend, reduce_backward(backend.array([2.0]), cache), np.array(gradient), y)
