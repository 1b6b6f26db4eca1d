"""``Trainer``: a model, data and an optimizer; epochs of shuffled batches; losses and accuracies as
lists.

A step is one forward pass, one backward pass and one update. Losses stay on the device and are
fetched together, every ``LOG_EVERY`` steps and at the end of an epoch; a step itself reads nothing
back. A loss that is not finite stops all updates from that step on, so when training ends with an
error the weights are those before it.
"""

import errno
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from traceback import clear_frames
from typing import Any, Literal, Self
from weakref import WeakMethod

from portacnn import ops
from portacnn.arguments import (
    answering_keywords,
    flag,
    not_negative,
    one_of,
    positive,
    share,
    whole,
)
from portacnn.errors import (
    ArgumentError,
    CheckpointError,
    NotFiniteError,
    OutOfMemoryError,
    StateError,
)
from portacnn.files import make_folder, save_tensors
from portacnn.layers import at_step, one_backward_pass
from portacnn.layers.running import run
from portacnn.models import Model
from portacnn.ops.dispatch import PRECISIONS
from portacnn.ops.layout import pack
from portacnn.ops.workspace import Workspace, run_in
from portacnn.optim import Optimizer, make_optimizer
from portacnn.runtime import VARIABLE, Array, Backend, HostArray, backend_of, resolve
from portacnn.schedules import PerEpoch, Schedule, make_schedule
from portacnn.seeds import check_seed, permutation
from portacnn.training import folder
from portacnn.training.checkpoint import Checkpoint, contents, describe_training
from portacnn.training.early_stopping import EarlyStopping, make_early_stopping
from portacnn.training.feed import batch_sizes, fingerprint, make_feed, part_sizes, take_set
from portacnn.training.progress import Progress
from portacnn.training.signals import interrupted_between_steps

LOG_EVERY = 50
KEYWORDS = {
    "batch_size": "mini_batch_size",
    "lr": 'optimizer_param={"lr": ...}',
    "learning_rate": 'optimizer_param={"lr": ...}',
    "momentum": 'optimizer="momentum", optimizer_param={"momentum": ...}',
    "weight_decay": 'optimizer_param={"weight_decay": ...}',
    "num_epochs": "epochs",
    "max_epochs": "epochs",
    "device": "device where the model is made; the data follow it there",
}
"""What the Trainer's arguments are that other libraries call by these names."""
_log = logging.getLogger("portacnn")
_DATA = ("x_train", "t_train", "x_test", "t_test")
_NOT_COPIED = {"backend", "_feed", "_unread", "_ok", "_step", "_workspace"}


@dataclass(frozen=True)
class StepState:
    """What a step needs besides its batch, and what is different at each.

    A backend that records the step and replays it (``Backend.compile_step``) puts 0-dimensional
    arrays on the device in place of the numbers, int64 and float64, so that a step finds its own
    there.

    Attributes:
        step: its number in the whole training, from 0.
        lr: its learning rate.
        count: which of the optimizer's updates it makes, from 1.
        ok: 0-dimensional boolean: whether all steps so far were finite. If not, nothing is updated
            any more.
    """

    step: Any
    lr: Any
    count: Any
    ok: Array


class Trainer:
    """Trains a built ``Model``.

    Args:
        model: on its device already; the data follow it there.
        x_train, x_test: images (N, *input_shape), floating point, or uint8 where the model has a
            ``preprocess``. They are kept as they come, so uint8 takes a quarter of float32's
            memory: on the model's device, or where they would take more than half of what is free
            there, on the host.
        t_train, t_test: labels, integers (N,) or one-hot (N, classes).
        epochs: how often to go through the training images. Each epoch shuffles them anew, by
            ``seed`` and its number.
        mini_batch_size: images a step; the last batch of an epoch may be shorter.
        drop_last: leave out of every epoch the last images of its order that make no whole batch.
        optimizer: "sgd", "momentum", "adagrad", "rmsprop", "adam", "adamw", or an ``Optimizer``.
        optimizer_param: the optimizer's arguments, such as {"lr": 0.001, "weight_decay": 1e-4}.
        schedule: how the learning rate goes on from the optimizer's: a schedule of
            ``portacnn.schedules`` or any function of (step, lr), or a name that stands for one over
            all the steps: "step", "cosine", "warmup_cosine", "one_cycle".
        schedule_unit: whether the schedule counts "step"s or "epoch"s.
        clip_norm: how long all gradients together may be at most (``ops.clip_by_global_norm``);
            None leaves them as they are.
        label_smoothing: the share of every label spread over all classes, while training.
        accumulate: in how many parts of like size a batch is taken through the network, one after
            the other, to need less memory. Their gradients add up to the batch's: only batch
            statistics (BatchNorm) see the parts.
        early_stopping: an ``EarlyStopping``, or its patience in epochs.
        evaluate_sample_num_per_epoch: how many of the first images of either set the accuracies
            after each epoch are taken over; None takes all.
        seed: for the order of the batches; None takes a fresh one.
        precision: what the factors of products are rounded to while training, on devices that are
            faster so (``ops.use_precision``); weights and activations stay float32.
        compile_step: let the backend record a whole step and replay it (CuPy: a CUDA graph); others
            run it as it is. What is set on the Trainer or its optimizer after that, but for ``lr``,
            the recorded step does not see.
        checkpoint_dir: a folder for checkpoints, from which ``Trainer.resume`` goes on as if
            nothing had happened. None: no checkpoints but those that are asked for
            (``checkpoint``). Several trainings may share one.
        checkpoint_every: after how many steps to write one; None: after each epoch. There is one at
            the end in any case, and where training is told to ``stop``.
        keep: how many to keep in the folder.
        verbose: show a progress bar.

    Attributes:
        train_loss_list: the loss of every step.
        epoch_loss_list: its mean over the images of every epoch.
        train_acc_list, test_acc_list: the accuracies after every epoch.
        test_loss_list: the mean loss over the test images after every epoch, where
            ``early_stopping`` watches it.
        epoch: epochs done. ``batch``: batches done of the epoch after them.
        stopped_early: whether ``early_stopping`` has ended the training.
        last_checkpoint: the file written last; None before the first.

    Raises:
        ShapeError, LabelError, ArrayError, NotFiniteError, ArgumentError: bad data or numbers,
            before anything is changed.
        OSError: a folder for checkpoints that cannot be made or written to.
    """

    @answering_keywords("Trainer", KEYWORDS)
    def __init__(
        self,
        model: Model,
        x_train: Array,
        t_train: Array,
        x_test: Array,
        t_test: Array,
        *,
        epochs: int = 20,
        mini_batch_size: int = 100,
        drop_last: bool = False,
        optimizer: str | Optimizer = "adam",
        optimizer_param: Mapping[str, Any] | None = None,
        schedule: Schedule | str | None = None,
        schedule_unit: Literal["step", "epoch"] = "step",
        clip_norm: float | None = None,
        label_smoothing: float = 0.0,
        accumulate: int = 1,
        early_stopping: EarlyStopping | int | None = None,
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
        self.epochs = whole("epochs", epochs, 0)
        self.mini_batch_size = whole("mini_batch_size", mini_batch_size, 1)
        self.evaluate_sample_num_per_epoch = evaluate_sample_num_per_epoch
        if evaluate_sample_num_per_epoch is not None:
            whole("evaluate_sample_num_per_epoch", evaluate_sample_num_per_epoch, 1)
        if optimizer_param is None and optimizer == "adam":
            optimizer_param = {"lr": 0.001}
        self.optimizer = make_optimizer(optimizer, optimizer_param)
        self.optimizer.check(model.named_parameters())
        self.clip_norm = None if clip_norm is None else positive("clip_norm", clip_norm)
        self.label_smoothing = share("label_smoothing", label_smoothing)
        self.accumulate = whole("accumulate", accumulate, 1)
        if self.accumulate > self.mini_batch_size:
            raise ArgumentError(
                f"a batch of mini_batch_size={mini_batch_size} has no {accumulate} "
                "parts (accumulate)"
            )
        self.early_stopping = make_early_stopping(early_stopping)
        self.seed = check_seed(seed)
        self.verbose = verbose
        self.x_train, self.t_train = take_set(model, x_train, t_train, "train")
        self.x_test, self.t_test = take_set(model, x_test, t_test, "test")
        if self.mini_batch_size > self.x_train.shape[0]:
            raise ArgumentError(
                f"mini_batch_size is {mini_batch_size}, but there are only {self.x_train.shape[0]} "
                "training images"
            )
        self.drop_last = flag("drop_last", drop_last)
        self._sizes = batch_sizes(self.x_train.shape[0], self.mini_batch_size, self.drop_last)
        self.steps_per_epoch = len(self._sizes)
        self._part = -(-self.mini_batch_size // self.accumulate)  # images at a time, at most
        self._check_parts()
        self._feed = make_feed(model, self.x_train, self.t_train)
        self.compile_step = bool(compile_step)
        self.precision = _check_precision(precision, model)
        self.schedule = self._take_schedule(schedule, schedule_unit)
        self.schedule_unit = schedule_unit
        self.train_loss_list: list[float] = []
        self.epoch_loss_list: list[float] = []
        self.train_acc_list: list[float] = []
        self.test_acc_list: list[float] = []
        self.test_loss_list: list[float] = []
        self.epoch = self.batch = 0
        self.stopped_early = False
        self._best_weights: dict[str, HostArray] | None = None
        self._unread: list[Array] = []  # the reports of steps, still on the device
        self._ok = self._fine()
        self._step: Any = None
        self._workspace = Workspace()
        self._stop = False
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
        # the folder that no other Trainer of this run writes to now
        self._sole_in: Path | None = None

    @classmethod
    @answering_keywords("Trainer.resume", KEYWORDS)
    def resume(
        cls,
        path: str | os.PathLike[str],
        x_train: Array,
        t_train: Array,
        x_test: Array,
        t_test: Array,
        *,
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
        """A Trainer made of a checkpoint; its ``train`` goes on with the very batch that would have
        come.

        On the same backend every later loss and weight is what the training would have given
        without a break, to the bit; on another the batches and dropout's masks are the same, and
        the values are as near as docs/portability.md says.

        Args:
            path: a checkpoint, or a folder of them: then the newest that is whole.
            x_train, t_train, x_test, t_test: the data of the training, which no checkpoint holds.
            device: where to go on, see ``portacnn.resolve``; by default what the variable
                ``PORTACNN_BACKEND`` says, else where the training was.
            model: a built model of the same layers, for a checkpoint that cannot say how to build
                its own. It gets the weights.
            epochs: how many in all, where they are to be others than before. A schedule stays what
                it was.
            schedule: instead of the checkpoint's; needed where that was a function of one's own,
                which no file holds.
            checkpoint_dir: by default the folder that ``path`` is in.
            precision: instead of the checkpoint's, which the device may not have.
            checkpoint_every, keep, compile_step, verbose: instead of the checkpoint's.

        Raises:
            ModelFormatError: no whole checkpoint, or one that describes no training.
            FileNotFoundError: none in the folder.
            ArgumentError: other data than the training's; a function that has to be given again; a
                precision that the device does not have.
            BackendError: the device cannot be had here.
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
        train, test = (
            take_set(model, x_train, t_train, "train"),
            take_set(model, x_test, t_test, "test"),
        )
        fingerprints = {"train": fingerprint(*train), "test": fingerprint(*test)}
        saved.check_data(fingerprints)
        chosen = {
            "epochs": epochs,
            "checkpoint_every": checkpoint_every,
            "keep": keep,
            "precision": precision,
            "compile_step": compile_step,
            "verbose": verbose,
        }
        arguments = saved.arguments() | {
            name: value for name, value in chosen.items() if value is not None
        }
        # else it is nonsense, and the file's fault
        if precision is not None or arguments["precision"] in PRECISIONS:
            try:
                _check_precision(arguments["precision"], model)
            except ArgumentError as error:
                raise ArgumentError(
                    f'{error}. Give another: resume(..., precision="float32")', str(file)
                ) from error
        arguments["schedule"] = schedule if schedule is not None else saved.schedule()
        # what is wrong with them is not the file's fault
        if epochs is not None or schedule is not None:
            made = cls(model, *train, *test, **arguments)
            trainer = saved.made(lambda: made)
        else:
            trainer = saved.made(lambda: cls(model, *train, *test, **arguments))
        trainer._fingerprints = fingerprints
        trainer.checkpoint_dir = make_folder(
            file.parent if checkpoint_dir is None else checkpoint_dir
        ).absolute()
        if trainer.finished:
            trainer._take_best()
        return trainer

    def _check_parts(self) -> None:
        """Raise ArgumentError where a batch, a part of one, or a set to evaluate would be too small
        for a layer."""
        parts = {size: part_sizes(size, self._part) for size in set(self._sizes)}
        for layer in self.model.walk():
            for size, sizes in parts.items():
                if min(sizes) < layer.least_batch:
                    last = size < self.mini_batch_size
                    split = (
                        f", taken in parts of {', '.join(map(str, sizes))} "
                        f"(accumulate={self.accumulate})"
                    )
                    raise ArgumentError(
                        "one image has one value per channel, and so no variance; the "
                        f"{'last batch' if last else 'batches'} of "
                        f"{self.x_train.shape[0]} images by mini_batch_size={self.mini_batch_size} "
                        f"would have {size}"
                        f"{split if len(sizes) > 1 else ''}; choose another mini_batch_size"
                        f"{' or drop_last=True' if last else ''}"
                        f"{' or accumulate' if len(sizes) > 1 else ''}",
                        layer.where,
                    )
            for name, images in (("x_train", self.x_train), ("x_test", self.x_test)):
                if self._sample_size(images) < layer.least_predicted:
                    raise ArgumentError(
                        f"without running statistics it has no variance over one image, and {name} "
                        "would be evaluated on one; take more images"
                        f"{'' if images.shape[0] == 1 else ' (evaluate_sample_num_per_epoch)'}",
                        layer.where,
                    )

    def _take_schedule(self, schedule: Schedule | str | None, unit: str) -> Schedule:
        """Check the schedule at both ends of the training, and have it count steps."""
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
        """What a copy or a pickle holds, between two steps: model and optimizer, figures, and the
        data as NumPy arrays."""
        if self._unread:
            self._read_losses()
        state = {name: value for name, value in vars(self).items() if name not in _NOT_COPIED}
        for name in _DATA:
            state[name] = backend_of(state[name]).to_host(state[name])
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.backend = self.model.home
        self.x_train, self.t_train = take_set(self.model, self.x_train, self.t_train, "train")
        self.x_test, self.t_test = take_set(self.model, self.x_test, self.t_test, "test")
        self._feed = make_feed(self.model, self.x_train, self.t_train)
        self._unread, self._ok, self._step, self._workspace = [], self._fine(), None, Workspace()
        optimizer_state = self.optimizer.state_dict()
        for arrays in self.optimizer.state.values():
            arrays.clear()  # to be laid out as the parameters are
        self.optimizer.load_state_dict(optimizer_state, self.model.named_parameters())

    def lr(self, step: int) -> float:
        """The learning rate at this step, counted from 0 over all epochs."""
        return not_negative(
            f"the schedule's learning rate at step {step}", self.schedule(step, self.optimizer.lr)
        )

    def _fine(self) -> Array:
        with self.backend.active():
            return self.backend.xp.ones((), dtype=self.backend.xp.bool, device=self.backend.device)

    @property
    def steps_done(self) -> int:
        """How many steps were made, epochs that were broken off by an error left out."""
        return self.epoch * self.steps_per_epoch + self.batch

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or ``early_stopping`` has ended the training."""
        return self.epoch >= self.epochs or self.stopped_early

    def stop(self) -> None:
        """Have ``train`` end after the step under way, as if it were paused: a checkpoint is
        written, and it can be called again.

        For signal handlers (``stopping_on_signals``), other threads, and code that runs within a
        step.
        """
        self._stop = True

    def checkpoint(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write a checkpoint, between two steps: to ``path``, or as the newest of
        ``checkpoint_dir``. Gives the file's path.

        Raises:
            CheckpointError: it could not be written, since the disk is full, say. All earlier ones
                are as they were. Or another Trainer, in this process or another, is training the
                same run into the same folder.
            ArgumentError: neither a path nor a folder, or an optimizer that no file can hold.
            NotFiniteError: as ``train``.
        """
        place = self.checkpoint_dir if path is None else Path(path).absolute()
        if place is None:
            raise ArgumentError("no checkpoint_dir was given: say where to write the checkpoint")
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
                f"{error}. "
                "Earlier ones are as they were. Training has stopped after that step and is whole "
                "in memory: make room, and "
                "train() goes on; or checkpoint(path) writes it elsewhere"
            )
            failed.errno = error.errno or errno.EIO
            raise failed from error
        self.last_checkpoint = place
        return place

    @contextmanager
    def _sole(self) -> Iterator[None]:
        """Within it no other Trainer writes this run's checkpoints into the folder. Raises
        CheckpointError where one does."""
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
        """What tells the data from others (``feed.fingerprint``), by "train" and "test"."""
        if self._fingerprints is None:
            self._fingerprints = {
                "train": fingerprint(self.x_train, self.t_train),
                "test": fingerprint(self.x_test, self.t_test),
            }
        return self._fingerprints

    def train(self) -> None:
        """Train up to ``epochs`` epochs in all, or until it is stopped, early or by ``stop``;
        called again, it goes on.

        It goes on where it was, also after a Ctrl-C: in the main thread that is a ``stop``, with
        the checkpoint that goes with it, and only then raises KeyboardInterrupt. All that follows
        is what would have come without it, to the bit.

        An exception within a step (an error, a second Ctrl-C, what a signal handler of your own
        raises) does not wait. The epoch is then begun anew, with the weights as they are: those
        from before that step, unless it came in the middle of the update itself, which some of them
        may then have seen. Histories and counts hold whole steps in any case.

        Raises:
            NotFiniteError: a loss, a gradient or a running statistic was NaN or infinite; weights
                and statistics are those from before that step.
            CheckpointError: see ``checkpoint``. Training can go on.
            StateError: the model was moved to another device, built again or changed since the
                Trainer was made.
        """
        with interrupted_between_steps(self), self._sole():
            self._train()

    def _train(self) -> None:
        if self.model.backend != self.backend:
            raise StateError(
                f"the model was moved to {self.model.backend} from {self.backend}; make a new "
                "Trainer for it"
            )
        self._check_revision()
        if self.finished:
            why = (
                "early stopping has ended it"
                if self.stopped_early
                else f"all {self.epochs} epochs are done"
            )
            cure = (
                "a new Trainer goes on from these weights"
                if self.stopped_early
                else "a larger trainer.epochs makes it go on"
            )
            _log.warning("train() has nothing to do: the training is over, as %s; %s", why, cure)
            return
        batches = self.steps_per_epoch
        self._cut_lists()
        self._unread.clear()
        self._ok = self._fine()
        with (
            self.backend.active(),
            Progress(self.epochs * batches, self.steps_done, self.verbose) as progress,
        ):
            try:
                while not self.finished:
                    if self._run_epoch(progress):
                        break
            except CheckpointError:
                if self.finished:
                    self._take_best()
                raise
            except BaseException:
                self.batch = 0  # a step may be half done
                raise
            finally:
                self._stop = False
                self._workspace = Workspace()  # the next ``train`` takes memory anew
        if self.finished:
            self._take_best()

    def _cut_lists(self) -> None:
        """Take out of the lists what an epoch has left there that was broken off."""
        del self.train_loss_list[self.steps_done :]
        for figures in (
            self.epoch_loss_list,
            self.train_acc_list,
            self.test_acc_list,
            self.test_loss_list,
        ):
            del figures[self.epoch :]

    def _run_epoch(self, progress: Progress) -> bool:
        """The rest of an epoch, or what of it comes before ``stop``; with the checkpoints that fall
        due.

        ``stop`` may be called at any moment, by a signal's handler say: it is looked at once after
        each step, so that training never ends without the checkpoint that goes with it.

        Returns:
            Whether to stop.
        """
        batches, size = self.steps_per_epoch, self.mini_batch_size
        rest = permutation(self.seed, self.epoch, self.x_train.shape[0])[
            self.batch * size : sum(self._sizes)
        ]
        for batch in self._feed.epoch(rest, size):
            self.run_batch(*batch)
            self.batch += 1
            progress.step()
            stop = self._stop
            due = stop or self._is_due(self.steps_done)
            if self.batch % LOG_EVERY == 0 or self.batch == batches or due:
                self._read_losses()
                progress.show(self.epoch + 1, loss=self.train_loss_list[-1])
            if self.batch == batches:
                break
            if due and self.checkpoint_dir is not None:
                self.checkpoint()
            if stop:
                return True
        self._end_epoch()
        progress.epoch(
            self.epoch, self.epoch_loss_list[-1], self.train_acc_list[-1], self.test_acc_list[-1]
        )
        stop = self._stop
        if self.checkpoint_dir is not None and (
            self._is_due(self.steps_done) or self.checkpoint_every is None or self.finished or stop
        ):
            self.checkpoint()
        return stop

    def _is_due(self, steps: int) -> bool:
        """Whether ``checkpoint_every`` asks for a checkpoint after so many steps."""
        return (
            self.checkpoint_dir is not None
            and self.checkpoint_every is not None
            and steps % self.checkpoint_every == 0
        )

    def _take_best(self) -> None:
        """Give the model the weights of its best epoch, where they were kept."""
        if self._best_weights is not None:
            self.model.load_state_dict(self._best_weights)

    def _end_epoch(self) -> None:
        """Add the epoch's figures to the lists, and see whether it was the best, or the last."""
        sizes = self._sizes
        losses = self.train_loss_list[-len(sizes) :]
        train_acc = self._evaluate(self.x_train, self.t_train)
        test_acc = self._evaluate(self.x_test, self.t_test)
        watches_loss = self.early_stopping is not None and self.early_stopping.monitor == "loss"
        test_loss = [self._test_loss()] if watches_loss else []
        self.epoch_loss_list.append(
            sum(n * loss for n, loss in zip(sizes, losses, strict=True)) / sum(sizes)
        )
        self.train_acc_list.append(train_acc)
        self.test_acc_list.append(test_acc)
        self.test_loss_list.extend(test_loss)
        self.epoch, self.batch = self.epoch + 1, 0
        if self.early_stopping is not None:
            figures = self.test_loss_list if watches_loss else self.test_acc_list
            if (
                self.early_stopping.restore_best
                and self.early_stopping.best_epoch(figures) == self.epoch
            ):
                self._best_weights = self.model.state_dict()
            self.stopped_early = self.early_stopping.is_over(figures)

    def run_batch(self, *batch: Array) -> None:
        """Make one step with a batch of the training set: what ``train`` does, batch by batch.

        Nothing is read back: the loss waits on the device until ``train`` fetches it.

        Args:
            batch: which images, in which order: int64 (B,) on the model's device. Of a set that the
                device has no room for, images and labels (see ``feed.Streamed``).

        Raises:
            OutOfMemoryError: weights and statistics are those from before this step.
            StateError: the model was built again or changed since the Trainer was made.
        """
        self._check_revision()
        number = len(self.train_loss_list) + len(self._unread)
        state = StepState(number, self.lr(number), self.optimizer.steps + 1, self._ok)
        if self._step is None:
            step = WeakMethod(self._whole_step)  # a method of its own would keep the Trainer alive

            def whole_step(*arguments: Any) -> tuple[Array, Array]:
                return step()(*arguments)  # type: ignore[misc]

            self._step = (
                self.backend.compile_step(whole_step, (*batch, state))
                if self.compile_step
                else whole_step
            )
        try:
            with self.backend.active(), ops.use_precision(self.precision):
                report, self._ok = self._step(*batch, state)
        except MemoryError as error:
            raise self._out_of_memory(error, batch[-1].shape[0]) from error
        self.optimizer.advance()
        self._unread.append(report)

    def _check_revision(self) -> None:
        if self.model.revision != self._revision:
            raise StateError(
                "the model was built again, or changed by replace, since the Trainer was made: its "
                "optimizer's state is that "
                "of the layers before; make a new Trainer"
            )

    def _whole_step(self, *batch_and_state: Any) -> tuple[Array, Array]:
        """From a batch as the feed gives it to the step's report, (loss, whether all was finite),
        and ``state.ok`` after it."""
        *batch, state = batch_and_state
        xp = self.backend.xp
        loss, ok = self.step(*self._feed.batch(*batch), state)
        return xp.stack([loss, xp.astype(ok, loss.dtype)]), ok

    def step(self, x: Array, t: Array, state: StepState) -> tuple[Array, Array]:
        """One forward pass, one backward pass, one update. Everything stays on the device.

        Args:
            x, t: a batch, preprocessed, of the model's dtype and device; labels int64.
            state: the step's numbers, and whether the steps before it were finite.

        Returns:
            The loss, 0-dimensional, and ``state.ok`` with this step taken in.
        """
        xp = self.backend.xp
        buffers = self.model.named_buffers().wholes()
        before = [xp.asarray(buffer, copy=True) for buffer in buffers]
        try:
            loss = self._gradients(x, t, state.step)
            grads = self.model.named_gradients()
            ok = state.ok & xp.isfinite(loss)
            if grads or buffers:
                ok = ok & ops.all_finite([*grads.wholes(), *buffers])
            if self.clip_norm is not None:
                ops.clip_by_global_norm(grads.wholes(), self.clip_norm)
            # running statistics have taken the batch in already
            for buffer, old in zip(buffers, before, strict=True):
                buffer[...] = xp.where(ok, buffer, old)
            # Last, since nothing that comes after it could be undone.
            self.optimizer.update(
                self.model.named_parameters(), grads, ok, lr=state.lr, count=state.count
            )
        except BaseException:  # out of memory, or interrupted
            for buffer, old in zip(buffers, before, strict=True):
                buffer[...] = old
            raise
        return loss, ok

    def _out_of_memory(self, error: MemoryError, size: int) -> OutOfMemoryError:
        """What to say of it; and let go of everything that was kept for this step."""
        # while somebody looks at the error, they would hold what the step had made
        clear_frames(error.__traceback__)
        self._workspace, self._step = Workspace(), None
        asked, held = self.backend.memory_error(error) or (None, None)
        figures = f" ({asked} bytes asked for, {held} held)" if asked is not None else ""
        return OutOfMemoryError(
            f"{self.backend} has no room for a training step of {size} images{figures}; the model "
            "is as it was before the "
            f"step. Make a Trainer with a smaller mini_batch_size than {self.mini_batch_size}, or "
            "accumulate more parts"
        )

    def _gradients(self, x: Array, t: Array, step: int) -> Array:
        """Forward and backward, in parts where it is to ``accumulate``; the model then has the
        whole batch's gradients.

        Returns:
            The batch's mean loss. Each part counts by its share of the images, so that mean and
            gradients are the batch's own.
        """
        count, last = x.shape[0], 0
        loss: Any = 0.0
        with one_backward_pass():
            for size in part_sizes(count, self._part):
                first, last = last, last + size
                part = (last - first) / count
                with at_step(step, first):
                    mean = run_in(
                        self._workspace,
                        self._part_gradients,
                        x[first:last, ...],
                        t[first:last],
                        part,
                    )
                loss = loss + part * mean
        return loss

    def _part_gradients(self, x: Array, t: Array, part: float) -> Array:
        """Forward and backward for ``part`` of a batch. Returns its mean loss, in memory of its
        own."""
        logits, kept = run(self.model, pack(x), True, True)
        mean, cache = ops.softmax_cross_entropy(logits, t, label_smoothing=self.label_smoothing)
        self.model.backward(ops.softmax_cross_entropy_backward(part, cache), kept, need_dx=False)
        return mean

    def _read_losses(self) -> None:
        """Fetch the losses that have gathered on the device."""
        fetched = self.backend.to_host(self.backend.xp.stack(self._unread)).tolist()
        losses, fine = [loss for loss, _ in fetched], [ok for _, ok in fetched]
        self._unread.clear()
        begin = len(self.train_loss_list)
        self.train_loss_list.extend(losses)
        if not all(fine):
            index = fine.index(0.0)
            loss, step = losses[index], begin + index
            elsewhere = ", its gradients or running statistics are not finite"
            raise NotFiniteError(
                f"the loss of step {step + 1} (epoch {self.epoch + 1}) is {loss}"
                f"{elsewhere if isfinite(loss) else ''}; "
                "the weights are those before that step. "
                f"Lower the learning rate ({self.lr(step)})"
            )

    def _evaluate(self, x: Array, t: Array) -> float:
        """The accuracy over the first images of a set, as many as were asked for."""
        x, t = self._sample(x, t)
        return self.model.count_correct(x, t) / x.shape[0]

    def _test_loss(self) -> float:
        """The mean loss over the same test images as the accuracy's, labels not smoothed."""
        x, t = self._sample(self.x_test, self.t_test)
        loss, _ = ops.softmax_cross_entropy(self.model.predict(x), t, keep=False)
        return float(self.backend.to_host(loss))

    def _sample(self, x: Array, t: Array) -> tuple[Array, Array]:
        n = self._sample_size(x)
        return x[:n, ...], t[:n]

    def _sample_size(self, x: Array) -> int:
        return min(self.evaluate_sample_num_per_epoch or x.shape[0], x.shape[0])


def _check_precision(precision: Any, model: Model) -> str:
    """The precision, where a model can be trained with it on its device. Raises ArgumentError."""
    one_of("precision", precision, *PRECISIONS)
    home = model.home
    if precision not in home.precisions or model.dtype != "float32" != precision:
        raise ArgumentError(
            f"precision={precision!r} is not to be had for {model.dtype} on {home}; it has "
            f"{', '.join(home.precisions)}, for models of float32"
        )
    return str(precision)
