"""The command line: ``portacnn train`` and ``portacnn backends``; in a checkout also ``python
scripts/train.py``."""

import argparse
import csv
import io
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from portacnn.console import hang_up, say
from portacnn.data import load_idx_folder, load_mnist, load_mnist_sample
from portacnn.errors import ArgumentError, PortacnnError
from portacnn.files import make_folder, write_atomically
from portacnn.models import Normalize, SimpleConvNet
from portacnn.optim import OPTIMIZERS
from portacnn.runtime import GRAMMAR, VARIABLE, Backend, available_backends, resolve
from portacnn.schedules import SCHEDULES
from portacnn.seeds import check_seed
from portacnn.training import Trainer, stopping_on_signals

USAGE_ERROR = 2
_CHECKPOINTS = "checkpoints"  # folder in --out for checkpoints without --checkpoint-dir
_FRESH = {
    "batch_size": 100,
    "optimizer": "adam",
    "lr": 0.001,
    "schedule": "constant",
    "weight_init": "he",
    "seed": None,
}
"""Options of a new training, with their defaults. A resumed training takes them from its
checkpoint."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the ``portacnn`` command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="portacnn", description="CNNs on NumPy, CuPy, PyTorch and other array libraries"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_train_options(commands.add_parser("train", help="train SimpleConvNet on digits"))
    commands.add_parser("backends", help="list the array libraries and their devices")
    options = parser.parse_args(arguments)
    if options.command == "backends":
        say(*(str(info) for info in available_backends()))
        hang_up()
        return 0
    return _guarded(options)


def train_main(arguments: Sequence[str] | None = None) -> int:
    """Run the ``train`` command alone, as ``scripts/train.py``; return the exit status."""
    parser = argparse.ArgumentParser(prog="train.py", description="Train SimpleConvNet on digits")
    _add_train_options(parser)
    return _guarded(parser.parse_args(arguments))


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--data",
        default="sample",
        metavar="sample|mnist|DIR",
        help="bundled digits, MNIST, or a folder with four IDX files",
    )
    add(
        "--epochs",
        type=int,
        help="total number; by default 20, or the checkpoint's with --resume",
    )
    add(
        "--device",
        help=f"{GRAMMAR}; by default the variable {VARIABLE}, else numpy, or the checkpoint's "
        "device with --resume",
    )
    add("--out", default="runs/latest", metavar="DIR", help="folder for weights, history and curve")
    add(
        "--checkpoint-dir",
        metavar="DIR",
        help=f"write checkpoints here; with --checkpoint-every OUT/{_CHECKPOINTS}",
    )
    add(
        "--checkpoint-every",
        type=int,
        metavar="STEPS",
        help="steps between checkpoints; by default after each epoch",
    )
    add("--keep", type=int, metavar="N", help="number of checkpoints to keep; by default 3")
    add(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="resume from a checkpoint, or the newest in a folder: by default --checkpoint-dir, "
        f"else OUT/{_CHECKPOINTS}",
    )
    fresh = parser.add_argument_group(
        "a new training", "With --resume, these come from the checkpoint."
    )
    add = fresh.add_argument
    add("--batch-size", type=int)
    add("--optimizer", choices=sorted(OPTIMIZERS))
    add("--lr", type=float, help="learning rate")
    add("--momentum", type=float, help="for optimizers that support it")
    add("--weight-decay", type=float, help="L2, or decoupled with adamw")
    add("--schedule", choices=sorted(SCHEDULES), help="learning rate schedule over the whole run")
    add(
        "--weight-init",
        help='"he" (the default), "xavier", or a standard deviation (the tutorials\' is 0.01)',
    )
    add(
        "--seed",
        type=int,
        help="seed of weights and batches; by default one is drawn and printed",
    )


def _guarded(options: argparse.Namespace) -> int:
    """Train; print an error that the user can fix as one line on stderr and return status 2."""
    try:
        return _train(options)
    except (PortacnnError, OSError) as error:
        say(f"error: {error}", error=True)
        return USAGE_ERROR
    finally:
        hang_up()


def _train(options: argparse.Namespace) -> int:
    backend = resolve(options.device) if options.resume is None else None
    can_save = _can_import("safetensors")
    if not can_save and (options.resume is not None or options.checkpoint_dir is not None):
        raise ArgumentError(
            "checkpoints need safetensors, which is not installed; run: pip install safetensors"
        )
    given = [
        name for name in (*_FRESH, "momentum", "weight_decay") if getattr(options, name) is not None
    ]
    if options.resume is not None and given:
        words = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ArgumentError(f"--resume takes {words} from the checkpoint; omit it")
    data = _data(options.data)  # uint8: a quarter of the memory
    out = make_folder(options.out, "the results", "--out").absolute()
    trainer = _new(options, backend, data) if backend is not None else _resumed(options, out, data)
    (x_train, _), (x_test, t_test) = data
    model = trainer.model
    count = sum(array.size for array in model.state_dict().values())
    how = (
        f"weights by {options.weight_init}"
        if backend is not None
        else f"{trainer.steps_done:,} steps done"
    )
    say(
        f"backend  {trainer.backend}",
        f"model    {type(model).__name__}, {count:,} parameters, {how}, seed {trainer.seed}",
        f"data     {options.data}: {len(x_train):,} training and {len(x_test):,} test images",
    )
    if not can_save:
        say(
            "note     safetensors is not installed: the weights will not be saved (pip install "
            "safetensors)"
        )
    start, before = time.perf_counter(), trainer.epoch
    with stopping_on_signals(trainer) as caught:
        trainer.train()
        if caught.number is not None:
            _say_where_it_stopped(trainer, options, out, can_save)
            return caught.exit_status
    seconds, shown = time.perf_counter() - start, Path(options.out)
    told = [f"trained  {trainer.epoch - before} epochs in {seconds:.1f} s"]
    told.append(f"final test accuracy {model.accuracy(x_test, t_test):.4f}")
    if can_save:
        model.save(out / "weights.safetensors")
        told.append(f"weights  {shown / 'weights.safetensors'}")
    write_atomically(out / "history.csv", _history(trainer).encode())
    told.append(f"history  {shown / 'history.csv'}")
    if _can_import("matplotlib"):
        _plot(trainer, out / "accuracy.png")
        told.append(f"curve    {shown / 'accuracy.png'}")
    else:
        told.append(
            'curve    not drawn: matplotlib is not installed (pip install "portacnn[plot]")'
        )
    say(*told)
    return 0


def _new(options: argparse.Namespace, backend: Backend, data: Any) -> Trainer:
    """Return the Trainer of a new training. Options that were not given get their defaults."""
    for name, value in {**_FRESH, "epochs": 20, "keep": 3}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.checkpoint_every is not None and options.checkpoint_dir is None:
        options.checkpoint_dir = Path(options.out) / _CHECKPOINTS
    seed = check_seed(options.seed)
    (x_train, t_train), (x_test, t_test) = data
    classes = int(max(t_train.max(), t_test.max())) + 1
    model = SimpleConvNet(
        x_train.shape[1:],
        num_classes=classes,
        weight_init=_init(options.weight_init),
        device=backend,
        seed=seed,
    )
    model.preprocess = Normalize()
    return Trainer(
        model,
        x_train,
        t_train,
        x_test,
        t_test,
        epochs=options.epochs,
        batch_size=options.batch_size,
        optimizer=options.optimizer,
        optimizer_param=_optimizer_param(options),
        schedule=options.schedule,
        seed=seed,
        checkpoint_dir=options.checkpoint_dir,
        checkpoint_every=options.checkpoint_every,
        keep=options.keep,
    )


def _resumed(options: argparse.Namespace, out: Path, data: Any) -> Trainer:
    """Return the Trainer that continues from a checkpoint."""
    (x_train, t_train), (x_test, t_test) = data
    path = Path(options.resume or options.checkpoint_dir or out / _CHECKPOINTS)
    if not path.exists():
        raise FileNotFoundError(
            f"no checkpoint to resume from: {path} does not exist; choose one: --resume PATH"
        )
    return Trainer.resume(
        path,
        x_train,
        t_train,
        x_test,
        t_test,
        device=options.device,
        epochs=options.epochs,
        checkpoint_dir=options.checkpoint_dir,
        checkpoint_every=options.checkpoint_every,
        keep=options.keep,
        verbose=True,
    )


def _say_where_it_stopped(
    trainer: Trainer, options: argparse.Namespace, out: Path, can_save: bool
) -> None:
    """After a signal, print the current step and the checkpoint to resume from; write one if there
    is none.

    The printed options are those that checkpoints do not hold, quoted for a shell.
    """
    stopped = (
        f"stopped  after step {trainer.steps_done} (epoch {min(trainer.epoch + 1, trainer.epochs)})"
    )
    if not can_save:
        say(stopped, "note     no checkpoint: safetensors is not installed")
        return
    if trainer.checkpoint_dir is None:
        trainer.checkpoint_dir = make_folder(out / _CHECKPOINTS)
        trainer.checkpoint()
    on = ["--resume", str(trainer.last_checkpoint), "--out", options.out, "--data", options.data]
    say(stopped, f"saved    {trainer.last_checkpoint}", f"resume   {shlex.join(on)}")


def _data(name: str) -> Any:
    if name == "sample":
        return load_mnist_sample(normalize=False)
    return (
        load_mnist(normalize=False) if name == "mnist" else load_idx_folder(name, normalize=False)
    )


def _init(word: str) -> float | str:
    try:
        return float(word)
    except ValueError:
        return word


def _optimizer_param(options: argparse.Namespace) -> dict[str, float]:
    """Return the optimizer's arguments that were given."""
    given = {"lr": options.lr, "momentum": options.momentum, "weight_decay": options.weight_decay}
    return {name: value for name, value in given.items() if value is not None}


def _can_import(module: str) -> bool:
    try:
        __import__(module)
    except ImportError:
        return False
    return True


def _history(trainer: Trainer) -> str:
    """Return the history as CSV: one line per epoch with its mean loss and its accuracies."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["epoch", "loss", "train_accuracy", "test_accuracy"])
    columns = (trainer.epoch_loss_list, trainer.train_acc_list, trainer.test_acc_list)
    for epoch, (loss, train_accuracy, test_accuracy) in enumerate(
        zip(*columns, strict=True), start=1
    ):
        writer.writerow([epoch, f"{loss:.6f}", train_accuracy, test_accuracy])
    return text.getvalue()


def _plot(trainer: Trainer, path: Path) -> None:
    """Write the accuracy curve as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    epochs = range(1, len(trainer.train_acc_list) + 1)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(epochs, trainer.train_acc_list, marker="o", markersize=4, label="training")
    axes.plot(epochs, trainer.test_acc_list, marker="s", markersize=4, label="test")
    axes.set(
        xlabel="epoch",
        ylabel="accuracy",
        title=f"{type(trainer.model).__name__}, {trainer.backend}",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
