"""Words for a person. They are printed where that is possible, and left out where it is not: they
never stop the work."""

import contextlib
import os
import sys
from typing import Any


def say(*lines: str, error: bool = False) -> None:
    """Print lines to stdout, or with ``error`` to stderr.

    What the stream's encoding lacks is escaped. Without a stream (pythonw, ``>&-``), or where it
    takes nothing any more (a reader that has ended, a full disk), nothing is printed.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is None:
        return
    with contextlib.suppress(OSError, ValueError):  # ValueError: it was closed
        stream.write("".join(f"{escaped(line, stream)}\n" for line in lines))
        stream.flush()


def escaped(text: str, stream: Any) -> str:
    """``text`` with what the stream's encoding lacks in backslash notation."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        return text.encode(encoding, "backslashreplace").decode(encoding)
    except LookupError:  # an encoding that Python does not know
        return ascii(text)[1:-1]


def is_watched(stream: Any) -> bool:
    """Whether a person sees at once what is printed there: on a terminal, or in a notebook."""
    try:
        return stream is not None and (stream.isatty() or "ipykernel" in sys.modules)
    except (AttributeError, ValueError):  # no file at all, or a closed one
        return False


def speak_plainly() -> None:
    """For a program, at its start: from now on ``print`` escapes what its streams' encodings
    lack."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def hang_up() -> None:
    """For a program, at its end: drop words that could not be printed, or Python complains of them
    when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
