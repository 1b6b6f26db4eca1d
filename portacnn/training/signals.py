"""Signals as a request: the step under way is finished, and a checkpoint written, before training
ends."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol


class Stoppable(Protocol):
    """A ``Trainer``, or whatever else ends its work in good order when it is told to."""

    def stop(self) -> None: ...


class Caught:
    """Which signal came: its number, or None."""

    number: int | None = None

    @property
    def exit_status(self) -> int:
        """What a process that was ended by it is to return: 128 and its number, as shells have it;
        0 where none came."""
        return 0 if self.number is None else 128 + self.number


@contextmanager
def interrupted_between_steps(work: Stoppable) -> Iterator[None]:
    """Within it the first Ctrl-C tells ``work`` to ``stop``, and KeyboardInterrupt is raised at the
    end, when it has.

    A second one is raised at once. Where Ctrl-C does something else than raise KeyboardInterrupt,
    nothing is changed.
    """
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with stopping_on_signals(work, (signal.SIGINT,) if usual else ()) as caught:
        yield
    if caught.number is not None:
        raise KeyboardInterrupt


@contextmanager
def stopping_on_signals(
    work: Stoppable, numbers: Sequence[int] = (signal.SIGINT, signal.SIGTERM)
) -> Iterator[Caught]:
    """Within it, the first of these signals tells ``work`` to ``stop``; a second one does what it
    would do anyway.

        with stopping_on_signals(trainer) as caught:
            trainer.train()
        sys.exit(caught.exit_status)

    Only a process's main thread may ask for signals: in others nothing is changed, and none is
    caught.
    """
    caught = Caught()
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before: dict[int, Any] = {}

    def restore() -> None:
        while before:
            number, handler = before.popitem()
            # None: set by something other than Python, which cannot be set again from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def handle(number: int, frame: FrameType | None) -> None:
        restore()
        caught.number = number
        work.stop()

    try:
        for number in numbers:
            before[number] = signal.signal(number, handle)
        yield caught
    finally:
        restore()
