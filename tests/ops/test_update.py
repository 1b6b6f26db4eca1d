"""The optimizers' steps against torch.optim and against loops over numbers; what ``ok`` holds
back."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from portacnn.ops import adam_update, all_finite, momentum_update, sgd_update, use_kernels
from portacnn.runtime import Array
from support import oracles
from support.checks import DTYPES, agree, normal, untouched, with_each_kernel
from support.matrix import Here, backends, needs

STEPS = 50
SHAPES = ((3, 2, 2, 2), (4,), (2, 5))


class Rule(NamedTuple):
    slots: int  # how many states there are for each parameter
    step: Callable[..., None]  # params, grads, *states, step from 1, ok
    number: Callable[[float, list[float]], float]
    torch: Callable[[Any, list], Any]


def rule(
    slots: int, update: Callable[..., None], number: Callable, torchs: Callable, **rates: float
) -> Rule:
    def step(params: list, grads: list, *states: list, count: int, ok: Array | None = None) -> None:
        counted = {"step": count} if update is adam_update else {}
        update(params, grads, *states, **rates, **counted, ok=ok)

    return Rule(slots, step, number, torchs)


RULES = {
    "sgd": rule(
        0,
        sgd_update,
        lambda p, gs: oracles.sgd(p, gs, 0.1),
        lambda torch, ps: torch.optim.SGD(ps, lr=0.1),
        lr=0.1,
    ),
    "momentum": rule(
        1,
        momentum_update,
        lambda p, gs: oracles.momentum(p, gs, 0.01, 0.9),
        lambda torch, ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9),
        lr=0.01,
        momentum=0.9,
    ),
    "adam": rule(
        2,
        adam_update,
        lambda p, gs: oracles.adam(p, gs, 0.01, 0.9, 0.999, 1e-8),
        lambda torch, ps: torch.optim.Adam(ps, lr=0.01, betas=(0.9, 0.999), eps=1e-8),
        lr=0.01,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
    ),
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
START = [normal(*shape, seed=i) for i, shape in enumerate(SHAPES)]
GRADS = [[normal(*shape, seed=100 * t + i) for i, shape in enumerate(SHAPES)] for t in range(STEPS)]


def writable(here: Here, hosts: list, dtype: str) -> list[Array]:
    """Parameters are what an update may write, on every backend."""
    return [here.backend.asarray(host, dtype) for host in hosts]


def states_of(here: Here, rule: Rule, dtype: str) -> list[list[Array]]:
    return [writable(here, [np.zeros(shape) for shape in SHAPES], dtype) for _ in range(rule.slots)]


def run(
    here: Here, rule: Rule, dtype: str, ok: bool | None = None
) -> tuple[list[Array], list[list[Array]]]:
    params, states = writable(here, START, dtype), states_of(here, rule, dtype)
    flag = None if ok is None else here.backend.asarray(np.asarray(ok))
    for t, hosts in enumerate(GRADS, start=1):
        grads = [here.array(g, dtype) for g in hosts]
        with untouched(here, *grads):
            rule.step(params, grads, *states, count=t, ok=flag)
    return params, states


@pytest.mark.parametrize("ok", [None, True])
@pytest.mark.parametrize("dtype", DTYPES)
@rules
@with_each_kernel
def test_fifty_steps_by_number(backend: Here, rule: Rule, dtype: str, ok: bool | None):
    params, _ = run(backend, rule, dtype, ok)
    for i, (p, start) in enumerate(zip(params, START, strict=True)):
        expected = np.zeros(start.shape)
        for index in np.ndindex(start.shape):
            expected[index] = rule.number(float(start[index]), [float(g[i][index]) for g in GRADS])
        agree(backend, p, expected, backend.array(start, dtype))


@needs("torch")
@rules
@with_each_kernel
def test_fifty_steps_of_pytorchs(backend: Here, rule: Rule):
    import torch

    leaves = [torch.tensor(host, requires_grad=True) for host in START]
    optimizer = rule.torch(torch, leaves)
    for hosts in GRADS:
        for leaf, g in zip(leaves, hosts, strict=True):
            leaf.grad = torch.tensor(g)
        optimizer.step()
    for p, leaf in zip(run(backend, rule, "float64")[0], leaves, strict=True):
        agree(backend, p, leaf.detach().numpy(), backend.array(np.ones(1)))


@rules
@with_each_kernel
def test_a_step_that_is_not_ok_changes_nothing(backend: Here, rule: Rule):
    """Though its gradients are not finite, and after steps that left a state."""
    params, states = run(backend, rule, "float32")
    bad = [
        backend.array(np.where(normal(*shape) > 0, np.nan, np.inf), "float32") for shape in SHAPES
    ]
    no = backend.backend.asarray(np.asarray(False))
    with (
        untouched(backend, *params, *(a for state in states for a in state)),
        np.errstate(invalid="ignore"),
    ):
        rule.step(params, bad, *states, count=STEPS + 1, ok=no)


@rules
@with_each_kernel
def test_arrays_keep_their_identity(backend: Here, rule: Rule):
    """The lists still hold the same objects, and whoever holds one sees the new values."""
    params, states = writable(backend, START, "float32"), states_of(backend, rule, "float32")
    held = [*params, *(a for state in states for a in state)]
    grads = [backend.array(g, "float32") for g in GRADS[0]]
    rule.step(params, grads, *states, count=1)
    assert all(
        a is b
        for a, b in zip(held, [*params, *(a for state in states for a in state)], strict=True)
    )
    for p, start in zip(held, START, strict=False):
        assert not np.array_equal(backend.host(p), start.astype("float32"))


@backends(having="views")
@rules
@with_each_kernel
def test_parameters_that_are_views(backend: Here, rule: Rule):
    """Permuted and sliced parameters are written through."""
    store = backend.backend.asarray(np.zeros((7, 9)))
    view = backend.xp.permute_dims(store[1:6:2, 2:6], (1, 0))  # (4, 3)
    start, g = normal(4, 3), backend.array(normal(4, 3, seed=1))
    view[...] = backend.array(start)
    states = [[backend.backend.asarray(np.zeros((4, 3)))] for _ in range(rule.slots)]
    rule.step([view], [g], *states, count=1)
    expected = [
        rule.number(float(p), [float(q)])
        for p, q in zip(start.flat, backend.host(g).flat, strict=True)
    ]
    whole = np.zeros((7, 9))
    whole[1:6:2, 2:6] = np.reshape(expected, (4, 3)).T
    agree(backend, store, whole, g)


@pytest.mark.parametrize("dtype", DTYPES)
@rules
@backends("numpy", "numpy-readonly")
def test_overrides_give_the_same_bits(backend: Here, rule: Rule, dtype: str):
    """What NumPy's kernels promise."""
    results = []
    for choice in ("auto", "reference"):
        with use_kernels(choice):
            params, states = run(backend, rule, dtype)
        results.append([a.tobytes() for arrays in (params, *states) for a in arrays])
    assert results[0] == results[1]


@rules
@with_each_kernel
def test_lists_of_unequal_length(backend: Here, rule: Rule):
    params, states = writable(backend, START, "float32"), states_of(backend, rule, "float32")
    with pytest.raises(ValueError, match="zip"):
        rule.step(params, [backend.array(GRADS[0][0], "float32")], *states, count=1)


@pytest.mark.parametrize("dtype", DTYPES)
@with_each_kernel
def test_all_finite_looks_at_every_array(backend: Here, dtype: str):
    for wrong in (np.nan, np.inf, -np.inf):
        for place in range(len(SHAPES)):
            hosts = [normal(*shape) for shape in SHAPES]
            assert bool(backend.host(all_finite([backend.array(h, dtype) for h in hosts])))
            hosts[place].flat[-1] = wrong
            assert not bool(backend.host(all_finite([backend.array(h, dtype) for h in hosts])))
