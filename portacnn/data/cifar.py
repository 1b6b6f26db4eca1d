"""CIFAR-10 and CIFAR-100 from their files: the binary version and the python version, from a folder
or from the archive, which is not unpacked to the disk.

A record of the binary version is the label (CIFAR-100: the coarse label, then the fine one), then
3 x 32 x 32 bytes. Files of the python version are pickles, which are read as data (``pickled``).
"""

import contextlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from portacnn.data.dataset import Dataset
from portacnn.data.pickled import read_pickle
from portacnn.errors import DataFormatError
from portacnn.runtime import HostArray
from portacnn.text import shown

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_MOST = 1 << 28  # bytes of one file; the largest is 154 MB


class _Version(NamedTuple):
    """Files of one version of a set.

    Attributes:
        train, test: names of files.
        labels: of the binary version, bytes before each image; of the python version 0.
        coarse: whether there are coarse labels too.
    """

    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: int
    coarse: bool


_TEN = tuple(f"data_batch_{number}" for number in range(1, 6))
_VERSIONS = (
    _Version(tuple(f"{name}.bin" for name in _TEN), ("test_batch.bin",), 1, False),
    _Version(_TEN, ("test_batch",), 0, False),
    _Version(("train.bin",), ("test.bin",), 2, True),
    _Version(("train",), ("test",), 0, True),
)
_FOLDERS = ("cifar-10-batches-bin", "cifar-10-batches-py", "cifar-100-binary", "cifar-100-python")
ARCHIVES = (
    "cifar-10-binary.tar.gz",
    "cifar-10-python.tar.gz",
    "cifar-100-binary.tar.gz",
    "cifar-100-python.tar.gz",
)

CIFAR10 = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
CIFAR100_COARSE = (
    "aquatic_mammals",
    "fish",
    "flowers",
    "food_containers",
    "fruit_and_vegetables",
    "household_electrical_devices",
    "household_furniture",
    "insects",
    "large_carnivores",
    "large_man-made_outdoor_things",
    "large_natural_outdoor_scenes",
    "large_omnivores_and_herbivores",
    "medium_mammals",
    "non-insect_invertebrates",
    "people",
    "reptiles",
    "small_mammals",
    "trees",
    "vehicles_1",
    "vehicles_2",
)
_FINE = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
    camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
    cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
    lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
CIFAR100 = tuple(_FINE.split())


def find_cifar(place: Path, classes: int | None = None) -> Path | None:
    """Return the folder or the archive with CIFAR's files: this one, or one in this folder under
    its published name. None if there is none.

    Args:
        classes: 10 or 100; None takes either.
    """
    published = [n for n in (*_FOLDERS, *ARCHIVES) if classes in (None, _classes_of(n))]
    wanted = [place, *(place / name for name in published)]
    for path in wanted:
        if path.is_file() and path.name.startswith("cifar-") and ".tar" in path.name:
            return path
        version = _version_in(_entries(path)) if path.is_dir() else None
        if version is not None and (classes is None or version.coarse == (classes == 100)):
            return path
    return None


def load_cifar(path: Path, coarse: bool = False) -> tuple[Dataset, Dataset]:
    """Return the training set and the test set from a folder or an archive of ``find_cifar``.

    Args:
        coarse: of CIFAR-100, return the 20 coarse labels.

    Raises:
        DataFormatError: if a file is missing or damaged.
    """
    with _opened(path) as files:
        version = _version_in(files)
        if version is None:
            raise DataFormatError(f"{path}: expected the files of CIFAR-10 or CIFAR-100")
        missing = [name for name in (*version.train, *version.test) if name not in files]
        if missing:
            raise DataFormatError(
                f"{path}: {', '.join(missing)} is missing; unpack or download it again"
            )
        names = CIFAR10 if not version.coarse else CIFAR100_COARSE if coarse else CIFAR100
        parts = []
        for wanted in (version.train, version.test):
            read = [_batch(files[name], f"{path}/{name}", version, coarse) for name in wanted]
            images, labels = (np.concatenate(some) for some in zip(*read, strict=True))
            if int(labels.max()) >= len(names):
                raise DataFormatError(
                    f"{path}: expected labels 0..{len(names) - 1}, got {labels.max()}"
                )
            parts.append(Dataset(images, labels, names))
    return parts[0], parts[1]


def _classes_of(name: str) -> int:
    return 100 if name.startswith("cifar-100") else 10


def _entries(folder: Path) -> dict[str, Any]:
    return {entry.name: entry for entry in folder.iterdir() if entry.is_file()}


def _version_in(files: dict[str, Any]) -> _Version | None:
    """Return the version that has its first file among these."""
    for version in _VERSIONS:
        if version.train[0] in files and version.test[0] in files:
            return version
    return None


@contextmanager
def _opened(path: Path) -> Iterator[dict[str, bytes]]:
    """Yield the content of the files that a version may have, by name."""
    known = {name for version in _VERSIONS for name in (*version.train, *version.test)}
    if path.is_dir():
        found = {n: e for n, e in _entries(path).items() if n in known}
        contents = {}
        for name, entry in found.items():
            with entry.open("rb") as file:
                contents[name] = _content(file, f"{path}/{name}")
        yield contents
        return
    import tarfile

    try:
        with contextlib.closing(tarfile.open(path, "r:*")) as archive:
            contents = {}
            for member in archive:
                name = member.name.rpartition("/")[2]
                if member.isfile() and name in known and name not in contents:
                    file = archive.extractfile(member)
                    assert file is not None  # it is a regular file
                    contents[name] = _content(file, f"{path}/{name}")
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataFormatError(
            f"{path}: expected a whole archive, but it is cut short or damaged ({error}); download "
            "it again"
        ) from error
    yield contents


def _content(file: IO[bytes], name: str) -> bytes:
    content = file.read(_MOST + 1)
    if len(content) > _MOST:
        raise DataFormatError(f"{shown(name)}: expected at most {_MOST} bytes")
    return content


def _batch(
    content: bytes, name: str, version: _Version, coarse: bool
) -> tuple[HostArray, HostArray]:
    """Return images (N, 3, 32, 32) and labels (N,) of one file."""
    if version.labels:
        each = version.labels + _PIXELS
        if not content or len(content) % each:
            raise DataFormatError(
                f"{name}: expected records of {each} bytes, got {len(content)} bytes in all: the "
                "file is cut short"
            )
        rows = np.frombuffer(content, np.uint8).reshape(-1, each)
        labels = rows[:, version.labels - 1 if not coarse else 0]
        return rows[:, version.labels :].reshape(-1, *_SHAPE), labels.astype(np.int64)
    held = read_pickle(content, name)
    if not isinstance(held, dict):
        raise DataFormatError(f"{name}: expected a dict, got {type(held).__name__}")
    found = {k.decode("ascii", "replace") if isinstance(k, bytes) else k: held[k] for k in held}
    key = "labels" if not version.coarse else "coarse_labels" if coarse else "fine_labels"
    data: Any = found.get("data")
    named: Any = found.get(key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (_PIXELS,):
        raise DataFormatError(f'{name}: expected "data", uint8 (N, {_PIXELS})')
    if (
        not isinstance(named, list)
        or len(named) != len(data)
        or not all(type(label) is int and 0 <= label < 256 for label in named)
    ):
        raise DataFormatError(f'{name}: expected "{key}", a whole number 0..255 for each image')
    return data.reshape(-1, *_SHAPE), np.asarray(named, np.int64)
