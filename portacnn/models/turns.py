"""One call at a time: which thread predicts, and when the next one does.

A forward pass is many short functions, and each releases the GIL: threads that run them at the same
time mostly wait for each other. The calls of a process therefore take turns. A change of threads
costs about as much as a small call: another core wakes up, waits for the GIL, and has none of the
weights in its cache. A thread that calls again at once therefore keeps its turn for ``SLICE``
seconds, as CPython keeps the GIL for its switch interval.
"""

import os
from collections import deque
from collections.abc import Callable
from threading import Lock, RLock, local
from time import perf_counter
from typing import Any

PATIENCE = 2.0
"""Seconds that a call waits for its turn at most. It then runs beside the other call, which may be
waiting for it: a hook may do anything. Later calls take turns among themselves."""
SLICE = 0.002
"""Seconds for which a thread that calls again and again keeps its turn while others wait."""
SOON = 0.0002
"""A thread calls again and again if it calls within this many seconds of its last call."""
LOOK = 0.001, 0.05
"""Seconds after which a waiting thread looks whether the turn was kept in vain: at first, and at
last."""


class _Turn:
    """The right to run, which the owner of ``lock`` has.

    Attributes:
        kept: when the owner finished its call, while it keeps the turn for its next one. Whoever
            pops it has the turn.
        since: when the owner's slice began.
    """

    def __init__(self) -> None:
        self.lock, self.since = RLock(), 0.0
        self.kept: deque[float] = deque()


class _Here(local):
    last = 0.0
    """When this thread finished its last call."""


_turn, _waiting, _here = _Turn(), Lock(), _Here()


def in_turn(function: Callable[..., Any], /, *arguments: Any) -> Any:
    """Return ``function(*arguments)``, called when it is this thread's turn. A call within such a
    call runs at once.
    """
    start, turn = perf_counter(), _turn
    nested = turn.lock._is_owned() and not turn.kept  # type: ignore[attr-defined]
    try:
        if not nested:
            turn = _taken(turn, start)
        return function(*arguments)
    finally:
        # Asked of the lock, as an interrupt may come between the call and its result.
        if not nested:
            turn = turn if turn.lock._is_owned() else _turn  # type: ignore[attr-defined]
            if turn.lock._is_owned():  # type: ignore[attr-defined]
                _give(turn, start)


def _taken(turn: _Turn, start: float) -> _Turn:
    """Wait for the turn, and return it."""
    if turn.lock._is_owned():  # type: ignore[attr-defined]
        try:
            turn.kept.pop()
            return turn
        except IndexError:  # another thread has taken it
            turn = _turn
    if not _waiting.locked() and turn.lock.acquire(blocking=False):
        turn.since = start
        return turn
    with _waiting:  # one thread looks, the others sleep
        look, most = LOOK
        while not (turn := _turn).lock.acquire(timeout=look):
            now, look = perf_counter(), min(2 * look, most)
            if now - start > PATIENCE or _kept_in_vain(turn, now):
                turn = _replaced()
                break
        turn.since = perf_counter()
    return turn


def _kept_in_vain(turn: _Turn, now: float) -> bool:
    """Return whether the owner of the turn has kept it and not called again, and take its right."""
    try:
        return now - turn.kept[-1] > SOON and bool(turn.kept.pop())
    except IndexError:
        return False


def _replaced() -> _Turn:
    """Return a new turn that this thread has: only the owner of a lock can release it."""
    global _turn
    turn = _Turn()
    turn.lock.acquire()
    _turn = turn
    return turn


def _give(turn: _Turn, start: float) -> None:
    """Release the turn, or keep it for the next call of this thread."""
    end = perf_counter()
    soon, _here.last = start - _here.last < SOON, end
    if soon and _waiting.locked() and end - turn.since < SLICE:
        turn.kept.append(end)
    else:
        turn.lock.release()


def _in_child() -> None:
    """Make new locks in a forked child, where the thread that held them does not exist."""
    global _turn, _waiting
    _turn, _waiting = _Turn(), Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
