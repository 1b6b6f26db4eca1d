"""Load damaged ONNX files until the time is over: each must load, or be refused with our error.

    python tests/tools/onnx_fuzz.py SECONDS [SEED]

Whatever else happens is printed with the file's number, and the file kept as
onnx_fuzz_<number>.onnx in the current folder.
"""

import logging
import os
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from math import prod
from pathlib import Path
from random import Random

import numpy as np

import portacnn.onnx
from portacnn.errors import ModelFormatError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.onnx_files import MODELS, spoil_bytes, spoil_parts

SLOW = 5.0  # seconds
GROWTH = 256 << 20  # bytes that the process may grow by in all


def attempt(path: Path) -> str:
    """Load a file, and where it loads run it: what came of it. Raises whatever is a finding."""
    try:
        model = portacnn.onnx.load(path)
    except ModelFormatError:
        return "refused"
    numbers = sum(prod(layer.output_shape) for layer in model.walk() if not layer.children)
    if numbers + prod(model.input_shape) > 100_000:
        return "loaded, too large to be run here"
    with np.errstate(all="ignore"):
        y = model.predict(np.ones((2, *model.input_shape), model.dtype))
    assert y.shape == (2, *model.output_shape)
    return "loaded and run"


def main(seconds: float, seed: int) -> int:
    """Spoil and try until the time is over; gives the number of findings."""
    models = {name: make() for name, make in MODELS.items()}
    contents = {name: model.SerializeToString() for name, model in models.items()}
    outcomes: Counter[str] = Counter()
    findings, number, until = 0, 0, time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spoilt.onnx"
        path.write_bytes(contents["classifier"])
        attempt(path)  # whatever is imported or compiled once
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        while time.monotonic() < until:
            random = Random(f"{seed} {number}")
            name = random.choice(list(models))
            way = random.randrange(8)
            if way == 0:
                content = random.randbytes(random.randrange(200))
            elif way < 4:
                content = spoil_bytes(contents[name], random)
            else:
                content = spoil_parts(models[name], random)
            path.write_bytes(content)
            start = time.monotonic()
            try:
                outcomes[attempt(path)] += 1
                problem = ""
            except BaseException:
                problem = traceback.format_exc()
            took = time.monotonic() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if took > SLOW:
                problem += f"\ntook {took:.1f} s"
            if (peak - before) * 1024 > GROWTH:
                problem += f"\ngrew by {(peak - before) >> 10} MiB"
                before = peak
            if problem:
                findings += 1
                print(f"--- {seed} {number} ({name}): {problem}", flush=True)
                Path(f"onnx_fuzz_{number}.onnx").write_bytes(content)
            number += 1
    print(f"{number} files in {seconds:.0f} s, {findings} findings: {dict(outcomes)}; seed {seed}")
    return findings


if __name__ == "__main__":
    os.environ.setdefault("PORTACNN_KERNELS", "native")
    logging.disable(logging.WARNING)
    sys.exit(min(main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0), 1))
