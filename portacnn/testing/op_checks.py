"""Checks of every op on one backend: values, gradients, dtypes, devices, memory layouts, transfers.

Each row of ``EXAMPLES`` is one check. Expected values are the frozen figures (``figures``); for
larger sizes, where kernels split their work, those of the portable op on NumPy in float64.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from portacnn.ops import use_kernels
from portacnn.runtime import Array, Backend
from portacnn.testing.arrays import (
    LAYOUTS,
    LIMITS,
    check_kind,
    check_place,
    dtypes_of,
    error_of,
    laid_out,
    read_only,
    unchanged,
)
from portacnn.testing.examples import (
    EXAMPLES,
    STATE,
    Arguments,
    Example,
    arrays_of,
    as_given,
    call,
    mapped,
)
from portacnn.testing.figures import figures_of, gradient_of
from portacnn.testing.random import Random
from portacnn.testing.report import Check, Fault
from portacnn.testing.transfers import no_transfers

LARGER = (10, 11, 12)
"""The seeds of larger arguments."""


def op_checks(home: Backend, name: str) -> list[Check]:
    """Return a check of each row of ``EXAMPLES``; ``name`` is the backend's, for messages."""
    return [
        Check(
            f"ops: {example}",
            lambda example=example: check_example(home, example),  # type: ignore[misc]
            f'check_backend("{name}", only="ops: {example}")',
        )
        for example in EXAMPLES
    ]


def check_example(home: Backend, name: str) -> float:
    """Check one row of ``EXAMPLES`` on a backend; return the largest error. Raises Fault."""
    example, worst = EXAMPLES[name], 0.0

    def compared(
        host: Arguments, expected: list[Any], dtype: str, layout: str = "packed", kernels: str = ""
    ) -> float:
        given = as_given(host, lambda array: array.astype(dtype))
        told = f"{dtype}, {layout}, kernels {kernels or 'auto'}"
        with use_kernels(kernels or "auto"):
            found = run(home, example, given, expected[0].shape, layout, told)
        limit = example.float32 if dtype == "float32" else LIMITS[dtype]
        if len(found) != len(expected):
            raise Fault(f"{told}: expected {len(expected)} results, got {len(found)}")
        errors = [
            error_of(got, right, limit, f"{what}, {told}")
            for what, got, right in zip(
                names_of(example, given, len(expected)), found, expected, strict=True
            )
        ]
        return max(errors, default=0.0)

    figures = figures_of(name)
    for first in figures[:1]:
        host = first.arguments()
        for dtype in dtypes_of(home):
            for kernels in choices(home):
                worst = max(worst, compared(host, first.results, dtype, kernels=kernels))
        for layout in LAYOUTS[1:]:
            worst = max(worst, compared(host, first.results, "float32", layout))
        check_half(home, example, host, first.results[0].shape)
        check_without_cache(home, example, host)
    for figure in figures[1:]:
        for dtype in dtypes_of(home):
            worst = max(worst, compared(figure.arguments(), figure.results, dtype))
    for seed in LARGER:
        host = as_given(example.draw(Random(seed)), lambda array: array.astype("float32"))
        host = as_given(host, lambda array: array.astype("float64"))
        with use_kernels("reference"):
            expected = example.results(mapped(host, np.copy), _numpy_gradient)
        for dtype in dtypes_of(home):
            worst = max(worst, compared(host, expected, dtype))
    return worst


def choices(home: Backend) -> tuple[str, ...]:
    """Return the arguments of ``use_kernels`` that make a difference on this backend; the portable
    ops come last."""
    _, *others = [*home.kernels, "reference"]
    return ("auto", *others)


def names_of(example: Example, given: Arguments, count: int) -> list[str]:
    """Name the results of an example, for messages. An op that only writes has no result of its
    own."""
    others = [
        f"gradient of {word}" for word in example.differentiable if given.get(word) is not None
    ]
    for word in example.writes:
        others += [f"{word} after it" for _ in arrays_of([given.get(word)])]
    return ["result"] * (count - len(others)) + others


def _numpy_gradient(y: Any) -> Any:
    dy = gradient_of(tuple(y.shape))
    return dy if isinstance(dy, float) else dy.astype(y.dtype)


def placed(
    home: Backend, example: Example, host: Arguments, layout: str = "packed"
) -> tuple[Arguments, dict[str, Array]]:
    """Return the arguments on the device, and those of them that must not change, by name.

    Floats with axes lie in memory as ``layout`` says. NumPy's arrays are read-only, except those
    that the op writes into.
    """
    kept: dict[str, Array] = {}

    def place(name: str) -> Callable[[Any], Array]:
        def of(array: Any) -> Array:
            if array.dtype.kind == "f" and array.ndim and name not in STATE:
                made = laid_out(home, array, layout)
            else:
                made = home.asarray(array)
            if name in example.writes:
                return made
            kept[f"{name}[{len(kept)}]" if name in kept else name] = made
            return read_only(made)

        return of

    return {name: mapped(value, place(name)) for name, value in host.items()}, kept


def run(
    home: Backend,
    example: Example,
    host: Arguments,
    shape: tuple[int, ...],
    layout: str,
    told: str,
) -> list[Any]:
    """Call an op forward and backward without transfers; return its results as NumPy arrays.

    Args:
        shape: of the op's result.

    Raises:
        Fault: if results are of another library, device or dtype, or an input has changed.
    """
    given, kept = placed(home, example, host, layout)
    like = next(arrays_of(list(given.values())))
    dtype = next((a.dtype for a in arrays_of(list(host.values())) if a.dtype.kind == "f"), None)
    dy = gradient_of(shape)
    if example.differentiable and shape:
        kept["the gradient"] = dy = read_only(laid_out(home, dy.astype(dtype), layout))

    def gradient(y: Array) -> Any:
        check_kind(home, y, like, str(dtype), f"the result, {told}")
        return dy

    with unchanged(home, kept), no_transfers(home):
        found = example.results(given, gradient)
    hosts = [home.to_host(array) for array in found]
    for array, host_array in zip(found, hosts, strict=True):
        if host_array.dtype.kind == "f":
            check_kind(home, array, like, str(dtype), f"a result, {told}")
        else:
            check_place(home, array, like, f"a result, {told}")
    return hosts


def check_half(home: Backend, example: Example, host: Arguments, shape: tuple[int, ...]) -> None:
    """Raise Fault unless float16 gives the float32 results for the same values, rounded."""
    if not hasattr(home.xp, "float16"):
        return
    half = as_given(host, lambda array: array.astype("float16"))
    wide = as_given(half, lambda array: array.astype("float32"))
    found = run(home, example, half, shape, "packed", "float16")
    expected = run(home, example, wide, shape, "packed", "float32")
    for what, got, right in zip(names_of(example, half, len(found)), found, expected, strict=True):
        with np.errstate(over="ignore"):
            right = right.astype(got.dtype)
        error_of(got.astype(np.float32), right.astype(np.float32), 2e-3, f"{what}, float16")


def check_without_cache(home: Backend, example: Example, host: Arguments) -> None:
    """Raise Fault unless ``keep=False`` gives the same result and no cache."""
    if example.backward is None:
        return
    given = as_given(host, lambda array: array.astype("float32"))
    y, _ = call(example.forward, {**placed(home, example, given)[0], "keep": True})
    without, cache = call(example.forward, {**placed(home, example, given)[0], "keep": False})
    if cache is not None:
        raise Fault("with keep=False it keeps a cache")
    error_of(home.to_host(without), home.to_host(y), 1e-6, "the result with keep=False")
