"""The settings of a training: one frozen dataclass, from which the command's options, the file of
settings and the Trainer's arguments follow.

A setting's field holds what it is for (``help``), what it may be (``kind``) and where it belongs
(``group``). ``add_options`` makes the options of it, ``read`` takes a TOML file, ``written``
returns one that repeats the run.
"""

import argparse
import os
import tomllib
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from portacnn.commands.kinds import (
    FLAG,
    NUMBER,
    NUMBER_OR_WORD,
    TABLE,
    TEXT,
    TRANSFORMS,
    WHOLE,
    WORDS,
    Kind,
    toml,
    toml_key,
)
from portacnn.distributed import ENGINES
from portacnn.errors import ArgumentError
from portacnn.file_kinds import FIRST, kind_of
from portacnn.losses.named import LOSSES
from portacnn.models import MODELS
from portacnn.ops.dispatch import PRECISIONS
from portacnn.optim import OPTIMIZERS
from portacnn.runtime import GRAMMAR, VARIABLE
from portacnn.schedules import SCHEDULES
from portacnn.version import VERSION

_LARGEST = 1 << 20  # bytes of a file of settings
_GROUPS = {
    "data": None,
    "run": None,
    "fresh": ("a new training", "With --resume, these come from the checkpoint."),
}
"""Groups of options in the help, with their titles."""


def _setting(
    default: Any, kind: Kind, group: str, help: str, metavar: str | None = None, **more: Any
) -> Any:
    """Return a field. ``fresh``: of a new training only; ``kept``: in the settings of a run."""
    about = {"kind": kind, "group": group, "help": help, "metavar": metavar, "choices": None}
    about |= {"kept": True, "const": None, **more}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=about)
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Settings:
    """The settings of ``portacnn train``. None: what is said in the option's help."""

    data: str = _setting(
        "sample",
        TEXT,
        "data",
        "sample (the bundled digits, the default), mnist, fashion-mnist, cifar10, ..., or a path: "
        "a folder of images for each class, IDX files, an .npz file (docs/command.md)",
        "NAME|PATH",
    )
    image_size: int | None = _setting(
        None, WHOLE, "data", "height and width of images from a folder; by default 64", "PIXELS"
    )
    mode: str | None = _setting(
        None,
        TEXT,
        "data",
        "colours of images from a folder: RGB (the default) or L (gray)",
        "RGB|L",
        choices=("RGB", "L"),
    )
    test_share: float = _setting(
        0.2,
        NUMBER,
        "data",
        "share of the images that are split off for tests, if the data have no test set of their "
        "own; by default 0.2",
        "SHARE",
    )
    on_error: str = _setting(
        "raise",
        TEXT,
        "data",
        "an image that cannot be read ends the command (raise, the default) or is left out with a "
        "warning (skip)",
        "raise|skip",
        choices=("raise", "skip"),
    )
    epochs: int | None = _setting(
        None, WHOLE, "run", "total number; by default 20, or the checkpoint's with --resume", "N"
    )
    device: str | None = _setting(
        None,
        TEXT,
        "run",
        f"{GRAMMAR}; by default the variable {VARIABLE}, else numpy, or the checkpoint's device "
        "with --resume; of several ranks each takes the GPU of its number, if none is named",
    )
    distributed: str | None = _setting(
        None,
        TEXT,
        "run",
        "train on all ranks that mpiexec or srun has started (docs/scaling.md): auto (without a "
        "value), mpi or nccl",
        "ENGINE",
        choices=ENGINES,
        const="auto",
        kept=False,
    )
    out: str = _setting(
        "runs/latest",
        TEXT,
        "run",
        "the run's folder, for weights, history, curves and settings; by default runs/latest",
        "DIR",
        kept=False,
    )
    checkpoint_dir: str | None = _setting(
        None,
        TEXT,
        "run",
        "write checkpoints here; with --checkpoint-every OUT/checkpoints",
        "DIR",
        kept=False,
    )
    checkpoint_every: int | None = _setting(
        None, WHOLE, "run", "steps between checkpoints; by default after each epoch", "STEPS"
    )
    keep: int | None = _setting(
        None, WHOLE, "run", "number of checkpoints to keep; by default 3", "N"
    )
    quiet: bool = _setting(
        False, FLAG, "run", "do not show the progress of the training", kept=False
    )
    model: str = _setting(
        "simple_conv_net",
        TEXT,
        "fresh",
        f"{', '.join(MODELS)}; by default simple_conv_net",
        "NAME",
    )
    model_option: Mapping[str, Any] = _setting(
        {}, TABLE, "fresh", "an option of the model, such as batch_norm=true", "NAME=VALUE"
    )
    weight_init: float | str | None = _setting(
        None,
        NUMBER_OR_WORD,
        "fresh",
        '"he" (the default), "xavier", or a standard deviation (the tutorials\' is 0.01), for '
        "models that have a choice",
        "RULE",
    )
    augment: tuple[str, ...] = _setting(
        (),
        TRANSFORMS,
        "fresh",
        "change the training images at random in every epoch, by transforms such as "
        "horizontal_flip,random_crop=2 (docs/augmentation.md), or, without a value, by those that "
        "fit images of this kind",
        "TRANSFORM,...",
    )
    loss: str = _setting(
        "cross_entropy",
        TEXT,
        "fresh",
        f"what is minimized, which says the task: {', '.join(LOSSES)}; by default cross_entropy",
        "NAME",
        choices=tuple(LOSSES),
    )
    loss_option: Mapping[str, Any] = _setting(
        {}, TABLE, "fresh", "an option of the loss, such as gamma=1.5", "NAME=VALUE"
    )
    metrics: tuple[str, ...] | None = _setting(
        None,
        WORDS,
        "fresh",
        "computed after each epoch, such as accuracy,top5,f1; by default the loss's own",
        "NAME,...",
    )
    class_weight: str | None = _setting(
        None,
        TEXT,
        "fresh",
        "balanced: rare classes count more in the cross-entropy",
        choices=("balanced",),
    )
    batch_size: int | None = _setting(
        None,
        WHOLE,
        "fresh",
        "images of one step; by default a twentieth of the training images, from 16 to 100",
        "N",
    )
    drop_last: bool = _setting(
        False, FLAG, "fresh", "leave out the last batch of an epoch if it is smaller"
    )
    optimizer: str = _setting(
        "adam",
        TEXT,
        "fresh",
        f"{', '.join(OPTIMIZERS)}; by default adam",
        "NAME",
        choices=tuple(OPTIMIZERS),
    )
    lr: float = _setting(0.001, NUMBER, "fresh", "learning rate; by default 0.001")
    momentum: float | None = _setting(None, NUMBER, "fresh", "for optimizers that support it", "M")
    weight_decay: float | None = _setting(
        None, NUMBER, "fresh", "L2, or decoupled with adamw", "DECAY"
    )
    optimizer_option: Mapping[str, Any] = _setting(
        {}, TABLE, "fresh", "another option of the optimizer, such as beta1=0.8", "NAME=VALUE"
    )
    schedule: str = _setting(
        "constant",
        TEXT,
        "fresh",
        f"learning rate over the whole run: {', '.join(SCHEDULES)}; by default constant",
        "NAME",
        choices=tuple(SCHEDULES),
    )
    clip_norm: float | None = _setting(
        None, NUMBER, "fresh", "largest norm of all gradients together", "NORM"
    )
    label_smoothing: float = _setting(
        0.0, NUMBER, "fresh", "share of each label that is spread over all classes", "SHARE"
    )
    accumulate: int = _setting(
        1, WHOLE, "fresh", "parts that a batch is split into, to save memory; by default 1", "N"
    )
    early_stopping: int | None = _setting(
        None,
        WHOLE,
        "fresh",
        "stop after N epochs without a better result, and keep the best weights",
        "N",
    )
    evaluate_images: int | None = _setting(
        None,
        WHOLE,
        "fresh",
        "images of either set that metrics are computed on; by default all",
        "N",
    )
    precision: str = _setting(
        "float32",
        TEXT,
        "fresh",
        f"of products on devices that are faster that way: {', '.join(PRECISIONS)}; by default "
        "float32",
        "NAME",
        choices=tuple(PRECISIONS),
    )
    compile_step: bool = _setting(
        False, FLAG, "fresh", "let the backend compile a whole step (CuPy: a CUDA graph)"
    )
    sync_batch_norm: bool = _setting(
        False,
        FLAG,
        "fresh",
        "with --distributed: batch norm computes mean and variance of the batches of all ranks",
    )
    compress_gradients: str | None = _setting(
        None,
        TEXT,
        "fresh",
        "with --distributed: round gradients on their way between ranks, which halves the traffic",
        "bfloat16|float16",
        choices=("bfloat16", "float16"),
    )
    seed: int | None = _setting(
        None,
        WHOLE,
        "fresh",
        "seed of weights and batches; by default one is drawn and printed",
    )


SETTINGS: dict[str, Field[Any]] = {each.name: each for each in fields(Settings)}
"""The fields of ``Settings`` by name."""
FRESH = tuple(n for n, each in SETTINGS.items() if each.metadata["group"] == "fresh")
"""The settings of a new training. A resumed one takes them from its checkpoint."""


def word(name: str) -> str:
    """Return the option of a setting: "batch_size" -> "--batch-size"."""
    return f"--{name.replace('_', '-')}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each setting. One that is not given is None."""
    groups: dict[str, Any] = {
        name: parser if title is None else parser.add_argument_group(*title)
        for name, title in _GROUPS.items()
    }
    for name, each in SETTINGS.items():
        about = each.metadata
        more: dict[str, Any] = {"help": about["help"], "default": None}
        if about["kind"] is FLAG:
            more["action"] = argparse.BooleanOptionalAction
        else:
            more |= {"type": about["kind"].from_word, "metavar": about["metavar"]}
            more["choices"] = about["choices"]
        if about["kind"] is TABLE:
            more["action"] = "append"
        if about["const"] is not None:
            more |= {"nargs": "?", "const": about["const"]}
        group = groups[about["group"]]
        if about["kind"] is TRANSFORMS:
            more |= {"nargs": "?", "const": ("standard",)}
            off = {"dest": name, "action": "store_const", "const": (), "default": None}
            group.add_argument(word(f"no_{name}"), help="do not change them (the default)", **off)
        group.add_argument(word(name), **more)


def given(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the command line says, by name."""
    found = {name: getattr(options, name) for name in SETTINGS}
    for name, value in found.items():
        if isinstance(value, list):  # pairs
            found[name] = {key: one for pair in value for key, one in pair.items()}
    return {name: value for name, value in found.items() if value is not None}


def merged(base: Settings, said: Mapping[str, Any]) -> Settings:
    """Return settings with those that are said. Tables are merged name by name."""
    tables = {
        name: {**getattr(base, name), **value}
        for name, value in said.items()
        if SETTINGS[name].metadata["kind"] is TABLE
    }
    return replace(base, **{**said, **tables})


# --- the file -------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the settings that a TOML file says, by name. Names may have dashes, as options do.

    Raises:
        ArgumentError: if it is not TOML, a name is unknown, or a value is of another type.
        OSError: if it cannot be read.
    """
    with Path(path).open("rb") as file:
        content = file.read(_LARGEST + 1)
    try:
        if len(content) > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST} bytes")
        described = tomllib.loads(content.decode("utf-8-sig"))
    except ValueError as error:  # also TOMLDecodeError
        why = str(error)
        if isinstance(error, UnicodeDecodeError):
            kind = kind_of(content[:FIRST])
            why = "it is not text" if kind is None else f"it looks like {kind}"
        raise ArgumentError(f"{path} is not a TOML file of settings: {why}") from None
    found: dict[str, Any] = {}
    for key, value in described.items():
        name = key.replace("-", "_")
        if name not in SETTINGS:
            close = get_close_matches(name, SETTINGS, 1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(SETTINGS)}"
            raise ArgumentError(f"{path}: unknown setting {key!r}; {hint}")
        if name in found:
            raise ArgumentError(f"{path}: {name} occurs twice, with a dash and without")
        about = SETTINGS[name].metadata
        found[name] = about["kind"].from_toml(f"{path}: {key}", value)
        if about["choices"] is not None and found[name] not in about["choices"]:
            raise ArgumentError(
                f"{path}: {key} must be one of {', '.join(about['choices'])}, got {value!r:.80}"
            )
    return found


def written(settings: Settings) -> str:
    """Return settings as a TOML file, without those that say where results go.

    Raises:
        ArgumentError: if a file cannot hold a value.
    """
    lines = [
        f"# The settings of a training, written by portacnn {VERSION}. They repeat it:",
        "#   portacnn train --settings settings.toml --out ANOTHER_FOLDER",
    ]
    for name, each in SETTINGS.items():
        value = getattr(settings, name)
        if value is not None and value != {} and each.metadata["kept"]:
            lines.append(f"{toml_key(name)} = {toml(value)}")
    return "\n".join([*lines, ""])
