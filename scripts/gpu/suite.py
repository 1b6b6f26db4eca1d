"""The tests that run on CuPy: a section of ``gpu_check.py``."""

import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from gpu.tools import ROOT, NotHereError, Section

QUICKEST = """
runtime/test_backends ops/test_dispatch ops/test_pad optim/test_optim ops/test_linear
layers/test_layer ops/test_im2col ops/test_activation ops/test_relu_sigmoid ops/test_dropout
ops/test_batch layers/test_graph files/test_saved_models ops/test_norm ops/test_pool
models/test_model layers/test_conv_pool layers/test_norm ops/test_conv ops/test_cross_entropy
ops/test_mse_bce ops/test_fused ops/test_conv_1d_3d models/test_inference ops/test_conv_transpose
optim/test_optim_torch ops/test_joined_relu layers/test_stages ops/test_pool_1d_3d ops/test_update
""".split()  # noqa: SIM905
"""Test files by their time per test on the CuPy stub; the others follow."""
_ON_A_BACKEND = re.compile(r"^def test_\w+\([^)]*\bbackend\b", re.MULTILINE)
WARNINGS = "filterwarnings=default\nerror:::portacnn"
"""Warnings from portacnn are errors; those of other packages are not."""


def files() -> list[Path]:
    """Return the test files that run on a backend, the quickest first."""
    folder = ROOT / "tests"
    ours = {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("test_*.py"))
        if _ON_A_BACKEND.search(path.read_text(encoding="utf-8"))
    }
    return [ours.pop(name) for name in QUICKEST if name in ours] + list(ours.values())


def tests(section: Section) -> None:
    """Run as many tests as time allows, in as many processes as there are cores. A failure makes
    the section fail.
    """
    for name in ("pytest", "hypothesis"):
        if find_spec(name) is None:
            raise NotHereError(f"{name} is not installed")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "not slow",
        "-k",
        "cupy",
        "--maxfail=30",
        "-o",
        WARNINGS,
    ]
    command += ["-p", "no:cacheprovider", "--tb=short", "-rfE"]
    workers = min(os.cpu_count() or 1, 12)
    if find_spec("xdist") is not None and workers > 1:
        command += ["-n", str(workers)]
    chosen = files()
    command += [str(path) for path in (chosen[:1] if section.quick else chosen)]
    limit = max(section.left - 2.0, 1.0)
    environment = {
        **os.environ,
        "PORTACNN_TEST_BACKENDS": os.environ.get("PORTACNN_TEST_BACKENDS") or "cupy",
        "PORTACNN_TEST_SECONDS": f"{limit - 8:.0f}",
    }
    folder = Path(section.out) if section.out else None
    with (folder / "tests.txt").open("w+") if folder else tempfile.TemporaryFile("w+") as log:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=limit
            )
            section.expect(done.returncode == 0, f"pytest exited with status {done.returncode}")
        except subprocess.TimeoutExpired:
            section.expect(
                False,
                f"the tests did not end within {limit:.0f} seconds, although none "
                "started in the last 8",
            )
        log.seek(0)
        lines = log.read().splitlines()
    counts = next(
        (line.strip("= ") for line in reversed(lines) if " in " in line), "none were told"
    )
    section.figures["counts"] = counts
    section.expect(" passed" in counts, f"no test passed: {counts}")
    if " skipped" in counts:
        section.notes.append("skipped tests had no time left, or need something unavailable here")
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    section.red += failures[:10]
    if len(failures) > 10:
        section.notes.append(f"{len(failures) - 10} more failures are in tests.txt")
