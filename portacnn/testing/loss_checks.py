"""``check_loss``: what portacnn asks of a loss.

Gradients are compared with central differences in float64, on NumPy; then the other devices of this
machine are compared with NumPy.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from portacnn.errors import ArgumentError
from portacnn.losses import Loss
from portacnn.runtime import Backend, resolve
from portacnn.testing.adapter_checks import expect
from portacnn.testing.arrays import LAYOUTS, check_kind, error_of, laid_out, unchanged
from portacnn.testing.gradients import check_slope, distinct
from portacnn.testing.layer_checks import FAR, available_devices
from portacnn.testing.report import Check, NotApplicable, Report, perform
from portacnn.testing.threads import in_two_threads
from portacnn.testing.transfers import no_transfers

COUNT = 6
SHAPES = {"multiclass": (5,), "multilabel": (4,), "regression": (3,), "embedding": (8,)}
"""The outputs of one sample, by the task of a loss."""


def check_loss(
    loss: Loss,
    output_shape: Sequence[int] | None = None,
    *,
    targets: Callable[[int], Any] | None = None,
    devices: Sequence[str] | None = None,
    only: str | None = None,
) -> Report:
    """Check a loss of your own.

        >>> from portacnn.losses import Huber
        >>> from portacnn.testing import check_loss
        >>> check_loss(Huber(), devices=[]).ok
        True

    Checks: the gradient by central differences in float64, with sample weights too, and times
    ``dloss``; that a weight of 2 counts a sample twice; that the parts of a batch add up; batches
    of 0 and 1, memory layouts, dtypes, two threads, unchanged inputs, and the other devices without
    transfers to the host.

    Args:
        loss: the loss.
        output_shape: of one sample; the default depends on ``loss.task``.
        targets: a function of the number of samples that returns targets as a user passes them;
            the default depends on ``loss.task``.
        devices: names for ``resolve``; default: those of this machine.
        only: the name of a check or a pattern (``check_backend``).

    Raises:
        ArgumentError: if the task has no default shape or targets.
    """
    if (output_shape is None or targets is None) and loss.task not in SHAPES:
        raise ArgumentError(f"pass output_shape and targets for a loss of the task {loss.task!r}")
    subject = _Subject(loss, tuple(output_shape or SHAPES[loss.task]), targets)
    places = available_devices() if devices is None else devices
    checks: dict[str, Callable[[], float | None]] = {
        "gradient": lambda: subject.gradient(None),
        "gradient with weights": lambda: subject.gradient(subject.weights()),
        "gradient times dloss": subject.scaled,
        "weights": subject.weighted,
        "parts": subject.parts,
        "inputs unchanged": subject.inputs_unchanged,
        "two threads": subject.two_threads,
        "batch of 0 and 1": subject.small_batches,
        "memory layouts": subject.memory_layouts,
        "dtypes": subject.dtypes,
        "evaluation": subject.evaluation,
        **{f"device {place}": lambda place=place: subject.device(place) for place in places},  # type: ignore[misc]
    }
    return perform(
        repr(loss),
        [Check(n, run, f'check_loss({loss!r}, only="{n}")') for n, run in checks.items()],
        only,
    )


class _Subject:
    """The loss under check, the shape of one sample's outputs, and its targets."""

    def __init__(self, loss: Loss, shape: tuple[int, ...], targets: Any) -> None:
        self.loss, self.shape, self.given = loss, shape, targets or self.default_targets

    def default_targets(self, count: int) -> Any:
        """Return targets of the loss's task."""
        rng, (outputs, *size) = np.random.default_rng(2), self.shape
        if self.loss.task == "multiclass":
            return rng.integers(0, outputs, (count, *size))
        if self.loss.task == "multilabel":
            return rng.integers(0, 2, (count, *self.shape))
        if self.loss.task == "embedding":
            return np.arange(count) // 2
        return distinct((count, *self.shape), 1)

    def t(self, dtype: str = "float64") -> Any:
        """Return the targets as the loss receives them, on the host."""
        return self.loss.check_targets(self.given(COUNT), self.shape, count=COUNT, dtype=dtype)

    def y(self, dtype: str = "float64") -> Any:
        return distinct((COUNT, *self.shape)).astype(dtype)

    def weights(self, dtype: str = "float64") -> Any:
        return np.array([2.0, 0.5, 1.0, 0.25, 1.5, 1.0], dtype)

    def of(self, y: Any, t: Any, weight: Any = None) -> tuple[Any, Any]:
        """Return loss and gradient, as NumPy arrays."""
        value, cache = self.loss.forward(y, t, weight)
        return np.array(value), np.array(self.loss.backward(cache))

    # --- checks -----------------------------------------------------------------------------------

    def gradient(self, weight: Any) -> float:
        """backward agrees with central differences of forward."""
        y, t = self.y(), self.t()
        value, gradient = self.of(y, t, weight)
        expect(value.shape == (), f"the loss has shape {value.shape}; it must be 0-dimensional")
        return check_slope(
            gradient, lambda at: float(self.loss.forward(at, t, weight)[0]), y, "gradient"
        )

    def scaled(self) -> float:
        """backward(cache, dloss) is dloss times the gradient, for numbers and 0-d arrays."""
        y, t, worst = self.y(), self.t(), 0.0
        expected = 2.5 * self.of(y, t)[1]
        for dloss in (2.5, np.asarray(2.5)):
            _, cache = self.loss.forward(y, t)
            got = np.asarray(self.loss.backward(cache, dloss))
            worst = max(worst, error_of(got, expected, 1e-12, f"gradient times {dloss!r}"))
        return worst

    def of_single_samples(self) -> None:
        """Raise NotApplicable if the loss compares the samples of a batch with each other."""
        if self.loss.task == "embedding":
            raise NotApplicable("it compares the samples of a batch with each other")

    def weighted(self) -> float:
        """A weight of 2 counts a sample twice, a weight of 0 leaves it out."""
        self.of_single_samples()
        y, t = self.y(), self.t()
        weight = np.ones(COUNT)
        weight[0], weight[1] = 2.0, 0.0
        rows = [0, 0, *range(2, COUNT)]
        got, _ = self.of(y, t, weight)
        expected, _ = self.of(y[rows], t[rows])
        return error_of(got, expected, 1e-10, "the loss with weights 2 and 0")

    def parts(self) -> float:
        """The parts of a batch add up to its loss, and have its gradient."""
        self.of_single_samples()
        y, t, worst = self.y(), self.t(), 0.0
        for weight in (None, self.weights()):
            value, gradient = self.of(y, t, weight)
            whole = self.loss.count(t, weight, "float64")
            total, rows = 0.0, []
            for part in (slice(0, 1), slice(1, 4), slice(4, COUNT)):
                own = None if weight is None else weight[part]
                share, cache = self.loss.forward_part(y[part], t[part], own, whole)
                total += float(share)
                rows.append(np.asarray(self.loss.backward_part(cache)))
            told = " with weights" * (weight is not None)
            worst = max(
                worst,
                error_of(np.asarray(total), value, 1e-10, f"the sum of the parts{told}"),
                error_of(np.concatenate(rows), gradient, 1e-10, f"gradient of the parts{told}"),
            )
        return worst

    def inputs_unchanged(self) -> None:
        """forward and backward change neither outputs, targets nor weights."""
        y, t, weight = self.y(), self.t(), self.weights()
        with unchanged(resolve("numpy"), {"y": y, "t": t, "weight": weight}):
            self.of(y, t, weight)

    def two_threads(self) -> None:
        """Two threads may use one loss at once."""
        t = self.t()
        several = [self.y(), self.y()[::-1] * 0.9]
        alone = [self.of(y, t) for y in several]
        for number, got in in_two_threads(lambda number: self.of(several[number], t)):
            for array, expected in zip(got, alone[number], strict=True):
                error_of(array, expected, 1e-12, "a result in a thread")

    def small_batches(self) -> None:
        """One sample has a gradient of its shape, and so has none."""
        for count in (1, 0):
            y, t = self.y()[:count], self.t()[:count]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a mean of nothing is NaN
                value, gradient = self.of(y, t)
            expect(value.shape == (), f"the loss of {count} samples has shape {value.shape}")
            expect(
                gradient.shape == y.shape,
                f"the gradient of {count} samples has shape {gradient.shape}",
            )

    def memory_layouts(self) -> float:
        """Strides of outputs and targets change nothing."""
        home, worst = resolve("numpy"), 0.0
        value, gradient = self.of(self.y(), self.t(), self.weights())
        for layout in LAYOUTS[1:]:
            given = (laid_out(home, a, layout) for a in (self.y(), self.t(), self.weights()))
            got = self.of(*given)
            worst = max(
                worst,
                error_of(got[0], value, 1e-10, f"the loss, {layout}"),
                error_of(got[1], gradient, 1e-10, f"gradient, {layout}"),
            )
        return worst

    def dtypes(self) -> float:
        """float32 stays float32, and agrees with float64."""
        value, gradient = self.of(self.y(), self.t())
        got = self.of(self.y("float32"), self.t("float32"))
        for what, array in zip(("the loss", "its gradient"), got, strict=True):
            expect(array.dtype == "float32", f"{what} of float32 outputs is {array.dtype}")
        return max(
            error_of(got[0], value, FAR["float32"], "the loss in float32"),
            error_of(got[1], gradient, FAR["float32"], "gradient in float32"),
        )

    def evaluation(self) -> None:
        """for_evaluation is a loss with the same targets."""
        loss = self.loss.for_evaluation()
        expect(isinstance(loss, Loss), f"for_evaluation returns {loss!r}")
        loss.forward(self.y(), self.t())

    def device(self, place: str) -> float:
        """The loss and its gradient agree on another device, and nothing is transferred."""
        home: Backend = resolve(place)
        value, gradient = self.of(self.y(), self.t(), self.weights())
        y, weight = (home.asarray(a("float32")) for a in (self.y, self.weights))
        t = home.asarray(self.t("float32"))
        with home.active(), no_transfers(home):
            found, cache = self.loss.forward(y, t, weight)
            back = self.loss.backward(cache)
        for what, array in (("the loss", found), ("gradient", back)):
            check_kind(home, array, y, "float32", what)
        return max(
            error_of(home.to_host(found), value, FAR["float32"], "the loss"),
            error_of(home.to_host(back), gradient, FAR["float32"], "gradient"),
        )
