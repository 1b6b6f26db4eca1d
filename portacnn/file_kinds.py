"""Identify a file from its first bytes, for error messages about files of the wrong kind."""

import re
from codecs import getincrementaldecoder

from portacnn.text import quoted

FIRST = 256
"""Number of bytes of a file that ``kind_of`` needs."""

_PICKLE = (
    "a pickle or a PyTorch archive, which can run code when it is read. portacnn reads "
    "safetensors. If you trust the file, convert it where it was made: "
    "safetensors.torch.save_file(state_dict, ...), or safetensors.numpy.save_file(params, ...) "
    "for NumPy arrays"
)
_BEGINNINGS = {
    b"version "
    b"https://git-lfs.github.com/spec/": "a Git LFS pointer instead of the file; download the "
    "file with: git lfs pull",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"PK\x03\x04": f"a zip archive, or {_PICKLE}",
    b"BZh": "a bzip2 archive; unpack it first",
    b"\xfd7zXZ\x00": "an xz archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstd archive; unpack it first",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it first",
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, as Keras writes",
    b"GGUF": "a GGUF file, as llama.cpp writes",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x7fELF": "a program",
}


_COMMENTS = re.compile(r"^\s*(<!--.*?-->\s*)+", re.DOTALL)  # before a page's first tag


def may_be_safetensors(start: bytes) -> bool:
    """Return whether a safetensors file can begin like this: a length below 2^32 in 8 bytes, then
    JSON."""
    return not any(start[4:8]) and start[8:9] in (b"{", b"")


def kind_of(start: bytes) -> str | None:
    """Return what a file with this beginning seems to be, and what to do with it; None if unknown.

    >>> kind_of(b"BZh91AY&SY")
    'a bzip2 archive; unpack it first'
    """
    if not start:
        return "an empty file (0 bytes)"
    if may_be_safetensors(start):  # some lengths look like the beginning of a pickle or an archive
        return (
            "a safetensors file, as portacnn.load and load_weights read" if len(start) > 8 else None
        )
    for beginning, kind in _BEGINNINGS.items():
        if start.startswith(beginning):
            return kind
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return _PICKLE
    if (
        start[:1] == b"\x08"
        and start[1:2] < b"\x20"
        and start[2:3] in (b"\x12", b"\x1a", b"\x22", b"\x3a", b"\x42")
    ):
        return "an ONNX model, as portacnn.onnx.load reads"
    return _kind_of_text(start)


def _kind_of_text(start: bytes) -> str | None:
    try:
        # which drops a truncated character at the end
        text = getincrementaldecoder("utf-8-sig")().decode(start)
    except UnicodeDecodeError:
        return None
    if not all(c.isprintable() or c.isspace() for c in text):
        return None
    lower = _COMMENTS.sub("", text).lstrip().lower()
    if lower.startswith(("<!doctype html", "<html", "<head", "<body", "<title", "<script")):
        return (
            "a web page (HTML), perhaps an error or a login form; open it in a browser, and "
            "download the file again"
        )
    if lower.startswith("<?xml"):
        return "XML, perhaps a server's error message; open it, and download the file again"
    if lower.startswith(("{", "[")):
        return "JSON, perhaps the index of a model in several files"
    first, line_end, _ = text.partition("\n")
    comma = next((mark for mark in ",;\t" if mark in first), None)
    if line_end and comma is not None:
        return (
            f"a CSV table; it begins with {quoted(first.rstrip())}. It holds data, not a model: "
            f"numpy.loadtxt(path, delimiter={comma!r}) reads numbers"
        )
    return f"text; it begins with {quoted(first)}"
