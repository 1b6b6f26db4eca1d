"""Triplet loss: zero if an anchor is nearer to its class than to other classes, by a margin.

The loss of a triplet (anchor a, positive p of a's class, negative n of another class) is that of
torch.nn.TripletMarginLoss with p=2:

    max(d(a, p) - d(a, n) + margin, 0),    d(x, y) = |x - y + eps|

The triplets are formed within the batch by the labels:

- "semihard" (Schroff et al., "FaceNet", 2015): each pair of an anchor and a positive, with the
  nearest negative that is farther than the positive; if there is none, with the farthest negative;
- "hardest" ("batch hard": Hermans et al., "In defense of the triplet loss", 2017): each anchor,
  with its farthest positive and its nearest negative;
- "all" ("batch all", there too): all of them.

With the hardest triplets, training from random weights often makes all embeddings equal. The
gradient is 0 there, so training does not leave that point.

Notation: N samples, D length of an embedding. A matrix (N, N) has a row for each anchor; a cube (R,
N, N) has R anchors, the positives and the negatives.
"""

from typing import Any

from portacnn.arguments import not_negative, one_of
from portacnn.errors import PortacnnError
from portacnn.ops._linear import linear
from portacnn.ops.contrastive import check_embeddings
from portacnn.ops.dispatch import op
from portacnn.runtime import Array, backend_of

TRIPLETS = ("semihard", "hardest", "all")
"""Which triplets of a batch the loss may take."""
CUBE = 1 << 22
"""The largest number of elements of a cube: the anchors of larger batches come one part after the
other."""


def _check(
    embeddings: Array,
    labels: Array,
    *,
    margin: float = 1.0,
    triplets: str = "semihard",
    eps: float = 1e-6,
    weight: Array | None = None,
    keep: bool = True,
) -> None:
    name = "triplet_loss"
    check_embeddings(name, embeddings, labels, weight)
    try:
        not_negative("margin", margin), not_negative("eps", eps)
        one_of("triplets", triplets, *TRIPLETS)
    except PortacnnError as error:
        raise error.at(name)


@op(_check)
def triplet_loss(
    embeddings: Array,
    labels: Array,
    *,
    margin: float = 1.0,
    triplets: str = "semihard",
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
        triplets: "semihard", "hardest" or "all", see above. The time of "semihard" and "all" grows
            with the cube of N.
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
    factor = xp.ones((n,), dtype=dtype, device=device) if weight is None else weight
    mine = {"semihard": _semihard, "hardest": _hardest, "all": _all}[triplets]
    rows = max(n if triplets == "hardest" else CUBE // max(n * n, 1), 1)
    parts = []
    for start in range(0, max(n, 1), rows):
        part = slice(start, min(start + rows, n))
        of_anchors = (distance[part, :], positive[part, :], negative[part, :], factor[part])
        parts.append(mine(xp, *of_anchors, number, margin))
    loss, count, pull = parts[0]
    if len(parts) > 1:
        loss, count = (xp.sum(xp.stack([part[k] for part in parts])) for k in (0, 1))
        pull = xp.concat([part[2] for part in parts])
    scale = xp.where(count == 0, 0.0, 1.0 / xp.where(count == 0, 1.0, count))
    return loss * scale, (embeddings, distance, pull * scale, eps) if keep else None


def _semihard(
    xp: Any,
    distance: Array,
    positive: Array,
    negative: Array,
    factor: Array,
    number: Array,
    margin: float,
) -> tuple[Array, Array, Array]:
    """Return the sum of the losses of R anchors, the number of triplets, and the gradient of the
    distances (R, N)."""
    if not number.shape[0]:
        return xp.sum(factor), xp.sum(factor), distance
    to_negative = xp.expand_dims(distance, axis=1)  # (R, 1, N)
    farther = xp.expand_dims(negative, axis=1) & (to_negative > xp.expand_dims(distance, axis=2))
    nearest = xp.argmin(xp.where(farther, to_negative, xp.inf), axis=2)  # (R, N), by positive
    farthest = xp.argmax(xp.where(negative, distance, -xp.inf), axis=1, keepdims=True)
    chosen = xp.where(xp.any(farther, axis=2), nearest, farthest)
    chosen = xp.expand_dims(chosen, axis=2) == number  # (R, N, N)
    hinge = distance - xp.sum(xp.where(chosen, to_negative, 0.0), axis=2)
    valid = positive & xp.any(negative, axis=1, keepdims=True)
    hinge = xp.where(valid, xp.maximum(hinge + margin, 0.0), 0.0)
    factor = xp.where(valid, xp.expand_dims(factor, axis=1), 0.0)
    active = xp.where(hinge > 0, factor, 0.0)
    away = xp.sum(xp.where(chosen, xp.expand_dims(active, axis=2), 0.0), axis=1)
    return xp.sum(factor * hinge), xp.sum(factor), active - away


def _hardest(
    xp: Any,
    distance: Array,
    positive: Array,
    negative: Array,
    factor: Array,
    number: Array,
    margin: float,
) -> tuple[Array, Array, Array]:
    """Return what ``_semihard`` does, of batch hard."""
    if not number.shape[0]:
        return xp.sum(factor), xp.sum(factor), distance
    far, near = (xp.where(positive, distance, -xp.inf), xp.where(negative, -distance, -xp.inf))
    valid = xp.any(positive, axis=1) & xp.any(negative, axis=1)
    farthest = xp.argmax(far, axis=1, keepdims=True) == number
    nearest = xp.argmax(near, axis=1, keepdims=True) == number
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
    factor: Array,
    number: Array,
    margin: float,
) -> tuple[Array, Array, Array]:
    """Return what ``_semihard`` does, of batch all."""
    valid = xp.expand_dims(positive, axis=2) & xp.expand_dims(negative, axis=1)  # (R, N, N)
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
