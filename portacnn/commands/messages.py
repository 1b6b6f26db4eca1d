"""Messages of errors in the words of the command line."""

import re
from collections.abc import Iterable

_OTHER_NAMES = {"evaluate_sample_num_per_epoch": "evaluate_images"}
"""Arguments in Python whose options are called otherwise."""
_QUOTES = "\"'"


def message(error: BaseException) -> str:
    """Return what an error says: of an error of the system, the file and the reason."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def in_options(text: str, names: Iterable[str]) -> str:
    """Return a message with options in place of the arguments of Python that it names.

        >>> in_options("image_size=20 is too large; leave image_size out", ["image_size"])
        '--image-size 20 is too large; leave --image-size out'

    Args:
        names: the arguments that are options.
    """
    known = {name: name for name in names}
    known |= {name: option for name, option in _OTHER_NAMES.items() if option in known}
    if not known:
        return text

    def option(match: re.Match[str]) -> str:
        value = match["value"]
        word = f"--{known[match['name']].replace('_', '-')}"
        return word if value in (None, "True") else f"{word} {value.strip(_QUOTES)}"

    every = "|".join(map(re.escape, known))
    longer = "|".join(re.escape(name) for name in known if "_" in name) or "(?!)"
    for pattern in (
        rf"(?<![\w.(/-])(?P<name>{every})=(?P<value>\"[^\"]*\"|'[^']*'|[\w.+-]*\w)(?![\w(])",
        rf"(?<![\w.(/=-])(?P<name>{longer})(?P<value>(?!))?(?![\w(/=])",  # no word of English
        rf"^(?P<name>{every})(?P<value>(?!))?(?= must | is \d)",
        rf"(?<=leave )(?P<name>{every})(?P<value>(?!))?(?= out)",
    ):
        text = re.sub(pattern, option, text)
    return text
