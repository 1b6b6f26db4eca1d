"""One step of an optimizer over all parameters: written into the parameters and the optimizer's state, in place.

Notation: params, grads and each state are lists of arrays that belong together, item by item. ``ok`` is a 0-dimensional
boolean array or None: where it is false nothing changes, which is how a step whose loss is not finite is left out
without asking the device.
"""

from typing import Any

from portacnn.ops.dispatch import op
from portacnn.runtime import Array, backend_of


def _write(target: Array, new: Array, ok: Array | None) -> None:
    target[...] = new if ok is None else backend_of(target).xp.where(ok, new, target)


@op()
def sgd_update(params: list[Array], grads: list[Array], *, lr: Any, ok: Array | None = None) -> None:
    """p = p - lr * g."""
    for p, g in zip(params, grads, strict=True):
        _write(p, p - lr * g, ok)


@op()
def momentum_update(
    params: list[Array], grads: list[Array], velocity: list[Array], *, lr: Any, momentum: float, ok: Array | None = None
) -> None:
    """v = momentum * v + g; p = p - lr * v (PyTorch's SGD with momentum)."""
    for p, g, v in zip(params, grads, velocity, strict=True):
        _write(v, momentum * v + g, ok)
        _write(p, p - lr * v, ok)


@op()
def adam_update(
    params: list[Array],
    grads: list[Array],
    mean: list[Array],
    mean_square: list[Array],
    *,
    lr: Any,
    beta1: float,
    beta2: float,
    eps: float,
    step: Any,
    ok: Array | None = None,
) -> None:
    """Adam (Kingma and Ba, 2015, algorithm 1); ``step`` counts from 1.

    m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g^2
    p = p - lr * (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
    """
    step_size = lr / (1.0 - beta1**step)
    spread = (1.0 - beta2**step) ** 0.5
    for p, g, m, v in zip(params, grads, mean, mean_square, strict=True):
        _write(m, beta1 * m + (1.0 - beta1) * g, ok)
        _write(v, beta2 * v + (1.0 - beta2) * (g * g), ok)
        _write(p, p - step_size * (m / (backend_of(p).xp.sqrt(v) / spread + eps)), ok)
