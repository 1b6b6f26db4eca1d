"""Memory and threads of a service: the tables of docs/serving.md.

    python scripts/bench_serving.py memory     # portacnn, PyTorch and onnxruntime; needs these
    python scripts/bench_serving.py threads    # images per second with one thread and with eight

``memory``: each framework loads the same ResNet18 from a file and predicts one image of 224 x 224,
in a process of its own. VmRSS is read after the import, after loading, and after the prediction;
VmHWM is the peak. The outputs are compared. Needs Linux.

``threads``: rounds of one and of eight threads take turns, so that both see the same machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from bench_worker import memory

ROOT = Path(__file__).resolve().parent.parent
SIZE, CLASSES = 224, 1000
FRAMEWORKS = ("portacnn", "onnxruntime", "torch")
Predict = Callable[[np.ndarray], np.ndarray]


# --- memory ---------------------------------------------------------------------------------------


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
    from safetensors.torch import load_file

    def load(folder: Path) -> Predict:
        net = torch_resnet18()
        net.load_state_dict(load_file(folder / "net.safetensors"))
        net.eval()

        def predict(x: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return net(torch.from_numpy(x)).numpy()

        return predict

    return load


def torch_resnet18() -> Any:
    """He et al., 2015, table 1, with torchvision's names."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            self.downsample = None
            if inputs != outputs:
                project = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
                self.downsample = nn.Sequential(project, nn.BatchNorm2d(outputs))

        def forward(self, x: Any) -> Any:
            short = x if self.downsample is None else self.downsample(x)
            y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
            return (y + short).relu()

    class ResNet18(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(64)
            widths = [64, 64, 128, 256, 512]
            for number, (inputs, outputs) in enumerate(pairwise(widths), 1):
                first = Block(inputs, outputs, 1 if number == 1 else 2)
                setattr(self, f"layer{number}", nn.Sequential(first, Block(outputs, outputs, 1)))
            self.fc = nn.Linear(512, CLASSES)

        def forward(self, x: Any) -> Any:
            x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
            return self.fc(x.mean((2, 3)))

    return ResNet18()


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


# --- threads --------------------------------------------------------------------------------------


def print_threads(rounds: int, seconds: float) -> None:
    sys.path.insert(0, str(ROOT))
    from portacnn.models import ResNet20, SimpleConvNet

    print("| images a second | one thread | eight threads | ratio, median of rounds |")
    print("|---|---|---|---|")
    rng = np.random.default_rng(0)
    for name, make, shape in (
        ("SimpleConvNet", SimpleConvNet, (1, 28, 28)),
        ("ResNet20", ResNet20, (3, 32, 32)),
    ):
        model = make(device="numpy", seed=0)
        for count in (1, 100):
            x = rng.random((count, *shape), dtype=np.float32)
            model.predict(x)
            one, eight = [], []
            for _ in range(rounds):
                one.append(count * rate(model, x, 1, seconds))
                eight.append(count * rate(model, x, 8, seconds))
            ratio = statistics.median(b / a for a, b in zip(one, eight, strict=True))
            print(
                f"| {name}, {count} at a time | {statistics.median(one):.0f} | "
                f"{statistics.median(eight):.0f} | {ratio:.2f} |",
                flush=True,
            )


def rate(model: Any, x: np.ndarray, threads: int, seconds: float) -> float:
    """Return the calls of ``predict`` per second that so many threads finish."""
    start = time.perf_counter()
    done = [0] * threads

    def work(number: int) -> None:
        while time.perf_counter() - start < seconds:
            model.predict(x)
            done[number] += 1

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    return sum(done) / (time.perf_counter() - start)


def main() -> None:
    os.environ.setdefault("PORTACNN_KERNELS", "native")  # NumPy alone
    if sys.argv[1:2] == ["worker"]:
        print(json.dumps(worker(sys.argv[2], Path(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("memory", "threads"))
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of each measurement")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a round with threads")
    options = parser.parse_args()
    if options.what == "memory":
        print_memory(options.rounds)
    else:
        print_threads(options.rounds, options.seconds)


if __name__ == "__main__":
    main()
