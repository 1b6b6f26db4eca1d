"""Losses: what a training makes small, as values with the names and semantics of torch.nn.

    loss = losses.CrossEntropy(label_smoothing=0.1)
    mean, cache = loss.forward(y, t)        # y: a network's outputs, t: their targets
    dy = loss.backward(cache)               # the gradient of y
    losses.named("dice") + 0.5 * losses.CrossEntropy()

A loss is frozen, can be pickled and compared, and is described for files by ``describe_loss``. It
knows three things of its task: which targets it takes (``check_targets``, once, on the host), what
the mean over a batch is and its gradient (``forward``, ``backward``, on the device, nothing is read
back), and how outputs become predictions (``predictions``, ``scores``), which is all that metrics
need to know of it. See ``losses.base`` for the interface, and for one of your own.
"""

from portacnn.losses.base import Loss
from portacnn.losses.classes import CrossEntropy, Dice, Focal
from portacnn.losses.embeddings import NTXent
from portacnn.losses.labels import BCEWithLogits
from portacnn.losses.named import LOSSES, describe_loss, named, rebuild_loss
from portacnn.losses.outputs import predictions, scores
from portacnn.losses.sums import Sum
from portacnn.losses.values import L1, MSE, Huber, SmoothL1

__all__ = [
    "L1",
    "LOSSES",
    "MSE",
    "BCEWithLogits",
    "CrossEntropy",
    "Dice",
    "Focal",
    "Huber",
    "Loss",
    "NTXent",
    "SmoothL1",
    "Sum",
    "describe_loss",
    "named",
    "predictions",
    "rebuild_loss",
    "scores",
]
