"""The memory of the machine behind the stand-in for CuPy: blocks, pools, pinned memory. The rest of
the machine is in streams.py; what others use of it is known here too."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from support.fake_cupy.streams import (
    DEVICES,
    UNIT,
    Clock,
    CUDARuntimeError,
    Device,
    Event,
    Graph,
    Late,
    Log,
    OutOfMemoryError,
    RaceError,
    Recording,
    Seen,
    Stream,
    Work,
    _held,
    _stack,
    capacity,
    current_device,
    get_current_stream,
    get_elapsed_time,
    log,
    note_sent,
    submit,
)

__all__ = [
    "DEVICES",
    "UNIT",
    "CUDARuntimeError",
    "Clock",
    "Device",
    "Event",
    "Graph",
    "Late",
    "Log",
    "OutOfMemoryError",
    "RaceError",
    "Recording",
    "Seen",
    "Stream",
    "Work",
    "_held",
    "_stack",
    "capacity",
    "current_device",
    "get_current_stream",
    "get_elapsed_time",
    "log",
    "note_sent",
    "submit",
]


class Block:
    """A stretch of a device's memory, and who has touched it."""

    def __init__(self, size: int, device: int, pool: "MemoryPool", arena: int) -> None:
        room = np.empty(size + UNIT, np.uint8)
        begin = -room.ctypes.data % UNIT
        self.memory = room[begin : begin + size]
        self.size, self.device, self.pool, self.arena = size, device, weakref.ref(pool), arena
        self.written: tuple[int, int] | None = None
        self.read: Clock = {}
        self.late: list[Any] = []
        self.released = False


class Memory:
    """A block in use: it goes back to its pool with the last array that lies in it."""

    def __init__(self, block: Block) -> None:
        self.block, self.size, self.device_id = block, block.size, block.device

    @property
    def ptr(self) -> int:
        return self.block.memory.ctypes.data

    def __del__(self) -> None:
        pool = self.block.pool()
        if pool is not None:
            pool._take_back(self.block)
        elif _release is not None:
            _release(self.block)


def _release(block: Block) -> None:
    block.released = True
    _held[block.device] -= block.size


class MemoryPointer:
    """``cupy.cuda.MemoryPointer``."""

    def __init__(self, mem: Memory, offset: int = 0) -> None:
        self.mem, self.ptr, self.device_id = mem, mem.ptr + offset, mem.device_id

    def __add__(self, offset: int) -> "MemoryPointer":
        return MemoryPointer(self.mem, self.ptr - self.mem.ptr + offset)

    def memset_async(self, value: int, size: int, stream: "Stream | None" = None) -> None:
        begin, block = self.ptr - self.mem.ptr, self.mem.block
        submit(Work("memset", lambda: block.memory[begin : begin + size].fill(value), [], [block]))


class DeviceMemory:
    """``cupy.cuda.Memory``: whether the device has so many bytes; the pool that asked says
    where."""

    def __init__(self, size: int) -> None:
        self.size, self.device_id, self.ptr = size, current_device(), 0
        if _held[self.device_id] + size > capacity[self.device_id]:
            raise CUDARuntimeError(2)


class MemoryPool:
    """``cupy.cuda.MemoryPool``: free blocks are kept apart by stream, as there, and are used again
    for the same size only."""

    def __init__(self, allocator: Any = DeviceMemory) -> None:
        self._allocator = allocator
        self._free: dict[tuple[int, int], dict[int, list[Block]]] = {}
        self._total = [0] * DEVICES
        self._used = [0] * DEVICES
        self._limit = [0] * DEVICES

    def malloc(self, size: int) -> MemoryPointer:
        device, stream = current_device(), get_current_stream()
        if stream._recording is not None and self is default_pool:
            raise AssertionError(
                "memory of the default pool, taken in a capture, would be handed to others later"
            )
        size = max(-(-size // UNIT) * UNIT, UNIT)
        arena = self._free.setdefault((device, stream._key), {})
        blocks = arena.get(size)
        block = blocks.pop() if blocks else self._fresh(size, device, stream._key)
        self._used[device] += size
        block.memory.fill(0xFF)  # NaN
        return MemoryPointer(Memory(block))

    def _fresh(self, size: int, device: int, arena: int) -> Block:
        limit = self._limit[device]
        for attempt in (1, 2):
            with suppress(CUDARuntimeError):
                if not (limit and self._total[device] + size > limit):
                    self._allocator(size)
                    break
            if attempt == 2:
                raise OutOfMemoryError(size, self._total[device], limit)
            self.free_all_blocks()
        self._total[device] += size
        _held[device] += size
        log.note("malloc", "", size)
        return Block(size, device, self, arena)

    def _take_back(self, block: Block) -> None:
        self._used[block.device] -= block.size
        self._free.setdefault((block.device, block.arena), {}).setdefault(block.size, []).append(
            block
        )

    def free_all_blocks(self, stream: Stream | None = None) -> None:
        for (device, _), arena in self._free.items():
            if device == current_device():
                for blocks in arena.values():
                    for block in blocks:
                        self._total[device] -= block.size
                        _release(block)
                arena.clear()

    def __del__(self) -> None:
        for arena in self._free.values():
            for blocks in arena.values():
                for block in blocks:
                    if _release is not None:  # the interpreter's end takes functions away
                        _release(block)

    def used_bytes(self) -> int:
        return self._used[current_device()]

    def total_bytes(self) -> int:
        return self._total[current_device()]

    def free_bytes(self) -> int:
        return self.total_bytes() - self.used_bytes()

    def n_free_blocks(self) -> int:
        arenas = (arena for (device, _), arena in self._free.items() if device == current_device())
        return sum(len(blocks) for arena in arenas for blocks in arena.values())

    def get_limit(self) -> int:
        return self._limit[current_device()]

    def set_limit(self, size: int | None = None, fraction: float | None = None) -> None:
        self._limit[current_device()] = size or 0


default_pool = MemoryPool()


def get_allocator() -> Callable[[int], MemoryPointer]:
    return (_stack("allocators") or [default_pool.malloc])[-1]


@contextmanager
def using_allocator(allocator: Callable[[int], MemoryPointer]) -> Iterator[None]:
    _stack("allocators").append(allocator)
    try:
        yield
    finally:
        _stack("allocators").pop()


class PinnedMemoryPointer(bytearray):
    """``cupy.cuda.PinnedMemoryPointer``: its bytes are there for ``numpy.frombuffer``."""

    @property
    def ptr(self) -> int:
        return np.frombuffer(self, np.uint8).ctypes.data


def alloc_pinned_memory(size: int) -> PinnedMemoryPointer:
    memory = PinnedMemoryPointer(b"\xff" * size)
    span = (memory.ptr, memory.ptr + size)
    pinned.append(span)
    weakref.finalize(memory, pinned.remove, span)
    return memory


pinned: list[tuple[int, int]] = []


def is_pinned(array: np.ndarray) -> bool:
    return any(
        begin <= array.ctypes.data and array.ctypes.data + array.nbytes <= end
        for begin, end in pinned
    )
