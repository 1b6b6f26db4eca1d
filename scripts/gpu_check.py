"""Prove portacnn on a GPU, and time it there: ``python scripts/gpu_check.py --out DIR``; see ``--help``.

Needs CuPy, NumPy, array-api-compat (a wheel of 60 KB) and this checkout; with pytest and hypothesis it runs the tests too, with
PyTorch built for CUDA it has something to be compared with. Each section has a process of its own, for what one does to the card
(an illegal address, a full memory, a hang) ends with it, and the others still run. Whatever time one leaves goes to those after it.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from gpu_tools import ROOT, NotHereError, Section, add_root, table, write_json

USAGE_ERROR = 2
GRACE = 8.0  # seconds that a section may take over its time before its process is ended
TELL = 1.0  # seconds kept for the tables


class Part(NamedTuple):
    """A section: ``module.function``, and its share of the time."""

    work: str
    seconds: float
    what: str


PARTS = {
    "device": Part("gpu_times.device", 15, "versions, the card, and what it reaches"),
    "kernels": Part("gpu_kernels.kernels", 60, "every kernel against the portable op in float64"),
    "parity": Part("gpu_training.parity", 25, "200 steps from one seed on NumPy and on the card"),
    "capture": Part("gpu_training.capture", 45, "steps replayed from a graph against the same steps run one by one"),
    "transfers": Part(
        "gpu_training.transfers", 25, "what a step carries to and from the host; memory over 1,000 steps"
    ),
    "memory": Part("gpu_training.memory", 20, "a batch that does not fit; a second device"),
    "steps": Part("gpu_times.steps", 85, "training steps: portable, kernels, replayed"),
    "torch": Part("gpu_times.torch_steps", 85, "the same steps with PyTorch: eager, CUDA graph, compiled"),
    "rates": Part("gpu_times.rates", 25, "each kernel against what the card reaches"),
    "layouts": Part("gpu_times.layouts", 10, "batch last against batch first in memory"),
    "accuracy": Part("gpu_training.accuracy", 15, "seconds to 0.985 on all of MNIST"),
    "tests": Part("gpu_check.tests", 60, "the test suite on CuPy"),
}


# --- the command ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections, print, write; the exit status: 0, 1 where something is red, 2 for words it does not know."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal cannot show ends no measurement
            stream.reconfigure(errors="backslashreplace")
    options = parse(arguments)
    if options.task:
        work_off(json.loads(options.task))
        return 0
    names = [name for name in (options.only or ",".join(PARTS)).split(",") if name]
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names or options.budget <= 0:
        print(f"error: unknown section {', '.join(unknown)}; known are {', '.join(PARTS)}", file=sys.stderr)
        return USAGE_ERROR
    out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        check = Check(options, names, out)
    except OSError as error:
        print(f"error: cannot write to --out {out}: {error}", file=sys.stderr)
        return USAGE_ERROR
    for name in names:
        check.run(name)
    return check.tell()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check.py",
        description=(__doc__ or "").partition("\n\n")[2],
        epilog="sections:\n" + "\n".join(f"  {name:10} {part.what}" for name, part in PARTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--out", default="runs/gpu", metavar="DIR", help="for gpu_check.json and the tests' output; default %(default)s"
    )
    add("--budget", type=float, default=480.0, metavar="S", help="seconds for everything; default %(default)g")
    add("--only", metavar="A,B", help="these sections")
    add("--quick", action="store_true", help="a rehearsal: as little of everything as goes through all of it")
    add("--data", metavar="DIR", help="MNIST's four files; without it, the 5,000 images that come with portacnn")
    add("--device", default="cupy", help="in the words of device=: cupy, cuda:1; default %(default)s")
    add("--here", action="store_true", help="all sections in this process: for a debugger or a sanitizer")
    add("--task", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


class Check:
    """All sections and what they found; ``gpu_check.json`` is written anew after each."""

    def __init__(self, options: argparse.Namespace, names: list[str], out: Path) -> None:
        self.options, self.names, self.out = options, names, out
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self.end = time.perf_counter() + options.budget - TELL
        self.found: list[dict[str, Any]] = []
        self.write()

    def run(self, name: str) -> None:
        """One section, in the share of the time that is left which falls to it."""
        waiting = [PARTS[other].seconds for other in self.names[self.names.index(name) :]]
        left = self.end - time.perf_counter()
        seconds = max(left - GRACE, 0.0) * waiting[0] / sum(waiting)
        print(f"{name:10} {PARTS[name].what} ({seconds:.0f} s)", flush=True)
        shared = {"quick": self.options.quick, "device": self.options.device, "data": self.options.data}
        task = {"section": name, "seconds": seconds, "out": str(self.out.resolve()), **shared}
        if seconds < 1.0:
            result = gone(name, f"no time was left of {self.options.budget:g} seconds")
        elif self.options.here:
            result = work_off(task)
        else:
            result = spawn(task, seconds + GRACE)
        self.found.append(result)
        for line in result["red"]:
            print(f"{'':10} RED {line}", flush=True)
        self.write()

    def write(self) -> None:
        report = {"format": 1, "started": self.started, "options": vars(self.options), "sections": self.found}
        write_json(self.out / "gpu_check.json", report)

    def tell(self) -> int:
        """The tables, the one of the sections last."""
        compare(self.found)
        for result in self.found:
            lines = [
                f"{key}: {value}" for key, value in result["figures"].items() if not isinstance(value, dict | list)
            ]
            lines += table(result["rows"])
            lines += [f"note: {note}" for note in result["notes"]]
            if lines:
                print(f"\n== {result['section']}: {PARTS[result['section']].what}", *lines, sep="\n")
        print("\n== all sections")
        rows = [
            {
                "section": result["section"],
                "status": result["status"].upper() if result["status"] == "red" else result["status"],
                "s": round(result["seconds"], 1),
                "what": "; ".join(result["red"])[:300] or result["skipped"] or PARTS[result["section"]].what,
            }
            for result in self.found
        ]
        print(*table(rows), sep="\n")
        red = [result["section"] for result in self.found if result["status"] == "red"]
        nothing = all(result["status"] == "skipped" for result in self.found)
        verdict = f"RED: {', '.join(red)}" if red else "nothing ran" if nothing else "nothing is red"
        print(f"written {self.out / 'gpu_check.json'}; {verdict}")
        self.write()
        return 1 if red or nothing else 0


def gone(name: str, reason: str) -> dict[str, Any]:
    """What there is to say of a section that could not say it itself."""
    section = Section(name)
    section.red.append(reason)
    return section.found()


def spawn(task: dict[str, Any], limit: float) -> dict[str, Any]:
    """One section in a process of its own, which is ended with all that it started when its time is over."""
    name = task["section"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--task", json.dumps({**task, "path": str(path)})]
        environment = {key: value for key, value in os.environ.items() if key not in ("PORTACNN_KERNELS", "CUPY_TF32")}
        begun = time.perf_counter()
        child = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            status = child.wait(timeout=limit)
            reason = f"its process ended with status {status}" if status else None
        except subprocess.TimeoutExpired:
            reason = f"it was ended after {limit:.0f} seconds"
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        try:
            result = json.loads(path.read_text())
        except (OSError, ValueError):
            result = gone(name, "it left nothing")
        if reason is not None:
            result["status"] = "red"
            result["red"].append(reason)
        result["seconds"] = time.perf_counter() - begun
        return result


def work_off(task: dict[str, Any]) -> dict[str, Any]:
    """A section, in this process."""
    add_root()
    options = {key: value for key, value in task.items() if key not in ("section", "path")}
    section = Section(task["section"], Path(task["path"]) if "path" in task else None, **options)

    def work(section: Section) -> None:
        module, _, function = PARTS[section.name].work.rpartition(".")
        getattr(import_module(module), function)(section)

    return section.run(work)


def compare(found: list[dict[str, Any]]) -> None:
    """Put PyTorch's times beside those of the same step, and what they come to."""
    by_name = {result["section"]: result for result in found}
    if not {"steps", "torch"} <= set(by_name):
        return
    peers = {(row["net"], row["batch"]): row for row in by_name["torch"]["rows"]}
    for row in by_name["steps"]["rows"]:
        peer = peers.get((row["net"], row["batch"]), {})
        for key in ("eager", "graph", "compiled"):
            own, other = row.get("captured_ms") or row.get("kernels_ms"), peer.get(f"{key}_ms")
            row[f"to_torch_{key}"] = own / other if own and other else None


# --- the tests ------------------------------------------------------------------------------------------------------


def tests(section: Section) -> None:
    """The suite with CuPy alone, all tests that are not slow, in as many processes as there are cores."""
    for name in ("pytest", "hypothesis"):
        if find_spec(name) is None:
            raise NotHereError(f"{name} is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "--maxfail=30", "-p", "no:cacheprovider"]
    command += ["--tb=short", "-rfE"]
    workers = min(os.cpu_count() or 1, 12)
    if find_spec("xdist") is not None and workers > 1:
        command += ["-n", str(workers)]
    if section.quick:
        command += [str(ROOT / "tests" / "test_ops_linear.py")]
    environment = {**os.environ, "PORTACNN_TEST_BACKENDS": "cupy"}
    folder = Path(section.out) if section.out else None
    with (folder / "tests.txt").open("w+") if folder else tempfile.TemporaryFile("w+") as log:
        try:
            limit = max(section.left - 2.0, 1.0)
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=limit)
            section.expect(done.returncode == 0, f"pytest ended with status {done.returncode}")
        except subprocess.TimeoutExpired:
            section.expect(False, f"the tests were not done after {limit:.0f} seconds")
        log.seek(0)
        lines = log.read().splitlines()
    section.figures["counts"] = next((line.strip("= ") for line in reversed(lines) if " in " in line), "none were told")
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    section.red += failures[:10]
    if len(failures) > 10:
        section.notes.append(f"{len(failures) - 10} more failures are in tests.txt")


def names_of_parts() -> dict[str, Callable[[Section], None]]:
    """Each section's function: for tests."""
    add_root()
    found = {}
    for name, part in PARTS.items():
        module, _, function = part.work.rpartition(".")
        found[name] = getattr(import_module(module), function)
    return found


if __name__ == "__main__":
    sys.exit(main())
