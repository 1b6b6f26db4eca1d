"""What happens if ranks disagree, or one of them fails.

A rank that raises leaves the others in a collective operation that never ends. ``taking_down`` ends
the whole job then. The launcher does so if a rank is killed.
"""

import platform
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import sleep
from types import TracebackType
from typing import Any

from portacnn.console import write
from portacnn.distributed.base import Communicator
from portacnn.errors import ArgumentError
from portacnn.text import cut

GRACE = 2.0
"""Seconds in which all ranks must raise an error, if it is one that all of them have in common."""


def agree(communicator: Communicator, facts: Mapping[str, Any]) -> None:
    """Check that all ranks have the same facts: versions, model, data, options. Values are JSON's.

    Raises:
        ArgumentError: on all ranks, if one differs. The message names the rank and the fact.
    """
    ranks = communicator.gather(dict(facts))
    for rank, theirs in enumerate(ranks):
        for name in [*ranks[0], *(name for name in theirs if name not in ranks[0])]:
            one, other = (_shown(each, name) for each in (ranks[0], theirs))
            if one != other:
                raise ArgumentError(
                    f"the ranks of a job must train the same: {name} is {one} on rank 0, {other} "
                    f"on rank {rank}"
                )


def _shown(facts: Mapping[str, Any], name: str) -> str:
    return cut(repr(facts[name]), 200) if name in facts else "missing"


@contextmanager
def taking_down(communicator: Communicator) -> Iterator[None]:
    """End the job if this rank raises an error in the block and others do not.

    The traceback is printed with the rank. An error that all ranks raise within ``GRACE`` seconds
    is an ordinary one, which callers may handle.
    """
    try:
        yield
    except BaseException as error:
        if communicator.size > 1 and not communicator.meets(GRACE):
            _end(communicator, error)
        raise


def take_down_at_errors(communicator: Communicator) -> None:
    """Do as ``taking_down`` for the whole program: for errors that nobody has handled."""
    usual = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not communicator.meets(GRACE):
            _end(communicator, error)
        elif communicator.rank == 0:
            usual(kind, error, trace)

    sys.excepthook = hook


def _end(communicator: Communicator, error: BaseException) -> None:
    who = f"rank {communicator.rank} of {communicator.size} on {platform.node()}"
    trace = "".join(traceback.format_exception(error)).rstrip()
    # One write, so that ranks do not mix.
    write(sys.stderr, f"{who} failed and ends the job:\n{trace}")
    sleep(0.5)  # launchers drop output that they have not read when they hear of an abort
    communicator.abort(1)
