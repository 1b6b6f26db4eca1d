"""Files, written whole or not at all, and models in them: safetensors, with the architecture as JSON in the header.

No pickle: reading a file runs nothing that is in it.
"""

import contextlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from portacnn.errors import ModelFormatError
from portacnn.runtime import HostArray

_KEY = "portacnn"


def write_atomically(path: str | os.PathLike[str], content: bytes | Iterable[bytes]) -> None:
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
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, HostArray], header: Any) -> None:
    """Write NumPy arrays by name, and ``header`` (anything JSON can hold), as one safetensors file."""
    from safetensors.numpy import save

    contiguous = {name: array if array.flags.c_contiguous else array.copy() for name, array in tensors.items()}
    write_atomically(path, save(contiguous, metadata={_KEY: json.dumps(header)}))


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, HostArray], Any]:
    """The arrays of a safetensors file, and the header that ``save_tensors`` put there (None in other people's files).

    Raises:
        ModelFormatError: not a whole safetensors file (a pickle, say), or a header that is not JSON.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    with path.open("rb") as raw:
        start = raw.read(2)
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            header = (file.metadata() or {}).get(_KEY)
        return tensors, None if header is None else json.loads(header)
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if start[:1] == b"\x80" or start == b"PK":
            raise ModelFormatError(
                f"{path} looks like a pickle or a PyTorch archive, which can run code when it is read; portacnn reads "
                "safetensors. Where you trust it, convert it where it was made: safetensors.torch.save_file(state_dict, ...), "
                "or of NumPy arrays safetensors.numpy.save_file(params, ...)"
            ) from None
        raise ModelFormatError(f"{path} is not a whole safetensors file: {error}") from error
