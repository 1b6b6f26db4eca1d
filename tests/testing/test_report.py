"""Reports, ways to run the kit, and the frozen figures."""

import json
import sys
from dataclasses import replace
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from xml.etree import ElementTree

import pytest

from portacnn.errors import ArgumentError, BackendError
from portacnn.layers import Layer
from portacnn.losses import Loss
from portacnn.ops.dispatch import OPS
from portacnn.runtime import Kernel, resolve
from portacnn.testing import check_layer, check_loss
from portacnn.testing.__main__ import main
from portacnn.testing.adapter_checks import is_resolved
from portacnn.testing.examples import EXAMPLES
from portacnn.testing.figures import figures_of
from portacnn.testing.report import Check, Fault, NotApplicable, perform
from support.matrix import needs

ROOT = Path(__file__).resolve().parents[2]
# where portacnn is installed, pytest finds the plugin by its entry point
INSTALLED = any(point.name == "portacnn" for point in entry_points(group="pytest11"))
PLUGIN = () if INSTALLED else ("-p", "portacnn.testing.plugin")


def raising(error: Exception):
    def run():
        raise error

    return run


CHECKS = [
    Check("ops: exact", lambda: 0.0),
    Check("ops: near", lambda: 1e-7),
    Check("files: passed", lambda: None),
    Check("ops: refused", raising(BackendError("no float64 here"))),
    Check("ops: not written", raising(NotImplementedError("later"))),
    Check("ops: skipped", raising(NotApplicable("no strides"))),
    Check("ops: off", raising(Fault("gradient of x: 0.3 off")), "check_op(mine)"),
    Check("ops: broken", raising(KeyError("x"))),
]
WORDS = ["exact", "near", "passed", "refused", "refused", "skipped", "wrong", "wrong"]


def test_statuses():
    report = perform("mine", CHECKS)
    assert [finding.status for finding in report.findings] == WORDS
    assert not report.ok
    assert "1 exact, 1 near, 1 passed, 2 refused, 1 skipped, 2 wrong" in report.summary()
    text = str(report)
    assert "near     ops: near" in text
    assert "1.0e-07" in text
    assert "gradient of x: 0.3 off\n         to see it: check_op(mine)" in text
    assert "KeyError: 'x' (" in report["ops: broken"].message
    with pytest.raises(AssertionError, match=r"mine: 8 checks(.|\n)*0\.3 off"):
        report.raise_if_wrong()
    perform("mine", CHECKS[:6]).raise_if_wrong()


def test_json_and_junit_say_the_same():
    report = perform("mine", CHECKS)
    told = json.loads(report.to_json())
    assert told["subject"] == "mine"
    assert not told["ok"]
    assert [finding["status"] for finding in told["findings"]] == WORDS
    assert told["findings"][1]["error"] == 1e-7
    suite = ElementTree.fromstring(report.to_junit())
    assert suite.tag == "testsuite"
    assert {key: suite.get(key) for key in ("tests", "failures", "skipped", "errors")} == {
        **{"tests": "8", "failures": "2", "skipped": "3", "errors": "0"}
    }
    cases = {case.get("name"): case for case in suite}
    assert cases["off"].get("classname") == "ops"
    assert cases["off"].find("failure").get("message") == "gradient of x: 0.3 off"
    assert cases["refused"].find("skipped").get("message").startswith("refused: BackendError")
    assert "1.0e-07" in cases["near"].find("system-out").text


def test_some_checks():
    def names(only: str) -> list[str]:
        return [finding.name for finding in perform("mine", CHECKS, only).findings]

    assert names("files") == ["files: passed"]
    assert names("ops: n*") == ["ops: near", "ops: not written"]
    more = Check("ops: near misses", lambda: 0.0)
    assert [f.name for f in perform("mine", [*CHECKS, more], "ops: near").findings] == ["ops: near"]
    with pytest.raises(ArgumentError, match=r"no check is called 'opps'; they are ops: exact, "):
        names("opps")


# --- the ways to run it ---------------------------------------------------------------------------


def test_command(toy: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    files = [tmp_path / "report.json", tmp_path / "report.xml"]
    options = ["--only", "ops: relu", "--json", str(files[0]), "--junit", str(files[1])]
    assert main([toy, *options]) == 0
    assert "toyarray on toy:0: 1 check: 1 exact" in capsys.readouterr().out
    assert main([toy, "numpy", *options]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("| backend | adapter | randomness | ops |")
    assert [line.split(" | ")[0] for line in table[2:]] == ["| toyarray on toy:0", "| numpy on cpu"]
    assert [report["ok"] for report in json.loads(files[0].read_text())] == [True, True]
    assert len(ElementTree.parse(files[1]).getroot()) == 2
    assert main(["nobody"]) == 2
    assert "nobody" in capsys.readouterr().err


def test_plugin(toy: str, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    toyarray_portacnn = import_module("toyarray_portacnn")
    options = (*PLUGIN, f"--portacnn-backend={toy}")
    run = pytester.runpytest_inprocess
    run(*options, "-k", "silu or compiled").assert_outcomes(passed=1, skipped=1)
    wrong = Kernel(OPS["silu"].forward, lambda dy, saved: dy)
    monkeypatch.setitem(toyarray_portacnn.KERNELS, "silu", wrong)
    done = run(*options, "-k", "silu")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(
        [
            "*_ toyarray: ops: silu _*",
            "wrong    ops: silu *gradient of x, float32, packed, kernels auto: *",
            '*to see it: check_backend("toyarray:toy:0", only="ops: silu")',
        ]
    )
    assert not any("Traceback" in line for line in done.outlines)


def test_plugin_without_the_backend(pytester: pytest.Pytester):
    done = pytester.runpytest_inprocess(*PLUGIN, "--portacnn-backend=nobody")
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["--portacnn-backend=nobody: unknown device 'nobody'; *"])


# --- figures --------------------------------------------------------------------------------------


def test_every_example_has_figures():
    """Run scripts/freeze_figures.py; a new op needs a definition there."""
    for name in EXAMPLES:
        figures = figures_of(name)
        assert len(figures) == 3, name
        for figure in figures:
            figure.arguments()
            assert figure.source in ("PyTorch", "loops")
    assert len(figures_of("training")) == 1


@needs("torch")
@pytest.mark.slow
def test_figures_are_those_of_pytorch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = import_module("freeze_figures")
    try:
        for name in EXAMPLES:
            for made, kept in zip(script.figures(name), figures_of(name), strict=True):
                assert (made.seed, made.fingerprint) == (kept.seed, kept.fingerprint)
                for new, old in zip(made.results, kept.results, strict=True):
                    assert new.shape == old.shape
                    assert abs(new * 1.0 - old * 1.0).max(initial=0.0) < 1e-12 * (
                        1 + abs(old * 1.0).max(initial=0.0)
                    )
    finally:
        for name in ("freeze_figures", "figures_torch", "figures_loops"):
            sys.modules.pop(name, None)


def test_a_method_that_nobody_has_written_is_wrong():
    class Half(Layer):
        def infer(self, shape):
            return shape

        def forward(self, x, *, train=False, keep=True):
            return x * 2.0, x

    report = check_layer(Half(), (2, 3), only="gradient", devices=["numpy"])
    assert report["gradient"].status == "wrong"
    assert report["gradient"].message == "Layer.backward is not implemented"
    report = check_loss(Loss(), only="gradient", devices=["numpy"])
    assert report["gradient"].status == "wrong"
    assert report["gradient"].message == "Loss.forward is not implemented"


def test_a_misspelled_layout_is_found():
    with pytest.raises(Fault, match="layout is 'batch_frist', expected one of"):
        is_resolved(replace(resolve("numpy"), layout="batch_frist"))
