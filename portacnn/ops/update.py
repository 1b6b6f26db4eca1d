"""One step of an optimizer over all parameters. It writes into the parameters and the state, in
place.

Notation: params p, grads g and each state are lists of arrays that correspond item by item. ``ok``
is a 0-dimensional boolean array or None. If it is false, nothing changes; a step with a loss that
is not finite is skipped in this way without a read from the device.

Learning rates (``lr``) and counts (``step``, ``first``) are Python numbers. For a step that is
recorded once and replayed they are 0-dimensional arrays on the parameters' device, of float64 and
of int64 (bool). Values computed from them are rounded to the parameters' dtype at the end, as
Python numbers are.

The formulas are PyTorch's. ``weight_decay`` is the factor of an L2 penalty (weight_decay / 2) *
sum(p^2). Its gradient is added to g first. ``adam_update`` can also apply it separately from the
gradient (``decoupled``).
"""

from typing import Any

from portacnn.errors import ArgumentError
from portacnn.ops.dispatch import check_arrays, op
from portacnn.runtime import Array, backend_of


def _write(target: Array, new: Array, ok: Array | None) -> None:
    target[...] = new if ok is None else backend_of(target).xp.where(ok, new, target)


def in_dtype_of(p: Array, number: Any) -> Any:
    """Return a number for arithmetic with p: a Python number unchanged, a 0-dimensional array in
    p's dtype.
    """
    return backend_of(p).xp.astype(number, p.dtype) if hasattr(number, "shape") else number


def count_as_float(step: Any) -> Any:
    """Return a count for arithmetic: a Python number unchanged, a 0-dimensional integer array as
    float64.
    """
    return (
        backend_of(step).xp.astype(step, backend_of(step).xp.float64)
        if hasattr(step, "shape")
        else step
    )


def decayed(p: Array, g: Array, weight_decay: float) -> Array:
    """Return the gradient plus that of the L2 penalty; g itself without decay."""
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
    """Update p = p - lr * g in place.

    params, grads and each state are lists of arrays; ``lr`` and ``ok`` are explained at the head of
    this file.

    >>> params = [np.array([1.0, 2.0])]
    >>> ops.sgd_update(params, [np.array([10.0, 10.0])], lr=0.1)
    >>> params
    [array([0., 1.])]
    """
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
    """Update by SGD with momentum, in PyTorch's form, in place (Sutskever et al., 2013).

    v = momentum * v + (1 - dampening) * g; the ``first`` step of these parameters adds g undampened
    p = p - lr * v; with ``nesterov`` p = p - lr * (g + momentum * v)

    params, grads and each state are lists of arrays; ``lr`` and ``ok`` are explained at the head of
    this file.

    >>> params, velocity = [np.array([1.0])], [np.array([5.0])]
    >>> ops.momentum_update(params, [np.array([10.0])], velocity, lr=0.1, momentum=0.5)
    >>> params, velocity
    ([array([-0.25])], [array([12.5])])
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
    """Update by AdaGrad in place (Duchi, Hazan and Singer, 2011).

    s = s + g^2;  p = p - lr * g / (sqrt(s) + eps)

    params, grads and each state are lists of arrays; ``lr`` and ``ok`` are explained at the head of
    this file.

    >>> params, square_sum = [np.array([1.0])], [np.array([9.0])]
    >>> ops.adagrad_update(params, [np.array([4.0])], square_sum, lr=0.5, eps=0.0)
    >>> params, square_sum
    ([array([0.6])], [array([25.])])
    """
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
    """Update by RMSprop in place (Hinton's lecture 6e).

    The update is centered (Graves, 2013) if ``mean`` is given, and uses momentum if ``velocity`` is
    given.

    s = alpha * s + (1 - alpha) * g^2;  m = alpha * m + (1 - alpha) * g
    u = g / (sqrt(s) + eps); centered: u = g / (sqrt(s - m^2) + eps)
    p = p - lr * u; with momentum: v = momentum * v + u; p = p - lr * v

    params, grads and each state are lists of arrays; ``lr`` and ``ok`` are explained at the head of
    this file.

    >>> params, mean_square = [np.array([1.0])], [np.array([2.0])]
    >>> ops.rmsprop_update(params, [np.array([4.0])], mean_square, lr=0.3, alpha=0.5, eps=0.0)
    >>> params, mean_square
    ([array([0.6])], [array([9.])])
    """
    for i, (p, g, s) in enumerate(zip(params, grads, mean_square, strict=True)):
        xp = backend_of(p).xp
        g = decayed(p, g, weight_decay)
        _write(s, alpha * s + (1.0 - alpha) * (g * g), ok)
        spread = s
        if mean is not None:
            _write(mean[i], alpha * mean[i] + (1.0 - alpha) * g, ok)
            # a variance; rounding can make it negative, and its root NaN
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
    """Update by Adam in place (Kingma and Ba, 2015, algorithm 1); ``step`` counts from 1.

    m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g^2
    p = p - lr * (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)

    With ``decoupled`` (AdamW: Loshchilov and Hutter, 2019) the penalty is not added to the
    gradient. Instead, p = p - lr * weight_decay * p comes first.

    params, grads and each state are lists of arrays; ``lr`` and ``ok`` are explained at the head of
    this file.

    >>> params, mean, mean_square = [np.array([1.0])], [np.array([0.0])], [np.array([0.0])]
    >>> options = {"lr": 0.25, "beta1": 0.5, "beta2": 0.5, "eps": 0.0, "step": 1}
    >>> ops.adam_update(params, [np.array([4.0])], mean, mean_square, **options)
    >>> params, mean, mean_square
    ([array([0.75])], [array([2.])], [array([8.])])
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
        raise ArgumentError("expected at least one gradient, got none", name)
    if isinstance(max_norm, int | float) and not max_norm > 0:
        raise ArgumentError(f"max_norm must be above 0, got {max_norm!r}", name)
    check_arrays(name, **{f"grads[{i}]": g for i, g in enumerate(grads)})


def global_norm(grads: list[Array]) -> Array:
    """Return sqrt(sum(g^2)) over all elements of all gradients, 0-dimensional."""
    xp = backend_of(grads[0]).xp
    return xp.sqrt(xp.sum(xp.stack([xp.sum(g * g) for g in grads])))


def clip_factor(norm: Array, max_norm: Any) -> Array:
    """Return the factor, at most 1, that scales gradients of this norm to ``max_norm``. 1e-6 avoids
    a division by 0, as in PyTorch.
    """
    return backend_of(norm).xp.clip(max_norm / (norm + 1e-6), max=1.0)


@op(_check_clip, writes=("grads",))
def clip_by_global_norm(grads: list[Array], max_norm: Any) -> Array:
    """Scale all gradients by one factor, in place, so that their joint norm is at most
    ``max_norm``.

    As torch.nn.utils.clip_grad_norm_ (Pascanu, Mikolov and Bengio, 2013). Nothing is read from the
    device.

    Args:
        grads: arrays of one library, device and floating dtype, of any shapes.
        max_norm: above 0.

    Returns:
        The norm before clipping, 0-dimensional. If it is NaN or infinite, the gradients become NaN
        or 0.

    Raises:
        ArgumentError: if there are no gradients, or max_norm is not above 0.
        ArrayError: if the gradients differ in library, device or dtype.

    Example:
        >>> grads = [np.array([3.0]), np.array([4.0])]
        >>> float(ops.clip_by_global_norm(grads, 1.0))
        5.0
        >>> np.round(np.concatenate(grads), 4)
        array([0.6, 0.8])
    """
    norm = global_norm(grads)
    factor = clip_factor(norm, max_norm)
    for g in grads:
        g[...] = g * factor
    return norm


@op()
def all_finite(arrays: list[Array]) -> Array:
    """Return whether the arrays hold no NaN or infinity: 0-dimensional, boolean, on their device.

    At least one array. The test uses the sum of each array, so a sum that overflows counts as
    infinite.

    >>> bool(ops.all_finite([np.ones(3), np.array([np.nan])]))
    False
    """
    xp = backend_of(arrays[0]).xp
    ok = xp.isfinite(xp.sum(arrays[0]))
    for array in arrays[1:]:
        ok = ok & xp.isfinite(xp.sum(array))
    return ok
