"""What backends that record or compile a training step share: how its state is taken apart and its
result put together, and where an error in it occurred.

Everything that differs between steps is an argument of the step: the arrays of its batch, and a
dataclass with numbers, arrays and values that stay the same (``StepState``).
"""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

from portacnn.ops.dispatch import Op
from portacnn.runtime import Array


class UncapturableError(Exception):
    """Raised if a recorded step cannot be replayed."""


@lru_cache
def _names(kind: type) -> tuple[str, ...]:
    if not is_dataclass(kind):
        raise TypeError(f"the last argument of a step must be a dataclass, got {kind.__name__}")
    return tuple(item.name for item in fields(kind))


@lru_cache
def code_of(kind: type) -> str:
    """Return the ``struct`` code of a number of this type: "q" for int64, "d" for float64, "" if it
    is not a number.
    """
    if issubclass(kind, bool) or not issubclass(kind, Real):
        return ""
    return "q" if issubclass(kind, Integral) else "d"


def sorted_out(state: Any, kind: type) -> tuple[dict[str, Any], dict[str, Array], tuple[Any, ...]]:
    """Split the fields of a state into numbers, arrays (of this type), and everything else."""
    numbers: dict[str, Any] = {}
    arrays: dict[str, Array] = {}
    fixed = [type(state)]
    for name in _names(type(state)):
        value = getattr(state, name)
        if isinstance(value, kind):
            arrays[name] = value
        elif code := code_of(type(value)):
            numbers[name] = value
            fixed += name, code
        else:
            fixed += name, value
    return numbers, arrays, tuple(fixed)


def arrays_of(result: Any, kind: type) -> list[Array]:
    """Return the arrays (of this type) of a result, in order. Raises UncapturableError if a replay
    could not compute a part again.
    """
    if isinstance(result, tuple | list):
        return [array for part in result for array in arrays_of(part, kind)]
    if not isinstance(result, kind):
        raise UncapturableError(
            f"it returns a {type(result).__name__}, which would be the same at every replay"
        )
    return [result]


def rebuilt(result: Any, fresh: Iterator[Array]) -> Any:
    """Return a result of the same structure with other arrays."""
    return (
        type(result)(rebuilt(part, fresh) for part in result)
        if isinstance(result, tuple | list)
        else next(fresh)
    )


def place_of(error: BaseException, recorder: str) -> str:
    """Return where an error occurred: the innermost op, else the innermost function of portacnn,
    else a function of the step. ``recorder`` is the file of the code that called the step.
    """
    op, ours, first = "", "", ""
    traceback = error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        code = frame.f_code
        # Reading a frame's locals keeps them alive; those of the recorder would keep the error.
        if code.co_filename not in (recorder, __file__):
            holder = frame.f_locals.get("self")
            if isinstance(holder, Op):
                op = f"{holder.name}_backward" if code.co_name == "run" else holder.name
            else:
                first = first or code.co_qualname
                if frame.f_globals.get("__name__", "").startswith("portacnn."):
                    ours = code.co_qualname
        traceback = traceback.tb_next
    return op or ours or first or "the step"
