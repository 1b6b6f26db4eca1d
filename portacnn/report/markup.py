"""HTML from Python values. All text goes through ``text``, so no value becomes markup."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from portacnn.text import cut, printable

_LONGEST = 200
_NUMBER = ' class="number"'


def text(value: object, longest: int = _LONGEST) -> str:
    """Return a value as text of an element or an attribute in double quotes."""
    return escape(cut(printable(str(value)), longest))


def data_uri(content: bytes, kind: str) -> str:
    """Return content as a URI that loads nothing."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def json_text(value: Any) -> str:
    """Return JSON for a script element: nothing in it ends the element or begins a comment."""
    written = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        written = written.replace(character, f"\\u{ord(character):04x}")
    return written


def pairs(values: Mapping[str, Any]) -> str:
    """Return a table of names and values."""
    rows = "".join(
        f'<tr><th scope="row">{text(name)}</th><td>{text(value, 1000)}</td></tr>'
        for name, value in values.items()
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="pairs"><tbody>{rows}</tbody></table></div>'
    )


def table(
    ident: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    numbers: Sequence[int] = (),
    sorts: bool = False,
    caption: str,
) -> str:
    """Return a table.

    Args:
        numbers: the columns of numbers, aligned right; a cell is a number, or (number, as text).
        sorts: whether the reader can sort it by a column.
    """
    head = "".join(
        f'<th scope="col"{_NUMBER if i in numbers else ""}>'
        + (f'<button type="button">{text(name)}</button>' if sorts else text(name))
        + "</th>"
        for i, name in enumerate(heads)
    )
    body = "".join(
        "<tr>" + "".join(_cell(i, cell, i in numbers) for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    kind = ' class="sorts"' if sorts else ""
    return (
        f'<div class="scroll" tabindex="0"><table id="{ident}"{kind}><caption>{text(caption)}'
        f"</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(column: int, cell: Any, number: bool) -> str:
    value, said = cell if isinstance(cell, tuple) else (cell, str(cell))
    tag = 'th scope="row"' if column == 0 else "td"
    attributes = f'{_NUMBER} data-value="{text(value)}"' if number else ""
    return f"<{tag}{attributes}>{text(said)}</{tag[:2]}>"


def section(ident: str, title: str, *parts: str) -> str:
    """Return a section with a heading."""
    return f'<section id="{ident}"><h2>{text(title)}</h2>{"".join(parts)}</section>'
