"""Plant mistakes in a copy of this checkout, one at a time, and see whether the quick tests find
them.

    python tests/tools/mutants.py                      # all of them; hours on one core
    python tests/tools/mutants.py --only ops/conv      # those whose file has this in its path
    python tests/tools/mutants.py --survivors          # those that survived last time

The mistakes stand in planted/*.txt, each as

    @ portacnn/optim/base.py: the learning rate of a loaded state is dropped
    -self.lr, self.steps, self.counts = lr, steps, counts
    +self.steps, self.counts = steps, counts

The text of the "-" lines occurs exactly once in the file and is replaced by that of the "+" lines.
For each mistake, the test that found it last time runs first, then the test files of the same area
(planted/first_tests), then the whole quick suite (``-m "not slow"``), each until its first failure.
The test that failed must pass without the mistake. Results are kept in a JSON file after every
mistake, so a run that was stopped continues. A mistake in code whose tests need a package that is
not installed is left out. POSIX only.
"""

import argparse
import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from random import Random
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PLANTED = Path(__file__).parent / "planted"
RESULTS = ROOT / ".mutants.json"
TIMEOUT = 900  # seconds of one run of tests; a mistake that makes tests hang is caught
NEEDS = {
    "backends/numba": "numba",
    "backends/torch": "torch",
    "portacnn/onnx/": "onnxruntime",
}
"""Packages without which the tests of these files are skipped."""
HANGS = "hangs"
_NOT_FOUND = 4  # pytest's exit status


class Mutant(NamedTuple):
    """One mistake."""

    path: str
    note: str
    old: str
    new: str

    @property
    def name(self) -> str:
        return f"{self.path}: {self.note}"

    @property
    def needs(self) -> str | None:
        """The package that its tests need, if there is one."""
        return next((need for start, need in NEEDS.items() if self.path.startswith(start)), None)


def parsed(text: str) -> Iterator[Mutant]:
    """The mistakes in a file of planted/. Raises ValueError for a line that has no meaning."""
    path, note, old, new = "", "", [], []  # type: ignore[var-annotated]
    for line in [*text.splitlines(), "@"]:
        if line.startswith("@"):
            if path:
                yield Mutant(path, note, "\n".join(old), "\n".join(new))
            path, _, note = line[1:].strip().partition(": ")
            old, new = [], []
        elif line[:1] in ("-", "+"):
            (old if line[0] == "-" else new).append(line[1:])
        elif line and not line.startswith("#"):
            raise ValueError(f"expected a line that begins with @, -, + or #, got {line!r}")


def mutants() -> list[Mutant]:
    """All mistakes, in the order of the files."""
    return [m for file in sorted(PLANTED.glob("*.txt")) for m in parsed(file.read_text())]


@cache
def first_tests() -> dict[str, list[str]]:
    """By the beginning of a source file's path, the test files to run first."""
    rows = (PLANTED / "first_tests").read_text().splitlines()
    pairs = (row.split(": ") for row in rows if not row.startswith("#"))
    return {start: [_test_file(word) for word in words.split()] for start, words in pairs}


def _test_file(word: str) -> str:
    folder, _, name = word.rpartition("/")
    return str(Path("tests", folder, f"test_{name.removeprefix('test_')}.py"))


def first_for(path: str) -> list[str]:
    """The test files to run first for a mistake in this file."""
    fitting = [start for start in first_tests() if path.startswith(start)]
    return first_tests()[max(fitting, key=len)] if fitting else []


def problems(found: Sequence[Mutant]) -> list[str]:
    """What is wrong with a list of mistakes: texts that do not occur once, names that occur
    twice."""
    names = Counter(m.name for m in found)
    wrong = [f"{name}: is there {count} times" for name, count in names.items() if count > 1]
    for m in found:
        file = ROOT / m.path
        count = file.read_text(encoding="utf-8").count(m.old) if file.is_file() else 0
        if count != 1 or not m.old or m.old == m.new:
            wrong.append(f"{m.name}: its old text occurs {count} times")
    for start, tests in first_tests().items():
        wrong += [f"{start}: there is no {test}" for test in tests if not (ROOT / test).exists()]
    return wrong


# --- running them ---------------------------------------------------------------------------------

SLOW_TO_IMPORT = ("numpy", "pytest", "hypothesis", "array_api_strict", "scipy", "numba", "torch")


def serve() -> None:
    """Import what takes long once, then run each list of tests in a forked child: what one of the
    processes that ``Copy`` starts does. A line of input is [pytest's arguments, output file]."""
    for name in SLOW_TO_IMPORT:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        arguments, output = json.loads(line)
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            status = int(importlib.import_module("pytest").main(arguments))
            sys.stdout.flush()
            os._exit(status)
        until, status = time.monotonic() + TIMEOUT, None
        while status is None:
            time.sleep(0.05)
            done, ended = os.waitpid(child, os.WNOHANG)
            if done:
                status = os.waitstatus_to_exitcode(ended)
            elif time.monotonic() > until:
                os.killpg(child, signal.SIGKILL)
        print(status, flush=True)


class Copy:
    """A scratch copy of the checkout, and a process that runs its tests."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self._output = folder.with_suffix(".output")
        self._passing: dict[str, bool] = {}
        names = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout.split("\0")  # fmt: skip
        for name in filter(None, names):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        environment = {
            **os.environ,
            "PYTHONPATH": str(folder),  # before a checkout that is installed in place
            # compiled kernels, one set for each state of their sources
            "PORTACNN_CACHE": str(Path(tempfile.gettempdir(), "portacnn-mutants")),
        }
        self._server = subprocess.Popen(
            [sys.executable, str(folder / Path(__file__).relative_to(ROOT)), "--serve"],
            cwd=folder, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        if failed := self.failures(["tests/optim/test_flat.py"]):
            raise SystemExit(f"{failed}, with no mistake:\n{self._output.read_text()[-2000:]}")

    def close(self) -> None:
        """End its process."""
        self._server.stdin.close()  # type: ignore[union-attr]
        self._server.wait()

    def write(self, path: str, text: str) -> None:
        """Put a text into a file of the copy."""
        file = self.folder / path
        file.write_text(text, encoding="utf-8")
        # Python takes a file of the same size and second for the one that it has compiled
        for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
            compiled.unlink()

    def failures(self, tests: Sequence[str], *options: str) -> list[str]:
        """Those of these tests that fail; with "-x" the first alone."""
        # Examples that found an earlier mistake must not be tried first.
        shutil.rmtree(self.folder / ".hypothesis", ignore_errors=True)
        arguments = ["-q", "-rfE", "--no-header", "-n", "0", "-m", "not slow", *options]
        arguments += ["-p", "no:cacheprovider", f"--hypothesis-seed={self.seed}", *tests]
        arguments += ["-W", "ignore:Module already imported"]
        print(json.dumps([arguments, str(self._output)]), file=self._server.stdin, flush=True)
        status = int(self._server.stdout.readline())  # type: ignore[union-attr]
        if status == 5:
            raise SystemExit(f"there are no quick tests in {' '.join(tests)}")
        if status == 0 or (status == _NOT_FOUND and "::" in tests[0]):  # a test that is no more
            return []
        output = self._output.read_text(encoding="utf-8", errors="replace")
        failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
        return failed or [f"({HANGS if status == -signal.SIGKILL else f'exit status {status}'})"]


def tried(mutant: Mutant, copy: Copy, first_only: bool, last: str | None) -> dict[str, Any]:
    """Plant one mistake, run the tests, take it out again. ``last``: the test that found it last
    time."""
    begun, stage, failed = time.monotonic(), "first", []  # type: ignore[var-annotated]
    text = (copy.folder / mutant.path).read_text(encoding="utf-8")
    copy.write(mutant.path, text.replace(mutant.old, mutant.new))
    try:
        if last and "::" in last:
            failed = copy.failures([last], "-x")
        if not failed and (first := first_for(mutant.path)):
            failed = copy.failures(first, "-x")
        if not failed and not first_only:
            failed, stage = copy.failures(["tests"], "-x"), "all"
    finally:
        copy.write(mutant.path, text)
    by = failed[0] if failed else None
    return {"caught": by, "stage": stage, "seconds": round(time.monotonic() - begun, 1)}


def main() -> int:
    """Run the mistakes that were asked for; the exit status is 1 if any survives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="a part of the file's path or of the note")
    parser.add_argument("--survivors", action="store_true", help="those that survived last time")
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    parser.add_argument("--first-only", action="store_true", help="not the whole quick suite")
    parser.add_argument("--jobs", type=int, default=1, help="how many at the same time")
    parser.add_argument("--seed", type=int, default=0, help="of Hypothesis")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return 0
    found = mutants()
    if wrong := problems(found):
        raise SystemExit("\n".join(wrong))
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    results = {m.name: results[m.name] for m in found if m.name in results}
    chosen = [
        m
        for m in found
        if options.only in m.name
        and (m.needs is None or find_spec(m.needs))
        and (
            _survived(results[m.name])
            if m.name in results and not options.again
            else not options.survivors or _survived(results.get(m.name, {"caught": ""}))
        )
    ]
    Random(0).shuffle(chosen)  # so that a part of them stands for all
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        copies: SimpleQueue[Copy] = SimpleQueue()
        for number in range(options.jobs):
            (folder := Path(scratch, str(number))).mkdir()
            copies.put(Copy(folder.resolve(), options.seed))

        def work(mutant: Mutant) -> None:
            copy, last = copies.get(), results.get(mutant.name, {}).get("caught")
            try:
                results[mutant.name] = result = tried(mutant, copy, options.first_only, last)
            finally:
                copies.put(copy)
            caught = result["caught"] or "SURVIVED"
            print(f"{result['seconds']:6.1f} s  {mutant.name}: {caught}", flush=True)
            options.results.write_text(json.dumps(results, indent=1) + "\n")

        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(work, chosen))
        whole = copies.get()
        by = {results[m.name]["caught"] for m in chosen} - {None}
        wrong = whole.failures([test for test in sorted(by) if test[0] != "("]) if by else []
        for copy in (whole, *(copies.get() for _ in range(options.jobs - 1))):
            copy.close()
    for name in [m.name for m in chosen if results[m.name]["caught"] in wrong]:
        print(f"{results.pop(name)['caught']} fails without {name} too")
    options.results.write_text(json.dumps(results, indent=1) + "\n")
    print(table(found, results))
    return int(any(map(_survived, results.values())))


def _survived(result: dict[str, Any]) -> bool:
    return result["caught"] is None


def table(found: Sequence[Mutant], results: dict[str, Any]) -> str:
    """By folder: how many were planted and caught, and by which test files; then the survivors."""
    rows: dict[str, list[Mutant]] = {}
    for m in found:
        rows.setdefault(str(Path(m.path).parent), []).append(m)
    lines = ["| folder | planted | tried | caught | by |", "|---|---|---|---|---|"]
    for folder, own in rows.items():
        done = [results[m.name] for m in own if m.name in results]
        by = Counter(str(r["caught"]).partition("::")[0] for r in done if r["caught"])
        told = ", ".join(f"{file.removeprefix('tests/')} {n}" for file, n in by.most_common())
        lines.append(f"| {folder} | {len(own)} | {len(done)} | {sum(by.values())} | {told} |")
    survivors = [name for name, result in results.items() if _survived(result)]
    caught = len(results) - len(survivors)
    lines += ["", f"{caught} of {len(results)} caught ({len(found)} planted)", *survivors]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
