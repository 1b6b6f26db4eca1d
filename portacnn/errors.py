"""Every exception portacnn raises on purpose.

Each is also the built-in kind a caller would expect (``ValueError``, ``TypeError``,
``RuntimeError``), so code that knows nothing of portacnn can catch it. A message says what was
expected, what came, where, and what to do. Names and values in it may come from a stranger's file,
so every message is shown escaped, and cut if it is very long.
"""

from typing import Self

from portacnn.text import message as shown


class PortacnnError(Exception):
    """Base of all of portacnn's own exceptions.

    ``where`` is the op, or the path and class of the layer, that the message is about.
    """

    def __init__(self, message: str, where: str | None = None) -> None:
        super().__init__(message)
        self.message, self.where = message, where

    def __str__(self) -> str:
        return shown(f"{self.where}: {self.message}" if self.where else self.message)

    def at(self, where: str, *, over: bool = False) -> Self:
        """The same error, told to have happened at ``where``, unless it knows already (``over``
        replaces that)."""
        if over or self.where is None:
            self.where = where
        return self


class BackendError(PortacnnError, RuntimeError):
    """A backend or device that was asked for is unknown or cannot be had on this machine."""


class DependencyError(PortacnnError, ImportError):
    """A package that only some of portacnn needs, and that is not installed."""


class ArrayError(PortacnnError, TypeError):
    """Arrays of the wrong kind: mixed libraries or devices, integers where floats belong, mixed
    float types."""


class ShapeError(PortacnnError, ValueError):
    """A shape that does not fit: wrong rank, channel count, kernel larger than its input."""


class ArgumentError(PortacnnError, ValueError):
    """A parameter that has no meaning: an unknown name, a negative stride, a count out of range."""


class LabelError(PortacnnError, ValueError):
    """Labels that do not fit the data: wrong length, out of range, neither integer nor one-hot."""


class StateError(PortacnnError, RuntimeError):
    """A call out of order: a layer used before it was built, a backward pass without its
    forward."""


class OutOfMemoryError(PortacnnError, MemoryError):
    """A device, or the host, has no room for what was to be computed; nothing was changed."""


class NotFiniteError(PortacnnError, FloatingPointError):
    """NaN or infinity where training cannot go on."""


class CheckpointError(PortacnnError, OSError):
    """A checkpoint that could not be written; the earlier ones are as they were."""


class DataFormatError(PortacnnError, ValueError):
    """A data file that is cut short, foreign, or contradicts its own header."""


class ModelFormatError(PortacnnError, ValueError):
    """A saved model that is cut short, foreign, or does not fit the network it is loaded into."""
