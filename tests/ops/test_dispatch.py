"""Who computes an op: overrides and the portable pair, the switch between them, and caches that
find their maker."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portacnn import ops, runtime
from portacnn.backends.cupy import kernels as cupy_kernels
from portacnn.errors import ArgumentError, ArrayError, StateError
from portacnn.ops import use_kernels
from portacnn.ops.dispatch import OPS, Cache, kernel_choice, precision
from portacnn.runtime import BackendError, Kernel, backend_of
from portacnn.testing.examples import EXAMPLES, call, mapped
from support.checks import normal, refuses, with_each_kernel
from support.matrix import Here, needs
from support.processes import without_settings

ROOT = Path(__file__).resolve().parents[2]


class Spy:
    """A kernel pair that computes nonsense, or declines, and counts its calls."""

    def __init__(self, result: Callable[[Any], Any]) -> None:
        self.result, self.forwards, self.backwards = result, 0, 0

    def kernel(self) -> Kernel:
        return Kernel(self.forward, self.backward)

    def forward(self, x: Any, *args: Any, keep: bool = True) -> Any:
        self.forwards += 1
        result = self.result(x)
        return result if result is NotImplemented else (result, ("the spy's", x) if keep else None)

    def backward(self, dy: Any, saved: Any) -> Any:
        self.backwards += 1
        assert saved[0] == "the spy's"
        return dy * 1000.0


@pytest.fixture
def override(backend: Here, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Spy]:
    """``override("relu", f)``: the library under test gets a kernel whose forward gives f(x); all
    its others are gone.

    ``to`` is the kernel set it goes to, beside those put in already.
    """
    sets: dict[str, dict[str, Kernel]] = {"numba": {}, "native": {}}

    def put(op: str, result: Callable[[Any], Any], *, to: str = "native") -> Spy:
        spy, example = Spy(result), backend.array(np.ones(1))
        sets[to][op] = spy.kernel()
        monkeypatch.setitem(
            runtime._by_type, type(example), replace(backend_of(example), kernels=sets)
        )
        return spy

    return put


HOST, UP = normal(2, 3), normal(2, 3, seed=1)


def test_an_override_runs_forward_and_backward(backend: Here, override: Callable[..., Spy]):
    spy, x = override("relu", lambda x: x * 7.0), backend.array(HOST)
    y, cache = ops.relu(x)
    np.testing.assert_array_equal(backend.host(y), HOST * 7.0)
    assert isinstance(cache, Cache)
    np.testing.assert_array_equal(
        backend.host(ops.relu_backward(backend.array(UP), cache)), UP * 1000.0
    )
    assert (spy.forwards, spy.backwards) == (1, 1)
    assert ops.relu(x, keep=False)[1] is None
    ops.sigmoid(x)
    assert spy.forwards == 2  # for its own op only


def test_one_that_declines_leaves_the_portable_pair(backend: Here, override: Callable[..., Spy]):
    spy, x = override("relu", lambda x: NotImplemented), backend.array(HOST)
    y, cache = ops.relu(x)
    np.testing.assert_array_equal(backend.host(y), np.maximum(HOST, 0))
    np.testing.assert_array_equal(
        backend.host(ops.relu_backward(backend.array(UP), cache)), UP * (HOST > 0)
    )
    assert (spy.forwards, spy.backwards) == (1, 0)


def test_a_kernel_may_decline_one_case_and_take_the_next(
    backend: Here, override: Callable[..., Spy]
):
    spy = override("relu", lambda x: x * 7.0 if x.ndim == 2 else NotImplemented)
    taken, declined = ops.relu(backend.array(HOST))[1], ops.relu(backend.array(HOST[0]))[1]
    np.testing.assert_array_equal(
        backend.host(ops.relu_backward(backend.array(UP), taken)), UP * 1000.0
    )
    up = backend.host(ops.relu_backward(backend.array(UP[0]), declined))
    np.testing.assert_array_equal(up, UP[0] * (HOST[0] > 0))
    assert (spy.forwards, spy.backwards) == (2, 1)


def test_reference_turns_overrides_off_and_auto_on_again(
    backend: Here, override: Callable[..., Spy]
):
    spy, x = override("relu", lambda x: x * 7.0), backend.array(HOST)
    with use_kernels("reference"):
        np.testing.assert_array_equal(backend.host(ops.relu(x)[0]), np.maximum(HOST, 0))
        assert spy.forwards == 0
        with use_kernels("auto"):
            np.testing.assert_array_equal(backend.host(ops.relu(x)[0]), HOST * 7.0)
        np.testing.assert_array_equal(backend.host(ops.relu(x)[0]), np.maximum(HOST, 0))
    np.testing.assert_array_equal(backend.host(ops.relu(x)[0]), HOST * 7.0)


def test_the_switch_is_put_back_after_an_error(backend: Here, override: Callable[..., Spy]):
    spy, x = override("relu", lambda x: x * 7.0), backend.array(HOST)
    with pytest.raises(KeyError), use_kernels("reference"):
        raise KeyError
    ops.relu(x)
    assert spy.forwards == 1


@pytest.mark.parametrize("error", [False, True])
def test_an_inner_choice_ends_at_its_end(error: bool):
    """Of kernels and of precision: then the outer one holds again, and at last none."""
    for choose, chosen, outer, inner in (
        (use_kernels, kernel_choice, "reference", "native"),
        (ops.use_precision, precision, "tf32", "bfloat16"),
    ):
        before = chosen()
        with choose(outer):
            with suppress(KeyError), choose(inner):
                assert chosen() == inner
                if error:
                    raise KeyError
            assert chosen() == outer
        assert chosen() == before


def test_the_switch_is_for_one_thread(backend: Here, override: Callable[..., Spy]):
    spy, x = override("relu", lambda x: x * 7.0), backend.array(HOST)
    with use_kernels("reference"):
        other = threading.Thread(target=lambda: ops.relu(x))
        other.start()
        other.join()
        ops.relu(x)
    assert spy.forwards == 1


def test_a_cache_goes_back_to_its_maker(backend: Here, override: Callable[..., Spy]):
    """Whatever the switch says by then, in both directions."""
    spy, x, dy = override("relu", lambda x: x * 7.0), backend.array(HOST), backend.array(UP)
    _, by_spy = ops.relu(x)
    with use_kernels("reference"):
        np.testing.assert_array_equal(backend.host(ops.relu_backward(dy, by_spy)), UP * 1000.0)
        _, portable = ops.relu(x)
    np.testing.assert_array_equal(backend.host(ops.relu_backward(dy, portable)), UP * (HOST > 0))
    assert spy.backwards == 1


def test_the_first_kernel_set_comes_first_and_the_switch_leaves_it_out(
    backend: Here, override: Callable[..., Spy]
):
    own, compiled = (
        override("relu", lambda x: x * 7.0),
        override("relu", lambda x: x * 9.0, to="numba"),
    )
    x = backend.array(HOST)
    for choice, factor in (("auto", 9.0), ("native", 7.0)):
        with use_kernels(choice):
            y, cache = ops.relu(x)
        np.testing.assert_array_equal(backend.host(y), HOST * factor)
        ops.relu_backward(backend.array(UP), cache)
    assert (own.forwards, own.backwards, compiled.forwards, compiled.backwards) == (1, 1, 1, 1)
    with use_kernels("reference"):
        np.testing.assert_array_equal(backend.host(ops.relu(x)[0]), np.maximum(HOST, 0))
    assert (own.forwards, compiled.forwards) == (1, 1)


def test_what_a_compiled_kernel_declines_goes_to_the_librarys_own_and_then_to_the_portable_pair(
    backend: Here, override: Callable[..., Spy]
):
    own = override("relu", lambda x: x * 7.0 if x.ndim == 2 else NotImplemented)
    compiled = override(
        "relu", lambda x: x * 9.0 if x.shape[0] == 1 else NotImplemented, to="numba"
    )
    results = [backend.host(ops.relu(backend.array(x))[0]) for x in (HOST[:1], HOST, HOST[1])]
    for got, expected in zip(
        results, (HOST[:1] * 9.0, HOST * 7.0, np.maximum(HOST[1], 0)), strict=True
    ):
        np.testing.assert_array_equal(got, expected)
    assert (compiled.forwards, own.forwards) == (3, 2)


def test_an_op_without_a_backward_hands_on_what_it_gives(
    backend: Here, override: Callable[..., Spy]
):
    seen = []
    override("sgd_update", lambda params: NotImplemented)
    kernel = Kernel(lambda params, grads, *, lr, ok=None: seen.append((len(params), lr)))
    p = backend.backend.asarray(HOST)
    runtime._by_type[type(p)].kernels["native"]["sgd_update"] = kernel
    assert ops.sgd_update([p], [backend.array(UP)], lr=0.5) is None
    assert seen == [(1, 0.5)]
    np.testing.assert_array_equal(backend.host(p), HOST)
    with use_kernels("reference"):
        ops.sgd_update([p], [backend.array(UP)], lr=0.5)
    np.testing.assert_array_equal(backend.host(p), HOST - 0.5 * UP)


def test_bad_arguments_are_refused_before_an_override_sees_them(
    backend: Here, override: Callable[..., Spy]
):
    spy = override("relu", lambda x: x)
    with pytest.raises(TypeError):
        ops.relu(backend.array(np.arange(3)))
    assert spy.forwards == 0


# --- caches ---------------------------------------------------------------------------------------

CALLS = {
    example.op: example
    for example in EXAMPLES.values()
    if example.public and example.backward is not None
}


def _small(backend: Here, op: str, **options: Any) -> tuple[Any, Any]:
    """An op's output and cache for small arguments on a backend."""
    example = CALLS[op]
    arguments = example.sized("small", lambda name, shape: normal(*shape))
    placed = {
        word: mapped(value, backend.backend.asarray if "running" in word else backend.array)
        for word, value in arguments.items()
    }
    return call(example.forward, {**placed, **options})


@pytest.mark.parametrize("op", CALLS)
@with_each_kernel
def test_keep_false_keeps_nothing(backend: Here, op: str):
    backward = CALLS[op].backward
    assert backward is not None
    y, cache = _small(backend, op, keep=False)
    assert cache is None
    refuses(StateError, "got None; call", "keep=True", call=lambda: backward(y, None))
    refuses(StateError, "got a tuple; call", "keep=True", call=lambda: backward(y, (y,)))
    y, cache = _small(backend, op)
    for example in CALLS.values():
        wrong = example.backward
        if wrong is not backward:  # the faces of one op share it
            refuses(
                StateError,
                "expected the cache of",
                cache.op,
                call=lambda wrong=wrong: wrong(y, cache),
            )
    backward(y, cache)


# --- what backends bring --------------------------------------------------------------------------


def every_override() -> list[tuple[str, str, str]]:
    """The backend's name, which of its kernel sets, and the op's name."""
    return [
        (name, word, op)
        for name in runtime.backend_names()
        for word, table in sets(name).items()
        for op in table
    ]


def sets(name: str) -> Mapping[str, Mapping[str, Kernel]]:
    try:
        return runtime.resolve(name).kernels
    except BackendError:
        # CuPy's load without a GPU and without CuPy.
        return {"native": cupy_kernels.KERNELS} if name == "cupy" else {}


def parameters(function: Callable[..., Any]) -> list[tuple]:
    """Name, kind and whether there is a default, which must then be the same."""
    return [(p.name, p.kind, p.default) for p in signature(function).parameters.values()]


@pytest.mark.parametrize("shape", [(3, 2), (1, 3), (2, 3, 1), (6,), ()])
def test_a_gradient_of_another_shape_is_refused(backend: Here, shape: tuple):
    """Also where it would broadcast."""
    for op in ("relu", "sigmoid", "tanh", "clip"):
        y, cache = getattr(ops, op)(backend.array(HOST))
        backward = getattr(ops, f"{op}_backward")
        refuses(
            ArrayError,
            f"{op}_backward",
            "expected a gradient like the output",
            "(2, 3)",
            call=lambda run=backward, kept=cache: run(backend.array(np.ones(shape)), kept),
        )
        assert backward(y, cache).shape == (2, 3)


@pytest.mark.parametrize(("name", "word", "op"), every_override())
def test_overrides_have_the_portable_signatures(name: str, word: str, op: str):
    kernel = sets(name)[word][op]
    assert op in OPS, f"{name} overrides {op}, which is no op; ops are {', '.join(OPS)}"
    assert parameters(kernel.forward) == parameters(OPS[op].forward)
    portable = OPS[op].portable_backward
    assert (kernel.backward is None) == (portable is None)
    if portable is not None:
        assert parameters(kernel.backward) == parameters(portable)
    if kernel.prepare is not None:  # it keeps nothing
        assert parameters(kernel.prepare) == [
            p for p in parameters(OPS[op].forward) if p[0] != "keep"
        ]


def test_numpys_overrides_are_found():
    """The test above would pass with no parameters at all."""
    assert ("numpy", "native", "max_pool") in every_override()
    assert ("cupy", "native", "conv_relu") in every_override()
    assert (("numpy", "numba", "conv_relu") in every_override()) == (find_spec("numba") is not None)
    assert set(OPS) >= {
        "conv",
        "max_pool",
        "avg_pool",
        "relu",
        "sigmoid",
        "linear",
        "conv_relu",
        "linear_relu",
        "softmax_cross_entropy",
        "adam_update",
    }


@needs("torch")
@pytest.mark.parametrize("op", ["conv", "max_pool", "avg_pool"])
@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_torchs_own_kernels_run_when_they_should(
    op: str, choice: str, monkeypatch: pytest.MonkeyPatch
):
    import torch

    kernel, calls = runtime.resolve("torch").kernels["native"][op], []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append("forward")
        return kernel.forward(*args, **kwargs)

    def backward(*args: Any, **kwargs: Any) -> Any:
        calls.append("backward")
        return kernel.backward(*args, **kwargs)

    x = torch.ones(1, 1, 4, 4)
    watched = replace(backend_of(x), kernels={"native": {op: Kernel(forward, backward)}})
    monkeypatch.setitem(runtime._by_type, torch.Tensor, watched)
    run = {
        "conv": lambda **o: ops.conv2d(x, x[:, :, :3, :3], **o),
        "max_pool": lambda **o: ops.max_pool2d(x, 3, **o),
    }
    run["avg_pool"] = lambda **o: ops.avg_pool2d(x, 3, **o)
    back = getattr(ops, f"{op}2d_backward")
    with use_kernels(choice):
        back(*run[op](padding=1))
        assert calls == ([] if choice == "reference" else ["forward", "backward"])
        # PyTorch pads alike on both sides: the override declines
        back(*run[op](padding=((1, 0), (0, 1))))
        assert calls == ([] if choice == "reference" else ["forward", "backward", "forward"])


# --- the variable ---------------------------------------------------------------------------------

PROGRAM = """
import numpy as np
from dataclasses import replace
from functools import partial
from portacnn import ops, runtime
from portacnn.runtime import Kernel
x = np.ones(2)
kernels = {"native": {"relu": Kernel(lambda x, *, keep=True: (x * 7.0, None), lambda dy,
    saved: dy)}}
runtime._by_type[np.ndarray] = replace(runtime.backend_of(x), kernels=kernels)
print(ops.relu(x)[0][0])
with ops.use_kernels("auto"):
    print(ops.relu(x)[0][0])
"""


def in_a_process(program: str, **variables: str) -> subprocess.CompletedProcess:
    environment = without_settings()
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )


VALUES = {None: "7.0", "": "7.0", "auto": "7.0", "native": "7.0", "reference": "1.0"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_the_variable_is_read_at_the_first_op():
    """So that a program may set it after its imports: each child does."""
    program = f"""
import os, sys
from portacnn import ops
for value in {list(VALUES)}:
    if value is not None:
        os.environ["PORTACNN_KERNELS"] = value
    child = os.fork()
    if child == 0:
        break
    if os.waitpid(child, 0)[1]:
        sys.exit(f"with {{value!r}}")
else:
    sys.exit(0)
{PROGRAM}
sys.stdout.flush()
os._exit(0)
"""
    done = in_a_process(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [word for first in VALUES.values() for word in (first, "7.0")]


def test_an_unknown_choice_names_the_choices():
    done = in_a_process(
        "import numpy, portacnn; portacnn.ops.relu(numpy.ones(3))", PORTACNN_KERNELS="fast"
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    for word in (
        "ArgumentError",
        "PORTACNN_KERNELS",
        "auto",
        "numba",
        "native",
        "reference",
        "'fast'",
    ):
        assert word in last

    def enter() -> None:
        with use_kernels("fast"):
            pass

    refuses(
        ArgumentError, "use_kernels", "auto", "numba", "native", "reference", "'fast'", call=enter
    )
