"""The scripts in scripts/examples: a tiny run of each, and the quality of a short one."""

import importlib.util
from types import ModuleType

import numpy as np
import pytest

from support.checks import slopes_agree
from support.digits import ROOT

pytest.importorskip("matplotlib")


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_detection_runs(tmp_path):
    words = ["--scenes", "16", "--test-scenes", "4", "--epochs", "1", "--width", "8"]
    figures = example("detection").main([*words, "--out", str(tmp_path)])
    assert 0.0 <= figures["ap"] <= 1.0
    assert (tmp_path / "detection.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_gradient_of_detections_loss():
    rng = np.random.default_rng(0)
    t = rng.standard_normal((2, 5, 3, 3))
    t[:, 0] = rng.integers(0, 2, (2, 3, 3)) * rng.integers(1, 11, (2, 3, 3))
    y = rng.standard_normal((2, 15, 3, 3))
    loss = example("detection").Detection()
    _, cache = loss.forward(y, t)
    slopes_agree(loss.backward(cache), lambda y: float(loss.forward(y, t)[0]), y)
