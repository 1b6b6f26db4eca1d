"""IDX files, checked against bytes packed by hand."""

import contextlib
import gzip
import os
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from portacnn.data import read_idx, write_idx
from portacnn.errors import ArrayError, DataFormatError, ShapeError
from support.idx_files import pack

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
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


# --- IDX: reading what was packed by hand ---------------------------------------------------------


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


# --- IDX: refusing what isn't right ---------------------------------------------------------------


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
def test_other_kinds_of_files_are_refused(tmp_path, content, says):
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
    """Fails where the block takes more memory or time (of this process) than this."""
    tracemalloc.start()
    start = time.process_time()
    try:
        yield
        assert time.process_time() - start < seconds
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


# --- IDX: writing ---------------------------------------------------------------------------------


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
