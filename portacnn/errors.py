"""The exceptions that portacnn raises.

Each also derives from the built-in exception that a caller would expect (``ValueError``,
``TypeError``, ``RuntimeError``), so code that does not know portacnn can catch it. A message says
what was expected, what was received, where, and how to fix it. Names and values in it may come from
an untrusted file, so every message is printed escaped, and shortened if it is very long.
"""

from typing import Self

from portacnn.text import message as shown


class PortacnnError(Exception):
    """The base class of portacnn's exceptions.

    ``where`` is the op, or the path and class of the layer, that raised it.
    """

    def __init__(self, message: str, where: str | None = None) -> None:
        super().__init__(message)
        self.message, self.where = message, where

    def __str__(self) -> str:
        return shown(f"{self.where}: {self.message}" if self.where else self.message)

    def at(self, where: str, *, over: bool = False) -> Self:
        """Set ``where`` if it is not set (with ``over``, always) and return the error."""
        if over or self.where is None:
            self.where = where
        return self


class BackendError(PortacnnError, RuntimeError):
    """Raised if a requested backend or device is unknown or unavailable on this machine."""


class DependencyError(PortacnnError, ImportError):
    """Raised if an optional package is needed and not installed."""


class ArrayError(PortacnnError, TypeError):
    """Raised for arrays of the wrong kind: mixed libraries, devices or float types, or integers
    instead of floats.
    """


class ShapeError(PortacnnError, ValueError):
    """Raised for a shape that does not match: wrong rank or channel count, or a kernel larger than
    its input.
    """


class ArgumentError(PortacnnError, ValueError):
    """Raised for an invalid argument: an unknown name, a negative stride, a count out of range."""


class LabelError(PortacnnError, ValueError):
    """Raised for labels that do not match the data: wrong length, out of range, neither integer nor
    one-hot.
    """


class StateError(PortacnnError, RuntimeError):
    """Raised for a call out of order: a layer used before it is built, a backward pass without its
    forward pass.
    """


class OutOfMemoryError(PortacnnError, MemoryError):
    """Raised if a device or the host lacks the memory for a computation. Nothing was changed."""


class NotFiniteError(PortacnnError, FloatingPointError):
    """Raised if NaN or infinity prevents the training from continuing."""


class CheckpointError(PortacnnError, OSError):
    """Raised if a checkpoint could not be written. Earlier checkpoints are unchanged."""


class DataFormatError(PortacnnError, ValueError):
    """Raised for a data file that is truncated, of an unknown format, or inconsistent with its
    header.
    """


class ModelFormatError(PortacnnError, ValueError):
    """Raised for a saved model that is truncated, of an unknown format, or does not match the
    network.
    """
