"""Files as they come in real life: replaced while they are read, links, odd names, full disks, and
other kinds than expected."""

import errno
import gzip
import json
import os
import re
import stat
import struct
import sys
import threading
import zipfile

import numpy as np
import pytest
import safetensors.numpy as st_numpy

import portacnn
from portacnn import files
from portacnn import text as texts
from portacnn.data import read_idx, write_idx
from portacnn.errors import ArgumentError, DataFormatError, ModelFormatError
from portacnn.layers import BatchNorm2d, Conv2d, Linear, Sequential
from portacnn.training import Trainer
from support.matrix import needs
from support.nets import bits, small_net


def tensor_file(tensors, header_length=None):
    """A safetensors file by its specification: tensors are (dtype, shape, bytes) by name."""
    entries, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        entries[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(entries).encode()
    text += b" " * ((header_length or len(text)) - len(text))
    return struct.pack("<Q", len(text)) + text + data


def shape_of(name, *values, dtype="F32"):
    return {name: (dtype, [len(values)], np.asarray(values, "<f4").tobytes())}


# --- writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["n" * 255, "字" * 80, "n" * 241 + "é" * 7], ids=["bytes", "kanji", "both"]
)
def test_long_names(tmp_path, name):
    small_net().save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert bits(portacnn.load(tmp_path / name)) == bits(small_net())
    with pytest.raises(OSError, match="too long") as caught:
        small_net().save(tmp_path / ("n" * 256))
    assert caught.value.errno == errno.ENAMETOOLONG
    assert str(caught.value).endswith(f": {str(tmp_path / ('n' * 256))!r}")


def test_a_link_stays_a_link(tmp_path):
    real, link, second = tmp_path / "real" / "net", tmp_path / "link", tmp_path / "second"
    real.parent.mkdir()
    link.symlink_to("real/net")
    second.symlink_to(link)
    small_net(seed=1).save(second)  # to where there is nothing yet
    assert bits(portacnn.load(real)) == bits(small_net(seed=1))
    small_net(seed=2).save(link)
    assert link.is_symlink()
    assert second.is_symlink()
    assert os.readlink(link) == "real/net"
    assert bits(portacnn.load(real)) == bits(small_net(seed=2))
    assert os.listdir(real.parent) == ["net"]
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(OSError, match="round") as caught:
        small_net().save(tmp_path / "round")
    assert caught.value.errno == errno.ELOOP


@needs("onnx")
def test_an_exports_second_file_lies_beside_the_first(tmp_path, monkeypatch):
    """Whatever the length of its name, and even if it was reached by a link."""
    monkeypatch.setattr(sys.modules["portacnn.onnx.export"], "_INLINE", 1000)
    net, name = small_net(hidden_size=100), "字" * 82 + ".onnx"
    (tmp_path / "real").mkdir()
    (tmp_path / "link.onnx").symlink_to(f"real/{name}")
    for _ in range(2):
        portacnn.onnx.export(net, tmp_path / "link.onnx")
        assert (tmp_path / "link.onnx").is_symlink()
        assert len(os.listdir(tmp_path / "real")) == 2
        for path in (tmp_path / "link.onnx", tmp_path / "real" / name):
            assert set(portacnn.onnx.load(path).state_dict()) == set(net.state_dict())


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400, 0o777])
def test_the_mode_stays(tmp_path, mode):
    path = tmp_path / "net"
    path.write_bytes(b"old")
    path.chmod(mode)
    small_net().save(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    write_idx(tmp_path / "idx", np.zeros(3, "uint8"))
    (tmp_path / "idx").chmod(mode)
    write_idx(tmp_path / "idx", np.ones(3, "uint8"))
    assert stat.S_IMODE((tmp_path / "idx").stat().st_mode) == mode


def test_a_private_file_is_never_open_to_others(tmp_path, monkeypatch):
    path, seen = tmp_path / "net", []
    path.write_bytes(b"old")
    path.chmod(0o600)
    sync = os.fsync

    def look(handle):
        seen.append(stat.S_IMODE(os.fstat(handle).st_mode))
        sync(handle)

    monkeypatch.setattr(files.os, "fsync", look)
    small_net().save(path)
    assert seen[0] == 0o600


def test_only_files_are_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        small_net().save(tmp_path / "folder")
    assert caught.value.filename == str(tmp_path / "folder")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        small_net().save(tmp_path / "pipe")
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_is_said_with_the_name(tmp_path, monkeypatch, step):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, step, full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        small_net().save(tmp_path / "net")
    assert str(caught.value) == f"[Errno 28] No space left on device: {str(tmp_path / 'net')!r}"
    assert os.listdir(tmp_path) == []


# --- replaced while it is read --------------------------------------------------------------------


def test_a_file_that_is_replaced_gives_one_or_the_other(tmp_path):
    """The two differ in their headers: a second opening would put the bytes of one under the names
    of the other."""
    path, done = tmp_path / "w.safetensors", threading.Event()
    first, second = np.full(4000, 1, "float32"), np.full(4000, 2, "float32")
    contents = [
        st_numpy.save({"weight": first, "x": first[:7]}),
        st_numpy.save({"x": second[:9], "weight": second}),
    ]
    path.write_bytes(contents[0])

    def replace():
        number = 0
        while not done.is_set():
            number += 1
            (tmp_path / "new").write_bytes(contents[number % 2])
            os.replace(tmp_path / "new", path)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(150):
            found, _ = files.load_tensors(path)
            value = 1 if found["x"].size == 7 else 2
            assert all((array == value).all() for array in found.values())
    finally:
        done.set()
        thread.join()


opened = None  # a list while a test wants to know


@pytest.fixture(scope="module")
def openings():
    """Have the names of files that are opened put into ``opened``: a hook, which cannot be taken
    away again."""
    sys.addaudithook(
        lambda event, args: (
            opened.append(str(args[0])) if opened is not None and event == "open" else None
        )
    )


@pytest.mark.parametrize(
    "kind", ["safetensors", "model", "checkpoint", "idx", pytest.param("onnx", marks=needs("onnx"))]
)
def test_each_file_is_opened_once(openings, tmp_path, monkeypatch, kind):
    path = tmp_path / "file"
    x, t = np.zeros((4, 1, 8, 8), "float32"), np.arange(4)
    if kind == "idx":
        write_idx(path, np.zeros((3, 4), "uint8"))
    elif kind == "onnx":
        portacnn.onnx.export(small_net(), path)
    elif kind == "checkpoint":
        Trainer(small_net(), x, t, x, t, mini_batch_size=2, epochs=1, verbose=False).checkpoint(
            path
        )
    else:
        small_net().save(path)
    read = {
        "safetensors": lambda: small_net().load_weights(path),
        "model": lambda: portacnn.load(path),
        "checkpoint": lambda: Trainer.resume(path, x, t, x, t),
        "idx": lambda: read_idx(path),
        "onnx": lambda: portacnn.onnx.load(path),
    }[kind]
    # The safetensors library opens files where Python's hook does not see it: it must not be asked.
    monkeypatch.setattr("safetensors.safe_open", None)
    monkeypatch.setattr(sys.modules[__name__], "opened", [])
    read()
    assert opened.count(str(path)) == 1


# --- other kinds of files -------------------------------------------------------------------------


def test_a_damaged_safetensors_file_is_no_pickle(tmp_path):
    """Lengths of headers that begin as pickles of every protocol do, as gzip does, and as zip
    does."""
    for length in (128, 384, 640, 896, 1152, 1408, 0x8B1F, 0x4B50):
        content = tensor_file(shape_of("w", 1, 2, 3), header_length=length)
        path = tmp_path / "w"
        for cut in (
            content[:-3],
            content + b"x",
            content[: 8 + length // 2],
            content[:9],
            content[:5],
        ):
            path.write_bytes(cut)
            with pytest.raises(
                ModelFormatError, match="is not an intact safetensors file: "
            ) as caught:
                files.load_tensors(path)
            assert "looks like" not in str(caught.value)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
OTHERS = {
    "Git LFS pointer": POINTER,
    "web page (HTML)": b"<!DOCTYPE html>\n<html><body>404</body></html>",
    "HTML": b"\n\n<html lang='en'>",
    "XML": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "gzip": gzip.compress(b"what was meant" * 20),
    "zip": None,
    "CSV": b"epoch,loss\n1,2.5\n2,2.25\n",
    "CSV table": "\ufefflabel;größe\r\n1;2,5\r\n".encode(),
    "delimiter='\\t'": b"label\tsize\n1\t2\n",
    "page (HTML)": b"<!-- saved -->\n<!-- twice -->\n<html><body>Sign in</body></html>",
    "text": "こんにちは。".encode() * 40,
    "JSON": b'{"metadata": {"total_size": 1}, "weight_map": {}}',
    "empty": b"",
    "NumPy": b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', ",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_of_files_are_named(tmp_path, kind):
    path, content = tmp_path / "file", OTHERS[kind]
    if content is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model.bin", b"weights")
    else:
        path.write_bytes(content)
    for read in (portacnn.load, small_net().load_weights, portacnn.onnx.load):
        with pytest.raises(ModelFormatError) as caught:
            read(path)
        assert "looks like" in str(caught.value)
        assert kind in str(caught.value)
        assert str(path) in str(caught.value)
    if kind != "gzip":  # which IDX files may be
        with pytest.raises(
            DataFormatError,
            match=r"expected an IDX file.*looks like "
            r".*" + re.escape(kind),
        ):
            read_idx(path)


@needs("onnx")
def test_onnx_and_safetensors_taken_for_each_other(tmp_path):
    net, a, b = small_net(), tmp_path / "a", tmp_path / "b"
    net.save(a)
    portacnn.onnx.export(net, b)
    with pytest.raises(ModelFormatError, match=r"looks like a safetensors file, as portacnn.load"):
        portacnn.onnx.load(a)
    with pytest.raises(ModelFormatError, match=r"looks like an ONNX model, as portacnn.onnx.load"):
        portacnn.load(b)


@pytest.mark.parametrize(
    "content", [b"\x08" * 5_000_000, bytearray(70_000), "text" * 100_000, 3, "", "a\0b"], ids=str
)
def test_what_is_no_path(content):
    for read in (portacnn.onnx.load, portacnn.load, small_net().load_weights, small_net().save):
        with pytest.raises(ArgumentError, match="expected the path of a") as caught:
            read(content)
        assert len(str(caught.value)) < 300


# --- tensors that nobody needs, or that are not there ---------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "bits_"), [("F8_E4M3", 8), ("F8_E5M2", 8), ("F8_E8M0", 8), ("F4", 4), ("C64", 64)]
)
def test_dtypes_that_numpy_does_not_have(tmp_path, dtype, bits_):
    path, net = tmp_path / "w", Sequential(fc=Linear(2, 3, bias=False)).build((2,), seed=0)
    weight = np.arange(6, dtype="<f4")
    entries = {
        "scale": (dtype, [4, 2], bytes(bits_)),
        "fc.weight": ("F32", [3, 2], weight.tobytes()),
    }
    path.write_bytes(tensor_file(entries))
    tensors, _ = files.load_tensors(path)
    mismatch = net.load_state_dict(tensors, strict=False)
    assert mismatch.unexpected_keys == ["scale"]
    assert net.state_dict()["fc.weight"].ravel().tolist() == weight.tolist()
    path.write_bytes(tensor_file({"fc.weight": (dtype, [3, 2], bytes(6 * bits_ // 8))}))
    with pytest.raises(
        ModelFormatError, match=rf"dtype that NumPy does not.*fc\.weight \({dtype}\)"
    ) as caught:
        net.load_state_dict(files.load_tensors(path)[0], strict=False)
    assert "whole" not in str(caught.value)
    path.write_bytes(tensor_file(entries)[:-1])
    with pytest.raises(ModelFormatError, match="is not an intact safetensors file"):
        files.load_tensors(path)


def test_a_state_that_is_no_arrays():
    net = Sequential(fc=Linear(2, 3)).build((2,), seed=0)
    before = bits(net)
    with pytest.raises(ModelFormatError, match=r"not an array.*fc\.weight, a list"):
        net.load_state_dict({"fc.weight": [[1.0] * 2] * 3, "fc.bias": np.ones(3)})
    assert bits(net) == before


def test_a_file_without_the_count_of_batches(backend, tmp_path):
    """PyTorch takes one too:
    https://github.com/pytorch/pytorch/blob/main/torch/nn/modules/batchnorm.py"""
    net = Sequential(conv=Conv2d(1, 2, 3), bn=BatchNorm2d(2)).build(
        (1, 5, 5), device=backend.device, seed=0
    )
    net(backend.array(np.ones((2, 1, 5, 5), "float32")), train=True)
    state = net.state_dict()
    del state["bn.num_batches_tracked"]
    st_numpy.save_file({name: value + 1 for name, value in state.items()}, tmp_path / "w")
    mismatch = net.load_state_dict(files.load_tensors(tmp_path / "w")[0])
    assert mismatch == ([], [])
    after = net.state_dict()
    assert after.pop("bn.num_batches_tracked") == 1  # as it was
    for name, value in state.items():
        np.testing.assert_array_equal(after[name], value + 1)
    del state["bn.running_var"]
    with pytest.raises(ModelFormatError, match=r"missing: bn\.running_var"):
        net.load_state_dict(state)


@needs("torch")
def test_pytorch_agrees_about_the_count_of_batches():
    import torch

    twin = torch.nn.BatchNorm2d(2)
    state = {
        name: value for name, value in twin.state_dict().items() if name != "num_batches_tracked"
    }
    assert twin.load_state_dict(dict(state)) == ([], [])


# --- text from files ------------------------------------------------------------------------------

EVIL = "\x1b[31mred\x1b]0;title\x07\r\nERROR forged line\u202e\u2028" + "n" * 3_000_000


def only_printable(error):
    assert str(error).isprintable()
    assert len(str(error)) < 4000


def listed(name):
    return texts.listed([name, name])


def test_names_in_files_cannot_steer_a_terminal(tmp_path):
    path, net = tmp_path / "w", small_net()
    path.write_bytes(tensor_file(shape_of(EVIL, 1)))
    with pytest.raises(ModelFormatError, match="unexpected: ") as caught:
        net.load_weights(path)
    only_printable(caught.value)
    assert "fc2.bias" in str(caught.value)
    path.write_bytes(tensor_file({EVIL: ("F32", [2], b"")}))
    with pytest.raises(ModelFormatError) as caught:
        net.load_weights(path)
    only_printable(caught.value)
    path.write_bytes(tensor_file({f"{i}\n": ("F32", [1], bytes(4)) for i in range(5000)}))
    with pytest.raises(ModelFormatError, match="and 4984 more") as caught:
        net.load_weights(path)
    only_printable(caught.value)
    path.write_bytes(tensor_file({"a": (EVIL, [1], bytes(4))}))
    with pytest.raises(ModelFormatError) as caught:
        net.load_weights(path)
    only_printable(caught.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"format": EVIL},
        {"dtype": EVIL},
        {"input_shape": EVIL},
        {"model": {"class": EVIL, "arguments": {}}},
        {"model": {"class": "Model", "arguments": {EVIL[:100]: {"class": "Linear",
        "arguments": {EVIL: 1}}}}},
        {"model": {"class": "Model", "arguments": {EVIL[:99]: {"class": "Conv2d", "arguments": {
            "in_channels": 5, "out_channels": 1, "kernel_size": 1}}}}},
        {"model": {"class": "Model", "arguments": {"a": {"class": "Elementwise",
        "arguments": {"function": EVIL}}}}},
        {"preprocess": {"class": EVIL, "arguments": {}}},
    ],
    ids=lambda changed: next(iter(changed)),
)  # fmt: skip
def test_descriptions_cannot_either(tmp_path, changed):
    header = {
        "format": 1,
        "dtype": "float32",
        "input_shape": [1, 3, 3],
        "model": {"class": "Model", "arguments": {}},
    }
    text = json.dumps({"__metadata__": {"portacnn": json.dumps({**header, **changed})}}).encode()
    (tmp_path / "net").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ModelFormatError) as caught:
        portacnn.load(tmp_path / "net")
    only_printable(caught.value)


@pytest.mark.parametrize(
    "told", [texts.shown, texts.quoted, texts.message, texts.printable, listed]
)
def test_text_from_files_is_escaped(told):
    """Each function that messages, warnings and tables use. What can be printed stays."""
    assert told(EVIL[:60]).isprintable()
    assert "\\x1b[31mred" in told(EVIL[:60])
    assert told("naïve 字") in ("naïve 字", "'naïve 字'", "naïve 字, naïve 字")


def test_paths_in_errors_of_other_kinds_are_escaped(tmp_path):
    """Of Python's own exception types, whose text nobody escapes afterwards."""
    for call in (portacnn.data.load, portacnn.data.ImageFolder):
        with pytest.raises(FileNotFoundError) as caught:
            call(tmp_path / EVIL[:60])
        only_printable(caught.value)


def test_a_model_with_odd_names_prints_them_escaped():
    net = portacnn.models.Model(**{"a\x1b[2J\n": Linear(2, 3)}).build((2,), seed=0)
    assert "\x1b" not in net.summary()
    with pytest.raises(portacnn.PortacnnError) as caught:
        net.children["a\x1b[2J\n"].kept(None)
    only_printable(caught.value)
