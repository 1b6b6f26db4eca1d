"""Triplet loss: zero if an anchor is nearer to its class than to other classes, by a margin.

The loss of a triplet (anchor a, positive p of a's class, negative n of another class) is that of
torch.nn.TripletMarginLoss with p=2:

    max(d(a, p) - d(a, n) + margin, 0),    d(x, y) = |x - y + eps|

The triplets are formed within the batch by the labels (Hermans et al., "In defense of the triplet
loss", 2017): for each anchor the hardest one, with the farthest positive and the nearest negative
("batch hard"), or all triplets ("batch all").

Notation: N samples, D length of an embedding. A matrix (N, N) has a row for each anchor; a cube (N,
N, N) has the anchors, the positives and the negatives.
"""

from typing import Any

from portacnn.arguments import not_negative
from portacnn.errors import PortacnnError
from portacnn.ops._linear import linear
from portacnn.ops.contrastive import check_embeddings
from portacnn.ops.dispatch import op
from portacnn.runtime import Array, backend_of


def _check(
    embeddings: Array,
    labels: Array,
    *,
    margin: float = 1.0,
    hardest: bool = True,
    eps: float = 1e-6,
    weight: Array | None = None,
    keep: bool = True,
) -> None:
    name = "triplet_loss"
    check_embeddings(name, embeddings, labels, weight)
    try:
        not_negative("margin", margin), not_negative("eps", eps)
    except PortacnnError as error:
        raise error.at(name)


@op(_check)
def triplet_loss(
    embeddings: Array,
    labels: Array,
    *,
    margin: float = 1.0,
    hardest: bool = True,
    eps: float = 1e-6,
    weight: Array | None = None,
    keep: bool = True,
) -> tuple[Array, tuple | None]:
    """Return the mean loss of the batch's triplets.

        >>> import numpy as np
        >>> from portacnn import ops
        >>> points = np.array([[0.0], [1.0], [3.0], [3.5]])
        >>> loss, cache = ops.triplet_loss(points, np.array([0, 0, 1, 1]), margin=2.0)
        >>> round(float(loss), 4), ops.triplet_loss_backward(1.0, cache).shape
        (0.375, (4, 1))

    Args:
        embeddings: (N, D), floating point. All differences (N, N, D) are in memory at once.
        labels: integers (N,), equal for samples of one class.
        margin: the required difference of the distances to the negative and to the positive.
        hardest: use one triplet per anchor, with the farthest positive and the nearest negative;
            otherwise all triplets, which needs arrays of (N, N, N) elements.
        eps: added to each coordinate of a difference.
        weight: (N,), a factor for the triplets of each anchor; the mean divides by their sum.
        keep: keep what ``triplet_loss_backward`` needs.

    Returns:
        The loss, 0-dimensional (0 if there is no triplet), and the cache.

    Raises:
        LabelError, ShapeError, ArgumentError, ArrayError: see the message.
    """
    xp = backend_of(embeddings).xp
    dtype, device = embeddings.dtype, embeddings.device
    n = embeddings.shape[0]
    difference = xp.expand_dims(embeddings, axis=1) - xp.expand_dims(embeddings, axis=0) + eps
    distance = xp.sqrt(xp.sum(difference * difference, axis=2))
    number = xp.arange(n, dtype=xp.int64, device=device)
    alike = xp.expand_dims(labels, axis=1) == xp.expand_dims(labels, axis=0)
    positive = alike & (xp.expand_dims(number, axis=1) != xp.expand_dims(number, axis=0))
    negative = ~alike
    mine = _hardest if hardest else _all
    factor = xp.ones((n,), dtype=dtype, device=device) if weight is None else weight
    loss, count, pull = mine(xp, distance, positive, negative, number, margin, factor)
    scale = xp.where(count == 0, 0.0, 1.0 / xp.where(count == 0, 1.0, count))
    return loss * scale, (embeddings, distance, pull * scale, eps) if keep else None


def _hardest(
    xp: Any,
    distance: Array,
    positive: Array,
    negative: Array,
    number: Array,
    margin: float,
    factor: Array,
) -> tuple[Array, Array, Array]:
    """Return the sum of the losses, the number of triplets, and the gradient of the distances (N,
    N); of batch hard."""
    if not number.shape[0]:
        return xp.sum(factor), xp.sum(factor), distance
    far, near = (xp.where(positive, distance, -xp.inf), xp.where(negative, -distance, -xp.inf))
    valid = xp.any(positive, axis=1) & xp.any(negative, axis=1)
    farthest = xp.expand_dims(xp.argmax(far, axis=1), axis=1) == number
    nearest = xp.expand_dims(xp.argmax(near, axis=1), axis=1) == number
    factor = xp.where(valid, factor, 0.0)
    hinge = xp.sum(xp.where(farthest, distance, 0.0) - xp.where(nearest, distance, 0.0), axis=1)
    hinge = xp.where(valid, xp.maximum(hinge + margin, 0.0), 0.0)
    active = xp.expand_dims(xp.where(hinge > 0, factor, 0.0), axis=1)
    pull = xp.where(farthest, active, 0.0) - xp.where(nearest, active, 0.0)
    return xp.sum(factor * hinge), xp.sum(factor), pull


def _all(
    xp: Any,
    distance: Array,
    positive: Array,
    negative: Array,
    number: Array,
    margin: float,
    factor: Array,
) -> tuple[Array, Array, Array]:
    """Return what ``_hardest`` does, of batch all."""
    valid = xp.expand_dims(positive, axis=2) & xp.expand_dims(negative, axis=1)  # (N, N, N)
    hinge = xp.expand_dims(distance, axis=2) - xp.expand_dims(distance, axis=1) + margin
    hinge = xp.where(valid, xp.maximum(hinge, 0.0), 0.0)
    active = xp.astype(hinge > 0, distance.dtype)
    column = xp.expand_dims(factor, axis=1)
    pull = column * (xp.sum(active, axis=2) - xp.sum(active, axis=1))
    count = xp.sum(factor * xp.sum(xp.astype(valid, distance.dtype), axis=(1, 2)))
    return xp.sum(factor * xp.sum(hinge, axis=(1, 2))), count, pull


@triplet_loss.backward
def triplet_loss_backward(dy: Array | float, saved: tuple) -> Array:
    """Return dembeddings (N, D). The gradient of the distance d(i, j) is (x_i - x_j + eps) / d for
    x_i, and its negative for x_j."""
    x, distance, pull, eps = saved
    xp = backend_of(x).xp
    share = xp.where(distance > 0, pull / xp.where(distance > 0, distance, 1.0), 0.0)
    rows, columns = xp.sum(share, axis=1, keepdims=True), xp.sum(share, axis=0)
    columns = xp.expand_dims(columns, axis=1)
    across, _ = linear(share + share.T, x.T, keep=False)
    return dy * ((rows + columns) * x - across + eps * (rows - columns))
