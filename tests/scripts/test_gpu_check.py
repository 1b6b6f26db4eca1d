"""scripts/gpu_check.py without a GPU: how it shares its time, and what it calls red."""

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

import pytest

from portacnn.backends.cupy.kernels import KERNELS as CUDA_KERNELS
from support.cuda_rig import needs_compiler
from support.gpu_rig import (
    ROOT,
    check,
    plan,
    plan_table,
    times,
    tools,
)

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
    ("ending", "limit", "said"),
    [
        ("time.sleep(60)", 0.6, "it was killed after 1 seconds"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 60.0, "exited with status -11"),
    ],
)
def test_a_process_that_hangs_or_dies_leaves_what_it_had(
    tmp_path, monkeypatch, ending, limit, said
):
    class Started(subprocess.Popen):
        """Its time begins when it has written: on a busy machine starting it may take that long."""

        def wait(self, timeout=None):
            if timeout is not None:
                path = Path(json.loads(self.args[-1])["path"])
                while self.poll() is None and not (path.exists() and path.stat().st_size):
                    time.sleep(0.005)
            return super().wait(timeout)

    monkeypatch.setattr(check.subprocess, "Popen", Started)
    script = tmp_path / "section.py"
    script.write_text(SCRIPT + ending)
    monkeypatch.setattr(check, "__file__", str(script))
    begun = time.perf_counter()
    found = check.spawn({"section": "parity"}, limit)
    assert time.perf_counter() - begun < 20
    assert found["status"] == "red"
    assert said in found["red"][0]
    assert found["rows"] == [1]


def test_starting_a_section_is_part_of_its_time(monkeypatch):
    left = []
    module = SimpleNamespace(parity=lambda section: left.append(section.left))
    monkeypatch.setattr(check, "import_module", lambda name: module)
    begun = time.time()
    check.work_off({"section": "parity", "seconds": 60.0, "spawned": begun - 10.0})
    assert 49.9 - (time.time() - begun) < left[0] < 50.1


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


# --- on the stand-in for CuPy ---------------------------------------------------------------------


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
    assert statuses.pop("torch_graph") == "skipped"  # there is no CUDA device
    assert statuses.pop("jax") == "skipped"  # it finds no GPU
    assert statuses.pop("nccl") == "skipped"  # the stand-in for CuPy has none
    assert statuses.pop("accuracy") == "skipped"  # without MNIST's files
    assert {name: each for name, each in statuses.items() if each != "green"} == {}
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
