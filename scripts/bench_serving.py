"""Memory of a service: the table of docs/serving.md. Its calls a second with several threads:
``bench.py --modes serve``.

    python scripts/bench_serving.py --rounds 3    # portacnn, PyTorch and onnxruntime; needs these

Each framework loads the same ResNet18 from a file and predicts one image of 224 x 224, in a process
of its own. VmRSS is read after the import, after loading, and after the prediction; VmHWM is the
peak. The outputs are compared. Needs Linux.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bench_machine import memory

ROOT = Path(__file__).resolve().parent.parent
SIZE, CLASSES = 224, 1000
FRAMEWORKS = ("portacnn", "onnxruntime", "torch")
Predict = Callable[[np.ndarray], np.ndarray]


def portacnn_loader() -> Callable[[Path], Predict]:
    sys.path.insert(0, str(ROOT))
    import portacnn

    return lambda folder: portacnn.load(folder / "net.safetensors", device="numpy").predict


def onnxruntime_loader() -> Callable[[Path], Predict]:
    import onnxruntime

    def load(folder: Path) -> Predict:
        session = onnxruntime.InferenceSession(
            folder / "net.onnx", providers=["CPUExecutionProvider"]
        )
        name = session.get_inputs()[0].name
        return lambda x: session.run(None, {name: x})[0]

    return load


def torch_loader() -> Callable[[Path], Predict]:
    import torch
    from bench_torch_nets import torch_net
    from safetensors.torch import load_file

    def load(folder: Path) -> Predict:
        net = torch_net("resnet18")
        net.load_state_dict(load_file(folder / "net.safetensors"))
        net.eval()

        def predict(x: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return net(torch.from_numpy(x)).numpy()

        return predict

    return load


LOADERS = dict(zip(FRAMEWORKS, (portacnn_loader, onnxruntime_loader, torch_loader), strict=True))


def image() -> np.ndarray:
    return np.random.default_rng(0).random((1, 3, SIZE, SIZE), dtype=np.float32)


def worker(framework: str, folder: Path) -> dict[str, Any]:
    """Load and predict in this process; return MiB and seconds, and the first outputs."""
    x = image()
    steps: list[int] = [now()]
    begun = time.perf_counter()
    load = LOADERS[framework]()
    steps.append(now())
    predict = load(folder)
    steps.append(now())
    y = predict(x)
    steps.append(now())
    seconds = time.perf_counter() - begun
    told = memory()
    assert told is not None
    return {
        "mib": [step / 2**20 for step in steps],
        "peak": told[1] / 2**20,
        "seconds": seconds,
        "outputs": y[0, :8].tolist(),
    }


def now() -> int:
    told = memory()
    if told is None:
        raise SystemExit("the memory of a process is read from /proc, which is not here")
    return told[0]


def write_models(folder: Path) -> None:
    """Write the network for all frameworks, with weights that do not vanish in its depth."""
    sys.path.insert(0, str(ROOT))
    import portacnn

    net = portacnn.models.ResNet18(num_classes=CLASSES, input_size=SIZE, device="numpy", seed=0)
    net.save(folder / "net.safetensors")
    portacnn.onnx.export(net, folder / "net.onnx")


def print_memory(repeats: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        write_models(Path(name))
        print("| | start, MiB | imported | loaded | after one image | peak | seconds in all |")
        print("|---|---|---|---|---|---|---|")
        expected = None
        for framework in FRAMEWORKS:
            found = [spawned(framework, name) for _ in range(repeats)]
            figures = np.median([[*each["mib"], each["peak"]] for each in found], axis=0)
            seconds = statistics.median(each["seconds"] for each in found)
            cells = " | ".join(f"{value:.0f}" for value in figures)
            print(f"| {framework} | {cells} | {seconds:.1f} |", flush=True)
            outputs = found[0]["outputs"]
            expected = outputs if expected is None else expected
            np.testing.assert_allclose(outputs, expected, rtol=1e-3, atol=1e-4)


def spawned(framework: str, folder: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "worker", framework, folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    os.environ.setdefault("PORTACNN_KERNELS", "native")  # NumPy alone
    if sys.argv[1:2] == ["worker"]:
        print(json.dumps(worker(sys.argv[2], Path(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of each measurement")
    print_memory(parser.parse_args().rounds)


if __name__ == "__main__":
    main()
