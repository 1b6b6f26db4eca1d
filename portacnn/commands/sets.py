"""The data of a command: what ``--data`` names."""

import os
from math import prod
from typing import Any

from portacnn import data
from portacnn.losses import Loss

SAMPLE = "sample"
"""The command's word for "mnist-sample", the digits that come with portacnn."""


def load(name: str, **options: Any) -> tuple[Any, Any]:
    """Return the training set and the test set, each a ``portacnn.data.Dataset``.

    Args:
        options: ``image_size``, ``mode``, ``test_share``, ``on_error`` of ``portacnn.data.load``.

    Raises:
        FileNotFoundError, DataFormatError, DependencyError, ArgumentError: see
            ``portacnn.data.load``.
    """
    if not hasattr(data, "load"):  # TODO: data
        return _interim(name)
    return data.load("mnist-sample" if name == SAMPLE else name, **options)


def _interim(name):
    class D:
        def __init__(self, images, labels):
            self.images, self.labels = images, labels
            self.class_names = ()

        def __len__(self):
            return len(self.images)

    if name == "sample":
        sets = data.load_mnist_sample(normalize=False)
    elif name == "mnist":
        sets = data.load_mnist(normalize=False)
    else:
        sets = data.load_idx_folder(name, normalize=False)
    return D(*sets[0]), D(*sets[1])


def is_path(name: str) -> bool:
    """Return whether ``--data`` names a file or a folder, not a known set."""
    return name not in (SAMPLE, *getattr(data, "NAMES", ("mnist",)))


def absolute(name: str) -> str:
    """Return a name of data that means the same in every folder."""
    return os.path.abspath(name) if is_path(name) else name


def output_count(loss: Loss, train: Any, test: Any) -> int:
    """Return how many outputs a model needs for these labels: one for each class, each label or
    each value."""
    shape = tuple(train.labels.shape)
    if loss.task in ("multilabel", "regression"):
        return prod(shape[1:])
    if train.class_names:
        return len(train.class_names)
    if len(shape) == 2 and str(train.labels.dtype).startswith("float"):  # one-hot
        return shape[1]
    return 1 + max(int(labels.max()) for labels in (train.labels, test.labels) if len(labels))
