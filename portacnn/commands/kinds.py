"""What a setting may be: how it is read from the command line and from TOML, and how it is written
to TOML."""

import json
import re
import tomllib
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from portacnn import augment
from portacnn.arguments import told
from portacnn.errors import ArgumentError


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Attributes:
        expected: what a value must be, for messages.
        parse: makes a value from a word of the command line; raises ValueError. The message of an
            ArgumentError is shown.
        taken: returns the value for one from a TOML file, None if it is of another type. It may
            raise ArgumentError.
    """

    expected: str
    parse: Callable[[str], Any]
    taken: Callable[[Any], Any]

    def from_word(self, word: str) -> Any:
        """Return the value of a word of the command line. argparse reports the error."""
        try:
            return self.parse(word)
        except ArgumentError as error:
            raise ArgumentTypeError(str(error)) from None
        except ValueError:
            raise ArgumentTypeError(f"expected {self.expected}, got {told(word)}") from None

    def from_toml(self, where: str, value: Any) -> Any:
        """Return the value of a setting in a file. Raises ArgumentError, which names ``where``."""
        try:
            taken = self.taken(value)
        except ArgumentError as error:
            raise ArgumentError(f"{where}: {error}") from None
        if taken is None:
            raise ArgumentError(f"{where} must be {self.expected}, got {told(value)}")
        return taken


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and type(value) is not bool else None


def _typed(kind: type) -> Callable[[Any], Any]:
    return lambda value: value if type(value) is kind else None


def _words(value: Any) -> tuple[str, ...] | None:
    if isinstance(value, str):
        return _split(value)
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return tuple(value)
    return None


def _split(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _transforms(text: str) -> tuple[str, ...]:
    """Return the words of a list of transforms. Raises ArgumentError for an unknown one."""
    augment.named(text, (3, 32, 32))  # "standard" is known for every shape
    return _split(text)


def _augment(value: Any) -> tuple[str, ...] | None:
    if isinstance(value, bool):
        return ("standard",) if value else ()
    words = _words(value)
    return _transforms(",".join(words)) if words else words


def _number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _pair(text: str) -> dict[str, Any]:
    """Return {NAME: VALUE} of "NAME=VALUE". VALUE is a TOML value, else text."""
    name, equals, value = (part.strip() for part in text.partition("="))
    if not name or not equals:
        raise ValueError
    try:
        return {name: tomllib.loads(f"value = {value}")["value"]}
    except tomllib.TOMLDecodeError:
        return {name: value}


WHOLE = Kind("a whole number", int, _typed(int))
NUMBER = Kind("a number", float, _number)
TEXT = Kind("text", str, _typed(str))
FLAG = Kind("true or false", str, _typed(bool))
WORDS = Kind("words, separated by commas", _split, _words)
NUMBER_OR_WORD = Kind(
    "a number or a word",
    _number_or_word,
    lambda value: value if isinstance(value, str) else _number(value),
)
TRANSFORMS = Kind(
    "true, false, or transforms such as horizontal_flip,random_crop=2", _transforms, _augment
)
TABLE = Kind("NAME=VALUE", _pair, _typed(dict))


def positive(word: str) -> int:
    """Return a whole number of at least 1 from the command line, for argparse."""
    if not word.isdecimal() or int(word) < 1:
        raise ArgumentTypeError(f"expected a whole number of at least 1, got {told(word)}")
    return int(word)


# --- TOML -----------------------------------------------------------------------------------------

_BARE = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)


def toml(value: Any) -> str:
    """Return a value as TOML, in one line.

        >>> toml({"name": "a", "sizes": (1, 2.5, True)})
        '{name = "a", sizes = [1, 2.5, true]}'

    Raises:
        ArgumentError: for text that is not Unicode: the name of a file in another encoding.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ArgumentError(f"{told(value)} is not valid UTF-8; rename it") from None
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        pairs = (f"{toml_key(name)} = {toml(inner)}" for name, inner in value.items())
        return f"{{{', '.join(pairs)}}}"
    return f"[{', '.join(toml(inner) for inner in value)}]"


def toml_key(name: str) -> str:
    """Return a name as the key of a TOML table."""
    return name if _BARE.fullmatch(name) else toml(name)
