"""Several cores: how many there are, how work is cut for them, and BLAS held to one thread meanwhile."""

import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from portacnn.backends import threads
from portacnn.errors import ArgumentError


def test_an_error_in_a_thread_comes_out(monkeypatch):
    monkeypatch.setattr(threads, "WORTH", 1)
    monkeypatch.setattr(threads, "thread_count", lambda: 2)

    def work(piece: slice) -> None:
        if piece.start:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        threads.in_pieces(work, 4, 4)


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_the_variable_is_checked(monkeypatch, text):
    monkeypatch.setenv("PORTACNN_NUM_THREADS", text)
    threads.thread_count.cache_clear()
    with pytest.raises(ArgumentError, match=f"PORTACNN_NUM_THREADS must be a whole number above 0, got '{text}'"):
        threads.thread_count()
    monkeypatch.setenv("PORTACNN_NUM_THREADS", "3")
    assert threads.thread_count() == 3
    threads.thread_count.cache_clear()


# --- the control group's quota --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "400000 100000\n"}, 4),
        ({"cpu.max": "0 100000\n"}, None),
        ({"cpu.max": "100000 0\n"}, None),
        ({"cpu.max": "many few\n"}, None),
        ({"cpu.max": "1.5 1\n"}, None),
        ({"cpu.max": ""}, None),
        ({"cpu.max": "100000"}, None),
        ({"cpu.max": b"\xff\xfe\x00"}, None),
        ({"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "250000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": b"\xff\xfe", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "a lot", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
    ids=lambda value: "+".join(f"{name}={text!r}" for name, text in value.items()) if isinstance(value, dict) else None,
)
def test_the_cores_that_a_container_is_granted(tmp_path: Path, files: dict[str, str | bytes], cores: int | None):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert threads.granted(tmp_path) == cores


def test_no_folder_is_no_limit(tmp_path: Path):
    assert threads.granted(tmp_path / "nowhere") is None


@pytest.fixture
def fresh_count(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("PORTACNN_NUM_THREADS", raising=False)
    threads.thread_count.cache_clear()
    yield
    threads.thread_count.cache_clear()


@pytest.mark.parametrize(("quota", "expected"), [("100000 100000", 1), ("max 100000", 64), ("6400000000 100000", 64)])
def test_no_more_threads_than_are_granted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_count: None, quota: str, expected: int
):
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(threads, "_GROUP", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert threads.thread_count() == expected


def test_the_variable_comes_before_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_count: None):
    (tmp_path / "cpu.max").write_text("100000 100000")
    monkeypatch.setattr(threads, "_GROUP", tmp_path)
    monkeypatch.setenv("PORTACNN_NUM_THREADS", "5")
    assert threads.thread_count() == 5


# --- cutting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 100])
def test_pieces_make_up_the_whole(monkeypatch: pytest.MonkeyPatch, rows: int, count: int):
    monkeypatch.setattr(threads, "thread_count", lambda: count)
    found = threads.pieces(rows, threads.WORTH)
    assert (found[0].start, found[-1].stop) == (0, rows)
    assert all(a.stop == b.start for a, b in pairwise(found))
    assert len(found) == max(1, min(rows, count))
    assert len(threads.pieces(rows, threads.WORTH - 1)) == 1
    seen = np.zeros(rows, dtype=int)

    def mark(some: slice) -> None:
        seen[some] += 1

    threads.in_pieces(mark, rows, threads.WORTH)
    assert (seen == 1).all()


# --- BLAS -----------------------------------------------------------------------------------------------------------


class Library:
    """As threadpoolctl has a BLAS."""

    def __init__(self, count: int) -> None:
        self.count, self.history = count, [count]

    def get_num_threads(self) -> int:
        return self.count

    def set_num_threads(self, count: int) -> None:
        self.count = count
        self.history.append(count)


@pytest.fixture
def blas(monkeypatch: pytest.MonkeyPatch) -> list[Library]:
    libraries = [Library(7), Library(1), Library(3)]
    monkeypatch.setattr(threads, "_blas", lambda: libraries)
    return libraries


def counts(libraries: list[Library]) -> list[int]:
    return [library.count for library in libraries]


def test_nested_the_outermost_puts_it_back(blas: list[Library]):
    with threads.one_blas_thread():
        with threads.one_blas_thread():
            assert counts(blas) == [1, 1, 1]
        assert counts(blas) == [1, 1, 1]
    assert counts(blas) == [7, 1, 3]
    assert [library.history for library in blas] == [[7, 1, 7], [1], [3, 1, 3]]


def test_an_exception_puts_it_back(blas: list[Library]):
    with pytest.raises(ZeroDivisionError), threads.one_blas_thread(), threads.one_blas_thread():
        raise ZeroDivisionError
    assert counts(blas) == [7, 1, 3]
    with pytest.raises(ZeroDivisionError):
        threads.products_in_pieces(lambda some: 1 // 0, 4, 1)
    assert counts(blas) == [7, 1, 3]


def test_what_changed_in_between_is_read_anew(blas: list[Library]):
    with threads.one_blas_thread():
        pass
    blas[0].count = 5
    with threads.one_blas_thread():
        assert counts(blas) == [1, 1, 1]
    assert counts(blas) == [5, 1, 3]


def test_interleaved_the_last_one_out_of_all_threads_puts_it_back(blas: list[Library]):
    """The one that came first leaves first, while another one is inside."""
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
    seen: list[list[int]] = []

    def first() -> None:
        with threads.one_blas_thread():
            first_in.set()
            second_in.wait(10)
        seen.append(counts(blas))
        first_out.set()

    def second() -> None:
        first_in.wait(10)
        with threads.one_blas_thread():
            second_in.set()
            first_out.wait(10)
            seen.append(counts(blas))

    workers = [threading.Thread(target=work) for work in (first, second)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert seen == [[1, 1, 1]] * 2
    assert counts(blas) == [7, 1, 3]


def test_many_threads_in_and_out(blas: list[Library]):
    wrong: list[list[int]] = []

    def work() -> None:
        for _ in range(200):
            with threads.one_blas_thread():
                if counts(blas) != [1, 1, 1]:
                    wrong.append(counts(blas))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    assert counts(blas) == [7, 1, 3]


def test_the_blas_that_is_here():
    """NumPy's own, whatever it is: found, held, and put back to what it was set to."""
    np.ones((2, 2)) @ np.ones((2, 2))
    libraries = threads._blas()
    if not libraries:
        pytest.skip("threadpoolctl knows no BLAS here")
    before = [library.get_num_threads() for library in libraries]
    try:
        for library in libraries:
            library.set_num_threads(2)
        two = [library.get_num_threads() for library in libraries]  # 1 where it was built without threads
        with threads.one_blas_thread():
            assert [library.get_num_threads() for library in libraries] == [1] * len(libraries)
        assert [library.get_num_threads() for library in libraries] == two
    finally:
        for library, count in zip(libraries, before, strict=True):
            library.set_num_threads(count)
