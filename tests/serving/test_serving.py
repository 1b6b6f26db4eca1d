"""docs/serving.md: its server, run by uvicorn as the page says, and with workers forked from a
process that has loaded the model and predicted."""

import http.client
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import portacnn
from portacnn.data import load_mnist_sample
from support.matrix import needs

ROOT = Path(__file__).resolve().parents[2]
NAMES = [f"digit {number}" for number in range(10)]
PRELOAD = """
import os, socket, sys
import server, uvicorn

server.classify(open("0.png", "rb").read())
listening = socket.create_server(("127.0.0.1", int(sys.argv[1])))
if os.fork():
    os.fork()
uvicorn.Server(uvicorn.Config(server.app)).run(sockets=[listening])
"""


def program() -> str:
    """The page's block that makes ``app``."""
    page = (ROOT / "docs" / "serving.md").read_text("utf-8")
    (found,) = [block for block in page.split("```python\n") if "app = Starlette" in block]
    return found.partition("```")[0]


def png(image: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of 60 bytes that claims 2,500 million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def asked(port: int, body: bytes) -> tuple[int, dict]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request("POST", "/classify", body)
        reply = connection.getresponse()
        text = reply.read()
        return reply.status, json.loads(text) if reply.status in (200, 400) else {}


def wait_for(port: int, process: subprocess.Popen) -> None:
    for _ in range(600):
        assert process.poll() is None, process.stderr.read()
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server does not listen")


@pytest.mark.slow
@needs("starlette", "uvicorn", "PIL")
@pytest.mark.parametrize("workers", ["one process", "spawned", "forked"])
def test_the_pages_server(workers, tmp_path):
    """Probabilities are those of the network, for eight clients at once; bad bodies are refused."""
    if workers == "forked" and not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    model = portacnn.SimpleConvNet((1, 28, 28), weight_init="he", device="cpu", seed=0)
    images = load_mnist_sample(normalize=False)[0][0][:8]
    logits = model.predict(images.astype("float32") / 255)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    model.preprocess = portacnn.Normalize()
    model.info = portacnn.models.ModelInfo(class_names=NAMES)
    model.save(tmp_path / "digits.safetensors")
    bodies = [png(image[0]) for image in images]
    (tmp_path / "0.png").write_bytes(bodies[0])
    (tmp_path / "server.py").write_text(program(), "utf-8")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    count = "2" if workers == "spawned" else "1"
    command = ["-m", "uvicorn", "server:app", "--port", str(port), "--workers", count]
    if workers == "forked":
        command = ["-c", PRELOAD, str(port)]
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PORTACNN_KERNELS": "native"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that the workers end with it
    )
    try:
        wait_for(port, process)
        with ThreadPoolExecutor(8) as clients:
            replies = list(clients.map(asked, [port] * 64, bodies * 8))
        for number, (status, shares) in enumerate(replies):
            assert status == 200
            assert list(shares) == NAMES
            np.testing.assert_allclose(list(shares.values()), expected[number % 8], rtol=1e-4)
        for bad, says in (
            (b"", "cannot be decoded as an image"),
            (b"<html>", "none of JPEG, PNG"),
            (bodies[0][:-60], "cannot be decoded as an image"),
            (bomb(), "max_pixels=4000000"),
        ):
            status, told = asked(port, bad)
            assert (status, "/" in told["error"]) == (400, False)  # no path of the server
            assert says in told["error"]
        assert asked(port, b" " * 1_000_001)[0] == 413
        assert asked(port, bodies[0])[0] == 200
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
