"""Parity on a GPU, without one: NumPy is measured against what NumPy has said, and what is off is
seen."""

import json
from typing import Any

import numpy as np
import pytest

from support.gpu_rig import numpy_for_gpu, parity, run


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    numpy_for_gpu(monkeypatch)


@pytest.mark.usefixtures("on_host")
def test_parity_of_numpy_with_what_it_said():
    """The file is NumPy's, whatever its version and this machine's order of adding up."""
    found = run("parity")
    assert found["status"] == "green", found["red"]
    assert [row["dtype"] for row in found["rows"]] == ["float32", "float64"]
    assert found["rows"][1]["off_early"] < 1e-12
    assert all(row["last_loss"] < row["first_loss"] for row in found["rows"])


@pytest.mark.slow
def test_the_whole_file_of_parity_is_numpys():
    setting, right = parity.SETTINGS["full"], json.loads(parity.FILE.read_text())["full"]
    assert right["setting"] == setting
    losses, *_ = parity.trained("numpy", "float64", setting, setting["float64_steps"])
    assert max(parity.strays(losses, right["float64"][: len(losses)])) < 1e-11
    losses, *accuracies = parity.trained("numpy", "float32", setting, setting["steps"])
    assert (
        np.array(parity.strays(losses, right["float64"])) <= parity.limits(right["float32_off"])
    ).all()
    assert np.allclose(accuracies, right["accuracies"], atol=parity.FEW)


def test_limits_follow_what_rounding_does():
    noise = [0.0, 3e-5, 1e-5, *[0.0] * 47, 2e-5, 4e-5, 1e-5]
    limits = parity.limits(noise)
    assert limits[:50] == [1e-4] * 50
    assert limits[50:] == pytest.approx([1.5e-4, 2e-4, 2e-4])


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize(("dtype", "by"), [("float32", 1e-3), ("float64", 1e-8)])
def test_a_loss_that_is_off_is_seen(monkeypatch, dtype, by):
    trained = parity.trained

    def wrong(device: Any, kind: str, *args: Any) -> Any:
        losses, *accuracies = trained(device, kind, *args)
        if kind == dtype:
            losses[3] *= 1 + by
        return losses, *accuracies

    monkeypatch.setattr(parity, "trained", wrong)
    (red,) = run("parity")["red"]
    assert f"{dtype}: the loss of step 3 is off by {by:.1e} of itself" in red
    assert "1 of 6 losses" in red


@pytest.mark.usefixtures("on_host")
def test_an_accuracy_that_is_off_is_seen(monkeypatch):
    trained = parity.trained
    monkeypatch.setattr(parity, "trained", lambda *args: (*trained(*args)[:2], 0.99))
    assert "float32: the test accuracy is 0.9900 on the GPU" in run("parity")["red"][0]
