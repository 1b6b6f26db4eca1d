"""Training on several ranks: ``bench.py --distributed``. This file is also the program that
``mpiexec`` starts on each rank.

A step's time in the calls of the communicator, on the main thread, is its exposed communication: it
includes waiting for slower ranks. The rest is compute. What runs meanwhile in the thread that sums
gradients is hidden. All rows of a net have the same global batch, so with n ranks a step does the
same work. The efficiency is against one rank with one thread.

"model" is what ``scaling_model`` predicts: from the step of one rank alone with its share of the
batch, and a ring whose link is fitted to sums on two ranks. Ranks without a core of their own take
turns, so that their compute is longer.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_nets import images
from bench_portacnn import portacnn_model
from scaling_model import BACKWARD, Link, buckets, exposed, layers_of, ring

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from portacnn import Trainer, distributed
from portacnn.data.prefetch import cores
from portacnn.distributed import Communicator, Pending

MIN_STEPS, MAX_STEPS, WARM_UP = 5, 500, 3
MESSAGES = (4, 1 << 10, 1 << 16, 1 << 20, 1 << 22, 1 << 24, 1 << 26)  # bytes
TIMEOUT = 600.0  # seconds of one measurement


class Clocked(Communicator):
    """A communicator that measures the time in its calls, and counts the bytes of its sums."""

    def __init__(self, inner: Communicator) -> None:
        self.inner = inner
        self.name = inner.name  # type: ignore[misc]
        self.rank, self.size = inner.rank, inner.size
        self.local_rank, self.local_size = inner.local_rank, inner.local_size
        self.seconds, self.bytes, self.sums = 0.0, 0, 0

    def _timed(self, work: Callable[..., Any], *args: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        try:
            return work(*args, **options)
        finally:
            self.seconds += time.perf_counter() - begin

    def all_reduce(self, array: Any, *args: Any, **options: Any) -> None:
        self._timed(self.inner.all_reduce, array, *args, **options)

    def start_all_reduce(self, array: Any, **options: Any) -> Pending:
        self.bytes += array.nbytes
        self.sums += 1
        return _Waited(self, self._timed(self.inner.start_all_reduce, array, **options))

    def broadcast(self, *args: Any) -> None:
        self._timed(self.inner.broadcast, *args)

    def barrier(self) -> None:
        self._timed(self.inner.barrier)

    def share(self, *args: Any) -> Any:
        return self._timed(self.inner.share, *args)

    def gather(self, value: Any) -> list[Any]:
        return self._timed(self.inner.gather, value)

    def any_rank(self, flag: bool) -> bool:
        return self._timed(self.inner.any_rank, flag)

    def meets(self, seconds: float) -> bool:
        return self.inner.meets(seconds)

    def abort(self, code: int = 1) -> None:
        self.inner.abort(code)


class _Waited(Pending):
    def __init__(self, clock: Clocked, pending: Pending) -> None:
        self._clock, self._pending = clock, pending

    def wait(self) -> None:
        self._clock._timed(self._pending.wait)


# --- on each rank ---------------------------------------------------------------------------------


def steps(task: dict[str, Any]) -> dict[str, Any]:
    """Time training steps. Returns medians in ms, the mean over ranks."""
    clock = Clocked(distributed.connect("auto"))
    x, t = images(task["net"], task["batch"], size=task["size"])
    model = portacnn_model(task["net"], "cpu", task["size"])
    trainer = Trainer(
        *(model, x, t, x[:1], t[:1]),
        batch_size=len(x),
        optimizer="sgd",
        lr=0.01,
        epochs=1,
        verbose=False,
        distributed=clock,
    )
    chosen = np.asarray(trainer.updater.split.of(len(x)).positions())

    def once() -> tuple[float, float]:
        clock.seconds, clock.bytes, clock.sums = 0.0, 0, 0
        begin = time.perf_counter()
        trainer.run_batch(chosen, size=len(x))
        return time.perf_counter() - begin, clock.seconds

    warm = [once()[0] for _ in range(WARM_UP)]
    wanted = min(MAX_STEPS, max(MIN_STEPS, round(task["seconds"] / min(warm))))
    times = [once() for _ in range(clock.share(wanted))]
    own = [statistics.median(time for time, _ in times), statistics.median(c for _, c in times)]
    step, waited = (statistics.mean(each) for each in zip(*clock.gather(own), strict=True))
    return {
        "step_ms": 1e3 * step,
        "exposed_ms": 1e3 * waited,
        "bytes": clock.bytes,
        "sums": clock.sums,
        "steps": len(times),
    }


def links(task: dict[str, Any]) -> list[tuple[int, float]]:
    """Return the seconds of sums by their bytes: medians, of the slowest rank."""
    ours = distributed.connect("auto")
    found = []
    for size in MESSAGES:
        array = np.zeros(size // 4, np.float32)
        times = []
        for _ in range(20 if size < 1 << 22 else 5):
            ours.barrier()
            begin = time.perf_counter()
            ours.all_reduce(array)
            times.append(time.perf_counter() - begin)
        found.append((size, max(ours.gather(statistics.median(times)))))
    return found


# --- the parent -----------------------------------------------------------------------------------


def on_ranks(size: int, threads: int, task: dict[str, Any]) -> Any:
    """Run a task on ranks of so many threads each, bound to cores if there are enough."""
    count = str(threads)
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "PORTACNN_NUM_THREADS")
    bind = ["-bind-to", "core"] if threads == 1 and size <= cores() else []
    done = subprocess.run(
        ["mpiexec", "-n", str(size), *bind, sys.executable, __file__, json.dumps(task)],
        env={**os.environ, **dict.fromkeys(names, count)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    if done.returncode:
        raise OSError(f"{size} ranks: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def places(ranks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (ranks, threads of each): one process with all cores' threads, then ranks of one."""
    yield 1, 1
    if cores() > 1:
        yield 1, min(cores(), max(ranks))
    for size in ranks:
        if size > 1:
            yield size, 1


def compare(
    nets: Sequence[tuple[str, int, int | None]], ranks: Sequence[int], seconds: float, rounds: int
) -> dict[str, Any]:
    """Measure, print a table, and return all rows.

    Args:
        nets: (net, global batch, image size).
        rounds: of all places in turn; medians of rounds are shown.
    """
    sums = {size: on_ranks(size, 1, {"what": "links"}) for size in {*ranks, 2} - {1}}
    for size, found in sums.items():
        shown = ", ".join(f"{count:,} B {1e6 * each:.0f} us" for count, each in found)
        print(f"sums on {size} ranks: {shown}")
    link = fitted(2, sums[2])
    print(f"link: {1e6 * link.alpha:.1f} us, {1e-9 * link.beta:.2f} GB/s")
    head = ("net", "batch", "ranks", "threads", "step ms", "compute", "exposed", "", "efficiency")
    print("{:9} {:>6} {:>6} {:>8} {:>9} {:>9} {:>9} {:>6} {:>11} {:>9}".format(*head, "model"))
    rows = []
    for net, batch, size in nets:
        for row in net_rows(net, batch, size, list(places(ranks)), seconds, rounds, link):
            rows.append(row)
            print(
                f"{net:9} {batch:6} {row['ranks']:6} {row['threads']:8} {row['step_ms']:9.2f} "
                f"{row['step_ms'] - row['exposed_ms']:9.2f} {row['exposed_ms']:9.2f} "
                f"{row['exposed_ms'] / row['step_ms']:6.1%} {row['efficiency']:11.1%} "
                + ("" if row["model_ms"] is None else f"{row['model_ms']:9.2f}"),
                flush=True,
            )
    return {"rows": rows, "sums": sums, "link": link._asdict()}


def net_rows(
    net: str,
    batch: int,
    size: int | None,
    chosen: Sequence[tuple[int, int]],
    seconds: float,
    rounds: int,
    link: Link,
) -> Iterator[dict[str, Any]]:
    """Measure one net; yield its rows."""
    task = {"what": "steps", "net": net, "batch": batch, "size": size, "seconds": seconds}
    found: dict[tuple[int, int], list[dict[str, Any]]] = {place: [] for place in chosen}
    alone: dict[int, list[float]] = {}
    for _ in range(rounds):
        for count, threads in chosen:
            found[count, threads].append(on_ranks(count, threads, task))
            if count > 1:  # one rank with its share
                part = on_ranks(1, 1, {**task, "batch": batch // count})
                alone.setdefault(count, []).append(part["step_ms"])
    base = statistics.median(result["step_ms"] for result in found[1, 1])
    for (count, threads), results in found.items():
        step = statistics.median(result["step_ms"] for result in results)
        model = None
        if count > 1:
            compute = statistics.median(alone[count]) * max(1.0, count / cores())
            model = 1e3 * predicted(net, count, 1e-3 * compute, link)
        yield {
            **{"net": net, "batch": batch, "size": size, "ranks": count, "threads": threads},
            "step_ms": step,
            "exposed_ms": statistics.median(result["exposed_ms"] for result in results),
            "efficiency": base / step / (count * threads),
            "model_ms": model,
            "rounds": results,
        }


def fitted(size: int, found: Sequence[Sequence[float]]) -> Link:
    """Return the link whose ring takes the measured times of the smallest and largest sums."""
    (_, least), *_, (count, most) = found
    alpha = least / (2 * (size - 1))
    return Link(alpha, 2 * (size - 1) / size * count / max(most - least, 1e-9))


def predicted(net: str, size: int, compute: float, link: Link) -> float:
    """Return the model's seconds of a step on ``size`` ranks, each of which computes ``compute``
    seconds."""
    waited = exposed(buckets(layers_of(net)), BACKWARD * compute, lambda m: ring(link, size, m))
    return compute + waited


def main(task: dict[str, Any]) -> None:
    result = {"steps": steps, "links": links}[task["what"]](task)
    if distributed.connect("auto").rank == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
