"""The values of an ONNX graph as it is read: known arrays, and outputs of layers.

The number of samples N is not known when a file is read. Shapes that a file computes contain it, so
a ``Known`` is an array of ``array + per_sample * N``. A ``Value`` says where its batch axis is.
"""

from typing import NamedTuple

import numpy as np

from portacnn.layers.base import Shape
from portacnn.runtime import HostArray

Dim = tuple[int, int]
"""A size: (a, b) is a + b * N."""


class Known(NamedTuple):
    """An array that is known when the file is read, apart from the number of samples N.

    Attributes:
        array: the elements; with ``per_sample`` the part that does not depend on N.
        learn: whether it comes from an initializer, so it is a weight.
        name: of the initializer.
        per_sample: factors of N, with array's shape and dtype; None for an array without N.
        across: the axis with N equal elements, which has length 1 in ``array``; None for no axis.
    """

    array: HostArray
    learn: bool = False
    name: str = ""
    per_sample: HostArray | None = None
    across: int | None = None

    def dims(self) -> list[Dim]:
        """Return the elements as sizes."""
        per = np.zeros_like(self.array) if self.per_sample is None else self.per_sample
        return [(int(a), int(b)) for a, b in zip(self.array.flat, per.flat, strict=True)]


class Value(NamedTuple):
    """The output of the node called ``node``: an array (N * rows, *shape).

    In the file, the batch is axis ``at``, and the axes of ``shape`` are the others in order. Its
    size there is outer * N * inner: a file may merge other axes with the batch, such as the windows
    of an image. Their elements are rows: samples of their own for the layers that follow. The rows
    of a sample are next to each other in the array, so it is (N, outer, inner, *shape) flattened.

    Attributes:
        at: None in a file for one sample that has removed the batch axis.
    """

    node: str
    shape: Shape
    at: int | None = 0
    outer: int = 1
    inner: int = 1

    @property
    def rank(self) -> int:
        """Return the number of axes in the file."""
        return len(self.shape) + (self.at is not None)

    @property
    def rows(self) -> int:
        """Return the number of rows of each sample."""
        return self.outer * self.inner

    def dims(self) -> list[Dim]:
        """Return the sizes of all axes in the file."""
        dims = [(n, 0) for n in self.shape]
        if self.at is not None:
            dims.insert(self.at, (0, self.rows))
        return dims

    def described(self) -> str:
        """Return the shape as text: [N, 3, 2*N]."""
        return shown(self.dims())


def shown(dims: list[Dim]) -> str:
    """Return sizes as text for an error message."""
    texts = [
        str(a) if not b else ("N" if b == 1 else f"{b}*N") + (f"{a:+}" if a else "")
        for a, b in dims[:16]
    ]
    return f"[{', '.join(texts)}{', ...' if len(dims) > 16 else ''}]"


def product(dims: list[Dim]) -> Dim:
    """Return the product of sizes, of which one at most contains N."""
    a, b = 1, 0
    for c, d in dims:
        a, b = a * c, a * d + b * c
    return a, b
