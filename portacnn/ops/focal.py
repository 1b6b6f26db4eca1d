"""Focal losses (Lin et al., "Focal loss for dense object detection", 2017): cross-entropy in which
easy samples have a smaller weight.

A sample whose true class has the probability p costs -(1 - p)^gamma * log(p): for gamma 0 this is
the cross-entropy; the larger gamma is, the smaller is the loss of samples that are nearly correct.

Notation: N batch, C classes, and after the classes any further axes (an image's, in segmentation).
"""

from typing import Any

from portacnn.arguments import not_negative, one_of, share
from portacnn.errors import PortacnnError
from portacnn.ops.dispatch import op
from portacnn.ops.loss import REDUCTIONS, check_labels, check_pair, reduced
from portacnn.ops.special import logistic
from portacnn.runtime import Array, backend_of

# --- of several classes, of which one is right ----------------------------------------------------


def _check_classes(
    logits: Array,
    target: Array,
    *,
    gamma: float = 2.0,
    weight: Array | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    keep: bool = True,
) -> None:
    name = "focal_loss"
    check_labels(name, logits, target, weight)
    try:
        not_negative("gamma", gamma)
        one_of("reduction", reduction, *REDUCTIONS)
    except PortacnnError as error:
        raise error.at(name)


@op(_check_classes)
def focal_loss(
    logits: Array,
    target: Array,
    *,
    gamma: float = 2.0,
    weight: Array | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    keep: bool = True,
) -> tuple[Array, tuple | None]:
    """Compute weight * -(1 - p)^gamma * log(p), where p is the softmax of the logits at the label.

        >>> import numpy as np
        >>> from portacnn import ops
        >>> loss, cache = ops.focal_loss(np.zeros((1, 2)), np.array([0]), gamma=1.0)
        >>> round(float(loss), 4), ops.focal_loss_backward(1.0, cache).shape
        (0.3466, (1, 2))

    Args:
        logits: (N, C, ...), floating point, not normalised.
        target: integers (N, ...) in 0..C-1 or ``ignore_index``.
        gamma: how much less easy samples count, from 0 (cross-entropy).
        weight: (C,), a factor for each class (the paper's alpha).
        ignore_index: labels of this value are ignored.
        reduction: ``"mean"`` over the labels that count (not over their weights), ``"sum"`` or
            ``"none"``.
        keep: keep what ``focal_loss_backward`` needs.

    Returns:
        The loss, 0-dimensional (or (N, ...) for ``"none"``), and the cache. A label that is out of
        range makes the loss NaN, and so does a mean over no label at all.

    Raises:
        LabelError, ShapeError, ArgumentError, ArrayError: see the message.
    """
    xp = backend_of(logits).xp
    dtype, device = logits.dtype, logits.device
    classes = logits.shape[1]
    along_classes = (1, classes) + (1,) * (logits.ndim - 2)
    target = xp.astype(target, xp.int64)  # bytes cannot be compared with -100
    one_hot = xp.expand_dims(target, axis=1) == xp.reshape(
        xp.arange(classes, dtype=xp.int64, device=device), along_classes
    )
    counts = xp.astype(target != ignore_index, dtype)
    shifted = logits - xp.max(logits, axis=1, keepdims=True)
    exps = xp.exp(shifted)
    total = xp.sum(exps, axis=1)
    # 1 - p as a sum: the difference would lose its digits where p is nearly 1, as would log(p)
    others = xp.sum(xp.where(one_hot, 0.0, exps), axis=1) / total
    log_p = xp.sum(xp.where(one_hot, shifted, 0.0), axis=1) - xp.log(total)
    log_p = xp.where(others < 0.5, xp.log1p(-others), log_p)
    factor = counts
    if weight is not None:
        by_class = xp.reshape(weight, along_classes)
        factor = counts * xp.sum(xp.where(one_hot, by_class, 0.0), axis=1)
    scaled = factor * others**gamma
    losses = xp.where(counts != 0, -scaled * log_p, 0.0)
    losses = xp.where(xp.any(one_hot, axis=1) | (counts == 0), losses, float("nan"))
    if reduction == "mean":
        count = xp.sum(counts)
        # The mean of no elements is NaN; without targets the gradient is 0.
        scale: Any = xp.where(count == 0, 0.0, 1.0 / xp.where(count == 0, 1.0, count))
        loss = xp.where(count == 0, float("nan"), xp.sum(losses) * scale)
    else:
        scale, loss = 1.0, losses if reduction == "none" else xp.sum(losses)
    saved = (exps / xp.expand_dims(total, axis=1), one_hot, log_p, others, scaled, gamma, scale)
    return loss, (*saved, reduction) if keep else None


@focal_loss.backward
def focal_loss_backward(dy: Array | float, saved: tuple) -> Array:
    """Return dlogits (N, C, ...) = dy * weight * (1 - p)^gamma * (1 - gamma * p * log(p) / (1 - p))
    * (softmax - one_hot), divided as the mean was."""
    softmax, one_hot, log_p, others, scaled, gamma, scale, reduction = saved
    xp = backend_of(softmax).xp
    # log(p) / (1 - p) goes to -1 as p goes to 1
    ratio = xp.where(others > 0, log_p / xp.where(others > 0, others, 1.0), -1.0)
    slope = xp.where(scaled != 0, scaled * (1.0 - gamma * (1.0 - others) * ratio), 0.0)
    if reduction == "none" and hasattr(dy, "shape"):
        dy = xp.expand_dims(dy, axis=1)
    difference = softmax - xp.astype(one_hot, softmax.dtype)
    return difference * xp.expand_dims(slope, axis=1) * (dy * scale)


# --- of labels that are each right or wrong -------------------------------------------------------


def _check_labels(
    input: Array,
    target: Array,
    *,
    gamma: float = 2.0,
    alpha: float | None = 0.25,
    **options: Any,
) -> None:
    name = "sigmoid_focal_loss"
    check_pair(name, "weight")(input, target, **options)
    try:
        not_negative("gamma", gamma)
        if alpha is not None:
            share("alpha", alpha)
    except PortacnnError as error:
        raise error.at(name)


@op(_check_labels)
def sigmoid_focal_loss(
    input: Array,
    target: Array,
    *,
    gamma: float = 2.0,
    alpha: float | None = 0.25,
    weight: Array | None = None,
    reduction: str = "mean",
    keep: bool = True,
) -> tuple[Array, Any]:
    """Compute weight * -(t * alpha * (1 - s)^gamma * log(s) + (1 - t) * (1 - alpha) * s^gamma *
    log(1 - s)) with s = sigmoid(input).

        >>> import numpy as np
        >>> from portacnn import ops
        >>> loss, cache = ops.sigmoid_focal_loss(np.zeros((1, 2)), np.array([[1.0, 0.0]]))
        >>> round(float(loss), 4), ops.sigmoid_focal_loss_backward(1.0, cache).shape
        (0.0866, (1, 2))

    For targets of 0 and 1 these are the values of torchvision.ops.sigmoid_focal_loss.

    Args:
        input: logits of any shape, floating point.
        target: 0 to 1, of input's shape and dtype.
        gamma: how much less easy elements count, from 0.
        alpha: the share of the positive side, or None to leave both sides as they are.
        weight: a factor for each element, broadcast to input, or None.
        reduction: ``"mean"`` over all elements, ``"sum"`` or ``"none"``.
        keep: keep what ``sigmoid_focal_loss_backward`` needs.

    Returns:
        The loss, 0-dimensional (or shaped as input for ``"none"``), and the cache.

    Raises:
        ShapeError, ArgumentError, ArrayError: see the message.
    """
    xp = backend_of(input).xp
    log_term = xp.log1p(xp.exp(-xp.abs(input)))
    p, q = logistic(input), logistic(-input)
    on = log_term - xp.minimum(input, 0.0)  # -log(p)
    off = log_term + xp.maximum(input, 0.0)  # -log(q)
    shares = (1.0, 1.0) if alpha is None else (alpha, 1.0 - alpha)
    positive, negative = shares[0] * target * q**gamma, shares[1] * (1.0 - target) * p**gamma
    losses = positive * on + negative * off
    loss, scale = reduced(losses if weight is None else weight * losses, reduction)
    saved = (p, q, on, off, positive, negative, gamma, weight, scale)
    return loss, saved if keep else None


@sigmoid_focal_loss.backward
def sigmoid_focal_loss_backward(dy: Array | float, saved: tuple) -> Array:
    """Return dinput, from the slopes -(1 - s)^gamma * ((1 - s) - gamma * s * log(s)) of the
    positive side and the mirrored one of the negative side."""
    p, q, on, off, positive, negative, gamma, weight, scale = saved
    dinput = negative * (p + gamma * q * off) - positive * (q + gamma * p * on)
    if weight is not None:
        dinput = weight * dinput
    return dinput * (dy * scale)
