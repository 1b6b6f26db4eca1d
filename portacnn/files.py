"""Write files atomically, and read and write arrays as safetensors, with a JSON header.

Pickle is not used: reading a file executes nothing in it. The header contains a checksum of the
whole file, so a file damaged by a disk or a copy is detected.
"""

import contextlib
import errno
import json
import os
import secrets
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from portacnn.errors import ArgumentError, ModelFormatError
from portacnn.file_kinds import FIRST, kind_of
from portacnn.runtime import HostArray
from portacnn.text import quoted, shown

_KEY = "portacnn"
_CHECKSUM = "checksum"
_MARK = json.dumps(json.dumps({_CHECKSUM: ""})[1:-2])[
    1:-1
].encode()  # JSON in a JSON string: the text before the digits
_NO_DIGITS = b"0" * 8  # placeholder while the CRC-32 is computed
_LONGEST_PATH = 1 << 15  # characters; no system supports more
_LONGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors library
# bytes of a file's name in its temporary name: some file systems allow 143 in all
_LONGEST_PREFIX = 100
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
"""The NumPy dtype of the bytes. NumPy has no bfloat16: those become float32, which holds every
value."""
_BITS = {
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
    "C64": 64,
}
"""Bits per element of the other dtypes of safetensors. Such tensors are skipped as long as nobody
needs them."""


@dataclass(frozen=True)
class Unreadable:
    """Stands for a tensor of a dtype that NumPy does not have."""

    dtype: str
    shape: tuple[int, ...]


def file_path(path: Any, what: str = "a file") -> Path:
    """Return the path of a file that the caller named. Raises ArgumentError if it is not a path."""
    if isinstance(path, str | os.PathLike):
        name = os.fspath(path)
        if isinstance(name, str) and 0 < len(name) <= _LONGEST_PATH and "\0" not in name:
            return Path(name)
        raise ArgumentError(
            f"expected the path of {what}, got {len(name)} characters: {quoted(name)}"
        )
    size = f" of {len(path)} bytes" if isinstance(path, bytes | bytearray | memoryview) else ""
    raise ArgumentError(
        f"expected the path of {what} (str or os.PathLike), got {type(path).__name__}{size}"
    )


def make_folder(
    path: str | os.PathLike[str], purpose: str = "checkpoints", another: str = "folder"
) -> Path:
    """Create a folder and check that it can be written to, before a long run depends on it.

    Args:
        purpose: what the folder is for, and ``another``: what to choose instead; both for the
            message.

    Raises:
        OSError: if it cannot be created or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise OSError(
            f"cannot create the folder {folder} for {purpose}: {why}; choose another {another}"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write to {folder}; choose another {another}")
    return folder


def write_atomically(
    path: str | os.PathLike[str], content: bytes | Iterable[bytes | memoryview]
) -> None:
    """Write a file so that ``path`` holds either all of ``content`` or its old content, even after
    a crash.

    The bytes go to a temporary file in the same folder, are flushed to the disk, and then the file
    is renamed. If ``path`` is a symbolic link, its target is replaced. The new file keeps the old
    one's mode and, if the system allows it, its owner.

    Args:
        content: the bytes, or pieces of them, which avoids holding a large file in memory twice.

    Raises:
        OSError: if the folder is missing or read-only, or the disk is full; it names ``path``. The
            temporary file is removed.
    """
    named = file_path(path)
    target = link_target(named)
    before = _status(target, named)
    # Not tempfile: its files are private to this user, whereas a cache may be shared and should
    # follow the umask.
    temporary = target.with_name(
        f".{beginning(target.name, _LONGEST_PREFIX)}.{secrets.token_hex(8)}.tmp"
    )
    mode = 0o666 if before is None else stat.S_IMODE(before.st_mode)
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            if before is not None:
                _keep_status(file, temporary, before)
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, FileNotFoundError) and not target.parent.exists():
            why = f"there is no folder {target.parent}; create it first"
            raise FileNotFoundError(errno.ENOENT, why, str(named)) from error
        if (
            isinstance(error, OSError)
            and error.errno is not None
            and error.filename in (None, str(temporary))
        ):
            error.filename = str(named)  # the name that the caller knows
            del error.filename2  # None would be shown as a second name
        raise
    _sync_folder(target.parent)


def beginning(name: str, most: int) -> str:
    """Return the beginning of a file's name, of at most ``most`` bytes."""
    return os.fsencode(name)[:most].decode("utf-8", "ignore")


def link_target(path: Path) -> Path:
    """Return the target of a symbolic link; any other path is returned as it is."""
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():  # a link to itself, by way of others
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return target


def _status(target: Path, named: Path) -> os.stat_result | None:
    """Return the status of the file to be replaced, None if there is none. Raises OSError if it is
    not a regular file."""
    try:
        status = target.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(named))
    if not stat.S_ISREG(
        status.st_mode
    ):  # for example a device, which must not be replaced by a file
        raise OSError(errno.EINVAL, "not a regular file", str(named))
    return status


def _keep_status(file: IO[bytes], temporary: Path, before: os.stat_result) -> None:
    """Give a new file the owner and the mode of the file that it will replace."""
    own = os.fstat(file.fileno())
    if hasattr(os, "fchown") and (own.st_uid, own.st_gid) != (before.st_uid, before.st_gid):
        with contextlib.suppress(OSError):
            os.fchown(file.fileno(), before.st_uid, before.st_gid)
    os.chmod(temporary, stat.S_IMODE(before.st_mode))


def _sync_folder(folder: Path) -> None:
    """Flush the new name in ``folder`` to the disk, if the system can: Windows and some file
    systems cannot."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, HostArray], header: Mapping[str, Any] | None
) -> None:
    """Write NumPy arrays by name, and ``header`` (JSON values by name), as a safetensors file with
    a checksum.

    Raises:
        OSError: see ``write_atomically``.
    """
    from safetensors.numpy import save

    contiguous = {
        name: array if array.flags.c_contiguous else array.copy() for name, array in tensors.items()
    }
    text = json.dumps({_CHECKSUM: _NO_DIGITS.decode(), **(header or {})})
    content = save(contiguous, metadata={_KEY: text})
    begin, end = _digits(content)
    write_atomically(
        path, [content[:begin], b"%08x" % zlib.crc32(content), memoryview(content)[end:]]
    )


def load_tensors(
    path: str | os.PathLike[str], *, checked: bool = False
) -> tuple[dict[str, Any], Any]:
    """Return the arrays of a safetensors file, and the header from ``save_tensors`` (None in other
    files).

    The file is opened and read once: if it is replaced meanwhile, the result is the old file or the
    new one. The arrays are views of the bytes read. A tensor of a dtype that NumPy does not have is
    ``Unreadable``.

    Args:
        checked: require a checksum.

    Raises:
        ModelFormatError: if it is not an intact safetensors file (the message says what it seems to
            be), the header is not JSON, or the checksum does not match.
    """
    path = file_path(path)
    start = b""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            start = file.read(8)
            length = _header_length(start, size)
            start += file.read(length)
            layout, metadata = _parsed(start[8:], size - len(start))
            text = metadata.get(_KEY)
            header = None if text is None else json.loads(text)
            content: HostArray = np.empty(size, np.uint8)
            content[: len(start)] = np.frombuffer(start, np.uint8)
            if len(start) + (file.readinto(content[len(start) :]) or 0) != size or file.read(1):
                raise ValueError("it changed while it was read")
            digits = header.pop(_CHECKSUM, None) if isinstance(header, dict) else None
            if digits is not None and not _is_whole(content, digits):
                raise ValueError("its content does not match its checksum")
            if checked and digits is None:
                raise ValueError("it has no checksum")
            return dict(_views(content, layout)), header or None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            file.seek(0)
            kind = kind_of(file.read(FIRST))
            if kind is None or "safetensors file" in kind:
                raise ModelFormatError(
                    f"{path} is not an intact safetensors file: {error}"
                ) from error
            raise ModelFormatError(
                f"{path} is not an intact safetensors file, it looks like {kind}"
            ) from None


def _header_length(start: bytes, size: int) -> int:
    """Return the header's length in bytes, from the first 8 bytes of a file of this size. Raises
    ValueError."""
    if len(start) < 8:
        raise ValueError(f"it has {size} bytes, but the length of its header alone takes 8")
    length = int.from_bytes(start, "little")
    if length > min(size - 8, _LONGEST_HEADER):
        raise ValueError(f"its header should have {length} bytes, but the file has {size}")
    return length


Layout = list[tuple[str, str, tuple[int, ...]]]
"""Name, dtype and shape of the tensors, in the order in which they are stored."""


def _parsed(text: bytes, size: int) -> tuple[Layout, dict[str, str]]:
    """Return the tensors and the metadata of a header that is followed by ``size`` bytes.

    Raises:
        ValueError, TypeError, RecursionError: if it is not a header, or its tensors do not cover
            exactly those bytes.
    """
    header = json.loads(text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number)
    if not isinstance(header, dict) or text[:1] != b"{":
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise ValueError("its metadata must be a JSON object of strings")
    found = []
    for name, described in header.items():
        if not isinstance(described, dict) or described.keys() != {
            "dtype",
            "shape",
            "data_offsets",
        }:
            raise ValueError(f"tensor {quoted(name)} must have dtype, shape and data_offsets")
        kind, shape, offsets = described["dtype"], described["shape"], described["data_offsets"]
        if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
            raise ValueError(
                f"shape and data_offsets of tensor {quoted(name)} must be lists of whole numbers"
            )
        if not isinstance(kind, str) or not (bits := _bits(kind)):
            raise ValueError(f"tensor {quoted(name)} has the unknown dtype {quoted(kind)}")
        begin, end = offsets
        if 8 * (end - begin) != bits * prod(shape):
            raise ValueError(
                f"tensor {quoted(name)} of shape {quoted(shape)} does not take {end - begin} bytes"
            )
        found.append((begin, end, name, kind, tuple(shape)))
    found.sort(key=lambda tensor: tensor[:2])
    place = 0
    for begin, end, name, *_ in found:
        if begin != place:
            raise ValueError(
                f"tensor {quoted(name)} begins at {begin}, but the previous one ends at {place}"
            )
        place = end
    if place != size:
        raise ValueError(f"its tensors take {place} bytes, but there are {size}")
    return [(name, kind, shape) for _, _, name, kind, shape in found], metadata


def _bits(kind: str) -> int:
    """Return the bits of one element, 0 for an unknown dtype."""
    return 8 * np.dtype(_DTYPES[kind]).itemsize if kind in _DTYPES else _BITS.get(kind, 0)


def _are_counts(values: Any) -> bool:
    """Return whether it is a list of whole numbers that can be a shape."""
    return (
        isinstance(values, list)
        and all(type(n) is int and 0 <= n < 1 << 63 for n in values)
        and len(values) <= 64
    )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header contains a name twice")
    return found


def _no_number(word: str) -> None:
    raise ValueError(f"its header contains {shown(word)}, which is not a JSON number")


def within(part: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arrays whose names begin with ``part`` and a dot, by the rest of their names."""
    return {
        name.removeprefix(f"{part}."): array
        for name, array in tensors.items()
        if name.startswith(f"{part}.")
    }


def _digits(content: bytes) -> tuple[int, int]:
    """Return the start and the end of the checksum's digits in a file. Raises ValueError if there
    are none."""
    begin = content.index(_MARK, 0, 8 + int.from_bytes(content[:8], "little")) + len(_MARK)
    return begin, begin + len(_NO_DIGITS)


def _is_whole(content: HostArray, digits: Any) -> bool:
    """Return whether a checksum, as text, matches these bytes of uint8."""
    place = slice(
        *_digits(content[: 8 + int.from_bytes(content[:8].tobytes(), "little")].tobytes())
    )
    stated = content[place].tobytes()
    content[place] = np.frombuffer(_NO_DIGITS, np.uint8)
    return stated == b"%08x" % zlib.crc32(content) and stated.decode() == digits


def _views(content: HostArray, layout: Layout) -> Iterator[tuple[str, Any]]:
    """Yield the arrays stored behind the header of a file, (S,) of uint8, with their names."""
    begin = 8 + int.from_bytes(content[:8].tobytes(), "little")
    for name, kind, shape in layout:
        end = begin + _bits(kind) * prod(shape) // 8
        part, begin = content[begin:end], end
        if kind not in _DTYPES:
            yield name, Unreadable(kind, shape)
            continue
        array = part.view(_DTYPES[kind]).reshape(shape)
        if kind == "BF16":
            yield name, (array.astype(np.uint32) << 16).view(np.float32)
        elif kind == "BOOL":
            yield name, array != 0
        else:
            yield name, array if array.flags.aligned else array.copy()
