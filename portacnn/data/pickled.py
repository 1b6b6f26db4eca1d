"""Read the pickles that CIFAR's files are, as data: no code in them is run, nothing is imported.

A pickle is a program for a stack machine. This one knows the instructions that build dicts, lists,
tuples, bytes, text, whole numbers, booleans and None, and recognizes NumPy's way to write an array:

    _reconstruct(ndarray, (0,), b"b"), then its state (1, shape, dtype, fortran, bytes)
    dtype("u1", 0, 1), then its state (3, "|", None, None, None, -1, -1, 0)

Every other instruction, and every other name of a function or class, is refused.
"""

import struct
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import numpy as np

from portacnn.errors import DataFormatError
from portacnn.text import quoted

_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"): "_reconstruct",
    ("numpy._core.multiarray", "_reconstruct"): "_reconstruct",
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",  # Python 3's way to write bytes in protocol 2
}
_DTYPES = {"u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "b1"}


class _Global(NamedTuple):
    """A name that stands for itself."""

    name: str


class _Dtype:
    def __init__(self, code: str) -> None:
        self.code, self.order = code, "|"


class _Array:
    """An array whose state has not come yet."""


_MARK = object()


def read_pickle(content: bytes, name: str) -> Any:
    """Return what a pickle holds, if it holds only dicts, lists, text, bytes, whole numbers and
    arrays.

    Args:
        content: the whole file.
        name: of the file, for messages.

    Raises:
        DataFormatError: if it is damaged, or has an instruction, a function or a class that is not
            known here.
    """
    try:
        return _checked(_Machine(content).run())
    except DataFormatError as error:
        raise DataFormatError(f"{name}: {error.message}") from None
    except (
        struct.error,
        IndexError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
        MemoryError,
    ) as error:
        raise DataFormatError(
            f"{name}: expected a whole pickle of CIFAR's form, but it is damaged "
            f"({type(error).__name__}: {error})"
        ) from error


class _Machine:
    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        while True:
            code = self.take(1)
            if code == b".":
                return self.stack.pop()
            step = _STEPS.get(code)
            if step is None:
                raise DataFormatError(
                    f"the pickle has the instruction {code!r} at byte {self.at - 1}, which data "
                    "sets do not need; it is not read"
                )
            step(self)

    def take(self, count: int) -> bytes:
        if count < 0 or self.at + count > len(self.content):
            raise ValueError(f"it ends at byte {len(self.content)}")
        part = self.content[self.at : self.at + count]
        self.at += count
        return part

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def line(self) -> str:
        end = self.content.index(b"\n", self.at)
        return self.take(end + 1 - self.at)[:-1].decode("utf-8")

    def above_mark(self) -> list[Any]:
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise ValueError("a mark is missing")
        values = self.stack[place + 1 :]
        del self.stack[place:]
        return values

    def top(self, count: int) -> list[Any]:
        values = self.stack[len(self.stack) - count :]
        if len(values) != count or count == 0:
            raise ValueError("the stack is empty")
        del self.stack[len(self.stack) - count :]
        return values

    def take_global(self, module: str, name: str) -> None:
        known = _GLOBALS.get((module, name))
        if known is None:
            raise DataFormatError(
                f"the pickle asks for {quoted(f'{module}.{name}')}, which is not data; portacnn "
                "runs nothing from a file"
            )
        self.stack.append(_Global(known))

    def reduce(self) -> None:
        called, arguments = self.top(2)
        name = called.name if isinstance(called, _Global) else None
        if name == "_reconstruct" and arguments[0] == _Global("ndarray"):
            self.stack.append(_Array())
        elif name == "dtype" and isinstance(arguments[0], str | bytes):
            code = arguments[0]
            self.stack.append(_Dtype(code.decode("ascii") if isinstance(code, bytes) else code))
        elif name == "encode" and arguments[1:] == ("latin1",):
            self.stack.append(arguments[0].encode("latin1"))
        else:
            raise DataFormatError("the pickle calls something other than NumPy's array or dtype")

    def build(self) -> None:
        target, state = self.top(2)
        if isinstance(target, _Dtype):
            order = state[1]
            target.order = order.decode("ascii") if isinstance(order, bytes) else order
        elif isinstance(target, _Array):
            array = _array(*state[1:])
            self.memo.update({i: array for i, known in self.memo.items() if known is target})
            target = array
        else:
            raise DataFormatError("the pickle sets the state of something other than an array")
        self.stack.append(target)

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            raise ValueError("items without a dict")
        target.update(zip(pairs[::2], pairs[1::2], strict=True))

    def extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("items without a list")
        self.stack[-1].extend(values)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def long(self) -> int:
        return int.from_bytes(self.take(self.number("<B")), "little", signed=True)

    def named(self) -> None:
        module, name = self.top(2)
        self.take_global(module, name)


def _array(shape: Any, dtype: Any, fortran: Any, data: Any) -> Any:
    if not isinstance(dtype, _Dtype) or dtype.code not in _DTYPES or dtype.order not in "|<>=":
        raise DataFormatError("the pickle has an array of a dtype other than plain numbers")
    if not isinstance(data, bytes) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("an array must have a shape and bytes")
    kind = np.dtype(dtype.order + dtype.code)
    if len(data) != prod(shape) * kind.itemsize:
        raise ValueError(f"an array of shape {shape} does not take {len(data)} bytes")
    return np.frombuffer(data, kind).reshape(shape, order="F" if fortran else "C")


def _checked(value: Any) -> Any:
    """Return a value after a look at all that is in it, each once: a list may hold another many
    times. Raises DataFormatError for names that stand for nothing."""
    waiting, seen = [value], set()
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, dict | list | tuple):
            if id(inner) not in seen:
                seen.add(id(inner))
                waiting.extend(inner)
                waiting.extend(inner.values() if isinstance(inner, dict) else ())
        elif inner is not None and type(inner) not in (bytes, str, int, bool, np.ndarray):
            what = type(inner).__name__.strip("_")
            raise DataFormatError(f"the pickle holds {what}, which is not data")
    return value


_STEPS: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: m.take(1),  # PROTO
    b"\x95": lambda m: m.take(8),  # FRAME
    b"(": lambda m: m.push(_MARK),
    b"}": lambda m: m.push({}),
    b"]": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"J": lambda m: m.push(m.number("<i")),
    b"\x8a": lambda m: m.push(m.long()),
    b"U": lambda m: m.push(m.take(m.number("<B"))),  # text of Python 2: bytes
    b"T": lambda m: m.push(m.take(m.number("<i"))),
    b"C": lambda m: m.push(m.take(m.number("<B"))),
    b"B": lambda m: m.push(m.take(m.number("<I"))),
    b"\x8e": lambda m: m.push(m.take(m.number("<Q"))),
    b"\x8c": lambda m: m.push(m.take(m.number("<B")).decode("utf-8", "surrogatepass")),
    b"X": lambda m: m.push(m.take(m.number("<I")).decode("utf-8", "surrogatepass")),
    b"t": lambda m: m.push(tuple(m.above_mark())),
    b"\x85": lambda m: m.push(tuple(m.top(1))),
    b"\x86": lambda m: m.push(tuple(m.top(2))),
    b"\x87": lambda m: m.push(tuple(m.top(3))),
    b"a": lambda m: m.extend(m.top(1)),
    b"e": lambda m: m.extend(m.above_mark()),
    b"s": lambda m: m.set_items(m.top(2)),
    b"u": lambda m: m.set_items(m.above_mark()),
    b"q": lambda m: m.remember(m.number("<B")),
    b"r": lambda m: m.remember(m.number("<I")),
    b"\x94": lambda m: m.remember(len(m.memo)),
    b"h": lambda m: m.push(m.memo[m.number("<B")]),
    b"j": lambda m: m.push(m.memo[m.number("<I")]),
    b"c": lambda m: m.take_global(m.line(), m.line()),
    b"\x93": lambda m: m.named(),
    b"R": lambda m: m.reduce(),
    b"b": lambda m: m.build(),
}
