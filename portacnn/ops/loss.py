"""Losses: a value that measures the difference of outputs and targets, and its gradient.

Notation: N batch, C classes; further axes may follow the classes (those of an image, in
segmentation).
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


def check_labels(
    name: str, logits: Array, target: Array, weight: Array | None, *, shares: bool = False
) -> None:
    """Check the arrays of a loss of classes.

    Args:
        name: the op, for messages.
        logits: (N, C, ...), floating point.
        target: integers (N, ...); with ``shares`` also a distribution of logits' shape.
        weight: (C,), or None.
    """
    check_arrays(name, logits=logits, weight=weight)
    if backend_of(target).name != backend_of(logits).name or target.device != logits.device:
        check_arrays(name, integers=True, logits=logits, target=target)
    if logits.ndim < 2:
        raise ShapeError(f"expected logits (N, C, ...), got {describe(logits)}", name)
    n, classes, *rest = logits.shape
    one_hot = shares and tuple(target.shape) == tuple(logits.shape)
    if not one_hot and tuple(target.shape) != (n, *rest):
        more = f", or one-hot of {tuple(logits.shape)}" if shares else ""
        raise LabelError(
            f"expected labels of shape {(n, *rest)}{more}, got {tuple(target.shape)}", name
        )
    if not one_hot and is_float(backend_of(target).xp, target.dtype):
        raise LabelError(f"class indices must be integers, got {describe(target)}", name)
    if weight is not None and tuple(weight.shape) != (classes,):
        raise ShapeError(
            f"expected a weight of shape ({classes},), one per class, got {tuple(weight.shape)}",
            name,
        )


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
    check_labels(name, logits, target, weight, shares=True)
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
    """Compute the cross-entropy of softmax(logits) and ``target``, as
    torch.nn.functional.cross_entropy.

    Let p be the target distribution (one-hot for an integer label). Smoothing and weights make it q
    = weight * ((1 - label_smoothing) * p + label_smoothing / C). The loss of a sample is -sum(q *
    log_softmax(logits)).

    Args:
        logits: (N, C, ...), floating point, not normalized.
        target: integers (N, ...) in 0..C-1 or ``ignore_index``, or a distribution (one-hot, soft
            labels) with the shape of logits.
        weight: (C,), a factor per class, or None.
        ignore_index: samples with this integer label are ignored.
        label_smoothing: the part of every target that is spread evenly over the classes, 0..1.
        reduction: ``"mean"`` (for integer labels, divided by the sum of the weights of their
            classes), ``"sum"`` or ``"none"``.
        keep: store what ``softmax_cross_entropy_backward`` needs.

    Returns:
        The loss, 0-dimensional (or (N, ...) with ``"none"``), and the cache. A label that is out of
        range makes the loss NaN. Checking labels here would need a transfer from the device; models
        and Trainer check them once, on the host.

    Raises:
        LabelError: if the shape of target does not match the logits, or class indices are not
            integers.
        ShapeError: if logits have fewer than two axes, or weight is not (C,).
        ArgumentError: if label_smoothing or reduction is invalid, or ignore_index is used with a
            distribution.
        ArrayError: if logits are not floating point, or arrays differ in library or device.

    Example:
        >>> logits = np.array([[2.0, 0.0], [0.0, 0.0]])
        >>> loss, cache = ops.softmax_cross_entropy(logits, np.array([0, 1]))
        >>> round(float(loss), 4)
        0.41
        >>> np.round(ops.softmax_cross_entropy_backward(1.0, cache), 4)
        array([[-0.0596,  0.0596],
               [ 0.25  , -0.25  ]])
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
        # int8 and uint8 cannot hold 300 classes, and uint8 cannot hold -100
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
    # A class with q = 0 adds nothing to the loss, even if its logit is -inf.
    losses = xp.sum(q * xp.where(q != 0, xp.log(total) - shifted, 0.0), axis=1)
    if indices:
        known = xp.any(one_hot, axis=1) | (target == ignore_index)
        losses = xp.where(known, losses, float("nan"))
    if reduction == "mean":
        # The mean over no samples is NaN and its gradient 0, as in PyTorch.
        scale = xp.where(count == 0, 0.0, 1.0 / xp.where(count == 0, 1.0, count))
        loss = xp.where(count == 0, float("nan"), xp.sum(losses) * scale)
    else:
        scale, loss = 1.0, losses if reduction == "none" else xp.sum(losses)
    return loss, (exps / total, q, scale, reduction) if keep else None


@softmax_cross_entropy.backward
def softmax_cross_entropy_backward(dy: Array | float, saved: tuple) -> Array:
    """Return dlogits (N, C, ...) = dy * (softmax(logits) * sum(q) - q), divided as the mean was.

    dy: an array with the shape of the loss, or 1.0.
    """
    softmax, q, scale, reduction = saved
    xp = backend_of(softmax).xp
    if reduction == "none" and hasattr(dy, "shape"):
        dy = xp.expand_dims(dy, axis=1)
    return (softmax * xp.sum(q, axis=1, keepdims=True) - q) * (dy * scale)


def is_correct(logits: Array, labels: Array) -> Array:
    """Return for each sample whether its largest logit is that of its label: booleans (N,).

    logits: (N, C); labels: integers (N,). A sample with a NaN is not correct.

    >>> ops.is_correct(np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([0, 0]))
    array([ True, False])
    """
    check_arrays("is_correct", logits=logits)
    xp = backend_of(logits).xp
    return (xp.argmax(logits, axis=1) == labels) & xp.all(logits == logits, axis=1)


# --- elementwise losses ---------------------------------------------------------------------------


def check_pair(name: str, *factors: str) -> Callable[..., None]:
    """Return the check of a loss whose input and target have one shape. ``factors`` are optional
    arrays that broadcast to it.
    """

    def check(
        input: Array, target: Array, *, reduction: str = "mean", keep: bool = True, **options: Any
    ) -> None:
        check_arrays(name, input=input, target=target, **options)
        if tuple(input.shape) != tuple(target.shape):
            raise ShapeError(
                f"expected input and target of one shape, got {describe(input)} and "
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
    """Return the loss and the factor of each gradient. The mean over no elements is NaN, as in
    PyTorch.
    """
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
    """Compute weight * (input - target)^2, as torch.nn.functional.mse_loss.

    Unlike in PyTorch, ``"mean"`` always divides by the number of elements, also with a weight.

    Args:
        input, target: any shape, the same for both; floating point, of one dtype.
        weight: broadcast to them, or None.
        reduction: ``"mean"`` over all elements, ``"sum"`` or ``"none"``.
        keep: store what ``mse_loss_backward`` needs.

    Returns:
        The loss, 0-dimensional (or with the shape of input for ``"none"``), and the cache.

    Raises:
        ShapeError: if input and target differ in shape, or weight does not broadcast to them.
        ArgumentError: if reduction is unknown.
        ArrayError: if the arrays are integers, or differ in library, device or dtype.

    Example:
        >>> loss, cache = ops.mse_loss(np.array([1.0, 4.0]), np.array([0.0, 2.0]))
        >>> float(loss)
        2.5
        >>> ops.mse_loss_backward(1.0, cache)
        array([1., 2.])
    """
    difference = input - target
    weighted = difference if weight is None else weight * difference
    loss, scale = reduced(weighted * difference, reduction)
    return loss, (weighted, scale) if keep else None


@mse_loss.backward
def mse_loss_backward(dy: Array | float, saved: tuple) -> Array:
    """Return dinput = dy * 2 * weight * (input - target), divided as the mean was.

    dy: an array with the shape of the loss, or 1.0.
    """
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
    """Compute weight * |input - target|, as torch.nn.functional.l1_loss does.

    Arguments, result and errors are those of ``mse_loss``.

        >>> import numpy as np
        >>> from portacnn import ops
        >>> loss, cache = ops.l1_loss(np.array([1.0, 4.0]), np.array([2.0, 1.0]))
        >>> float(loss), ops.l1_loss_backward(1.0, cache).tolist()
        (2.0, [-0.5, 0.5])
    """
    difference = input - target
    size = backend_of(input).xp.abs(difference)
    loss, scale = reduced(size if weight is None else weight * size, reduction)
    return loss, (difference, weight, scale) if keep else None


@l1_loss.backward
def l1_loss_backward(dy: Array | float, saved: tuple) -> Array:
    """Return dinput = dy * weight * sign(input - target), divided as the mean was; 0 at equal
    values."""
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
    """Compute 0.5 * d^2 for |d| = |input - target| up to ``delta``, a line of slope ``delta``
    beyond.

    As torch.nn.functional.huber_loss.

        >>> import numpy as np
        >>> from portacnn import ops
        >>> loss, cache = ops.huber_loss(np.array([1.0, 4.0]), np.array([1.5, 1.0]))
        >>> float(loss), ops.huber_loss_backward(1.0, cache).tolist()
        (1.3125, [-0.25, 0.5])

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
    """Return dinput = dy * weight * (input - target), clipped to -delta..delta, divided as the mean
    was."""
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
    """Compute the binary cross-entropy of sigmoid(input) and target, as torch's function of this
    name.

    The loss of an element is weight * -(pos_weight * t * log(s) + (1 - t) * log(1 - s)) with s =
    sigmoid(x). It is computed as (1 - t) * x + (1 + (pos_weight - 1) * t) * log(1 + exp(-x)), which
    does not overflow.

    Args:
        input: logits x of any shape, floating point.
        target: probabilities t, 0 to 1, of input's shape and dtype.
        weight: a factor per element, broadcast to input, or None.
        pos_weight: a factor of the positive term, broadcast to input ((C,) for an input (N, C)), or
            None.
        reduction: ``"mean"`` over all elements, ``"sum"`` or ``"none"``.
        keep: store what ``binary_cross_entropy_with_logits_backward`` needs.

    Returns:
        The loss, 0-dimensional (or with the shape of input for ``"none"``), and the cache.

    Raises:
        ShapeError, ArgumentError, ArrayError: as for ``mse_loss``.

    Example:
        >>> loss, cache = ops.binary_cross_entropy_with_logits(np.array([0.0]), np.array([1.0]))
        >>> round(float(loss), 4)
        0.6931
        >>> ops.binary_cross_entropy_with_logits_backward(1.0, cache)
        array([-0.5])
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
    """Return dinput = dy * weight * ((1 - t) - (1 + (pos_weight - 1) * t) * sigmoid(-x)), divided
    as the mean was.

    dy: an array with the shape of the loss, or 1.0.
    """
    input, negative, positive, weight, scale = saved
    dinput = negative - positive * logistic(-input)
    if weight is not None:
        dinput = weight * dinput
    return dinput * (dy * scale)
