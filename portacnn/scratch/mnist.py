"""The book's ``load_mnist`` (``dataset/mnist.py``)."""

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
    """``portacnn.load_mnist``, but that images come as (N, 784) where ``flatten`` is not given, as the book has it.

    Returns:
        ``((x_train, t_train), (x_test, t_test))``, NumPy arrays.
    """
    return data.load_mnist(normalize, flatten, one_hot_label, root=root)
