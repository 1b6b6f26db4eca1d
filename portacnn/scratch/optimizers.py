"""The book's optimizers (``common/optimizer.py``): ``update(params, grads)`` writes into the arrays
of ``params``.

SGD, Momentum and Adam are portacnn's own, whose first arguments are the book's. The book's Adam
omits the second moment's correction from the term that avoids division by 0; this one is algorithm
1 of Kingma and Ba (2015), with 1e-8. Nesterov in some printings uses the new velocity instead of
the old; this one is Sutskever's (2013).
"""

from portacnn import optim
from portacnn.optim import SGD, Adam, Momentum

__all__ = ["OPTIMIZERS", "SGD", "AdaGrad", "Adam", "Momentum", "Nesterov", "RMSprop"]


class Nesterov(SGD):
    """SGD with Nesterov's momentum: v = momentum * v + g; p -= lr * (g + momentum * v)."""

    def __init__(self, lr: float = 0.01, momentum: float = 0.9) -> None:
        super().__init__(lr, momentum, nesterov=True)


class AdaGrad(optim.AdaGrad):
    """h += g^2; p -= lr * g / (sqrt(h) + 1e-7)."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__(lr, eps=1e-7)


class RMSprop(optim.RMSprop):
    """h = decay_rate * h + (1 - decay_rate) * g^2; p -= lr * g / (sqrt(h) + 1e-7)."""

    def __init__(self, lr: float = 0.01, decay_rate: float = 0.99) -> None:
        super().__init__(lr, decay_rate, eps=1e-7)


OPTIMIZERS: dict[str, type[optim.Optimizer]] = {
    "sgd": SGD,
    "momentum": Momentum,
    "nesterov": Nesterov,
    "adagrad": AdaGrad,
    "rmsprop": RMSprop,
    "adam": Adam,
}
"""The optimizers by name, for ``Trainer``."""
