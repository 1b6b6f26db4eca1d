"""Checks of whole trainings on one backend: losses, tasks, transfers, checkpoints, compiled steps.

The losses of 20 steps are compared with PyTorch's, which are frozen (``figures``); those of each
task with the losses of NumPy's portable ops in float64.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from portacnn import losses
from portacnn.layers import (
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    Linear,
    MaxPool2d,
    ReLU,
    Residual,
)
from portacnn.models import Model, load
from portacnn.ops import use_kernels
from portacnn.runtime import Array, Backend, dtype_name, resolve
from portacnn.testing.adapter_checks import expect, same
from portacnn.testing.arrays import LAYOUTS, error_of, laid_out, needs_float64
from portacnn.testing.figures import figures_of, fingerprint
from portacnn.testing.report import Check, NotApplicable
from portacnn.testing.transfers import no_transfers
from portacnn.training import Trainer

STEPS = 20
LIMITS = {"float32": 1e-5, "float64": 1e-9}
"""How far losses may be from those of PyTorch, or of NumPy, relative to the largest."""
RECIPE: dict[str, Any] = {"epochs": 4, "batch_size": 16, "seed": 5}
MOMENTUM: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
"""The training whose losses are frozen: 80 images, so that 4 epochs are 20 steps."""


class Watched(Trainer):
    """A Trainer in whose steps a transfer to the host raises."""

    def step(self, *arguments: Any) -> Any:
        """Make one step."""
        with no_transfers(self.backend):
            return super().step(*arguments)


def images(count: int = 80, dtype: str = "float32") -> tuple[Any, Any]:
    """Return noise (N, 1, 8, 8) with a bright row whose place is the class, and the classes."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 4
    x = 0.25 * rng.integers(0, 8, (count, 1, 8, 8)) / 8
    x[np.arange(count), :, labels, :] += 1.0
    return x.astype(dtype), labels


def network(
    home: Backend, dtype: str = "float32", dropout: bool = False, outputs: int = 4
) -> Model:
    """Return a network with a layer of each kind, on a device."""
    layers: dict[str, Any] = {
        "conv": Conv2d(1, 4, 3, padding=1),
        "bn": BatchNorm2d(4),
        "relu": ReLU(),
        "pool": MaxPool2d(2),
        **({"drop": Dropout(0.3)} if dropout else {}),
        "block": Residual(Conv2d(4, 4, 3, padding=1), activation=ReLU()),
        "flatten": Flatten(),
        "fc": Linear(None, outputs),
    }
    return Model(**layers).build((1, 8, 8), device=home, dtype=dtype, seed=3)


def trained(
    home: Backend, dtype: str = "float32", kind: type[Trainer] = Trainer, **options: Any
) -> Trainer:
    """Return a finished training of ``network`` with dropout, Adam and clipping."""
    x, t = images(dtype=dtype)
    chosen = {"clip_norm": 2.0, "lr": 0.01, "schedule": "cosine", **RECIPE, **options}
    model = network(home, dtype, dropout=True)
    trainer = kind(model, x, t, x[:20], t[:20], verbose=False, **chosen)
    trainer.train()
    return trainer


def reference(run: Callable[[Backend], Trainer]) -> list[float]:
    """Return the losses of a training on NumPy with the portable ops."""
    with use_kernels("reference"):
        return run(resolve("numpy")).train_loss_list


def compared(trainer: Trainer, expected: Any, dtype: str, what: str = "losses") -> float:
    """Return how far the losses of a training are from the expected ones. Raises Fault."""
    return error_of(np.asarray(trainer.train_loss_list), np.asarray(expected), LIMITS[dtype], what)


# --- checks ---------------------------------------------------------------------------------------


def twenty_steps(home: Backend, dtype: str) -> float:
    """20 steps with momentum and weight decay have PyTorch's losses."""
    (figure,) = figures_of("training")
    x, t = images(dtype=dtype)
    expect(
        fingerprint({"x": x.astype("float32"), "t": t}) == figure.fingerprint,
        "the images are not those that the figures were computed for",
    )
    options: dict[str, Any] = {"optimizer": "momentum", "optimizer_param": MOMENTUM, **RECIPE}
    trainer = Watched(network(home, dtype), x, t, verbose=False, **options)
    trainer.train()
    return compared(trainer, figure.results[0], dtype)


def all_parts(home: Backend, dtype: str) -> float:
    """Dropout, Adam, clipping, a schedule and parts of a batch: as on NumPy."""

    def run(where: Backend) -> Trainer:
        return trained(where, dtype, Watched, accumulate=2)

    return compared(run(home), reference(run), dtype)


def augmented(home: Backend) -> float:
    """Augmented images and sample weights: as on NumPy."""

    def run(where: Backend) -> Trainer:
        weight = np.linspace(0.5, 2.0, 80)
        options: dict[str, Any] = {
            "augment": "horizontal_flip,random_crop=2",
            "sample_weight": weight,
        }
        return trained(where, "float64", **options)

    return compared(run(home), reference(run), "float64")


def compiled_step(home: Backend) -> float:
    """A compiled step has the losses of an uncompiled one."""
    if type(home).compile_step is Backend.compile_step:
        raise NotApplicable("compile_step is not overridden: steps run as they are")
    plain = trained(home)
    return compared(trained(home, compile_step=True), plain.train_loss_list, "float32")


def frozen(home: Backend) -> None:
    """Frozen layers keep their bits, and the others learn."""
    x, t = images()
    model = network(home)
    model.freeze("conv*")
    before = model.state_dict()
    Trainer(model, x, t, epochs=1, batch_size=16, verbose=False).train()
    after = model.state_dict()
    for path in ("conv.weight", "conv.bias"):
        same(after[path], before[path], path)
    expect(not np.array_equal(after["fc.weight"], before["fc.weight"]), "fc has not learnt")


def inference(home: Backend) -> float:
    """predict of 0, 1 and 20 images, from host and device, in any layout: as on NumPy."""
    worst, x = 0.0, images(20)[0]
    model, other = network(home), network(resolve("numpy"), "float64")
    with use_kernels("reference"):
        expected = other.predict(x.astype("float64"))
    for count in (0, 1, 20):
        for given in (x[:count], *(laid_out(home, x[:count], layout) for layout in LAYOUTS)):
            y = model.predict(given)
            expect(dtype_name(y) == "float32", f"it returns {dtype_name(y)}")
            got = home.to_host(y)
            if not count:
                same(got, np.zeros((0, 4), np.float32), "predict of no image")
            else:
                error = error_of(got, expected[:count], 1e-5, f"predict of {count}")
                worst = max(worst, error)
    return worst


def task(home: Backend, loss: str) -> float:
    """Train with one loss for 6 steps: losses as on NumPy, in float64."""
    x, classes = images(48, "float64")
    maps, outputs = loss == "dice", 3
    targets: dict[str, Any] = {
        "bce_with_logits": (classes[:, None] == np.arange(3)).astype("uint8"),
        "dice": (x[:, 0] > 0.7).astype("uint8"),
        **dict.fromkeys(("mse", "l1", "huber", "smooth_l1"), np.stack([classes / 4.0] * 3, 1)),
    }
    if loss in ("cross_entropy", "focal"):
        outputs = 4

    def run(where: Backend) -> Trainer:
        if maps:
            model = Model(conv=Conv2d(1, 3, 3, padding=1), relu=ReLU(), out=Conv2d(3, 2, 1))
            model.build((1, 8, 8), device=where, dtype="float64", seed=3)
        else:
            model = network(where, "float64", outputs=outputs)
        t = targets.get(loss, classes)
        options: dict[str, Any] = {"epochs": 2, "batch_size": 16, "lr": 0.01, "loss": loss}
        trainer = Watched(model, x, t, x[:12], t[:12], verbose=False, **options)
        trainer.train()
        return trainer

    return compared(run(home), reference(run), "float64")


def _stopped(trainer: Trainer, steps: int) -> Trainer:
    for _ in range(steps):
        trainer.stop()
        trainer.train()
    return trainer


def _begun(where: Backend, dtype: str) -> Trainer:
    x, t = images(dtype=dtype)
    model = network(where, dtype, dropout=True)
    return Trainer(model, x, t, lr=0.01, verbose=False, **RECIPE)


def there_and_back(home: Backend) -> float:
    """A training that moves from NumPy to the backend and back: as one on NumPy, in float64."""
    numpy = resolve("numpy")
    x, t = images(dtype="float64")
    whole = _stopped(_begun(numpy, "float64"), STEPS)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _begun(numpy, "float64")
        for number, (device, steps) in enumerate([(home, 7), (numpy, 6), (home, 7)]):
            file = trainer.checkpoint(Path(folder) / f"{number}")
            trainer = Trainer.resume(file, x, t, device=device, verbose=False)
            _stopped(trainer, steps)
    return compared(trainer, whole.train_loss_list, "float64")


def resumed(home: Backend) -> None:
    """A resumed training equals an uninterrupted one, bit for bit."""
    x, t = images()
    whole = _stopped(_begun(home, "float32"), STEPS)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _stopped(_begun(home, "float32"), 8)
        file = trainer.checkpoint(Path(folder) / "half")
        trainer = _stopped(Trainer.resume(file, x, t, device=home, verbose=False), STEPS - 8)
    expected, got = whole.train_loss_list, trainer.train_loss_list
    expect(got == expected, f"losses {got[8:10]}... instead of {expected[8:10]}...")
    for path, array in whole.model.state_dict().items():
        same(trainer.model.state_dict()[path], array, path)


def saved(home: Backend) -> None:
    """A model file holds the bits of the weights, and is read on either side."""
    numpy = resolve("numpy")
    with tempfile.TemporaryDirectory() as folder:
        for there, here in ((home, numpy), (numpy, home), (home, home)):
            model = network(there)
            model.save(Path(folder) / "model.safetensors")
            again = load(Path(folder) / "model.safetensors", device=here)
            for path, array in model.state_dict().items():
                same(again.state_dict()[path], array, path)


def moved(home: Backend) -> None:
    """model.to moves every array to the device and back, with its bits."""
    model = network(resolve("numpy"))
    before = model.state_dict()
    model.to(home)
    arrays: list[Array] = list(model.named_state().values())
    expect(all(array.device == home.device for array in arrays), "an array has not moved")
    for path, array in model.to(resolve("numpy")).state_dict().items():
        same(array, before[path], path)


def in_float64(check: Callable[[Backend], float | None]) -> Callable[[Backend], float | None]:
    """Refuse the check on a backend without float64."""

    def run(home: Backend) -> float | None:
        needs_float64(home)
        return check(home)

    return run


CHECKS: dict[str, Callable[[Backend], float | None]] = {
    "training: 20 steps, float64": in_float64(lambda home: twenty_steps(home, "float64")),
    "training: 20 steps, float32": lambda home: twenty_steps(home, "float32"),
    "training: dropout and parts, float64": in_float64(lambda home: all_parts(home, "float64")),
    "training: dropout and parts, float32": lambda home: all_parts(home, "float32"),
    "training: augmented and weighted": in_float64(augmented),
    "training: frozen layers": frozen,
    "training: compiled step": compiled_step,
    "training: inference": inference,
    **{
        f"tasks: {loss}": in_float64(lambda home, loss=loss: task(home, loss))  # type: ignore[misc]
        for loss in losses.LOSSES
    },
    "files: checkpoint there and back": in_float64(there_and_back),
    "files: resumed bit for bit": resumed,
    "files: model saved and loaded": saved,
    "files: model moved": moved,
}


def training_checks(home: Backend, name: str) -> list[Check]:
    """Return the checks of trainings, tasks and files; ``name`` is the backend's."""
    return [
        Check(called, lambda run=run: run(home), f'check_backend("{name}", only="{called}")')  # type: ignore[misc]
        for called, run in CHECKS.items()
    ]
