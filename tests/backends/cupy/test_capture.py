"""A training step as a CUDA graph, on the stand-in for CuPy: what is recorded when, and that a
replay is the step to the bit.

The stand-in executes nothing while it records, and a replay works on the memory that was recorded:
a number that was read on the host, or an array that was made by the caller, would stay as it was
then.
"""

import logging
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from portacnn import ops, resolve
from portacnn.backends.cupy import capture as cupy_capture
from portacnn.ops.dispatch import OPS, use_kernels, use_precision
from support import fake_cupy
from support.capture_rig import Fit, State, data, run
from support.cuda_rig import needs_compiler
from support.fake_cupy import log, machine

pytestmark = needs_compiler


@pytest.fixture(autouse=True)
def cp():
    with fake_cupy.installed() as cupy:
        yield cupy


@pytest.fixture(params=[0, 1])
def home(request):
    return resolve(f"cuda:{request.param}")


# --- replayed steps are steps ---------------------------------------------------------------------


def test_replay_is_the_step_to_the_bit(home):
    """Over 100 steps, each with numbers of its own, while others take and free memory."""
    kept, rng = [], np.random.default_rng(0)

    def others():
        kept.append(home.asarray(rng.random(rng.integers(1, 2000))))
        if len(kept) > 5:
            kept.pop(rng.integers(5))

    plain, captured = Fit(home), Fit(home)
    step = home.compile_step(captured, ())
    losses = run(home, step, 100, between=others)
    assert losses == run(home, plain, 100)
    assert captured.weights() == plain.weights()
    assert (captured.called, step.graphs, step.reason) == (3, 1, None)


def test_results_of_a_step_outlive_the_next(home):
    step = home.compile_step(Fit(home), ())
    with home.active():
        ok = home.xp.ones((), dtype=home.xp.bool)
        x, y = (home.asarray(a) for a in data(0))
        results = [step(x, y, State(n, 0.1, ok)) for n in range(6)]
        x[...] = 0  # and the caller may write to its arrays
        losses = [float(loss) for loss, _ in results]
    assert sorted(set(losses), reverse=True) == losses


def test_no_array_of_the_callers_is_written_to(home):
    step = home.compile_step(Fit(home), ())
    with home.active():
        ok = home.xp.ones((), dtype=home.xp.bool)
        given = [[home.asarray(a) for a in data(number)] for number in range(6)]
        for number, (x, y) in enumerate(given):
            step(x, y, State(number, 0.1, ok))
    for number, arrays in enumerate(given):
        for array, host in zip(arrays, data(number), strict=True):
            assert np.array_equal(home.to_host(array), host)
    assert bool(ok)


def test_what_a_step_keeps_is_safe_from_the_graphs_of_others(home):
    """A graph writes wherever something lay, and was freed, while it was recorded: nothing else may
    come to lie there."""
    kept = {}

    def step(x, state):
        found = kept.setdefault(state.note, x + 0)  # as large as the intermediate results
        found += ((x * 2) * 3) * 4
        return found

    compiled = home.compile_step(step, ())
    x = home.asarray(np.ones(100))
    notes = "aaaaabababababccccccaabbcc"
    for note in notes:
        compiled(x, State(1, 1.0, None, note))
    for note in "abc":
        assert home.to_host(kept[note]).tolist() == [1 + 24 * notes.count(note)] * 100


def test_a_step_that_is_not_ok_changes_nothing(home):
    fit = Fit(home)
    step = home.compile_step(fit, ())
    run(home, step, 4)
    before = home.to_host(fit.v).tobytes()
    x, y = (home.asarray(a) for a in data(9))
    with home.active():
        bad = home.xp.zeros((), dtype=home.xp.bool)
        _, ok = step(x, y, State(9, 0.1, bad))
    assert not home.to_host(ok)
    assert home.to_host(fit.v).tobytes() == before


def test_what_a_step_gives_back_is_what_the_next_gets(home):
    """Whichever kind the next is of: each has memory of its own for it, which its graph has set at
    the last step of its kind."""
    plain, captured = Fit(home), Fit(home)
    step = home.compile_step(captured, ())
    given = []
    for do in (plain, step):
        with home.active():
            oks, ok = [], home.xp.ones((), dtype=home.xp.bool)
            for number, size in enumerate([8, 5, 8, 5, 8, 5, 8, 8, 5, 5, 8, 5, 5, 8]):
                x, y = data(number, size)
                if number == 9:
                    y[0] = np.inf
                if number == 12:  # one of the caller's own
                    ok = home.xp.ones((), dtype=home.xp.bool)
                _, ok = do(home.asarray(x), home.asarray(y), State(number, 0.01, ok))
                oks.append(ok)
            given.append([bool(home.to_host(ok)) for ok in oks])
    assert given[0] == given[1] == [True] * 9 + [False] * 3 + [True] * 2
    assert captured.weights() == plain.weights()
    assert (step.graphs, step.reason) == (2, None)


@pytest.mark.parametrize("sizes", [[8], [8, 8, 8, 8, 5, 5, 5, 8]], ids=["one kind", "two kinds"])
def test_steps_are_in_order_whatever_the_streams_they_are_asked_for_on(cp, home, sizes):
    """Nobody else orders them: each has a batch of its own stream's."""
    plain, captured = Fit(home), Fit(home)
    step = home.compile_step(captured, ())
    count = 16
    for number in range(count):
        run(home, plain, 1, sizes[number % len(sizes)], number)
    with home.active():
        streams = [
            *(cp.cuda.Stream(non_blocking=True) for _ in range(2)),
            cp.cuda.get_current_stream(),
        ]
        for stream in streams[:2]:
            stream.wait_event(streams[2].record())
        for number in range(count):
            with streams[number * number % 3 - 1]:
                x, y = (home.asarray(a) for a in data(number, sizes[number % len(sizes)]))
                step(x, y, State(number, 0.1 / (1 + number), home.xp.ones((), dtype=home.xp.bool)))
        home.synchronize()
    assert captured.weights() == plain.weights()
    assert step.graphs == len(set(sizes))


def test_nothing_is_carried_or_waited_for():
    home = resolve("cuda")
    step = home.compile_step(Fit(home), ())
    run(home, step, 3)
    with home.active():
        x, y = (home.asarray(a) for a in data(0))
        _, ok = step(x, y, State(0, 0.1, home.xp.ones((), dtype=home.xp.bool)))
        with log.watch() as seen:
            for n in range(20):
                _, ok = step(x, y, State(n, 0.1, ok))
    # The numbers; the batch in, but not what the step before gave back; the graph; the results out,
    # all at once. Room for results that nobody has freed yet comes from the device.
    one = ["set_words", "setitem", "setitem", "graph", "setitem"]
    assert [
        e.detail if e.kind == "launch" else e.kind for e in seen if e.kind != "malloc"
    ] == one * 20


def test_the_pools_stay_as_they_are():
    home = resolve("cuda")
    step = home.compile_step(Fit(home), ())
    run(home, step, 10)
    held = machine._held[0]
    run(home, step, 200)
    assert machine._held[0] <= held + 200 * 512 + 4096  # the losses, which are kept to the end
    (way,) = step._ways.values()
    total = way.pool.total_bytes()
    run(home, step, 5)
    assert way.pool.total_bytes() == total


def test_numbers_are_arrays_on_the_device():
    home = resolve("cuda")
    seen = []

    def step(state):
        seen.append(state)
        return state.step + 0, state.lr + 0

    compiled = home.compile_step(step, ())
    for number in range(-2, 4):
        found = compiled(State(number + (1 << 40), np.float64(number) / 3, None, "same"))
        assert [a.item() for a in found] == [number + (1 << 40), number / 3]
    for state in seen:
        assert (state.step.shape, str(state.step.dtype), str(state.lr.dtype)) == (
            (),
            "int64",
            "float64",
        )
        assert (state.ok, state.note) == (None, "same")
        assert state.step.data.ptr == seen[0].step.data.ptr
    assert len(seen) == 3


def test_only_dataclasses_with_few_numbers():
    step = resolve("cuda").compile_step(lambda state: state, ())
    with pytest.raises(TypeError, match="must be a dataclass, got dict"):
        step({"lr": 1.0})

    @dataclass
    class Many:
        a: Any = 1
        b: Any = 1
        c: Any = 1
        d: Any = 1
        e: Any = 1
        f: Any = 1
        g: Any = 1
        h: Any = 1
        i: Any = 1

    with pytest.raises(TypeError, match="at most 8 numbers"):
        step(Many())


# --- which steps are recorded ---------------------------------------------------------------------


def test_the_third_step_of_a_kind_is_recorded(cp):
    home = resolve("cuda")
    fit = Fit(home)
    step = home.compile_step(fit, ())
    found = []
    for number in range(5):
        with log.watch() as seen:
            run(home, step, 1, first=number)
        found.append((fit.called, [e.kind for e in seen if e.kind in ("capture", "graph")]))
    assert found == [
        (1, []),
        (2, []),
        (3, ["capture", "capture", "graph"]),
        (3, ["graph"]),
        (3, ["graph"]),
    ]
    assert cupy_capture.WARM == 2


def test_each_kind_has_a_graph_and_they_do_not_disturb_each_other(home):
    sizes = [8, 5, 8, 5, 8, 8, 5, 5, 5, 8, 8, 5]
    plain, captured = Fit(home), Fit(home)
    step = home.compile_step(captured, ())
    kept = []
    for number, size in enumerate(sizes):
        kept.append((run(home, step, 1, size, number), run(home, plain, 1, size, number)))
    assert all(one == other for one, other in kept)
    assert captured.weights() == plain.weights()
    assert (captured.called, step.graphs) == (6, 2)


def test_strides_and_dtypes_make_another_kind():
    home = resolve("cuda")
    shapes = []

    def step(x, state):
        shapes.append((str(x.dtype), x.strides))
        return x + 1

    compiled = home.compile_step(step, ())
    x = home.asarray(np.arange(6.0).reshape(2, 3))
    for array in (
        x,
        home.xp.astype(x, home.xp.float32),
        home.asarray(np.arange(6.0).reshape(3, 2)).T,
    ):
        for _ in range(4):
            assert np.array_equal(compiled(array, State(1, 1.0, None)).get(), array.get() + 1)
    assert shapes == [
        *[("float64", (24, 8))] * 3,
        *[("float32", (12, 4))] * 3,
        *[("float64", (8, 16))] * 3,
    ]
    for note in "abab":
        compiled(x, State(1, 1.0, None, note))
    assert len(shapes) == 13, "what is fixed makes a kind, too"
    with use_kernels("reference"):
        compiled(x, State(1, 1.0, None))
    assert len(shapes) == 14
    with use_precision("tf32"):
        for _ in range(4):
            compiled(x, State(1, 1.0, None))
    assert len(shapes) == 18, "neither is a product of rounded factors the one that was recorded"


def test_no_more_than_four_graphs(home):
    plain, captured = Fit(home), Fit(home)
    step = home.compile_step(captured, ())
    sizes = [size for size in range(2, 8) for _ in range(5)] + list(range(2, 8)) * 3
    for number, size in enumerate(sizes):
        assert run(home, step, 1, size, number) == run(home, plain, 1, size, number)
    assert captured.weights() == plain.weights()
    assert (step.graphs, step.reason) == (cupy_capture.MOST, None) == (4, None)
    assert captured.called == 4 * 3 + 2 * 5 + 2 * 3


# --- what cannot be recorded ----------------------------------------------------------------------


def reads(fit, x):
    fit.home.to_host(x)


def branches(fit, x):
    if fit.home.xp.max(x) > 1e9:
        raise AssertionError


def multiplies(fit, x):
    ops.linear(x, fit.home.asarray(np.ones((2, 3))) if fit.called < 3 else x[:2])


def waits(fit, x):
    fit.home.synchronize()


@pytest.mark.parametrize(
    ("what", "place", "why"),
    [
        (reads, "^CupyBackend.to_host:", "cudaErrorStreamCaptureUnsupported"),
        (branches, "Hindered.__call__:", "cudaErrorStreamCaptureUnsupported"),
        (multiplies, "^linear:", "cuBLAS"),
        (waits, "^CupyBackend.synchronize:", "cudaErrorStreamCaptureUnsupported"),
    ],
)
def test_what_cannot_be_recorded_goes_on_as_it_is(home, caplog, what, place, why):
    class Hindered(Fit):
        def __call__(self, x, y, state):
            result = super().__call__(x, y, state)
            what(self, x)
            return result

    plain, captured = Fit(home), Hindered(home)
    step = home.compile_step(captured, ())
    with (
        use_kernels("reference"),
        caplog.at_level(logging.WARNING, logger="portacnn"),
        log.watch() as seen,
    ):
        losses = run(home, step, 8)
        losses += run(home, step, 4, 5, 8)
    assert losses == run(home, plain, 8) + run(home, plain, 4, 5, 8)
    assert captured.weights() == plain.weights()
    assert (captured.called, step.graphs) == (13, 0), "tried once"
    (message,) = caplog.messages
    assert f"on {home} cannot be recorded as a CUDA graph" in message
    assert why in message
    assert step.reason in message
    assert re.search(place, step.reason)
    assert [e.detail for e in seen if e.kind == "capture"] in (["begin"], ["begin", "end"])
    with home.active():
        assert not step._stream.is_capturing()


def test_what_hinders_a_backward_pass_is_named(home, caplog, monkeypatch):
    x, w = (home.asarray(np.ones(shape)) for shape in ((4, 3), (2, 3)))

    def without_product(x, weight, bias=None, *, keep=True):
        return home.xp.ones((4, 2), dtype=home.xp.float64), (x, weight, False)

    def step(x, state):
        y, cache = ops.linear(x, w)
        return ops.linear_backward(y, cache)[0]

    monkeypatch.setattr(OPS["linear"], "forward", without_product)
    compiled = home.compile_step(step, ())
    with use_kernels("reference"), caplog.at_level(logging.WARNING, logger="portacnn"):
        for _ in range(3):
            compiled(x, State(1, 1.0, None))
    assert compiled.reason.startswith("linear_backward: ")


def test_a_result_that_would_stay_the_same(home, caplog):
    step = home.compile_step(lambda state: 3, ())
    assert [step(State(1, 1.0, None)) for _ in range(4)] == [3] * 4
    assert step.reason == "the step: it returns a int, which would be the same at every replay"
    assert len(caplog.messages) == 1


def test_a_step_that_fails_by_itself_is_no_reason_to_give_up(home, caplog):
    fit, broken = Fit(home), []

    def step(x, y, state):
        if broken:
            raise ZeroDivisionError("of its own")
        return fit(x, y, state)

    compiled = home.compile_step(step, ())
    run(home, compiled, 2)
    before = fit.weights()
    broken.append(True)
    with pytest.raises(ZeroDivisionError, match="of its own"):
        run(home, compiled, 1, first=2)
    assert fit.weights() == before
    broken.clear()
    run(home, compiled, 3, first=2)
    assert (compiled.graphs, compiled.reason, caplog.messages) == (1, None, [])


def test_what_lies_about_unused_is_let_go_of_first(cp, home):
    fake_cupy.capacity[home.device.id] = machine._held[home.device.id] + 150_000
    with home.active():
        cp.empty((100_000,), dtype="uint8")
    compiled = home.compile_step(lambda x, state: x + cp.empty((5000,)) * 0, ())
    x = home.asarray(np.ones(1))
    assert compiled(x, State(1, 1.0, None)).shape == (5000,)


@pytest.mark.parametrize("after", [0, 2], ids=["as it is", "recorded"])
def test_no_room(home, after):
    fit, size, free = Fit(home), [50_000], machine._held[home.device.id]

    def step(x, y, state):
        home.xp.zeros((size[0],), dtype=home.xp.uint8)
        return fit(x, y, state)

    compiled = home.compile_step(step, ())
    run(home, compiled, after)
    run(home, compiled, after, 5, after)  # another kind, with memory of its own
    after *= 2
    before, called = fit.weights(), fit.called
    size[0] = 100_000_000
    fake_cupy.capacity[home.device.id] = machine._held[home.device.id] + 100_000
    with pytest.raises(MemoryError) as caught:
        run(home, compiled, 1, first=after)
    asked, held = home.memory_error(caught.value)
    assert asked == 100_000_256
    assert 0 <= held < 100_000
    assert (fit.weights(), fit.called) == (before, called)
    assert (compiled.graphs, compiled.reason) == (0, None)
    caught = None
    with home.active():
        machine.default_pool.free_all_blocks()
    assert machine._held[home.device.id] - free < 20_000, "only what is kept"
    size[0] = 1
    run(home, compiled, 5, first=after)
    assert compiled.graphs == 1
    plain = Fit(home)
    run(home, plain, after // 2)
    run(home, plain, after // 2, 5, after // 2)
    run(home, plain, 5, first=after)
    assert fit.weights() == plain.weights()


def test_a_recording_that_finds_no_room_keeps_what_it_has(home, caplog):
    """A pool frees its unused memory before it raises: not what the recorded part
    has freed, and will use again."""
    size = [1]

    def step(x, state):
        twice = x * 2
        y = twice + 1
        del twice
        home.xp.zeros((size[0],), dtype=home.xp.uint8)
        return y[:5] + 0

    compiled = home.compile_step(step, ())
    x = home.asarray(np.arange(10_000.0))
    for number in range(6):
        if number == 2:
            size[0] = 100_000
            fake_cupy.capacity[home.device.id] = machine._held[home.device.id] + 81_000 + 60_000
        assert np.array_equal(
            home.to_host(compiled(x, State(number, 1.0, None))), np.arange(5.0) * 2 + 1
        )
    assert compiled.graphs == 0
    (message,) = caplog.messages
    assert "100352 bytes more do not fit while a step is recorded" in message
