"""Training on MPI: 1, 2, 3 and 4 processes with the same global batch."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from support.matrix import needs
from support.mpi import on_ranks

PROGRAM = Path(__file__).parent / "training_on_ranks.py"


@cache
def figures(size: int, what: str, folder: Path, *device: str) -> dict:
    done = on_ranks(size, PROGRAM, what, folder, *device, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    np.save(path / "x.npy", np.random.default_rng(0).random((60, 1, 16, 16)))
    return path


@needs("mpi4py")
@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    ("what", "tolerance", "steps"), [("deep", 1e-9, 50), ("simple", 1e-5, 50), ("parts", 1e-9, 15)]
)
def test_ranks_train_as_one_process(
    what: str, tolerance: float, steps: int, size: int, folder: Path
):
    one, several = figures(1, what, folder), figures(size, what, folder)
    assert len(one["losses"]) == steps
    assert several["weights"] == 1
    np.testing.assert_allclose(several["losses"], one["losses"], rtol=tolerance)
    np.testing.assert_allclose(several["test"], one["test"], rtol=100 * tolerance)


@needs("mpi4py", "torch")
@pytest.mark.slow
def test_on_torch(folder: Path):
    one, several = (figures(size, "deep", folder, "torch") for size in (1, 2))
    assert several["weights"] == 1
    np.testing.assert_allclose(several["losses"], one["losses"], rtol=1e-9)
