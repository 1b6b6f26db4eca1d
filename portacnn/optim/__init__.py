"""Optimizers. Each updates the arrays of the parameters in place. The update rules are ops, in
``ops.update``.

As in the tutorials, ``optimizer.update(params, grads)`` takes two dictionaries with the same keys.
State (velocities, running means) is stored by key and created when a key is first used. Rules,
names and defaults are those of torch.optim.

``groups`` sets learning rate and weight decay for parameters, by patterns of their paths:
``SGD(0.01, groups={"fc.*": {"lr_factor": 10.0, "weight_decay":
0.0}})``. If several patterns match a parameter, the first one is used. ``layerwise`` makes such
groups.

``no_decay`` selects the parameters without weight decay, for example ``AdamW(weight_decay=0.05,
no_decay=biases_and_norms)`` or ``SGD(0.1, weight_decay=5e-4, no_decay=("bias", "bn*"))``.

    >>> import numpy as np
    >>> w = np.array([1.0, 2.0])
    >>> optimizer = SGD(lr=0.1)
    >>> optimizer.update({"w": w}, {"w": np.array([10.0, 0.0])})
    >>> w.tolist()
    [0.0, 2.0]
"""

from portacnn.optim.base import Optimizer
from portacnn.optim.groups import Groups, biases_and_norms, layerwise
from portacnn.optim.named import OPTIMIZERS, make_optimizer, rebuild_optimizer
from portacnn.optim.rules import SGD, AdaGrad, Adam, AdamW, Momentum, RMSprop
from portacnn.selection import Selection, selector

__all__ = [
    "OPTIMIZERS",
    "SGD",
    "AdaGrad",
    "Adam",
    "AdamW",
    "Groups",
    "Momentum",
    "Optimizer",
    "RMSprop",
    "Selection",
    "biases_and_norms",
    "layerwise",
    "make_optimizer",
    "rebuild_optimizer",
    "selector",
]
