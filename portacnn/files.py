"""Models in files: safetensors, with the architecture as JSON in the header. No pickle: reading a file runs nothing in it."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from portacnn.errors import ModelFormatError
from portacnn.runtime import HostArray

_KEY = "portacnn"


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all: to a neighbour first, to the disk, then renamed."""
    path = Path(path)
    handle, neighbour = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(neighbour, 0o666 & ~mask)  # mkstemp's are for the owner only
        os.replace(neighbour, path)
    except BaseException:
        os.unlink(neighbour)
        raise


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, HostArray], header: Any) -> None:
    """Write NumPy arrays by name, and ``header`` (anything JSON can hold), as one safetensors file."""
    from safetensors.numpy import save

    contiguous = {name: array if array.flags.c_contiguous else array.copy() for name, array in tensors.items()}
    write_atomic(path, save(contiguous, metadata={_KEY: json.dumps(header)}))


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, HostArray], Any]:
    """The arrays of a safetensors file, and the header that ``save_tensors`` put there (None in other people's files).

    Raises:
        ModelFormatError: not a whole safetensors file (a pickle, say), or a header that is not JSON.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    with path.open("rb") as file:
        start = file.read(2)
    if start[:1] == b"\x80" or start == b"PK":
        raise ModelFormatError(
            f"{path} looks like a pickle or a PyTorch archive, which can run code when it is read; portacnn reads "
            "safetensors. Where you trust it, convert it where it was made: safetensors.torch.save_file(state_dict, ...)"
        )
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            header = (file.metadata() or {}).get(_KEY)
        return tensors, None if header is None else json.loads(header)
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelFormatError(f"{path} is not a whole safetensors file: {error}") from error
