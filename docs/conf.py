"""Settings of Sphinx for the pages in this folder: ``make docs`` builds them into build/docs."""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # a checkout needs no installation

import figures  # noqa: E402

from portacnn.version import VERSION  # noqa: E402

project = "portacnn"
author = "the authors of portacnn"
project_copyright = author
release = version = VERSION

extensions = [
    "myst_nb",  # Markdown, and the notebook
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]

# Links to a heading of a page (training.md#signals) are GitHub's.
myst_heading_anchors = 4
# A notebook shows the outputs that are stored in it; a test runs it and compares.
nb_execution_mode = "off"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autosummary_generate = False  # the tables of a reference page link to the same page
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # an attribute may be a property too, which would be described twice
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"portacnn {VERSION}"
html_copy_source = False
html_show_sphinx = False


def plain_text(app, what, name, thing, options, lines: list[str]) -> None:
    """Turn a docstring, which is plain text for ``help()``, into reStructuredText.

    An indented block after an empty line is code. A star is a star: (N, C, *S) has no emphasis.
    """
    code, before, out = None, 0, []
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if code is not None and line.strip() and indent < code:
            code = None
        begins = number > 0 and not lines[number - 1].strip() and indent > before
        if code is None and begins and not line.lstrip().startswith(">>>"):
            code = indent
            out += [" " * before + "::", ""]
        if line.strip():
            before = indent
        literal = code is not None or line.lstrip().startswith((">>>", "..."))
        out.append(line if literal else _outside_literals(line))
    lines[:] = out


def _outside_literals(line: str) -> str:
    """Escape ``*``, ``|`` and a final ``_``, but not in double backticks, nor a bullet's star."""
    parts = line.split("``")
    parts[::2] = [re.sub(r"\*(?! \w)|\||(?<=\w)_(?!\w)", r"\\\g<0>", part) for part in parts[::2]]
    return "``".join(parts)


def setup(app) -> None:
    app.connect("builder-inited", lambda _: figures.draw())
    app.connect("autodoc-process-docstring", plain_text, priority=400)  # before napoleon's
