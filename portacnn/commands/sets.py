"""The data of a command: what ``--data`` names."""

import os
from math import prod
from pathlib import Path
from typing import Any

from portacnn import data
from portacnn.losses import Loss
from portacnn.run_folder import SAMPLE, set_name


def load(name: str, **options: Any) -> tuple[Any, Any]:
    """Return the training set and the test set, each a ``portacnn.data.Dataset``.

    Args:
        options: ``image_size``, ``mode``, ``test_share``, ``on_error`` of ``portacnn.data.load``.

    Raises:
        FileNotFoundError, DataFormatError, DependencyError, ArgumentError: see
            ``portacnn.data.load``.
    """
    return data.load(set_name(name), **options)


def is_path(name: str) -> bool:
    """Return whether ``--data`` names a file or a folder, not a known set."""
    return name not in (SAMPLE, *data.NAMES)


def is_folder_of_images(name: str) -> bool:
    """Return whether ``--data`` names a folder whose images are resized: one with folders in it."""
    path = Path(name)
    return is_path(name) and path.is_dir() and any(entry.is_dir() for entry in path.iterdir())


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
