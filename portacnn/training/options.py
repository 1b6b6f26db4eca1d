"""The options of a training run: ``Options``, which checks them, and what else a ``Trainer`` checks
or makes of its arguments."""

from dataclasses import dataclass, replace
from typing import Any

from portacnn import losses
from portacnn.arguments import flag, inner_fraction, not_negative, one_of, positive, whole
from portacnn.data.targets import class_weights
from portacnn.errors import ArgumentError, StateError
from portacnn.layers.freezing import learns
from portacnn.losses import Loss
from portacnn.models import Model
from portacnn.ops.dispatch import PRECISIONS
from portacnn.runtime import Array
from portacnn.schedules import PerEpoch, Schedule, make_schedule
from portacnn.seeds import check_seed
from portacnn.training.sets import Sets
from portacnn.training.shares import batch_sizes, part_sizes

KEYWORDS = {
    "momentum": 'write optimizer="momentum", optimizer_param={"momentum": ...}',
    "weight_decay": 'write optimizer_param={"weight_decay": ...}',
    **dict.fromkeys(
        ("beta1", "beta2", "betas", "eps", "nesterov"), "write optimizer_param={...} for it"
    ),
    **dict.fromkeys(
        ("device", "accelerator", "gpus"),
        "data and training are on the device of the model: pass the device to the model",
    ),
    **dict.fromkeys(
        ("amp", "use_amp", "fp16", "bf16", "mixed_precision"),
        'write precision="bfloat16", where the device supports it',
    ),
    **dict.fromkeys(
        ("resume", "resume_from_checkpoint", "initial_epoch", "ckpt_path"),
        "write Trainer.resume(path, x_train, t_train)",
    ),
    **dict.fromkeys(
        ("logger", "log_dir", "logdir"),
        "write callbacks=[CSVLogger(path)], or [TensorBoard(folder)]",
    ),
    **dict.fromkeys(
        ("num_workers", "workers"),
        "data that are read batch by batch choose their threads: data.Dataset(..., threads=...)",
    ),
    **dict.fromkeys(
        ("num_nodes", "strategy", "world_size", "rank", "local_rank", "ddp"),
        'write distributed="auto", and start the processes with mpiexec or srun',
    ),
    **dict.fromkeys(("sync_batchnorm", "sync_bn"), "write sync_batch_norm=True"),
    **dict.fromkeys(
        ("dataloader", "train_loader", "train_dataloader"),
        "pass arrays, a data.Dataset or a data.Stream as x_train",
    ),
    "steps_per_epoch": "it follows from batch_size and the number of images; leave it out",
    "silent": "write verbose=False",
    "preprocess": "it belongs to the model: model.preprocess = Normalize(...)",
    "normalize": "it belongs to the model: model.preprocess = Normalize(...)",
    "freeze": "write model.freeze(pattern)",
}
"""What to do instead, for arguments of ``Trainer`` that belong elsewhere."""
FROM_CHECKPOINT = dict.fromkeys(
    (
        "batch_size",
        "mini_batch_size",
        "lr",
        "learning_rate",
        "optimizer",
        "optim",
        "optimizer_param",
        "seed",
        "validation_split",
        "class_weight",
    ),
    "it comes from the checkpoint; leave it out",
)
"""The same for ``Trainer.resume``."""
OF_TRAINER = dict.fromkeys(
    ("epochs", "num_epochs", "n_epochs", "batch_size", "lr", "callbacks", "verbose"),
    "pass it to Trainer(...)",
)
"""The same for ``Trainer.train``."""


@dataclass(frozen=True)
class Options:
    """The Trainer's arguments that a checkpoint's header holds unchanged, checked. Each is an
    attribute of the Trainer of the same name; see there.

    Raises:
        ArgumentError: if one is out of range.
    """

    epochs: int
    batch_size: int
    drop_last: bool
    schedule_unit: str
    clip_norm: float | None
    validation_split: float | None
    accumulate: int
    evaluate_sample_num_per_epoch: int | None
    seed: int
    precision: str
    compile_step: bool | None
    checkpoint_every: int | None
    keep: int
    verbose: bool
    sync_batch_norm: bool = False
    compress_gradients: str | None = None

    def __post_init__(self) -> None:
        epochs, size = whole("epochs", self.epochs, 0), whole("batch_size", self.batch_size, 1)
        evaluated, every = self.evaluate_sample_num_per_epoch, self.checkpoint_every
        if evaluated is not None:
            whole("evaluate_sample_num_per_epoch", evaluated, 1)
        clip_norm, split = self.clip_norm, self.validation_split
        checked = {
            "epochs": epochs,
            "batch_size": size,
            "clip_norm": None if clip_norm is None else positive("clip_norm", clip_norm),
            "accumulate": whole("accumulate", self.accumulate, 1),
            "seed": check_seed(self.seed),
            "validation_split": None
            if split is None
            else inner_fraction("validation_split", split),
            "drop_last": flag("drop_last", self.drop_last),
            "compile_step": None if self.compile_step is None else bool(self.compile_step),
            "checkpoint_every": None if every is None else whole("checkpoint_every", every, 1),
            "keep": whole("keep", self.keep, 1),
            "sync_batch_norm": flag("sync_batch_norm", self.sync_batch_norm),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.compress_gradients is not None:
            one_of("compress_gradients", self.compress_gradients, "bfloat16", "float16")
        if self.accumulate > size:
            raise ArgumentError(
                f"accumulate must be at most batch_size={size}, got {self.accumulate}"
            )
        if self.schedule_unit not in ("step", "epoch"):
            raise ArgumentError(
                f'schedule_unit must be "step" or "epoch", got {self.schedule_unit!r}'
            )

    @property
    def part(self) -> int:
        """The number of images at a time, at most: a batch's, divided by ``accumulate``."""
        return -(-self.batch_size // self.accumulate)


def check_precision(precision: Any, model: Model) -> str:
    """Return the precision if this model can be trained with it on its device. Raises ArgumentError
    if not."""
    one_of("precision", precision, *PRECISIONS)
    home = model.home
    if precision not in home.precisions or model.dtype != "float32" != precision:
        raise ArgumentError(
            f"precision={precision!r} is not supported for a {model.dtype} model on {home}; use "
            f"{' or '.join(home.precisions if model.dtype == 'float32' else ['float32'])}"
        )
    return str(precision)


def check_trainable(model: Model) -> None:
    """Raise StateError if the model has parameters and all of them are frozen."""
    if (parameters := model.named_parameters()) and not learns(model):
        last = [*parameters][-1].rpartition(".")[0]
        raise StateError(
            "all parameters are frozen, so there is nothing to train; call "
            f'model.unfreeze("{last}") for those to train',
            model.where,
        )


def check_sizes(model: Model, sets: Sets, options: Options, ranks: int = 1) -> None:
    """Raise ArgumentError if there are fewer training images than in a batch, or a batch, a part of
    one, a process's share of it, or a set to evaluate is too small for a layer."""
    count, most = sets.train.count, options.batch_size
    if most > count:
        raise ArgumentError(f"batch_size is {most}, but there are only {count} training images")
    batches = set(batch_sizes(count, most, options.drop_last))
    parts = {size: part_sizes(size, options.part) for size in batches}
    evaluated = options.evaluate_sample_num_per_epoch

    def who(size: int) -> str:
        sizes = parts[size]
        split = f", in parts of {', '.join(map(str, sizes))} (accumulate={options.accumulate})"
        return (
            f"{'last batch' if size < most else 'batches'} of {count} images by batch_size={most} "
            f"would have {size}{split if len(sizes) > 1 else ''}"
        )

    def cure(size: int) -> str:
        return (
            f"choose another batch_size{' or drop_last=True' if size < most else ''}"
            f"{' or accumulate' if len(parts[size]) > 1 else ''}"
        )

    for size, sizes in parts.items():
        if min(sizes) < ranks:
            raise ArgumentError(
                f"each of {ranks} processes needs an image of each batch, but the {who(size)}; "
                f"{cure(size)}, or fewer processes"
            )
    for layer in model.walk():
        for size, sizes in parts.items():
            smallest = min(sizes) // (1 if options.sync_batch_norm else ranks)
            if smallest < layer.least_batch:
                among = f", for each of {ranks} processes {smallest}" if ranks > 1 else ""
                raise ArgumentError(
                    f"batch norm needs more than one value per channel for a variance; the "
                    f"{who(size)}{among}; {cure(size)}"
                    f"{' or sync_batch_norm=True' if ranks > 1 else ''}",
                    layer.where,
                )
        for name, samples in (("x_train", sets.train), ("x_test", sets.test)):
            if samples is not None and samples.first(evaluated).count < layer.least_predicted:
                raise ArgumentError(
                    "without running statistics it has no variance over one image, but "
                    f"{name} would be evaluated on one; pass more "
                    "images"
                    f"{'' if samples.count == 1 else ' (evaluate_sample_num_per_epoch)'}",
                    layer.where,
                )


# --- loss -----------------------------------------------------------------------------------------


def smoothed(loss: Loss, label_smoothing: float) -> Loss:
    """Return the loss with label smoothing. Raises ArgumentError if it has none."""
    if not isinstance(loss, losses.CrossEntropy) or loss.label_smoothing:
        raise ArgumentError(
            "label_smoothing is an option of the cross-entropy; if you pass a loss, set it there: "
            "loss=CrossEntropy(label_smoothing=0.1)"
        )
    return replace(loss, label_smoothing=label_smoothing)


def check_takes_weights(loss: Loss) -> None:
    """Raise ArgumentError unless the loss takes ``class_weight`` and has none yet."""
    if not isinstance(loss, losses.CrossEntropy):
        raise ArgumentError(
            f"class_weight is an option of the cross-entropy, the loss is {type(loss).__name__}; "
            "use sample_weight, or the loss's own: Focal(alpha=...), BCEWithLogits(pos_weight=...)"
        )
    if loss.weight is not None:
        raise ArgumentError("the loss has class weights already; leave class_weight out")


def weighted(loss: Any, class_weight: Any, t: Array, model: Model) -> Loss:
    """Return the cross-entropy with a weight for each class. ``t``: the targets that are trained
    on, checked."""
    weights = class_weights(class_weight, t, model.output_shape[0], ignore_index=loss.ignore_index)
    return replace(loss, weight=weights)


# --- schedule -------------------------------------------------------------------------------------


def step_schedule(
    schedule: Schedule | str | None, unit: str, epochs: int, steps_per_epoch: int, lr: float
) -> Schedule:
    """Return the schedule as one that counts steps, checked at both ends of the training run.

    Args:
        unit: what ``schedule`` counts, "step" or "epoch".
        lr: the optimizer's learning rate.
    """
    total = epochs * steps_per_epoch
    made = make_schedule(schedule, total if unit == "step" else epochs)
    if unit == "epoch":
        made = PerEpoch(made, steps_per_epoch)
    for step in (0, total - 1) if total else ():
        not_negative(f"the schedule's learning rate at step {step}", made(step, lr))
    return made
