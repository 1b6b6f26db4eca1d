"""Make a ``Trainer`` that continues from a checkpoint."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from portacnn import losses
from portacnn.distributed import connect
from portacnn.errors import ArgumentError, LabelError, ShapeError
from portacnn.losses import Loss
from portacnn.metrics import metrics_for
from portacnn.models import Model
from portacnn.ops.dispatch import PRECISIONS
from portacnn.runtime import VARIABLE, resolve
from portacnn.training import folder
from portacnn.training.callbacks.running import split
from portacnn.training.checkpoint import Checkpoint
from portacnn.training.early_stopping import make_early_stopping
from portacnn.training.options import check_precision
from portacnn.training.ranks import Ranks
from portacnn.training.sets import Sets

AnyTrainer = TypeVar("AnyTrainer")  # a Trainer, whose module imports this one


def resumed(
    kind: Callable[..., AnyTrainer],
    path: str | os.PathLike[str],
    data: tuple[Any, Any, Any, Any],
    *,
    sample_weight: Any,
    loss: Loss | None,
    metrics: Any,
    augment: Any,
    callbacks: Any,
    device: Any,
    model: Model | None,
    schedule: Any,
    checkpoint_dir: str | os.PathLike[str] | None,
    distributed: Any,
    options: Mapping[str, Any],
) -> AnyTrainer:
    """Return a Trainer that continues from a checkpoint; see ``Trainer.resume``.

    Args:
        kind: the Trainer's class.
        data: x_train, t_train, x_test, t_test.
        options: those that replace the checkpoint's, by name; None does not.
    """
    ranks = Ranks(connect(distributed, device))
    file, saved = _newest(Path(path), ranks)
    model = _model(saved, model, device, ranks)
    arguments = saved.arguments()
    called, stopping = split(callbacks)
    arguments["callbacks"] = called
    arguments["augment"] = saved.augment(augment, model.input_shape)
    if loss is None:
        loss = saved.loss()
    if metrics is None:
        arguments["metrics"] = saved.metrics()
    else:
        arguments["metrics"] = metrics_for(losses.named(loss), metrics)
        saved.check_metrics(arguments["metrics"])
    part = ranks.rank, ranks.size
    sets = _sets(file, model, losses.named(loss), data, sample_weight, arguments, part)
    fingerprints = ranks.on_first(sets.fingerprints)
    saved.check_data(fingerprints)
    arguments |= {name: value for name, value in options.items() if value is not None}
    # any other value is an error of the file, reported below
    if options["precision"] is not None or arguments["precision"] in PRECISIONS:
        try:
            check_precision(arguments["precision"], model)
        except ArgumentError as error:
            raise ArgumentError(
                f'{error}. Choose another: resume(..., precision="float32")', str(file)
            ) from error
    arguments["distributed"] = ranks.communicator
    arguments["schedule"] = schedule if schedule is not None else saved.schedule()
    trainer: Any
    # errors in these arguments are not the file's
    if options["epochs"] is not None or schedule is not None:
        made = kind(model, sets, None, **arguments)
        trainer = saved.made(lambda: made)
    else:
        trainer = saved.made(lambda: kind(model, sets, None, **arguments))
    trainer.callbacks.load(*saved.callbacks())
    if stopping is not None:
        _check_stopping(trainer, stopping)
    trainer._fingerprints = fingerprints
    trainer.checkpoint_dir = ranks.folder(file.parent if checkpoint_dir is None else checkpoint_dir)
    if trainer.finished:
        trainer._take_best()
    resumed: AnyTrainer = trainer
    return resumed


def _newest(path: Path, ranks: Ranks) -> tuple[Path, Checkpoint]:
    """Return the newest intact checkpoint, which all ranks read."""
    if ranks.alone:
        return folder.newest(path, Checkpoint.read)
    found: list[tuple[Path, Checkpoint]] = []

    def find() -> str:
        found.append(folder.newest(path, Checkpoint.read))
        return str(found[0][0].absolute())

    file = Path(ranks.on_first(find))
    try:
        return found[0] if found else (file, Checkpoint.read(file))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{file} is on the host of rank 0, but not of rank {ranks.rank}; checkpoints must be "
            "in a folder that all hosts share"
        ) from error


def _model(saved: Checkpoint, model: Model | None, device: Any, ranks: Ranks) -> Model:
    """Return the checkpoint's model, or ``model`` with the checkpoint's weights."""
    if model is None:
        variable = os.environ.get(VARIABLE, "").strip()
        number = None if ranks.alone else ranks.communicator.local_rank
        chosen = device is not None or variable
        return saved.model(resolve(device) if chosen else saved.place(number))
    if device is not None:
        model.to(device)
    saved.load_into(model)
    return model


def _sets(
    file: Path,
    model: Model,
    loss: Loss,
    data: tuple[Any, Any, Any, Any],
    sample_weight: Any,
    arguments: Mapping[str, Any],
    part: tuple[int, int],
) -> Sets:
    """Return the data to resume with. Raises ArgumentError if they are not those of the training
    run."""
    split, seed = arguments["validation_split"], arguments["seed"]
    if data[2] is not None and split is not None:
        raise ArgumentError(
            f"the data differ from those of {file}: its test set was split off the training "
            "set (validation_split); leave x_test and t_test out"
        )
    try:
        return Sets.take(model, loss, *data, sample_weight, split, seed, part)
    except (LabelError, ShapeError) as error:  # the original data fitted the loss
        raise ArgumentError(
            f"the data differ from those of {file}: {error}; pass the same data"
        ) from error


def _check_stopping(trainer: Any, given: Any) -> None:
    """Raise ArgumentError if the ``early_stopping`` argument is not that of the training run."""
    made = make_early_stopping(given, trainer.metrics, trainer.x_test is not None)
    if made != trainer.early_stopping:
        raise ArgumentError(
            f"the training run has {trainer.early_stopping or 'no early stopping'}, got {made}; "
            "leave it out, it comes from the checkpoint"
        )
