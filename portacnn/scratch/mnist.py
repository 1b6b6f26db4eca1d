"""The book's ``load_mnist`` (``dataset/mnist.py``), and what stands in for it where there is no
network."""

import os

from portacnn import data
from portacnn.data.mnist import Split


def load_mnist(
    normalize: bool = True,
    flatten: bool = True,
    one_hot_label: bool = False,
    *,
    root: str | os.PathLike[str] | None = None,
) -> Split:
    """``portacnn.load_mnist``, but that images come as (N, 784) where ``flatten`` is not given, as
    the book has it.

    Returns:
        ``((x_train, t_train), (x_test, t_test))``, NumPy arrays.
    """
    return data.load_mnist(normalize, flatten, one_hot_label, root=root)


def load_mnist_sample(
    normalize: bool = True, flatten: bool = True, one_hot_label: bool = False
) -> Split:
    """``portacnn.load_mnist_sample``, 5,000 digits without a network, in the form that
    ``load_mnist`` has here.

    Returns:
        ``((x_train, t_train), (x_test, t_test))``, NumPy arrays.
    """
    return data.load_mnist_sample(normalize, flatten, one_hot_label)
