"""The machine behind the stand-in for CuPy: two devices whose memory is the host's (machine.py),
streams, events, captured graphs.

Work is done at once, in the order in which it is given; what a GPU would be free to do in another
order is found out, not left to luck. Every stream keeps a vector clock, events carry clocks from
one to another, and an access to memory that is not ordered after the last write to it (or, for a
write, after the reads) raises ``RaceError``. A copy from pinned memory happens as late as it may,
so pinned memory that is written again too early sends the wrong numbers. Freed memory stays with
its pool and stream and is given out again, full of NaN, so that whoever still holds its address
finds that out.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from weakref import ref

import numpy as np

if TYPE_CHECKING:
    from support.fake_cupy.machine import Block

UNIT = 512  # bytes: blocks are multiples of it, and begin at one
DEVICES = 2


class CUDARuntimeError(RuntimeError):
    """As CuPy's, with the words that CUDA has for the few that occur here."""

    WORDS: ClassVar = {
        2: "cudaErrorMemoryAllocation: out of memory",
        700: "cudaErrorIllegalAddress: an illegal memory access was encountered",
        900: "cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing",
        901: "cudaErrorStreamCaptureInvalidated: operation failed due to a previous error during "
        "capture",
    }

    def __init__(self, status: int) -> None:
        super().__init__(self.WORDS[status])
        self.status = status


class OutOfMemoryError(MemoryError):
    """As CuPy's."""

    def __init__(self, size: int, total: int, limit: int = 0) -> None:
        suffix = f", limit set to: {limit:,} bytes" if limit else ""
        super().__init__(
            f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes{suffix})."
        )


class RaceError(AssertionError):
    """Two streams touch the same memory, and nothing says which of them comes first."""


# --- what was done --------------------------------------------------------------------------------


class Seen(NamedTuple):
    """kind: h2d, d2h, launch, malloc (from the device), sync, capture, graph. detail: the
    function's or kernel's name."""

    kind: str
    detail: str
    nbytes: int


class Log:
    """What was asked of the machine: ``with log.watch() as seen:`` collects it in order."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._watching: list[list[Seen]] = []

    def note(self, kind: str, detail: str = "", nbytes: int = 0) -> None:
        self.counts[kind] += 1
        for seen in self._watching:
            seen.append(Seen(kind, detail, nbytes))

    @contextmanager
    def watch(self) -> Iterator[list[Seen]]:
        seen: list[Seen] = []
        self._watching.append(seen)
        try:
            yield seen
        finally:
            self._watching = [other for other in self._watching if other is not seen]


log = Log()
capacity = [8 << 30] * DEVICES  # bytes of each device; tests lower it
_held = [0] * DEVICES  # bytes that pools have got from it
_local = threading.local()


# --- devices and streams --------------------------------------------------------------------------


def current_device() -> int:
    return getattr(_local, "device", 0)


class Device:
    """``cupy.cuda.Device``."""

    compute_capability = "90"

    def __init__(self, device: "int | Device | None" = None) -> None:
        self.id = current_device() if device is None else int(getattr(device, "id", device))  # type: ignore[arg-type]
        if not 0 <= self.id < DEVICES:
            raise ValueError(f"no device {self.id}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self) -> int:
        return hash(("cupy device", self.id))

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    def __int__(self) -> int:
        return self.id

    def __enter__(self) -> "Device":
        _stack("devices").append(current_device())
        self.use()
        return self

    def __exit__(self, *_: Any) -> None:
        _local.device = _stack("devices").pop()

    def use(self) -> None:
        _local.device = self.id

    def synchronize(self) -> None:
        for stream in list(_streams):
            if stream.device_id == self.id:
                stream._refuse_in_capture()
                stream._finish()
        log.note("sync", f"device {self.id}")

    @property
    def mem_info(self) -> tuple[int, int]:
        return capacity[self.id] - _held[self.id], capacity[self.id]


def _stack(name: str) -> list[Any]:
    if not hasattr(_local, name):
        setattr(_local, name, [])
    return getattr(_local, name)


Clock = dict[int, int]  # stream -> how many of its works are known to be done before
_host: Clock = {}
_heard = [0]  # how often the host has heard of work that is done


def _tell_host(clock: Clock) -> None:
    _merge(_host, clock)
    _heard[0] += 1


def _merge(into: Clock, other: Clock) -> None:
    for stream, count in other.items():
        if into.get(stream, 0) < count:
            into[stream] = count


class Event:
    """``cupy.cuda.Event``."""

    def __init__(
        self, block: bool = False, disable_timing: bool = False, interprocess: bool = False
    ) -> None:
        self._clock: Clock = {}
        self._late: list[Late] = []
        self.time = 0.0

    def record(self, stream: "Stream | None" = None) -> None:
        stream = stream or get_current_stream()
        stream._refuse_in_capture()
        self._clock, self._late = dict(stream._clock), list(stream._late)
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        for late in self._late:
            late.do()
        _tell_host(self._clock)
        log.note("sync", "event")

    @property
    def done(self) -> bool:
        return all(_host.get(stream, 0) >= count for stream, count in self._clock.items())


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    """Milliseconds, on the host's clock."""
    return 1e3 * (end_event.time - start_event.time)


class Late:
    """A copy from pinned memory that has been asked for and has not happened yet."""

    def __init__(self, copy: Callable[[], None]) -> None:
        self._copy: Callable[[], None] | None = copy

    def do(self) -> None:
        if self._copy is not None:
            self._copy, copy = None, self._copy
            copy()


_streams: "list[Stream]" = []
_numbers = iter(range(1, 1 << 60))


class Stream:
    """``cupy.cuda.Stream``: one that is non-blocking, or the device's null stream, which all that
    are blocking stand for."""

    null: "Stream"

    def __init__(
        self,
        null: bool = False,
        non_blocking: bool = False,
        ptds: bool = False,
        priority: int | None = None,
    ) -> None:
        self.device_id = current_device()
        self.is_non_blocking = non_blocking
        self.ptr = next(_numbers) if non_blocking else 0
        self._key = self.ptr or -1 - self.device_id
        self._clock: Clock = {} if non_blocking else _null(self.device_id)._clock
        self._late: list[Late] = []
        self._recording: Recording | None = None
        self._heard = -1
        _streams.append(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and (self.device_id, self.ptr) == (
            other.device_id,
            other.ptr,
        )

    def __hash__(self) -> int:
        return hash((self.device_id, self.ptr))

    def __enter__(self) -> "Stream":
        _stack("streams").append((self.device_id, _currents().get(self.device_id)))
        self.use()
        return self

    def __exit__(self, *_: Any) -> None:
        device, before = _stack("streams").pop()
        _currents()[device] = before

    def use(self) -> "Stream":
        if self.device_id != current_device():
            raise CUDARuntimeError(700)
        _currents()[self.device_id] = self
        return self

    def record(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self._refuse_in_capture()
        _merge(self._clock, event._clock)

    def synchronize(self) -> None:
        self._refuse_in_capture()
        self._finish()
        log.note("sync", "stream")

    def _finish(self) -> None:
        for late in self._late:
            late.do()
        self._late.clear()
        _tell_host(self._clock)

    def begin_capture(self, mode: int | None = None) -> None:
        if not self.is_non_blocking:
            raise CUDARuntimeError(900)
        if self._recording is not None:
            raise CUDARuntimeError(900)
        self._recording = Recording()
        log.note("capture", "begin")

    def end_capture(self) -> "Graph":
        recording, self._recording = self._recording, None
        if recording is None or recording.invalid:
            raise CUDARuntimeError(901)
        log.note("capture", "end")
        return Graph(recording.works, self.device_id)

    def is_capturing(self) -> bool:
        return self._recording is not None

    def _refuse_in_capture(self) -> None:
        if self._recording is not None:
            self._recording.invalid = True
            raise CUDARuntimeError(900)

    def _touch(self, reads: "list[Block]", writes: "list[Block]", name: str) -> None:
        """One work of this stream begins: everything it reads and writes must have been left alone
        by the others."""
        clock = self._clock
        if self._heard != _heard[0]:
            _merge(clock, _host)
            self._heard = _heard[0]
        clock[self._key] = clock.get(self._key, 0) + 1
        mine = self._key, clock[self._key]
        for block in (*reads, *writes):
            if block.released:
                raise CUDARuntimeError(700)
            for late in block.late:
                late.do()
            block.late.clear()
            if block.written is not None and clock.get(block.written[0], 0) < block.written[1]:
                raise RaceError(
                    f"{name} on {self!r} touches memory that another stream may still be writing"
                )
        for block in writes:
            for stream, count in block.read.items():
                if clock.get(stream, 0) < count:
                    raise RaceError(
                        f"{name} on {self!r} writes memory that another stream may still be reading"
                    )
            block.written, block.read = mine, {}
        for block in reads:
            if block not in writes:
                block.read[mine[0]] = mine[1]


def forget_unused() -> None:
    """Once all is done: the streams that nobody has any more need no more synchronizing."""
    kept = [ref(stream) for stream in _streams]
    _streams.clear()
    _streams.extend(stream for each in kept if (stream := each()) is not None)


_nulls: dict[int, Stream] = {}


def _null(device: int) -> Stream:
    if device not in _nulls:
        stream = _nulls[device] = Stream.__new__(Stream)
        stream.device_id, stream.is_non_blocking, stream.ptr, stream._key = (
            device,
            False,
            0,
            -1 - device,
        )
        stream._clock, stream._late, stream._recording = {}, [], None
        stream._heard = -1
        _streams.append(stream)
    return _nulls[device]


def _currents() -> dict[int, Stream | None]:
    if not hasattr(_local, "currents"):
        _local.currents = {}
    return _local.currents


def get_current_stream(device_id: int | None = None) -> Stream:
    device = current_device() if device_id is None else device_id
    return _currents().get(device) or _null(device)


Stream.null = _null(0)


# --- graphs ---------------------------------------------------------------------------------------


class Work(NamedTuple):
    """A launch: what it is called, what it does, and the memory it reads and writes."""

    name: str
    do: Callable[[], None]
    reads: "list[Block]"
    writes: "list[Block]"


class Recording:
    def __init__(self) -> None:
        self.works: list[Work] = []
        self.invalid = False


class Graph:
    """``cupy.cuda.Graph``: what was recorded, done again on the same memory. It keeps none of that
    memory from being freed."""

    def __init__(self, works: list[Work], device_id: int) -> None:
        self._works, self._device_id = works, device_id

    def launch(self, stream: Stream | None = None) -> None:
        stream = stream or get_current_stream()
        stream._refuse_in_capture()
        log.note("graph", f"{len(self._works)} launches")
        for work in self._works:
            stream._touch(work.reads, work.writes, work.name)
            with np.errstate(all="ignore"):
                work.do()

    def upload(self, stream: Stream | None = None) -> None:
        pass

    def debug_dot_str(self, flags: int = 0) -> str:
        return (
            "digraph {"
            + "".join(f'"{n}" [label="{work.name}"]' for n, work in enumerate(self._works))
            + "}"
        )


def note_sent(what: str) -> None:
    """CuPy sends a table of its own making, by way of pinned memory.

    In a capture it would do so too: then the graph has a copy from the host, and an event that is
    never done, so that no pinned memory is used again from there on. Here that is refused, as all
    that is sent in a capture.
    """
    stream = get_current_stream()
    stream._refuse_in_capture()
    log.note("h2d", what)


def submit(work: Work) -> None:
    """A launch on the current stream of the current device: done, or recorded."""
    stream = get_current_stream()
    for block in (*work.reads, *work.writes):
        if block.device != current_device():
            raise ValueError(
                f"Array device must be same as the current device: array device = {block.device} "
                "while current = "
                f"{current_device()}"
            )
    if stream._recording is not None:
        stream._recording.works.append(work)
        return
    stream._touch(work.reads, work.writes, work.name)
    log.note("launch", work.name)
    with np.errstate(all="ignore"):
        work.do()
