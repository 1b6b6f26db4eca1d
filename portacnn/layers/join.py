"""Layers with several inputs, for a ``Graph``: arithmetic, a choice, concatenation and matrix
products. ``ArithmeticWith`` and ``MatMulWith`` take one input, and have the other operand as a
parameter or constant. ``Constant`` makes an operand for the others.

Notation: N batch, S one sample's axes. The batch is axis 0.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import Any

from portacnn import ops
from portacnn.arguments import one_of, whole, wholes
from portacnn.errors import PortacnnError, ShapeError
from portacnn.layers.base import Layer, Shape
from portacnn.ops.join import concat_channels
from portacnn.ops.pointwise import ARITHMETIC, unbroadcast
from portacnn.runtime import Array, backend_of, where

__all__ = [
    "Arithmetic",
    "ArithmeticWith",
    "Concat",
    "Constant",
    "Join",
    "MatMul",
    "MatMulWith",
    "Where",
]


class Join(Layer, abstract=True):
    """A layer with several inputs. ``infer`` takes a tuple of shapes, ``forward`` takes a list of
    arrays, and ``backward`` returns a list of gradients.

    Attributes:
        least, most: the minimum and maximum number of inputs; ``most`` None means no maximum.
    """

    least: int = 2
    most: int | None = None

    def check_count(self, count: int) -> None:
        """Raise ShapeError if the number of inputs is out of range."""
        if count < self.least or (self.most is not None and count > self.most):
            wanted = str(self.least) if self.least == self.most else f"at least {self.least}"
            raise ShapeError(f"expected {wanted} inputs, got {count}", type(self).__name__)


def broadcast(first: Shape, second: Shape) -> Shape:
    """Return the broadcast shape of two samples with the same number of axes. Raises ShapeError if
    they do not broadcast."""
    if len(first) != len(second) or any(
        n != m and 1 not in (n, m) for n, m in zip(first, second, strict=True)
    ):
        raise ShapeError(f"samples {first} and {second} do not broadcast")
    return tuple(m if n == 1 else n for n, m in zip(first, second, strict=True))


class Arithmetic(Join):
    """Elementwise arithmetic on two inputs, with broadcasting: x (N, *S1), (N, *S2) -> y (N, *S).

    Args:
        kind: as for ``portacnn.ops.arithmetic``.
    """

    least = most = 2

    def __init__(self, kind: str) -> None:
        self.kind_ = _checked_kind(kind, type(self).__name__)

    def infer(self, shape: Any) -> Shape:
        return broadcast(*shape)

    def forward(self, x: Any, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        return ops.arithmetic(x[0], x[1], self.kind_, keep=keep)

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Any:
        return list(ops.arithmetic_backward(dy, cache))


class ArithmeticWith(Layer):
    """Elementwise arithmetic on the input and an array of the layer: x (N, *S) -> y (N, *OUT).

    Args:
        kind: as for ``portacnn.ops.arithmetic``.
        shape: of the array, broadcast against one sample: (C, 1, 1) is one value for each channel.
        constant_first: whether the array is the first operand: value - x.
        learn: True for a parameter, False for a buffer.

    Parameter or buffer: ``value`` (*shape).
    """

    def __init__(
        self, kind: str, shape: Sequence[int], constant_first: bool = False, learn: bool = True
    ) -> None:
        self.kind_ = _checked_kind(kind, type(self).__name__)
        try:
            self.shape = wholes("shape", shape, 1)
        except PortacnnError as error:
            raise error.at(type(self).__name__)
        self.constant_first, self.learn = bool(constant_first), bool(learn)

    def infer(self, shape: Shape) -> Shape:
        if len(self.shape) > len(shape):
            raise ShapeError(f"a constant {self.shape} has more axes than samples {shape}")
        result = broadcast(shape, (1,) * (len(shape) - len(self.shape)) + self.shape)
        neutral = 1.0 if self.kind_ in ("multiply", "divide", "power") else 0.0
        if self.learn:
            self.declare("value", self.shape, "ones" if neutral else "zeros")
        else:
            self.declare_buffer("value", self.shape, neutral)
        return result

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        self.check_built()
        value = self.params["value"] if self.learn else self.buffers["value"]
        a, b = (value, x) if self.constant_first else (x, value)
        return ops.arithmetic(a, b, self.kind_, keep=keep)

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        learn = self.learn and not self.is_frozen("value")
        need = (learn, need_dx) if self.constant_first else (need_dx, learn)
        da, db = ops.arithmetic_backward(dy, cache, need=need)
        dx, dvalue = (db, da) if self.constant_first else (da, db)
        self.add_grads(value=dvalue)
        return dx


def _checked_kind(kind: str, where: str) -> str:
    try:
        return str(one_of("kind", kind, *ARITHMETIC))
    except PortacnnError as error:
        raise error.at(where)


class Where(Join):
    """A choice, as torch.where: (N, *S1), (N, *S2), (N, *S3) -> y (N, *S), the second input where
    the first one is not 0, else the third; broadcast. The first one gets a gradient of zeros."""

    least = most = 3

    def infer(self, shape: Any) -> Shape:
        condition, a, b = shape
        return broadcast(broadcast(condition, a), b)

    def forward(self, x: Any, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        y, cache = ops.select(*x, keep=keep)
        return y, (cache, x[0]) if keep else None

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Any:
        kept, condition = self.kept(cache)
        return [backend_of(dy).xp.zeros_like(condition), *ops.select_backward(dy, kept)]


class Constant(Layer):
    """An array of the layer for each sample, whatever the input: x (N, *S) -> y (N, *shape). It is
    an operand for a ``Join``, such as a class token to concatenate.

    Args:
        shape: of one sample.
        learn: True for a parameter, False for a buffer.

    Parameter or buffer: ``value`` (*shape).
    """

    def __init__(self, shape: Sequence[int], learn: bool = True) -> None:
        try:
            self.shape = wholes("shape", shape, 1)
        except PortacnnError as error:
            raise error.at(type(self).__name__)
        self.learn = bool(learn)

    def infer(self, shape: Shape) -> Shape:
        if self.learn:
            self.declare("value", self.shape, "zeros")
        else:
            self.declare_buffer("value", self.shape, 0.0)
        return self.shape

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        self.check_built()
        value = self.params["value"] if self.learn else self.buffers["value"]
        y = backend_of(x).xp.broadcast_to(value, (x.shape[0], *self.shape))
        return y, tuple(x.shape) if keep else None

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        xp = backend_of(dy).xp
        with where(dy):
            if self.learn and not self.is_frozen("value"):
                self.add_grads(value=xp.sum(dy, axis=0))
            if not need_dx:
                return None
            return xp.zeros(self.kept(cache), dtype=dy.dtype, device=dy.device)


class Concat(Join):
    """Concatenate the inputs along one axis: (N, C1, *S), (N, C2, *S), ... -> (N, C1 + C2 + ...,
    *S) for axis 1.

    Args:
        axis: 1 or more; 0 is the batch, 1 is the channels.
    """

    least = 1

    def __init__(self, axis: int = 1) -> None:
        try:
            self.axis = whole("axis", axis, 1)
        except PortacnnError as error:
            raise error.at(type(self).__name__)

    def infer(self, shape: Any) -> Shape:
        at = self.axis - 1
        first = shape[0]
        if any(
            len(s) != len(first) or s[:at] != first[:at] or s[at + 1 :] != first[at + 1 :]
            for s in shape
        ):
            listed = "; ".join(map(str, shape))
            raise ShapeError(
                f"inputs to concatenate may differ along axis {self.axis} only, got "
                f"samples {listed}"
            )
        if at >= len(first):
            raise ShapeError(f"axis {self.axis} is out of range for a batch of samples {first}")
        return (*first[:at], sum(s[at] for s in shape), *first[at + 1 :])

    def forward(self, x: Any, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        counts = [part.shape[self.axis] for part in x] if keep else None
        if self.axis == 1 and x[0].ndim > 2:
            return concat_channels(x), counts
        return backend_of(x[0]).xp.concat(list(x), axis=self.axis), counts

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Any:
        counts, before = self.kept(cache), (slice(None),) * self.axis
        return [
            dy[(*before, slice(end - count, end), ...)]
            for count, end in zip(counts, accumulate(counts), strict=True)
        ]


class MatMul(Join):
    """The matrix product of two inputs: (N, *S, P, Q), (N, *S, Q, R) -> (N, *S, P, R). The axes S
    are broadcast."""

    least = most = 2

    def infer(self, shape: Any) -> Shape:
        a, b = shape
        if len(a) < 2 or len(a) != len(b) or a[-1] != b[-2]:
            raise ShapeError(f"expected samples (*S, P, Q) and (*S, Q, R), got {a} and {b}")
        return (*broadcast(a[:-2], b[:-2]), a[-2], b[-1])

    def multiply_adds(self) -> int:
        return prod(self.output_shape) * int(self.input_shape[0][-1])  # type: ignore[index]

    def forward(self, x: Any, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        backend = backend_of(x[0])
        with where(x[0]):
            return backend.run(backend.xp.matmul, x[0], x[1]), tuple(x) if keep else None

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Any:
        a, b = self.kept(cache)
        run, xp = backend_of(dy).run, backend_of(dy).xp
        with where(dy):
            return [
                unbroadcast(run(xp.matmul, dy, xp.matrix_transpose(b)), tuple(a.shape)),
                unbroadcast(run(xp.matmul, xp.matrix_transpose(a), dy), tuple(b.shape)),
            ]


class MatMulWith(Layer):
    """The matrix product with a weight, along the last axis: x (N, *S, F) -> y (N, *S, O).

    Args:
        out_features: O.

    Parameters: ``weight`` (F, O), the transpose of ``Linear``'s.
    """

    def __init__(self, out_features: int) -> None:
        try:
            self.out_features = whole("out_features", out_features, 1)
        except PortacnnError as error:
            raise error.at(type(self).__name__)

    def infer(self, shape: Shape) -> Shape:
        if not shape:
            raise ShapeError("expected samples (*S, F), got ()")
        self.declare(
            "weight",
            (shape[-1], self.out_features),
            "default",
            fan_in=shape[-1],
            fan_out=self.out_features,
        )
        return (*shape[:-1], self.out_features)

    def multiply_adds(self) -> int:
        return prod(self.output_shape) * self.input_shape[-1]

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        self.check_built()
        backend = backend_of(x)
        with where(x):
            return backend.run(backend.xp.matmul, x, self.params["weight"]), x if keep else None

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        x, weight, run, xp = (
            self.kept(cache),
            self.params["weight"],
            backend_of(dy).run,
            backend_of(dy).xp,
        )
        rows, up = (xp.reshape(a, (prod(a.shape[:-1]), a.shape[-1])) for a in (x, dy))
        with where(dy):
            if not self.is_frozen("weight"):
                self.add_grads(weight=run(xp.matmul, xp.matrix_transpose(rows), up))
            return run(xp.matmul, dy, xp.matrix_transpose(weight)) if need_dx else None
