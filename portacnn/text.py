"""Untrusted text in messages: escaped and shortened.

Escaping prevents that a text controls the terminal or forges a line of a log.
"""

from collections.abc import Sequence

_NAME = 80  # characters
_MESSAGE = 3000


def printable(text: str) -> str:
    """Escape all unprintable characters: control characters, line breaks, bidirectional marks."""
    return (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    )


def cut(text: str, most: int = _NAME) -> str:
    """Shorten a text of more than ``most`` characters to its beginning and its end."""
    if len(text) <= most:
        return text
    end = most // 4
    return f"{text[: most - end - 5]} ... {text[-end:]}"


def shown(text: object) -> str:
    """Return a name or path from a file, shortened and escaped."""
    return printable(cut(str(text)))


def quoted(text: object) -> str:
    """Return a name or path from a file in quotes, shortened and escaped."""
    return repr(cut(str(text)))


def listed(names: Sequence[object], most: int = 16) -> str:
    """Join the first ``most`` names from a file, and add the number of the others."""
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more


def class_names(names: Sequence[str] | None, count: int) -> list[str]:
    """Return a name for each of ``count`` classes: those that are known, or else their numbers."""
    return list(map(str, names if names and len(names) == count else range(count)))


def message(text: str) -> str:
    """Escape and shorten a whole message. Its end, which has the fix, is kept."""
    return printable(cut(text, _MESSAGE))
