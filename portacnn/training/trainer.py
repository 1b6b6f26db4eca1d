"""Train a model: ``Trainer`` holds a model, data and an optimizer, and runs epochs of shuffled
batches.

A step is one forward pass, one backward pass and one update. Losses stay on the device. They are
fetched together, every ``LOG_EVERY`` steps and at the end of an epoch. A step itself reads nothing
from the device. A loss that is not finite stops all updates from that step on, so if training ends
with an error, the weights are those before the step.
"""

import errno
import logging
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from traceback import clear_frames
from typing import Any, Literal, Self
from weakref import WeakMethod

from portacnn import losses, ops
from portacnn.arguments import (
    answering_keywords,
    either,
    flag,
    fraction,
    not_negative,
    one_of,
    positive,
    share,
    whole,
)
from portacnn.data.targets import class_weights
from portacnn.errors import (
    ArgumentError,
    CheckpointError,
    LabelError,
    NotFiniteError,
    OutOfMemoryError,
    ShapeError,
    StateError,
)
from portacnn.files import make_folder, save_tensors
from portacnn.layers import at_step, one_backward_pass
from portacnn.layers.freezing import learns
from portacnn.layers.passes import without_dx
from portacnn.layers.running import run
from portacnn.losses import Loss
from portacnn.metrics import Metric, metrics_for
from portacnn.models import Model
from portacnn.models.evaluation import evaluate
from portacnn.models.info import last_figures, range_of
from portacnn.ops.dispatch import PRECISIONS
from portacnn.ops.layout import pack
from portacnn.ops.workspace import Workspace, run_in
from portacnn.optim import Optimizer, make_optimizer
from portacnn.runtime import VARIABLE, Array, Backend, HostArray, resolve
from portacnn.schedules import PerEpoch, Schedule, make_schedule
from portacnn.seeds import check_seed, permutation
from portacnn.training import folder
from portacnn.training.callbacks.base import Callback
from portacnn.training.callbacks.running import Callbacks, split
from portacnn.training.checkpoint import Checkpoint, contents, describe_training
from portacnn.training.early_stopping import EarlyStopping, make_early_stopping
from portacnn.training.feed import Samples, batch_sizes, make_feed, part_sizes
from portacnn.training.progress import Progress
from portacnn.training.sets import Sets
from portacnn.training.signals import interrupted_between_steps

LOG_EVERY = 50
KEYWORDS = {
    "momentum": 'write optimizer="momentum", optimizer_param={"momentum": ...}',
    "weight_decay": 'write optimizer_param={"weight_decay": ...}',
    "device": "data and training follow the model: give the device to the model",
}
"""What to do instead, for arguments that belong elsewhere."""
_FROM_CHECKPOINT = dict.fromkeys(
    (
        "batch_size",
        "mini_batch_size",
        "lr",
        "learning_rate",
        "optimizer",
        "optimizer_param",
        "seed",
        "validation_split",
        "class_weight",
    ),
    "it comes from the checkpoint; leave it out",
)
_log = logging.getLogger("portacnn")
_NOT_COPIED = {"backend", "_feed", "_unread", "_ok", "_step", "_workspace", "_sets"}


@dataclass(frozen=True)
class StepState:
    """The values that differ from step to step, besides the batch.

    If a backend records the step and replays it (``Backend.compile_step``), the int and the floats
    are 0-dimensional arrays on the device, int64 and float64.

    Attributes:
        step: number of the step in the whole training, from 0.
        lr: learning rate of this step.
        count: number of the optimizer's update, from 1.
        ok: 0-dimensional boolean; true if all steps so far were finite. If it is false, nothing is
            updated any more.
    """

    step: Any
    lr: Any
    count: Any
    ok: Array


class Trainer:
    """Train a built ``Model`` on images and labels.

        >>> import numpy as np
        >>> import portacnn
        >>> x = np.random.default_rng(0).random((40, 1, 8, 8), dtype="float32")
        >>> t = np.arange(40) % 10
        >>> conv = {"filter_num": 4, "filter_size": 3}
        >>> model = portacnn.SimpleConvNet((1, 8, 8), conv, device="cpu", seed=0)
        >>> trainer = portacnn.Trainer(
        ...     model, x, t, x, t, epochs=2, batch_size=20, lr=0.001, verbose=False
        ... )
        >>> trainer.train()
        >>> trainer.epoch, len(trainer.train_loss_list), len(trainer.test_acc_list)
        (2, 4, 2)

    Args:
        model: a built model. Training runs on its device.
        x_train, x_test: images (N, *input_shape), floating point, or uint8 if the model has a
            ``preprocess``. They keep their dtype, so uint8 images need a quarter of float32's
            memory. They are stored on the model's device, or on the host if they need more than
            half of the device's free memory.
            Without a test set only the training set is evaluated.
        t_train, t_test: targets that the loss takes. For the cross-entropy: labels, integers (N,)
            or one-hot (N, classes).
        loss: a word or an object of ``portacnn.losses``.
        metrics: words or objects of ``portacnn.metrics``, evaluated after each epoch; a mapping
            gives them names. The default is the loss's own: accuracy for the cross-entropy.
        class_weight: a factor for each class in the cross-entropy: (classes,) numbers, a mapping
            such as {3: 5.0} (others are 1), or "balanced" (by the training labels).
        sample_weight: (N,) a factor for each training image in the loss.
        validation_split: share of the training set, greater than 0 and below 1, that is split off
            as the test set. ``seed`` chooses the images.
        epochs: number of passes through the training images. Each epoch is shuffled by ``seed`` and
            its number.
        batch_size: images per step, 100 by default. The last batch of an epoch may be smaller.
        mini_batch_size: the book's name of ``batch_size``. Give only one of them.
        drop_last: drop the last batch of an epoch if it is smaller than ``batch_size``.
        optimizer: "sgd", "momentum", "adagrad", "rmsprop", "adam", "adamw", or an ``Optimizer``.
        lr: learning rate, for an optimizer given by name. By default the optimizer's own.
        optimizer_param: the optimizer's arguments, such as {"lr": 0.001, "weight_decay": 1e-4}.
        schedule: learning rate schedule: one of ``portacnn.schedules``, any function of (step, lr),
            or a name for a schedule over all steps: "step", "cosine", "warmup_cosine", "one_cycle".
        schedule_unit: "step" or "epoch": what the schedule counts.
        clip_norm: largest norm of all gradients together (``ops.clip_by_global_norm``). None does
            not clip.
        label_smoothing: share of each label that is spread over all classes during training, 0 to
            1.
        accumulate: number of parts of similar size that a batch is split into. Parts run one after
            the other to save memory, and their gradients are added up. Only batch statistics
            (BatchNorm) depend on the parts.
        early_stopping: an ``EarlyStopping``, or its patience in epochs.
        callbacks: ``Callback`` objects of ``portacnn.callbacks``, called in this order. An
            ``EarlyStopping`` may be among them.
        evaluate_sample_num_per_epoch: number of images, from the first, of either set that
            accuracies are computed on after each epoch. None takes all.
        seed: seed of the batch order. None draws one.
        precision: dtype that the factors of products are rounded to during training, on devices
            that are faster that way (``ops.use_precision``). Weights and activations stay float32.
        compile_step: let the backend record a whole step and replay it (CuPy: a CUDA graph). Other
            backends run the step as usual. A recorded step does not see later changes to the
            Trainer or its optimizer, except ``lr``.
        checkpoint_dir: folder for checkpoints, which ``Trainer.resume`` reads. None writes only
            those requested with ``checkpoint``. Several trainings may share a folder.
        checkpoint_every: steps between checkpoints. None writes one after each epoch. One is also
            written at the end, and when training is stopped with ``stop``.
        keep: number of checkpoints to keep in the folder.
        verbose: show a progress bar.

    Attributes:
        train_loss_list: loss of every step.
        history: lists with one value per epoch, by name: "train_loss" (the mean of the epoch's
            batches), "test_loss", "train_" and "test_" of every metric, "lr" (of the last step),
            "seconds" (evaluation included) and "images_per_second" (of the steps alone). Of an
            epoch that was resumed, the last two are about the part since then.
        epoch_loss_list, test_loss_list, train_acc_list, test_acc_list: ``history`` of
            "train_loss", "test_loss", "train_accuracy" and "test_accuracy".
        epoch: number of finished epochs. ``batch``: number of finished batches of the current
            epoch.
        stopped_early: whether ``early_stopping`` has ended the training.
        last_checkpoint: path of the checkpoint written last, None before the first.

    Raises:
        ShapeError, LabelError, ArrayError, NotFiniteError: if data do not fit the model or are not
            finite.
        ArgumentError: if an argument is out of range.
        OSError: if ``checkpoint_dir`` cannot be created or written to.
    """

    @answering_keywords("Trainer", KEYWORDS)
    def __init__(
        self,
        model: Model,
        x_train: Array,
        t_train: Array,
        x_test: Array | None = None,
        t_test: Array | None = None,
        *,
        loss: str | Loss = "cross_entropy",
        metrics: Iterable[str | Metric] | Mapping[str, str | Metric] | None = None,
        class_weight: Any = None,
        sample_weight: Array | None = None,
        validation_split: float | None = None,
        epochs: int = 20,
        batch_size: int | None = None,
        mini_batch_size: int | None = None,
        drop_last: bool = False,
        optimizer: str | Optimizer = "adam",
        lr: float | None = None,
        optimizer_param: Mapping[str, Any] | None = None,
        schedule: Schedule | str | None = None,
        schedule_unit: Literal["step", "epoch"] = "step",
        clip_norm: float | None = None,
        label_smoothing: float = 0.0,
        accumulate: int = 1,
        early_stopping: EarlyStopping | int | None = None,
        callbacks: Iterable[Callback | EarlyStopping] | Callback | EarlyStopping = (),
        evaluate_sample_num_per_epoch: int | None = None,
        seed: int | None = 0,
        precision: Literal["float32", "tf32", "bfloat16", "float16", "3xtf32"] = "float32",
        compile_step: bool = False,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        keep: int = 3,
        verbose: bool = True,
    ) -> None:
        self.model = model
        self.backend: Backend = model.home
        self._revision = model.revision
        self._freezes = -1  # of the network, when the step was prepared
        _check_trainable(model)
        self.epochs = whole("epochs", epochs, 0)
        self.batch_size = whole(
            "batch_size", either(100, batch_size=batch_size, mini_batch_size=mini_batch_size), 1
        )
        self.evaluate_sample_num_per_epoch = evaluate_sample_num_per_epoch
        if evaluate_sample_num_per_epoch is not None:
            whole("evaluate_sample_num_per_epoch", evaluate_sample_num_per_epoch, 1)
        self.optimizer = make_optimizer(optimizer, optimizer_param, lr=lr)
        self.optimizer.check(model.named_parameters())
        self.clip_norm = None if clip_norm is None else positive("clip_norm", clip_norm)
        sets = x_train if isinstance(x_train, Sets) else None
        self.loss = losses.named(loss) if sets is None else sets.loss
        if label_smoothing:
            self.loss = _smoothed(self.loss, share("label_smoothing", label_smoothing))
        self.accumulate = whole("accumulate", accumulate, 1)
        if self.accumulate > self.batch_size:
            raise ArgumentError(
                f"accumulate must be at most batch_size={self.batch_size}, got {accumulate}"
            )
        self.seed = check_seed(seed)
        self.verbose = verbose
        if class_weight is not None:
            _check_takes_weights(self.loss)
        self.metrics = metrics_for(self.loss, metrics)
        if validation_split is not None:
            validation_split = fraction("validation_split", validation_split)
        self.validation_split = validation_split
        self._sets = sets or Sets.take(
            model,
            self.loss,
            x_train,
            t_train,
            x_test,
            t_test,
            sample_weight,
            validation_split,
            self.seed,
        )
        if class_weight is not None:
            self.loss = _weighted(self.loss, class_weight, self.t_train, model)
            self._sets = replace(self._sets, loss=self.loss)
        called, stopping = split(callbacks, early_stopping)
        self.callbacks = Callbacks(called)
        self.early_stopping = make_early_stopping(
            stopping, self.metrics, self._sets.test is not None
        )
        if self.batch_size > self.x_train.shape[0]:
            raise ArgumentError(
                f"batch_size is {self.batch_size}, but there are only {self.x_train.shape[0]} "
                "training images"
            )
        self.drop_last = flag("drop_last", drop_last)
        self._sizes = batch_sizes(self.x_train.shape[0], self.batch_size, self.drop_last)
        self.steps_per_epoch = len(self._sizes)
        self._part = -(-self.batch_size // self.accumulate)  # images at a time, at most
        self._check_parts()
        self._feed = make_feed(model, self._sets.train)
        self.compile_step = bool(compile_step)
        self.precision = _check_precision(precision, model)
        self.schedule = self._take_schedule(schedule, schedule_unit)
        self.schedule_unit = schedule_unit
        self.train_loss_list: list[float] = []
        self.history: dict[str, list[float]] = {name: [] for name in self._figures()}
        self.epoch = self.batch = 0
        self.stopped_early = False
        self._best_weights: dict[str, HostArray] | None = None
        self._range: tuple[float, ...] | None = None  # of the training images, once known
        self._unread: list[Array] = []  # reports of steps, still on the device
        self._ok = self._fine()
        self._step: Any = None
        self._workspace = Workspace()
        self._stop = False
        self._last_lr = 0.0  # of the last step
        self._fingerprints: dict[str, Any] | None = None
        self.run = secrets.token_hex(3)
        self.last_checkpoint: Path | None = None
        self.checkpoint_every = (
            None if checkpoint_every is None else whole("checkpoint_every", checkpoint_every, 1)
        )
        self.keep = whole("keep", keep, 1)
        self.checkpoint_dir: Path | None = None
        if checkpoint_dir is not None:
            describe_training(self)
            self.checkpoint_dir = make_folder(checkpoint_dir).absolute()
        # the folder locked against other Trainers of this run
        self._sole_in: Path | None = None

    @classmethod
    @answering_keywords("Trainer.resume", _FROM_CHECKPOINT)
    def resume(
        cls,
        path: str | os.PathLike[str],
        x_train: Array,
        t_train: Array,
        x_test: Array | None = None,
        t_test: Array | None = None,
        *,
        sample_weight: Array | None = None,
        loss: Loss | None = None,
        metrics: Iterable[str | Metric] | Mapping[str, str | Metric] | None = None,
        callbacks: Iterable[Callback | EarlyStopping] | Callback | EarlyStopping = (),
        device: str | Backend | None = None,
        model: Model | None = None,
        epochs: int | None = None,
        schedule: Schedule | str | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        keep: int | None = None,
        precision: Literal["float32", "tf32", "bfloat16", "float16", "3xtf32"] | None = None,
        compile_step: bool | None = None,
        verbose: bool | None = None,
    ) -> Self:
        """Return a Trainer that continues from a checkpoint; ``train`` resumes with the next batch.

        On the same backend every later loss and weight is bitwise what it would have been without
        the interruption. On another backend batches and dropout masks are the same, and values are
        as close as docs/portability.md states.

        Args:
            path: a checkpoint, or a folder of checkpoints: then the newest intact one is read.
            x_train, t_train, x_test, t_test: the data of the training. Checkpoints do not hold
                them.
            sample_weight: the training's, like the data.
            loss, metrics: those of the training if they are your own, which files cannot hold.
            callbacks: as many of the same classes as the training had, which get their states.
            device: where to resume, see ``portacnn.resolve``. The default is the variable
                ``PORTACNN_BACKEND``, or if it is not set, the device of the checkpoint.
            model: a built model with the same layers, for a checkpoint that does not describe its
                model. It gets the weights.
            epochs: total number of epochs, if it should differ from the checkpoint's. The schedule
                does not change.
            schedule: replaces the checkpoint's. Required if that was your own function, which files
                cannot hold.
            checkpoint_dir: folder for new checkpoints. The default is the folder of ``path``.
            precision: replaces the checkpoint's, which the device may not support.
            checkpoint_every, keep, compile_step, verbose: replace the checkpoint's.

        Raises:
            ModelFormatError: if there is no intact checkpoint, or it does not describe a training.
            FileNotFoundError: if the folder has no checkpoint.
            ArgumentError: if the data differ from the training's, a function must be given again,
                or the device does not support the precision.
            BackendError: if the device is unavailable.
        """
        file, saved = folder.newest(Path(path), Checkpoint.read)
        if model is None:
            variable = os.environ.get(VARIABLE, "").strip()
            model = saved.model(
                resolve(device) if device is not None or variable else saved.place()
            )
        else:
            if device is not None:
                model.to(device)
            saved.load_into(model)
        arguments = saved.arguments()
        called, stopping = split(callbacks)
        arguments["callbacks"] = called
        if loss is None:
            loss = saved.loss()
        if metrics is None:
            arguments["metrics"] = saved.metrics()
        else:
            arguments["metrics"] = metrics_for(losses.named(loss), metrics)
            saved.check_metrics(arguments["metrics"])
        if x_test is not None and arguments["validation_split"] is not None:
            raise ArgumentError(
                f"the data differ from those of {file}: its test set was split off the training "
                "set (validation_split); leave x_test and t_test out"
            )
        try:
            sets = Sets.take(
                model,
                losses.named(loss),
                x_train,
                t_train,
                x_test,
                t_test,
                sample_weight,
                arguments["validation_split"],
                arguments["seed"],
            )
        except (LabelError, ShapeError) as error:  # the training's own data fitted its loss
            raise ArgumentError(
                f"the data differ from those of {file}: {error}; pass the same data"
            ) from error
        fingerprints = sets.fingerprints()
        saved.check_data(fingerprints)
        chosen = {
            "epochs": epochs,
            "checkpoint_every": checkpoint_every,
            "keep": keep,
            "precision": precision,
            "compile_step": compile_step,
            "verbose": verbose,
        }
        arguments |= {name: value for name, value in chosen.items() if value is not None}
        # any other value is an error of the file, reported below
        if precision is not None or arguments["precision"] in PRECISIONS:
            try:
                _check_precision(arguments["precision"], model)
            except ArgumentError as error:
                raise ArgumentError(
                    f'{error}. Choose another: resume(..., precision="float32")', str(file)
                ) from error
        arguments["schedule"] = schedule if schedule is not None else saved.schedule()
        # errors in these arguments are not the file's
        if epochs is not None or schedule is not None:
            made = cls(model, sets, None, **arguments)
            trainer = saved.made(lambda: made)
        else:
            trainer = saved.made(lambda: cls(model, sets, None, **arguments))
        trainer.callbacks.load(*saved.callbacks())
        trainer._check_stopping(stopping)
        trainer._fingerprints = fingerprints
        trainer.checkpoint_dir = make_folder(
            file.parent if checkpoint_dir is None else checkpoint_dir
        ).absolute()
        if trainer.finished:
            trainer._take_best()
        return trainer

    def _check_stopping(self, given: EarlyStopping | int | None) -> None:
        """Raise ArgumentError if early stopping that was given differs from the training's."""
        if given is not None:
            made = make_early_stopping(given, self.metrics, self._sets.test is not None)
            if made != self.early_stopping:
                raise ArgumentError(
                    f"the training has {self.early_stopping or 'no early stopping'}, got {made}; "
                    "leave it out, it comes from the checkpoint"
                )

    def _check_parts(self) -> None:
        """Raise ArgumentError if a batch, a part of one, or a set to evaluate is too small for a
        layer."""
        parts = {size: part_sizes(size, self._part) for size in set(self._sizes)}
        for layer in self.model.walk():
            for size, sizes in parts.items():
                if min(sizes) < layer.least_batch:
                    last = size < self.batch_size
                    split = (
                        f", in parts of {', '.join(map(str, sizes))} (accumulate={self.accumulate})"
                    )
                    raise ArgumentError(
                        "batch norm needs more than one value per channel for a variance; the "
                        f"{'last batch' if last else 'batches'} of {self.x_train.shape[0]} images "
                        f"by batch_size={self.batch_size} would have "
                        f"{size}{split if len(sizes) > 1 else ''}; choose another "
                        f"batch_size{' or drop_last=True' if last else ''}"
                        f"{' or accumulate' if len(sizes) > 1 else ''}",
                        layer.where,
                    )
            for name, samples in (("x_train", self._sets.train), ("x_test", self._sets.test)):
                if samples is not None and self._sample_size(samples) < layer.least_predicted:
                    raise ArgumentError(
                        "without running statistics it has no variance over one image, but "
                        f"{name} would be evaluated on one; give more "
                        "images"
                        f"{'' if samples.count == 1 else ' (evaluate_sample_num_per_epoch)'}",
                        layer.where,
                    )

    def _take_schedule(self, schedule: Schedule | str | None, unit: str) -> Schedule:
        """Check the schedule at both ends of the training, and make it count steps."""
        if unit not in ("step", "epoch"):
            raise ArgumentError(f'schedule_unit must be "step" or "epoch", got {unit!r}')
        total = self.epochs * self.steps_per_epoch
        made = make_schedule(schedule, total if unit == "step" else self.epochs)
        if unit == "epoch":
            made = PerEpoch(made, self.steps_per_epoch)
        for step in (0, total - 1) if total else ():
            not_negative(
                f"the schedule's learning rate at step {step}", made(step, self.optimizer.lr)
            )
        return made

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle holds: model, optimizer and figures, and the data as NumPy
        arrays."""
        if self._unread:
            self._read_losses()
        state = {name: value for name, value in vars(self).items() if name not in _NOT_COPIED}
        state["_sets"] = self._sets.on_host()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.backend = self.model.home
        self._sets = self._sets.on(self.model)
        self._feed = make_feed(self.model, self._sets.train)
        self._unread, self._ok, self._step, self._workspace = [], self._fine(), None, Workspace()
        optimizer_state = self.optimizer.state_dict()
        for arrays in self.optimizer.state.values():
            arrays.clear()  # to be laid out like the parameters
        self.optimizer.load_state_dict(optimizer_state, self.model.named_parameters())

    def lr(self, step: int) -> float:
        """Return the learning rate at ``step``, counted from 0 over all epochs."""
        return not_negative(
            f"the schedule's learning rate at step {step}", self.schedule(step, self.optimizer.lr)
        )

    def _fine(self) -> Array:
        with self.backend.active():
            return self.backend.xp.ones((), dtype=self.backend.xp.bool, device=self.backend.device)

    @property
    def steps_done(self) -> int:
        """The number of finished steps. An epoch that was interrupted by an error does not
        count."""
        return self.epoch * self.steps_per_epoch + self.batch

    @property
    def finished(self) -> bool:
        """Whether all epochs are done or ``early_stopping`` has ended the training."""
        return self.epoch >= self.epochs or self.stopped_early

    def stop(self) -> None:
        """Make ``train`` return after the current step. It writes a checkpoint, and ``train`` can
        be called again.

        Use it from signal handlers (``stopping_on_signals``), other threads, and code that runs
        within a step.
        """
        self._stop = True

    def checkpoint(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write a checkpoint to ``path``, or into ``checkpoint_dir``; return its path. Call it
        between steps.

        Raises:
            CheckpointError: if it could not be written (the disk is full, for example); earlier
                checkpoints are unchanged. Also if another Trainer, in this process or another, is
                training the same run into the same folder.
            ArgumentError: if there is neither a path nor a folder, or a file cannot hold the
                optimizer.
            NotFiniteError: as for ``train``.
        """
        place = self.checkpoint_dir if path is None else Path(path).absolute()
        if place is None:
            raise ArgumentError(
                "there is no checkpoint_dir to write to; give a path: checkpoint(path)"
            )
        if self._unread:
            self._read_losses()
        tensors, header = contents(self)

        def write(file: Path) -> None:
            save_tensors(file, tensors, header)

        try:
            if path is not None:
                write(place)
            else:
                with self._sole():
                    place = folder.add(place, self.run, self.steps_done, self.keep, write)
        except CheckpointError:
            raise
        except OSError as error:
            failed = CheckpointError(
                f"the checkpoint of step {self.steps_done} could not be written to {place}: "
                f"{error}. Earlier checkpoints are unchanged, and the training is intact in "
                "memory: free some disk space and call train() to continue, or write elsewhere "
                "with checkpoint(path)"
            )
            failed.errno = error.errno or errno.EIO
            raise failed from error
        self.last_checkpoint = place
        return place

    @contextmanager
    def _sole(self) -> Iterator[None]:
        """Lock this run's checkpoints in the folder against other Trainers.

        Raises:
            CheckpointError: if another Trainer holds the lock.
        """
        place, before = self.checkpoint_dir, self._sole_in
        if place is None or place == before:
            yield
            return
        with folder.sole(place, self.run):
            self._sole_in = place
            try:
                yield
            finally:
                self._sole_in = before

    def fingerprints(self) -> dict[str, Any]:
        """Return the fingerprints of the data (``feed.fingerprint``), by "train" and "test"."""
        if self._fingerprints is None:
            self._fingerprints = self._sets.fingerprints()
        return self._fingerprints

    def train(self) -> None:
        """Train until ``epochs`` epochs are done, early stopping ends it, or ``stop`` is called.

        If it is called again, it continues where it stopped. Ctrl-C in the main thread calls
        ``stop``: the current step is finished, a checkpoint is written, and then KeyboardInterrupt
        is raised. A training continued after that gives bitwise the same results as one that was
        never interrupted.

        An exception within a step (an error, a second Ctrl-C, an exception of your own signal
        handler) is raised at once. The epoch then restarts with the current weights. These are the
        weights from before that step, unless the exception came in the middle of the update itself.
        Histories and counts hold whole steps in any case.

        Raises:
            NotFiniteError: if a loss, a gradient or a running statistic is NaN or infinite. Weights
                and statistics are those from before that step.
            CheckpointError: see ``checkpoint``. Training can be continued.
            StateError: if the model was moved to another device, built again or changed since the
                Trainer was made.
        """
        try:
            with interrupted_between_steps(self), self._sole():
                self._train()
        finally:
            self._stop = False

    def _train(self) -> None:
        if self.model.backend != self.backend:
            raise StateError(
                f"the model was moved from {self.backend} to {self.model.backend}; make a new "
                "Trainer for it"
            )
        self._check_revision()
        if self.finished:
            why = (
                "early stopping has ended the training"
                if self.stopped_early
                else f"all {self.epochs} epochs are done"
            )
            cure = (
                "make a new Trainer to continue from these weights"
                if self.stopped_early
                else "set a larger trainer.epochs to continue"
            )
            _log.warning("train() has nothing to do: %s; %s", why, cure)
            return
        batches = self.steps_per_epoch
        self._cut_lists()
        self._unread.clear()
        self._ok = self._fine()
        with (
            self.backend.active(),
            self.callbacks.training(self),
            Progress(self.epochs * batches, self.steps_done, self.verbose) as progress,
        ):
            try:
                while not self.finished:
                    if self._run_epoch(progress):
                        break
            except BaseException as error:
                done, self.batch = self.batch, 0  # a step may be incomplete
                if self.callbacks.raised or isinstance(error, CheckpointError):
                    if self._unread:
                        self._read_losses()
                    self.batch = done
                if self.finished:
                    self._take_best()
                raise
            finally:
                self._workspace = Workspace()  # the next ``train`` allocates memory again
            if self.finished:
                self._take_best()

    def _cut_lists(self) -> None:
        """Remove what an interrupted epoch has left in the lists."""
        del self.train_loss_list[self.steps_done :]
        for figures in self.history.values():
            del figures[self.epoch :]

    def order(self, epoch: int) -> HostArray:
        """Return which training images the batches of an epoch, from 0, have, in their order: int64
        on the host. With ``drop_last`` the last images of the order are left out."""
        return permutation(self.seed, epoch, self._sets.train.count)[: sum(self._sizes)]

    def _run_epoch(self, progress: Progress) -> bool:
        """Run the rest of an epoch, or the part of it before ``stop``; write the checkpoints that
        are due.

        ``stop`` may be called at any moment, for example by a signal handler. It is read once after
        each step, so training never ends without its checkpoint.

        Returns:
            Whether to stop.
        """
        batches, size = self.steps_per_epoch, self.batch_size
        rest = self.order(self.epoch)[self.batch * size :]
        if self.batch == 0:
            self.callbacks.epoch_begins(self)
        every_step = self.callbacks.every_step
        began = time.perf_counter()
        for batch in self._feed.epoch(rest, size):
            self.run_batch(*batch)
            self.batch += 1
            self.callbacks.updated(self, self._ok)
            progress.step()
            if every_step:
                self._read_losses()
                self.callbacks.step_ends(self, self.train_loss_list[-1])
            stop = self._stop
            due = stop or self._is_due(self.steps_done)
            if self.batch % LOG_EVERY == 0 or self.batch == batches or due:
                if self._unread:
                    self._read_losses()
                progress.show(self.epoch + 1, loss=self.train_loss_list[-1])
            if self.batch == batches:
                break
            if due and self.checkpoint_dir is not None:
                self.checkpoint()
            if stop:
                return True
        self._end_epoch(began, len(rest))
        figures = {name: each[-1] for name, each in self.history.items()}
        progress.epoch(self.epoch, figures)
        self.callbacks.epoch_ends(self, figures)
        stop = self._stop
        if self.checkpoint_dir is not None and (
            self._is_due(self.steps_done) or self.checkpoint_every is None or self.finished or stop
        ):
            self.checkpoint()
        return stop

    def _is_due(self, steps: int) -> bool:
        """Return whether ``checkpoint_every`` requires a checkpoint after this many steps."""
        return (
            self.checkpoint_dir is not None
            and self.checkpoint_every is not None
            and steps % self.checkpoint_every == 0
        )

    def _take_best(self) -> None:
        """Load the weights of the best epoch into the model, if they were kept."""
        if self._best_weights is not None:
            self.model.load_state_dict(self._best_weights)
            if self.early_stopping is not None:
                watched = self.history[f"test_{self.early_stopping.monitor}"]
                self._tell_model(self.early_stopping.best_epoch(watched))

    def _tell_model(self, epoch: int) -> None:
        """Make the model know its task, and its figures after this epoch."""
        info = self.model.info
        figures = {**info.figures, **last_figures(self.history, epoch)}
        if self._range is None:
            with self.backend.active():
                self._range = range_of(self.x_train)
        self.model.info = replace(
            info, task=self.loss.task, figures=figures, input_range=self._range
        )

    def _end_epoch(self, began: float, count: int) -> None:
        """Append the epoch's figures to the lists, and check whether it was the best or the last
        one.

        Args:
            began: when its first step began, or the first one after it was resumed.
            count: number of images trained on since.
        """
        sizes, trained = self._sizes, time.perf_counter()
        step_losses = self.train_loss_list[-len(sizes) :]
        figures: dict[str, Any] = {
            "train_loss": sum(n * loss for n, loss in zip(sizes, step_losses, strict=True))
            / sum(sizes),
            "lr": self._last_lr,
        }
        with self.as_evaluated():
            train = self._evaluate(self._sets.train, None)
            test = {} if self._sets.test is None else self._evaluate(self._sets.test, self.loss)
        for which, values in (("train", train), ("test", test)):
            figures |= {f"{which}_{name}": value for name, value in values.items()}
        figures |= {
            "seconds": time.perf_counter() - began,
            "images_per_second": count / (trained - began),
        }
        for name, each in self.history.items():
            each.append(figures[name])
        self.epoch, self.batch = self.epoch + 1, 0
        self._tell_model(self.epoch)
        stopping = self.early_stopping
        if stopping is not None:
            watched = self.history[f"test_{stopping.monitor}"]
            if stopping.restore_best and stopping.best_epoch(watched) == self.epoch:
                with self.as_evaluated():
                    self._best_weights = self.model.state_dict()
            self.stopped_early = stopping.is_over(watched)

    def as_evaluated(self) -> AbstractContextManager[None]:
        """Return a context in which the model has the weights that are evaluated after each epoch:
        with an ``EMA`` the averages, otherwise its own."""
        return self.callbacks.evaluating(self)

    def run_batch(self, *batch: Array) -> None:
        """Run one step with a batch of the training set, as ``train`` does for each batch.

        Nothing is read from the device: the loss stays there until ``train`` fetches it.

        Args:
            batch: indices of the images, int64 (B,) on the model's device. If the training set is
                on the host, images and labels instead (see ``feed.Streamed``).

        Raises:
            OutOfMemoryError: if there is not enough memory. Weights and statistics are those from
                before this step.
            StateError: if the model was built again or changed since the Trainer was made.
        """
        self._check_revision()
        number = len(self.train_loss_list) + len(self._unread)
        self._last_lr = self.lr(number)
        state = StepState(number, self._last_lr, self.optimizer.steps + 1, self._ok)
        if self._step is None:
            step = WeakMethod(self._whole_step)  # a bound method would keep the Trainer alive

            def whole_step(*arguments: Any) -> tuple[Array, Array]:
                return step()(*arguments)  # type: ignore[misc]

            self._step = (
                self.backend.compile_step(whole_step, (*batch, state))
                if self.compile_step and not self.callbacks.inside_step
                else whole_step
            )
        try:
            with self.backend.active(), ops.use_precision(self.precision):
                report, self._ok = self._step(*batch, state)
        except MemoryError as error:
            raise self._out_of_memory(error, batch[0].shape[0]) from error
        self.optimizer.advance()
        self._unread.append(report)

    def _check_revision(self) -> None:
        if self.model.revision != self._revision:
            raise StateError(
                "the model was built again or changed by replace after the Trainer was made, so "
                "the optimizer's state does not match it; make a new Trainer"
            )
        network = self.model.belongs_to
        if network is not None and network.freezes != self._freezes:
            _check_trainable(self.model)
            self._freezes, self._step = network.freezes, None

    def _whole_step(self, *batch_and_state: Any) -> tuple[Array, Array]:
        """Run a step from a batch as the feed returns it.

        Returns:
            The step's report, (loss, whether all was finite), and the new ``state.ok``.
        """
        *batch, state = batch_and_state
        xp = self.backend.xp
        x, t, *weight = self._feed.batch(*batch)
        loss, ok = self.step(x, t, state, *weight)
        return xp.stack([loss, xp.astype(ok, loss.dtype)]), ok

    def step(
        self, x: Array, t: Array, state: StepState, weight: Array | None = None
    ) -> tuple[Array, Array]:
        """Run one forward pass, one backward pass and one update. Everything stays on the device.

        Args:
            x, t: a preprocessed batch, of the model's dtype and device; labels are int64.
            state: the step's values, and whether the steps before it were finite.

        Returns:
            The loss, 0-dimensional, and ``state.ok`` updated by this step.
        """
        xp = self.backend.xp
        buffers = self.model.named_buffers().wholes()
        before = [xp.asarray(buffer, copy=True) for buffer in buffers]
        try:
            loss = self._gradients(x, t, weight, state.step)
            grads = self.model.named_gradients()
            ok = state.ok & xp.isfinite(loss)
            if grads or buffers:
                ok = ok & ops.all_finite([*grads.wholes(), *buffers])
            if self.clip_norm is not None:
                ops.clip_by_global_norm(grads.wholes(), self.clip_norm)
            # running statistics include this batch already
            for buffer, old in zip(buffers, before, strict=True):
                buffer[...] = xp.where(ok, buffer, old)
            # Last, because an update cannot be undone if a later line fails.
            self.optimizer.update(
                self.model.named_parameters(), grads, ok, lr=state.lr, count=state.count
            )
        except BaseException:  # out of memory, or interrupted
            for buffer, old in zip(buffers, before, strict=True):
                buffer[...] = old
            raise
        return loss, ok

    def _out_of_memory(self, error: MemoryError, size: int) -> OutOfMemoryError:
        """Return the error to raise, and release everything that was kept for this step."""
        # otherwise the traceback would keep the step's arrays alive
        clear_frames(error.__traceback__)
        self._workspace, self._step = Workspace(), None
        asked, held = self.backend.memory_error(error) or (None, None)
        figures = f" ({asked} bytes requested, {held} in use)" if asked is not None else ""
        return OutOfMemoryError(
            f"{self.backend} has not enough memory for a training step of {size} images{figures}; "
            "the model is as it was before the step. Make a Trainer with a smaller batch_size "
            f"than {self.batch_size}, or a larger accumulate"
        )

    def _gradients(self, x: Array, t: Array, weight: Array | None, step: int) -> Array:
        """Run forward and backward, in ``accumulate`` parts; the model then has the whole batch's
        gradients.

        Returns:
            The batch's mean loss. Each part contributes its share of it, so that mean and gradients
            are those of the batch.
        """
        last, loss = 0, 0.0
        whole = self.loss.count(t, weight, self.model.dtype)
        with one_backward_pass():
            for size in part_sizes(x.shape[0], self._part):
                first, last = last, last + size
                with at_step(step, first):
                    part = run_in(
                        self._workspace,
                        self._part_gradients,
                        x[first:last, ...],
                        t[first:last, ...],
                        None if weight is None else weight[first:last],
                        whole,
                    )
                loss = loss + part
        return loss

    def _part_gradients(self, x: Array, t: Array, weight: Array | None, whole: Any) -> Array:
        """Run forward and backward for a part of a batch. Return its share of the batch's loss, in
        new memory."""
        with without_dx(self.model):
            y, kept = run(self.model, pack(x), True, True)
        share, cache = self.loss.forward_part(y, t, weight, whole)
        self.model.backward(self.loss.backward_part(cache), kept, need_dx=False)
        return share

    def _read_losses(self) -> None:
        """Fetch the losses that have accumulated on the device."""
        fetched = self.backend.to_host(self.backend.xp.stack(self._unread)).tolist()
        losses, fine = [loss for loss, _ in fetched], [ok for _, ok in fetched]
        self._unread.clear()
        begin = len(self.train_loss_list)
        self.train_loss_list.extend(losses)
        if not all(fine):
            index = fine.index(0.0)
            loss, step = losses[index], begin + index
            elsewhere = ", but its gradients or running statistics are not finite"
            raise NotFiniteError(
                f"the loss of step {step + 1} (epoch {self.epoch + 1}) is "
                f"{loss}{elsewhere if isfinite(loss) else ''}; the weights are those before that "
                f"step. Lower the learning rate ({self.lr(step)})"
            )

    def _evaluate(self, samples: Samples, loss: Loss | None) -> dict[str, Any]:
        """Return loss and metrics over the first samples of a set, as many as requested."""
        samples, model = samples.first(self._sample_size(samples)), self.model
        return evaluate(
            self.backend,
            model.outputs(samples.images),
            samples.targets,
            None if loss is None else loss.for_evaluation(),
            self.metrics,
            samples.weights,
            model.dtype,
        )

    def _sample_size(self, samples: Samples) -> int:
        return min(self.evaluate_sample_num_per_epoch or samples.count, samples.count)

    def _figures(self) -> list[str]:
        """Return the names of an epoch's figures, in the order of ``history``."""
        test = [] if self._sets.test is None else ["loss", *self.metrics]
        names = ["train_loss", *(f"test_{name}" for name in test[:1])]
        for name in self.metrics:
            names += [f"train_{name}", *([f"test_{name}"] if test else [])]
        return [*names, "lr", "seconds", "images_per_second"]

    def evaluate(self, x: Array, t: Array, batch_size: int | None = None) -> dict[str, Any]:
        """Return the loss and the metrics of images x with targets t, by name; see
        ``Model.evaluate``."""
        loss = self.loss.for_evaluation()
        return self.model.evaluate(x, t, loss=loss, metrics=self.metrics, batch_size=batch_size)

    def predict_proba(self, x: Array, batch_size: int | None = None) -> Array:
        """Return probabilities for images x, (N, C, ...): the softmax or sigmoid of the outputs,
        as the loss has it. Outputs of a regression are returned as they are."""
        return self.loss.scores(self.model.predict(x, batch_size))

    def predict_classes(self, x: Array, batch_size: int | None = None) -> Array:
        """Return predictions for images x: the class of each (N, ...) int64, or for multi-label
        losses 0 or 1 for each label (N, C). -1 where an output is NaN.

        Raises:
            ArgumentError: if the loss is not one of classes.
        """
        if self.loss.task not in ("multiclass", "multilabel"):
            raise ArgumentError(
                f"{type(self.loss).__name__} has no classes; use model.predict(x) for the values"
            )
        return self.loss.predictions(self.model.predict(x, batch_size))

    def __repr__(self) -> str:
        done = f"{self.epoch} of {self.epochs} epochs done"
        figures = ", ".join(
            f"{name} {each[-1]:.4g}"
            for name, each in self.history.items()
            if each and name.startswith(("train_", "test_")) and isinstance(each[-1], float)
        )
        return (
            f"Trainer({type(self.model).__name__} on {self.backend}, "
            f"{type(self.loss).__name__}, "
            f"{type(self.optimizer).__name__}(lr={self.optimizer.lr:g}), "
            f"{self._sets.train.count} training images, batch_size={self.batch_size}, {done}"
            f"{', ' if figures else ''}{figures})"
        )

    # --- views ------------------------------------------------------------------------------------

    @property
    def x_train(self) -> Array:
        """The training images, checked."""
        return self._sets.train.images

    @property
    def t_train(self) -> Array:
        """The training targets, checked."""
        return self._sets.train.targets

    @property
    def x_test(self) -> Array | None:
        """The test images, checked; None if there are none."""
        return None if self._sets.test is None else self._sets.test.images

    @property
    def t_test(self) -> Array | None:
        """The test targets, checked; None if there are none."""
        return None if self._sets.test is None else self._sets.test.targets

    @property
    def epoch_loss_list(self) -> list[float]:
        """``history["train_loss"]``: the mean loss of every epoch's batches."""
        return self.history["train_loss"]

    @property
    def test_loss_list(self) -> list[float]:
        """``history["test_loss"]``; empty without a test set."""
        return self.history.get("test_loss", [])

    @property
    def train_acc_list(self) -> list[float]:
        """``history["train_accuracy"]``; empty if accuracy is not among the metrics."""
        return self.history.get("train_accuracy", [])

    @property
    def test_acc_list(self) -> list[float]:
        """``history["test_accuracy"]``; empty if there is none."""
        return self.history.get("test_accuracy", [])


def _smoothed(loss: Loss, label_smoothing: float) -> Loss:
    """Return the loss with label smoothing. Raises ArgumentError if it has none."""
    if not isinstance(loss, losses.CrossEntropy) or loss.label_smoothing:
        raise ArgumentError(
            "label_smoothing is an option of the cross-entropy; set it there if you give a loss: "
            "loss=CrossEntropy(label_smoothing=0.1)"
        )
    return replace(loss, label_smoothing=label_smoothing)


def _check_takes_weights(loss: Loss) -> None:
    """Raise ArgumentError unless the loss takes ``class_weight`` and has none yet."""
    if not isinstance(loss, losses.CrossEntropy):
        raise ArgumentError(
            f"class_weight is an option of the cross-entropy, the loss is {type(loss).__name__}; "
            "use sample_weight, or the loss's own: Focal(alpha=...), BCEWithLogits(pos_weight=...)"
        )
    if loss.weight is not None:
        raise ArgumentError("the loss has class weights already; leave class_weight out")


def _weighted(loss: Any, class_weight: Any, t: Array, model: Model) -> Loss:
    """Return the cross-entropy with a weight for each class. ``t``: the targets that are trained
    on, checked."""
    weights = class_weights(class_weight, t, model.output_shape[0], ignore_index=loss.ignore_index)
    return replace(loss, weight=weights)


def _check_trainable(model: Model) -> None:
    """Raise StateError if the model has parameters and all of them are frozen."""
    if model.named_parameters() and not learns(model):
        raise StateError(
            'all parameters are frozen, so there is nothing to train; call model.unfreeze("fc") '
            "for those to train",
            model.where,
        )


def _check_precision(precision: Any, model: Model) -> str:
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
