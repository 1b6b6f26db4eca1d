"""The ops that PyTorch does not have, as plain loops over single numbers: formulas for
``freeze_figures.py``.

``DEFINITIONS[op]`` takes the op's arguments by name, NumPy arrays of float64, and ``dy``, the
function that returns the gradient of a result of some shape. It returns the results in the order of
``Example.results``: the output, the gradients, and what the op writes into.

Notation: p a parameter, g its gradient, v, s, m states of an optimizer.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np

WORD = 2**32
Results = list[Any]
Gradient = Callable[[tuple[int, ...]], Any]

# --- masks ----------------------------------------------------------------------------------------


def triple32(x: int) -> int:
    """Chris Wellons's hash of 32 bits."""
    x ^= x >> 17
    x = x * 0xED5AD4BB % WORD
    x ^= x >> 11
    x = x * 0xAC4C1B51 % WORD
    x ^= x >> 15
    x = x * 0x31848BAB % WORD
    return x ^ (x >> 14)


def word(index: int, first: int, second: int) -> int:
    """triple32 of index ^ first, where the second word enters after the first round."""
    x = index ^ first
    x ^= x >> 17
    x = (x * 0xED5AD4BB % WORD) ^ second
    x ^= x >> 11
    x = x * 0xAC4C1B51 % WORD
    x ^= x >> 15
    x = x * 0x31848BAB % WORD
    return x ^ (x >> 14)


def mask(
    rows: int, length: int, p: float, key: tuple[int, int], step: int, first: int
) -> np.ndarray:
    """(rows, length): whether each value of each sample is kept."""
    found = np.zeros((rows, length), dtype=bool)
    for n in range(rows):
        one, other = key
        position = first + n
        for part in (step % WORD, step // WORD, position % WORD, position // WORD):
            one, other = triple32(one ^ part), triple32(other ^ part)
        for i in range(length):
            found[n, i] = word(i, one, other) >= round(p * WORD)
    return found


def kept(dy: Gradient, like, length, first, second, threshold) -> Results:
    rows = [
        [word(i, int(one), int(other)) >= threshold for i in range(length)]
        for one, other in zip(first, second, strict=True)
    ]
    return [np.array(rows, dtype=bool).reshape(len(first), length)]


def drop(dy: Gradient, x, p, length, key, step, first) -> Results:
    found = mask(len(x), length, p, key, int(step), int(first))
    shape = x.shape if length == x[0].size else (len(x), length, *(1,) * (x.ndim - 2))
    factor = found.reshape(shape) / (1.0 - p) if p < 1 else np.zeros(shape)
    return [x * factor, dy(x.shape) * factor]


def dropout(axes: int | None) -> Callable[..., Results]:
    """axes: those that share one value; None: a sample has one."""

    def of(dy: Gradient, x, p, seed) -> Results:
        length = 1 if axes is None else x.shape[1] if axes else x[0].size
        digest = hashlib.sha256(repr((seed, "dropout", "")).encode()).digest()
        key = tuple(int.from_bytes(digest[i : i + 4], "little") for i in (0, 4))
        return drop(dy, x, p, length, key, 0, 0)

    return of


# --- batches --------------------------------------------------------------------------------------


def take_batch(dy: Gradient, images, indices, mean=None, std=None) -> Results:
    rows = images if indices is None else np.stack([images[int(i)] for i in indices])
    if std is None:
        return [rows]
    return [(rows.astype(np.float64) - (0.0 if mean is None else mean)) / std]


def all_finite(dy: Gradient, arrays) -> Results:
    return [np.array(all(math.isfinite(v) for array in arrays for v in array.flat))]


def clip_by_global_norm(dy: Gradient, grads, max_norm) -> Results:
    norm = math.sqrt(math.fsum(float(v) ** 2 for array in grads for v in array.flat))
    factor = min(1.0, max_norm / (norm + 1e-6))
    return [np.array(norm), *(array * factor for array in grads)]


# --- updates: one number after the other ----------------------------------------------------------


def update(step: Callable[..., tuple[float, ...]], *states: str) -> Callable[..., Results]:
    """step: from p, g, the states and the options to the new p and states."""

    def of(dy: Gradient, params, grads, ok=None, **rest) -> Results:
        held = {name: rest.pop(name) for name in states if rest.get(name) is not None}
        options = {n: v.item() if isinstance(v, np.ndarray) else v for n, v in rest.items()}
        new = {name: [a.copy() for a in arrays] for name, arrays in held.items()}
        moved = [a.copy() for a in params]
        if ok is None or bool(ok):
            for i, array in enumerate(params):
                for at in np.ndindex(array.shape):
                    old = {name: float(arrays[i][at]) for name, arrays in held.items()}
                    p, found = step(float(array[at]), float(grads[i][at]), old, **options)
                    moved[i][at] = p
                    for name in held:
                        new[name][i][at] = found[name]
        return [*moved, *(array for name in states for array in new.get(name, ()))]

    return of


def sgd(p, g, old, lr, weight_decay=0.0):
    return p - lr * (g + weight_decay * p), {}


def momentum_step(p, g, old, lr, momentum, dampening, nesterov, first, weight_decay=0.0):
    g = g + weight_decay * p
    v = momentum * old["velocity"] + (1.0 if first else 1.0 - dampening) * g
    return p - lr * (g + momentum * v if nesterov else v), {"velocity": v}


def adagrad(p, g, old, lr, eps, weight_decay=0.0):
    g = g + weight_decay * p
    s = old["square_sum"] + g * g
    return p - lr * g / (math.sqrt(s) + eps), {"square_sum": s}


def rmsprop(p, g, old, lr, alpha, eps, momentum, weight_decay=0.0, mean=None, velocity=None):
    g = g + weight_decay * p
    s = alpha * old["mean_square"] + (1 - alpha) * g * g
    new, spread = {"mean_square": s}, s
    if "mean" in old:
        new["mean"] = alpha * old["mean"] + (1 - alpha) * g
        spread = max(s - new["mean"] ** 2, 0.0)
    change = g / (math.sqrt(spread) + eps)
    if "velocity" in old:
        new["velocity"] = change = momentum * old["velocity"] + change
    return p - lr * change, new


def adam(p, g, old, lr, beta1, beta2, eps, step, decoupled, weight_decay=0.0):
    """Kingma and Ba, 2015, algorithm 1; decoupled: Loshchilov and Hutter, 2019."""
    if decoupled:
        p = p - lr * weight_decay * p
    else:
        g = g + weight_decay * p
    m = beta1 * old["mean"] + (1 - beta1) * g
    v = beta2 * old["mean_square"] + (1 - beta2) * g * g
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    return p - lr * m_hat / (math.sqrt(v_hat) + eps), {"mean": m, "mean_square": v}


DEFINITIONS: dict[str, Callable[..., Results]] = {
    "kept": kept,
    "drop": drop,
    "dropout": dropout(0),
    **{f"dropout{n}d": dropout(n) for n in (1, 2, 3)},
    "stochastic_depth": dropout(None),
    "take_batch": take_batch,
    "all_finite": all_finite,
    "clip_by_global_norm": clip_by_global_norm,
    "sgd_update": update(sgd),
    "momentum_update": update(momentum_step, "velocity"),
    "adagrad_update": update(adagrad, "square_sum"),
    "rmsprop_update": update(rmsprop, "mean_square", "mean", "velocity"),
    "adam_update": update(adam, "mean", "mean_square"),
}
