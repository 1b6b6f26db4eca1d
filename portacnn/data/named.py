"""The data sets that ``load`` knows by name: where their files are, their checksums and classes.

Files are searched in the folder of the environment variable ``PORTACNN_DATA`` (below it, in a
folder of the set's name), where Debian's packages put data sets, and in the user's cache folder.
They are downloaded into the cache folder if they are nowhere.
"""

import itertools
import os
import string
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from portacnn.cache import cache_folder
from portacnn.data.cifar import find_cifar, load_cifar
from portacnn.data.dataset import Dataset
from portacnn.data.download import download
from portacnn.data.idx import MAX_BYTES
from portacnn.data.mnist import (
    FILE_NAMES,
    Split,
    idx_sets,
    load_idx_folder,
    load_mnist,
    load_mnist_sample,
)
from portacnn.errors import DataFormatError
from portacnn.files import make_folder, write_atomically

DEBIAN = Path("/usr/share/datasets")
_DIGITS = tuple(string.digits)
_MERGED = (*string.digits, *string.ascii_uppercase, *"abdefghnqrt")

EMNIST = {
    "emnist-balanced": _MERGED,
    "emnist-byclass": (*string.digits, *string.ascii_uppercase, *string.ascii_lowercase),
    "emnist-bymerge": _MERGED,
    "emnist-digits": _DIGITS,
    "emnist-letters": tuple(string.ascii_lowercase),
    "emnist-mnist": _DIGITS,
}
"""The classes of EMNIST's parts. "letters" counts from 1; one is subtracted here."""
_EMNIST_ARCHIVE = {"gzip.zip": "58c8d27c78d21e728a6bc7b3cc06412e"}
_EMNIST_MIRRORS = (
    "https://biometrics.nist.gov/cs_links/EMNIST/",
    "https://www.itl.nist.gov/iaui/vip/cs_links/EMNIST/",
)


class _Idx(NamedTuple):
    """A set of MNIST's form: the MD5 of its packed files in the order of FILE_NAMES."""

    title: str
    md5: tuple[str, str, str, str]
    mirrors: tuple[str, ...]
    class_names: tuple[str, ...]


IDX = {
    "fashion-mnist": _Idx(
        "Fashion-MNIST",
        (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
        (
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
            "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
        ),
        (
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
    ),
    "kmnist": _Idx(
        "KMNIST",
        (
            "bdb82020997e1d708af4cf47b453dcf7",
            "e144d726b3acfaa3e44228e80efcd344",
            "5c965bf0a639b31b8f53240b1b52f4d7",
            "7320c461ea6c1c855c0b718fb2a4b134",
        ),
        ("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
        ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    ),
}
_CIFAR_MIRRORS = ("https://www.cs.toronto.edu/~kriz/",)
_CIFAR = {
    10: {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
    100: {"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"},
}

NAMES = (
    "mnist-sample",
    "mnist",
    *IDX,
    *EMNIST,
    "cifar10",
    "cifar100",
    "cifar100-coarse",
)
"""The data sets that ``load`` knows by name."""


def load_named(name: str) -> tuple[Dataset, Dataset]:
    """Return the training set and the test set of one of ``NAMES``. Raises as ``load`` does."""
    if name == "mnist-sample":
        return _datasets(load_mnist_sample(normalize=False), _DIGITS)
    if name == "mnist":
        return _datasets(load_mnist(normalize=False), _DIGITS)
    if name in IDX:
        return _of_idx(name)
    if name in EMNIST:
        return _of_emnist(name)
    return _of_cifar(10 if name == "cifar10" else 100, name.endswith("coarse"))


def emnist_or_idx(folder: Path, name: str | None) -> tuple[Dataset, Dataset]:
    """Return the sets from a folder of IDX files. EMNIST's, told by their names, are turned
    upright, and their classes are named."""
    read = load_idx_folder(folder, normalize=False, name=name)
    names = EMNIST.get(name or "")
    if names is None:
        return _datasets(read, None)
    first = 1 if name == "emnist-letters" else 0
    parts = [(np.ascontiguousarray(x.swapaxes(2, 3)), t - first) for x, t in read]
    if min(int(t.min()) for _, t in parts) < 0:
        raise DataFormatError(f"{folder}: expected labels of {name} from {first}, got 0")
    return Dataset(*parts[0], names), Dataset(*parts[1], names)


def _of_idx(name: str) -> tuple[Dataset, Dataset]:
    about, cache = IDX[name], cache_folder() / name
    places = _places(name)
    for folder in places:
        if len(idx_sets(folder).get("", {})) == len(FILE_NAMES):
            return _datasets(load_idx_folder(folder, normalize=False, name=""), about.class_names)
    files = {f"{file}.gz": md5 for file, md5 in zip(FILE_NAMES, about.md5, strict=True)}
    download(about.title, files, about.mirrors, cache, places)
    with _to_delete():
        return _datasets(load_idx_folder(cache, normalize=False, name=""), about.class_names)


def _of_emnist(name: str) -> tuple[Dataset, Dataset]:
    cache, places = cache_folder() / "emnist", _places("emnist")
    for folder in places:
        if len(idx_sets(folder).get(name, {})) == len(FILE_NAMES):
            return emnist_or_idx(folder, name)
    archive = next((path for place in places if (path := place / "gzip.zip").is_file()), None)
    if archive is None:
        download("EMNIST", _EMNIST_ARCHIVE, _EMNIST_MIRRORS, cache, places)
        archive = cache / "gzip.zip"
    with _to_delete():
        _unpack(archive, name, cache)
        return emnist_or_idx(cache, name)


def _of_cifar(classes: int, coarse: bool) -> tuple[Dataset, Dataset]:
    name = f"cifar{classes}"
    cache, places = cache_folder() / name, _places(name)
    for folder in places:
        if (found := find_cifar(folder, classes)) is not None:
            with _to_delete():
                return load_cifar(found, coarse)
    download(f"CIFAR-{classes}", _CIFAR[classes], _CIFAR_MIRRORS, cache, places)
    return load_cifar(cache / next(iter(_CIFAR[classes])), coarse)


def _places(name: str) -> list[Path]:
    """Return the folders to search for a set, in this order."""
    configured = os.environ.get("PORTACNN_DATA")
    own = [Path(configured).expanduser() / name] if configured else []
    return [*own, DEBIAN / name, cache_folder() / name]


@contextmanager
def _to_delete() -> Iterator[None]:
    """Say in an error about a damaged file what to do."""
    try:
        yield
    except DataFormatError as error:
        message = f"{error.message}. Delete that file to have it downloaded again."
        raise DataFormatError(message) from error


def _unpack(archive: Path, name: str, folder: Path) -> None:
    """Write the four files of a part of EMNIST from its archive, each atomically."""
    try:
        with zipfile.ZipFile(archive) as held:
            members = {entry.rpartition("/")[2]: entry for entry in held.namelist()}
            for part, kind in itertools.product(("train", "test"), ("images-idx3", "labels-idx1")):
                file = f"{name}-{part}-{kind}-ubyte.gz"
                if file not in members:
                    raise DataFormatError(f"{archive}: {file} is missing")
                with held.open(members[file]) as packed:
                    content = packed.read(MAX_BYTES + 1)
                if len(content) > MAX_BYTES:
                    raise DataFormatError(f"{archive}: {file} has more than {MAX_BYTES} bytes")
                make_folder(folder, "data sets", "one with PORTACNN_CACHE")
                write_atomically(folder / file, content)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DataFormatError(f"{archive}: expected a whole zip archive ({error})") from error


def _datasets(read: Split, class_names: Sequence[str] | None) -> tuple[Dataset, Dataset]:
    return Dataset(*read[0], class_names), Dataset(*read[1], class_names)
