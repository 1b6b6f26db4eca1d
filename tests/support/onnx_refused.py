"""ONNX files that loading refuses."""

import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

import portacnn.onnx
from portacnn.errors import ModelFormatError


def write(path: Path, model: Any) -> Path:
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path


def refused(
    path: Path, model: Any, *words: str, most: int | None = 16 << 20, **options: Any
) -> None:
    """Loading raises ModelFormatError with the file's name and these words, at once, and within
    ``most`` bytes and four files."""
    write(path, model)
    start = time.process_time()
    with pytest.raises(ModelFormatError) as caught:
        portacnn.onnx.load(path, **options)
    assert time.process_time() - start < 10
    assert type(caught.value) is ModelFormatError
    for word in (str(path), *words):
        assert word in str(caught.value)
    assert len(str(caught.value)) < 4000
    if most is None:
        return
    tracemalloc.start()
    try:
        with pytest.raises(ModelFormatError):
            portacnn.onnx.load(path, **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < most + 4 * path.stat().st_size


def field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def varint(value: int) -> bytes:
    groups = bytearray()
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])
