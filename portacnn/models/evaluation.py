"""Compute the mean loss and metrics of outputs batch by batch. The results are transferred to the
host once."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from portacnn.losses import Loss
from portacnn.metrics import Metric
from portacnn.runtime import Array, Backend


class Others(Protocol):
    """The processes that evaluate the other parts of the set."""

    def total(self, share: float) -> float:
        """Return the sum of the shares of all processes."""

    def join(self, metric: Metric, home: Backend) -> None:
        """Give the metric the batches of all processes."""


def evaluate(
    home: Backend,
    batches: Iterable[tuple[int, int, Array]],
    t: Array,
    loss: Loss | None,
    metrics: Mapping[str, Metric],
    weights: Array | None = None,
    dtype: str = "float32",
    others: Others | None = None,
) -> dict[str, Any]:
    """Return "loss" and the value of every metric, over all batches.

    One batch's outputs are in memory at a time. The loss is the mean over the whole set, whatever
    the batch size. Sample weights count in the loss, not in the metrics.

    Args:
        home: backend of the outputs.
        batches: first, last (exclusive) and outputs (last - first, C, ...), as from
            ``Model.outputs``.
        t: targets of all samples, as ``Loss.check_targets`` returns them, on the device.
        loss: None leaves the loss out.
        metrics: by name. They are reset first.
        weights: (N,) of the outputs' dtype, which is ``dtype``, or None.
        others: if these batches are not the whole set.
    """
    if loss is None and not metrics:
        return {}
    for metric in metrics.values():
        metric.reset()
    shares = []
    with home.active():
        whole = None if loss is None else loss.count(t, weights, dtype)
        for first, last, y in batches:
            part = t[first:last, ...]
            for metric in metrics.values():
                metric.update(y, part)
            if loss is not None:
                weight = None if weights is None else weights[first:last]
                shares.append(loss.forward_part(y, part, weight, whole)[0])
        figures: dict[str, Any] = {}
        if loss is not None:
            mean = sum(home.to_host(home.xp.stack(shares)).tolist()) if shares else 0.0
            figures["loss"] = mean if others is None else others.total(mean)
        for name, metric in metrics.items():
            if others is not None:
                others.join(metric, home)
            figures[name] = metric.compute()
            metric.reset()  # frees its arrays on the device
        return figures
