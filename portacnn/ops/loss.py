"""Losses: from a network's last activations and what should have come out, a number and the way down.

Notation: N batch, C classes, and after the classes any further axes (an image's, in segmentation).
"""

from math import prod

from portacnn.errors import ArgumentError, LabelError, ShapeError
from portacnn.ops.dispatch import check_arrays, op
from portacnn.runtime import Array, backend_of, describe, is_float


def _check(
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
            f"expected labels of shape {(n, *rest)}, or one-hot of {tuple(logits.shape)}, got {tuple(target.shape)}",
            name,
        )
    if target.ndim < logits.ndim and is_float(backend_of(target).xp, target.dtype):
        raise LabelError(f"class indices must be integers, got {describe(target)}", name)
    if weight is not None and tuple(weight.shape) != (classes,):
        raise ShapeError(f"expected a weight for each of {classes} classes, got shape {tuple(weight.shape)}", name)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ArgumentError(f"label_smoothing must lie in 0..1, got {label_smoothing!r}", name)
    if reduction not in ("mean", "sum", "none"):
        raise ArgumentError(f'reduction must be "mean", "sum" or "none", got {reduction!r}', name)


@op(_check)
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
    """Softmax over the classes and the cross-entropy with ``target``, as torch.nn.functional.cross_entropy.

    With p the target distribution (one-hot for an integer label), smoothed and weighted to
    q = weight * ((1 - label_smoothing) * p + label_smoothing / C), a sample's loss is -sum(q * log_softmax(logits)).

    Args:
        logits: (N, C, ...), floating point, not normalised.
        target: integers (N, ...) in 0..C-1 or ``ignore_index``, or a distribution (one-hot, soft labels) shaped as logits.
        weight: (C,), a factor for each class.
        ignore_index: integer labels of this value count for nothing.
        label_smoothing: the share of every target spread evenly over the classes, 0..1.
        reduction: ``"mean"`` (for integer labels over the weights of the labels that count), ``"sum"`` or ``"none"``.
        keep: keep what ``softmax_cross_entropy_backward`` needs.

    Returns:
        The loss, 0-dimensional (or (N, ...) for ``"none"``), and the cache. A label that is out of range makes the loss NaN:
        looking would cost a transfer here; models and Trainer look, once, on the host.

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
        target = xp.astype(target, xp.int64)  # bytes can neither name 300 classes nor be compared with -100
        labels = xp.expand_dims(target, axis=1)
        one_hot = labels == xp.reshape(xp.arange(classes, dtype=xp.int64, device=device), along_classes)
        p = xp.astype(one_hot, dtype)
        counts = xp.astype(labels != ignore_index, dtype)
    else:
        p, counts = xp.astype(target, dtype), 1.0
    if indices:
        count = xp.sum(by_class * p * counts)
        count = xp.where(count == 0, float("nan"), count)  # the mean of nothing is NaN, and no division by zero
    else:
        count = float(logits.shape[0] * prod(logits.shape[2:])) or float("nan")
    if label_smoothing:
        p = (1.0 - label_smoothing) * p + label_smoothing / classes
    q = by_class * p * counts  # (N, C, ...)
    # A class without a share costs nothing, be its logit -inf.
    losses = xp.sum(q * xp.where(q != 0, xp.log(total) - shifted, 0.0), axis=1)
    if indices:
        known = xp.any(one_hot, axis=1) | (target == ignore_index)
        losses = xp.where(known, losses, float("nan"))
    scale = 1.0 / count if reduction == "mean" else 1.0
    loss = losses if reduction == "none" else xp.sum(losses) * scale
    return loss, (exps / total, q, scale, reduction) if keep else None


@softmax_cross_entropy.backward
def softmax_cross_entropy_backward(dy: Array | float, saved: tuple) -> Array:
    """dlogits (N, C, ...) = dy * (softmax(logits) * sum(q) - q), divided as the mean was. dy: shaped as the loss, or 1.0."""
    softmax, q, scale, reduction = saved
    xp = backend_of(softmax).xp
    if reduction == "none" and not isinstance(dy, float):
        dy = xp.expand_dims(dy, axis=1)
    return (softmax * xp.sum(q, axis=1, keepdims=True) - q) * (dy * scale)
