"""Load damaged model files until the time is over: each must load, or be refused with our error.

    python tests/tools/fuzz.py safetensors|onnx SECONDS [SEED]

A finding is anything else: another exception, more than ``SLOW`` seconds of this process for one
file, or a process that grows by more than ``GROWTH``. It is printed with the file's number, and the
file is kept as fuzz_<number> in the current folder.
"""

import logging
import os
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from random import Random

import numpy as np

from portacnn.errors import ModelFormatError
from portacnn.models import Model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SLOW = 2.0  # seconds of this process
GROWTH = 256 << 20  # bytes that the process may grow by in all
LARGE = 100_000  # elements that the layers of a model may return for it to be run


def attempt(load: Callable[[Path], Model], path: Path) -> str:
    """Load a file and run the model if it loads; return the outcome. Raises any finding."""
    try:
        model = load(path)
    except ModelFormatError as error:
        text = str(error)
        if not text.isprintable() or len(text) > 4000:
            raise AssertionError("a message that is not printable, or too long") from error
        return "refused"
    elements = sum(prod(layer.output_shape) for layer in model.walk() if not layer.children)
    if elements + prod(model.input_shape) > LARGE:
        return "loaded, too large to be run here"
    with np.errstate(all="ignore"):
        y = model.predict(np.ones((2, *model.input_shape), model.dtype))
    shapes = getattr(model, "output_shapes", {})
    if shapes:
        assert {name: part.shape for name, part in y.items()} == {
            name: (2, *shape) for name, shape in shapes.items()
        }
    else:
        assert y.shape == (2, *model.output_shape)
    return "loaded and run"


def fuzz(
    load: Callable[[Path], Model],
    whole: list[bytes],
    spoilt: Callable[[Random], bytes],
    seconds: float,
    seed: int,
) -> int:
    """Damage and load until the time is over; return the number of findings.

    Args:
        load: loads a file.
        whole: files that are not damaged. They must load; what is imported or compiled only once
            is then done.
        spoilt: returns a damaged file.
    """
    outcomes: Counter[str] = Counter()
    findings, number, until = 0, 0, time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spoilt"
        for content in whole:
            path.write_bytes(content)
            assert attempt(load, path) == "loaded and run"
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        while time.monotonic() < until:
            content = spoilt(Random(f"{seed} {number}"))
            path.write_bytes(content)
            start, problem = time.process_time(), ""
            try:
                outcomes[attempt(load, path)] += 1
            except BaseException:
                problem = traceback.format_exc()
            took = time.process_time() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if took > SLOW:
                problem += f"\ntook {took:.1f} s"
            if (peak - before) * 1024 > GROWTH:
                problem += f"\ngrew by {(peak - before) >> 10} MiB"
                before = peak
            if problem:
                findings += 1
                print(f"--- {seed} {number}: {problem}", flush=True)
                Path(f"fuzz_{number}").write_bytes(content)
            number += 1
    print(f"{number} files in {seconds:.0f} s, {findings} findings: {dict(outcomes)}; seed {seed}")
    return findings


def main(kind: str, seconds: str, seed: str = "0") -> int:
    """Fuzz one kind of file; return 1 if there is a finding, otherwise 0."""
    if kind == "onnx":
        from support import onnx_files as files
    else:
        from support import damaged_files as files  # type: ignore[no-redef]
    return min(fuzz(files.load, *files.samples(), float(seconds), int(seed)), 1)


if __name__ == "__main__":
    os.environ.setdefault("PORTACNN_KERNELS", "native")
    logging.disable(logging.WARNING)
    sys.exit(main(*sys.argv[1:]))
