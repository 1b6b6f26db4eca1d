"""Train a model: ``Trainer`` holds a model, data and an optimizer, and runs epochs of shuffled
batches.

A step is one forward pass, one backward pass and one update. Losses stay on the device. They are
copied to the host together, every ``LOG_EVERY`` steps and at the end of an epoch. A step itself
copies nothing to the host. A loss that is not finite stops all updates from that step on, so if
training ends with an error, the weights are those before the step.
"""

import logging
import os
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from copy import copy
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any, Literal, Self

from portacnn import losses
from portacnn.arguments import answering_keywords, either, not_negative, share
from portacnn.augment import Transform
from portacnn.distributed import Communicator, connect, taking_down
from portacnn.errors import ArgumentError, CheckpointError, NotFiniteError, StateError
from portacnn.files import save_tensors
from portacnn.losses import Loss
from portacnn.metrics import Metric, metrics_for
from portacnn.models import Model
from portacnn.optim import Optimizer, make_optimizer
from portacnn.runtime import Array, Backend, HostArray
from portacnn.schedules import Schedule
from portacnn.seeds import check_seed
from portacnn.training.augmenting import make_augmenter
from portacnn.training.callbacks.base import Callback
from portacnn.training.callbacks.running import Callbacks, split
from portacnn.training.checkpoint import contents, describe_training
from portacnn.training.early_stopping import EarlyStopping, make_early_stopping
from portacnn.training.evaluating import Evaluating
from portacnn.training.facts import facts
from portacnn.training.feed import make_feed
from portacnn.training.history import History, View
from portacnn.training.options import (
    FROM_CHECKPOINT,
    KEYWORDS,
    OF_TRAINER,
    Options,
    check_precision,
    check_sizes,
    check_takes_weights,
    check_trainable,
    smoothed,
    step_schedule,
    weighted,
)
from portacnn.training.progress import Progress
from portacnn.training.ranks import Ranks
from portacnn.training.resuming import resumed
from portacnn.training.saving import Saver
from portacnn.training.sets import Sets
from portacnn.training.shares import Split, batch_sizes
from portacnn.training.signals import interrupted_between_steps
from portacnn.training.step import StepState, Updater

LOG_EVERY = 50
_log = logging.getLogger("portacnn")
_NOT_COPIED = {"backend", "_feed", "_sets"}


class Trainer(Evaluating):
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
            half of the device's free memory. Memory maps, a ``portacnn.data.Dataset``, any object
            with ``__len__`` and ``__getitem__``, and for x_train a ``portacnn.data.Stream`` are
            read batch by batch (docs/data.md).
            Without a test set only the training set is evaluated.
        t_train, t_test: targets that the loss takes. For the cross-entropy: labels, integers (N,)
            or one-hot (N, classes). None for a ``Dataset`` or a ``Stream``, which have their own.
        loss: a word or an object of ``portacnn.losses``.
        metrics: words or objects of ``portacnn.metrics``, evaluated after each epoch; a mapping
            sets their names. The default depends on the loss: accuracy for the cross-entropy.
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
        lr: learning rate, for an optimizer given by name. The default depends on the optimizer.
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
        augment: transforms of ``portacnn.augment`` that change the images of each training batch,
            in this order, or words for them: "standard", "horizontal_flip,random_crop=2"
            (``augment.named``). Sets that are evaluated are not changed.
        early_stopping: an ``EarlyStopping``, or its patience in epochs.
        callbacks: ``Callback`` objects of ``portacnn.callbacks``, called in this order. An
            ``EarlyStopping`` may be among them.
        evaluate_sample_num_per_epoch: number of images, from the first, of either set that
            accuracies are computed on after each epoch. None takes all.
        seed: seed of the batch order. None draws one.
        precision: dtype that the factors of products are rounded to during training, on devices
            that are faster that way (``ops.use_precision``). Weights and activations stay float32.
        compile_step: let the backend compile a whole step (CuPy, and torch on CUDA: a CUDA graph;
            torch on a CPU: ``torch.compile``; JAX: one program of XLA). Other backends run the step
            as usual, and so do several processes. A compiled step does not see later changes to the
            Trainer or its optimizer, except ``lr``. None, the default, compiles on JAX, unless a
            subclass overrides ``step``.
        checkpoint_dir: folder for checkpoints, which ``Trainer.resume`` reads. None writes only
            those requested with ``checkpoint``. Several training runs may share a folder.
        checkpoint_every: steps between checkpoints. None writes one after each epoch. One is also
            written at the end, and when training is stopped with ``stop``.
        keep: number of checkpoints to keep in the folder.
        verbose: show a progress bar.
        distributed: train together with other processes, which a launcher (mpiexec, srun) has
            started: "mpi", "nccl", "auto" (docs/scaling.md), or a
            ``portacnn.distributed.Communicator``. Each takes its share of every batch, so
            that n processes train as one does. All are given the same arguments; rank 0 writes
            files and shows the progress.
        sync_batch_norm: compute batch norm's statistics over the batches of all processes, in
            their forward and backward passes. Otherwise each uses those of its share, and running
            statistics are averaged.
        compress_gradients: "bfloat16" or "float16" rounds gradients on their way between processes,
            which halves the traffic.

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
        batch_sizes: number of images in each batch of an epoch, of all processes.
        stopped_early: whether ``early_stopping`` has ended the training run.
        last_checkpoint: path of the checkpoint written last, None before the first.
        updater: runs the steps (``step.Updater``). It holds ``optimizer``, ``loss``, ``clip_norm``,
            ``precision`` and ``compile_step``.

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
        x_train: Any,
        t_train: Any = None,
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
        augment: Sequence[Transform | str] | Transform | str | None = None,
        early_stopping: EarlyStopping | int | None = None,
        callbacks: Iterable[Callback | EarlyStopping] | Callback | EarlyStopping | None = None,
        evaluate_sample_num_per_epoch: int | None = None,
        seed: int | None = 0,
        precision: Literal["float32", "tf32", "bfloat16", "float16", "3xtf32"] = "float32",
        compile_step: bool | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        keep: int = 3,
        verbose: bool = True,
        distributed: Literal["auto", "mpi", "nccl"] | Communicator | None = None,
        sync_batch_norm: bool = False,
        compress_gradients: Literal["bfloat16", "float16"] | None = None,
    ) -> None:
        self.model = model
        self.backend: Backend = model.home
        self.ranks = Ranks(connect(distributed, model.home))
        check_trainable(model)
        options = Options(
            epochs=epochs,
            batch_size=either(100, batch_size=batch_size, mini_batch_size=mini_batch_size),
            drop_last=drop_last,
            schedule_unit=schedule_unit,
            clip_norm=clip_norm,
            validation_split=validation_split,
            accumulate=accumulate,
            evaluate_sample_num_per_epoch=evaluate_sample_num_per_epoch,
            seed=self.ranks.share(check_seed(seed)),
            precision=precision,
            compile_step=compile_step,
            checkpoint_every=checkpoint_every,
            keep=keep,
            verbose=verbose,
            sync_batch_norm=sync_batch_norm,
            compress_gradients=compress_gradients,
        )
        self.epochs, self.batch_size = options.epochs, options.batch_size
        self.drop_last, self.accumulate = options.drop_last, options.accumulate
        self.evaluate_sample_num_per_epoch = options.evaluate_sample_num_per_epoch
        self.validation_split, self.seed = options.validation_split, options.seed
        self.schedule_unit, self.verbose = options.schedule_unit, options.verbose
        optimizer = make_optimizer(optimizer, optimizer_param, lr=lr)
        optimizer.check(model.named_parameters())
        sets = x_train if isinstance(x_train, Sets) else None
        loss = losses.named(loss) if sets is None else sets.loss
        if label_smoothing:
            loss = smoothed(loss, share("label_smoothing", label_smoothing))
        if class_weight is not None:
            check_takes_weights(loss)
        self.metrics = metrics_for(loss, metrics)
        self.ranks.check_metrics(self.metrics)
        if sets is None:
            data = (x_train, t_train, x_test, t_test, sample_weight)
            part = self.ranks.rank, self.ranks.size
            sets = Sets.take(model, loss, *data, self.validation_split, self.seed, part)
        if class_weight is not None:
            if sets.train.stream is not None and isinstance(class_weight, str):
                raise ArgumentError(
                    f'class_weight="{class_weight}" counts all labels, which a Stream does not '
                    "have; pass a number for each class"
                )
            loss = weighted(loss, class_weight, sets.train.targets, model)
            sets = replace(sets, loss=loss)
        self._sets = sets
        called, stopping = split(callbacks, early_stopping)
        self.callbacks = Callbacks(called, self.ranks.is_first)
        self.early_stopping = make_early_stopping(stopping, self.metrics, sets.test is not None)
        check_sizes(model, sets, options, self.ranks.size)
        self.batch_sizes = batch_sizes(sets.train.count, self.batch_size, self.drop_last)
        self.steps_per_epoch = len(self.batch_sizes)
        self._feed = make_feed(model, sets.train, loss)
        self._augmenter = make_augmenter(augment, model, sets, loss, self.seed)
        check_precision(precision, model)
        before = 0 if self.ranks.alone else self._augmenter.looks_back
        parts = Split(options.part, self.ranks.rank, self.ranks.size, before)
        self.updater = Updater(model, optimizer, loss, options, parts, self.ranks)
        self.schedule = step_schedule(
            schedule, schedule_unit, self.epochs, self.steps_per_epoch, optimizer.lr
        )
        self._history = History(self.metrics, sets.test is not None)
        self.epoch = self.batch = 0
        self.stopped_early = False
        self._best_weights: dict[str, HostArray] | None = None
        self._range: tuple[float, ...] | None = None  # of the training images, once known
        self._stop = False
        self._last_lr = 0.0  # of the last step
        self._fingerprints: dict[str, Any] | None = None
        self._saver = Saver(options.checkpoint_every, options.keep)
        self.run = self.ranks.share(self.run)
        self.ranks.agree(lambda: facts(self))
        if checkpoint_dir is not None:
            self.ranks.on_first(lambda: describe_training(self) and None)
            self.checkpoint_dir = self.ranks.folder(checkpoint_dir)

    # stored in parts of the Trainer
    augment = View[tuple[Transform, ...]]("_augmenter", "transforms")
    clip_norm = View[float | None]("updater", "clip_norm")
    precision = View[str]("updater", "precision")
    compile_step = View[bool | None]("updater", "compile_step")
    sync_batch_norm = View[bool]("updater", "sync_batch_norm")
    compress_gradients = View[str | None]("updater", "compress_gradients")
    run = View[str]("_saver", "run")
    checkpoint_dir = View[Path | None]("_saver", "folder")
    checkpoint_every = View[int | None]("_saver", "every")
    keep = View[int]("_saver", "keep")
    last_checkpoint = View[Path | None]("_saver", "last")

    @classmethod
    @answering_keywords("Trainer.resume", FROM_CHECKPOINT)
    def resume(
        cls,
        path: str | os.PathLike[str],
        x_train: Any,
        t_train: Any = None,
        x_test: Array | None = None,
        t_test: Array | None = None,
        *,
        sample_weight: Array | None = None,
        loss: Loss | None = None,
        metrics: Iterable[str | Metric] | Mapping[str, str | Metric] | None = None,
        augment: Sequence[Transform | str] | Transform | str | None = None,
        callbacks: Iterable[Callback | EarlyStopping] | Callback | EarlyStopping | None = None,
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
        distributed: Literal["auto", "mpi", "nccl"] | Communicator | None = None,
    ) -> Self:
        """Return a Trainer that continues from a checkpoint; ``train`` resumes with the next batch.

        On the same backend every later loss and weight is bitwise what it would have been without
        the interruption. On another backend batches and dropout masks are the same, and values are
        as close as docs/portability.md states.

        Args:
            path: a checkpoint, or a folder of checkpoints: then the newest intact one is read.
            x_train, t_train, x_test, t_test: the data of the training run. Checkpoints do not hold
                them.
            sample_weight: that of the training run. Checkpoints do not hold it.
            loss, metrics, augment: those of the training run if they are your own, which files
                cannot hold.
            callbacks: as many of the same classes as the training run had, which get their states.
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
            distributed: as for ``Trainer``, whatever the training run was before. The number of
                processes may be another one.

        Raises:
            ModelFormatError: if there is no intact checkpoint, or it does not describe a training
                run.
            FileNotFoundError: if the folder has no checkpoint.
            ArgumentError: if the data are not those of the training run, a function must be passed
                again, or the device does not support the precision.
            BackendError: if the device is unavailable.
        """
        return resumed(
            cls,
            path,
            (x_train, t_train, x_test, t_test),
            sample_weight=sample_weight,
            loss=loss,
            metrics=metrics,
            augment=augment,
            callbacks=callbacks,
            device=device,
            model=model,
            schedule=schedule,
            checkpoint_dir=checkpoint_dir,
            distributed=distributed,
            options={
                "epochs": epochs,
                "checkpoint_every": checkpoint_every,
                "keep": keep,
                "precision": precision,
                "compile_step": compile_step,
                "verbose": verbose,
            },
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle holds: model, optimizer and figures, and the data as NumPy
        arrays."""
        self._read_losses()
        state = {name: value for name, value in vars(self).items() if name not in _NOT_COPIED}
        state["_sets"] = self._sets.on_host()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.backend = self.model.home
        self._sets = self._sets.on(self.model)
        self._feed = make_feed(self.model, self._sets.train, self._sets.loss)
        # a shallow copy's own
        self.updater, self._history = copy(self.updater), copy(self._history)
        self._saver = copy(self._saver)
        optimizer_state = self.optimizer.state_dict()
        for arrays in self.optimizer.state.values():
            arrays.clear()  # to be laid out like the parameters
        self.optimizer.load_state_dict(optimizer_state, self.model.named_parameters())

    def lr(self, step: int) -> float:
        """Return the learning rate at ``step``, counted from 0 over all epochs."""
        return not_negative(
            f"the schedule's learning rate at step {step}", self.schedule(step, self.optimizer.lr)
        )

    @property
    def steps_done(self) -> int:
        """The number of finished steps. An epoch that was interrupted by an error does not
        count."""
        return self.epoch * self.steps_per_epoch + self.batch

    @property
    def finished(self) -> bool:
        """Whether all epochs are done or ``early_stopping`` has ended the training run."""
        return self.epoch >= self.epochs or self.stopped_early

    def stop(self) -> None:
        """Make ``train`` return after the current step, on all processes. It writes a checkpoint,
        and ``train`` can be called again.

        Use it from signal handlers (``stopping_on_signals``), other threads, and code that runs
        within a step.
        """
        self._stop = True

    def checkpoint(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write a checkpoint to ``path``, or into ``checkpoint_dir``; return its path. Call it
        between steps. Of several processes, rank 0 writes; others need not call it.

        Raises:
            CheckpointError: if it could not be written (the disk is full, for example); earlier
                checkpoints are unchanged. Also if another Trainer, in this process or another, is
                training the same run into the same folder.
            ArgumentError: if there is neither a path nor a folder, or a file cannot hold the
                optimizer.
            NotFiniteError: as for ``train``.
        """
        self._saver.place(path)
        self._read_losses()
        return self._save(path) if self.ranks.is_first else self._saver.place(path)

    def _save(self, path: str | os.PathLike[str] | None = None) -> Path:
        tensors, header = contents(self)
        return self._saver.save(
            path, self.steps_done, lambda file: save_tensors(file, tensors, header)
        )

    def _save_due(self) -> None:
        """Write a checkpoint that is due into the folder. If rank 0 cannot, all ranks raise."""
        self._read_losses()
        self._saver.last = Path(self.ranks.on_first(lambda: str(self._save())))

    def fingerprints(self) -> dict[str, Any]:
        """Return the fingerprints of the data (``feed.fingerprint``), by "train" and "test"."""
        if self._fingerprints is None:
            self._fingerprints = self._sets.fingerprints()
        return self._fingerprints

    @answering_keywords("train", OF_TRAINER)
    def train(self) -> None:
        """Train until ``epochs`` epochs are done, early stopping ends it, or ``stop`` is called.

        If it is called again, it continues where it stopped. Ctrl-C in the main thread calls
        ``stop``: the current step is finished, a checkpoint is written, and then KeyboardInterrupt
        is raised. A training run continued after that gives bitwise the same results as one that
        was never interrupted.

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
        self.model.check_scale(False)
        try:
            with (
                interrupted_between_steps(self),
                taking_down(self.ranks.communicator),
                self._sole(),
            ):
                self._train()
        finally:
            self._stop = False
            self.model.check_scale(True)

    @contextmanager
    def _sole(self) -> Iterator[None]:
        """Lock the folder of checkpoints, see ``Saver.sole``; rank 0 does."""
        with ExitStack() as stack:
            self.ranks.on_first(lambda: stack.enter_context(self._saver.sole()))
            yield

    def _train(self) -> None:
        if self.model.backend != self.backend:
            raise StateError(
                f"the model was moved from {self.backend} to {self.model.backend}; make a new "
                "Trainer for it"
            )
        self.updater.check_model()
        if self.finished:
            why = (
                "early stopping has ended the training run"
                if self.stopped_early
                else f"all {self.epochs} epochs are done"
            )
            cure = (
                "make a new Trainer to continue from these weights"
                if self.stopped_early
                else "set a larger trainer.epochs to continue"
            )
            if self.ranks.is_first:
                _log.warning("train() has nothing to do: %s; %s", why, cure)
            return
        batches = self.steps_per_epoch
        self._history.cut(self.steps_done, self.epoch)  # what an interrupted epoch has left
        self.updater.start_over()
        self.ranks.begin(self.model)
        shown = self.verbose and self.ranks.is_first
        with (
            self.backend.active(),
            self.callbacks.training(self),
            Progress(self.epochs * batches, self.steps_done, shown) as progress,
        ):
            try:
                while not self.finished:
                    if self._run_epoch(progress):
                        break
            except BaseException as error:
                done, self.batch = self.batch, 0  # a step may be incomplete
                if self.callbacks.raised or isinstance(error, CheckpointError):
                    self._read_losses()
                    self.batch = done
                if self.finished:
                    self._take_best()
                raise
            finally:
                self.updater.release_memory()
            if self.finished:
                self._take_best()

    def order(self, epoch: int) -> HostArray:
        """Return which training images the batches of an epoch, from 0, have, in their order: int64
        on the host. With ``drop_last`` the last images of the order are left out."""
        return self._sets.train.order(self.seed, epoch)[: sum(self.batch_sizes)]

    def read(self, epoch: int, first: int = 0) -> Generator[tuple[Array, ...], None, None]:
        """Yield the batches of an epoch, from 0, for ``run_batch``: of each, the images that this
        process has.

        Args:
            first: how many batches are left out.
        """
        order = self.order(epoch)[first * self.batch_size :]
        own, sizes = self.updater.split.epoch(order, self.batch_sizes[first:])
        return self._feed.epoch(own, sizes, epoch)

    def _run_epoch(self, progress: Progress) -> bool:
        """Run the rest of an epoch, or the part of it before ``stop``; write the checkpoints that
        are due.

        ``stop`` may be called at any moment, for example by a signal handler. It is read once after
        each step, so training never ends without its checkpoint.

        Returns:
            Whether to stop.
        """
        batches = self.steps_per_epoch
        sizes = self.batch_sizes[self.batch :]
        if self.batch == 0:
            self.callbacks.epoch_begins(self)
        every_step = self.callbacks.every_step
        began = time.perf_counter()
        with closing(self.read(self.epoch, self.batch)) as read:
            for size, batch in zip(sizes, read, strict=False):
                self.run_batch(*batch, size=size)
                self.batch += 1
                self.callbacks.updated(self, self.updater.ok)
                progress.step()
                if every_step:
                    self._read_losses()
                    self.callbacks.step_ends(self, self.train_loss_list[-1])
                stop = self.ranks.any(self._stop)
                due = stop or self._saver.is_due(self.steps_done)
                if self.batch % LOG_EVERY == 0 or self.batch == batches or due:
                    self._read_losses()
                    progress.show(self.epoch + 1, loss=self.train_loss_list[-1])
                if self.batch == batches:
                    break
                if due and self.checkpoint_dir is not None:
                    self._save_due()
                if stop:
                    return True
        self._end_epoch(began, sum(sizes))
        figures = self._history.last()
        progress.epoch(self.epoch, figures)
        self.callbacks.epoch_ends(self, figures)
        stop = self.ranks.any(self._stop)
        due = self._saver.is_due(self.steps_done) or self.checkpoint_every is None
        if self.checkpoint_dir is not None and (due or self.finished or stop):
            self._save_due()
        return stop

    def run_batch(self, *batch: Array, size: int | None = None) -> None:
        """Run one step with a batch of the training set, as ``train`` does for each batch.

        Nothing is read from the device: the loss stays there until ``train`` fetches it.

        Args:
            batch: indices of the images, int64 (B,) on the model's device. If the training set is
                on the host, images and labels instead (see ``feed.Streamed``). Of several
                processes, each passes its images, as from ``read``.
            size: number of images in the batch, of all processes. The default is that all pass as
                many.

        Raises:
            OutOfMemoryError: if there is not enough memory. Weights and statistics are those from
                before this step.
            StateError: if the model was built again or changed since the Trainer was made.
        """
        self.updater.check_model()
        number = self._history.count
        self._last_lr = self.lr(number)
        # what a subclass does in each step would be done once
        own = getattr(self.step, "__func__", None) is not Trainer.step
        asked = self.compile_step is not None or not own
        may_record = asked and not self.callbacks.inside_step
        report = self.updater.run(
            self._whole_step,
            batch,
            number,
            self._last_lr,
            share=None if self.ranks.alone else self.updater.share_of(batch[0].shape[0], size),
            may_record=may_record,
        )
        self._history.add(report)

    def _whole_step(self, *batch_and_state: Any) -> tuple[Array, Array]:
        """Run a step from a batch as the feed returns it.

        Returns:
            The step's report, (loss, whether all was finite), and the new ``state.ok``.
        """
        *batch, state = batch_and_state
        xp = self.backend.xp
        x, t, *weight, indices = self._feed.batch(*batch)
        if self.augment:
            epoch = state.step // self.steps_per_epoch
            x, t, *weight = self._augmenter(x, t, *weight, epoch=epoch, indices=indices)
        if state.share is not None:
            x, t, *weight = (state.share.own(part) for part in (x, t, *weight))
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
        return self.updater.step(x, t, state, weight)

    def _read_losses(self) -> None:
        """Fetch the losses that have accumulated on the device."""
        step = self._history.read(self.backend)
        if step is not None:
            loss = self.train_loss_list[step]
            elsewhere = ", but its gradients or running statistics are not finite"
            raise NotFiniteError(
                f"the loss of step {step + 1} (epoch {self.epoch + 1}) is "
                f"{loss}{elsewhere if isfinite(loss) else ''}; the weights are those before that "
                f"step. Lower the learning rate ({self.lr(step)})"
            )
