"""The sections of scripts/gpu_check.py without a GPU: they see what is wrong."""

import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from portacnn.backends.cupy.kernels import KERNELS as CUDA_KERNELS
from portacnn.ops.dispatch import OPS
from portacnn.runtime import Kernel, resolve
from portacnn.testing.examples import examples_of
from support.gpu_rig import (
    NUMPY,
    HostGpu,
    kernels,
    numpy_for_gpu,
    run,
    times,
    tools,
    training,
)
from support.matrix import needs
from support.nets import small_net


def portable(name: str) -> Kernel:
    return Kernel(OPS[name].forward, OPS[name].portable_backward)


def compared(table: dict[str, Kernel], **options: Any) -> Any:
    section = tools.Section("kernels", seconds=60.0, quick=True, **options)
    kernels.check(section, NUMPY, table)
    return section


# --- kernels --------------------------------------------------------------------------------------


def test_every_kernel_for_cuda_is_compared():
    """Put a row for it into portacnn/testing/examples.py."""
    assert all(examples_of(name) for name in CUDA_KERNELS)


@pytest.mark.parametrize("name", sorted({*CUDA_KERNELS, *NUMPY.kernels["native"]}))
def test_the_portable_op_passes(name):
    section = compared({name: portable(name)})
    assert section.red == []
    (row,) = section.rows
    assert row["compared"] == 3
    assert row["float64"] < 1e-13  # the same function on the same numbers


def test_numpys_own_kernels_pass():
    # SciPy may not be there
    names = sorted(set(NUMPY.kernels["native"]) - {"erf"})
    assert compared({name: NUMPY.kernels["native"][name] for name in names}).red == []


def linear(
    change: Callable[[np.ndarray], np.ndarray], backward: Callable[..., Any] | None = None
) -> dict[str, Kernel]:
    def forward(*args: Any, **options: Any) -> Any:
        y, saved = OPS["linear"].forward(*args, **options)
        return change(y), saved

    return {"linear": Kernel(forward, backward or OPS["linear"].portable_backward)}


def unwritten(y: np.ndarray) -> np.ndarray:
    y = y.copy()
    y.flat[-1] = np.nan
    return y


def other_each_time(y: np.ndarray, calls: list[int] = [0]) -> np.ndarray:  # noqa: B006
    calls[0] += 1
    return y * y.dtype.type(1 + 1e-7 * calls[0])


def without_bias(dy: Any, saved: Any, **options: Any) -> Any:
    dx, dweight, dbias = OPS["linear"].portable_backward(dy, saved, **options)
    return dx, None if dweight is None else dweight * (1 + 1e-3), dbias


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (linear(lambda y: y * (1 + 1e-3)), "linear (example"),
        (linear(lambda y: y + y.dtype.type(1e-3) * abs(y).max()), "off by 1.0e-03"),
        (linear(unwritten), "is not finite in 1 places"),
        (linear(other_each_time), "has other bits when it is computed again"),
        (linear(lambda y: y.astype("float16")), "got float16"),
        (linear(lambda y: y, without_bias), "off by 1.0e-03"),
        ({"linear": Kernel(lambda *args, **options: NotImplemented)}, "declined all 60 examples"),
        (
            {"flatten": portable("linear")},
            "flatten: put a row for it into portacnn/testing/examples.py",
        ),
        ({}, "has no kernels"),
    ],
)
def test_what_is_wrong_is_seen(table, said):
    section = compared(table)
    assert any(said in line for line in section.red), section.red
    assert section.status == "red"


def test_an_input_that_is_changed_is_seen():
    def forward(x: np.ndarray, *args: Any, **options: Any) -> Any:
        result = OPS["relu"].forward(x, *args, **options)
        x[...] = 0
        return result

    assert compared({"relu": Kernel(forward, OPS["relu"].portable_backward)}).red


# --- training -------------------------------------------------------------------------------------


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    gc.freeze()  # the sections collect garbage often
    numpy_for_gpu(monkeypatch)


@pytest.mark.usefixtures("on_host")
def test_where_nothing_is_captured_that_is_red():
    found = run("capture")
    assert [row["same_bits"] for row in found["rows"]] == [True] * 2
    assert len(found["red"]) == 2
    assert all("nothing was captured" in line for line in found["red"])


@pytest.mark.usefixtures("on_host")
def test_growing_memory_is_seen(monkeypatch):
    monkeypatch.setattr(
        training, "_sent_for", lambda gpu: small_net(input_dim=(1, 28, 28), output_size=10)
    )
    red = run("transfers")["red"]
    assert red == [
        f"{net}, replayed: nothing was captured" for net in ("simple", "what CuPy sends for")
    ]
    monkeypatch.setattr(HostGpu, "grows", 512)
    monkeypatch.setattr(training, "_sent_for", lambda gpu: 1 / 0)  # of no more interest
    monkeypatch.setattr(tools.Section, "room", lambda self, seconds, what: "eager" in what)
    assert "simple, eager: the pool's used bytes grew by 512 in" in run("transfers")["red"][0]


def test_what_is_carried_is_counted():
    class ndarray:  # noqa: N801
        def get(self) -> int:
            return 3

        def __float__(self) -> float:
            return 0.5

    cp = SimpleNamespace(
        ndarray=ndarray, array=lambda x, **_: ndarray(), asarray=lambda x: x, ascontiguousarray=id
    )
    gpu = SimpleNamespace(cp=cp)
    with training.carried(gpu) as counts:
        one = cp.array([1.0])
        assert cp.asarray(one) is one
        assert (one.get(), float(one)) == (3, 0.5)
    assert {name: count for name, count in counts.items() if count} == {
        "array": 1,
        "get": 1,
        "__float__": 1,
    }
    assert float(ndarray()) == 0.5
    assert counts["__float__"] == 1  # no longer watched


@pytest.mark.usefixtures("on_host")
def test_words_of_portacnn_and_of_python_are_heard():
    import logging
    import warnings

    with training.words_of() as (words, others):
        logging.getLogger("portacnn").warning("%s runs as it is", "step")
        warnings.warn("slow", UserWarning, stacklevel=1)
    assert words == ["step runs as it is"]
    assert others == ["slow"]


def test_all_of_mnist_is_asked_for():
    found = run("accuracy")
    assert found["skipped"] == "needs all of MNIST: pass --data DIR"


# --- rates ----------------------------------------------------------------------------------------


def test_calls_of_kernels_are_observed_and_the_table_is_as_before():
    before = dict(NUMPY.kernels["native"])
    with times.use_kernels("native"):
        found = times.observed(NUMPY, "simple", 4)
    assert dict(NUMPY.kernels["native"]) == before
    names = [key[0] for key in found]
    assert {"conv_relu", "linear_relu", "linear", "sgd_update"} <= set(names)
    (call,) = (call for key, call in found.items() if key[0] == "conv_relu")
    (forward, _, work), (backward, run_back, work_back) = times._directions("conv_relu", call)
    assert (forward, backward) == ("forward", "backward")
    assert work["flops"] == 2 * 4 * 24 * 24 * 30 * 25
    assert work["bytes"] == 4 * (4 * 784 + 30 * 25 + 30 + 4 * 30 * 12 * 12)
    assert work_back["flops"] == 2 * work["flops"]
    assert run_back() is not None


# --- steps ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_host")
def test_one_step_of_each_net_goes_ahead_of_the_clock(monkeypatch):
    calls = []

    def step(gpu: Any, net: str, batch: int, kernels: str, replayed: bool, warm: int = 3) -> Any:
        calls.append((net, batch, kernels, replayed, warm))
        return lambda: None

    def clock_blocks(clock: Any, runs: dict[str, Any], **_: Any) -> Any:
        calls.append(tuple(runs))
        return {name: tools.Times([1.0], [1.0], 1) for name in runs}

    for name, new in (("Gpu", HostGpu), ("_step", step), ("clock_blocks", clock_blocks)):
        monkeypatch.setattr(times, name, new)
    monkeypatch.setattr(HostGpu, "clock", None, raising=False)
    section = tools.Section("steps", seconds=1000.0)
    found = section.run(times.steps)
    assert found["status"] == "green", found["red"]
    assert calls[:4] == [(net, times.WARM_BATCH, "auto", False, 1) for net in times.NETS]
    assert calls[4:7] == [
        ("simple", 100, "auto", False, 3),
        ("simple", 100, "auto", True, 3),
        ("kernels", "captured"),
    ]
    portable = calls.index(("simple", times.WARM_BATCH, "reference", False, 1))
    assert ("portable",) not in calls[:portable]
    assert len(found["rows"]) == len(times.NETS) * len(times.BATCHES)
    assert all({"kernels_ms", "captured_ms", "portable_ms"} <= set(row) for row in found["rows"])


@needs("torch")
def test_steps_of_torch_are_compared(monkeypatch):
    from gpu import torch_capture

    from support import torch_graphs

    torch_graphs.install(monkeypatch)
    monkeypatch.setattr(torch_capture, "_home", lambda section: resolve("torch"))
    found = run("torch_graph")
    assert (found["status"], found["red"]) == ("green", [])
    (row,) = found["rows"]
    assert (row["graphs"], row["same_bits"], row["steps"]) == (1, True, 6)
    monkeypatch.setattr(torch_capture, "_home", lambda section: resolve("numpy"))
    assert run("torch_graph")["status"] == "red"
