"""What a person runs: ``portacnn train``, ``portacnn backends``; from a checkout ``python scripts/train.py``."""

import argparse
import csv
import io
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from portacnn.data import load_idx_folder, load_mnist, load_mnist_sample
from portacnn.errors import PortacnnError
from portacnn.files import write_atomically
from portacnn.models import Normalize, SimpleConvNet
from portacnn.optim import OPTIMIZERS
from portacnn.runtime import GRAMMAR, VARIABLE, available_backends, resolve
from portacnn.schedules import SCHEDULES
from portacnn.seeds import check_seed
from portacnn.training import Trainer

USAGE_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """The ``portacnn`` command; gives the exit status."""
    parser = argparse.ArgumentParser(
        prog="portacnn", description="CNNs on NumPy, CuPy, PyTorch and other array libraries"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_train_options(commands.add_parser("train", help="train SimpleConvNet on digits"))
    commands.add_parser("backends", help="list the array libraries and their devices")
    options = parser.parse_args(arguments)
    if options.command == "backends":
        print("\n".join(str(info) for info in available_backends()))
        return 0
    return _guarded(options)


def train_main(arguments: Sequence[str] | None = None) -> int:
    """``scripts/train.py``: the ``train`` command alone."""
    parser = argparse.ArgumentParser(prog="train.py", description="Train SimpleConvNet on digits")
    _add_train_options(parser)
    return _guarded(parser.parse_args(arguments))


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--data",
        default="sample",
        metavar="sample|mnist|DIR",
        help="bundled digits, MNIST, or a folder of four IDX files",
    )
    add("--epochs", type=int, default=20)
    add("--batch-size", type=int, default=100)
    add("--optimizer", default="adam", choices=sorted(OPTIMIZERS))
    add("--lr", type=float, default=0.001, help="learning rate")
    add("--momentum", type=float, help="for optimizers that have it")
    add("--weight-decay", type=float, help="L2, or decoupled with adamw")
    add("--schedule", default="constant", choices=sorted(SCHEDULES), help="of the learning rate, over the whole run")
    add("--weight-init", default="he", help='"he", "xavier", or a standard deviation (the tutorials\' is 0.01)')
    add("--device", help=f"{GRAMMAR}; without it the variable {VARIABLE}, else numpy")
    add("--seed", type=int, help="for weights and batches; without it a fresh one is drawn and printed")
    add("--out", default="runs/latest", metavar="DIR", help="where weights, history and curve go")


def _guarded(options: argparse.Namespace) -> int:
    """Train; what a person can mend is one line on stderr and status 2."""
    try:
        return _train(options)
    except (PortacnnError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR


def _train(options: argparse.Namespace) -> int:
    backend = resolve(options.device)
    seed = check_seed(options.seed)
    (x_train, t_train), (x_test, t_test) = _data(options.data)  # uint8: a quarter of the memory
    out = _writable(Path(options.out))
    classes = int(max(t_train.max(), t_test.max())) + 1
    model = SimpleConvNet(
        x_train.shape[1:], output_size=classes, weight_init_std=_init(options.weight_init), device=backend, seed=seed
    )
    model.preprocess = Normalize()
    trainer = Trainer(
        model,
        x_train,
        t_train,
        x_test,
        t_test,
        epochs=options.epochs,
        mini_batch_size=options.batch_size,
        optimizer=options.optimizer,
        optimizer_param=_optimizer_param(options),
        schedule=options.schedule,
        seed=seed,
    )
    count = sum(array.size for array in model.state_dict().values())
    print(f"backend  {backend}")
    print(f"model    SimpleConvNet, {count:,} parameters, weights by {options.weight_init}, seed {seed}")
    print(f"data     {options.data}: {len(x_train):,} training and {len(x_test):,} test images", flush=True)
    can_save = _can_import("safetensors")
    if not can_save:
        print(
            "note     safetensors is not installed: the weights will not be saved (pip install safetensors)", flush=True
        )
    start = time.perf_counter()
    trainer.train()
    print(f"trained  {trainer.epoch} epochs in {time.perf_counter() - start:.1f} s")
    print(f"final test accuracy {model.accuracy(x_test, t_test):.4f}")
    if can_save:
        model.save(out / "weights.safetensors")
        print(f"weights  {out / 'weights.safetensors'}")
    write_atomically(out / "history.csv", _history(trainer).encode())
    print(f"history  {out / 'history.csv'}")
    if _can_import("matplotlib"):
        _plot(trainer, out / "accuracy.png")
        print(f"curve    {out / 'accuracy.png'}")
    else:
        print('curve    not drawn: matplotlib is not installed (pip install "portacnn[plot]")')
    return 0


def _data(name: str) -> Any:
    if name == "sample":
        return load_mnist_sample(normalize=False)
    return load_mnist(normalize=False) if name == "mnist" else load_idx_folder(name, normalize=False)


def _init(word: str) -> float | str:
    try:
        return float(word)
    except ValueError:
        return word


def _optimizer_param(options: argparse.Namespace) -> dict[str, float]:
    """The optimizer's arguments, as far as they were given."""
    given = {"lr": options.lr, "momentum": options.momentum, "weight_decay": options.weight_decay}
    return {name: value for name, value in given.items() if value is not None}


def _can_import(module: str) -> bool:
    try:
        __import__(module)
    except ImportError:
        return False
    return True


def _writable(folder: Path) -> Path:
    """Make the folder and try it, before an hour's work depends on it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder of --out {folder}: {error.strerror}; choose another") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write into {folder}; choose another --out")
    return folder


def _history(trainer: Trainer) -> str:
    """One line an epoch: its mean loss, and the accuracies after it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["epoch", "loss", "train_accuracy", "test_accuracy"])
    columns = (trainer.epoch_loss_list, trainer.train_acc_list, trainer.test_acc_list)
    for epoch, (loss, train_accuracy, test_accuracy) in enumerate(zip(*columns, strict=True), start=1):
        writer.writerow([epoch, f"{loss:.6f}", train_accuracy, test_accuracy])
    return text.getvalue()


def _plot(trainer: Trainer, path: Path) -> None:
    """The accuracy curve, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    epochs = range(1, len(trainer.train_acc_list) + 1)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(epochs, trainer.train_acc_list, marker="o", markersize=4, label="training")
    axes.plot(epochs, trainer.test_acc_list, marker="s", markersize=4, label="test")
    axes.set(xlabel="epoch", ylabel="accuracy", title=f"SimpleConvNet on {trainer.backend}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
