"""Learning rate schedules.

A schedule is a function of a step's number, from 0, and of the optimizer's own learning rate:
``schedule(step, lr)`` returns the rate of that step. It keeps no state between calls, so training
can stop and resume anywhere, and a curve is drawn by calling it. Any function of (step, lr) is a
schedule. Those here are frozen values, named as in torch.optim.lr_scheduler, and return its values.

    Trainer(..., optimizer="sgd", lr=0.1, schedule=warm_up(500, CosineAnnealingLR(10_000)))

They count steps. To count epochs instead, as PyTorch's examples do, use ``PerEpoch(StepLR(30),
steps_per_epoch)`` or the Trainer's ``schedule_unit="epoch"``.

    >>> [StepLR(2)(step, 1.0) for step in range(5)]
    [1.0, 1.0, 0.1, 0.1, 0.010000000000000002]
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from math import cos, pi
from typing import Any, Literal

from portacnn.arguments import (
    AnswersKeywords,
    flag,
    not_negative,
    plain,
    positive,
    share,
    told,
    whole,
    wholes,
)
from portacnn.errors import ArgumentError, ModelFormatError

Schedule = Callable[[int, float], float]


def _take(schedule: Any, **values: Any) -> None:
    """Set fields of a frozen schedule to their checked values."""
    for name, value in values.items():
        object.__setattr__(schedule, name, value)


def _powered(lr: float, gamma: float, exponent: int) -> float:
    """Return lr * gamma^exponent. Raises ArgumentError if it overflows a float."""
    try:
        return lr * gamma**exponent
    except OverflowError:
        raise ArgumentError(
            f"the learning rate {lr!r} * {gamma!r}^{exponent} overflows a float; use a gamma of 1 "
            "or less"
        ) from None


@dataclass(frozen=True)
class ConstantLR(AnswersKeywords):
    """lr * factor at every step."""

    factor: float = 1.0

    def __post_init__(self) -> None:
        _take(self, factor=not_negative("factor", self.factor))

    def __call__(self, step: int, lr: float) -> float:
        return lr * self.factor


@dataclass(frozen=True)
class StepLR(AnswersKeywords):
    """lr * gamma^k with k = step // step_size, as torch.optim.lr_scheduler.StepLR."""

    step_size: int
    gamma: float = 0.1

    def __post_init__(self) -> None:
        _take(
            self,
            step_size=whole("step_size", self.step_size, 1),
            gamma=not_negative("gamma", self.gamma),
        )

    def __call__(self, step: int, lr: float) -> float:
        return _powered(lr, self.gamma, step // self.step_size)


@dataclass(frozen=True)
class MultiStepLR(AnswersKeywords):
    """lr * gamma^k after k of the ``milestones``, as torch.optim.lr_scheduler.MultiStepLR.

        >>> [MultiStepLR([1, 3], gamma=0.5)(step, 1.0) for step in range(4)]
        [1.0, 0.5, 0.5, 0.25]

    A milestone that is listed twice counts twice.
    """

    milestones: Sequence[int]
    gamma: float = 0.1

    def __post_init__(self) -> None:
        milestones = tuple(sorted(wholes("milestones", self.milestones, 0)))
        _take(self, milestones=milestones, gamma=not_negative("gamma", self.gamma))

    def __call__(self, step: int, lr: float) -> float:
        return _powered(lr, self.gamma, bisect_right(self.milestones, step))


@dataclass(frozen=True)
class ExponentialLR(AnswersKeywords):
    """lr * gamma^step, as torch.optim.lr_scheduler.ExponentialLR."""

    gamma: float

    def __post_init__(self) -> None:
        _take(self, gamma=not_negative("gamma", self.gamma))

    def __call__(self, step: int, lr: float) -> float:
        return _powered(lr, self.gamma, step)


@dataclass(frozen=True)
class LinearLR(AnswersKeywords):
    """A straight line from lr * start_factor to lr * end_factor at step ``total_iters``, constant
    afterwards.

    As torch.optim.lr_scheduler.LinearLR, which is the usual warm-up.

        >>> [LinearLR(0.5, 1.0, 2)(step, 1.0) for step in range(4)]
        [0.5, 0.75, 1.0, 1.0]
    """

    start_factor: float = 1.0 / 3.0
    end_factor: float = 1.0
    total_iters: int = 5

    def __post_init__(self) -> None:
        start, end = (
            not_negative("start_factor", self.start_factor),
            not_negative("end_factor", self.end_factor),
        )
        _take(
            self,
            start_factor=start,
            end_factor=end,
            total_iters=whole("total_iters", self.total_iters, 1),
        )

    def __call__(self, step: int, lr: float) -> float:
        return lr * _line(self.start_factor, self.end_factor, min(step / self.total_iters, 1.0))


@dataclass(frozen=True)
class CosineAnnealingLR(AnswersKeywords):
    """Half a cosine from lr at step 0 to ``eta_min`` at step ``T_max`` (Loshchilov and Hutter,
    2017).

    As torch.optim.lr_scheduler.CosineAnnealingLR: after ``T_max`` the cosine continues, and rises
    again.

        >>> [round(CosineAnnealingLR(2)(step, 1.0), 3) for step in range(3)]
        [1.0, 0.5, 0.0]
    """

    T_max: int
    eta_min: float = 0.0

    def __post_init__(self) -> None:
        _take(
            self, T_max=whole("T_max", self.T_max, 1), eta_min=not_negative("eta_min", self.eta_min)
        )

    def __call__(self, step: int, lr: float) -> float:
        return _half_cosine(lr, self.eta_min, step / self.T_max)


@dataclass(frozen=True)
class OneCycleLR(AnswersKeywords):
    """Rise from lr / div_factor to lr, then fall to lr / (div_factor * final_div_factor) (Smith and
    Topin, 2018).

    As torch.optim.lr_scheduler.OneCycleLR, with the optimizer's learning rate as its ``max_lr``.
    The momentum does not change (``cycle_momentum=False``).

    Args:
        total_steps: length of the cycle; later steps raise ArgumentError.
        pct_start: share of the steps in which the rate rises, 0 to 1.
        anneal_strategy: "cos" or "linear", the form of each phase.
        div_factor, final_div_factor: see above.
        three_phase: fall to lr / div_factor in as many steps as the rise took, then to the end.
    """

    total_steps: int
    pct_start: float = 0.3
    anneal_strategy: Literal["cos", "linear"] = "cos"
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    three_phase: bool = False

    def __post_init__(self) -> None:
        _take(
            self,
            total_steps=whole("total_steps", self.total_steps, 1),
            pct_start=share("pct_start", self.pct_start),
            div_factor=positive("div_factor", self.div_factor),
            final_div_factor=positive("final_div_factor", self.final_div_factor),
            three_phase=flag("three_phase", self.three_phase),
        )
        if self.anneal_strategy not in ("cos", "linear"):
            raise ArgumentError(
                f'anneal_strategy must be "cos" or "linear", got {self.anneal_strategy!r}'
            )
        if self.three_phase and self.pct_start > 0.5:
            raise ArgumentError(
                f"three_phase needs pct_start of at most 0.5, got {self.pct_start!r}"
            )

    def __call__(self, step: int, lr: float) -> float:
        if not 0 <= step < self.total_steps:
            raise ArgumentError(
                f"OneCycleLR has steps 0 to {self.total_steps - 1}, got step {step}; increase "
                "total_steps"
            )
        way = _half_cosine if self.anneal_strategy == "cos" else _line
        low, up = lr / self.div_factor, self.pct_start * self.total_steps
        corners = [
            (0.0, low),
            (up - 1, lr),
            (float(self.total_steps - 1), low / self.final_div_factor),
        ]
        if self.three_phase:
            corners.insert(2, (2 * up - 2, low))
        for (begin, here), (end, there) in pairwise(corners):
            if step <= end or end == self.total_steps - 1:
                return way(here, there, (step - begin) / (end - begin) if end != begin else 1.0)
        raise AssertionError("unreachable: the last phase ends at the last step")


@dataclass(frozen=True)
class SequentialLR(AnswersKeywords):
    """Several schedules one after the other, each from its own step 0, as
    torch.optim.lr_scheduler.SequentialLR.

    Args:
        schedules: in order.
        milestones: ascending steps at which the second schedule and those after it begin.
    """

    schedules: Sequence[Schedule]
    milestones: Sequence[int]

    def __post_init__(self) -> None:
        schedules = tuple(_function(schedule) for schedule in self.schedules)
        _take(self, schedules=schedules, milestones=wholes("milestones", self.milestones, 1))
        if len(self.milestones) != len(self.schedules) - 1:
            raise ArgumentError(
                f"{len(self.schedules)} schedules need {len(self.schedules) - 1} milestones, got "
                f"{len(self.milestones)}"
            )
        if any(a >= b for a, b in pairwise(self.milestones)):
            raise ArgumentError(f"milestones must be ascending, got {self.milestones}")

    def __call__(self, step: int, lr: float) -> float:
        index = bisect_right(self.milestones, step)
        return self.schedules[index](step - (self.milestones[index - 1] if index else 0), lr)


def _function(schedule: Any) -> Schedule:
    """Return a schedule within another. Raises ArgumentError if it is not callable."""
    if not callable(schedule):
        raise ArgumentError(f"a schedule must be a function of (step, lr), got {told(schedule)}")
    made: Schedule = schedule
    return made


def warm_up(steps: int, then: Schedule | None = None, start_factor: float = 1e-3) -> SequentialLR:
    """Return a schedule that rises in a straight line from lr * start_factor to lr, then follows
    ``then``.

        >>> [warm_up(2, start_factor=0.5)(step, 1.0) for step in range(4)]
        [0.5, 0.75, 1.0, 1.0]

    Args:
        steps: length of the rise.
        then: the schedule after it, from its own step 0. The default stays at lr.
        start_factor: the first rate is lr * start_factor.
    """
    return SequentialLR((LinearLR(start_factor, 1.0, steps), then or ConstantLR()), (steps,))


@dataclass(frozen=True)
class PerEpoch(AnswersKeywords):
    """Make a schedule count epochs: one rate for ``steps_per_epoch`` steps."""

    schedule: Schedule
    steps_per_epoch: int

    def __post_init__(self) -> None:
        _function(self.schedule)
        _take(self, steps_per_epoch=whole("steps_per_epoch", self.steps_per_epoch, 1))

    def __call__(self, step: int, lr: float) -> float:
        return self.schedule(step // self.steps_per_epoch, lr)


SCHEDULES: dict[str, Callable[[int], Schedule]] = {
    "constant": lambda total: ConstantLR(),
    "step": lambda total: StepLR(max(total // 3, 1)),
    "cosine": lambda total: CosineAnnealingLR(total),
    "warmup_cosine": lambda total: warm_up(
        max(total // 20, 1), CosineAnnealingLR(total - max(total // 20, 1) or 1)
    ),
    "one_cycle": lambda total: OneCycleLR(total),
}
"""Schedules by name, as functions of the number of steps.

"step" divides the rate by 10 after each third of the steps. "warmup_cosine" warms up for a
twentieth of them.
"""


def make_schedule(what: Schedule | str | None, total_steps: int) -> Schedule:
    """Return a schedule by its name, for this many steps; None means "constant".

    A function is returned as it is.

    Raises:
        ArgumentError: if the name is unknown, or it is neither a name nor a function.
    """
    if callable(what):
        return what
    name = "constant" if what is None else what
    if not isinstance(name, str) or name.lower() not in SCHEDULES:
        raise ArgumentError(
            f"unknown schedule {what!r}; known are {', '.join(SCHEDULES)}, or any function of "
            "(step, lr)"
        )
    return SCHEDULES[name.lower()](max(total_steps, 1))


_KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        ConstantLR,
        StepLR,
        MultiStepLR,
        ExponentialLR,
        LinearLR,
        CosineAnnealingLR,
        OneCycleLR,
        SequentialLR,
        PerEpoch,
    )
}


def describe_schedule(schedule: Schedule) -> dict[str, Any]:
    """Return a schedule as JSON values: its class and its fields, including schedules among them.

    Raises:
        ArgumentError: if it is the caller's own function, which files cannot hold.
    """
    kind = type(schedule)
    if _KINDS.get(kind.__name__) is not kind:
        name = getattr(schedule, "__qualname__", kind.__qualname__)
        raise ArgumentError(f"a file cannot hold {name}, only the schedules {', '.join(_KINDS)}")
    values = {field.name: getattr(schedule, field.name) for field in fields(schedule)}  # type: ignore[arg-type]
    return {
        "class": kind.__name__,
        "arguments": plain(
            values, lambda value: describe_schedule(value) if callable(value) else None
        ),
    }


def rebuild_schedule(described: Any) -> Schedule:
    """Return the schedule that ``describe_schedule`` described. Raises the constructor's errors."""
    if described["class"] not in _KINDS:
        raise ModelFormatError(f"unknown schedule {described['class']!r}; upgrade portacnn")

    def made(value: Any) -> Any:
        if isinstance(value, list):
            return [made(inner) for inner in value]
        return rebuild_schedule(value) if isinstance(value, dict) else value

    return _KINDS[described["class"]](
        **{name: made(value) for name, value in described["arguments"].items()}
    )


def _line(here: float, there: float, way: float) -> float:
    return here + (there - here) * way


def _half_cosine(here: float, there: float, way: float) -> float:
    return there + (here - there) * (1.0 + cos(pi * way)) / 2.0
