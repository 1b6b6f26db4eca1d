"""Check portacnn on a GPU and measure its speed: ``python scripts/gpu_check.py --out DIR``; see
``--help`` and docs/gpu.md.

Needs CuPy, NumPy, array-api-compat (a wheel of 80 KB) and this checkout. With pytest and hypothesis
it also runs the tests; with PyTorch built for CUDA it compares the times. Each section runs in a
separate process, so that an illegal address, exhausted memory or a hang affects only this section.
Time that a section does not use goes to the later ones.
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

from gpu.tools import Section, add_root, table, write_json

USAGE_ERROR = 2
GRACE = 8.0  # seconds beyond its time before a section's process is killed
TELL = 1.0  # seconds reserved for the tables


class Part(NamedTuple):
    """A section: ``module.function``, and its share of the time."""

    work: str
    seconds: float
    what: str


# By importance: the first five check correctness, the next ones measure time.
PARTS = {
    "device": Part("gpu.times.device", 15, "versions, the GPU, and what it reaches"),
    "kernels": Part("gpu.kernels.kernels", 75, "every kernel against the portable op in float64"),
    "capture": Part(
        "gpu.training.capture",
        50,
        "steps replayed from a graph against the same steps without one",
    ),
    "transfers": Part("gpu.training.transfers", 30, "transfers of a step; memory over 1,000 steps"),
    "memory": Part("gpu.training.memory", 20, "a batch that does not fit; a second device"),
    "steps": Part("gpu.times.steps", 65, "training steps: kernels, replayed, portable"),
    "rates": Part("gpu.times.rates", 30, "each kernel against what the GPU reaches"),
    "torch": Part(
        "gpu.times.torch_steps", 45, "the same steps with PyTorch: eager, CUDA graph, compiled"
    ),
    "torch_graph": Part(
        "gpu.torch_capture.torch_capture", 10, "steps on PyTorch replayed from a graph: equal bits"
    ),
    "jax": Part("gpu.jax_steps.jax_steps", 25, "the same steps on JAX: portacnn's, and plain JAX"),
    "parity": Part("gpu.parity.parity", 10, "200 steps from one seed as on NumPy"),
    "nccl": Part("gpu.ranks.nccl", 5, "sums by NCCL with this GPU as the only rank"),
    "accuracy": Part("gpu.training.accuracy", 15, "seconds to 0.985 on all of MNIST"),
    "yields": Part("gpu.times.yields", 25, "what each tile reaches, for the plan"),
    "layouts": Part("gpu.times.layouts", 10, "batch last against batch first in memory"),
    "tests": Part("gpu.suite.tests", 50, "the tests that run on CuPy"),
}
FIRST = ("device", "kernels", "capture", "transfers", "memory")
BUDGET, FIRST_BUDGET = 480.0, 200.0  # seconds
# required by every section
NEEDED = {"numpy": "numpy", "array_api_compat": "array-api-compat"}


# --- the command ----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections, print, write. Returns the exit status: 0, 1 if a check failed, 2 for
    invalid arguments.
    """
    for stream in (sys.stdout, sys.stderr):
        # a name that the terminal cannot print must not stop a measurement
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    options = parse(arguments)
    if options.task:
        work_off(json.loads(options.task))
        return 0
    lost = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if lost:
        print(f"error: {cure(lost)}", file=sys.stderr)
        return USAGE_ERROR
    if options.budget is None:
        options.budget = FIRST_BUDGET if options.first else BUDGET
    names = [
        name
        for name in (options.only or ",".join(FIRST if options.first else PARTS)).split(",")
        if name
    ]
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        wrong = f"unknown section {', '.join(unknown)}" if unknown else "--only lists no section"
        print(f"error: {wrong}; known are {', '.join(PARTS)}", file=sys.stderr)
        return USAGE_ERROR
    if not options.budget > 0:
        print(f"error: --budget must be above 0, got {options.budget:g}", file=sys.stderr)
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


def cure(lost: list[str]) -> str:
    """Return one line that says what is missing and how to install it on a machine without a
    network.
    """
    return (
        f"{' and '.join(lost)} not installed; on a machine with a network: python -m pip download "
        "--no-deps -d wheels "
        f"{' '.join(lost)}; here: python -m pip install --no-index --no-deps --target site "
        "wheels/*.whl && export "
        "PYTHONPATH=site (docs/gpu.md)"
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check.py",
        description=(__doc__ or "").partition("\n\n")[2],
        epilog="sections:\n"
        + "\n".join(f"  {name:10} {part.what}" for name, part in PARTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--out",
        default="runs/gpu",
        metavar="DIR",
        help="for gpu_check.json and the tests' output; default %(default)s",
    )
    add(
        "--budget",
        type=float,
        metavar="S",
        help=f"seconds for everything; default {BUDGET:g}, with --first {FIRST_BUDGET:g}",
    )
    some = parser.add_mutually_exclusive_group()
    some.add_argument(
        "--first", action="store_true", help=f"the most important sections: {', '.join(FIRST)}"
    )
    some.add_argument("--only", metavar="A,B", help="these sections")
    add(
        "--quick",
        action="store_true",
        help="a trial run: the least work that covers everything",
    )
    add(
        "--data",
        metavar="DIR",
        help="folder of MNIST's four files; default: the 5,000 images shipped with portacnn",
    )
    add(
        "--device",
        default="cupy",
        help="as for device=: cupy, cuda:1; default %(default)s",
    )
    add(
        "--here",
        action="store_true",
        help="run all sections in this process, for a debugger or a sanitizer",
    )
    add("--task", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


class Check:
    """All sections and their results; ``gpu_check.json`` is rewritten after each section."""

    def __init__(self, options: argparse.Namespace, names: list[str], out: Path) -> None:
        self.options, self.names, self.out = options, names, out
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self.end = time.perf_counter() + options.budget - TELL
        self.found: list[dict[str, Any]] = []
        self.write()

    def run(self, name: str) -> None:
        """Run one section within its share of the remaining time."""
        waiting = [PARTS[other].seconds for other in self.names[self.names.index(name) :]]
        left = self.end - time.perf_counter()
        seconds = max(left - GRACE, 0.0) * waiting[0] / sum(waiting)
        print(f"{name:10} {PARTS[name].what} ({seconds:.0f} s)", flush=True)
        shared = {
            "quick": self.options.quick,
            "device": self.options.device,
            "data": self.options.data,
        }
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
        report = {
            "format": 1,
            "started": self.started,
            "options": vars(self.options),
            "sections": self.found,
        }
        write_json(self.out / "gpu_check.json", report)

    def tell(self) -> int:
        """Print the tables; the table of the sections comes last."""
        compare(self.found)
        for result in self.found:
            lines = [
                f"{key}: {value}"
                for key, value in result["figures"].items()
                if not isinstance(value, dict | list)
            ]
            lines += table(result["rows"])
            lines += [f"note: {note}" for note in result["notes"]]
            if lines:
                print(
                    f"\n== {result['section']}: {PARTS[result['section']].what}", *lines, sep="\n"
                )
        print("\n== all sections")
        rows = [
            {
                "section": result["section"],
                "status": result["status"].upper()
                if result["status"] == "red"
                else result["status"],
                "s": round(result["seconds"], 1),
                "what": "; ".join(result["red"])[:300]
                or result["skipped"]
                or PARTS[result["section"]].what,
            }
            for result in self.found
        ]
        print(*table(rows), sep="\n")
        red = [result["section"] for result in self.found if result["status"] == "red"]
        nothing = all(result["status"] == "skipped" for result in self.found)
        verdict = (
            f"RED: {', '.join(red)}" if red else "nothing ran" if nothing else "nothing is red"
        )
        print(f"written {self.out / 'gpu_check.json'}; {verdict}")
        self.write()
        return 1 if red or nothing else 0


def gone(name: str, reason: str) -> dict[str, Any]:
    """Return the result of a section that could not report itself."""
    section = Section(name)
    section.red.append(reason)
    return section.found()


def spawn(task: dict[str, Any], limit: float) -> dict[str, Any]:
    """Run one section in a separate process. The process and its children are killed when the time
    is over.
    """
    name = task["section"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.json"
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--task",
            json.dumps({**task, "path": str(path), "spawned": time.time()}),
        ]
        environment = {
            key: value
            for key, value in os.environ.items()
            if key not in ("PORTACNN_KERNELS", "CUPY_TF32")
        }
        begun = time.perf_counter()
        child = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            status = child.wait(timeout=limit)
            reason = f"its process exited with status {status}" if status else None
        except subprocess.TimeoutExpired:
            reason = f"it was killed after {limit:.0f} seconds"
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        try:
            result = json.loads(path.read_text())
        except (OSError, ValueError):
            result = gone(name, "it wrote no result")
        if reason is not None:
            result["status"] = "red"
            result["red"].append(reason)
        result["seconds"] = time.perf_counter() - begun
        return result


def work_off(task: dict[str, Any]) -> dict[str, Any]:
    """Run a section in this process."""
    add_root()
    options = {
        key: value for key, value in task.items() if key not in ("section", "path", "spawned")
    }
    # the time counts from the spawn: starting Python and importing CuPy take seconds
    if "spawned" in task:
        options["seconds"] -= time.time() - task["spawned"]
    section = Section(task["section"], Path(task["path"]) if "path" in task else None, **options)

    def work(section: Section) -> None:
        module, _, function = PARTS[section.name].work.rpartition(".")
        getattr(import_module(module), function)(section)

    return section.run(work)


def compare(found: list[dict[str, Any]]) -> None:
    """Add PyTorch's times of the same steps to the rows, and the ratios."""
    by_name = {result["section"]: result for result in found}
    if not {"steps", "torch"} <= set(by_name):
        return
    peers = {(row["net"], row["batch"]): row for row in by_name["torch"]["rows"]}
    for row in by_name["steps"]["rows"]:
        peer = peers.get((row["net"], row["batch"]), {})
        for key in ("eager", "graph", "compiled"):
            own, other = row.get("captured_ms") or row.get("kernels_ms"), peer.get(f"{key}_ms")
            row[f"to_torch_{key}"] = own / other if own and other else None


def names_of_parts() -> dict[str, Callable[[Section], None]]:
    """Return the function of each section, for tests."""
    add_root()
    found = {}
    for name, part in PARTS.items():
        module, _, function = part.work.rpartition(".")
        found[name] = getattr(import_module(module), function)
    return found


if __name__ == "__main__":
    sys.exit(main())
