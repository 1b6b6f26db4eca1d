"""README's programs run as printed, each by itself, from top to bottom in one empty folder. Those
of docs/ are Python, at least.

A block below ``<!-- not run: why -->`` (it needs a GPU or a download) is only compiled.
"""

import re
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

import pytest

import portacnn
from portacnn import data

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"(<!-- not run: .+? -->\n+)?^( *)```python\n(.*?)^\2```", re.M | re.S)


class Block(NamedTuple):
    where: str
    code: str
    runs: bool


def blocks(path):
    text = path.read_text(encoding="utf-8")
    return [
        Block(
            f"{path.name}:{text.count(chr(10), 0, found.start(3)) + 1}",
            dedent(found[3]),
            not found[1],
        )
        for found in _BLOCK.finditer(text)
    ]


README = blocks(ROOT / "README.md")


def test_all_blocks_are_found():
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        assert path.read_text(encoding="utf-8").count("```python") == len(blocks(path)), path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("empty")


@pytest.mark.parametrize("block", README, ids=lambda block: block.where)
def test_a_block_of_readme_runs_as_printed(block, folder, monkeypatch, capsys):
    """Over the first few of the bundled digits, for the sake of time. The folder keeps what earlier
    blocks have written."""
    program = compile(block.code, block.where, "exec")
    if not block.runs:
        pytest.skip("needs what is not here, as it says")
    if "onnx" in block.code:
        pytest.importorskip("onnx")

    def few(normalize=True, *arguments, **options):
        (x, t), (v, u) = data.load_mnist_sample(normalize, *arguments, **options)
        return (x[:200], t[:200]), (v[:50], u[:50])

    monkeypatch.delenv("PORTACNN_BACKEND", raising=False)
    monkeypatch.setattr(portacnn, "load_mnist_sample", few)
    monkeypatch.chdir(folder)
    exec(program, {"__name__": "__main__"})


@pytest.mark.parametrize(
    "block",
    [block for page in sorted((ROOT / "docs").glob("*.md")) for block in blocks(page)],
    ids=lambda b: b.where,
)
def test_a_block_of_docs_is_python(block):
    compile(block.code, block.where, "exec")
