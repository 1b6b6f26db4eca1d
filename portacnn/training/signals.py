"""Treat signals as requests: finish the current step and write a checkpoint before training
ends."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol


class Stoppable(Protocol):
    """An object with ``stop``, such as a ``Trainer``: it finishes its work in good order."""

    def stop(self) -> None: ...


class Caught:
    """The signal that was caught: its number, or None."""

    number: int | None = None

    @property
    def exit_status(self) -> int:
        """The exit status of a process ended by this signal: 128 plus its number, as in shells; 0
        if none."""
        return 0 if self.number is None else 128 + self.number


@contextmanager
def interrupted_between_steps(work: Stoppable) -> Iterator[None]:
    """Make the first Ctrl-C call ``work.stop()``; raise KeyboardInterrupt when the block has ended.

    A second Ctrl-C raises KeyboardInterrupt at once. If Ctrl-C has a handler other than Python's
    default, nothing is changed.
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
    """Make the first of these signals call ``work.stop()``; a second one has its usual effect.

        with stopping_on_signals(trainer) as caught:
            trainer.train()
        sys.exit(caught.exit_status)

    Only the main thread of a process can handle signals. In other threads nothing is changed and no
    signal is caught.
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
