"""Several cores: how many there are, how work is cut for them, and BLAS held to one thread
meanwhile."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import ref

import array_api_compat.numpy
import numpy as np
import pytest
from threadpoolctl import threadpool_info

from portacnn.backends import threads
from portacnn.errors import ArgumentError
from portacnn.layers import (
    BatchNorm2d,
    Conv2d,
    ConvTranspose2d,
    Flatten,
    Linear,
    MatMulWith,
    ReLU,
    Take,
)
from portacnn.models import Model
from portacnn.ops import use_kernels
from portacnn.ops.dispatch import kernel_choice


@pytest.mark.parametrize("failing", range(3))
def test_an_error_in_a_thread_comes_out(monkeypatch, failing):
    monkeypatch.setattr(threads, "WORTH", 1)
    monkeypatch.setattr(threads, "thread_count", lambda: 3)
    together = threading.Barrier(3)

    def work(piece: slice) -> None:
        together.wait(10)  # so that each piece has a thread of its own
        if piece.start == failing:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        threads.in_pieces(work, 3, 3)


def test_threads_see_the_callers_context(monkeypatch):
    """Its choice of kernels, say, and what NumPy warns of."""
    monkeypatch.setattr(threads, "thread_count", lambda: 3)
    together, seen = threading.Barrier(3), []

    def work(piece: slice) -> None:
        together.wait(10)  # so that each piece has a thread of its own
        seen.append((threading.get_ident(), kernel_choice(), np.geterr()["over"]))

    with use_kernels("reference"), np.errstate(over="call"):
        threads.in_pieces(work, 3, threads.WORTH)
    assert len({ident for ident, *_ in seen}) == 3
    assert [context for _, *context in seen] == [["reference", "call"]] * 3


def test_work_that_is_done_keeps_no_arrays(monkeypatch):
    """Neither in a thread that has not come to its next task, nor in the queue: an arena could not
    use their bytes again."""
    monkeypatch.setattr(threads, "thread_count", lambda: 3)
    handed_out = []
    # to threads that are busy for ever
    monkeypatch.setattr(threads._pool, "submit", handed_out.extend)
    rows = np.zeros(3)
    alive = ref(rows)

    def work(piece, rows=rows):
        rows[piece] += 1

    threads.in_pieces(work, 3, threads.WORTH)
    assert rows.tolist() == [1, 1, 1]
    assert len(handed_out) == 2
    del work, rows
    assert alive() is None


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_the_variable_is_checked(monkeypatch, text):
    monkeypatch.setenv("PORTACNN_NUM_THREADS", text)
    threads.thread_count.cache_clear()
    with pytest.raises(
        ArgumentError, match=f"PORTACNN_NUM_THREADS must be a whole number above 0, got '{text}'"
    ):
        threads.thread_count()
    monkeypatch.setenv("PORTACNN_NUM_THREADS", "3")
    assert threads.thread_count() == 3
    threads.thread_count.cache_clear()


# --- the control group's quota --------------------------------------------------------------------


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
    ids=lambda value: (
        "+".join(f"{name}={text!r}" for name, text in value.items())
        if isinstance(value, dict)
        else None
    ),
)
def test_the_cores_that_a_container_is_granted(
    tmp_path: Path, files: dict[str, str | bytes], cores: int | None
):
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


@pytest.mark.parametrize(
    ("quota", "expected"), [("100000 100000", 1), ("max 100000", 64), ("6400000000 100000", 64)]
)
def test_no_more_threads_than_are_granted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_count: None, quota: str, expected: int
):
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(threads, "_GROUP", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert threads.thread_count() == expected


def test_the_variable_comes_before_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_count: None
):
    (tmp_path / "cpu.max").write_text("100000 100000")
    monkeypatch.setattr(threads, "_GROUP", tmp_path)
    monkeypatch.setenv("PORTACNN_NUM_THREADS", "5")
    assert threads.thread_count() == 5


# --- cutting --------------------------------------------------------------------------------------


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


# --- BLAS -----------------------------------------------------------------------------------------


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
    def outer() -> None:
        threads.on_one_blas_thread(lambda: seen.append(counts(blas)))
        seen.append(counts(blas))

    seen: list[list[int]] = []
    threads.on_one_blas_thread(outer)
    assert seen == [[1, 1, 1]] * 2
    assert counts(blas) == [7, 1, 3]
    assert [library.history for library in blas] == [[7, 1, 7], [1], [3, 1, 3]]


def test_an_exception_puts_it_back(blas: list[Library]):
    with pytest.raises(ZeroDivisionError):
        threads.on_one_blas_thread(threads.on_one_blas_thread, lambda: 1 // 0)
    assert counts(blas) == [7, 1, 3]
    with pytest.raises(ZeroDivisionError):
        threads.products_in_pieces(lambda some: 1 // 0, 4, 1)
    assert counts(blas) == [7, 1, 3]


def test_what_changed_in_between_is_read_anew(blas: list[Library]):
    threads.on_one_blas_thread(int)
    blas[0].count = 5
    assert threads.on_one_blas_thread(counts, blas) == [1, 1, 1]
    assert counts(blas) == [5, 1, 3]


def test_interleaved_the_last_one_out_of_all_threads_puts_it_back(blas: list[Library]):
    """The one that came first leaves first, while another one is inside."""
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
    seen: list[list[int]] = []

    def first() -> None:
        threads.on_one_blas_thread(lambda: (first_in.set(), second_in.wait(10)))
        seen.append(counts(blas))
        first_out.set()

    def second() -> None:
        first_in.wait(10)
        threads.on_one_blas_thread(
            lambda: (second_in.set(), first_out.wait(10), seen.append(counts(blas)))
        )

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
            if (seen := threads.on_one_blas_thread(counts, blas)) != [1, 1, 1]:
                wrong.append(seen)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    assert counts(blas) == [7, 1, 3]


def test_the_blas_that_is_here():
    """NumPy's own, whatever it is: found, held in every thread, and put back to what it was set
    to."""
    np.ones((2, 2)) @ np.ones((2, 2))

    def now() -> list[int]:
        return [
            pool["num_threads"]
            for pool in threadpool_info()
            if pool["user_api"] == "blas" and "numpy" in pool["filepath"]
        ]

    if not now():
        pytest.skip("threadpoolctl knows no BLAS of NumPy's here")
    before = [library.get_num_threads() for library in threads._blas()]
    try:
        for library in threads._blas():
            library.set_num_threads(2)
        two = now()  # 1 where it was built without threads
        # threadpoolctl lets the first thread that sets a limit keep that right
        with ThreadPoolExecutor(1) as other:
            for submit in (
                lambda *call: call[0](*call[1:]),
                lambda *call: other.submit(*call).result(),
            ):
                assert submit(threads.on_one_blas_thread, now) == [1] * len(two)
                assert now() == two
    finally:
        for library, count in zip(threads._blas(), before, strict=True):
            library.set_num_threads(count)


class OfThread(Library):
    """A limit for each thread, as OpenBLAS with OpenMP has it."""

    internal_api, threading_layer = "openblas", "openmp"

    def __init__(self, count: int) -> None:
        self._of = threading.local()
        super().__init__(count)

    @property
    def count(self) -> int:
        return getattr(self._of, "count", 5)

    @count.setter
    def count(self, count: int) -> None:
        self._of.count = count


def test_a_limit_of_each_thread_is_put_back_in_that_thread(monkeypatch: pytest.MonkeyPatch):
    library = OfThread(7)
    monkeypatch.setattr(threads, "_blas", lambda: [library])
    inside, left = threading.Event(), threading.Event()

    def other() -> list[int]:
        seen = threads.on_one_blas_thread(lambda: (library.count, inside.set(), left.wait(10))[0])
        return [seen, library.count]

    with ThreadPoolExecutor(1) as pool:
        result = threads.on_one_blas_thread(
            lambda: (pool.submit(other), inside.wait(10), library.count)
        )
        assert (result[2], library.count) == (1, 7)  # while the other one is in there yet
        left.set()
        assert result[0].result() == [1, 5]


@pytest.fixture
def products(blas: list[Library], monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """How many threads BLAS had in each of NumPy's products since."""
    seen: list[list[int]] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            seen.append(counts(blas))
            return function(*args, **options)

        return run

    for name in ("matmul", "vecdot"):
        run = watched(getattr(np, name))
        for namespace in (np, array_api_compat.numpy):
            monkeypatch.setattr(namespace, name, run)
    return seen


@pytest.mark.parametrize("kernels", ["native", "auto", "reference"])
@pytest.mark.parametrize("count", [1, 2, 8, 9])
def test_every_product_of_a_network_is_held_to_one_blas_thread(
    blas: list[Library], products: list[list[int]], kernels: str, count: int
):
    x = np.ones((count, 1, 16, 16), dtype=np.float32)
    model = Model(
        Conv2d(1, 4, 3), BatchNorm2d(4), ReLU(), Conv2d(4, 4, 3, groups=2), ConvTranspose2d(4, 2,
        2), ReLU(), Flatten(),
        Linear(None, 6), ReLU(), MatMulWith(3), Take([0, 2, 1], 1),
    )  # fmt: skip
    model.build((1, 16, 16), device="numpy", seed=0)
    with use_kernels(kernels):
        for call in (
            lambda: model.predict(x),
            lambda: model.gradient(x, np.zeros(count, dtype=np.int64)),
        ):
            products.clear()
            call()
            assert len(products) > 2
            assert products == [[1, 1, 1]] * len(products)
            assert counts(blas) == [7, 1, 3]


ASLEEP = """
import os, sys
from pathlib import Path
sys.modules["threadpoolctl"] = None
import numpy as np
blas = {each for each in os.listdir("/proc/self/task")} - {str(os.getpid())}
import portacnn

def woken():  # how often these threads were put on a core
    return sum(int(Path(f"/proc/self/task/{t}/schedstat").read_text().split()[2]) for t in blas)

model = portacnn.SimpleConvNet((1, 28, 28), device="numpy", seed=0)
x = {n: np.ones((n, 1, 28, 28), "float32") for n in (2, 8, 9)}
before = woken()
for n, images in x.items():
    model.predict(images)
    model.gradient(images, np.zeros(n, "int64"))
held = woken()
x[9].reshape(9, -1).T @ x[9].reshape(9, -1)
print(len(blas), held - before, woken() - held)
"""


@pytest.mark.skipif(
    not Path("/proc/self/schedstat").exists() or threads.thread_count() < 2,
    reason="needs Linux's schedstat and two cores",
)
def test_blas_threads_sleep_without_threadpoolctl():
    """A checkout runs without it. A product outside portacnn wakes them."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.endswith("_NUM_THREADS") and name != "PORTACNN_BACKEND"
    }
    done = subprocess.run(
        [sys.executable, "-c", ASLEEP],
        env={**environment, "PORTACNN_KERNELS": "native"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    started, held, outside = map(int, done.stdout.split())
    if not started or not outside:
        pytest.skip("NumPy's BLAS has no threads of its own")
    assert held == 0
