"""Shared code of the sections of ``gpu_check.py``: the results of a section, and access to the GPU.

This module does not import CuPy when imported: the parent process never touches the GPU.
"""

import gc
import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SAVE_EVERY = 2.0  # seconds


class NotHereError(Exception):
    """Raised if a section, or the rest of it, cannot run here; the message says why."""


class Section:
    """The results of one section, saved regularly, so that a process that dies leaves its results.

    Attributes:
        quick: a trial run: the least work that covers everything.
        device: the argument of portacnn.resolve.
        data: MNIST's folder, or None.
        red: failures, as sentences; empty if there are none.
        notes: further information, such as what was skipped and why.
        figures, rows: measurements; rows form a table.
    """

    def __init__(self, name: str, path: Path | None = None, **options: Any) -> None:
        self.name, self.path = name, path
        self.quick: bool = options.get("quick", False)
        self.device: str = options.get("device", "cupy")
        self.data: str | None = options.get("data")
        self.out: str | None = options.get("out")
        self.begun = time.perf_counter()
        self.end = self.begun + options.get("seconds", math.inf)
        self.red: list[str] = []
        self.notes: list[str] = []
        self.figures: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.skipped: str | None = None
        self.complete = False
        self._saved = self.begun

    @property
    def left(self) -> float:
        """The remaining seconds."""
        return self.end - time.perf_counter()

    def expect(self, fine: Any, otherwise: str) -> bool:
        """Return whether ``fine`` is true; if not, record the failure."""
        if not fine:
            self.red.append(otherwise)
            self.save()
        return bool(fine)

    def row(self, **values: Any) -> None:
        self.rows.append(values)
        if time.perf_counter() - self._saved > SAVE_EVERY:
            self.save()

    def room(self, seconds: float, otherwise: str) -> bool:
        """Return whether this many seconds are left; if not, note what was skipped."""
        if self.left >= seconds:
            return True
        self.notes.append(f"no time for {otherwise}")
        return False

    @contextmanager
    def caught(self, what: str) -> Iterator[None]:
        """Record an error inside a ``with`` block as a failure and continue. NotHereError is
        re-raised.
        """
        try:
            yield
        except NotHereError:
            raise
        except Exception as error:
            self.red.append(f"{what}: {said(error)}")
            traceback.print_exc(file=sys.stderr)
        finally:
            self.save()

    def run(self, work: Callable[["Section"], None]) -> dict[str, Any]:
        """Run a section's work and record any exception."""
        try:
            with self.caught("it was interrupted"):
                work(self)
        except NotHereError as reason:
            self.skipped = str(reason)
        self.complete = True
        self.save()
        return self.found()

    @property
    def status(self) -> str:
        if self.red or not self.complete:
            return "red"
        return "skipped" if self.skipped else "green"

    def found(self) -> dict[str, Any]:
        return {
            "section": self.name,
            "status": self.status,
            "seconds": time.perf_counter() - self.begun,
            "red": self.red,
            "skipped": self.skipped,
            "notes": self.notes,
            "figures": self.figures,
            "rows": self.rows,
        }

    def save(self) -> None:
        if self.path is not None:
            write_json(self.path, self.found())
            self._saved = time.perf_counter()


def said(error: BaseException) -> str:
    """Return an error as one line."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:400]}"


def write_json(path: Path, value: Any) -> None:
    """Write atomically; NaN and infinities become strings, because JSON has none."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(_plain(value), indent=1, allow_nan=False) + "\n")
    beside.replace(path)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if hasattr(value, "item"):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)


# --- time -----------------------------------------------------------------------------------------


class Clock(NamedTuple):
    """A library's events: ``event()`` marks the current stream, ``between`` returns ms, ``wait``
    waits.
    """

    event: Callable[[], Any]
    between: Callable[[Any, Any], float]
    wait: Callable[[], None]


class Times(NamedTuple):
    """Milliseconds per run over blocks of runs: by events on the device, and by the host's clock
    including the wait.
    """

    device: list[float]
    wall: list[float]
    runs: int  # in a block

    @property
    def ms(self) -> float:
        """The median of the slower clock: events see only their own stream, and the host includes
        its own work.
        """
        return max(statistics.median(self.device), statistics.median(self.wall))

    @property
    def spread(self) -> float:
        """The slowest block divided by the fastest: smaller differences are noise."""
        return max(self.wall) / max(min(self.wall), 1e-9)


def clock_blocks(
    clock: Clock, runs: dict[str, Callable[[], Any]], *, block: float, blocks: int
) -> dict[str, Times]:
    """Time several functions alternately, block by block, so that a slow phase of the machine
    affects all of them.

    Args:
        runs: the functions, warmed up.
        block: the target seconds per block.
        blocks: the number of blocks per function.
    """
    found: dict[str, Times] = {}
    for name, run in runs.items():
        _, once = _block(clock, run, 3)
        found[name] = Times([], [], min(max(int(1e3 * block / max(once, 1e-4)), 1), 1000))
    for number in range(blocks):
        turned = list(runs)[number % len(runs) :] + list(runs)[: number % len(runs)]
        for name in turned:
            device, wall = _block(clock, runs[name], found[name].runs)
            found[name].device.append(device)
            found[name].wall.append(wall)
    return found


def _block(clock: Clock, run: Callable[[], Any], count: int) -> tuple[float, float]:
    clock.wait()
    start = time.perf_counter()
    first = clock.event()
    for _ in range(count):
        run()
    last = clock.event()
    clock.wait()
    wall = 1e3 * (time.perf_counter() - start)
    return clock.between(first, last) / count, wall / count


# --- the GPU --------------------------------------------------------------------------------------


class Gpu:
    """CuPy's device: its clock, its memory, and its transfers to and from the host."""

    def __init__(self, device: str) -> None:
        add_root()
        from portacnn import resolve
        from portacnn.errors import BackendError

        try:
            self.home = resolve(device)
        except BackendError as error:
            raise NotHereError(str(error)) from error
        import cupy

        self.cp = cupy
        # pools and direct CuPy calls use the current device
        self.home.device.use()
        self.clock = Clock(self._event, cupy.cuda.get_elapsed_time, self.home.synchronize)

    def _event(self) -> Any:
        event = self.cp.cuda.Event()
        event.record()
        return event

    @property
    def name(self) -> str:
        name = self.cp.cuda.runtime.getDeviceProperties(self.home.device.id)["name"]
        return name.decode() if isinstance(name, bytes) else str(name)

    def forget(self) -> None:
        """Free unused memory."""
        gc.collect()
        self.cp.get_default_memory_pool().free_all_blocks()

    def memory(self) -> dict[str, int]:
        """Return bytes: used and held by the pool, and free on the GPU, which includes other
        pools.
        """
        pool = self.cp.get_default_memory_pool()
        return {
            "used": pool.used_bytes(),
            "held": pool.total_bytes(),
            "free": self.cp.cuda.runtime.memGetInfo()[0],
        }

    @contextmanager
    def poisoned(self) -> Iterator[None]:
        """Fill all new memory with ones inside a ``with`` block: NaN as a float, -1 as an integer.
        Unwritten results become visible.
        """
        pool = self.cp.get_default_memory_pool()

        def poison(size: int) -> Any:
            memory = pool.malloc(size)
            if size:
                memory.memset_async(0xFF, size)
            return memory

        with self.cp.cuda.using_allocator(poison):
            yield


@contextmanager
def replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    """Replace ``owner.name`` by ``new`` inside a ``with`` block."""
    old = getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, old)


def add_root() -> None:
    """Make the checkout importable, installed or not."""
    for folder in (ROOT, ROOT / "scripts"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))


# --- tables ---------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Format rows with equal keys as lines of columns, numbers aligned to the right."""
    if not rows:
        return []
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [
        [key.replace("_", " ") for key in keys],
        *([cell(row.get(key)) for key in keys] for row in rows),
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(keys))]
    words = [any(isinstance(row.get(key), str) for row in rows) for key in keys]
    lines = [
        "  ".join(
            text.ljust(width) if left else text.rjust(width)
            for text, width, left in zip(line, widths, words, strict=True)
        ).rstrip()
        for line in cells
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def cell(value: Any) -> str:
    """Format a number with three digits, or with all digits before the point."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if 100 <= abs(value) < 1e7 else f"{value:.3g}"
    return str(value)
