"""The stand-in for CuPy refuses what CuPy refuses, and finds what a GPU would get wrong only now
and then."""

import gc

import numpy as np
import pytest

from support import fake_cupy
from support.fake_cupy import CUDARuntimeError, OutOfMemoryError, RaceError, log


@pytest.fixture
def cp():
    with fake_cupy.installed() as cupy:
        yield cupy


def on(cp, *numbers):
    return cp.asarray(np.array(numbers, "float32"))


def test_no_array_becomes_numpys_unasked(cp):
    a = on(cp, 1, 2)
    for refused in (
        lambda: np.asarray(a),
        lambda: a + np.ones(2),
        lambda: np.ones(2) + a,
        lambda: cp.add(a, np.ones(2)),
        lambda: a.__setitem__(..., np.ones(2)),
        lambda: cp.stack([a, np.ones(2)]),
    ):
        with pytest.raises(TypeError, match=r"Implicit conversion|Unsupported type"):
            refused()
    assert type(a).__module__ == "cupy"
    assert (a * np.float32(2)).get().tolist() == [2, 4]


@pytest.mark.parametrize(
    "read", [float, int, bool, lambda a: a.item(), lambda a: f"{a:.1f}", lambda a: a.get()]
)
def test_what_is_read_back_is_noted(cp, read):
    a = cp.sum(on(cp, 1, 2))
    assert a.shape == ()
    with log.watch() as seen:
        read(a)
    assert [event.kind for event in seen] == ["d2h"]


def test_only_what_cupy_has(cp):
    with pytest.raises(AttributeError):
        cp.nonexistent  # noqa: B018
    assert not hasattr(cp, "busday_count")
    with pytest.raises(TypeError, match=r"cupy\.sum has no argument initial"):
        cp.sum(on(cp, 1), initial=0)


def test_another_device(cp):
    with cp.cuda.Device(1):
        a = on(cp, 1, 2)
        assert (a + 1).device == cp.cuda.Device(1)
    assert cp.cuda.Device().id == 0
    assert a[1:].get().tolist() == [2]
    with pytest.raises(ValueError, match="array device = 1 while current = 0"):
        a + 1
    with pytest.raises(ValueError, match="array device = 1 while current = 0"):
        a[0] = 1


def test_streams_that_nobody_orders(cp):
    a, other = on(cp, 1, 2), cp.cuda.Stream(non_blocking=True)
    with other, pytest.raises(RaceError, match="may still be writing"):
        a + 1
    other.wait_event(cp.cuda.get_current_stream().record())
    with other:
        b = a + 1
    with pytest.raises(RaceError, match="may still be reading"):
        a[0] = 0
    with pytest.raises(RaceError, match="may still be writing"):
        b + 1
    cp.cuda.get_current_stream().wait_event(other.record())
    a[0] = b[0]
    assert a.get().tolist() == [2, 2]
    with other:
        c = b * 2
    other.synchronize()
    assert (c + 1).get().tolist() == [5, 7]


def test_memory_that_was_freed_for_another_stream(cp):
    """A block goes back to the stream it was taken for, whatever the others are still doing with
    it."""
    a, other = on(cp, 1, 2), cp.cuda.Stream(non_blocking=True)
    other.wait_event(cp.cuda.get_current_stream().record())
    with other:
        a + 1
    del a
    with pytest.raises(RaceError, match="may still be reading"):
        on(cp, 3, 4)


def test_freed_memory_is_used_again_and_full_of_nan(cp):
    pool = cp.get_default_memory_pool()
    gc.collect()
    a = on(cp, *range(300))
    place, total, used = a.data.ptr, pool.total_bytes(), pool.used_bytes()
    b = a[10:]
    del a
    assert pool.used_bytes() == used
    del b
    assert pool.used_bytes() == used - 1536
    c = cp.empty((300,), dtype="float32")
    assert (c.data.ptr, pool.total_bytes()) == (place, total)
    assert np.isnan(c.get()).all()


def test_out_of_memory(cp):
    pool = cp.cuda.MemoryPool()
    fake_cupy.capacity[0] = fake_cupy.machine._held[0] + 4096
    with cp.cuda.using_allocator(pool.malloc):
        a = cp.empty((512,), dtype="float32")
        with pytest.raises(OutOfMemoryError) as caught:
            cp.empty((1024,), dtype="float32")
        assert (
            str(caught.value)
            == "Out of memory allocating 4,096 bytes (allocated so far: 2,048 bytes)."
        )
        assert isinstance(caught.value, MemoryError)
        del a
        cp.empty((1024,), dtype="float32")


def test_pinned_memory_is_read_late(cp):
    memory = cp.cuda.alloc_pinned_memory(8)
    host = np.frombuffer(memory, "float32", 2)
    side = cp.cuda.Stream(non_blocking=True)
    early, late = (cp.empty((2,), dtype="float32") for _ in range(2))
    side.wait_event(cp.cuda.get_current_stream().record())
    for target, wait, number in ((early, False, 1), (late, True, 3)):
        host[:] = number, number + 1
        target.set(host, stream=side)
        event = side.record()
        if wait:
            event.synchronize()
        host[:] = 7, 7
    cp.cuda.get_current_stream().wait_event(side.record())
    assert (early + 0).get().tolist() == [3, 4]
    assert (late + 0).get().tolist() == [3, 4]


def test_what_is_captured_is_not_done_until_it_is_launched(cp):
    x, y, baked = on(cp, 1, 2), on(cp, 0, 0), 3.0
    stream, pool = cp.cuda.Stream(non_blocking=True), cp.cuda.MemoryPool()
    stream.wait_event(cp.cuda.get_current_stream().record())
    with stream, cp.cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        z = x * baked
        y[1:] = z[1:]
        y += 1
        w = cp.stack([z, y])
        graph = stream.end_capture()
        assert np.isnan(z.get()).all()
        assert y.get().tolist() == [0, 0]
        baked = 5.0
        graph.launch()
        assert w.get().tolist() == [[3, 6], [1, 7]]
        x[...] = y
        graph.launch()
        assert w.get().tolist() == [[3, 21], [2, 22]]
        del z, w
        pool.free_all_blocks()
        with pytest.raises(CUDARuntimeError, match="illegal memory access"):
            graph.launch()


@pytest.mark.parametrize(
    ("shapes", "axis", "tables"),
    [
        ([(2, 3)] * 8, 0, 0),
        ([(2, 3)] * 9, 0, 1),  # addresses
        ([(2, 3)] * 9, 1, 1),
        ([(2, 3)] * 8 + [(4, 3)], 0, 3),  # and where each begins, and its strides
        ([(2, 800_000)] * 9, 0, 0),  # parts so large are copied one by one
    ],
)
def test_to_join_many_arrays_cupy_sends_tables(cp, shapes, axis, tables):
    parts = [cp.full(shape, number, dtype="float32") for number, shape in enumerate(shapes)]
    with log.watch() as seen:
        joined = cp.concatenate(parts, axis=axis)
        assert [event.kind for event in seen].count("h2d") == tables
        assert np.array_equal(
            joined.get(), np.concatenate([part.get() for part in parts], axis=axis)
        )


def test_what_else_is_sent_or_waited_for_unasked(cp):
    a = on(cp, 1, -2, 3)
    for kind, work in (
        ("h2d", lambda: cp.take(a, [0, 2])),
        ("h2d", lambda: cp.stack([a] * 9)),
        ("h2d", lambda: cp.array([a] * 9)),
        ("sync", lambda: a[a > 0]),
        ("sync", lambda: a.__setitem__(a > 0, 1.0)),
    ):
        with log.watch() as seen:
            work()
        assert [event.kind for event in seen if event.kind in ("h2d", "sync")] == [kind]
    with log.watch() as seen:  # arguments of launches
        cp.asarray(3.0), cp.take(a, 1), cp.where(a > 0, a, 0.0), a[[0, 1][1]], cp.full(3, 2.5)
    assert {event.kind for event in seen} <= {"launch", "malloc"}


def test_what_cannot_be_captured(cp):
    x = on(cp, 1, 2)
    stream, pool = cp.cuda.Stream(non_blocking=True), cp.cuda.MemoryPool()
    event = cp.cuda.Event()
    for error, refused in (
        (NotImplementedError, lambda: x @ x),
        (NotImplementedError, lambda: cp.tensordot(x, x, axes=1)),
        (CUDARuntimeError, lambda: float(x[0])),
        (CUDARuntimeError, lambda: cp.asarray(np.ones(2))),
        (CUDARuntimeError, lambda: cp.nonzero(x)),
        (CUDARuntimeError, lambda: x[x > 1]),
        (CUDARuntimeError, lambda: x.__setitem__(x > 1, 0.0)),
        (CUDARuntimeError, lambda: cp.concatenate([x] * 9)),
        (CUDARuntimeError, lambda: cp.take(x, [1])),
        (CUDARuntimeError, stream.synchronize),
        (CUDARuntimeError, cp.cuda.Device(0).synchronize),
        (CUDARuntimeError, lambda: event.record(stream)),
    ):
        with stream, cp.cuda.using_allocator(pool.malloc):
            stream.begin_capture()
            with pytest.raises(error):
                refused()
            if error is CUDARuntimeError:
                with pytest.raises(CUDARuntimeError, match="cudaErrorStreamCaptureInvalidated"):
                    stream.end_capture()
            else:
                stream.end_capture()
            assert not stream.is_capturing()
    with stream:
        stream.begin_capture()
        with pytest.raises(AssertionError, match="default pool"):
            x + 1
        stream.end_capture()
    with pytest.raises(CUDARuntimeError):
        cp.cuda.Stream.null.begin_capture()
