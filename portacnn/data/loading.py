"""``load``: a data set by its name or from a path, as the command's ``--data`` takes it."""

import os
from typing import Literal

from portacnn.data.dataset import Dataset
from portacnn.data.mnist import load_mnist_sample

NAMES = (
    "mnist-sample",
    "mnist",
    "fashion-mnist",
    "kmnist",
    "emnist-balanced",
    "emnist-byclass",
    "emnist-bymerge",
    "emnist-digits",
    "emnist-letters",
    "emnist-mnist",
    "cifar10",
    "cifar100",
    "cifar100-coarse",
)
"""The data sets that ``load`` knows by name."""


def load(
    name_or_path: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    mode: Literal["RGB", "L"] | None = None,
    test_share: float = 0.2,
    seed: int = 0,
    cache: str | os.PathLike[str] | Literal[False] | None = None,
    threads: int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> tuple[Dataset, Dataset]:
    """Return the training set and the test set of a named data set, or of a file or folder.

        >>> train, test = load("mnist-sample")
        >>> train, len(train.class_names)
        (Dataset(4000x1x28x28 uint8, 10 classes), 10)

    Args:
        name_or_path: one of ``NAMES``, or a path:

            - a folder with MNIST's four IDX files (``load_idx_folder``), or with the files of
              CIFAR-10 or CIFAR-100 (binary or python version), or one of their archives;
            - a folder of images per class, or ``train/`` and ``test/`` with such folders
              (``ImageFolder``);
            - an ``.npz`` file, or a folder of ``.npy`` files, with ``x_train, t_train, x_test,
              t_test``, or with ``images, labels``, which are split. ``.npy`` files are
              memory-mapped.

            A name is not taken for a path: write ``./mnist`` for a folder of that name.
        image_size: height and width, for a folder of images. None is 64. Other sets have their own;
            they refuse another one.
        mode: "RGB" or "L", for a folder of images. None is "RGB".
        test_share, seed: how a set without a test set is split.
        cache, threads, on_error: see ``ImageFolder``.

    Returns:
        Two ``Dataset`` objects with uint8 images (N, C, H, W), or what the file has.

    Raises:
        FileNotFoundError: if there is no such file or folder, or a named set is not on this machine
            and cannot be downloaded. The message says which file to put where.
        DataFormatError: if files are damaged, or do not form a data set.
        DependencyError: if Pillow or pooch is needed and missing.
        ArgumentError: if the arguments do not fit the data.
    """
    if name_or_path == "mnist-sample":
        digits = tuple(map(str, range(10)))
        train, test = load_mnist_sample(normalize=False)
        return Dataset(*train, digits), Dataset(*test, digits)
    raise NotImplementedError
