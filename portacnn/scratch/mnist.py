"""The book's ``load_mnist`` (``dataset/mnist.py``), and a replacement for use without a network."""

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
    """Return ``portacnn.load_mnist``'s data, with images (N, 784) by default, as in the book.

    Returns:
        ``((x_train, t_train), (x_test, t_test))``, NumPy arrays.
    """
    return data.load_mnist(normalize, flatten, one_hot_label, root=root)


def load_mnist_sample(
    normalize: bool = True, flatten: bool = True, one_hot_label: bool = False
) -> Split:
    """Return ``portacnn.load_mnist_sample``'s 5,000 digits in the form of ``load_mnist`` here.

    Returns:
        ``((x_train, t_train), (x_test, t_test))``, NumPy arrays.
    """
    return data.load_mnist_sample(normalize, flatten, one_hot_label)
