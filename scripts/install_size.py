"""Print how much the frameworks of docs/comparison.md take: install size, import time and memory.

    python scripts/install_size.py
    python scripts/install_size.py portacnn onnxruntime

Each gets an empty environment in a temporary folder, with what `pip install` of this machine's
package index brings. Needs a network, and some gigabytes of disk for a build of PyTorch with
CUDA. A framework that cannot be installed is listed with pip's last line.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "portacnn": ([str(ROOT)], "import portacnn"),
    "portacnn[jit]": ([f"{ROOT}[jit]"], "import portacnn"),
    "portacnn[jit,onnx,plot,data]": ([f"{ROOT}[jit,onnx,plot,data]"], "import portacnn"),
    "torch": (["torch==2.13.0", "numpy"], "import torch"),
    "keras with JAX": (
        ["keras", "jax"],
        "import os; os.environ['KERAS_BACKEND'] = 'jax'; import keras",
    ),
    "tinygrad": (["tinygrad"], "import tinygrad"),
    "chainer": (["chainer==7.8.1"], "import chainer"),
    "dezero": (["dezero", "matplotlib", "pillow"], "import dezero"),
    "onnxruntime": (["onnxruntime"], "import onnxruntime"),
}
PEAK = "; import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"


def measure(requirements: list[str], statement: str) -> tuple[float, int, float, float]:
    """Return MiB on disk, number of packages, seconds of the import (the best of five), and the
    process's peak memory in MiB.

    Raises:
        RuntimeError: with the last line of pip, or of the import.
    """
    with tempfile.TemporaryDirectory() as folder:
        run([sys.executable, "-m", "venv", "--without-pip", folder])
        python = str(Path(folder) / "bin" / "python")
        run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *requirements])
        packages = next(Path(folder).glob("lib/python*/site-packages"))
        run([python, "-c", statement])  # compiles the files
        size = sum(p.lstat().st_size for p in packages.rglob("*") if "__pycache__" not in p.parts)
        seconds = []
        for _ in range(5):
            begun = time.perf_counter()
            printed = run([python, "-c", statement + PEAK])
            seconds.append(time.perf_counter() - begun)
        count = len(list(packages.glob("*.dist-info")))
        return size / 2**20, count, min(seconds), int(printed.split()[-1]) / 2**10


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "failed").splitlines()[-1])
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", choices=[[], *PACKAGES], default=[])
    names = parser.parse_args().names or PACKAGES
    print("| | MiB | packages | import, s | peak memory, MiB |\n|---|---|---|---|---|")
    for name in names:
        try:
            size, count, seconds, memory = measure(*PACKAGES[name])
        except RuntimeError as error:
            print(f"| {name} | not measured: {error} |")
        else:
            print(f"| {name} | {size:,.0f} | {count} | {seconds:.2f} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()
