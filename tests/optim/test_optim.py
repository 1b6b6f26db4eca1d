"""Optimizers: against PyTorch's and loops by hand, in place, and with updates held back by
``ok``."""

import numpy as np
import pytest

from portacnn.errors import ArgumentError, ArrayError, ModelFormatError, ShapeError
from portacnn.optim import (
    SGD,
    AdaGrad,
    Adam,
    AdamW,
    Momentum,
    Optimizer,
    RMSprop,
    make_optimizer,
)
from support.checks import with_each_kernel
from support.matrix import needs

RULES = [
    (SGD, {"lr": 0.1}, "SGD", {"lr": 0.1}),
    (Momentum, {"lr": 0.1, "momentum": 0.8}, "SGD", {"lr": 0.1, "momentum": 0.8}),
    (Adam, {}, "Adam", {"lr": 0.001}),
    (
        Adam,
        {"lr": 0.02, "beta1": 0.7, "beta2": 0.9, "eps": 1e-3},
        "Adam",
        {"lr": 0.02, "betas": (0.7, 0.9), "eps": 1e-3},
    ),
]
every_rule = pytest.mark.parametrize(("kind", "param", "torch_name", "torch_param"), RULES)


def values(backend, seed=0, dtype="float64"):
    rng = np.random.default_rng(seed)
    hosts = {
        "a": rng.standard_normal((3, 2)),
        "b": rng.standard_normal(4),
        "c": rng.standard_normal((1, 2, 2, 2)),
    }
    return {name: backend.backend.asarray(host, dtype) for name, host in hosts.items()}


@needs("torch")
@every_rule
def test_values_and_gradients_agree_with_pytorch(backend, kind, param, torch_name, torch_param):
    import torch

    params, optimizer = values(backend), kind(**param)
    held, twin = (
        dict(params),
        {name: torch.tensor(backend.host(p), requires_grad=True) for name, p in params.items()},
    )
    reference = getattr(torch.optim, torch_name)(twin.values(), **torch_param)
    for step in range(5):
        grads = {
            name: backend.array(backend.host(g)) for name, g in values(backend, step + 1).items()
        }
        before = {name: backend.host(g) for name, g in grads.items()}
        optimizer.update(params, grads)
        for name, p in twin.items():
            p.grad = torch.tensor(before[name])
        reference.step()
        for name, p in params.items():
            assert p is held[name]  # written in place
            np.testing.assert_allclose(
                backend.host(p), twin[name].detach().numpy(), rtol=1e-12, atol=1e-14
            )
            np.testing.assert_array_equal(backend.host(grads[name]), before[name])
    assert optimizer.steps == 5


def by_hand(kind, p, grads, lr):
    """The rules once more, for one number."""
    v = m = s = 0.0
    for t, g in enumerate(grads, 1):
        if kind is SGD:
            p -= lr * g
        elif kind is Momentum:
            v = 0.9 * v + g
            p -= lr * v
        else:
            m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g * g
            p -= lr * (m / (1 - 0.9**t)) / ((s / (1 - 0.999**t)) ** 0.5 + 1e-8)
    return p


@pytest.mark.parametrize("kind", [SGD, Momentum, Adam])
def test_updates_agree_with_the_rule_by_hand(backend, kind):
    optimizer, grads = kind(lr=0.05), [0.5, -2.0, 0.0, 1e-3]
    params = {"p": backend.backend.asarray(np.array([1.5]))}
    for g in grads:
        optimizer.update(params, {"p": backend.array([g])})
    assert backend.host(params["p"])[0] == pytest.approx(by_hand(kind, 1.5, grads, 0.05), rel=1e-12)


EVERY_OPTION = [
    (SGD, {"lr": 0.1, "weight_decay": 0.2}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.2}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (AdaGrad, {"lr": 0.1, "lr_decay": 0.5, "weight_decay": 0.2, "initial_accumulator_value": 0.3}),
    (RMSprop, {"lr": 0.1, "alpha": 0.8, "weight_decay": 0.2, "momentum": 0.7}),
    (RMSprop, {"lr": 0.1, "alpha": 0.8, "eps": 1e-3, "centered": True}),
    (Adam, {"lr": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.2}),
    (AdamW, {"lr": 0.1, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.2}),
]


def one_number(kind, o, p, grads):
    """Each rule with its options, for one number."""
    v = m = 0.0
    s = o.get("initial_accumulator_value", 0.0)
    eps, rate = o.get("eps", 1e-10 if kind is AdaGrad else 1e-8), o.get("momentum", 0.0)
    for t, g in enumerate(grads, 1):
        lr, decay = o["lr"] / (1 + (t - 1) * o.get("lr_decay", 0.0)), o.get("weight_decay", 0.0)
        if kind is AdamW:
            p -= lr * decay * p
        else:
            g += decay * p
        if kind is SGD:
            v = g if t == 1 else rate * v + (1 - o.get("dampening", 0.0)) * g
            p -= lr * (g + rate * v if o.get("nesterov") else v if rate else g)
        elif kind is AdaGrad:
            s += g * g
            p -= lr * g / (s**0.5 + eps)
        elif kind is RMSprop:
            a = o["alpha"]
            s, m = a * s + (1 - a) * g * g, a * m + (1 - a) * g
            v = rate * v + g / ((s - m * m if o.get("centered") else s) ** 0.5 + eps)
            p -= lr * v
        else:
            b, c = o["beta1"], o["beta2"]
            m, s = b * m + (1 - b) * g, c * s + (1 - c) * g * g
            p -= lr * (m / (1 - b**t)) / ((s / (1 - c**t)) ** 0.5 + eps)
    return p


@pytest.mark.parametrize(("kind", "options"), EVERY_OPTION)
@with_each_kernel
def test_every_option_agrees_with_the_rule_by_hand(backend, kind, options):
    """One parameter from the first step on, and one whose first gradient comes at the third: its
    own steps are counted."""
    optimizer, grads = kind(**options), [0.5, -2.0, 0.25, 1e-3, 1.0]
    params = {key: backend.backend.asarray(np.array([1.5])) for key in ("p", "late")}
    for step, g in enumerate(grads):
        keys = ("p", "late") if step >= 2 else ("p",)
        optimizer.update(params, {key: backend.array([g]) for key in keys})
    for key, given in (("p", grads), ("late", grads[2:])):
        expected = one_number(kind, options, 1.5, given)
        assert backend.host(params[key])[0] == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("kind", [SGD, Momentum, Adam])
def test_float32_stays_float32(backend, kind):
    params, optimizer = values(backend, dtype="float32"), kind()
    optimizer.update(params, values(backend, 1, dtype="float32"))
    for array in (
        *params.values(),
        *(a for slot in optimizer.state.values() for a in slot.values()),
    ):
        assert array.dtype == backend.backend.dtype("float32")
        assert array.device == backend.backend.device


@pytest.mark.parametrize("kind", [SGD, Momentum, Adam])
def test_nothing_changes_where_ok_is_false(backend, kind):
    def run(*oks):
        params, optimizer = values(backend), kind(lr=0.1)
        for step, ok in enumerate(oks):
            gradients = values(backend, step + 1)
            if not ok:
                gradients = {name: g * float("nan") for name, g in gradients.items()}
            optimizer.update(params, gradients, backend.array(np.asarray([ok]))[0, ...])
        state = {(s, name): a for s, slot in optimizer.state.items() for name, a in slot.items()}
        return {key: backend.host(a) for key, a in (params | state).items()}

    for key, value in run(True, False, False).items():
        assert np.isfinite(value).all()
        np.testing.assert_array_equal(value, run(True)[key], err_msg=str(key))


def test_parameters_without_a_gradient_stay(backend):
    params, optimizer = values(backend), Momentum(lr=0.1)
    before = {name: backend.host(p) for name, p in params.items()}
    optimizer.update(params, {})
    assert optimizer.steps == 0
    grads = values(backend, 1)
    del grads["b"]
    optimizer.update(params, grads)
    assert {name: bool((backend.host(p) != before[name]).any()) for name, p in params.items()} == {
        "a": True,
        "b": False,
        "c": True,
    }
    assert set(optimizer.state["velocity"]) == {"a", "c"}
    optimizer.update(params, values(backend, 2))
    assert set(optimizer.state["velocity"]) == {"a", "b", "c"}


def test_lr_may_be_set_between_steps(backend):
    params, optimizer = {"p": backend.backend.asarray(np.array([1.0]))}, SGD(lr=0.5)
    one = {"p": backend.array([1.0])}
    optimizer.update(params, one)
    optimizer.lr = 0.0625
    optimizer.update(params, one)
    assert backend.host(params["p"])[0] == 1.0 - 0.5 - 0.0625


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sgd", SGD), ("momentum", Momentum), ("adam", Adam), ("SGD", SGD), ("Adam", Adam)],
)
def test_by_name(name, kind):
    made = make_optimizer(name, {"lr": 0.25})
    assert type(made) is kind
    assert made.lr == 0.25
    assert make_optimizer(made) is made
    assert make_optimizer(name).lr == kind().lr


@pytest.mark.parametrize(
    ("name", "param", "message"),
    [
        (
            "adamax",
            None,
            "unknown optimizer 'adamax'; known are sgd, momentum, adagrad, rmsprop, adam, adamw",
        ),
        (None, None, "unknown optimizer None"),
        (SGD, None, "unknown optimizer"),
        ("sgd", {"eps": 0.9}, "SGD does not take eps; it takes lr, momentum, .*"),
        (
            "adam",
            {"beta3": 1, "alpha": 2},
            r"Adam does not take .*beta3 \(did you mean beta2\?\).*; it takes lr, beta1, .*",
        ),
        ("sgd", {"lr": -0.1}, "lr must be a number of 0 or more, got -0.1"),
        ("sgd", {"lr": float("nan")}, "lr must be a number of 0 or more, got nan"),
        ("sgd", {"lr": float("inf")}, "lr must be"),
        ("sgd", {"lr": "0.1"}, "lr must be a number of 0 or more, got '0.1'"),
        ("momentum", {"momentum": 1.0}, r"momentum must lie in 0 <= momentum < 1, got 1\.0"),
        ("adam", {"beta2": -0.5}, "beta2 must lie in"),
        ("adam", {"eps": None}, "eps must be a number"),
        ("adam", {"eps": 10**400}, "eps must be a number"),
        ("sgd", {"lr": 10**400}, "lr must be a number"),
        ("sgd", {"lr": np.array([0.1, 0.2])}, "lr must be a number"),
        (
            "sgd",
            {"momentum": 0.9, "nesterov": "false"},
            "nesterov must be True or False, got 'false'",
        ),
        ("rmsprop", {"centered": 1}, "centered must be True or False"),
        ("adam", {"decoupled_weight_decay": None}, "decoupled_weight_decay must be True or False"),
        ("adam", [1], r"optimizer_param must be a dictionary such as {\"lr\": 0\.01}, got \[1\]"),
        ("sgd", 0.1, "optimizer_param must be a dictionary such as"),
        ("sgd", {1: 2}, "SGD does not take 1; it takes lr, .*"),
    ],
)
def test_what_is_no_optimizer(name, param, message):
    with pytest.raises(ArgumentError, match=message):
        make_optimizer(name, param)


def test_a_rate_without_a_meaning_is_refused_when_it_is_set():
    optimizer = SGD(0.5)
    for wrong in (-1.0, float("nan"), "0.1", None, True, 10**400):
        with pytest.raises(ArgumentError, match="lr must be a number of 0 or more"):
            optimizer.lr = wrong
    assert optimizer.lr == 0.5
    optimizer.lr = np.float32(0.25)
    assert type(optimizer.lr) is float


@pytest.mark.parametrize("kind", [Momentum, Adam], ids=lambda kind: kind.__name__)
def test_a_loaded_state_replaces_all_that_was(backend, kind):
    """The rate too, and the state and counts of parameters that the loaded one has never seen."""
    params, grads = values(backend), values(backend, 1)
    older = kind(0.25)
    older.update({"a": params["a"]}, grads)
    older.lr = 0.125
    saved = older.state_dict()
    for used in (False, True):
        newer = kind(0.5)
        if used:
            newer.update(params, grads)
            newer.update(params, grads)
        newer.load_state_dict(saved, params)
        assert (newer.lr, newer.steps, newer.counts) == (0.125, 1, {"a": 1})
        assert {key for arrays in newer.state.values() for key in arrays} == {"a"}
        for slot, arrays in older.state.items():
            np.testing.assert_array_equal(
                backend.host(newer.state[slot]["a"]), backend.host(arrays["a"])
            )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arrays": {"velocity.a": [1.0, 2.0]}}, r"no NumPy array: velocity\.a"),
        ({"arrays": [1.0]}, r"arrays must be a dictionary by key, got \[1\.0\]"),
        ({"counts": ["a"]}, "counts must be a dictionary by key"),
        ({"counts": {"a": 2}}, "the count of a must be at most 1, got 2"),
        ({"counts": {"a": True}}, "the count of a must be a whole number"),
        ({"steps": 10**30}, "steps must be at most"),
        ({"lr": 10**400}, "lr must be a number of 0 or more"),
        ({"lr": True}, "lr must be a number of 0 or more"),
    ],
)
def test_a_state_without_a_meaning_changes_nothing(change, message):
    params = {"a": np.ones(2)}
    optimizer = Momentum(0.5)
    optimizer.update(params, {"a": np.ones(2)})
    before = optimizer.state_dict()
    with pytest.raises(ModelFormatError, match=message):
        optimizer.load_state_dict({**before, **change}, params)
    after = optimizer.state_dict()
    assert after.pop("arrays")["velocity.a"].tolist() == before.pop("arrays")["velocity.a"].tolist()
    assert after == before


def test_arguments_beside_a_finished_optimizer():
    with pytest.raises(ArgumentError):
        make_optimizer(SGD(0.1), {"lr": 5.0})


def test_an_optimizer_that_you_write_trains(backend):
    class Signs(Optimizer):
        slots = ("count",)

        def apply(self, params, grads, state, step, *, lr, **common):
            assert set(common) == {"weight_decay", "ok"}
            for p, g, c in zip(params, grads, state["count"], strict=True):
                c[...] = c + float(step)
                p[...] = p - lr * backend.xp.sign(g)

    params, optimizer = values(backend), Signs(0.5)
    before = backend.host(params["a"])
    grads = values(backend, 1)
    optimizer.update(params, grads)
    np.testing.assert_allclose(
        backend.host(params["a"]), before - 0.5 * np.sign(backend.host(grads["a"]))
    )
    assert (backend.host(optimizer.state["count"]["a"]) == 1).all()


def test_gradients_unlike_their_parameters(backend):
    params = {"a": backend.backend.asarray(np.zeros(3))}
    with pytest.raises(
        ShapeError,
        match=r"SGD: parameter a has shape \(3,\), its gradient "
        r"\(1,\)",
    ):
        SGD(1.0).update(params, {"a": backend.array(np.ones(1))})
    with pytest.raises(ArgumentError, match="params and grads have no key in common: a and A"):
        SGD(1.0).update(params, {"A": backend.array(np.ones(3))})
    with pytest.raises(ArrayError, match="must be floating point"):
        SGD(1.0).update(
            {"a": backend.array(np.ones(3), "int64")}, {"a": backend.array(np.ones(3), "int64")}
        )
    assert backend.host(params["a"]).tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", [Momentum, Adam])
def test_a_loaded_state_is_the_optimizers_own(backend, kind):
    """Steps after loading leave the state that was loaded as it is, and may be loaded again."""
    params, optimizer = values(backend), kind(lr=0.1)
    optimizer.update(params, values(backend, 1))
    state = optimizer.state_dict()
    before = {name: array.copy() for name, array in state["arrays"].items()}
    other = kind(lr=0.1)
    other.load_state_dict(state, params)
    other.update(params, values(backend, 2))
    for name, array in before.items():
        np.testing.assert_array_equal(state["arrays"][name], array)
