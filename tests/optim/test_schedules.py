"""Schedules against torch.optim.lr_scheduler, step by step."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn import schedules
from portacnn.errors import ArgumentError
from portacnn.schedules import (
    SCHEDULES,
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    PerEpoch,
    SequentialLR,
    StepLR,
    make_schedule,
    warm_up,
)
from support.matrix import needs

# torch's, of the epoch argument and of its own order
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")


def theirs(make, steps, lr):
    """The rates of torch's schedule at steps 0, 1, ..."""
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(torch.optim.lr_scheduler, optimizer)
    rates = []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step + 1 < steps:
            scheduler.step()
    return rates


def agree(schedule, make, steps=100, lr=0.3, tolerance=1e-12):
    ours = [schedule(step, lr) for step in range(steps)]
    assert ours == pytest.approx(theirs(make, steps, lr), rel=tolerance, abs=1e-15)
    # nothing is kept between calls
    assert [schedule(step, lr) for step in reversed(range(steps))] == ours[::-1]


@needs("torch")
@pytest.mark.parametrize(
    "arguments", [{"step_size": 30}, {"step_size": 1, "gamma": 0.9}, {"step_size": 7, "gamma": 1.1}]
)
def test_step(arguments):
    agree(StepLR(**arguments), lambda torch, o: torch.StepLR(o, **arguments))


@needs("torch")
@pytest.mark.parametrize("milestones", [[10], [30, 80], [5, 5, 20], []])
def test_multi_step(milestones):
    agree(MultiStepLR(milestones, 0.4), lambda torch, o: torch.MultiStepLR(o, milestones, 0.4))


def test_multi_step_takes_them_in_any_order():
    assert MultiStepLR([80, 30]) == MultiStepLR((30, 80))


@needs("torch")
@pytest.mark.parametrize("gamma", [0.9, 1.0, 1.02])
def test_exponential(gamma):
    agree(ExponentialLR(gamma), lambda torch, o: torch.ExponentialLR(o, gamma))


@needs("torch")
@pytest.mark.parametrize("start", [1e-3, 1 / 3, 1.0])
@pytest.mark.parametrize("total", [1, 10, 200])
def test_linear(start, total):
    arguments = {"start_factor": start, "end_factor": 0.9, "total_iters": total}
    agree(
        LinearLR(**arguments), lambda torch, o: torch.LinearLR(o, **arguments), tolerance=1e-10
    )  # torch's is a product


@needs("torch")
@pytest.mark.parametrize("t_max", [100, 99, 30])  # the last: there, back and on
@pytest.mark.parametrize("eta_min", [0.0, 0.01])
def test_cosine(t_max, eta_min):
    agree(
        CosineAnnealingLR(t_max, eta_min),
        lambda torch, o: torch.CosineAnnealingLR(o, t_max, eta_min),
        tolerance=1e-9,
    )


@needs("torch")
@settings(max_examples=60)
@given(
    st.integers(2, 300),
    st.floats(0.05, 0.95),
    st.sampled_from(["cos", "linear"]),
    st.floats(2.0, 50.0),
    st.floats(10.0, 1e4),
    st.booleans(),
)
def test_one_cycle(total, pct_start, anneal, div, final, three_phase):
    if three_phase:
        pct_start /= 2
    if abs(pct_start * total - 1) < 1e-6:
        pct_start += 1e-3  # torch divides by zero there
    arguments = {
        "total_steps": total,
        "pct_start": pct_start,
        "anneal_strategy": anneal,
        "div_factor": div,
        "final_div_factor": final,
        "three_phase": three_phase,
    }
    agree(
        OneCycleLR(**arguments),
        lambda torch, o: torch.OneCycleLR(o, 0.3, cycle_momentum=False, **arguments),
        steps=total,
    )


def test_one_cycle_has_a_peak_and_an_end():
    cycle = OneCycleLR(100)
    rates = [cycle(step, 2.0) for step in range(100)]
    assert max(rates) == rates[29] == pytest.approx(2.0)
    assert rates[0] == pytest.approx(2.0 / 25)
    assert rates[-1] == pytest.approx(2.0 / 25 / 1e4)
    for step in (-1, 100):
        with pytest.raises(ArgumentError, match="steps 0 to 99"):
            cycle(step, 2.0)
    assert OneCycleLR(10, 0.1)(0, 1.0) == 1.0  # nothing to go up in: torch divides by zero


@needs("torch")
def test_sequence_and_warm_up():
    schedule = SequentialLR([LinearLR(0.1, 1.0, 20), StepLR(15, 0.5), ExponentialLR(0.9)], [20, 60])

    def same(torch, o):
        parts = [
            torch.LinearLR(o, 0.1, 1.0, 20),
            torch.StepLR(o, 15, 0.5),
            torch.ExponentialLR(o, 0.9),
        ]
        return torch.SequentialLR(o, parts, [20, 60])

    agree(schedule, same, tolerance=1e-10)

    def cosine(torch, o):
        return torch.SequentialLR(
            o, [torch.LinearLR(o, 1e-3, 1.0, 10), torch.CosineAnnealingLR(o, 90)], [10]
        )

    agree(warm_up(10, CosineAnnealingLR(90)), cosine, tolerance=1e-9)
    assert [warm_up(4, start_factor=0.0)(step, 1.0) for step in range(6)] == [
        0,
        0.25,
        0.5,
        0.75,
        1,
        1,
    ]


@needs("torch")
def test_per_epoch():
    agree(
        PerEpoch(StepLR(2), 7),
        lambda torch, o: torch.LambdaLR(o, lambda step: 0.1 ** (step // 7 // 2)),
    )


def test_names():
    for name in SCHEDULES:
        for total in (1, 2, 20, 99):
            schedule = make_schedule(name.upper(), total)
            rates = [schedule(step, 0.1) for step in range(total)]
            assert all(0 <= rate <= 0.1 * (1 + 1e-12) and math.isfinite(rate) for rate in rates)
    assert make_schedule(None, 5)(3, 0.1) == 0.1
    assert make_schedule("cosine", 40) == CosineAnnealingLR(40)
    assert make_schedule("step", 30) == StepLR(10)
    assert make_schedule("warmup_cosine", 100) == warm_up(5, CosineAnnealingLR(95))
    assert make_schedule("one_cycle", 0) == OneCycleLR(1)

    def mine(step, lr):
        return lr / (1 + step)

    assert make_schedule(mine, 3) is mine
    for wrong in ("cosinus", 3, ""):
        with pytest.raises(ArgumentError, match=r"unknown schedule.*cosine"):
            make_schedule(wrong, 3)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: ConstantLR(-1.0), "factor"),
        (lambda: StepLR(0), "step_size"),
        (lambda: StepLR(2.0), "step_size"),
        (lambda: StepLR(2, -0.1), "gamma"),
        (lambda: MultiStepLR([3, -1]), "milestones"),
        (lambda: ExponentialLR(float("nan")), "gamma"),
        (lambda: LinearLR(total_iters=0), "total_iters"),
        (lambda: LinearLR(start_factor=-1), "start_factor"),
        (lambda: CosineAnnealingLR(0), "T_max"),
        (lambda: CosineAnnealingLR(3, -0.1), "eta_min"),
        (lambda: OneCycleLR(0), "total_steps"),
        (lambda: OneCycleLR(10, 1.5), "pct_start"),
        (lambda: OneCycleLR(10, 0.6, three_phase=True), "pct_start"),
        (lambda: OneCycleLR(10, anneal_strategy="cosine"), "anneal_strategy"),
        (lambda: OneCycleLR(10, div_factor=0), "div_factor"),
        (lambda: SequentialLR([StepLR(1)], [3]), "0 milestones, got 1"),
        (lambda: SequentialLR([StepLR(1)] * 3, [3, 3]), "must be ascending"),
        (lambda: warm_up(0), "total_iters"),
        (lambda: PerEpoch(StepLR(1), 0), "steps_per_epoch"),
        (lambda: PerEpoch("cosine", 2), "a schedule must be a function"),
        (lambda: SequentialLR(["cosine", StepLR(1)], [3]), "a schedule must be a function"),
        (lambda: MultiStepLR(5), "milestones must be several whole numbers"),
        (lambda: MultiStepLR("12"), "milestones must be several whole numbers"),
        (lambda: StepLR(10**30), "step_size must be at most"),
        (lambda: StepLR(True), "step_size"),
        (lambda: StepLR(np.array([3, 3])), "step_size"),
        (lambda: ExponentialLR(10**400), "gamma must be a number of 0 or more, got 1000"),
        (
            lambda: ExponentialLR(10**5000),
            "gamma must be a number of 0 or more, got a int too long",
        ),
        (lambda: ExponentialLR(True), "gamma"),
        (lambda: OneCycleLR(10, three_phase="no"), "three_phase must be True or False, got 'no'"),
    ],
)
def test_invalid_options_are_refused(make, word):
    with pytest.raises(ArgumentError, match=word):
        make()


@pytest.mark.parametrize(
    "schedule",
    [
        StepLR(1, 3),
        ExponentialLR(3),
        ExponentialLR(1.5),
        MultiStepLR(range(5000), 3),
        PerEpoch(StepLR(1, 7), 2),
    ],
)
def test_a_rate_that_no_float_can_hold(schedule):
    """Powers of a whole number have no end, and take as long: 3^(10^9) was once begun. The first
    rates are right."""
    assert schedule(0, 0.5) in (0.5, 1.5)
    with pytest.raises(
        ArgumentError,
        match=r"the learning rate 0\.5 \* [\d.]+\^\d+ overflows a float",
    ):
        schedule(10**9, 0.5)


def test_numbers_of_any_library_are_pythons_in_the_end():
    """So that they are JSON, and are reckoned with as floats."""
    made = [
        StepLR(np.int64(2), np.float32(0.5)),
        MultiStepLR(np.array([3, 1]), 1),
        OneCycleLR(np.int32(5), np.float64(0.25), div_factor=2, three_phase=np.True_),
    ]
    assert made == [
        StepLR(2, 0.5),
        MultiStepLR((1, 3), 1.0),
        OneCycleLR(5, 0.25, div_factor=2.0, three_phase=True),
    ]
    values = [value for schedule in made for value in vars(schedule).values()]
    assert {type(value) for value in values} == {int, float, bool, str, tuple}


def test_they_are_values():
    assert hash(StepLR(3)) == hash(StepLR(3))
    assert repr(warm_up(2)).startswith("SequentialLR(schedules=(LinearLR(")
    with pytest.raises(AttributeError):
        schedules.StepLR(3).gamma = 1.0


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (StepLR(2, 0.5), [8, 8, 4, 4, 2, 2, 1]),
        (MultiStepLR((2, 4, 4), 0.5), [8, 8, 4, 4, 1, 1, 1]),
        (ExponentialLR(0.5), [8, 4, 2, 1, 0.5, 0.25, 0.125]),
        (LinearLR(0.5, 1.0, 4), [4, 5, 6, 7, 8, 8, 8]),
        (CosineAnnealingLR(4, 2.0), [8, 5 + 3 * 0.5**0.5, 5, 5 - 3 * 0.5**0.5, 2]),
        (SequentialLR((ConstantLR(0.5), StepLR(2, 0.5)), (3,)), [4, 4, 4, 8, 8, 4, 4]),
        (PerEpoch(StepLR(1, 0.5), 3), [8, 8, 8, 4, 4, 4, 2]),
        (OneCycleLR(5, 0.6, "linear", 4.0, 2.0), [2, 5, 8, 4.5, 1]),
        (OneCycleLR(7, 3 / 7, "linear", 4.0, 2.0, True), [2, 5, 8, 5, 2, 1.5, 1]),
        (OneCycleLR(7, 3 / 7, "cos", 4.0, 2.0, True), [2, 5, 8, 5, 2, 1.5, 1]),
    ],
)
def test_rates_agree_with_values_by_hand(schedule, rates):
    assert [schedule(step, 8.0) for step in range(len(rates))] == pytest.approx(rates, rel=1e-12)
