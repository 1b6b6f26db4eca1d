"""The scripts in scripts/examples: a tiny run of each, and the quality of a short one."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from portacnn import load
from portacnn.search import Index
from support.checks import slopes_agree
from support.digits import ROOT
from support.matrix import BACKENDS, Here, backends

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


SAMPLE = ("--data", "mnist-sample")


@backends("numpy", "strict-device1", "torch", "torch-cuda", "cupy")
def test_tiny_runs_of_classification_and_search(backend: Here, tmp_path: Path):
    words = [*SAMPLE, "--epochs", "1", "--width", "2", "--device", BACKENDS[backend.name]]
    words += ["--images", "24", "--test-images", "12", "--out", str(tmp_path)]
    classified = example("classification").main(words)
    assert 0.0 <= classified["accuracy"] <= 1.0
    found = example("search").main(words)
    assert set(found["unseen"]) == {"pixels", "stage2", "stage3", "pool", "fc1"}
    assert all(0.0 <= value <= 1.0 for part in ("all", "unseen") for value in found[part].values())
    for name in ("classification", "search"):
        assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        load(tmp_path / f"{name}.safetensors")
    index = Index.load(tmp_path / "index.safetensors")
    assert len(index) == 12


@pytest.mark.slow
def test_a_short_classification_knows_the_sample(tmp_path: Path):
    words = [*SAMPLE, "--epochs", "6", "--width", "8", "--out", str(tmp_path)]
    assert example("classification").main(words)["accuracy"] >= 0.97


@pytest.mark.slow
def test_a_short_search_finds_digits_that_training_did_not_see(tmp_path: Path):
    words = [*SAMPLE, "--epochs", "3", "--width", "8", "--out", str(tmp_path)]
    found = example("search").main(words)
    assert found["all"]["fc1"] >= 0.93
    assert found["unseen"]["stage3"] >= max(0.85, found["unseen"]["pixels"] + 0.02)
