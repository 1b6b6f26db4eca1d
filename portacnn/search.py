"""Search among embeddings: ``Index`` finds the nearest neighbours of a vector.

    index = Index(model.features(x, "fc1"), names=files)
    found = index.query(model.features(images, "fc1"), k=5)
    index.save("photos.safetensors")

The search is exact. It runs on the device of the embeddings, block by block, so its memory does not
grow with the number of queries. Nothing but one boolean is read from the device.

Notation: N entries of the index, D dimensions, Q queries, B queries of a block, k neighbours.
"""

import os
from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any, NamedTuple, Self

from portacnn.arguments import AnswersKeywords, one_of, plain, told, whole
from portacnn.errors import ArgumentError, ModelFormatError, NotFiniteError, ShapeError
from portacnn.files import load_tensors, save_tensors
from portacnn.ops.dispatch import check_arrays
from portacnn.runtime import Array, Backend, backend_of, describe, dtype_name, resolve, where

METRICS = ("cosine", "euclidean")
FORMAT = 1
"""Number of the format of an index's file."""
_BLOCK = 1 << 22  # elements of an array that a block of queries needs
_SORTED = 4096  # entries that are sorted at once
_KEY = "search"


class Found(NamedTuple):
    """Neighbours of Q queries, nearest first.

    Attributes:
        indices: int64 (Q, k), places in the index.
        distances: (Q, k) of the embeddings' dtype.
    """

    indices: Array
    distances: Array


class Index(AnswersKeywords):
    """Embeddings with names, in which nearest neighbours are searched.

        >>> import numpy as np
        >>> index = Index(np.asarray([[1.0, 0.0], [0.0, 1.0], [3.0, 3.0]]), ["a", "b", "c"])
        >>> found = index.query(np.asarray([[2.0, 0.1]]), k=2)
        >>> [index.names[i] for i in found.indices[0].tolist()]
        ['a', 'c']

    Args:
        embeddings: (N, D), float32 or float64, of any library that has a backend. The index is on
            their device. The array must not be changed afterwards.
        names: a text for each entry, such as the name of its file; None for no names.
        metric: "cosine": 1 - cos of the angle between two vectors, 0 to 2; a vector of zeros has
            the distance 1 to all. "euclidean": the length of the difference. Both as in
            scikit-learn.
        about: what else the file is to hold: JSON values by name, such as the model's file.

    Attributes:
        embeddings, names, metric, about: as given; ``names`` is a tuple or None.

    Raises:
        ShapeError: if the embeddings are not (N, D) with at least one vector.
        ArrayError: if they are not float32 or float64.
        NotFiniteError: if a value is NaN or infinite, or so large that its square is.
        ArgumentError: if there is not one name for each entry, or an argument is out of range.
    """

    def __init__(
        self,
        embeddings: Array,
        names: Sequence[str] | None = None,
        *,
        metric: str = "cosine",
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.metric: str = one_of("metric", metric, *METRICS)
        _check("Index", embeddings)
        if embeddings.shape[0] == 0:
            raise ShapeError(f"expected at least one embedding, got {describe(embeddings)}")
        self.embeddings = embeddings
        self.names = None if names is None else _texts(names, len(self))
        self.about: dict[str, Any] = {} if about is None else dict(about)
        xp = backend_of(embeddings).xp
        with where(embeddings):
            # near the mean, squares of distances lose fewer digits
            self._center = xp.mean(embeddings, axis=0)
            self._vectors, self._extra = self._prepared(embeddings)
            squares = xp.sum(self._vectors * self._vectors, axis=1) / 2 + self._extra
            self._rank = xp.zeros_like(squares) if metric == "cosine" else squares

    def __len__(self) -> int:
        return int(self.embeddings.shape[0])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({describe(self.embeddings)}, {self.metric})"

    def query(self, embeddings: Array | None = None, k: int = 10) -> Found:
        """Return the k nearest entries of each query, nearest first.

        Of entries at one distance the first comes first, within rounding. In float32 the search
        cannot tell apart distances below about 0.0005 of the vectors' own length.

        Args:
            embeddings: (Q, D), of the index's library, device and dtype. None searches the
                neighbours of the index's own entries: Q = N, and no entry finds itself.
            k: of 1 to N; to N - 1 for the index's own entries.

        Raises:
            ShapeError, ArrayError, NotFiniteError: if the queries do not fit the index.
            ArgumentError: if k is out of range.
        """
        own = embeddings is None
        count, most = len(self), len(self) - own
        if not 1 <= whole("k", k, 1) <= most:
            others = "other entries" if own else "entries"
            raise ArgumentError(f"k must be 1 to {most}, as the index has {most} {others}; got {k}")
        if embeddings is None:
            embeddings = self.embeddings
        else:
            _check("Index.query", embeddings, self.embeddings)
        xp, queries = backend_of(embeddings).xp, int(embeddings.shape[0])
        # rounding may change the order of neighbours: some more are candidates
        candidates = min(most, k + 8)
        rows = max(1, _BLOCK // max(count, candidates * int(embeddings.shape[1])))
        with where(embeddings):
            parts = []
            for i in range(0, max(queries, 1), rows):
                block = embeddings[i : min(i + rows, queries), ...]
                parts.append(self._nearest(block, k, candidates, i if own else None))
            if len(parts) == 1:
                return parts[0]
            return Found(*(xp.concat(list(part), axis=0) for part in zip(*parts, strict=True)))

    def _prepared(self, x: Array) -> tuple[Array, Array]:
        """Return vectors (N, D) whose squared Euclidean distances order neighbours, and what is
        added for each of the two vectors (N,): a distance is |u - v|^2 / 2 + extra(u) + extra(v).

        For the cosine that is 1 - cos: u and v have the length 1, or 0 if x is 0.
        """
        xp = backend_of(x).xp
        if self.metric == "euclidean":
            return x - self._center, xp.zeros(x.shape[0], dtype=x.dtype, device=x.device)
        largest = xp.max(xp.abs(x), axis=1, keepdims=True)
        none = largest == 0.0
        x = x / xp.where(none, xp.ones_like(largest), largest)  # so that no square is lost
        length = xp.sqrt(xp.sum(x * x, axis=1, keepdims=True))
        x = x / xp.where(none, xp.ones_like(length), length)
        return x, xp.astype(none[:, 0], x.dtype) / 2

    def _nearest(self, x: Array, k: int, candidates: int, first: int | None) -> Found:
        """Return the k nearest of ``candidates`` for a block of queries (B, D).

        Args:
            first: the place of the first query in the index, if an entry must not find itself.
        """
        xp = backend_of(x).xp
        vectors, extra = self._prepared(x)
        rank = self._rank[None, :] - xp.matmul(vectors, xp.matrix_transpose(self._vectors))
        if first is not None:
            place = xp.arange(len(self), dtype=xp.int64, device=x.device)
            own = place[first : first + x.shape[0]]
            rank = xp.where(own[:, None] == place[None, :], xp.inf, rank)
        at = smallest(rank, candidates)
        flat = xp.reshape(at, (-1,))
        near = xp.take(self._vectors, flat, axis=0)
        near = xp.reshape(near, (*at.shape, vectors.shape[1])) - vectors[:, None, :]
        distance = xp.sum(near * near, axis=2)
        if self.metric == "euclidean":
            distance = xp.sqrt(distance)
        else:
            more = xp.reshape(xp.take(self._extra, flat, axis=0), at.shape)
            distance = distance / 2 + more + extra[:, None]
        order = xp.astype(xp.argsort(distance, axis=1, stable=True), xp.int64)[:, :k]
        return Found(_along(at, order), _along(distance, order))

    # --- files ------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index as a safetensors file, atomically. ``about`` and the names are in its
        header.

        Raises:
            OSError: if it cannot be written.
            ArgumentError: if ``about`` has something that is not a JSON value.
        """
        header = {"format": FORMAT, "metric": self.metric, "about": plain(self.about)}
        header["names"] = None if self.names is None else list(self.names)
        host = backend_of(self.embeddings).to_host(self.embeddings)
        try:
            save_tensors(path, {"embeddings": host}, {_KEY: header})
        except TypeError as error:
            raise ArgumentError(f"about must hold JSON values: {error}", "Index.save") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str | Backend | None = None) -> Self:
        """Return the index that ``save`` wrote, on a device (see ``portacnn.resolve``).

        Raises:
            FileNotFoundError: if there is no such file.
            ModelFormatError: if it is damaged, or not an index.
            BackendError: if the device is unavailable.
        """
        tensors, header = load_tensors(path, checked=True)
        described = header.get(_KEY) if isinstance(header, dict) else None
        if not isinstance(described, dict) or tensors.keys() != {"embeddings"}:
            raise ModelFormatError(
                f"{path} is not an index: expected a file of Index.save, or of the command "
                "portacnn search build"
            )
        if described.get("format") != FORMAT:
            raise ModelFormatError(
                f"{path} has the index format {told(described.get('format'))}, expected {FORMAT}; "
                "upgrade portacnn"
            )
        home, host = resolve(device), tensors["embeddings"]
        metric, about = described.get("metric"), described.get("about")
        if (
            not isinstance(metric, str)
            or not isinstance(about, dict)
            or dtype_name(host) not in ("float32", "float64")
        ):
            raise ModelFormatError(f"{path} is a damaged index")
        try:
            with home.active():
                return cls(
                    home.asarray(host),
                    described.get("names"),
                    metric=metric,
                    about=about,
                )
        except (ArgumentError, ShapeError, NotFiniteError) as error:
            raise ModelFormatError(f"{path} is a damaged index: {error}") from None


def smallest(x: Array, k: int) -> Array:
    """Return the places of the k smallest values of each row, smallest first, ties in their order:
    (B, N) -> int64 (B, k). Infinite values are last.

    The standard has a sort, but no partial one. Of many values, only those of some groups are
    sorted: the k groups with the smallest minima hold the k smallest values.
    """
    xp = backend_of(x).xp
    rows, count = x.shape
    if count <= max(_SORTED, 4 * k):
        return xp.astype(xp.argsort(x, axis=1, stable=True), xp.int64)[:, :k]
    size = max(1, isqrt(count // k))
    groups = -(-count // size)
    if missing := groups * size - count:
        rest = xp.full((rows, missing), xp.inf, dtype=x.dtype, device=x.device)
        x = xp.concat([x, rest], axis=1)
    x = xp.reshape(x, (rows, groups, size))
    order = xp.argsort(xp.min(x, axis=2), axis=1, stable=True)[:, :k]
    best = xp.sort(xp.astype(order, xp.int64), axis=1)  # ties in their order
    inside = xp.arange(size, dtype=xp.int64, device=x.device)
    places = xp.reshape(best[:, :, None] * size + inside, (rows, -1))
    values = _along(xp.reshape(x, (rows, -1)), places)
    chosen = xp.astype(xp.argsort(values, axis=1, stable=True), xp.int64)[:, :k]
    return _along(places, chosen)


def _along(x: Array, places: Array) -> Array:
    """Return x[i, places[i, j]]: (B, N) and (B, k) -> (B, k)."""
    xp = backend_of(x).xp
    row = xp.arange(x.shape[0], dtype=xp.int64, device=x.device)[:, None] * x.shape[1]
    taken = xp.take(xp.reshape(x, (-1,)), xp.reshape(places + row, (-1,)), axis=0)
    return xp.reshape(taken, places.shape)


def _check(what: str, x: Array, index: Array | None = None) -> None:
    """Check embeddings, or queries for an index of embeddings. Reads one boolean."""
    if index is None:
        check_arrays(what, embeddings=x)
    else:
        check_arrays(what, index=index, embeddings=x)
    if x.ndim != 2 or x.shape[1] == 0 or (index is not None and x.shape[1] != index.shape[1]):
        width = "D" if index is None else index.shape[1]
        raise ShapeError(
            f"expected embeddings (N, {width}), a row for each; got {describe(x)}", what
        )
    if dtype_name(x) not in ("float32", "float64"):
        raise ArgumentError(f"expected float32 or float64 embeddings, got {describe(x)}", what)
    backend = backend_of(x)
    xp = backend.xp
    with where(x):
        if not bool(backend.to_host(xp.all(xp.isfinite(xp.sum(x * x, axis=1))))):
            raise NotFiniteError(
                "embeddings must be finite, with finite squares; there are NaN, infinity or very "
                f"large values ({describe(x)})",
                what,
            )


def _texts(names: Any, count: int) -> tuple[str, ...]:
    """Return names, one for each of ``count`` entries. Raises ArgumentError."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ArgumentError(f"names must be a list of texts, got {told(names)}")
    if len(names) != count:
        raise ArgumentError(f"expected {count} names, one for each embedding, got {len(names)}")
    for name in names:
        if not isinstance(name, str):
            raise ArgumentError(f"a name must be text, got {told(name)}")
    return tuple(names)
