"""Loss functions as frozen objects, with the names and semantics of torch.nn.

    loss = losses.CrossEntropy(label_smoothing=0.1)
    mean, cache = loss.forward(y, t)        # y: a network's outputs, t: their targets
    dy = loss.backward(cache)               # the gradient of y
    losses.named("dice") + 0.5 * losses.CrossEntropy()

A loss can be pickled, compared, and stored in files (``describe_loss``). It has three parts.
``check_targets`` checks the targets once, on the host. ``forward`` and ``backward`` compute the
mean loss of a batch and its gradient on the device, without a transfer to the host. ``predictions``
and ``scores`` convert outputs for metrics. See ``losses.base`` for the interface and for custom
losses.
"""

from portacnn.losses.base import Loss
from portacnn.losses.centers import CenterDetection
from portacnn.losses.classes import CrossEntropy, Dice, Focal
from portacnn.losses.embeddings import NTXent, Triplet
from portacnn.losses.labels import BCEWithLogits
from portacnn.losses.named import LOSSES, describe_loss, named, rebuild_loss
from portacnn.losses.outputs import predictions, scores
from portacnn.losses.several import PerOutput
from portacnn.losses.sums import Sum
from portacnn.losses.values import L1, MSE, Huber, SmoothL1

__all__ = [
    "L1",
    "LOSSES",
    "MSE",
    "BCEWithLogits",
    "CenterDetection",
    "CrossEntropy",
    "Dice",
    "Focal",
    "Huber",
    "Loss",
    "NTXent",
    "PerOutput",
    "SmoothL1",
    "Sum",
    "Triplet",
    "describe_loss",
    "named",
    "predictions",
    "rebuild_loss",
    "scores",
]
