"""``check_op``: what portacnn asks of an op, a function of arrays with a backward function."""

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import numpy as np

from portacnn.runtime import Backend, resolve
from portacnn.testing.adapter_checks import expect
from portacnn.testing.arrays import (
    LAYOUTS,
    check_kind,
    error_of,
    laid_out,
    read_only,
    unchanged,
)
from portacnn.testing.examples import arrays_of, call, mapped
from portacnn.testing.gradients import check_slope
from portacnn.testing.layer_checks import FAR, available_devices
from portacnn.testing.report import Check, NotApplicable, Report, perform
from portacnn.testing.threads import in_two_threads
from portacnn.testing.transfers import no_transfers


def check_op(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    arguments: Mapping[str, Any],
    *,
    differentiable: Sequence[str] = ("x",),
    expected: Callable[..., Any] | None = None,
    devices: Sequence[str] | None = None,
    only: str | None = None,
) -> Report:
    """Check an op of your own: ``y, cache = forward(x, ...)``, ``dx = backward(dy, cache)``.

        >>> import numpy as np
        >>> from portacnn import ops
        >>> from portacnn.testing import check_op
        >>> x = np.linspace(-2.0, 2.0, 24).reshape(3, 2, 4)
        >>> check_op(ops.silu, ops.silu_backward, {"x": x}, devices=[]).ok
        True

    Checks: values (with ``expected``), the gradients by central differences in float64, two calls
    at once, two threads, a batch of 0 and 1, memory layouts, dtypes, unchanged and read-only
    inputs, no cache with ``keep=False``, and the other devices without transfers to the host.

    Args:
        forward: returns the result and a cache. It may take ``keep``.
        backward: takes the gradient of the result and the cache; returns the gradients of the
            arguments in ``differentiable``, one or a tuple.
        arguments: by name, in the order of the call; arrays are NumPy's, floats in float64. The
            first axis of the first argument is the batch.
        differentiable: the arguments that have a gradient.
        expected: a function of the same arguments that returns the result in float64, written with
            other means than the op.
        devices: names for ``resolve``; default: those of this machine.
        only: the name of a check or a pattern (``check_backend``).
    """
    subject = _Subject(forward, backward, dict(arguments), tuple(differentiable))
    places = available_devices() if devices is None else devices
    checks: dict[str, Callable[[], float | None]] = {
        "values": lambda: subject.values(expected),
        "gradient": subject.gradient,
        "without a cache": subject.without_a_cache,
        "inputs unchanged": subject.inputs_unchanged,
        "two calls at once": subject.two_calls,
        "two threads": subject.two_threads,
        "batch of 0 and 1": subject.small_batches,
        "memory layouts": subject.memory_layouts,
        "dtypes": subject.dtypes,
        **{f"device {place}": lambda place=place: subject.device(place) for place in places},  # type: ignore[misc]
    }
    name = getattr(forward, "__name__", repr(forward))
    return perform(
        name,
        [
            Check(n, run, f'check_op({name}, {name}_backward, ..., only="{n}")')
            for n, run in checks.items()
        ],
        only,
    )


class _Subject:
    """The op under check and its arguments."""

    def __init__(
        self,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        arguments: dict[str, Any],
        differentiable: tuple[str, ...],
    ) -> None:
        self.forward, self.backward = forward, backward
        self.arguments, self.differentiable = arguments, differentiable
        self.first = next(iter(arguments))
        self.takes_keep = "keep" in signature(forward).parameters

    def given(
        self, dtype: str = "float64", change: Callable[[Any], Any] = np.copy
    ) -> dict[str, Any]:
        """Return new arguments: floats in this dtype, and ``change`` done to every array."""

        def of(array: Any) -> Any:
            return change(array.astype(dtype) if array.dtype.kind == "f" else array)

        return {name: mapped(value, of) for name, value in self.arguments.items()}

    def dy(self, shape: tuple[int, ...], dtype: str = "float64", seed: int = 1) -> Any:
        """Return a gradient of the result: a number for a result without axes."""
        if not shape:
            return 0.75
        return (np.random.default_rng(seed).integers(-8, 9, shape) / 8).astype(dtype)

    def gradients(self, dy: Any, cache: Any) -> dict[str, Any]:
        """Return the gradients by name."""
        found = self.backward(dy, cache)
        several = found if isinstance(found, tuple) else (found,)
        expect(
            len(several) == len(self.differentiable),
            f"backward returns {len(several)} gradients for {', '.join(self.differentiable)}",
        )
        pairs = zip(self.differentiable, several, strict=True)
        return {f"gradient of {name}": gradient for name, gradient in pairs}

    def results(self, given: dict[str, Any], dy: Any = None) -> dict[str, Any]:
        """Return result and gradients by name."""
        y, cache = call(self.forward, given)
        dy = self.dy(tuple(y.shape), str(np.asarray(y).dtype)) if dy is None else dy
        return {"result": y, **self.gradients(dy, cache)}

    def compared(self, found: dict[str, Any], expected: dict[str, Any], told: str = "") -> float:
        """Return the largest error of results. Raises Fault."""
        return max(
            error_of(np.asarray(found[name]), expected[name], 1e-10, f"{name}{told}")
            for name in expected
        )

    # --- checks -----------------------------------------------------------------------------------

    def values(self, expected: Callable[..., Any] | None) -> float:
        """The result is the expected one."""
        if expected is None:
            raise NotApplicable("expected= is not given")
        y, _ = call(self.forward, self.given())
        return error_of(np.asarray(y), call(expected, self.given()), 1e-10, "result")

    def gradient(self) -> float:
        """backward agrees with central differences of forward."""
        worst, found = 0.0, self.results(self.given())
        dy = self.dy(tuple(found["result"].shape))
        for name in self.differentiable:

            def loss(values: Any, name: str = name) -> float:
                y, _ = call(self.forward, {**self.given(), name: values})
                return float((y * dy).sum())

            gradient = np.asarray(found[f"gradient of {name}"])
            at = np.asarray(self.arguments[name], np.float64)
            worst = max(worst, check_slope(gradient, loss, at, f"gradient of {name}"))
        return worst

    def without_a_cache(self) -> None:
        """keep=False gives the same result and no cache."""
        if not self.takes_keep:
            raise NotApplicable("forward does not take keep")
        y, _ = call(self.forward, self.given())
        got, cache = call(self.forward, {**self.given(), "keep": False})
        expect(cache is None, "forward with keep=False returns a cache")
        error_of(np.asarray(got), np.asarray(y), 1e-12, "the result with keep=False")

    def inputs_unchanged(self) -> None:
        """It changes nothing that it was given, and read-only arrays will do."""
        given = self.given(change=lambda array: read_only(array.copy()))
        y, _ = call(self.forward, given)
        dy = self.dy(tuple(y.shape))
        inputs = {f"{n}": a for n, value in given.items() for a in arrays_of([value])}
        if isinstance(dy, np.ndarray):
            inputs["dy"] = read_only(dy)
        writable = {**self.given(), self.first: self.arguments[self.first].copy()}
        with unchanged(resolve("numpy"), inputs):
            self.results(given, dy)
        inputs = {f"{n}": a for n, value in writable.items() for a in arrays_of([value])}
        own = dy.copy() if isinstance(dy, np.ndarray) else dy
        with unchanged(resolve("numpy"), inputs | ({"dy": own} if own is not dy else {})):
            self.results(writable, own)

    def several(self) -> list[dict[str, Any]]:
        """Return two sets of arguments."""
        other = self.given()
        other[self.first] = mapped(other[self.first], lambda array: array[::-1].copy())
        return [self.given(), other]

    def two_calls(self) -> None:
        """Two forward calls, then their backward calls in reverse, one of them twice."""
        given = self.several()
        alone = [self.results(each) for each in given]
        (one, first), (two, second) = (call(self.forward, each) for each in given)
        later = self.gradients(self.dy(tuple(two.shape)), second)
        earlier = self.gradients(self.dy(tuple(one.shape)), first)
        again = self.gradients(self.dy(tuple(one.shape)), first)
        for found, expected in ((earlier, alone[0]), (later, alone[1]), (again, alone[0])):
            names = {name: expected[name] for name in found}
            self.compared(found, names, ", of two calls at once")

    def two_threads(self) -> None:
        """Two threads may call it at once."""
        given = self.several()
        alone = [self.results(each) for each in given]
        for number, got in in_two_threads(lambda number: self.results(given[number])):
            self.compared(got, alone[number], ", in a thread")

    def small_batches(self) -> None:
        """A batch of 0 and of 1: gradients have the shapes of their arguments."""
        count = len(self.arguments[self.first])
        for size in (1, 0):
            given = {
                name: value[:size]
                if isinstance(value, np.ndarray) and value.ndim and len(value) == count
                else value
                for name, value in self.given().items()
            }
            found = self.results(given)
            for name in self.differentiable:
                got, shape = found[f"gradient of {name}"].shape, given[name].shape
                expect(
                    got == shape, f"batch of {size}: gradient of {name} is {got}, expected {shape}"
                )

    def memory_layouts(self) -> float:
        """Strides change nothing."""
        home, worst = resolve("numpy"), 0.0
        expected = self.results(self.given())
        for layout in LAYOUTS[1:]:
            given = self.given(change=lambda array: laid_out(home, array, layout))  # noqa: B023
            dy = self.dy(tuple(expected["result"].shape))
            dy = dy if isinstance(dy, float) else laid_out(home, dy, layout)
            worst = max(worst, self.compared(self.results(given, dy), expected, f", {layout}"))
        return worst

    def dtypes(self) -> float:
        """float32 stays float32, and agrees with float64."""
        expected, worst = self.results(self.given()), 0.0
        for name, array in self.results(self.given("float32")).items():
            expect(array.dtype == "float32", f"{name} of float32 is {array.dtype}")
            worst = max(worst, error_of(np.asarray(array), expected[name], FAR["float32"], name))
        return worst

    def device(self, place: str) -> float:
        """Results agree on another device, and nothing is transferred."""
        home: Backend = resolve(place)
        expected, worst = self.results(self.given()), 0.0
        given = self.given("float32", home.asarray)
        dy = self.dy(tuple(expected["result"].shape), "float32")
        dy = dy if isinstance(dy, float) else home.asarray(dy)
        with home.active(), no_transfers(home):
            y, cache = call(self.forward, given)
            found = {"result": y, **self.gradients(dy, cache)}
        like = next(arrays_of(list(given.values())))
        for name, array in found.items():
            check_kind(home, array, like, "float32", name)
            got = home.to_host(array)
            worst = max(worst, error_of(got, expected[name], FAR["float32"], name))
        return worst
