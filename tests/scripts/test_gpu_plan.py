"""What gpu_check.py measures becomes the plan; and the tests that it runs, in which order, within
its time."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from support.gpu_rig import ROOT, plan, plan_table, suite

# --- from yields to the plan ----------------------------------------------------------------------


def report(**changes: Any) -> dict[str, Any]:
    """What gpu_check.json says of the tiles: each tile a little worse than the one before."""
    known = plan_table(plan.PLAN.read_text())
    yields = {
        kernel: {name: 1 - 0.1 * n for n, name in enumerate(tiles)}
        for kernel, tiles in known.items()
    }
    section = {
        "section": "yields",
        "red": [],
        "figures": {"yields": yields, "gpu": "NVIDIA H100"},
        **changes,
    }
    return {"started": "2026-11-26T20:00:00+00:00", "sections": [{"section": "device"}, section]}


def test_measured_yields_become_the_plan(tmp_path, monkeypatch, capsys):
    own = tmp_path / "plan.py"
    before = plan.PLAN.read_text()
    own.write_text(before)
    (tmp_path / "gpu_check.json").write_text(json.dumps(report()))
    monkeypatch.setattr(plan, "ROOT", tmp_path)
    monkeypatch.setattr(plan, "PLAN", own)
    assert plan.main([str(tmp_path / "gpu_check.json")]) == 0
    assert own.read_text() == before
    assert plan.main([str(tmp_path / "gpu_check.json"), "--write"]) == 0
    text = own.read_text()
    assert plan_table(text) == report()["sections"][1]["figures"]["yields"]
    assert list(plan_table(text)) == list(plan_table(before))
    assert "NVIDIA H100, 2026-11-26" in text
    assert "no GPU was at hand" not in text
    start, end = before.index("YIELDS: "), before.index("def wide_tile")
    assert (text[:start], text[text.index("def wide_tile") :]) == (before[:start], before[end:])
    assert plan.main([str(tmp_path / "gpu_check.json"), "--write"]) == 0
    assert own.read_text() == text
    assert '"forward"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"section": "rates"}, "the report has no yields"),
        ({"red": ["forward with FEW: no memory"]}, "the section yields is red: forward with FEW"),
        (
            {"figures": {"yields": {"forward": {"FEW": 1.0}}, "gpu": ""}},
            "forward: the plan has LARGE, WIDE",
        ),
    ],
)
def test_figures_that_are_no_plan_are_refused(tmp_path, capsys, changes, said):
    (tmp_path / "gpu_check.json").write_text(json.dumps(report(**changes)))
    assert plan.main([str(tmp_path / "gpu_check.json"), "--write"]) == 1
    assert said in capsys.readouterr().err


# --- tests on CuPy --------------------------------------------------------------------------------


def test_only_tests_of_backends_are_run_the_quickest_first():
    folder = ROOT / "tests"
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in suite.files()]
    assert names[: len(suite.QUICKEST)] == suite.QUICKEST
    assert len(set(names)) == len(names)
    assert not [name for name in names if name.startswith(("backends/cupy", "scripts/test_gpu"))]
    assert {"training/test_trainer", "models/test_models", "scratch/test_layers"} <= set(names)


@pytest.mark.slow
def test_what_has_no_time_left_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setenv("PORTACNN_TEST_BACKENDS", "numpy")
    options = [
        "-q",
        "-n",
        "0",
        "-k",
        "numpy",
        "-p",
        "no:cacheprovider",
        str(ROOT / "tests" / "ops" / "test_linear.py"),
    ]
    environment = {**os.environ, "PORTACNN_TEST_SECONDS": "0"}
    command = [sys.executable, "-m", "pytest", *options]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout
    assert "passed" not in done.stdout
    assert "the 0 seconds of PORTACNN_TEST_SECONDS are over" in done.stdout
