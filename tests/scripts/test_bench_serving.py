"""scripts/bench_serving.py: its table has the rows that docs/serving.md quotes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.matrix import needs

ROOT = Path(__file__).resolve().parents[2]


def rows() -> dict[str, list[float]]:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "bench_serving.py", "--rounds", "1"],
        env={**os.environ, "PORTACNN_KERNELS": "native"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [re.split(r" *\| *", line)[1:-1] for line in done.stdout.splitlines()[2:]]
    return {name: [float(cell) for cell in cells] for name, *cells in lines}


@pytest.mark.slow
@needs("torch", "onnxruntime")
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="this system has no /proc")
def test_memory_of_the_three_frameworks():
    """The script raises if their outputs differ."""
    found = rows()
    assert list(found) == ["portacnn", "onnxruntime", "torch"]
    for start, imported, loaded, after, peak, seconds in found.values():
        assert 0 < start <= imported < loaded <= peak + 1
        assert after <= peak + 1
        assert loaded - imported > 40  # the weights: 47 MB
        assert seconds > 0
