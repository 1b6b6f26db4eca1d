"""Memory that is used again: a network's activations take the same room step after step.

Fresh memory is dear: the system hands out a large array page by page, at its first touch, and that can cost as much as what
is computed into it. Within ``with workspace(ws):`` a backend's kernels therefore take the room for what they give back from
``ws``, in order, and the next ``with`` on the same workspace starts over. So nothing that lies in a workspace may
outlive its block: activations and gradients lie there, losses do not, and layers copy the gradients of their parameters out.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from typing import Any

from portacnn.errors import StateError
from portacnn.runtime import Array


class Workspace:
    """Room for one model in one thread. It grows to what one block takes, for each batch size that comes by, and no further."""

    def __init__(self) -> None:
        self._arrays: dict[Any, list[Array]] = defaultdict(list)
        self._scratch: dict[Any, Array] = {}
        self._taken: dict[Any, int] = {}
        self._open = False

    def take(self, create: Callable[..., Array], shape: tuple[int, ...], dtype: Any) -> Array:
        """The next array of this kind that the block has not had yet, with whatever it last held."""
        key = (shape, dtype)
        number = self._taken.get(key, 0)
        self._taken[key] = number + 1
        arrays = self._arrays[key]
        if number == len(arrays):
            arrays.append(create(shape, dtype=dtype))
        return arrays[number]

    def borrow(self, create: Callable[..., Array], shape: tuple[int, ...], dtype: Any, number: int) -> Array:
        """Room that the next one who borrows under this number gets too."""
        size = prod(shape)
        held = self._scratch.get((number, dtype))
        if held is None or held.shape[0] < size:
            self._scratch[number, dtype] = held = create((size,), dtype=dtype)
        return held[:size].reshape(shape)


_current: ContextVar[Workspace | None] = ContextVar("portacnn_workspace", default=None)


@contextmanager
def workspace(room: Workspace) -> Iterator[None]:
    """Within it, kernels take memory from ``room``, from its start. Raises StateError where it is in use already."""
    if room._open:
        raise StateError("this workspace is in use: give each model and each thread one of its own")
    room._open, room._taken = True, {}
    token = _current.set(room)
    try:
        yield
    finally:
        _current.reset(token)
        room._open = False


def empty(create: Callable[..., Array], shape: tuple[int, ...], dtype: Any) -> Array:
    """Room for a result: from the workspace of the block around, or fresh from ``create(shape, dtype=...)``."""
    room = _current.get()
    return create(shape, dtype=dtype) if room is None else room.take(create, shape, dtype)


def scratch(create: Callable[..., Array], shape: tuple[int, ...], dtype: Any, number: int = 0) -> Array:
    """Room that a kernel needs while it runs, and no longer; for a second one at the same time, take another ``number``."""
    room = _current.get()
    return create(shape, dtype=dtype) if room is None else room.borrow(create, shape, dtype, number)
