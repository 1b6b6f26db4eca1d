"""Print messages for people. A message that cannot be printed is dropped; it never stops the work.

Encodings and closed streams are handled here.
"""

import contextlib
import os
import sys
from typing import Any

_muted = False


def mute() -> None:
    """Make ``say`` print nothing from now on: this process is one of several, and another one
    speaks for all."""
    global _muted
    _muted = True


def say(*lines: str, error: bool = False) -> None:
    """Print lines to stdout, or to stderr if ``error``; nothing after ``mute``."""
    if not _muted:
        write(sys.stderr if error else sys.stdout, *lines)


def write(stream: Any, *lines: str) -> None:
    """Print lines to a stream.

    Characters that the stream's encoding lacks are escaped. If there is no stream (pythonw,
    ``>&-``), or it cannot be written to (a reader that has exited, a full disk), nothing is
    printed.
    """
    if stream is None:
        return
    with contextlib.suppress(OSError, ValueError):  # ValueError: it was closed
        stream.write("".join(f"{escaped(line, stream)}\n" for line in lines))
        stream.flush()


def escaped(text: str, stream: Any) -> str:
    """Return ``text`` with backslash escapes for characters that the stream's encoding lacks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        return text.encode(encoding, "backslashreplace").decode(encoding)
    except LookupError:  # an encoding that Python does not know
        return ascii(text)[1:-1]


def is_watched(stream: Any) -> bool:
    """Return whether output appears at once for a person: on a terminal, or in a notebook."""
    try:
        return stream is not None and (stream.isatty() or in_notebook(stream))
    except (AttributeError, ValueError):  # not a file, or closed
        return False


def in_notebook(stream: Any) -> bool:
    """Return whether a stream leads to a notebook."""
    return type(stream).__module__.partition(".")[0] == "ipykernel"


def speak_plainly() -> None:
    """Make ``print`` escape characters that its streams' encodings lack. Call it when a program
    starts."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def hang_up() -> None:
    """Drop output that could not be printed, or Python reports it at exit. Call it when a program
    ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
