"""Sets in folders of four IDX files: their names, shapes and labels; and where the cache lies."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from portacnn import data
from portacnn.data import load_idx_folder, load_mnist
from portacnn.errors import ArgumentError, DataFormatError
from support.idx_files import NAMES, fill, pack

# --- The cache folder -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {}, "~/.cache/portacnn"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/portacnn"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "~/.cache/portacnn"),
        ("darwin", {"XDG_CACHE_HOME": "/xdg"}, "~/Library/Caches/portacnn"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/portacnn/Cache"),
        ("win32", {}, "~/AppData/Local/portacnn/Cache"),
        ("linux", {"PORTACNN_CACHE": "/mine", "XDG_CACHE_HOME": "/xdg"}, "/mine"),
        ("darwin", {"PORTACNN_CACHE": "~/mine"}, "~/mine"),
        ("win32", {"PORTACNN_CACHE": "/mine"}, "/mine"),
        ("linux", {"PORTACNN_CACHE": ""}, "~/.cache/portacnn"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="the absolute paths in the table are POSIX paths")
def test_cache_folder(monkeypatch, platform, environment, expected):
    for name in ("PORTACNN_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert data.cache_folder() == Path(expected).expanduser()


def test_no_home_folder(monkeypatch):
    for name in ("PORTACNN_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(FileNotFoundError, match="PORTACNN_CACHE"):
        data.cache_folder()


# --- Folders of four files ------------------------------------------------------------------------


@pytest.mark.parametrize("dotted", [False, True], ids=["dash", "dot"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_folder_of_any_size_and_names(tmp_path, suffix, dotted):
    fill(
        tmp_path, train=(4, (0, 1, 2, 1)), test=(2, (4, 0)), h=3, w=5, suffix=suffix, dotted=dotted
    )
    (x_train, t_train), (x_test, t_test) = load_idx_folder(tmp_path)
    pixels = np.array([(7 * i) % 256 for i in range(60)], np.float64)
    assert x_train.shape == (4, 1, 3, 5)
    assert x_test.shape == (2, 1, 3, 5)
    assert x_train.dtype == x_test.dtype == np.float32
    assert t_train.dtype == t_test.dtype == np.int64
    np.testing.assert_allclose(x_train.ravel(), pixels / 255, rtol=1e-7)
    np.testing.assert_allclose(x_test.ravel(), pixels[:30] / 255, rtol=1e-7)
    assert t_train.tolist() == [0, 1, 2, 1]
    assert t_test.tolist() == [4, 0]


def test_folder_switches(tmp_path):
    fill(tmp_path, train=(4, (0, 1, 2, 1)), test=(2, (4, 0)), h=3, w=5)
    (raw, _), (raw_test, _) = load_idx_folder(tmp_path, normalize=False)
    assert raw.dtype == np.uint8
    assert raw.shape == (4, 1, 3, 5)
    assert raw.ravel().tolist()[:4] == [0, 7, 14, 21]
    (flat, _), (flat_test, _) = load_idx_folder(tmp_path, normalize=False, flatten=True)
    assert flat.shape == (4, 15)
    assert flat_test.shape == (2, 15)
    assert flat.tobytes() == raw.tobytes()
    # class 4 is only in the test part
    (_, one_hot), (_, one_hot_test) = load_idx_folder(tmp_path, one_hot_label=True)
    assert one_hot.dtype == np.float32
    np.testing.assert_array_equal(one_hot, np.eye(5)[[0, 1, 2, 1]])
    np.testing.assert_array_equal(one_hot_test, np.eye(5)[[4, 0]])
    assert raw_test.flags.writeable
    assert flat.flags.writeable
    assert one_hot.flags.writeable


def rename(folder, pattern):
    """MNIST's names as another publisher has them."""
    for name in NAMES:
        part, kind, *_ = name.replace("t10k", "test").split("-")
        (folder / name).rename(
            folder / pattern.format(part=part, kind=kind, rank=3 if kind == "images" else 1)
        )


@pytest.mark.parametrize(
    "pattern",
    [
        "emnist-letters-{part}-{kind}-idx{rank}-ubyte",  # as NIST names them
        "emnist-byclass-{part}-{kind}.idx{rank}-ubyte",
        "qmnist-{part}-{kind}-idx{rank}-ubyte",
        "{part}-{kind}-idx{rank}-ubyte",
    ],
)
def test_names_of_other_publishers(tmp_path, pattern):
    fill(tmp_path, train=(4, (1, 2, 3, 1)), test=(2, (4, 1)), h=3, w=5)
    rename(tmp_path, pattern)
    (x_train, t_train), (x_test, t_test) = load_idx_folder(tmp_path)
    assert (x_train.shape, x_test.shape) == ((4, 1, 3, 5), (2, 1, 3, 5))
    assert (t_train.tolist(), t_test.tolist()) == ([1, 2, 3, 1], [4, 1])


def test_emnists_folder_holds_several_sets(tmp_path):
    for number, name in enumerate(("emnist-digits", "emnist-letters", "")):
        part = tmp_path / f"part{number}"
        part.mkdir()
        fill(part, train=(2, (number, number)), test=(1, (number,)), h=2, w=2)
        if name:
            rename(part, name + "-{part}-{kind}-idx{rank}-ubyte")
        for file in part.iterdir():
            file.rename(tmp_path / file.name)
    assert load_idx_folder(tmp_path)[0][1].tolist() == [2, 2]  # MNIST's own names go before others
    assert load_idx_folder(tmp_path, name="emnist-digits")[0][1].tolist() == [0, 0]
    for name in NAMES:
        (tmp_path / name).unlink()
    with pytest.raises(
        ArgumentError,
        match=r"several sets: emnist-digits, emnist-letters; say which: "
        r'.*name="emnist-di',
    ):
        load_idx_folder(tmp_path)
    assert load_idx_folder(tmp_path, name="emnist-letters")[1][1].tolist() == [1]
    (tmp_path / "emnist-letters-test-labels-idx1-ubyte").unlink()
    assert load_idx_folder(tmp_path)[0][1].tolist() == [0, 0]  # the only whole one
    with pytest.raises(FileNotFoundError, match="missing: emnist-letters-t10k-labels-idx1-ubyte;"):
        load_idx_folder(tmp_path, name="emnist-letters")


def test_qmnists_labels_say_more_than_the_class(tmp_path):
    fill(tmp_path, train=(3, (0, 0, 0)), test=(2, (0, 0)), h=2, w=2)
    rename(tmp_path, "qmnist-{part}-{kind}-idx{rank}-ubyte")
    for part, classes in (("train", (5, 0, 4)), ("test", (7, 2))):
        rows = [value for label in classes for value in (label, 0, 2600, 30, 5, 9999, 0, 0)]
        (tmp_path / f"qmnist-{part}-labels-idx1-ubyte").unlink()
        (tmp_path / f"qmnist-{part}-labels-idx2-int").write_bytes(
            pack(0x0C, "i", (len(classes), 8), rows)
        )
    (_, t_train), (_, t_test) = load_idx_folder(tmp_path)
    assert (t_train.tolist(), t_test.tolist()) == ([5, 0, 4], [7, 2])


def test_a_folder_s_files_may_be_limited_or_larger(tmp_path):
    fill(tmp_path, train=(4, (0, 1, 2, 1)), test=(2, (4, 0)), h=3, w=5)
    assert len(load_idx_folder(tmp_path, max_bytes=60)[0][0]) == 4
    with pytest.raises(DataFormatError, match=r"at most 59 bytes .*allow it: max_bytes="):
        load_idx_folder(tmp_path, max_bytes=59)
    with pytest.raises(ArgumentError, match="max_bytes"):
        load_idx_folder(tmp_path, max_bytes=0)


def test_labels_of_other_integer_types(tmp_path):
    fill(tmp_path, train=(3, (0, 1, 2)), h=2, w=2)
    (tmp_path / NAMES[1]).write_bytes(pack(0x0C, "i", (3,), (300, 0, 7)))
    (_, labels), _ = load_idx_folder(tmp_path)
    assert labels.dtype == np.int64
    assert labels.tolist() == [300, 0, 7]
    assert load_idx_folder(tmp_path, one_hot_label=True)[1][1].shape == (3, 301)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            NAMES[1],
            pack(8, "B", (11,), [1] * 11),
            "expected 12 labels, one for each image; got 11",
        ),
        (NAMES[3], pack(8, "B", (4,), [1] * 4), "expected 3 labels, one for each image; got 4"),
        (NAMES[3], pack(9, "b", (3,), (1, -1, 2)), "got -1 to 2"),
        (NAMES[3], pack(0x0C, "i", (3,), (1, 2**31 - 1, 2)), "got 1 to 2147483647"),
        (NAMES[3], pack(0x0D, "f", (3,), (1, 1, 2)), "integer labels"),
        (NAMES[3], pack(8, "B", (3, 1), (1, 1, 2)), "integer labels"),
        (NAMES[2], pack(8, "B", (3, 27, 28), [0] * 3 * 27 * 28), "28 x 28 pixels; got 27 x 28"),
        (NAMES[2], pack(9, "b", (3, 28, 28), [0] * 3 * 28 * 28), "uint8 images"),
        (NAMES[0], pack(8, "B", (12,), [0] * 12), "uint8 images"),
        (NAMES[0], pack(8, "B", (0, 28, 28), []), "at least one image"),
        (NAMES[0], pack(8, "B", (12, 0, 28), []), "at least one image"),
        (NAMES[0], b"<html>", "IDX"),
    ],
)
def test_files_that_do_not_fit(tmp_path, name, content, says):
    fill(tmp_path)
    (tmp_path / name).write_bytes(content)
    for load in (lambda: load_idx_folder(tmp_path), lambda: load_mnist(root=tmp_path)):
        with pytest.raises(DataFormatError) as raised:
            load()
        message = str(raised.value)
        assert says in message.replace("labels from 0 to 9; came", "came")
        assert str(tmp_path) in message
        assert name in message


def test_missing_files_are_listed(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_idx_folder(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_idx_folder(tmp_path)
    fill(tmp_path)
    (tmp_path / NAMES[2]).rename(tmp_path / "emnist-test")
    for load in (lambda: load_idx_folder(tmp_path), lambda: load_mnist(root=tmp_path)):
        with pytest.raises(FileNotFoundError) as raised:
            load()
        message = str(raised.value)
        assert all(name in message for name in NAMES)
        assert "emnist-test" in message
        assert str(tmp_path) in message
        assert f"missing: {NAMES[2]};" in message


# load_mnist: where it looks
def test_mnist_is_stricter_than_a_folder(tmp_path):
    fill(tmp_path / "size", h=27)
    load_idx_folder(tmp_path / "size")
    with pytest.raises(DataFormatError, match="28 x 28"):
        load_mnist(root=tmp_path / "size")
    fill(tmp_path / "label", test=(3, (10, 0, 1)))
    load_idx_folder(tmp_path / "label")
    with pytest.raises(DataFormatError, match="0 to 9; got 0 to 10"):
        load_mnist(root=tmp_path / "label")


def test_mnist_one_hot_has_ten_columns(tmp_path):
    fill(tmp_path, train=(2, (0, 1)), test=(1, (2,)))
    (x_train, t_train), (_, t_test) = load_mnist(root=tmp_path, flatten=True, one_hot_label=True)
    assert x_train.shape == (2, 784)
    assert t_train.shape == (2, 10)
    assert t_test.tolist() == [[0, 0, 1] + [0] * 7]
