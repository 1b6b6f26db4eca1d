"""The optimizers' updates on NumPy: written into what is there, where the portable ones allocate.

A rule takes a handful of passes over its arrays. A network's parameters lie in one long array, so the passes go over it piece by
piece: a piece stays in the cache from one to the next, and the cores share the pieces.

A step that is not ok is not computed at all: reading ``ok`` and 0-dimensional arrays costs nothing here.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from portacnn.backends.threads import in_pieces
from portacnn.ops.update import clip_factor, decayed, global_norm

_PIECE = 1 << 14  # numbers: with those of the state and in between, within the second-level cache


def _each(rule: Callable[..., None], *lists: list[Any]) -> None:
    """Call the rule with what belongs together, array by array; in pieces where arrays are long and lie in one stretch."""
    for arrays in zip(*lists, strict=True):
        if arrays[0].size <= _PIECE or not all(array.flags.c_contiguous for array in arrays):
            rule(*arrays)
            continue
        rows = [array.reshape(-1) for array in arrays]

        def work(part: slice, rows: list[Any] = rows) -> None:
            for begin in range(part.start, part.stop, _PIECE):
                rule(*(row[begin : min(begin + _PIECE, part.stop)] for row in rows))

        in_pieces(work, rows[0].size, rows[0].size)


def sgd_update(params: list[Any], grads: list[Any], *, lr: Any, weight_decay: float = 0.0, ok: Any = None) -> None:
    if ok is not None and not ok:
        return
    lr = float(lr)

    def rule(p: Any, g: Any) -> None:
        p -= lr * decayed(p, g, weight_decay)

    _each(rule, params, grads)


def momentum_update(
    params: list[Any],
    grads: list[Any],
    velocity: list[Any],
    *,
    lr: Any,
    momentum: float,
    dampening: float = 0.0,
    nesterov: bool = False,
    first: Any = False,
    weight_decay: float = 0.0,
    ok: Any = None,
) -> None:
    if ok is not None and not ok:
        return
    lr, intake = float(lr), 1.0 if first else 1.0 - dampening

    def rule(p: Any, g: Any, v: Any) -> None:
        g = decayed(p, g, weight_decay)
        v *= momentum
        v += g if intake == 1.0 else intake * g
        p -= lr * (g + momentum * v if nesterov else v)

    _each(rule, params, grads, velocity)


def adagrad_update(
    params: list[Any],
    grads: list[Any],
    square_sum: list[Any],
    *,
    lr: Any,
    eps: float,
    weight_decay: float = 0.0,
    ok: Any = None,
) -> None:
    if ok is not None and not ok:
        return
    lr = float(lr)

    def rule(p: Any, g: Any, s: Any) -> None:
        g = decayed(p, g, weight_decay)
        change = np.multiply(g, g, out=np.empty_like(p))
        s += change
        np.sqrt(s, out=change)
        change += eps
        np.divide(g, change, out=change)
        change *= lr
        p -= change

    _each(rule, params, grads, square_sum)


def rmsprop_update(
    params: list[Any],
    grads: list[Any],
    mean_square: list[Any],
    mean: list[Any] | None = None,
    velocity: list[Any] | None = None,
    *,
    lr: Any,
    alpha: float,
    eps: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    ok: Any = None,
) -> None:
    if ok is not None and not ok:
        return
    lr = float(lr)

    def rule(p: Any, g: Any, s: Any, *more: Any) -> None:
        g = decayed(p, g, weight_decay)
        change = np.multiply(g, g, out=np.empty_like(p))
        change *= 1.0 - alpha
        s *= alpha
        s += change
        if mean is None:
            np.sqrt(s, out=change)
        else:
            m = more[0]
            m *= alpha
            m += (1.0 - alpha) * g
            np.multiply(m, m, out=change)
            np.subtract(s, change, out=change)
            np.maximum(change, 0.0, out=change)
            np.sqrt(change, out=change)
        change += eps
        np.divide(g, change, out=change)
        if velocity is not None:
            v = more[-1]
            v *= momentum
            v += change
            change[...] = v
        change *= lr
        p -= change

    _each(rule, params, grads, mean_square, *(slot for slot in (mean, velocity) if slot is not None))


def adam_update(
    params: list[Any],
    grads: list[Any],
    mean: list[Any],
    mean_square: list[Any],
    *,
    lr: Any,
    beta1: float,
    beta2: float,
    eps: float,
    step: Any,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    ok: Any = None,
) -> None:
    if ok is not None and not ok:
        return
    lr, step = float(lr), int(step)
    step_size = lr / (1.0 - beta1**step)
    spread = (1.0 - beta2**step) ** 0.5

    def rule(p: Any, g: Any, m: Any, v: Any) -> None:
        if decoupled and weight_decay:
            p *= 1.0 - lr * weight_decay
        elif weight_decay:
            g = decayed(p, g, weight_decay)
        m *= beta1
        m += (1.0 - beta1) * g
        change = np.multiply(g, g, out=np.empty_like(p))
        change *= 1.0 - beta2
        v *= beta2
        v += change
        np.sqrt(v, out=change)
        change /= spread
        change += eps
        np.divide(m, change, out=change)
        change *= step_size
        p -= change

    _each(rule, params, grads, mean, mean_square)


def clip_by_global_norm(grads: list[Any], max_norm: Any) -> Any:
    norm = global_norm(grads)
    factor = clip_factor(norm, max_norm)
    if factor != 1.0:  # mostly it is 1, and looking costs nothing here (NaN is not 1 either)
        for g in grads:
            g *= factor
    return norm
