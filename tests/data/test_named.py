"""Named data sets: CIFAR's files, EMNIST's, downloads from a local server, and pickles that hold
only data."""

import contextlib
import gzip
import hashlib
import os
import pickle
import re
import socket
import socketserver
import tarfile
import threading
import time
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn.data import cifar, download, load, named
from portacnn.data.pickled import read_pickle
from portacnn.errors import ArgumentError, DataFormatError, DependencyError
from support.digits import idx
from support.matrix import needs
from support.mirrors import Mirror


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.delenv("PORTACNN_DATA", raising=False)
    monkeypatch.setenv("PORTACNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(named, "DEBIAN", tmp_path / "debian")
    return tmp_path / "cache"


# --- pickles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_data_are_read_as_python_reads_them(protocol):
    values = [
        *(None, True, 0, 255, 256, 65536, -1, 1 << 70, -(1 << 70), b"\xff\0", "é\ud800猫"),
        {b"labels": list(range(3000)), "x" * 300: b"y" * 300, 5: {"z": [[], (), {}]}},
        [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [[[b"deep"]]]],
        b"y" * 70_000,
    ]
    content = pickle.dumps([values, values], protocol)
    assert read_pickle(content, "file") == pickle.loads(content)


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["uint8", ">i4", "<f8", "int64", "bool"])
def test_arrays(dtype, protocol):
    array = (np.arange(24).reshape(2, 3, 4) * 3).astype(dtype)
    content = pickle.dumps(
        {"a": array, "f": np.asfortranarray(array), "twice": [array] * 2}, protocol
    )
    got = read_pickle(content, "file")
    for found in (got["a"], got["f"], *got["twice"]):
        assert found.dtype == array.dtype
        assert found.tolist() == array.tolist()


class Runs:
    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "value",
    [
        Runs(os.system, "touch ran"),
        {"data": Runs(exec, "open('ran', 'w')")},
        Runs(np.fromfile, "/etc/passwd"),
        np.array([Runs(os.getcwd)], dtype=object),
        Runs(np.dtype, "O"),
        np.float64(1.5),
        1j,
    ],
    ids=["system", "exec", "fromfile", "object array", "dtype", "scalar", "complex"],
)
def test_nothing_is_run_or_made(tmp_path, monkeypatch, value, protocol):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataFormatError, match=r"^file: the pickle"):
        read_pickle(pickle.dumps(value, protocol), "file")
    assert not list(tmp_path.iterdir())


def test_a_pickle_that_would_grow_without_end():
    deep = [b"x"]
    for _ in range(60):
        deep = [deep, deep]  # 2^60 values, if each were looked at where it stands
    started = time.perf_counter()
    assert len(read_pickle(pickle.dumps(deep, 2), "file")) == 2
    assert time.perf_counter() - started < 1
    endless = []
    endless.append(endless)
    assert read_pickle(pickle.dumps(endless, 2), "file")[0]


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_pickle_is_data_or_an_error(data):
    content = bytearray(pickle.dumps({b"data": np.arange(6, dtype="u1"), b"labels": [1, 2]}, 2))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    with contextlib.suppress(DataFormatError):
        read_pickle(bytes(content), "file")


# --- CIFAR ----------------------------------------------------------------------------------------


def of_python_2(value):
    """A pickle as Python 2 and its NumPy wrote CIFAR's: text is bytes, of protocol 2."""

    def text(content):
        head = (
            b"U" + bytes([len(content)])
            if len(content) < 256
            else b"T" + len(content).to_bytes(4, "little")
        )
        return head + content

    def number(n):
        return b"K" + bytes([n]) if n < 256 else b"M" + n.to_bytes(2, "little")

    if isinstance(value, bytes):
        return text(value)
    if isinstance(value, int):
        return number(value)
    if isinstance(value, list):
        return b"](" + b"".join(map(of_python_2, value)) + b"e"
    if isinstance(value, dict):
        inner = b"".join(of_python_2(k) + of_python_2(v) for k, v in value.items())
        return b"}(" + inner + b"u"
    shape = b"".join(map(number, value.shape))
    return (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85U\x01b\x87Rq\x04"
        b"(K\x01" + shape + b"\x86cnumpy\ndtype\nq\x05U\x02u1K\x00K\x01\x87Rq\x06"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + text(value.tobytes())
        + b"tb"
    )


def make_cifar(folder, classes, kind, each=4):
    """CIFAR's files of random images; returns images and labels (fine, coarse) by part."""
    rng = np.random.default_rng(classes)
    names = {
        (10, "binary"): (
            "cifar-10-batches-bin",
            [f"data_batch_{i}.bin" for i in range(1, 6)],
            "test_batch.bin",
        ),
        (10, "python"): (
            "cifar-10-batches-py",
            [f"data_batch_{i}" for i in range(1, 6)],
            "test_batch",
        ),
        (100, "binary"): ("cifar-100-binary", ["train.bin"], "test.bin"),
        (100, "python"): ("cifar-100-python", ["train"], "test"),
    }[classes, kind]
    folder = folder / names[0]
    folder.mkdir(parents=True)
    made = {}
    for part, files in (("train", names[1]), ("test", [names[2]])):
        count = each * len(files)
        images = rng.integers(0, 256, (count, 3, 32, 32), dtype="uint8")
        fine, coarse = rng.integers(0, classes, count), rng.integers(0, 20, count)
        made[part] = images, fine, coarse
        for number, name in enumerate(files):
            rows = range(number * each, (number + 1) * each)
            if kind == "binary":
                records = [
                    bytes([coarse[i]] * (classes == 100)) + bytes([fine[i]]) + images[i].tobytes()
                    for i in rows
                ]
                content = b"".join(records)
            else:
                own = {b"batch_label": b"a batch", b"data": images[list(rows)].reshape(each, -1)}
                if classes == 10:
                    own[b"labels"] = [int(fine[i]) for i in rows]
                else:
                    own[b"fine_labels"] = [int(fine[i]) for i in rows]
                    own[b"coarse_labels"] = [int(coarse[i]) for i in rows]
                own[b"filenames"] = [b"x_%d.png" % i for i in rows]
                content = b"\x80\x02" + of_python_2(own) + b"."
                assert pickle.loads(content, encoding="bytes").keys() == own.keys()
            (folder / name).write_bytes(content)
    (folder / "readme.html").write_text("CIFAR")
    return folder, made


def pack(folder):
    name = folder.name.replace("-batches-py", "-python").replace("-batches-bin", "-binary")
    archive = folder.parent / f"{name}.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(folder, folder.name)
    return archive


@pytest.mark.parametrize("kind", ["binary", "python"])
@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(tmp_path, classes, kind, monkeypatch):
    folder, made = make_cifar(tmp_path / "files", classes, kind)
    archive = pack(folder)
    monkeypatch.setattr(pickle, "loads", None)
    monkeypatch.setattr(pickle, "load", None)
    for place in (folder, archive, folder.parent):
        for got, (images, fine, _) in zip(load(place), made.values(), strict=True):
            assert got.images.tolist() == images.tolist()
            assert got.labels.tolist() == fine.tolist()
            assert len(got.class_names) == classes
    names = load(folder)[0].class_names
    assert (names[0], names[-1]) == (("airplane", "truck") if classes == 10 else ("apple", "worm"))
    monkeypatch.setenv("PORTACNN_DATA", str(tmp_path / "mine"))
    (tmp_path / "mine").mkdir()
    folder.parent.rename(tmp_path / "mine" / f"cifar{classes}")
    assert load(f"cifar{classes}")[1].labels.tolist() == made["test"][1].tolist()
    if classes == 100:
        coarse = load("cifar100-coarse")[0]
        assert coarse.labels.tolist() == made["train"][2].tolist()
        assert (len(coarse.class_names), coarse.class_names[14]) == (20, "people")


def test_damaged_cifar(tmp_path):
    folder, _ = make_cifar(tmp_path / "binary", 10, "binary")
    content = (folder / "data_batch_3.bin").read_bytes()
    (folder / "data_batch_3.bin").write_bytes(content[:-1])
    with pytest.raises(DataFormatError, match=r"data_batch_3\.bin: expected records of 3073 bytes"):
        load(folder)
    (folder / "data_batch_3.bin").write_bytes(b"\x0a" + content[1:])
    with pytest.raises(DataFormatError, match=r"expected labels 0\.\.9, got 10"):
        load(folder)
    (folder / "data_batch_4.bin").unlink()
    with pytest.raises(DataFormatError, match=r"data_batch_4\.bin is missing"):
        load(folder)
    folder, _ = make_cifar(tmp_path / "python", 10, "python")
    archive = pack(folder)
    archive.write_bytes(archive.read_bytes()[:2000])
    with pytest.raises(DataFormatError, match="expected a whole archive"):
        load(archive)
    (folder / "data_batch_2").write_bytes(pickle.dumps(Runs(os.system, "touch ran"), 2))
    with pytest.raises(DataFormatError, match=r"data_batch_2: the pickle asks for 'posix\.system'"):
        load(folder)
    (folder / "data_batch_2").write_bytes(pickle.dumps({b"data": [1], b"labels": [1]}, 2))
    with pytest.raises(DataFormatError, match='expected "data", uint8'):
        load(folder)


def test_cifars_names():
    for names, count in ((cifar.CIFAR10, 10), (cifar.CIFAR100, 100), (cifar.CIFAR100_COARSE, 20)):
        assert len(set(names)) == count
        assert list(names) == sorted(names)  # as the publisher numbered them


# --- EMNIST, Fashion-MNIST ------------------------------------------------------------------------


def emnist(part, first=0, count=6):
    """The four packed files of a part: an F of light pixels, stored on its side as EMNIST does."""
    upright = np.zeros((28, 28), "uint8")
    upright[4:24, 6], upright[4, 6:20], upright[13, 6:15] = 255, 255, 255
    images = np.stack([upright.T] * count)
    labels = (first + np.arange(count)).astype("uint8")
    return upright, {
        f"{part}-{half}-{kind}-ubyte.gz": gzip.compress(idx(array))
        for half in ("train", "test")
        for kind, array in (("images-idx3", images), ("labels-idx1", labels))
    }


def test_emnist_is_turned_upright_and_counted_from_0(home, tmp_path):
    upright, letters = emnist("emnist-letters", first=1)
    _, digits = emnist("emnist-digits")
    place = home / "emnist"
    place.mkdir(parents=True)
    with zipfile.ZipFile(place / "gzip.zip", "w") as archive:
        for name, content in {**letters, **digits}.items():
            archive.writestr(f"gzip/{name}", content)
    train, test = load("emnist-letters")
    assert train.images[3, 0].tolist() == upright.tolist()
    assert test.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert train.class_names == tuple("abcdefghijklmnopqrstuvwxyz")
    assert sorted(path.name for path in place.iterdir()) == sorted(["gzip.zip", *letters])
    (place / "gzip.zip").unlink()
    assert len(load("emnist-letters")[0]) == 6  # the files are there
    assert len(load(place)[0].class_names) == 26  # a folder of this one part
    for name, content in digits.items():
        (place / name).write_bytes(content)
    assert load("emnist-digits")[0].labels.tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ArgumentError, match="holds several sets"):
        load(place)
    assert len(named.EMNIST["emnist-balanced"]) == 47
    assert len(named.EMNIST["emnist-byclass"]) == 62


def test_debians_package_of_fashion_mnist_is_found(tmp_path):
    place = tmp_path / "debian" / "fashion-mnist"
    place.mkdir(parents=True)
    for name, content in small_set().items():
        (place / name).write_bytes(content)
    train, _ = load("fashion-mnist")
    assert (len(train), train.class_names[9]) == (5, "Ankle boot")


# --- downloads ------------------------------------------------------------------------------------


def small_set():
    files = {}
    for name in named.FILE_NAMES:
        images = np.random.default_rng(len(name)).integers(0, 256, (5, 28, 28), dtype="uint8")
        array = images if "images" in name else np.arange(5, dtype="uint8")
        files[f"{name}.gz"] = gzip.compress(idx(array), mtime=0)
    return files


@pytest.fixture
def mirrors(monkeypatch):
    """mirrors(files by mirror, ...): Fashion-MNIST's, whose checksums are those of small_set."""
    started = []
    packed = small_set()
    md5 = tuple(hashlib.md5(c, usedforsecurity=False).hexdigest() for c in packed.values())

    def start(*options):
        started.extend(Mirror(*given) if isinstance(given, tuple) else given for given in options)
        addresses = tuple(getattr(one, "address", one) for one in started)
        about = named.IDX["fashion-mnist"]._replace(md5=md5, mirrors=addresses)
        monkeypatch.setitem(named.IDX, "fashion-mnist", about)
        return started

    yield start
    for one in started:
        if isinstance(one, Mirror):
            one.server.shutdown()
            one.server.server_close()


def held(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@needs("pooch")
def test_mirrors_in_turn_and_only_what_is_missing(home, mirrors):
    packed = small_set()
    first = next(iter(packed))
    bad = {first: b"<html>captive portal</html>"}
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}/"
    worse, _, good = mirrors((bad,), dead, (packed,))
    train, _ = load("fashion-mnist")
    assert (len(train), train.class_names[0]) == (5, "T-shirt/top")
    assert held(home / "fashion-mnist") == packed
    assert len(worse.asked) == len(good.asked) == 4
    (home / "fashion-mnist" / first).unlink()
    load("fashion-mnist")
    assert [name for name, _ in good.asked[4:]] == [first]


@needs("pooch")
def test_mirrors_that_stay_silent_or_speak_no_http(home, mirrors, monkeypatch):
    class Other(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(4096)
            self.request.sendall(b"220 mail.example ESMTP ready\r\n")

    monkeypatch.setattr(download, "TIMEOUT", 0.05)
    with socket.socket() as silent, socketserver.ThreadingTCPServer(("127.0.0.1", 0), Other) as odd:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        threading.Thread(target=odd.serve_forever, args=(0.01,), daemon=True).start()
        ports = silent.getsockname()[1], odd.server_address[1]
        mirrors(*(f"http://127.0.0.1:{port}/" for port in ports), (small_set(),))
        assert len(load("fashion-mnist")[0]) == 5
        odd.shutdown()


@needs("pooch")
@pytest.mark.parametrize("resumes", [True, False])
def test_an_interrupted_download_is_resumed(home, mirrors, resumes):
    packed = small_set()
    first, second = list(packed)[:2]
    (only,) = mirrors((packed, [first, second], resumes))
    for broken in (first, second):
        with pytest.raises(FileNotFoundError, match=f"{broken}: the connection broke after"):
            load("fashion-mnist")
    assert set(held(home / "fashion-mnist")) == {first, f".{second}.part"}
    load("fashion-mnist")
    assert held(home / "fashion-mnist") == packed
    assert len(only.asked) == 1 + 2 + 3  # broken; resumed, broken; resumed and the last two
    ranges = [(name, wanted) for name, wanted in only.asked if wanted]
    half = {name: f"bytes={len(packed[name]) // 2}-" for name in (first, second)}
    assert ranges == [(name, half[name]) for name in (first, second)]


@needs("pooch")
def test_what_was_left_by_another_file_is_thrown_away(home, mirrors):
    packed = small_set()
    mirrors((packed,))
    place = home / "fashion-mnist"
    place.mkdir(parents=True)
    first, second = list(packed)[:2]
    (place / f".{first}.part").write_bytes(b"something else")
    (place / f".{second}.part").write_bytes(packed[second] + b"and more")
    load("fashion-mnist")
    assert held(place) == packed


@needs("pooch")
def test_offline(home, tmp_path, mirrors, monkeypatch):
    mirrors(({},))
    monkeypatch.setenv("PORTACNN_DATA", str(tmp_path / "mine"))
    with pytest.raises(FileNotFoundError) as raised:
        load("fashion-mnist")
    message = str(raised.value)
    assert all(f"{name}.gz" in message for name in named.FILE_NAMES)
    assert "404" in message
    assert f"into the folder {home / 'fashion-mnist'}" in message
    assert str(tmp_path / "mine" / "fashion-mnist") in message
    assert held(home / "fashion-mnist") == {}


@needs("pooch")
def test_a_full_disk_is_not_blamed_on_the_mirror(home, mirrors, monkeypatch):
    (only,) = mirrors((small_set(),))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as raised:
        load("fashion-mnist")
    assert not isinstance(raised.value, FileNotFoundError)
    assert len(only.asked) == 1
    assert held(home / "fashion-mnist") == {}


def test_without_pooch(home, mirrors, monkeypatch):
    mirrors(({},))
    monkeypatch.setitem(__import__("sys").modules, "pooch", None)
    with pytest.raises(DependencyError, match=r'pip install "portacnn\[data\]"') as raised:
        load("fashion-mnist")
    assert str(home / "fashion-mnist") in str(raised.value)
    place = home / "fashion-mnist"
    place.mkdir(parents=True)
    for name, content in small_set().items():
        (place / name).write_bytes(content)
    assert len(load("fashion-mnist")[0]) == 5  # by hand, as it says


def test_checksums_are_whole():
    sums = [*(md5 for about in named.IDX.values() for md5 in about.md5)]
    sums += [*named._CIFAR[10].values(), *named._CIFAR[100].values()]
    assert all(re.fullmatch("[0-9a-f]{32}", md5) for md5 in sums)
    assert len(set(sums)) == 10
    assert download.TIMEOUT > 1
