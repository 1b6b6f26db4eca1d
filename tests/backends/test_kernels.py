"""Every kernel that a backend brings on the CPU against the portable op, on examples of the table.

Float32 agrees within what the table says (1e-5 of the largest number of a result), float64 within
1e-12. Where an op has a backward, that is compared as well, with the same gradient.
"""

from inspect import signature
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from portacnn.ops import use_kernels
from portacnn.ops.dispatch import OPS
from portacnn.runtime import resolve
from portacnn.testing.examples import (
    EXAMPLES,
    Arguments,
    Example,
    Random,
    arrays_of,
    as_given,
    call,
    examples_of,
    mapped,
)
from support.checks import DTYPES, choices, pieces_for, pieces_of
from support.drawing import arguments_of
from support.matrix import Here

NUMPY = resolve("numpy")
KERNELS = sorted({name for table in NUMPY.kernels.values() for name in table})
ROWS = [row for op in KERNELS for row in examples_of(op)]


def test_every_kernel_is_compared():
    """Put a row for it into portacnn/testing/examples.py."""
    assert set(KERNELS) == {EXAMPLES[row].op for row in ROWS}


def gradient(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return Random(1000 + seed).numbers(*shape)


def results(
    example: Example, arguments: Arguments, dtype: str, last: bool, seed: int, mask: int
) -> list[np.ndarray]:
    """What a call returns and writes into its arguments, what its backward returns, and what the
    prepared op gives.

    ``last``: the batch lies last. ``mask``: which gradients the second backward leaves out.
    """

    def place(array: np.ndarray) -> np.ndarray:
        own = array.astype(dtype)
        return (
            np.moveaxis(np.moveaxis(own, 0, -1).copy(), -1, 0) if last and array.ndim > 1 else own
        )

    given_arguments, op, backward = as_given(arguments, place), OPS[example.op], example.backward
    x = next(iter(given_arguments.values()))

    def other(array: np.ndarray) -> np.ndarray:
        return place(gradient(array.shape, seed)) if array.dtype.kind == "f" else array

    def prepared() -> Any:
        function = call(op.prepare, given_arguments)
        # of which nothing may be left
        function(mapped(x, other))
        return function(x)

    if backward is None:
        result = call(op, given_arguments)
        again = [] if example.writes else [prepared()]
        return list(arrays_of([result, list(given_arguments.values()), again]))
    y, cache = call(op, {**given_arguments, "keep": True})
    dy = place(gradient(y.shape, seed))
    found: list[Any] = [y, backward(dy, cache)]
    needs = [name for name in signature(backward).parameters if name.startswith("need_")]
    if needs:
        _, cache = call(op, {**given_arguments, "keep": True})
        unneeded = {name: False for i, name in enumerate(needs) if mask >> i & 1}
        some = backward(dy, cache, **unneeded)
        assert all(some[needs.index(name)] is None for name in unneeded)
        found.append(some)
    quick, nothing = call(op, {**given_arguments, "keep": False})
    assert nothing is None
    found += [quick, list(given_arguments.values())]
    if isinstance(x, np.ndarray):
        found.append(prepared())
    return list(arrays_of(found))


def terms(op: str, number: int, arguments: Arguments, seed: int) -> float:
    """What the terms of a batch norm's dweight or running mean, which may cancel, add up to in
    absolute value; else 0."""
    if not op.startswith("batch_norm"):
        return 0.0
    x, affine = arguments["x"], arguments["weight"] is not None
    axes = (0, *range(2, x.ndim))
    if arguments["training"] and number == (8 if affine else 4):
        return float(arguments["momentum"] * np.abs(x).mean(axes).max())
    if not affine or number not in (2, 4):
        return 0.0
    mean, var = (
        (x.mean(axes), x.var(axes))
        if arguments["training"]
        else (arguments["running_mean"], arguments["running_var"])
    )
    mean, var = (a.reshape(1, -1, *(1,) * (x.ndim - 2)) for a in (mean, var))
    normal = (x - mean) / np.sqrt(var + arguments["eps"])
    return float(np.abs(normal * gradient(x.shape, seed)).sum(axes).max())


def compare(row: str, data: st.DataObject) -> None:
    example, arguments = EXAMPLES[row], data.draw(arguments_of(row))
    dtype, last, seed = data.draw(st.sampled_from(DTYPES)), data.draw(st.booleans()), 0
    mask = data.draw(st.integers(1, 7))
    if example.op.startswith("batch_norm"):
        # The square of the last is more than float32 holds.
        arguments["x"] *= data.draw(st.sampled_from([1.0, 1.0, 1.0, 1e25]))
    limit = example.float32 if dtype == "float32" else 1e-12
    with use_kernels("reference"):
        expected = results(example, arguments, dtype, last, seed, mask)
    count, room = (
        data.draw(st.sampled_from([1, 2, 3])),
        data.draw(st.sampled_from([1, 4096, 256 << 10])),
    )
    for choice in choices(Here("numpy", NUMPY))[:-1]:
        with use_kernels(choice), pieces_of(room), pieces_for(count):
            found = results(example, arguments, dtype, last, seed, mask)
        assert len(found) == len(expected)
        for number, (got, right) in enumerate(zip(found, expected, strict=True)):
            where = f"result {number} of {row}, use_kernels({choice!r})"
            assert (got.dtype, got.shape) == (right.dtype, right.shape), where
            if right.dtype.kind != "f":
                np.testing.assert_array_equal(got, right, err_msg=where)
                continue
            got, right = got.astype("float64"), right.astype("float64")
            allowed = limit * float(np.abs(right).max(initial=0.0))
            allowed = max(allowed, limit / 4 * terms(example.op, number, arguments, seed))
            np.testing.assert_allclose(got, right, rtol=0, atol=allowed, err_msg=where)


quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


@pytest.mark.parametrize("row", ROWS)
@settings(derandomize=True, max_examples=30, suppress_health_check=quiet)
@given(data=st.data())
def test_drawn_arguments_agree_with_the_reference(row: str, data: st.DataObject):
    compare(row, data)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
@settings(derandomize=True, max_examples=400, suppress_health_check=quiet)
@given(data=st.data())
def test_many_drawn_arguments_agree_with_the_reference(row: str, data: st.DataObject):
    compare(row, data)
