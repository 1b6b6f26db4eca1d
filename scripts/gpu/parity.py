"""Compare one training from one seed on the GPU and on NumPy: a section of ``gpu_check.py``.

NumPy's losses are stored in ``parity.json``, because they take minutes of NumPy's time. This
command recomputes them:

    python scripts/gpu/parity.py

In float64 the losses of the first steps must be NumPy's. In float32 no two orders of summation have
the same losses, and rounding errors grow from step to step. The file therefore has NumPy's losses
in float64, and how far its float32 losses are from them under several orders. On the GPU a loss may
differ by ``SMALL`` in the first steps, and later by ``FACTOR`` times the largest difference of
NumPy so far, if that is more.
"""

import argparse
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.tools import Gpu, Section, add_root

add_root()

from portacnn import Normalize, SimpleConvNet, Trainer, load_mnist_sample  # noqa: E402

FILE = Path(__file__).with_name("parity.json")
SETTINGS = {
    "full": {"images": 2500, "test": 1000, "batch": 100, "steps": 200, "float64_steps": 50},
    "quick": {"images": 60, "test": 100, "batch": 20, "steps": 6, "float64_steps": 6},
}
EARLY = 50  # steps
SMALL = 1e-4  # relative: the allowed error of an early loss in float32
FACTOR = 5.0  # of a later one, in multiples of NumPy's rounding error
EXACT = 1e-9  # in float64
FEW = 5e-3  # the allowed difference of an accuracy in float32
ORDERS = (
    {"PORTACNN_KERNELS": "auto", "PORTACNN_NUM_THREADS": "2"},
    {"PORTACNN_KERNELS": "native", "PORTACNN_NUM_THREADS": "1"},
    {"PORTACNN_KERNELS": "native", "PORTACNN_NUM_THREADS": "2", "PORTACNN_TILE_KIB": "64"},
    {"PORTACNN_KERNELS": "reference"},
)
"""Settings under which NumPy sums in other orders."""


def trained(
    device: Any, dtype: str, setting: dict[str, int], steps: int
) -> tuple[list[float], float, float]:
    """Train SimpleConvNet on the digits shipped with portacnn. Returns the losses and the
    accuracies on training and test set.
    """
    (x, t), (x_test, t_test) = load_mnist_sample(normalize=False)
    x, t, x_test, t_test = (
        x[: setting["images"]],
        t[: setting["images"]],
        x_test[: setting["test"]],
        t_test[: setting["test"]],
    )
    model = SimpleConvNet(device=device, dtype=dtype, weight_init="he", seed=1)
    model.preprocess = Normalize()
    epochs = steps * setting["batch"] // setting["images"]
    options = {
        "optimizer": "sgd",
        "optimizer_param": {"lr": 0.1},
        "batch_size": setting["batch"],
    }
    done = Trainer(model, x, t, x_test, t_test, epochs=epochs, seed=2, verbose=False, **options)
    done.train()
    return done.train_loss_list, done.train_acc_list[-1], done.test_acc_list[-1]


def strays(losses: list[float], exact: list[float]) -> list[float]:
    """Return the error of each loss, relative to the exact one."""
    return [abs(a - b) / abs(b) for a, b in zip(losses, exact, strict=True)]


def limits(noise: list[float]) -> list[float]:
    """Return the allowed error of each float32 loss, from NumPy's errors."""
    most = np.maximum.accumulate(noise)
    return [
        SMALL if step < EARLY else max(SMALL, FACTOR * float(most[step]))
        for step in range(len(noise))
    ]


def parity(section: Section) -> None:
    """Train in float64, then in float32, on the GPU, and compare every loss and the accuracies."""
    gpu = Gpu(section.device)
    kind = "quick" if section.quick else "full"
    setting, right = SETTINGS[kind], json.loads(FILE.read_text())[kind]
    for dtype, steps in (("float32", setting["steps"]), ("float64", setting["float64_steps"])):
        if not section.room(2.0, dtype):
            break
        losses, *accuracies = trained(gpu.home, dtype, setting, steps)
        exact = right["float64"][:steps]
        off = strays(losses, exact)
        bounds = limits(right["float32_off"]) if dtype == "float32" else [EXACT] * steps
        wrong = [
            step
            for step, (far, bound) in enumerate(zip(off, bounds, strict=True))
            if not far <= bound
        ]
        if wrong:
            step = wrong[0]
            section.expect(
                False,
                f"{dtype}: the loss of step {step} is off by {off[step]:.1e} of itself, more than "
                f"{bounds[step]:.1e}; "
                f"{len(wrong)} of {steps} losses are off by too much",
            )
        if steps == setting["steps"] and dtype == "float32":
            for which, got, wanted in zip(
                ("training", "test"), accuracies, right["accuracies"], strict=True
            ):
                fine = abs(got - wanted) <= FEW
                section.expect(
                    fine,
                    f"{dtype}: the {which} accuracy is {got:.4f} on the GPU, {wanted:.4f} on NumPy",
                )
        late = {"off_later": max(off[EARLY:], default=None), "limit_at_the_end": bounds[-1]}
        ends = {"first_loss": losses[0], "last_loss": losses[-1]}
        section.row(
            dtype=dtype,
            steps=steps,
            **ends,
            off_early=max(off[:EARLY]),
            **late,
            test_accuracy=accuracies[1],
        )
    section.notes.append(
        f"limits: float32 {SMALL:g} for {EARLY} steps, then {FACTOR:g} times what rounding alone "
        "did on NumPy up to there "
        f"({max(right['float32_off']):.1e} in {len(right['float32_off'])} steps) where that is "
        f"more; float64 {EXACT:g}"
    )


# --- the file -------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        kind, dtype = options.one.split(",")
        print(json.dumps(trained("numpy", dtype, SETTINGS[kind], SETTINGS[kind]["steps"])))
        return
    found: dict[str, Any] = {"numpy": np.__version__, "made": datetime.now(UTC).date().isoformat()}
    for kind, setting in SETTINGS.items():
        exact, *accuracies = _in_a_process(kind, "float64", ORDERS[0])
        offs = [strays(_in_a_process(kind, "float32", order)[0], exact) for order in ORDERS]
        print(
            kind,
            "largest distance from float64 of each order:",
            *(f"{max(off):.1e}" for off in offs),
        )
        found[kind] = {
            "setting": setting,
            "accuracies": accuracies,
            "float64": [float(f"{loss:.14g}") for loss in exact],
            "float32_off": [float(f"{max(far):.2e}") for far in zip(*offs, strict=True)],
        }
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
    FILE.write_text(f"{{\n{lines}\n}}\n")


def _in_a_process(kind: str, dtype: str, variables: dict[str, str]) -> list[Any]:
    """Run the training in a separate process with these environment variables."""
    command = [sys.executable, __file__, "--one", f"{kind},{dtype}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return list(
        json.loads(
            subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
        )
    )


if __name__ == "__main__":
    main()
