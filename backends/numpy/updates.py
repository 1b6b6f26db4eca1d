"""The optimizers' updates on NumPy, in place; the portable versions allocate.

A step that is not ok is skipped. Reading ``ok``, or a rate that is a 0-dimensional array, costs
nothing on the CPU.
"""

from typing import Any

import numpy as np

from portacnn.ops.update import clip_factor, decayed, global_norm
from portacnn.runtime import Kernel


def sgd_update(
    params: list[Any], grads: list[Any], *, lr: Any, weight_decay: float = 0.0, ok: Any = None
) -> None:
    if ok is None or ok:
        lr = float(lr)
        for p, g in zip(params, grads, strict=True):
            p -= lr * decayed(p, g, weight_decay)


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
    for p, g, v in zip(params, grads, velocity, strict=True):
        g = decayed(p, g, weight_decay)
        v *= momentum
        v += g if intake == 1.0 else intake * g
        p -= lr * (g + momentum * v if nesterov else v)


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
    for p, g, s in zip(params, grads, square_sum, strict=True):
        g = decayed(p, g, weight_decay)
        change = np.multiply(g, g, out=np.empty_like(p))
        s += change
        np.sqrt(s, out=change)
        change += eps
        np.divide(g, change, out=change)
        change *= lr
        p -= change


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
    for i, (p, g, s) in enumerate(zip(params, grads, mean_square, strict=True)):
        g = decayed(p, g, weight_decay)
        change = np.multiply(g, g, out=np.empty_like(p))
        change *= 1.0 - alpha
        s *= alpha
        s += change
        if mean is None:
            np.sqrt(s, out=change)
        else:
            mean[i] *= alpha
            mean[i] += (1.0 - alpha) * g
            np.multiply(mean[i], mean[i], out=change)
            np.subtract(s, change, out=change)
            np.maximum(change, 0.0, out=change)
            np.sqrt(change, out=change)
        change += eps
        np.divide(g, change, out=change)
        if velocity is not None:
            velocity[i] *= momentum
            velocity[i] += change
            change[...] = velocity[i]
        change *= lr
        p -= change


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
    for p, g, m, v in zip(params, grads, mean, mean_square, strict=True):
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


def clip_by_global_norm(grads: list[Any], max_norm: Any) -> Any:
    norm = global_norm(grads)
    factor = clip_factor(norm, max_norm)
    if factor != 1.0:  # mostly 1, and the test is cheap (NaN is not 1)
        for g in grads:
            g *= factor
    return norm


KERNELS = {
    "sgd_update": Kernel(sgd_update),
    "momentum_update": Kernel(momentum_update),
    "adagrad_update": Kernel(adagrad_update),
    "rmsprop_update": Kernel(rmsprop_update),
    "adam_update": Kernel(adam_update),
    "clip_by_global_norm": Kernel(clip_by_global_norm),
}
