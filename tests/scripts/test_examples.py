"""The scripts in scripts/examples: a tiny run of each, and the quality of a short one."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from portacnn import load
from portacnn.search import Index
from support.digits import ROOT
from support.matrix import BACKENDS, Here, backends

pytest.importorskip("matplotlib")


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, folder: Path, *words: str) -> dict[str, float]:
    """The figures that an example returns. It has drawn its picture and saved its weights."""
    figures = example(name).main([*words, "--out", str(folder)])
    assert (folder / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    load(folder / f"{name}.safetensors")
    return figures


SAMPLE = ("--data", "mnist-sample")
TINY = ("--scenes", "4", "--test-scenes", "4", "--epochs", "1", "--width", "4")


@backends("numpy", "strict-device1", "torch", "torch-cuda", "cupy")
def test_tiny_runs_of_detection_and_segmentation(backend: Here, tmp_path: Path):
    detection = run("detection", tmp_path, *TINY, "--device", BACKENDS[backend.name])
    assert 0.0 <= detection["ap"] <= detection["ap50"] <= 1.0
    segmentation = run("segmentation", tmp_path, *SAMPLE, *TINY, "--device", BACKENDS[backend.name])
    assert 0.0 <= segmentation["mean_iou"] <= segmentation["pixel_accuracy"] <= 1.0


@pytest.mark.slow
def test_a_short_detection_finds_most_digits(tmp_path: Path):
    """On scenes of training digits that training did not see."""
    short = ("--scenes", "1200", "--epochs", "6", "--batch-size", "8", "--width", "32")
    figures = run("detection", tmp_path, *short, "--test-scenes", "200", "--validate")
    assert figures["ap50"] >= 0.75
    assert figures["ap"] >= 0.4


@pytest.mark.slow
def test_a_short_segmentation_tells_digits_apart(tmp_path: Path):
    short = ("--scenes", "1000", "--epochs", "7", "--width", "8", "--test-scenes", "100")
    figures = run("segmentation", tmp_path, *SAMPLE, *short)
    assert figures["validation"] >= 0.35  # with background everywhere it is 0.08
    assert figures["pixel_accuracy"] >= 0.9


@backends("numpy", "strict-device1", "torch", "torch-cuda", "cupy")
def test_tiny_runs_of_classification_and_search(backend: Here, tmp_path: Path):
    words = [*SAMPLE, "--epochs", "1", "--width", "2", "--device", BACKENDS[backend.name]]
    words += ["--images", "24", "--test-images", "12"]
    classified = run("classification", tmp_path, *words)
    assert 0.0 <= classified["accuracy"] <= 1.0
    found = run("search", tmp_path, *words)
    assert set(found["unseen"]) == {"pixels", "stage2", "stage3", "pool", "fc1"}
    assert all(0.0 <= value <= 1.0 for part in ("all", "unseen") for value in found[part].values())
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
