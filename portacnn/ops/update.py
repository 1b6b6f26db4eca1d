"""One step of an optimizer over all parameters: written into the parameters and the optimizer's
state, in place.

Notation: params p, grads g and each state are lists of arrays that belong together, item by item.
``ok`` is a 0-dimensional boolean array or None: where it is false nothing changes, which is how a
step whose loss is not finite is left out without asking the device.

Learning rates (``lr``) and counts (``step``, ``first``) are Python's, or 0-dimensional arrays on
the parameters' device of float64 and of int64 (bool), for a step that is recorded once and
replayed: what is computed of them is rounded to the parameters' dtype at the end, as Python's
numbers are.

The rules are PyTorch's. ``weight_decay`` is the factor of an L2 penalty (weight_decay / 2) *
sum(p^2), whose gradient is added to g before anything else is done with it; ``adam_update`` can
also take it apart from the gradient (``decoupled``).
"""

from typing import Any

from portacnn.errors import ArgumentError
from portacnn.ops.dispatch import check_arrays, op
from portacnn.runtime import Array, backend_of


def _write(target: Array, new: Array, ok: Array | None) -> None:
    target[...] = new if ok is None else backend_of(target).xp.where(ok, new, target)


def in_dtype_of(p: Array, number: Any) -> Any:
    """A number to compute with together with p: Python's as it is, a 0-dimensional array in p's
    dtype."""
    return backend_of(p).xp.astype(number, p.dtype) if hasattr(number, "shape") else number


def count_as_float(step: Any) -> Any:
    """A count to compute with: Python's as it is, a 0-dimensional array of integers as float64."""
    return (
        backend_of(step).xp.astype(step, backend_of(step).xp.float64)
        if hasattr(step, "shape")
        else step
    )


def decayed(p: Array, g: Array, weight_decay: float) -> Array:
    """The gradient with that of the L2 penalty; g itself where there is no decay."""
    return g + weight_decay * p if weight_decay else g


@op(writes=("params",))
def sgd_update(
    params: list[Array],
    grads: list[Array],
    *,
    lr: Any,
    weight_decay: float = 0.0,
    ok: Array | None = None,
) -> None:
    """p = p - lr * g."""
    for p, g in zip(params, grads, strict=True):
        _write(p, p - in_dtype_of(p, lr) * decayed(p, g, weight_decay), ok)


@op(writes=("params", "velocity"))
def momentum_update(
    params: list[Array],
    grads: list[Array],
    velocity: list[Array],
    *,
    lr: Any,
    momentum: float,
    dampening: float = 0.0,
    nesterov: bool = False,
    first: Any = False,
    weight_decay: float = 0.0,
    ok: Array | None = None,
) -> None:
    """SGD with momentum as PyTorch has it (Sutskever et al., 2013, with lr outside of the
    velocity).

    v = momentum * v + (1 - dampening) * g, at the ``first`` step of these parameters g undampened
    p = p - lr * v, with ``nesterov`` p - lr * (g + momentum * v)
    """
    for p, g, v in zip(params, grads, velocity, strict=True):
        intake = 1.0 - dampening * (1.0 - in_dtype_of(p, first))
        g = decayed(p, g, weight_decay)
        _write(v, momentum * v + intake * g, ok)
        _write(p, p - in_dtype_of(p, lr) * (g + momentum * v if nesterov else v), ok)


@op(writes=("params", "square_sum"))
def adagrad_update(
    params: list[Array],
    grads: list[Array],
    square_sum: list[Array],
    *,
    lr: Any,
    eps: float,
    weight_decay: float = 0.0,
    ok: Array | None = None,
) -> None:
    """AdaGrad (Duchi, Hazan and Singer, 2011): s = s + g^2;  p = p - lr * g / (sqrt(s) + eps)."""
    for p, g, s in zip(params, grads, square_sum, strict=True):
        g = decayed(p, g, weight_decay)
        _write(s, s + g * g, ok)
        _write(p, p - in_dtype_of(p, lr) * (g / (backend_of(p).xp.sqrt(s) + eps)), ok)


@op(writes=("params", "mean_square", "mean", "velocity"))
def rmsprop_update(
    params: list[Array],
    grads: list[Array],
    mean_square: list[Array],
    mean: list[Array] | None = None,
    velocity: list[Array] | None = None,
    *,
    lr: Any,
    alpha: float,
    eps: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    ok: Array | None = None,
) -> None:
    """RMSprop (Hinton's lecture 6e); centered (Graves, 2013) where ``mean`` is given, with momentum
    where ``velocity`` is.

    s = alpha * s + (1 - alpha) * g^2;  m = alpha * m + (1 - alpha) * g
    u = g / (sqrt(s) + eps), centered g / (sqrt(s - m^2) + eps)
    p = p - lr * u, with momentum v = momentum * v + u; p = p - lr * v
    """
    for i, (p, g, s) in enumerate(zip(params, grads, mean_square, strict=True)):
        xp = backend_of(p).xp
        g = decayed(p, g, weight_decay)
        _write(s, alpha * s + (1.0 - alpha) * (g * g), ok)
        spread = s
        if mean is not None:
            _write(mean[i], alpha * mean[i] + (1.0 - alpha) * g, ok)
            # a variance: below 0 by rounding alone, where its root is NaN
            spread = xp.clip(s - mean[i] * mean[i], 0.0)
        change = g / (xp.sqrt(spread) + eps)
        if velocity is not None:
            _write(velocity[i], momentum * velocity[i] + change, ok)
            change = velocity[i]
        _write(p, p - in_dtype_of(p, lr) * change, ok)


@op(writes=("params", "mean", "mean_square"))
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
    weight_decay: float = 0.0,
    decoupled: bool = False,
    ok: Array | None = None,
) -> None:
    """Adam (Kingma and Ba, 2015, algorithm 1); ``step`` counts from 1.

    m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g^2
    p = p - lr * (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)

    With ``decoupled`` (AdamW: Loshchilov and Hutter, 2019) the gradient stays without the
    penalty's; instead, first, p = p - lr * weight_decay * p.
    """
    step = count_as_float(step)
    step_size = lr / (1.0 - beta1**step)
    spread = (1.0 - beta2**step) ** 0.5
    for p, g, m, v in zip(params, grads, mean, mean_square, strict=True):
        shrunk = p
        if decoupled:
            shrunk = in_dtype_of(p, 1.0 - lr * weight_decay) * p
        else:
            g = decayed(p, g, weight_decay)
        _write(m, beta1 * m + (1.0 - beta1) * g, ok)
        _write(v, beta2 * v + (1.0 - beta2) * (g * g), ok)
        size, root = in_dtype_of(p, step_size), backend_of(p).xp.sqrt(v) / in_dtype_of(p, spread)
        _write(p, shrunk - size * (m / (root + eps)), ok)


# --- before the step: clipping --------------------------------------------------------------------


def _check_clip(grads: list[Array], max_norm: Any) -> None:
    name = "clip_by_global_norm"
    if not grads:
        raise ArgumentError("expected one gradient at least, got none", name)
    if isinstance(max_norm, int | float) and not max_norm > 0:
        raise ArgumentError(f"max_norm must be above 0, got {max_norm!r}", name)
    check_arrays(name, **{f"grads[{i}]": g for i, g in enumerate(grads)})


def global_norm(grads: list[Array]) -> Array:
    """sqrt(sum(g^2)) over all numbers of all gradients, 0-dimensional."""
    xp = backend_of(grads[0]).xp
    return xp.sqrt(xp.sum(xp.stack([xp.sum(g * g) for g in grads])))


def clip_factor(norm: Array, max_norm: Any) -> Array:
    """What brings gradients of this norm down to ``max_norm``, at most 1; 1e-6 keeps it from
    dividing by 0, as PyTorch's."""
    return backend_of(norm).xp.clip(max_norm / (norm + 1e-6), max=1.0)


@op(_check_clip, writes=("grads",))
def clip_by_global_norm(grads: list[Array], max_norm: Any) -> Array:
    """Scale all gradients by one factor, in place, so that together they are no longer than
    ``max_norm``.

    As torch.nn.utils.clip_grad_norm_ (Pascanu, Mikolov and Bengio, 2013). Nothing is read back from
    the device.

    Args:
        grads: arrays of one library, device and floating dtype, of any shapes.
        max_norm: above 0.

    Returns:
        The norm before clipping, 0-dimensional. Where it is NaN or infinite the gradients are
        useless, and become NaN or 0.

    Raises:
        ArgumentError, ArrayError: no gradients, mixed ones, a norm of 0 or less.
    """
    norm = global_norm(grads)
    factor = clip_factor(norm, max_norm)
    for g in grads:
        g[...] = g * factor
    return norm


@op()
def all_finite(arrays: list[Array]) -> Array:
    """Whether there is no NaN or infinity in any of the arrays (one at least): 0-dimensional,
    boolean, on their device.

    By their sums, in which such a value does not get lost; a sum beyond what the dtype holds counts
    as infinite too.
    """
    xp = backend_of(arrays[0]).xp
    ok = xp.isfinite(xp.sum(arrays[0]))
    for array in arrays[1:]:
        ok = ok & xp.isfinite(xp.sum(array))
    return ok
