"""Files, written whole or not at all, and models in them: safetensors, with the architecture as JSON in the header.

No pickle: reading a file runs nothing that is in it. A checksum over all of a file stands in its header, so that one which a
disk or a copy has damaged is not taken for a whole one.
"""

import contextlib
import json
import os
import secrets
import zlib
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from portacnn.errors import ModelFormatError
from portacnn.runtime import HostArray

_KEY = "portacnn"
_CHECKSUM = "checksum"
_MARK = json.dumps(json.dumps({_CHECKSUM: ""})[1:-2])[
    1:-1
].encode()  # JSON in a JSON text: what stands before the digits
_NO_DIGITS = b"0" * 8  # stand for the checksum of a CRC-32 while it is computed
_DTYPES = {
    "BOOL": "uint8",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "uint16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
}
"""What the bytes are viewed as. NumPy has no bfloat16: those become float32, which holds them all."""


def make_folder(path: str | os.PathLike[str], purpose: str = "checkpoints", another: str = "folder") -> Path:
    """Make the folder and try it, before an hour's work depends on it.

    Raises:
        OSError: it cannot be made or written into; the message says for what ``purpose`` it was, and to choose ``another``.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"cannot make the folder {folder} for {purpose}: {error.strerror}; choose another {another}"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write into {folder}; choose another {another}")
    return folder


def write_atomically(path: str | os.PathLike[str], content: bytes | Iterable[bytes | memoryview]) -> None:
    """Write a file so that ``path`` holds either all of ``content`` or what it held before, even after a crash.

    ``content`` may come in pieces, for files that are better not held in memory a second time.

    The bytes go to a temporary file in the same folder, reach the disk, and only then take the name.

    Raises:
        OSError: the folder is missing or may not be written to, the disk is full. The temporary file is removed.
    """
    path = Path(path)
    # Not tempfile: its files are private to this user, whereas a cache may be shared and should follow the umask.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename == str(temporary) and error.filename2 is None:
            error.filename = str(path)  # the name that the caller knows
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Have the disk keep a new name in ``folder``, where the system can: Windows opens no folders, some file systems refuse."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, HostArray], header: Mapping[str, Any] | None
) -> None:
    """Write NumPy arrays by name, and ``header`` (what JSON can hold, by name), as one safetensors file with a checksum.

    Raises:
        OSError: see ``write_atomically``.
    """
    from safetensors.numpy import save

    contiguous = {name: array if array.flags.c_contiguous else array.copy() for name, array in tensors.items()}
    text = json.dumps({_CHECKSUM: _NO_DIGITS.decode(), **(header or {})})
    content = save(contiguous, metadata={_KEY: text})
    begin, end = _digits(content)
    write_atomically(path, [content[:begin], b"%08x" % zlib.crc32(content), memoryview(content)[end:]])


def load_tensors(path: str | os.PathLike[str], *, checked: bool = False) -> tuple[dict[str, HostArray], Any]:
    """The arrays of a safetensors file, and the header that ``save_tensors`` put there (None in other people's files).

    The file is read once, and the arrays are views of what was read. ``checked``: it must have a checksum.

    Raises:
        ModelFormatError: not a whole safetensors file (a pickle, say), a header that is not JSON, bytes that are not those
            that the checksum was taken over, a dtype that NumPy does not have.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    with path.open("rb") as raw:
        content: HostArray = np.empty(os.fstat(raw.fileno()).st_size, np.uint8)
        size = raw.readinto(content)
    try:
        with safe_open(path, framework="numpy") as file:  # which reads and checks the header, and no more
            pieces = [(name, file.get_slice(name)) for name in file.offset_keys()]
            layout = [(name, piece.get_dtype(), piece.get_shape()) for name, piece in pieces]
            text = (file.metadata() or {}).get(_KEY)
        header = None if text is None else json.loads(text)
        digits = header.pop(_CHECKSUM, None) if isinstance(header, dict) else None
        if size != len(content) or (digits is not None and not _is_whole(content, digits)):
            raise ValueError("its content is not what its checksum was taken over")
        if checked and digits is None:
            raise ValueError("it has no checksum")
        return dict(_views(content, layout)), header or None
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        start = content[:2].tobytes()
        if start[:1] == b"\x80" or start == b"PK":
            raise ModelFormatError(
                f"{path} looks like a pickle or a PyTorch archive, which can run code when it is read; portacnn reads "
                "safetensors. Where you trust it, convert it where it was made: safetensors.torch.save_file(state_dict, ...), "
                "or of NumPy arrays safetensors.numpy.save_file(params, ...)"
            ) from None
        raise ModelFormatError(f"{path} is not a whole safetensors file: {error}") from error


def within(part: str, tensors: Mapping[str, HostArray]) -> dict[str, HostArray]:
    """Those of a file's arrays whose names begin with ``part`` and a dot, by the rest of their names."""
    return {name.removeprefix(f"{part}."): array for name, array in tensors.items() if name.startswith(f"{part}.")}


def _digits(content: bytes) -> tuple[int, int]:
    """Where in a file the checksum's digits begin and end. Raises ValueError where there are none."""
    begin = content.index(_MARK, 0, 8 + int.from_bytes(content[:8], "little")) + len(_MARK)
    return begin, begin + len(_NO_DIGITS)


def _is_whole(content: HostArray, digits: Any) -> bool:
    """Whether these are the bytes of uint8 that a checksum, as text, was taken over."""
    place = slice(*_digits(content[: 8 + int.from_bytes(content[:8].tobytes(), "little")].tobytes()))
    stated = content[place].tobytes()
    content[place] = np.frombuffer(_NO_DIGITS, np.uint8)
    return stated == b"%08x" % zlib.crc32(content) and stated.decode() == digits


def _views(content: HostArray, layout: Iterable[tuple[str, str, list[int]]]) -> Iterable[tuple[str, HostArray]]:
    """By name, the arrays that lie one after another behind the header of a file, (S,) of uint8."""
    begin = 8 + int.from_bytes(content[:8].tobytes(), "little")
    for name, kind, shape in layout:
        if kind not in _DTYPES:
            raise TypeError(f"{name} is of {kind}, which NumPy does not have")
        dtype = np.dtype(_DTYPES[kind])
        end = begin + dtype.itemsize * prod(shape)
        array = content[begin:end].view(dtype).reshape(shape)
        begin = end
        if kind == "BF16":
            yield name, (array.astype(np.uint32) << 16).view(np.float32)
        elif kind == "BOOL":
            yield name, array != 0
        else:
            yield name, array if array.flags.aligned else array.copy()
