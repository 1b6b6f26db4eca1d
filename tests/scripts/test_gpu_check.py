"""scripts/gpu_check.py without a GPU: how it shares its time, what it calls red, and that it sees
what is wrong."""

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from portacnn.backends.cupy.kernels import KERNELS as CUDA_KERNELS
from portacnn.ops.dispatch import OPS
from portacnn.runtime import Kernel
from portacnn.testing.examples import examples_of
from support.cuda_rig import needs_compiler
from support.gpu_rig import (
    NUMPY,
    ROOT,
    HostGpu,
    check,
    kernels,
    numpy_for_gpu,
    plan,
    plan_table,
    run,
    times,
    tools,
    training,
)
from support.nets import small_net

# --- sections and their time ----------------------------------------------------------------------


def test_what_a_section_raises_is_on_record_and_the_rest_goes_on(tmp_path, capsys):
    section = tools.Section("kernels", tmp_path / "found.json")

    def work(section: Any) -> None:
        with section.caught("first"):
            raise ValueError("too  large")
        section.row(kernel="conv", off=math.nan)

    found = section.run(work)
    assert found["status"] == "red"
    assert found["red"] == ["first: ValueError: too large"]
    assert json.loads((tmp_path / "found.json").read_text())["rows"] == [
        {"kernel": "conv", "off": "nan"}
    ]
    assert "ValueError" in capsys.readouterr().err


def test_a_section_that_cannot_run_says_why():
    def work(section: Any) -> None:
        raise tools.NotHereError("no gpu")

    found = tools.Section("parity").run(work)
    assert (found["status"], found["skipped"], found["red"]) == ("skipped", "no gpu", [])


SCRIPT = """
import json, os, signal, sys, time
path = json.loads(sys.argv[2])["path"]
found = {"section": "parity", "status": "red", "red": [], "skipped": None, "notes": [],
    "figures": {}, "rows": [1]}
with open(path, "w") as file:
    json.dump(found, file)
"""


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("time.sleep(60)", "it was killed after 1 seconds"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "exited with status -11"),
    ],
)
def test_a_process_that_hangs_or_dies_leaves_what_it_had(tmp_path, monkeypatch, ending, said):
    script = tmp_path / "section.py"
    script.write_text(SCRIPT + ending)
    monkeypatch.setattr(check, "__file__", str(script))
    begun = time.perf_counter()
    found = check.spawn({"section": "parity"}, 1.0)
    assert time.perf_counter() - begun < 20
    assert found["status"] == "red"
    assert said in found["red"][0]
    assert found["rows"] == [1]


def test_starting_a_section_is_part_of_its_time(monkeypatch):
    left = []
    module = SimpleNamespace(parity=lambda section: left.append(section.left))
    monkeypatch.setattr(check, "import_module", lambda name: module)
    check.work_off({"section": "parity", "seconds": 60.0, "spawned": time.time() - 10.0})
    assert left[0] == pytest.approx(50.0, abs=1.0)


def green(task: dict[str, Any], limit: float) -> dict[str, Any]:
    return {**tools.Section(task["section"]).found(), "status": "green"}


def test_the_shares_fit_into_the_budget_and_what_is_left_goes_on(tmp_path, monkeypatch, capsys):
    given = []

    def at_once(task: dict[str, Any], limit: float) -> dict[str, Any]:
        given.append(task["seconds"])
        assert limit <= task["seconds"] + check.GRACE
        return green(task, limit)

    monkeypatch.setattr(check, "spawn", at_once)
    assert check.main(["--out", str(tmp_path), "--budget", "100"]) == 0
    whole = sum(part.seconds for part in check.PARTS.values())
    assert given[0] == pytest.approx(
        (100 - check.TELL - check.GRACE) * check.PARTS["device"].seconds / whole, rel=0.01
    )
    # the others took nothing
    assert given[-1] == pytest.approx(100 - check.TELL - check.GRACE, rel=0.01)
    assert whole <= check.BUDGET
    assert "nothing is red" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("statuses", "status", "said"),
    [
        (["green", "skipped"], 0, "nothing is red"),
        (["red", "green"], 1, "RED: parity"),
        (["skipped", "skipped"], 1, "nothing ran"),
    ],
)
def test_exit_status(tmp_path, monkeypatch, capsys, statuses, status, said):
    waiting = iter(statuses)
    monkeypatch.setattr(
        check, "spawn", lambda task, limit: {**green(task, limit), "status": next(waiting)}
    )
    assert check.main(["--out", str(tmp_path / "deeper"), "--only", "parity,capture"]) == status
    assert said in capsys.readouterr().out.splitlines()[-1]
    report = json.loads((tmp_path / "deeper" / "gpu_check.json").read_text())
    assert [result["status"] for result in report["sections"]] == statuses


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "speed"], "unknown section speed; known are device"),
        (["--only", ","], "--only lists no section; known are device"),
        (["--budget", "0"], "--budget must be above 0, got 0"),
    ],
)
def test_words_it_does_not_know(tmp_path, capsys, words, said):
    assert check.main([*words, "--out", str(tmp_path)]) == check.USAGE_ERROR
    assert said in capsys.readouterr().err


def test_the_first_sections_say_most_and_fit_into_their_budget(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(
        check, "spawn", lambda task, limit: given.append((task, limit)) or green(task, limit)
    )
    assert check.main(["--out", str(tmp_path), "--first"]) == 0
    assert [task["section"] for task, _ in given] == [
        "device",
        "kernels",
        "capture",
        "transfers",
        "memory",
    ]
    assert list(check.PARTS)[:5] == list(check.FIRST)
    assert sum(check.PARTS[name].seconds for name in check.FIRST) + check.GRACE + check.TELL <= 200
    assert given[-1][1] <= 200  # the others took nothing
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert (report["options"]["budget"], report["options"]["first"]) == (200, True)


def test_what_no_section_can_do_without_is_said_first(tmp_path, monkeypatch, capsys):
    """In one line, with the cure: not as a reason in each of a dozen sections."""
    there = check.find_spec
    monkeypatch.setattr(
        check, "find_spec", lambda name: None if name == "array_api_compat" else there(name)
    )
    monkeypatch.setattr(check, "spawn", lambda task, limit: pytest.fail("a section was begun"))
    assert check.main(["--out", str(tmp_path / "out")]) == check.USAGE_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    for words in (
        "array-api-compat not installed",
        "pip download --no-deps -d wheels array-api-compat",
        "--target site",
    ):
        assert words in line
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not isinstance(check.find_spec("cupy"), type(None)), reason="CuPy is installed")
def test_without_cupy_it_says_so_and_is_not_green(tmp_path):
    command = [
        sys.executable,
        ROOT / "scripts" / "gpu_check.py",
        "--quick",
        "--only",
        "device",
        "--out",
        tmp_path,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "CuPy is not installed" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("nothing ran")


def test_every_section_has_its_function():
    assert set(check.names_of_parts()) == set(check.PARTS)


def test_pytorch_is_put_beside(monkeypatch):
    own = {
        "section": "steps",
        "rows": [{"net": "deep", "batch": 32, "kernels_ms": 3.0, "captured_ms": 1.0}],
    }
    peer = {"section": "torch", "rows": [{"net": "deep", "batch": 32, "eager_ms": 4.0}]}
    check.compare([own, peer])
    assert own["rows"][0]["to_torch_eager"] == 0.25
    assert own["rows"][0]["to_torch_graph"] is None


def test_tables():
    lines = tools.table(
        [
            {"a_b": 1.23456, "word": "x"},
            {"a_b": 1234.5, "word": "longer"},
            {"a_b": None, "more": True},
        ]
    )
    assert lines == [
        " a b  word    more",
        "-" * 18,
        "1.23  x          -",
        "1234  longer     -",
        "   -  -        yes",
    ]


# --- the clock ------------------------------------------------------------------------------------


def test_blocks_take_turns_and_count_what_each_run_takes(monkeypatch):
    now = [0.0]  # seconds, of host and device alike
    monkeypatch.setattr(tools.time, "perf_counter", lambda: now[0])
    order = []

    def run(name: str, ms: float) -> Callable[[], None]:
        def once() -> None:
            order.append(name)
            now[0] += ms / 1e3

        return once

    clock = tools.Clock(lambda: now[0], lambda a, b: 1e3 * (b - a), lambda: None)
    found = tools.clock_blocks(
        clock, {"a": run("a", 2.0), "b": run("b", 5.0)}, block=0.0101, blocks=4
    )
    assert found["a"].ms == pytest.approx(2.0)
    assert found["b"].device == pytest.approx([5.0] * 4)
    assert [time.runs for time in found.values()] == [5, 2]
    assert found["a"].spread == pytest.approx(1.0)
    assert "".join(order[6:]) == "aaaaabb" + "bbaaaaa" + "aaaaabb" + "bbaaaaa"


def test_the_longer_of_two_clocks_counts():
    assert tools.Times([1.0, 1.0, 1.0], [2.0, 3.0, 2.0], 1).ms == 2.0
    assert tools.Times([1.0, 4.0, 4.0], [2.0, 2.0, 2.0], 1).ms == 4.0


# --- kernels --------------------------------------------------------------------------------------


def portable(name: str) -> Kernel:
    return Kernel(OPS[name].forward, OPS[name].portable_backward)


def compared(table: dict[str, Kernel], **options: Any) -> Any:
    section = tools.Section("kernels", seconds=60.0, quick=True, **options)
    kernels.check(section, NUMPY, table)
    return section


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
    return dx, dweight * (1 + 1e-3), dbias


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


# --- on the stand-in for CuPy ---------------------------------------------------------------------

REHEARSAL = """
import sys
from support import fake_cupy
fake_cupy.install()
fake_cupy.capacity[:] = [96 << 20] * 2
sys.path.insert(0, sys.argv.pop(1))
import gpu_check
sys.exit(gpu_check.main(sys.argv[1:]))
"""


def rehearse(out: Path, sections: str, *options: str) -> tuple[int, str, dict[str, dict[str, Any]]]:
    """The script in a process in which the stand-in is CuPy: exit status, what it printed, what
    each section found."""
    command = [
        sys.executable,
        "-c",
        REHEARSAL,
        str(ROOT / "scripts"),
        "--here",
        "--quick",
        "--only",
        sections,
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    environment["PORTACNN_TEST_BACKENDS"] = "cupy-emulated"
    done = subprocess.run(
        [*command, "--out", str(out), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1000,
    )
    report = json.loads((out / "gpu_check.json").read_text())
    return (
        done.returncode,
        done.stdout + done.stderr,
        {found["section"]: found for found in report["sections"]},
    )


def test_the_gpu_is_described(tmp_path):
    status, printed, found = rehearse(tmp_path, "device")
    assert status == 0, printed
    figures = found["device"]["figures"]
    assert figures["gpu"] == "the host"
    assert all(
        figures[name] > 0
        for name in ("copy_GB_per_s", "fp32_TFLOP_per_s", "launch_us", "graph_of_one_us")
    )
    assert re.search(r"^section +status +s +what\n-+\ndevice +green +\d", printed, re.MULTILINE)


@pytest.mark.slow
@needs_compiler
def test_every_section_goes_through(tmp_path):
    """The whole of it, and its figures read back: as the plan, which takes them."""
    status, printed, found = rehearse(tmp_path, ",".join(check.PARTS), "--budget", "900")
    assert status == 0, printed
    assert list(found) == list(check.PARTS)
    statuses = {name: result["status"] for name, result in found.items()}
    assert statuses.pop("torch") == "skipped" or check.find_spec("torch") is None
    assert statuses.pop("accuracy") == "skipped"  # without MNIST's files
    assert set(statuses.values()) == {"green"}, statuses
    assert {row["kernel"] for row in found["kernels"]["rows"]} == {*CUDA_KERNELS, "erf"}
    assert all(row["timed"] == "graph" for row in found["rates"]["rows"])
    assert set(times.TIERS) <= {
        key.removesuffix("_ms") for key in found["steps"]["rows"][0] if key.endswith("_ms")
    }
    assert " passed" in found["tests"]["figures"]["counts"]
    yields, where = plan.measured(json.loads((tmp_path / "gpu_check.json").read_text()))
    assert where.startswith("the host, 20")
    assert plan_table(plan.planned(plan.PLAN.read_text(), yields, where)) == {
        kernel: {name: round(share, 2) for name, share in tiles.items()}
        for kernel, tiles in yields.items()
    }
