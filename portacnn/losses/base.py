"""``Loss``: the interface of every loss, and what they share.

One of your own is a frozen dataclass with a forward and a backward:

    @dataclass(frozen=True)
    class LogCosh(Loss):
        def forward(self, y, t, weight=None):
            xp = backend_of(y).xp
            each = self.weighted(weight, y) * xp.log(xp.cosh(y - t))
            return xp.mean(each), (y, t, weight)

        def backward(self, cache, dloss=1.0):
            y, t, weight = cache
            xp = backend_of(y).xp
            return self.weighted(weight, y) * xp.tanh(y - t) * (dloss / prod(y.shape))

**The mean.** A loss is a mean: a sum over samples (and over an image's places, and outputs) divided
by how much was counted, ``count``. With a weight for each sample, every sample's share is
multiplied by its weight and ``count`` is the sum of the weights: a weight of 2 is the sample twice,
0 is the sample left out (scikit-learn's ``sample_weight``; Keras divides by the number of samples
instead). Class weights are torch.nn's: a target's weight also counts in ``count``. A batch in which
nothing counts, as all its targets are ignored or have the weight 0, has the loss 0 and the gradient
0 (in PyTorch the loss is NaN).

**Parts of a batch.** A mean of parts' means is not the mean of the whole if the parts count
differently. ``count`` says how much a batch or a part counts, on the device where that depends on
the targets' values, and ``forward_part`` takes the count of the whole:

    whole = loss.count(t, weight)
    for part in parts:
        share, cache = loss.forward_part(y[part], t[part], weight and weight[part], whole)
        dy = loss.backward_part(cache)      # of the whole's loss
        total = total + share               # the shares add up to the whole's loss

``whole`` is whatever ``count`` returned; for ``Sum`` that is a tuple. Where all is counted alike,
it is a Python number, and a part's gradient is that of its mean times the share of the samples.

Notation: N samples, C outputs, S the image's axes.
"""

from functools import lru_cache
from typing import Any, ClassVar

from portacnn.data.targets import check_length, on_host
from portacnn.errors import ArrayError, PortacnnError, ShapeError
from portacnn.losses.outputs import predictions, scores
from portacnn.runtime import Array, HostArray, backend_of, describe

Shape = tuple[int, ...]


class Loss:
    """Base of all losses. A subclass says how its mean is computed: ``forward`` and ``backward``.

    Attributes:
        task: how outputs are read: "multiclass", "multilabel", "regression" or "embedding" (see
            ``losses.outputs``).
        metrics: the words of the metrics that go with it by default.
        ignore_index: the target that counts for nothing, or None.
    """

    task: ClassVar[Any] = "regression"
    metrics: ClassVar[tuple[str, ...]] = ()
    ignore_index: int | None = None

    def forward(self, y: Array, t: Array, weight: Array | None = None) -> tuple[Array, Any]:
        """Return the mean loss of a batch.

        Args:
            y: the network's outputs (N, C, ...), float32 or float64.
            t: targets as ``check_targets`` gives them, on y's device.
            weight: (N,) of y's dtype, a factor for each sample, or None.

        Returns:
            The loss, 0-dimensional, on y's device, and what ``backward`` needs.
        """
        raise NotImplementedError

    def backward(self, cache: Any, dloss: Array | float = 1.0) -> Array:
        """Return the gradient of y, times ``dloss``: a Python number, or 0-dimensional on y's
        device."""
        raise NotImplementedError

    def count(self, t: Array, weight: Array | None = None, dtype: str = "float32") -> Any:
        """Return what ``forward`` divides by for these targets: a Python number, or 0-dimensional
        of ``dtype`` on the targets' device."""
        if weight is None:
            return t.shape[0]
        return backend_of(weight).xp.sum(weight)

    def forward_part(
        self, y: Array, t: Array, weight: Array | None, whole: Any
    ) -> tuple[Array, Any]:
        """Return a part's share of the loss of a batch whose ``count`` is ``whole``, and what
        ``backward_part`` needs."""
        count = self.count(t, weight, name_of(y))
        mean, cache = self.forward(y, t, weight)
        if not hasattr(count, "shape") and not hasattr(whole, "shape"):
            share = count / whole
            return share * mean, (cache, share)
        share = ratio(count, whole)
        return share * mean, (cache, share)

    def backward_part(self, saved: Any) -> Array:
        """Return the gradient of the whole's loss for the part's outputs."""
        cache, share = saved
        return self.backward(cache, share)

    def for_evaluation(self) -> "Loss":
        """Return the loss that is reported for a test set: this one without what is for training
        only, such as label smoothing."""
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
            count: N, how many samples they belong to; None asks for nothing.
            dtype: the model's; what floats come back in.
            what: their name, for the message.

        Returns:
            A NumPy array, ready for the device.

        Raises:
            LabelError, NotFiniteError: what was expected, what came, and the loss that fits it.
        """
        try:
            host = on_host(t)
            check_length(host, count)
            return self._checked(host, tuple(output_shape), dtype)
        except PortacnnError as error:
            raise error.at(what)

    def _checked(self, t: HostArray, shape: Shape, dtype: str) -> HostArray:
        """Return what ``check_targets`` does, for a NumPy array of the right length."""
        return t.astype(dtype) if t.dtype.kind == "f" else t

    def num_outputs(self, t: Any) -> int | None:
        """Return how many outputs (classes, labels, values) a network for these targets has; None
        if they do not say."""
        host = on_host(t)
        return int(host.shape[1]) if host.ndim > 1 else 1

    # --- outputs ----------------------------------------------------------------------------------

    def predictions(self, y: Array, threshold: float = 0.5) -> Array:
        """Return what outputs say: classes, labels on or off, values (see ``losses.outputs``)."""
        return predictions(y, self.task, threshold)

    def scores(self, y: Array) -> Array:
        """Return outputs as probabilities; values as they are."""
        return scores(y, self.task)

    # --- for subclasses ---------------------------------------------------------------------------

    @staticmethod
    def weighted(weight: Array | None, y: Array) -> Any:
        """Return factors (N, 1, ...) that make a mean over all of y the mean weighted by sample:
        each weight times N over their sum. 1.0 if there are no weights; all 0 if all are."""
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
    return str(dtype).rpartition(".")[2]  # dtypes of two libraries are not to be compared


def name_of(y: Array) -> str:
    """Return the name of y's dtype in the standard."""
    return _name(backend_of(y).name, y.dtype)


def check_outputs(y: Array, loss: str) -> None:
    """Raise ArrayError unless y is float32 or float64: half precision would lose a loss's
    digits."""
    if name_of(y) not in ("float32", "float64"):
        raise ArrayError(
            f"expected outputs of float32 or float64, got {describe(y)}; convert them first", loss
        )


def check_weight(weight: Array, y: Array) -> None:
    """Raise ShapeError unless there is a weight for each sample, ArrayError for another dtype."""
    if tuple(weight.shape) != (y.shape[0],):
        raise ShapeError(
            f"expected a weight for each of {y.shape[0]} samples, got shape {tuple(weight.shape)}"
        )
    if weight.dtype != y.dtype:
        raise ArrayError(f"expected weights of the outputs' dtype, {y.dtype}; got {weight.dtype}")


def along_batch(weight: Array, ndim: int) -> Array:
    """Return (N,) as (N, 1, ...) of so many axes."""
    return backend_of(weight).xp.reshape(weight, (weight.shape[0], *(1,) * (ndim - 1)))


def ratio(part: Any, whole: Any) -> Any:
    """Return part / whole, 0 where whole is; one of them, or both, on the device."""
    xp = backend_of(whole if hasattr(whole, "shape") else part).xp
    if not hasattr(whole, "shape"):
        return part / whole
    return xp.where(whole == 0, 0.0, part / xp.where(whole == 0, 1.0, whole))
