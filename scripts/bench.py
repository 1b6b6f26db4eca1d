"""Compare the speed of portacnn with PyTorch, the tutorials' code and other frameworks: ``python
scripts/bench.py --help``.

Each measurement runs in a separate process (``bench_worker.py``). In a round, every contender runs
once, in a rotating order. Ratios are of two medians of the same round, so that a slow phase of the
machine affects both. The script prints measurements without interpreting them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench_cases import (
    CONTENDERS,
    MODES,
    PRECISIONS,
    Case,
    Contender,
    UsageError,
    all_cases,
    whole_numbers,
    words,
)
from bench_nets import FIXED, PLAIN, SHAPES
from bench_peers import INFERENCE, OFFERS
from bench_timing import THREADS as THREADS_OF_SERVE
from bench_torch import compiler

WORKER = Path(__file__).with_name("bench_worker.py")
TIMEOUT = 1800.0  # seconds for one measurement
USAGE_ERROR = 2

THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "PORTACNN_NUM_THREADS",
)

WORDS = f"""\
contenders:
  portacnn             on NumPy or PORTACNN_BACKEND's library, with the fastest installed kernels
  portacnn@DEVICE      on a device: portacnn@torch, portacnn@cuda:1, portacnn@torch:cuda
  portacnn/KERNELS     with PORTACNN_KERNELS=KERNELS: portacnn/native, portacnn@torch/reference
  portacnn@DEVICE/PRECISION
                       precision=PRECISION, one of {", ".join(PRECISIONS)}: portacnn@cuda/tf32
  torch, torch-channels-last
                       PyTorch in eager mode; torch@cuda on a device
  torch-compile, torch-graph@cuda
                       with torch.compile; with training steps replayed from a CUDA graph
  jax                  the nets written by hand in plain JAX; jax@cuda on a device
  onnxruntime          inference with PyTorch's ONNX export (batch norms folded); on the CPU
  portacnn-onnx        inference with portacnn's model loaded from the same file; @DEVICE and
                       /KERNELS as above
  tutorials            the code of "Deep Learning from Scratch"; simple only
  chainer, dezero      simple, lenet and deep; --python chainer=PATH sets their interpreter
nets:
  {", ".join(SHAPES)}
  epochs use images of MNIST's size, for {", ".join(PLAIN)}; --sizes is not for {", ".join(FIXED)}
modes:
  train and infer time a step and a prediction; epoch a whole epoch with the accuracies
  serve: {THREADS_OF_SERVE} threads call predict; ms is the time per call, and "8 threads" compares
         calls a second of {THREADS_OF_SERVE} threads with those of one
"""


# --- the command ----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns the exit status: 0, 1 if nothing could be measured, 2 for
    invalid arguments.
    """
    for stream in (sys.stdout, sys.stderr):
        # a name that the terminal cannot print must not stop a measurement
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    options = parse(arguments)
    try:
        bench = Bench(options)
        if options.distributed:
            return bench.on_ranks()
        with tempfile.TemporaryDirectory() as folder:
            bench.data, bench.folder = store(options.data, folder), Path(folder)
            return bench.run()
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.py",
        description=(__doc__ or "").partition("\n\n")[2],
        epilog=WORDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--nets", default="simple,lenet,deep", metavar="A,B", help="default %(default)s")
    add(
        "--batches",
        metavar="N,M",
        help="default 100; 32 for resnet20, 1 for alexnet, 8 for larger nets, 1 to serve",
    )
    add("--sizes", metavar="N,M", help="H = W of the images; default: each net's own")
    add(
        "--modes",
        default="train,infer",
        metavar="A,B",
        help=f"of {', '.join(MODES)}; default %(default)s",
    )
    add(
        "--contenders",
        metavar="A,B",
        help=f"default {','.join(CONTENDERS)}, as far as they are installed",
    )
    add(
        "--against",
        metavar="A",
        help="reference of the ratios; default torch, else the first that runs",
    )
    add("--rounds", type=int, default=3, help="default %(default)s")
    add(
        "--seconds",
        type=float,
        default=0.5,
        help="how long to time, at least 5 times; default %(default)s",
    )
    add("--threads", type=int, help="for every contender; default: each framework's own")
    add(
        "--data",
        metavar="DIR",
        help="use MNIST's four files in this folder for epochs instead of random images",
    )
    add(
        "--images",
        type=int,
        default=60_000,
        help="training images of an epoch, plus a sixth as many test images; default 60000",
    )
    add(
        "--python",
        action="append",
        default=[],
        metavar="PEER=PATH",
        help="an interpreter for chainer, dezero, ...; may be repeated",
    )
    add(
        "--profile",
        action="store_true",
        help="measure portacnn's time per layer instead, forward and backward",
    )
    add(
        "--distributed",
        action="store_true",
        help="train on ranks of mpiexec instead: time per step and its parts, and of sums",
    )
    add("--ranks", default="1,2", metavar="N,M", help="of --distributed; default %(default)s")
    add("--json", default="runs/bench.json", metavar="FILE", help="default %(default)s")
    return parser.parse_args(arguments)


def store(data: str | None, folder: str) -> str | None:
    """Save MNIST from the folder ``data`` as arrays that every interpreter can read."""
    if data is None:
        return None
    sys.path.insert(0, str(WORKER.parent.parent))
    import numpy as np

    from portacnn import PortacnnError, load_mnist

    try:
        (x_train, t_train), (x_test, t_test) = load_mnist(normalize=False, root=data)
    except PortacnnError as error:
        raise UsageError(str(error)) from error
    for name, array in {
        "x_train": x_train,
        "t_train": t_train,
        "x_test": x_test,
        "t_test": t_test,
    }.items():
        np.save(Path(folder) / f"{name}.npy", array)
    return folder


# --- measuring ------------------------------------------------------------------------------------


class Bench:
    """All requested measurements; ``run`` performs them.

    Attributes:
        rows: a dictionary per case and contender, as in the JSON file.
        left_out: what could not be measured: contender, case (None for all) and reason.
        ran: what each contender ran on: versions, threads, device.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        for name, least in (("rounds", 1), ("seconds", 0.0), ("images", 1), ("threads", 1)):
            if (value := getattr(options, name)) is not None and not least <= value < float("inf"):
                raise UsageError(f"--{name} must be at least {least:g}, got {value}")
        nets = words(options.nets, list(SHAPES), "net")
        modes = ["profile"] if options.profile else words(options.modes, MODES, "mode")
        batches, sizes = (
            whole_numbers(text, option) if text else None
            for text, option in ((options.batches, "batches"), (options.sizes, "sizes"))
        )
        self.cases = all_cases(nets, modes, batches, sizes)
        for case in self.cases:
            if case.mode == "epoch" and case.batch > options.images:
                raise UsageError(
                    f"a batch of {case.batch} is more than the epoch's {options.images} images"
                )
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[dict[str, Any]] = []
        self.ran: dict[str, dict[str, Any]] = {}
        chosen = words(options.contenders, (), "contender") if options.contenders else self.usual()
        self.contenders = [Contender.of(word) for word in chosen]
        if options.against not in (None, *chosen):
            raise UsageError(
                f"--against {options.against} is none of the contenders {', '.join(chosen)}"
            )
        self.against = options.against or ("torch" if "torch" in chosen else chosen[0])
        self.python: dict[str, str] = {}
        for text in options.python:
            peer, equals, path = text.partition("=")
            if peer not in OFFERS or not equals:
                raise UsageError(
                    f"--python takes PEER=PATH with one of {', '.join(OFFERS)}, got {text!r}"
                )
            if not Path(path).is_file():
                raise UsageError(f"--python {text}: there is no such file")
            self.python[peer] = path
        self.out = Path(options.json)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.open("a").close()  # fails before the measurements, not after
        self.data: str | None = None
        self.folder = Path()  # of the ONNX files
        self.exported: dict[str, dict[str, Any]] = {}

    def usual(self) -> list[str]:
        """Return the default contenders that can run here and have one of the modes."""
        left = {}
        if find_spec("numba") is None:
            for word in CONTENDERS:
                if word.endswith("/native"):
                    left[word] = "numba is not installed, so it equals portacnn"
        if find_spec("torch") is not None and not compiler():
            left["torch-compile"] = "no C++ compiler is on PATH"
        if not any(case.mode in ("infer", "serve") for case in self.cases):
            left |= {w: "" for w in CONTENDERS if w.partition("/")[0] in INFERENCE}
        for word, reason in left.items():
            if reason:
                self.note(word, None, reason)
        return [word for word in CONTENDERS if word not in left]

    def note(self, word: str, case: Case | None, reason: str) -> None:
        """Record that a contender was skipped, in one case or (None) in all."""
        entry = {"contender": word, "case": case and str(case), "reason": reason}
        if entry not in self.left_out:
            self.left_out.append(entry)

    def gone(self) -> set[str]:
        """Return the contenders that cannot run at all."""
        return {entry["contender"] for entry in self.left_out if entry["case"] is None}

    def run(self) -> int:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        started = datetime.now(UTC).isoformat(timespec="seconds")
        before = self.speed()
        machine = {key: before.pop(key) for key in ("cpu", "cores", "system")}
        machine |= {"load_at_start": load, "before": before}
        print(f"machine  {machine['cpu']}, {machine['cores']:g} cores to use, {machine['system']}")
        if load is not None and load > 0.5:
            print(
                f"warning  the load average is {load:.2f}: other work is running and affects the "
                "figures"
            )
        print_speed("before", before)
        try:
            self.profile() if self.options.profile else self.compare()
        except KeyboardInterrupt:
            print("interrupted: the results so far follow")
            self.note("the rest", None, "interrupted by the user")
        after = self.speed()
        machine["after"] = {key: after[key] for key in before}
        print_speed("after", after)
        self.tell()
        report = {
            "format": 1,
            "started": started,
            "options": vars(self.options),
            "machine": machine,
            "against": self.against,
            "contenders": self.ran,
            "rows": self.rows,
            "left_out": self.left_out,
        }
        self.out.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        print(f"written  {self.out}")
        return 0 if self.rows else 1

    def on_ranks(self) -> int:
        """Measure training steps on several ranks."""
        from bench_ranks import compare

        nets = [(case.net, case.batch, case.size) for case in self.cases if case.mode == "train"]
        ranks = whole_numbers(self.options.ranks, "ranks")
        report = compare(nets, ranks, self.options.seconds, self.options.rounds)
        report |= {"machine": self.speed(), "load": os.getloadavg()}
        self.out.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        print(f"written  {self.out}")
        return 0

    def compare(self) -> None:
        """Run every case with every contender; one table row each."""
        width = max(len(contender.word) for contender in self.contenders)
        net = max(9, *(len(case.place) + 1 for case in self.cases))
        title = f"{'ms (min..max)':>28} {'ratio (min..max)':>22} {'peak MiB':>9}"
        if any(case.mode == "serve" for case in self.cases):
            title += f" {f'{THREADS_OF_SERVE} threads':>9}"
        head = f"{'net':{net}}{'batch':>6} {'mode':6} {'contender':{width}} {title}"
        print(f"\n{head}\n{'-' * len(head)}")
        for case in self.cases:
            for row in self.case_rows(case):
                self.rows.append(row)
                ms, ratio, peak = row["ms"], row["ratio"], row["peak_mib"]
                times = f"{number(ms['median'])} ({number(ms['min'])}..{number(ms['max'])})"
                share = (
                    f"{ratio['median']:.2f} ({ratio['min']:.2f}..{ratio['max']:.2f})"
                    if ratio
                    else "-"
                )
                device = row["device_peak_mib"]
                memory = ("-" if peak is None else f"{peak:.0f}") + (
                    "" if device is None else f" +{device:.0f}"
                )
                place = f"{case.place:{net}}{case.batch:6} {case.mode:6} {row['contender']:{width}}"
                scaling = row.get("scaling")
                more = "" if scaling is None else f" {scaling['median']:>8.2f}x"
                print(f"{place} {times:>28} {share:>22} {memory:>9}{more}", flush=True)

    def case_rows(self, case: Case) -> Iterator[dict[str, Any]]:
        """Run one case: rounds of all contenders, and their rows."""
        rounds: dict[str, list[dict[str, Any] | None]] = {}
        running = list(self.able(case))
        for index in range(self.options.rounds):
            start = index % len(running) if running else 0
            for contender in running[start:] + running[:start]:
                result = self.work(contender, case)
                if result is None:
                    running = [other for other in running if other is not contender]
                rounds.setdefault(contender.word, []).append(result)
        done = {word: [r for r in results if r] for word, results in rounds.items() if all(results)}
        if self.against in self.gone() and done:
            self.against = next(
                contender.word for contender in self.contenders if contender.word in done
            )
        for contender in self.contenders:
            if results := done.get(contender.word):
                yield self.row(case, contender.word, results, done.get(self.against, []))

    def row(
        self, case: Case, word: str, results: list[dict[str, Any]], base: list[dict[str, Any]]
    ) -> dict[str, Any]:
        each = ("median_ms", "min_ms", "max_ms", "steps", "peak_mib", "device_peak_mib")
        ratios = [
            own["median_ms"] / other["median_ms"] for own, other in zip(results, base, strict=False)
        ]
        peaks = {
            key: [r[key] for r in results if r[key] is not None]
            for key in ("peak_mib", "device_peak_mib")
        }
        return {
            **case._asdict(),
            "contender": word,
            "parameters": results[0]["parameters"],
            "ms": spread([r["median_ms"] for r in results]),
            "ratio": {"against": self.against, **spread(ratios), "rounds": ratios}
            if ratios
            else None,
            **{key: max(values) if values else None for key, values in peaks.items()},
            **{
                key: spread([r[key] for r in results])
                for key in ("one_thread_ms", "scaling")
                if key in results[0]
            },
            "rounds": [{key: r[key] for key in each} for r in results],
        }

    def profile(self) -> None:
        """Measure portacnn's layers; one table per case and contender."""
        for case in self.cases:
            for contender in self.able(case):
                result = self.work(contender, case, what="profile")
                if result is None:
                    continue
                self.rows.append({**case._asdict(), "contender": contender.word, **result})
                width = max(len(layer["layer"]) for layer in result["layers"])
                print(
                    f"\n{case.net} batch {case.batch}, {contender.word}: median ms of "
                    f"{result['steps']} training steps"
                )
                print(f"{'layer':{width}} {'forward':>9} {'backward':>9} {'of step':>8}")
                for layer in result["layers"]:
                    both = layer["forward_ms"] + layer["backward_ms"]
                    times = f"{layer['forward_ms']:9.3f} {layer['backward_ms']:9.3f}"
                    print(f"{layer['layer']:{width}} {times} {both / result['step_ms']:8.1%}")
                rest, whole = result["rest_ms"], result["step_ms"]
                print(f"{'batch, loss, joins, update':{width}} {rest:19.3f} {rest / whole:8.1%}")
                print(f"{'step':{width}} {whole:19.3f}", flush=True)

    def able(self, case: Case) -> Iterator[Contender]:
        """Yield the contenders that support the case; record why others do not."""
        for contender in self.contenders:
            reason = contender.lacks(case.net, case.mode)
            if reason is not None:
                self.note(contender.word, case, reason)
            elif contender.word not in self.gone():
                yield contender

    def work(
        self, contender: Contender, case: Case, what: str = "measure"
    ) -> dict[str, Any] | None:
        """Run one process. Returns None and records the reason if it failed."""
        task = {
            "what": what,
            "contender": contender.name,
            "device": contender.device,
            **case._asdict(),
        }
        task |= {"precision": contender.precision, "onnx": None}
        if contender.name in INFERENCE:
            exported = self.exports(case)
            if "onnx" not in exported:
                reason = exported.get("unavailable") or exported["failed"]
                self.note(contender.word, case, f"no ONNX file: {reason}")
                return None
            task |= exported
        task |= {"seconds": self.options.seconds, "images": self.options.images, "data": self.data}
        result = self.spawn(
            task, self.python.get(contender.name, sys.executable), contender.kernels
        )
        if reason := result.get("unavailable") or result.get("failed"):
            self.note(contender.word, None if "unavailable" in result else case, reason)
            return None
        self.ran[contender.word] = {
            key: result.pop(key) for key in ("where", "versions", "threads")
        }
        return result

    def exports(self, case: Case) -> dict[str, Any]:
        """Return the path of the net's ONNX file under "onnx", or why there is none."""
        if case.place not in self.exported:
            path = str(self.folder / f"{case.place}.onnx")
            task = {"what": "export", "net": case.net, "size": case.size, "onnx": path}
            self.exported[case.place] = self.spawn(task, sys.executable) or {"onnx": path}
        return self.exported[case.place]

    def spawn(
        self, task: dict[str, Any], python: str, kernels: str | None = None
    ) -> dict[str, Any]:
        environment = {
            name: value for name, value in os.environ.items() if name != "PORTACNN_KERNELS"
        }
        if self.options.threads:
            environment |= dict.fromkeys(THREADS, str(self.options.threads))
        if kernels:
            environment["PORTACNN_KERNELS"] = kernels
        command = [python, str(WORKER), json.dumps(task)]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"it took more than {TIMEOUT:.0f} s"}
        if done.returncode != 0:
            last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
            return {"failed": last[0] if last else f"it exited with status {done.returncode}"}
        return json.loads(done.stdout.splitlines()[-1])

    def speed(self) -> dict[str, Any]:
        """Return the machine's description and its current speed."""
        result = self.spawn({"what": "machine"}, sys.executable)
        if "failed" in result:
            raise OSError(f"the machine cannot be measured: {result['failed']}")
        return result

    def tell(self) -> None:
        """Print what was skipped and why, what ran on what, and how to read the figures."""
        for entry in self.left_out:
            case = f", {entry['case']}" if entry["case"] else ""
            print(f"not run  {entry['contender']}{case}: {entry['reason']}")
        for word, ran in self.ran.items():
            loaded = ", ".join(f"{name} {version}" for name, version in ran["versions"].items())
            pools = (
                ", ".join(f"{name} {count}" for name, count in ran["threads"].items())
                or "not known"
            )
            print(f"ran      {word}: {ran['where']}; {loaded}; threads: {pools}")
        if self.options.profile or not self.rows:
            return
        rounds = self.options.rounds
        print(f"ms: the median of the medians of {rounds} round(s), and their minimum and maximum")
        print(
            f"ratio: to {self.against}, of medians of the same round; median, minimum and maximum "
            "over the rounds"
        )
        print(
            "peak: the process's peak resident memory minus that after its imports (+ memory of "
            "the GPU)"
        )
        if any(case.mode == "serve" for case in self.cases):
            print(
                f"serve: ms per call while {THREADS_OF_SERVE} threads call; {THREADS_OF_SERVE} "
                "threads: calls a second, divided by those of one thread"
            )
        if "infer" in self.options.modes or "train" in self.options.modes:
            print(
                "train and infer: one step or one prediction, input in place on the device, at "
                "least 5 times"
            )


def print_speed(when: str, reached: dict[str, Any]) -> None:
    gemm, copy = reached["gemm_gflops"], reached["copy_gb_per_s"]
    print(
        f"{when:8} GEMM 2048^3 float32 {gemm:.0f} GFLOP/s, copy {copy:.1f} GB/s (read and written)",
        flush=True,
    )


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def number(ms: float) -> str:
    """Format with three digits, or with all digits before the point."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


if __name__ == "__main__":
    sys.exit(main())
