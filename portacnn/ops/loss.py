"""Losses: from a network's last activations and what should have come out, a number and the way
down.

Notation: N batch, C classes, and after the classes any further axes (an image's, in segmentation).
"""

from collections.abc import Callable
from math import prod
from typing import Any

from portacnn.arguments import one_of, positive, real
from portacnn.errors import ArgumentError, LabelError, PortacnnError, ShapeError
from portacnn.ops.dispatch import check_arrays, op
from portacnn.ops.special import logistic
from portacnn.runtime import Array, backend_of, describe, is_float

REDUCTIONS = ("mean", "sum", "none")


# --- softmax cross-entropy ------------------------------------------------------------------------


def _check_cross_entropy(
    logits: Array,
    target: Array,
    *,
    weight: Array | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    keep: bool = True,
) -> None:
    name = "softmax_cross_entropy"
    check_arrays(name, logits=logits, weight=weight)
    if backend_of(target).name != backend_of(logits).name or target.device != logits.device:
        check_arrays(name, integers=True, logits=logits, target=target)
    if logits.ndim < 2:
        raise ShapeError(f"expected logits (N, C, ...), got {describe(logits)}", name)
    n, classes, *rest = logits.shape
    if tuple(target.shape) not in ((n, *rest), tuple(logits.shape)):
        raise LabelError(
            f"expected labels of shape {(n, *rest)}, or one-hot of {tuple(logits.shape)}, got "
            f"{tuple(target.shape)}",
            name,
        )
    if target.ndim < logits.ndim and is_float(backend_of(target).xp, target.dtype):
        raise LabelError(f"class indices must be integers, got {describe(target)}", name)
    if weight is not None and tuple(weight.shape) != (classes,):
        raise ShapeError(
            f"expected a weight for each of {classes} classes, got shape {tuple(weight.shape)}",
            name,
        )
    if target.ndim == logits.ndim and ignore_index >= 0:
        raise ArgumentError(
            f"ignore_index={ignore_index} is for integer labels, got a distribution "
            f"{describe(target)}",
            name,
        )
    try:
        real("label_smoothing", label_smoothing, least=0.0, most=1.0)
        one_of("reduction", reduction, *REDUCTIONS)
    except PortacnnError as error:
        raise error.at(name)


@op(_check_cross_entropy)
def softmax_cross_entropy(
    logits: Array,
    target: Array,
    *,
    weight: Array | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    keep: bool = True,
) -> tuple[Array, tuple | None]:
    """Softmax over the classes and the cross-entropy with ``target``, as
    torch.nn.functional.cross_entropy.

    With p the target distribution (one-hot for an integer label), smoothed and weighted to q =
    weight * ((1 - label_smoothing) * p + label_smoothing / C), a sample's loss is -sum(q *
    log_softmax(logits)).

    Args:
        logits: (N, C, ...), floating point, not normalised.
        target: integers (N, ...) in 0..C-1 or ``ignore_index``, or a distribution (one-hot, soft
            labels) shaped as logits.
        weight: (C,), a factor for each class.
        ignore_index: integer labels of this value count for nothing.
        label_smoothing: the share of every target spread evenly over the classes, 0..1.
        reduction: ``"mean"`` (for integer labels over the weights of the labels that count),
            ``"sum"`` or ``"none"``.
        keep: keep what ``softmax_cross_entropy_backward`` needs.

    Returns:
        The loss, 0-dimensional (or (N, ...) for ``"none"``), and the cache. A label that is out of
        range makes the loss NaN: looking would cost a transfer here; models and Trainer look, once,
        on the host.

    Raises:
        LabelError, ShapeError, ArgumentError, ArrayError: see the message.
    """
    xp = backend_of(logits).xp
    dtype, device = logits.dtype, logits.device
    classes = logits.shape[1]
    shifted = logits - xp.max(logits, axis=1, keepdims=True)  # exp stays within 0..1
    exps = xp.exp(shifted)
    total = xp.sum(exps, axis=1, keepdims=True)

    along_classes = (1, classes) + (1,) * (logits.ndim - 2)
    by_class = 1.0 if weight is None else xp.reshape(weight, along_classes)
    indices = target.ndim < logits.ndim
    if indices:
        # bytes can neither name 300 classes nor be compared with -100
        target = xp.astype(target, xp.int64)
        labels = xp.expand_dims(target, axis=1)
        one_hot = labels == xp.reshape(
            xp.arange(classes, dtype=xp.int64, device=device), along_classes
        )
        p = xp.astype(one_hot, dtype)
        counts = xp.astype(labels != ignore_index, dtype)
    else:
        p, counts = xp.astype(target, dtype), 1.0
    size = logits.shape[0] * prod(logits.shape[2:])
    count = (
        xp.sum(by_class * p * counts)
        if indices
        else xp.full((), float(size), dtype=dtype, device=device)
    )
    if label_smoothing:
        p = (1.0 - label_smoothing) * p + label_smoothing / classes
    q = by_class * p * counts  # (N, C, ...)
    # A class without a share costs nothing, be its logit -inf.
    losses = xp.sum(q * xp.where(q != 0, xp.log(total) - shifted, 0.0), axis=1)
    if indices:
        known = xp.any(one_hot, axis=1) | (target == ignore_index)
        losses = xp.where(known, losses, float("nan"))
    if reduction == "mean":
        # The mean over nothing is NaN, as in PyTorch; what nothing is asked of has the gradient 0.
        scale = xp.where(count == 0, 0.0, 1.0 / xp.where(count == 0, 1.0, count))
        loss = xp.where(count == 0, float("nan"), xp.sum(losses) * scale)
    else:
        scale, loss = 1.0, losses if reduction == "none" else xp.sum(losses)
    return loss, (exps / total, q, scale, reduction) if keep else None


@softmax_cross_entropy.backward
def softmax_cross_entropy_backward(dy: Array | float, saved: tuple) -> Array:
    """dlogits (N, C, ...) = dy * (softmax(logits) * sum(q) - q), divided as the mean was. dy:
    shaped as the loss, or 1.0."""
    softmax, q, scale, reduction = saved
    xp = backend_of(softmax).xp
    if reduction == "none" and hasattr(dy, "shape"):
        dy = xp.expand_dims(dy, axis=1)
    return (softmax * xp.sum(q, axis=1, keepdims=True) - q) * (dy * scale)


def is_correct(logits: Array, labels: Array) -> Array:
    """For logits (N, C) and integer labels (N,): whether the largest logit is the label's, booleans
    (N,); not if one is NaN."""
    xp = backend_of(logits).xp
    return (xp.argmax(logits, axis=1) == labels) & xp.all(logits == logits, axis=1)


# --- losses of one number against another ---------------------------------------------------------


def check_pair(name: str, *factors: str) -> Callable[..., None]:
    """The check of a loss whose input and target have one shape; ``factors`` are optional arrays
    that broadcast to it."""

    def check(
        input: Array, target: Array, *, reduction: str = "mean", keep: bool = True, **options: Any
    ) -> None:
        check_arrays(name, input=input, target=target, **options)
        if tuple(input.shape) != tuple(target.shape):
            raise ShapeError(
                f"expected a target shaped as the input, got {describe(input)} and "
                f"{describe(target)}",
                name,
            )
        for factor in factors:
            array = options.get(factor)
            if array is not None and not _broadcasts(tuple(array.shape), tuple(input.shape)):
                raise ShapeError(
                    f"{factor} {tuple(array.shape)} does not broadcast to the input "
                    f"{describe(input)}",
                    name,
                )
        try:
            one_of("reduction", reduction, *REDUCTIONS)
        except PortacnnError as error:
            raise error.at(name)

    return check


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    last = to[max(len(to) - len(shape), 0) :]
    return len(shape) == len(last) and all(n in (1, m) for n, m in zip(shape, last, strict=True))


def reduced(losses: Array, reduction: str) -> tuple[Array, float]:
    """The loss, and what each gradient is multiplied with. The mean over nothing is NaN, as in
    PyTorch."""
    if reduction == "none":
        return losses, 1.0
    total = backend_of(losses).xp.sum(losses)
    if reduction == "sum":
        return total, 1.0
    scale = 1.0 / prod(losses.shape) if prod(losses.shape) else float("nan")
    return total * scale, scale


@op(check_pair("mse_loss", "weight"))
def mse_loss(
    input: Array,
    target: Array,
    *,
    weight: Array | None = None,
    reduction: str = "mean",
    keep: bool = True,
) -> tuple[Array, Any]:
    """weight * (input - target)^2, as torch.nn.functional.mse_loss (but that the mean divides by
    the count of numbers, always).

    Args:
        input, target: any shape, one for both; floating point, of one dtype.
        weight: broadcast to them, or None.
        reduction: ``"mean"`` over all numbers, ``"sum"`` or ``"none"``.
        keep: keep what ``mse_loss_backward`` needs.

    Returns:
        The loss, 0-dimensional (or shaped as input for ``"none"``), and the cache.

    Raises:
        ShapeError, ArgumentError, ArrayError: see the message.
    """
    difference = input - target
    weighted = difference if weight is None else weight * difference
    loss, scale = reduced(weighted * difference, reduction)
    return loss, (weighted, scale) if keep else None


@mse_loss.backward
def mse_loss_backward(dy: Array | float, saved: tuple) -> Array:
    """dinput = dy * 2 * weight * (input - target), divided as the mean was. dy: shaped as the loss,
    or 1.0."""
    weighted, scale = saved
    return weighted * (dy * (2.0 * scale))


@op(check_pair("l1_loss", "weight"))
def l1_loss(
    input: Array,
    target: Array,
    *,
    weight: Array | None = None,
    reduction: str = "mean",
    keep: bool = True,
) -> tuple[Array, Any]:
    """weight * |input - target|, as torch.nn.functional.l1_loss. Arguments, result and errors are
    those of ``mse_loss``."""
    difference = input - target
    size = backend_of(input).xp.abs(difference)
    loss, scale = reduced(size if weight is None else weight * size, reduction)
    return loss, (difference, weight, scale) if keep else None


@l1_loss.backward
def l1_loss_backward(dy: Array | float, saved: tuple) -> Array:
    """dinput = dy * weight * sign(input - target), divided as the mean was; 0 where they are
    equal."""
    difference, weight, scale = saved
    slope = backend_of(difference).xp.sign(difference)
    return (slope if weight is None else weight * slope) * (dy * scale)


def _check_huber(input: Array, target: Array, *, delta: float = 1.0, **options: Any) -> None:
    check_pair("huber_loss", "weight")(input, target, **options)
    try:
        positive("delta", delta)
    except PortacnnError as error:
        raise error.at("huber_loss")


@op(_check_huber)
def huber_loss(
    input: Array,
    target: Array,
    *,
    delta: float = 1.0,
    weight: Array | None = None,
    reduction: str = "mean",
    keep: bool = True,
) -> tuple[Array, Any]:
    """0.5 * d^2 for |d| = |input - target| up to ``delta``, a straight line of slope ``delta``
    beyond; as torch.nn.functional.huber_loss.

    The other arguments, the result and the errors are those of ``mse_loss``.
    """
    xp = backend_of(input).xp
    difference = input - target
    size = xp.abs(difference)
    near = xp.minimum(size, delta)
    losses = near * (size - 0.5 * near)  # also 0.5 * d^2, where both are |d|
    loss, scale = reduced(losses if weight is None else weight * losses, reduction)
    return loss, (difference, delta, weight, scale) if keep else None


@huber_loss.backward
def huber_loss_backward(dy: Array | float, saved: tuple) -> Array:
    """dinput = dy * weight * (input - target), cut to -delta..delta, divided as the mean was."""
    difference, delta, weight, scale = saved
    slope = backend_of(difference).xp.clip(difference, -delta, delta)
    return (slope if weight is None else weight * slope) * (dy * scale)


@op(check_pair("binary_cross_entropy_with_logits", "weight", "pos_weight"))
def binary_cross_entropy_with_logits(
    input: Array,
    target: Array,
    *,
    weight: Array | None = None,
    pos_weight: Array | None = None,
    reduction: str = "mean",
    keep: bool = True,
) -> tuple[Array, Any]:
    """weight * -(pos_weight * t * log(s) + (1 - t) * log(1 - s)) with s = sigmoid(input), as
    torch's function of this name.

    Computed as (1 - t) * x + (1 + (pos_weight - 1) * t) * log(1 + exp(-x)), which does not
    overflow.

    Args:
        input: logits x of any shape, floating point.
        target: probabilities t, 0 to 1, of input's shape and dtype.
        weight: a factor for each number, broadcast to input, or None.
        pos_weight: a factor for the positive side, broadcast to input ((C,) for an input (N, C)),
            or None.
        reduction: ``"mean"`` over all numbers, ``"sum"`` or ``"none"``.
        keep: keep what ``binary_cross_entropy_with_logits_backward`` needs.

    Returns:
        The loss, 0-dimensional (or shaped as input for ``"none"``), and the cache.

    Raises:
        ShapeError, ArgumentError, ArrayError: see the message.
    """
    xp = backend_of(input).xp
    negative = 1.0 - target
    # 1 + (pos_weight - 1) * t
    positive = 1.0 if pos_weight is None else negative + pos_weight * target
    log_term = xp.log1p(xp.exp(-xp.abs(input))) - xp.minimum(input, 0.0)  # log(1 + exp(-x))
    losses = negative * input + positive * log_term
    loss, scale = reduced(losses if weight is None else weight * losses, reduction)
    return loss, (input, negative, positive, weight, scale) if keep else None


@binary_cross_entropy_with_logits.backward
def binary_cross_entropy_with_logits_backward(dy: Array | float, saved: tuple) -> Array:
    """dinput = dy * weight * ((1 - t) - (1 + (pos_weight - 1) * t) * sigmoid(-x)), divided as the
    mean was."""
    input, negative, positive, weight, scale = saved
    dinput = negative - positive * logistic(-input)
    if weight is not None:
        dinput = weight * dinput
    return dinput * (dy * scale)
