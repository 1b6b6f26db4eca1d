"""Text that others wrote, for messages: escaped, so that it cannot steer a terminal or forge a line
of a log, and cut."""

from collections.abc import Sequence

_NAME = 80  # characters
_MESSAGE = 3000


def printable(text: str) -> str:
    """The text with everything unprintable in it escaped: control characters, new lines, marks that
    turn the direction."""
    return (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    )


def cut(text: str, most: int = _NAME) -> str:
    """The text if it has at most so many characters, else its beginning and its end."""
    if len(text) <= most:
        return text
    end = most // 4
    return f"{text[: most - end - 5]} ... {text[-end:]}"


def shown(text: object) -> str:
    """A name or a path from a file: cut and printable."""
    return printable(cut(str(text)))


def quoted(text: object) -> str:
    """The same in quotes."""
    return repr(cut(str(text)))


def listed(names: Sequence[object], most: int = 16) -> str:
    """Names from a file, the first few and how many more there are."""
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more


def message(text: str) -> str:
    """A whole message, whatever has got into it; what it ends with, which says what to do,
    stays."""
    return printable(cut(text, _MESSAGE))
