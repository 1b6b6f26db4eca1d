"""NT-Xent loss: decreases distances of embeddings within a class, increases those between classes.

The normalized, temperature-scaled cross-entropy of SimCLR (Chen et al., 2020), for any number of
samples per class (Khosla et al., "Supervised contrastive learning", 2020, equation 2). With z the
embeddings of length 1, the loss of sample i is the cross-entropy of the softmax over all others j
of z_i.z_j / temperature, where the target is the uniform distribution over the other samples of i's
class. With two samples per class, two views of one image, this is SimCLR's loss.

Notation: N samples, D length of an embedding.
"""

from portacnn.arguments import positive
from portacnn.errors import LabelError, PortacnnError, ShapeError
from portacnn.ops._linear import linear
from portacnn.ops.dispatch import check_arrays, op
from portacnn.runtime import Array, backend_of, describe, is_float

_SHORTEST = 1e-12  # embeddings shorter than this are divided by it, as in PyTorch's normalize


def _check(
    embeddings: Array,
    labels: Array,
    *,
    temperature: float = 0.1,
    weight: Array | None = None,
    keep: bool = True,
) -> None:
    name = "nt_xent_loss"
    check_embeddings(name, embeddings, labels, weight)
    try:
        positive("temperature", temperature)
    except PortacnnError as error:
        raise error.at(name)


def check_embeddings(name: str, embeddings: Array, labels: Array, weight: Array | None) -> None:
    """Raise ShapeError, LabelError or ArrayError, naming the op ``name``, unless these are
    embeddings (N, D), integer labels (N,) and weights (N,) or None."""
    check_arrays(name, embeddings=embeddings, weight=weight)
    if backend_of(labels).name != backend_of(embeddings).name or (
        labels.device != embeddings.device
    ):
        check_arrays(name, integers=True, embeddings=embeddings, labels=labels)
    if embeddings.ndim != 2:
        raise ShapeError(f"expected embeddings (N, D), got {describe(embeddings)}", name)
    n = embeddings.shape[0]
    if tuple(labels.shape) != (n,) or is_float(backend_of(labels).xp, labels.dtype):
        raise LabelError(f"expected {n} integer labels, got {describe(labels)}", name)
    if weight is not None and tuple(weight.shape) != (n,):
        raise ShapeError(
            f"expected a weight for each of {n} samples, got shape {tuple(weight.shape)}", name
        )


@op(_check)
def nt_xent_loss(
    embeddings: Array,
    labels: Array,
    *,
    temperature: float = 0.1,
    weight: Array | None = None,
    keep: bool = True,
) -> tuple[Array, tuple | None]:
    """Return the mean of the samples' losses (see above) over samples whose class has another
    sample.

        >>> import numpy as np
        >>> from portacnn import ops
        >>> loss, cache = ops.nt_xent_loss(np.eye(4), np.array([0, 0, 1, 1]), temperature=1.0)
        >>> round(float(loss), 4), ops.nt_xent_loss_backward(1.0, cache).shape
        (1.0986, (4, 4))

    Args:
        embeddings: (N, D), floating point, of any length.
        labels: integers (N,), equal for samples of one class.
        temperature: the smaller it is, the larger is the effect of the nearest samples.
        weight: (N,), a factor for each sample's loss; the mean divides by their sum.
        keep: keep what ``nt_xent_loss_backward`` needs.

    Returns:
        The loss, 0-dimensional (0 if every class has one sample), and the cache.

    Raises:
        LabelError, ShapeError, ArgumentError, ArrayError: see the message.
    """
    xp = backend_of(embeddings).xp
    dtype, device = embeddings.dtype, embeddings.device
    n = embeddings.shape[0]
    length = xp.sqrt(xp.sum(embeddings * embeddings, axis=1, keepdims=True))
    z = embeddings / xp.maximum(length, _SHORTEST)
    # ``linear`` and not matmul: on CuPy cuBLAS cannot be part of a captured step
    logits = linear(z, z, keep=False)[0] / temperature
    number = xp.arange(n, dtype=xp.int64, device=device)
    other = xp.expand_dims(number, axis=1) != xp.expand_dims(number, axis=0)
    alike = (xp.expand_dims(labels, axis=1) == xp.expand_dims(labels, axis=0)) & other
    partners = xp.sum(xp.astype(alike, dtype), axis=1, keepdims=True)
    if n > 1:
        # exp stays within 0..1
        peak = xp.max(xp.where(other, logits, -float("inf")), axis=1, keepdims=True)
    else:
        peak = xp.zeros((n, 1), dtype=dtype, device=device)
    exps = xp.where(other, xp.exp(logits - peak), 0.0)
    total = xp.sum(exps, axis=1, keepdims=True)
    share = xp.astype(alike, dtype) / xp.maximum(partners, 1.0)
    log_total = xp.log(total) + peak
    losses = log_total - xp.sum(share * logits, axis=1, keepdims=True)
    factor = xp.astype(partners > 0, dtype)
    if weight is not None:
        factor = factor * xp.expand_dims(weight, axis=1)
    count = xp.sum(factor)
    factor = factor * xp.where(count == 0, 0.0, 1.0 / xp.where(count == 0, 1.0, count))
    loss = xp.sum(xp.where(factor != 0, factor * losses, 0.0))
    softmax = exps / (total if n > 1 else 1.0)
    return loss, (z, length, (softmax - share) * factor, temperature) if keep else None


@nt_xent_loss.backward
def nt_xent_loss_backward(dy: Array | float, saved: tuple) -> Array:
    """Return dembeddings (N, D). G = (softmax - share) / temperature is the gradient of z.z^T, so
    dz is (G + G^T) z; of that, what changes the length is taken out."""
    z, length, gradient, temperature = saved
    xp = backend_of(z).xp
    dz = linear(gradient + gradient.T, z.T, keep=False)[0]
    along = xp.where(length > _SHORTEST, xp.sum(dz * z, axis=1, keepdims=True), 0.0)
    return (dz - z * along) * (dy / temperature) / xp.maximum(length, _SHORTEST)
