"""README and docs/ hold what they print: each page's Python runs, its outputs come, its commands
and links exist.

The convention:

- The ```python blocks of a page run in order, as one program, in an empty folder.
- A ```text block that follows a ```python block directly is what that block prints. Whole numbers
  and words must be equal; decimal numbers agree within 1% or one unit of the last printed digit,
  since the order of summation moves a trained network.
- ``<!-- needs: gpu -->``, ``download`` or ``commands`` (what commands of the page write) above a
  block: it is compiled, not run.
  ``<!-- needs: onnx -->`` (any package): it runs if the package is installed.
- ``<!-- test: slow -->`` above a block, after ``needs``: `make test` compiles it, and the slow
  tests run it. Blocks that use its names are slow too.
- ```sh blocks are commands: the files, options, extras and groups that they name exist.
"""

import ast
import contextlib
import io
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from portacnn.cli import COMMANDS, main
from support.matrix import needs
from support.processes import without_settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIAL = [page for page in PAGES if page.parent.name == "tutorial"]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

_FENCE = re.compile(
    r"^(?:<!-- needs: (?P<needs>\w+) -->\n+)?(?P<slow><!-- test: slow -->\n+)?"
    r"(?P<indent> *)```(?P<kind>\w*)\n(?P<text>.*?)^ *```$",
    re.M | re.S,
)
# numba takes seconds to load, and more if its cache is empty
QUICK = {"PORTACNN_KERNELS": "native", "PORTACNN_NUM_THREADS": "1"}
_END = "\x1e"  # printed after each block, so that its output can be told from the next one's


class Block(NamedTuple):
    kind: str
    text: str
    line: int  # of its first line in the page, from 1
    needs: str | None
    slow: bool
    follows: bool  # directly after the block before it

    def runs(self, slow: bool) -> bool:
        if self.slow and not slow:
            return False
        if self.needs in (None, "toyarray", "gpu", "download", "commands"):
            return self.needs in (None, "toyarray")
        spec = find_spec(self.needs)  # tests/onnx looks like a package, but has no origin
        return spec is not None and spec.origin is not None


def blocks(page: Path) -> list[Block]:
    text, found, end = page.read_text(encoding="utf-8"), [], 0
    for match in _FENCE.finditer(text):
        code = re.sub(f"^{match['indent']}", "", match["text"], flags=re.M)
        line = text.count("\n", 0, match.start("text")) + 1
        between = text[end : match.start()].strip()
        follows = between in ("", "It prints:")
        found.append(
            Block(match["kind"], code, line, match["needs"], match["slow"] is not None, follows)
        )
        end = match.end()
    assert text.count("```") == 2 * len(found), f"{page.name}: a fence was not found"
    return found


def program(page: Path, slow: bool) -> str:
    """The page's Python, each line where it stands in the page, so that a traceback names it."""
    lines: list[str] = []
    for block in blocks(page):
        if block.kind == "python" and block.runs(slow):
            lines += [""] * (block.line - 1 - len(lines)) + block.text.splitlines()
            lines.append(f"print({_END!r}, end='', flush=True)")
    return "\n".join(lines)


_DECIMAL = re.compile(r"-?\d+\.\d+(?:e[-+]?\d+)?")


def assert_printed(expected: str, came: str, where: str) -> None:
    assert _DECIMAL.sub("#", came.strip()) == _DECIMAL.sub("#", expected.strip()), where
    for right, got in zip(_DECIMAL.findall(expected), _DECIMAL.findall(came), strict=True):
        last_digit = float(Decimal(1).scaleb(int(Decimal(right).as_tuple().exponent)))
        assert float(got) == pytest.approx(float(right), rel=0.01, abs=1.01 * last_digit), (
            f"{where}: prints\n{came}"
        )


# A process that has imported what takes long, and runs each page in a forked child.
_SERVER = """
import contextlib, json, os, runpy, signal, sys, traceback
import portacnn
with contextlib.suppress(ImportError):
    import matplotlib.backends.backend_agg, matplotlib.figure
for line in sys.stdin:
    script, folder, seconds, *outputs = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        os.chdir(folder)
        for number, name in enumerate(outputs, 1):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
        status = 1
        try:
            runpy.run_path(script, run_name="__main__")
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def run_script() -> Iterator[Callable[..., tuple[int, str, str]]]:
    """A function that runs a script in a folder: its exit status and what it prints."""
    server = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", _SERVER],
        env={**without_settings(), **QUICK, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(script: Path, folder: Path, seconds: int) -> tuple[int, str, str]:
        outputs = [script.with_suffix(f".{name}") for name in ("out", "err")]
        task = [str(script), str(folder), seconds, *map(str, outputs)]
        print(json.dumps(task), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return status, *(output.read_text(encoding="utf-8") for output in outputs)

    with server:
        yield run


@pages
def test_a_page_runs_as_printed(page: Path, tmp_path: Path, run_script: Callable[..., Any]):
    run_and_compare(page, tmp_path, run_script, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES if "<!-- test: slow -->" in p.read_text()], ids=lambda p: p.name
)
def test_a_page_with_slow_blocks_runs_as_printed(
    page: Path, tmp_path: Path, run_script: Callable[..., Any]
):
    run_and_compare(page, tmp_path, run_script, slow=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", [pytest.param("torch", marks=needs("torch")), "array_api_strict:device1"]
)
@pytest.mark.parametrize("page", TUTORIAL, ids=lambda page: page.name)
def test_a_page_of_the_tutorial_prints_the_same_on_other_backends(
    page: Path, backend: str, tmp_path: Path, run_script: Callable[..., Any]
):
    run_and_compare(page, tmp_path, run_script, slow=False, backend=backend)


def run_and_compare(
    page: Path, tmp_path: Path, run_script: Callable[..., Any], slow: bool, backend: str = ""
) -> None:
    every = blocks(page)
    for block in every:
        if block.kind == "python":
            compile(block.text, f"{page.name}:{block.line}", "exec")
    if not any(block.kind == "python" and block.runs(slow) for block in every):
        return
    script = tmp_path / f"page_{page.stem}.py"  # not onnx.py, which would be imported
    before = f"import os; os.environ['PORTACNN_BACKEND'] = {backend!r}; " if backend else ""
    if any(block.needs == "toyarray" for block in every):
        before += f"import sys; sys.path.append({str(ROOT / 'tests' / 'toy')!r}); "
    script.write_text(before + program(page, slow), encoding="utf-8")
    folder = tmp_path / "empty"
    folder.mkdir()
    status, printed, errors = run_script(script, folder, 300 if slow else 120)
    assert status == 0, errors
    outputs, last = iter(printed.split(_END)), ""
    for before, block in zip([None, *every], every, strict=False):
        if block.kind == "python" and block.runs(slow):
            last = next(outputs)
        elif block.kind == "text" and block.follows and before is not None:
            assert before.kind == "python", f"{page.name}:{block.line}: the output of what?"
            if before.runs(slow):
                assert_printed(block.text, last, f"{page.name}:{block.line}")


def test_the_page_of_backends_shows_the_adapter_of_the_toy_library():
    adapter = (ROOT / "tests" / "toy" / "toyarray_portacnn.py").read_text(encoding="utf-8")
    assert adapter in [block.text for block in blocks(ROOT / "docs" / "backends.md")]


# --- commands, links and names --------------------------------------------------------------------


@cache
def options_of(script: str) -> frozenset[str]:
    """The options that the command's help lists, or that the script's source adds."""
    if script.startswith("portacnn "):
        told = io.StringIO()
        with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
            main([*script.split()[1:], "--help"])
        return frozenset(re.findall(r"--[a-z][a-z0-9-]*", told.getvalue()))
    source = (ROOT / script).read_text(encoding="utf-8")
    return frozenset({"--help", *re.findall(r"[\"'](--[a-z][a-z-]*)[\"']", source)})


def commands(page: Path) -> list[str]:
    """The lines of ```sh blocks, continued ones joined, without comments; and commands in the
    text."""
    text = page.read_text(encoding="utf-8")
    lines = [
        re.sub(r"(^|\s)#.*", "", line)
        for block in blocks(page)
        if block.kind == "sh"
        for line in block.text.replace("\\\n", " ").splitlines()
    ]
    return lines + re.findall(r"(?<!`)`((?:python |portacnn |pip |make )[^`]+)`", text)


@pages
def test_commands_name_what_exists(page: Path):
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for line in commands(page):
        for target in re.findall(r"\bmake ([a-z]+)", line):
            assert target in targets, line
        for extras in re.findall(r"(?:portacnn|\.)\[([\w,]+)\]", line):
            assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"]), line
        for group in re.findall(r"--group (\S+)", line):
            assert group in project["dependency-groups"], line
        for script, rest in re.findall(r"python (scripts/\S+\.py)(.*)", line):
            script = "portacnn train" if script == "scripts/train.py" else script
            assert set(re.findall(r"--[a-z][a-z-]*", rest)) <= options_of(script), line
        for name, rest in re.findall(r"portacnn (search [a-z]+|[a-z]+)\b(.*)", line):
            assert name.split()[0] in COMMANDS, line
            words = set(re.findall(r"--[a-z][a-z0-9-]*", rest))
            assert not words or words <= options_of(f"portacnn {name}"), line


def anchors(page: Path) -> set[str]:
    """GitHub's names of a page's headings."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, re.M)
    }


@pages
def test_links_lead_somewhere(page: Path):
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if path.startswith("drawn/"):  # by docs/figures.py, when the pages are built
            assert Path(path).stem in defined(ROOT / "docs" / "figures.py"), f"{page.name}: {link}"
            continue
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


_PATH = re.compile(
    r"\b(?:portacnn|backends|tests|scripts|docs)/[\w/.-]*[\w/](?!\S*\s+\(a new file)"
)


@pages
def test_files_and_variables_exist(page: Path):
    """Paths in the checkout, wherever they are named, and environment variables."""
    text = page.read_text(encoding="utf-8")
    for path in _PATH.findall(text):
        assert (ROOT / path).exists(), f"{page.name}: {path}"
    source = "".join(path.read_text() for path in named_files())
    for variable in set(re.findall(r"\bPORTACNN_[A-Z_]+", text)):
        assert f'"{variable}"' in source, f"{page.name}: {variable}"


@cache
def named_files() -> tuple[Path, ...]:
    folders = ("portacnn", "backends", "tests/support", "tests/conftest.py")
    return tuple(path for name in folders for path in python_files(ROOT / name))


def python_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


@cache
def defined(path: Path) -> frozenset[str]:
    """The names that a module defines: functions, classes, their methods, variables."""
    found = set[str]()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(prefix + t.id for t in targets if isinstance(t, ast.Name))

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return frozenset(found)


@pages
def test_functions_are_where_the_page_says(page: Path):
    """`` `Trainer.step` (`portacnn/training/trainer.py`) `` names a definition in that file."""
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`([A-Za-z_][\w.]*)`\s+\(`([\w/]+\.py)`\)", text)
    assert named or page.name != "architecture.md"
    for name, path in named:
        assert name in defined(ROOT / path), f"{page.name}: {path} does not define {name}"


# --- form -----------------------------------------------------------------------------------------

# STYLE's "Words": what a reader of PyTorch's and NumPy's documentation has to guess at.
_AVOIDED = re.compile(
    r"\b(room|cards?|gives?|gave|gives back|reckoned|mend(?:ed)?|of (?:its|one's|their|your) own|"
    r"to be had|cannot be had|broken off|the way back|the interpreter's lock|by itself)\b"
)


@pages
def test_a_page_keeps_to_the_words_and_the_width(page: Path):
    text = page.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        wide = line.startswith(("|", "!")) or "https://" in line  # a table's row is one line
        assert len(line) <= 100 or wide, f"{page.name}:{number}: {len(line)} columns"
    prose = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text))
    assert not (found := _AVOIDED.findall(prose)), f"{page.name}: {found}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
