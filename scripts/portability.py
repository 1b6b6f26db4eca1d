"""Measure how far the losses of different backends differ: prints the table of docs/portability.md.

Every run makes its first step on NumPy, writes a checkpoint, and resumes from it on the other
backend, with the same batches and dropout masks. The remaining difference is the order of
summation.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from portacnn import Trainer, load_mnist_sample
from portacnn.console import speak_plainly
from portacnn.errors import BackendError
from portacnn.models import DeepConvNet, SimpleConvNet
from portacnn.ops.dispatch import use_kernels
from portacnn.runtime import resolve

IMAGES = 100
PLACES = [  # device, PORTACNN_KERNELS
    ("numpy", "reference"),
    ("numpy", "auto"),
    ("array_api_strict:device1", "auto"),
    ("torch", "auto"),
    ("torch", "reference"),
    ("torch:cuda", "auto"),
    ("cupy", "auto"),
    ("jax", "auto"),
    ("jax", "reference"),
]


def net(name: str, dtype: str) -> Any:
    """Return a network on NumPy, whose initial weights do not depend on the other backend."""
    if name == "simple":
        return SimpleConvNet(weight_init="he", device="numpy", dtype=dtype, seed=0)
    return DeepConvNet(device="numpy", dtype=dtype, seed=0)


def losses(place: str, kernels: str, checkpoint: Path, data: Any, steps: int) -> list[float]:
    """Return the losses of ``steps`` steps of a training resumed from a checkpoint on ``place``."""
    trainer = Trainer.resume(checkpoint, *data, device=place, verbose=False)
    begin = trainer.steps_done
    with use_kernels(kernels):
        for _ in range(steps):
            trainer.stop()
            trainer.train()
    return trainer.train_loss_list[begin:]


def main(arguments: Sequence[str] | None = None) -> int:
    speak_plainly()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--nets", default="simple,deep")
    parser.add_argument("--optimizers", default="sgd,adam")
    parser.add_argument("--places", metavar="A,B", help="devices; by default all that are here")
    options = parser.parse_args(arguments)
    chosen = options.places.split(",") if options.places else [place for place, _ in PLACES]
    here = [each for each in PLACES if each[0] in chosen and _usable(each[0])]
    (x, t), (v, u) = load_mnist_sample()
    print(
        "| network, optimizer, dtype | "
        "" + " | ".join(f"{place}, {kernels}" for place, kernels in here) + " |"
    )
    print("|---" * (1 + len(here)) + "|")
    for name in options.nets.split(","):
        for optimizer in options.optimizers.split(","):
            for dtype in ("float32", "float64"):
                data = (x[:IMAGES].astype(dtype), t[:IMAGES], v[:10].astype(dtype), u[:10])
                with tempfile.TemporaryDirectory() as folder:
                    rates = {"lr": 0.01 if optimizer == "sgd" else 0.001}
                    shared = {
                        "optimizer": optimizer,
                        "optimizer_param": rates,
                        "batch_size": 8,
                        "verbose": False,
                    }
                    trainer = Trainer(
                        net(name, dtype),
                        *data,
                        epochs=2,
                        evaluate_sample_num_per_epoch=10,
                        **shared,
                    )
                    trainer.stop()
                    trainer.train()
                    file = trainer.checkpoint(Path(folder) / "start")
                    expected = losses("numpy", "native", file, data, options.steps)
                    cells = []
                    for place, kernels in here:
                        found = losses(place, kernels, file, data, options.steps)
                        cells.append(
                            f"{max(abs(a - b) for a, b in zip(expected, found, strict=True)):.0e}"
                        )
                    print(
                        f"| {name}, {optimizer}, {dtype} | " + " | ".join(cells) + " |", flush=True
                    )
    return 0


def _usable(place: str) -> bool:
    try:
        resolve(place)
    except BackendError as error:
        print(f"{place} is skipped: {error}", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
