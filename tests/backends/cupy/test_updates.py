"""The CUDA kernels of the optimizers' updates, run on the host, against the rules written out for
one number in float64."""

from math import sqrt
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn.backends.cupy import updates as cupy_updates
from support.cuda_rig import Rig, close, needs_compiler, orders, rigged
from support.drawing import arguments_of

pytestmark = needs_compiler

dtypes = st.sampled_from(["float32", "float64"])


def sgd(p: float, g: float, state: list, *, lr: float, weight_decay: float) -> float:
    return p - lr * (g + weight_decay * p)


def momentum(p, g, state, *, lr, weight_decay, momentum, dampening, nesterov, first):
    g += weight_decay * p
    state[0] = momentum * state[0] + (g if first else (1 - dampening) * g)
    return p - lr * (g + momentum * state[0] if nesterov else state[0])


def adagrad(p, g, state, *, lr, weight_decay, eps):
    g += weight_decay * p
    state[0] += g**2
    return p - lr * g / (sqrt(state[0]) + eps)


def rmsprop(p, g, state, *, lr, weight_decay, alpha, eps, momentum):
    square, mean, velocity = (*state, None, None)[:3]
    g += weight_decay * p
    state[0] = square = alpha * square + (1 - alpha) * g**2
    if mean is not None:
        state[1] = mean = alpha * mean + (1 - alpha) * g
        square = max(square - mean**2, 0)
    change = g / (sqrt(square) + eps)
    if velocity is not None:
        state[2] = change = momentum * velocity + change
    return p - lr * change


def adam(p, g, state, *, lr, weight_decay, beta1, beta2, eps, step, decoupled):
    if decoupled:
        p -= lr * weight_decay * p
    else:
        g += weight_decay * p
    state[0] = beta1 * state[0] + (1 - beta1) * g
    state[1] = beta2 * state[1] + (1 - beta2) * g**2
    return p - lr * (state[0] / (1 - beta1**step)) / (sqrt(state[1] / (1 - beta2**step)) + eps)


def written(rig: Rig, host: np.ndarray, dtype: str) -> np.ndarray:
    array = rig.array(host, dtype)
    array.flags.writeable = True
    return array


def stepped(
    rule: Any,
    op: Any,
    dims: list,
    slots: list,
    dtype: str,
    order: str,
    seed: int,
    ok: Any,
    on_device: dict,
    **numbers: Any,
) -> list[np.ndarray]:
    """One step by the op and by the rule. slots: which state there is; None for a list that is not
    there."""
    draw = np.random.default_rng(seed)
    with rigged(order, seed) as rig:
        params, grads = ([written(rig, draw.normal(size=d), dtype) for d in dims] for _ in range(2))
        # A mean and a mean of squares that can be those of the same numbers: the variance between
        # them is above 0.
        state = [
            slot and [written(rig, draw.uniform(*slot, d), dtype) for d in dims] for slot in slots
        ]
        for g in grads:
            g.flags.writeable = False
        before = [[np.array(a) for a in arrays] for arrays in (params, *(s for s in state if s))]
        placed = {
            name: rig.array(np.array(numbers[name]), kind) for name, kind in on_device.items()
        }
        flag = None if ok is None else rig.array(np.array(ok), "bool")
        given_state = state if op is cupy_updates.rmsprop_update else [s for s in state if s]
        assert op(params, grads, *given_state, **(numbers | placed), ok=flag) is None
        assert [name for name, *_ in rig.launches] == [rule.__name__] * len(dims)
        after = [params, *(s for s in state if s)]
        for i, d in enumerate(dims):
            want = [np.array(arrays[i], "float64") for arrays in before]
            for at in np.ndindex(*d) if ok is not False else ():
                own: list[Any] = []
                there = iter(want[1:])
                own = [next(there)[at] if slot else None for slot in slots]
                want[0][at] = rule(want[0][at], float(grads[i][at]), own, **numbers)
                for array, value in zip(want[1:], (v for v in own if v is not None), strict=True):
                    array[at] = value
            for arrays, array, old in zip(after, want, before, strict=True):
                close(arrays[i], array, dtype, np.abs(array) + np.abs(old[i]))
                if ok is False:
                    np.testing.assert_array_equal(arrays[i], array)
        return [np.array(a) for arrays in after for a in arrays]


@st.composite
def circumstances(draw: st.DrawFn, op: str) -> dict[str, Any]:
    """The sizes and options of an example of the table, with Python's numbers."""
    arguments = draw(arguments_of(op, "small"))
    numbers = {
        name: value.item() if isinstance(value, np.ndarray) else value
        for name, value in arguments.items()
        if value is not None and not isinstance(value, list)
    }
    return {
        "dims": [p.shape for p in arguments["params"]],
        "dtype": draw(dtypes),
        "order": draw(orders),
        "seed": draw(st.integers(0, 999)),
        "there": [name for name in ("mean", "velocity") if arguments.get(name)],
        **{"ok": None, **numbers},
    }


def both(
    rule: Any, op: Any, slots: list, kinds: dict, *, there: list, **given_numbers: Any
) -> None:
    """With Python's numbers and with those in device memory: the same bits."""
    one = stepped(rule, op, slots=slots, on_device={}, **given_numbers)
    other = stepped(rule, op, slots=slots, on_device=kinds, **given_numbers)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


@settings(max_examples=12)
@given(circumstances("sgd_update"))
def test_sgd(how: dict):
    both(sgd, cupy_updates.sgd_update, [], {"lr": "float64"}, **how)


@settings(max_examples=20)
@given(circumstances("momentum_update"))
def test_momentum(how: dict):
    kinds = {"lr": "float64", "first": "bool"}
    both(momentum, cupy_updates.momentum_update, [(-1, 1)], kinds, **how)


@settings(max_examples=12)
@given(circumstances("adagrad_update"))
def test_adagrad(how: dict):
    both(adagrad, cupy_updates.adagrad_update, [(0, 2)], {"lr": "float64"}, **how)


@settings(max_examples=20)
@given(circumstances("rmsprop_update"))
def test_rmsprop(how: dict):
    slots = [
        (1, 2),
        (-0.5, 0.5) if "mean" in how["there"] else None,
        (-1, 1) if "velocity" in how["there"] else None,
    ]
    both(rmsprop, cupy_updates.rmsprop_update, slots, {"lr": "float64"}, **how)


@settings(max_examples=20)
@given(circumstances("adam_update"))
def test_adam(how: dict):
    kinds = {"lr": "float64", "step": "int64"}
    both(adam, cupy_updates.adam_update, [(-1, 1), (0.1, 2)], kinds, **how)


def test_a_variance_below_0_by_rounding_is_0():
    with rigged() as rig:
        p, g, s, m = (
            written(rig, np.array([value]), "float32") for value in (1.0, 0.1, 0.01, 0.1001)
        )
        cupy_updates.rmsprop_update([p], [g], [s], [m], lr=0.1, alpha=0.99, eps=1.0)
        np.testing.assert_allclose(p, [0.99], rtol=1e-6)


@settings(max_examples=20)
@given(
    arguments_of("clip_by_global_norm", "small"), dtypes, orders, st.booleans(), st.integers(0, 99)
)
def test_clip_by_global_norm(arguments: dict, dtype: str, order: str, on_device: bool, seed: int):
    dims, limit = [g.shape for g in arguments["grads"]], arguments["max_norm"]
    draw = np.random.default_rng(seed)
    with rigged(order, seed) as rig:
        grads = [written(rig, draw.normal(size=d), dtype) for d in dims]
        before = [np.array(g, "float64") for g in grads]
        norm = cupy_updates.clip_by_global_norm(
            grads, rig.array(np.array(limit), dtype) if on_device else limit
        )
        wanted = sqrt(sum(float(value) ** 2 for g in before for value in g.ravel()))
        close(norm, np.array(wanted), dtype, np.array(wanted))
        for g, old in zip(grads, before, strict=True):
            close(g, old * min(limit / (wanted + 1e-6), 1.0), dtype, np.abs(old))
        assert len(rig.launches) == 2 * len(dims)


def test_a_norm_that_is_nan_shows():
    with rigged() as rig:
        grads = [
            written(rig, np.array([1.0, np.nan]), "float32"),
            written(rig, np.ones(3), "float32"),
        ]
        assert np.isnan(cupy_updates.clip_by_global_norm(grads, 1.0))
        assert np.isnan(grads[1]).all()


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([1, 5, 257, 900]), st.sampled_from(["float32", "float64", "int64"])
        ),
        max_size=3,
    ),
    st.none() | st.tuples(st.integers(0, 1199), st.sampled_from([np.nan, np.inf, -np.inf])),
    orders,
)
def test_all_finite(others: list, wrong: Any, order: str):
    with rigged(order, 5) as rig:
        host = np.full(1200, 1e38)
        if wrong is not None:
            host[wrong[0]] = wrong[1]
        arrays = [
            rig.array(host, "float32"),
            *(rig.array(np.ones(n), dtype) for n, dtype in others),
        ]
        ok = cupy_updates.all_finite(arrays[::-1])
        assert ok.shape == ()
        assert ok.dtype == bool
        assert bool(ok) == (wrong is None)
        assert len(rig.launches) == 2 + sum(dtype != "int64" for _, dtype in others)


def test_the_same_bits_in_any_order():
    """Of one array so long that every thread takes several numbers, and some blocks one more than
    others."""
    results = []
    for order in ("forward", "reverse", "shuffled"):
        with rigged(order, 2) as rig:
            draw = np.random.default_rng(0)
            g, p, m, v = (written(rig, draw.uniform(0.1, 1, 300_000), "float32") for _ in range(4))
            norm = cupy_updates.clip_by_global_norm([g], 1.0)
            length = np.array(np.linalg.norm(np.random.default_rng(0).uniform(0.1, 1, 300_000)))
            close(norm, length, "float32", length)
            cupy_updates.adam_update(
                [p], [g], [m], [v], lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, step=3
            )
            results.append([norm, g, p, m, v])
            assert max(np.prod(grid) for _, grid, _ in rig.launches) == 1056
    for one, *others in zip(*results, strict=True):
        for other in others:
            np.testing.assert_array_equal(one, other)


def test_what_is_declined():
    with rigged() as rig:
        half, empty = written(rig, np.ones(3), "float16"), written(rig, np.ones(0), "float32")
        single, double = written(rig, np.ones(3), "float32"), written(rig, np.ones(3), "float64")
        apart = written(rig, np.ones((3, 2)), "float32")[:, 0]
        for p, g in ((half, half), (empty, empty), (single, double), (apart, single)):
            assert cupy_updates.sgd_update([p], [g], lr=0.1) is NotImplemented
        assert cupy_updates.sgd_update([single], [apart], lr=0.1) is None
        np.testing.assert_allclose(single, 0.9, rtol=1e-6)
        assert cupy_updates.clip_by_global_norm([single, double], 1.0) is NotImplemented
        assert cupy_updates.clip_by_global_norm([apart], 1.0) is NotImplemented
        assert cupy_updates.all_finite([single, half]) is NotImplemented
        assert cupy_updates.all_finite([written(rig, np.ones(2), "int64")]) is NotImplemented
