"""``Loss``: the base class of all losses.

A custom loss is a frozen dataclass with ``forward`` and ``backward``:

    @dataclass(frozen=True)
    class LogCosh(Loss):
        def forward(self, y, t, weight=None):
            xp = backend_of(y).xp
            each = self.weighted(weight, y) * xp.log(xp.cosh(y - t))
            return xp.mean(each), (y, t, weight)

        def backward(self, cache, dloss=1.0):
            y, t, weight = cache
            xp = backend_of(y).xp
            return self.weighted(weight, y) * xp.tanh(y - t) * (dloss / max(prod(y.shape), 1))

**The mean.** A loss is a mean: a sum over samples (and over pixels and outputs) divided by
``count``. With sample weights, each sample's term is multiplied by its weight, and ``count`` is the
sum of the weights. So a weight of 2 equals the sample twice, and 0 equals leaving it out
(scikit-learn's ``sample_weight``; Keras divides by the number of samples instead). Class weights
are torch.nn's: they multiply the terms and also ``count``. If ``count`` is 0, because all targets
are ignored or have weight 0, loss and gradient are 0 (in PyTorch the loss is NaN).

**Parts of a batch.** The mean of the parts' means is not the batch's mean if the counts of the
parts differ. ``count`` returns the count of a batch or part (a device array if it depends on the
values of the targets), and ``forward_part`` takes the count of the whole batch:

    whole = loss.count(t, weight)
    for part in parts:
        share, cache = loss.forward_part(y[part], t[part], weight and weight[part], whole)
        dy = loss.backward_part(cache)      # of the whole's loss
        total = total + share               # the shares add up to the whole's loss

``whole`` is the value returned by ``count``; for ``Sum`` that is a tuple. Without weights and
ignored targets it is a Python number, and a part's gradient is the gradient of its mean times its
share of the samples.

Notation: N samples, C outputs, S the spatial axes.
"""

from functools import lru_cache
from typing import Any, ClassVar

from portacnn.arguments import AnswersKeywords
from portacnn.data.targets import check_length, on_host
from portacnn.errors import ArrayError, PortacnnError, ShapeError
from portacnn.losses.outputs import predictions, scores
from portacnn.runtime import Array, HostArray, backend_of, describe

Shape = tuple[int, ...]


class Loss(AnswersKeywords):
    """Base class of all losses. A subclass defines ``forward`` and ``backward``.

    Attributes:
        task: the meaning of the outputs: "multiclass", "multilabel", "regression", "embedding" or
            "detection" (see ``losses.outputs``).
        metrics: the names of the default metrics.
        ignore_index: the target value to ignore, or None.
        soft_targets: whether it takes targets between those of two samples: shares of classes,
            probabilities or values. Augmentation that mixes targets needs it.
    """

    task: ClassVar[Any] = "regression"
    metrics: ClassVar[tuple[str, ...]] = ()
    ignore_index: int | None = None
    soft_targets: bool = False

    def forward(self, y: Array, t: Array, weight: Array | None = None) -> tuple[Array, Any]:
        """Return the mean loss of a batch.

        Args:
            y: the network's outputs (N, C, ...), float32 or float64.
            t: targets as returned by ``check_targets``, on y's device.
            weight: sample weights (N,) of y's dtype, or None.

        Returns:
            The loss, 0-dimensional, on y's device, and the cache for ``backward``.
        """
        raise NotImplementedError

    def backward(self, cache: Any, dloss: Array | float = 1.0) -> Array:
        """Return the gradient of y, times ``dloss``: a Python number, or 0-dimensional on y's
        device."""
        raise NotImplementedError

    def count(self, t: Array, weight: Array | None = None, dtype: str = "float32") -> Any:
        """Return the divisor of ``forward`` for these targets: a Python number, or a 0-dimensional
        array of ``dtype`` on the targets' device."""
        if weight is None:
            return t.shape[0]
        return backend_of(weight).xp.sum(weight)

    def part_count(self, t: Array, weight: Array | None = None, dtype: str = "float32") -> Any:
        """Return what a part of a batch adds to the batch's count, in the form of ``count``:
        ``whole_count`` of the sum over all parts is ``count`` of the batch. A Python number depends
        on the shape of the targets only."""
        return self.count(t, weight, dtype)

    def whole_count(self, added: Any) -> Any:
        """Return the count of a batch for the sum of its parts' ``part_count``."""
        return added

    def forward_part(
        self, y: Array, t: Array, weight: Array | None, whole: Any
    ) -> tuple[Array, Any]:
        """Return a part's contribution to the loss of a batch with the count ``whole``, and the
        cache for ``backward_part``."""
        count = self.count(t, weight, name_of(y))
        mean, cache = self.forward(y, t, weight)
        if not hasattr(count, "shape") and not hasattr(whole, "shape"):
            share = count / whole
            return share * mean, (cache, share)
        share = ratio(count, whole)
        return share * mean, (cache, share)

    def backward_part(self, saved: Any) -> Array:
        """Return the gradient of the whole batch's loss for the part's outputs."""
        cache, share = saved
        return self.backward(cache, share)

    def for_evaluation(self) -> "Loss":
        """Return the loss for a test set: this loss without training-only options such as label
        smoothing."""
        return self

    # --- targets ----------------------------------------------------------------------------------

    def check_targets(
        self,
        t: Any,
        output_shape: Shape,
        *,
        count: int | None = None,
        dtype: str = "float32",
        what: str = "targets",
    ) -> HostArray:
        """Check the targets of a whole set, once, on the host.

        Args:
            t: an array of any library, or lists.
            output_shape: of one sample, without N: (10,), or (21, 64, 64) for maps.
            count: N, the expected number of samples; None skips this check.
            dtype: the model's dtype, to which floating-point targets are converted.
            what: the name of the targets, for error messages.

        Returns:
            A NumPy array, ready for the device.

        Raises:
            LabelError, NotFiniteError: the targets do not fit; names a loss that takes them.
        """
        try:
            host = on_host(t)
            check_length(host, count)
            return self._checked(host, tuple(output_shape), dtype)
        except PortacnnError as error:
            raise error.at(what)

    def _checked(self, t: HostArray, shape: Shape, dtype: str) -> HostArray:
        """Check a NumPy array of the right length, for ``check_targets``."""
        return t.astype(dtype) if t.dtype.kind == "f" else t

    def num_outputs(self, t: Any) -> int | None:
        """Return the number of outputs (classes, labels, values) of a network for these targets;
        None if the targets do not determine it."""
        host = on_host(t)
        return int(host.shape[1]) if host.ndim > 1 else 1

    # --- outputs ----------------------------------------------------------------------------------

    def predictions(self, y: Array, threshold: float = 0.5) -> Array:
        """Return predictions: classes, labels 0 or 1, or values (see ``losses.outputs``)."""
        return predictions(y, self.task, threshold)

    def scores(self, y: Array) -> Array:
        """Return outputs as probabilities; regression values are not changed."""
        return scores(y, self.task)

    # --- for subclasses ---------------------------------------------------------------------------

    @staticmethod
    def weighted(weight: Array | None, y: Array) -> Any:
        """Return factors (N, 1, ...) that turn the mean over y into the weighted mean: each weight
        times N over the sum of weights. Returns 1.0 without weights, and 0 if all weights are 0."""
        if weight is None:
            return 1.0
        check_weight(weight, y)
        xp = backend_of(y).xp
        total = xp.sum(weight)
        factors = weight * xp.where(total == 0, 0.0, y.shape[0] / xp.where(total == 0, 1.0, total))
        return along_batch(factors, y.ndim)

    def __add__(self, other: Any) -> Any:
        from portacnn.losses.sums import added

        return added(self, other)

    def __mul__(self, factor: Any) -> Any:
        from portacnn.losses.sums import scaled

        return scaled(self, factor)

    __rmul__ = __mul__


@lru_cache(maxsize=64)
def _name(library: str, dtype: Any) -> str:
    return str(dtype).rpartition(".")[2]  # dtypes of two libraries cannot be compared


def name_of(y: Array) -> str:
    """Return the name of y's dtype in the standard."""
    return _name(backend_of(y).name, y.dtype)


def check_outputs(y: Array, loss: str) -> None:
    """Raise ArrayError unless y is float32 or float64: half precision is too inaccurate for a
    loss."""
    if name_of(y) not in ("float32", "float64"):
        raise ArrayError(
            f"expected outputs of float32 or float64, got {describe(y)}; convert them first", loss
        )


def check_weight(weight: Array, y: Array) -> None:
    """Raise ShapeError unless there is one weight for each sample, and ArrayError if the dtype is
    not y's."""
    if tuple(weight.shape) != (y.shape[0],):
        raise ShapeError(
            f"expected a weight for each of {y.shape[0]} samples, got shape {tuple(weight.shape)}"
        )
    if weight.dtype != y.dtype:
        raise ArrayError(f"expected weights of the outputs' dtype, {y.dtype}; got {weight.dtype}")


def along_batch(weight: Array, ndim: int) -> Array:
    """Reshape (N,) to (N, 1, ...) with ``ndim`` axes."""
    return backend_of(weight).xp.reshape(weight, (weight.shape[0], *(1,) * (ndim - 1)))


def ratio(part: Any, whole: Any) -> Any:
    """Return part / whole, or 0 if whole is 0. One or both are arrays on the device."""
    xp = backend_of(whole if hasattr(whole, "shape") else part).xp
    if not hasattr(whole, "shape"):
        return part / whole
    return xp.where(whole == 0, 0.0, part / xp.where(whole == 0, 1.0, whole))
