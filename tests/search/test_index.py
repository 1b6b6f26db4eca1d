"""``portacnn.search``: the index against scikit-learn and loops, its file, and what it refuses."""

import json

import numpy as np
import pytest

from portacnn import search
from portacnn.errors import ArgumentError, ArrayError, ModelFormatError, NotFiniteError, ShapeError
from portacnn.files import load_tensors, save_tensors
from portacnn.search import Index
from support.checks import DTYPES, agree, untouched
from support.matrix import Here

METRICS = ("cosine", "euclidean")


def expected(metric: str, index: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """All distances, in float64, by the definition."""
    if metric == "euclidean":
        return np.stack([np.sqrt(((index - q) ** 2).sum(axis=1)) for q in queries])
    lengths = np.linalg.norm(index, axis=1)
    rows = []
    for q in queries:
        both = lengths * np.linalg.norm(q)
        rows.append(1 - np.divide(index @ q, both, where=both > 0, out=np.zeros(len(index))))
    return np.stack(rows)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours(backend: Here, dtype: str, metric: str, monkeypatch):
    """In several blocks; one vector of zeros, and one that occurs twice, far from the origin."""
    monkeypatch.setattr(search, "_BLOCK", 500)
    rng = np.random.default_rng(0)
    host = rng.standard_normal((60, 5))
    host[:, 0] += 9.0
    host[7], host[50] = 0.0, host[3]
    queries = np.concatenate([rng.standard_normal((8, 5)), host[3:4], np.zeros((1, 5))])
    host, queries = host.astype(dtype), queries.astype(dtype)
    x, q = backend.array(host), backend.array(queries)
    with untouched(backend, x, q):
        index = Index(x, metric=metric)
        found, own = index.query(q, 4), index.query(k=59)
    whole = expected(metric, host.astype("float64"), queries.astype("float64"))
    agree(backend, found.distances, np.sort(whole, axis=1)[:, :4], x, 2e-6)
    places = backend.host(found.indices)
    assert places.dtype == np.int64
    picked = np.take_along_axis(whole, places, axis=1)
    np.testing.assert_allclose(picked, backend.host(found.distances), atol=2e-6)
    assert places[8, :2].tolist() == [3, 50]
    every = expected(metric, host.astype("float64"), host.astype("float64"))
    np.fill_diagonal(every, np.inf)
    agree(backend, own.distances, np.sort(every, axis=1)[:, :59], x, 2e-6)
    assert all(sorted(row) == [j for j in range(60) if j != i]
               for i, row in enumerate(backend.host(own.indices).tolist()))  # fmt: skip


def test_the_smallest_of_many(backend: Here):
    """More values than are sorted at once, many of them equal: ties in their order."""
    x = np.random.default_rng(0).integers(0, 500, (3, 5003)).astype("float32")
    x[1] = 1.0
    x[2, 100:] = np.inf
    places = search.smallest(backend.array(x), 120)
    assert (backend.host(places) == np.argsort(x, axis=1, kind="stable")[:, :120]).all()


@pytest.mark.parametrize("metric", METRICS)
def test_scikit_learn_finds_the_same(metric: str, monkeypatch):
    monkeypatch.setattr(search, "_SORTED", 100)
    neighbors = pytest.importorskip("sklearn.neighbors", reason="scikit-learn is the oracle")
    x = np.random.default_rng(1).standard_normal((900, 8), dtype="float32") + 3
    theirs = neighbors.NearestNeighbors(n_neighbors=7, metric=metric, algorithm="brute").fit(x)
    distances, places = theirs.kneighbors()
    ours = Index(x, metric=metric).query(k=7)
    np.testing.assert_allclose(ours.distances, distances, atol=1e-5)
    assert (ours.indices == places).mean() > 0.999  # but for ties within rounding
    distances, _ = theirs.kneighbors(x[:50] * 2)
    np.testing.assert_allclose(Index(x, metric=metric).query(x[:50] * 2, 7).distances, distances,
                               rtol=1e-5, atol=1e-6)  # fmt: skip


def test_small_and_large_vectors():
    """A cosine does not depend on lengths; nothing under- or overflows."""
    x = np.asarray([[1.0, 0.0], [1.0, 1.0]], "float32")
    for factor in (1e-30, 1e18):
        found = Index(x * np.float32(factor)).query(x, 2)
        np.testing.assert_allclose(found.distances, [[0, 1 - 0.5**0.5]] * 2, atol=1e-6)


def test_an_index_is_saved_and_loaded(backend: Here, tmp_path):
    path = tmp_path / "photos.safetensors"
    x = backend.array(np.random.default_rng(0).standard_normal((5, 3)), "float32")
    names = ["a.png", "b\n\u202e.png", "\udcff", "", "e"]
    made = Index(x, names, metric="euclidean", about={"layer": "fc1", "size": (28, 28)})
    made.save(path)
    again = Index.load(path, device=backend.device)
    assert again.names == tuple(names)
    assert (again.metric, again.about) == ("euclidean", {"layer": "fc1", "size": [28, 28]})
    agree(backend, again.embeddings, backend.host(x), x, 0.0)
    agree(backend, again.query(k=2).distances, backend.host(made.query(k=2).distances), x)


def test_a_damaged_index_is_refused(tmp_path):
    path = tmp_path / "index.safetensors"
    Index(np.ones((2, 3), "float32"), ["a", "b"]).save(path)
    tensors, header = load_tensors(path)
    whole = path.read_bytes()

    def refused(said: str) -> None:
        with pytest.raises(ModelFormatError, match=said):
            Index.load(path)

    for change in (
        {"format": 2}, {"format": None}, {"metric": "manhattan"}, {"metric": ["cosine"]},
        {"names": ["a"]}, {"names": "ab"}, {"names": ["a", 1]}, {"names": {"a": 1}},
        {"about": None}, {"about": [1]},
    ):  # fmt: skip
        save_tensors(path, tensors, {"search": {**header["search"], **change}})
        refused("index")
    for bad in (np.ones(3), np.ones((0, 3)), np.ones((2, 3, 1)), np.ones((2, 0)),
                np.full((2, 3), np.nan), np.full((2, 3), 1e300), np.ones((2, 3), "int64"),
                np.ones((2, 3), "float16"), np.ones((2, 3), "bool")):  # fmt: skip
        save_tensors(path, {"embeddings": bad}, header)
        refused("index")
    for others in ({}, {"other": np.ones(3)}, {**tensors, "other": np.ones(3)}):
        save_tensors(path, others, header)
        refused("is not an index")
    for of_something_else in ({}, {"search": 3}, {"model": {}}):
        save_tensors(path, tensors, of_something_else)
        refused("is not an index")
    for content in (b"", whole[:-3], whole[:40], json.dumps({"a": 1}).encode()):
        path.write_bytes(content)
        refused("is not an intact safetensors file")
    save = pytest.importorskip("safetensors.numpy").save
    path.write_bytes(save(tensors, {"portacnn": json.dumps(header)}))
    refused("no checksum")
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    refused("checksum")


def test_what_is_refused(backend: Here):
    x = backend.array(np.ones((4, 3)), "float32")
    index = Index(x)
    for wrong, error, said in (
        (lambda: Index(backend.array(np.ones(3), "float32")), ShapeError, r"\(N, D\)"),
        (lambda: Index(backend.array(np.ones((0, 3)), "float32")), ShapeError, "at least one"),
        (lambda: Index(backend.array(np.ones((4, 3), "int64"))), ArrayError, "floating point"),
        (lambda: Index(backend.array(np.full((4, 3), np.inf), "float32")), NotFiniteError, "NaN"),
        (lambda: Index(x, ["a"]), ArgumentError, "expected 4 names"),
        (lambda: Index(x, metric="l2"), ArgumentError, "metric"),
        (lambda: index.query(x, 0), ArgumentError, "k must be"),
        (lambda: index.query(x, 5), ArgumentError, "1 to 4, as the index has 4 entries"),
        (lambda: index.query(k=4), ArgumentError, "1 to 3, as the index has 3 other entries"),
        (lambda: index.query(x[:, :2], 1), ShapeError, r"\(N, 3\)"),
        (lambda: index.query(backend.array(np.ones((1, 3)), "float64"), 1), ArrayError, "dtype"),
        (lambda: index.query(x * np.inf, 1), NotFiniteError, "NaN"),
    ):  # fmt: skip
        with pytest.raises(error, match=said):
            wrong()
    assert tuple(index.query(x[:0, :], 2).indices.shape) == (0, 2)
