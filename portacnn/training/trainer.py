"""``Trainer``: a model, data and an optimizer; epochs of shuffled batches; losses and accuracies as lists.

A step is one forward pass, one backward pass and one update. Losses stay on the device and are fetched together, every
``LOG_EVERY`` steps and at the end of an epoch; a step itself reads nothing back. A loss that is not finite stops all updates
from that step on, so when training ends with an error the weights are those before it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, prod
from traceback import clear_frames
from typing import Any, Literal

from portacnn import ops
from portacnn.arguments import not_negative, one_of, positive, share, whole
from portacnn.errors import ArgumentError, NotFiniteError, OutOfMemoryError, StateError
from portacnn.models import Model
from portacnn.ops.dispatch import PRECISIONS
from portacnn.ops.layout import pack
from portacnn.ops.workspace import Workspace, workspace
from portacnn.optim import Optimizer, make_optimizer
from portacnn.runtime import Array, Backend, HostArray, backend_of, describe, is_float
from portacnn.schedules import PerEpoch, Schedule, make_schedule
from portacnn.seeds import check_seed, permutation
from portacnn.training.early_stopping import EarlyStopping, make_early_stopping
from portacnn.training.feed import Resident, Streamed, fits
from portacnn.training.progress import Progress

LOG_EVERY = 50


@dataclass(frozen=True)
class StepState:
    """What a step needs besides its batch, and what is different at each.

    A backend that records the step and replays it (``Backend.compile_step``) puts 0-dimensional arrays on the device in place of
    the numbers, int64 and float64, so that a step finds its own there.

    Attributes:
        step: its number in the whole training, from 0.
        lr: its learning rate.
        count: which of the optimizer's updates it makes, from 1.
        ok: 0-dimensional boolean: whether all steps so far were finite. If not, nothing is updated any more.
    """

    step: Any
    lr: Any
    count: Any
    ok: Array


class Trainer:
    """Trains a built ``Model``.

    Args:
        model: on its device already; the data follow it there.
        x_train, x_test: images (N, *input_shape), floating point, or uint8 where the model has a ``preprocess``. They are kept
            as they come, so uint8 takes a quarter of float32's memory: on the model's device, or where they would take more
            than half of what is free there, on the host.
        t_train, t_test: labels, integers (N,) or one-hot (N, classes).
        epochs: how often to go through the training images. Each epoch shuffles them anew, by ``seed`` and its number.
        mini_batch_size: images a step; the last batch of an epoch may be shorter.
        optimizer: "sgd", "momentum", "adagrad", "rmsprop", "adam", "adamw", or an ``Optimizer``.
        optimizer_param: the optimizer's arguments, such as {"lr": 0.001, "weight_decay": 1e-4}.
        schedule: how the learning rate goes on from the optimizer's: a schedule of ``portacnn.schedules`` or any function of
            (step, lr), or a name that stands for one over all the steps: "step", "cosine", "warmup_cosine", "one_cycle".
        schedule_unit: whether the schedule counts "step"s or "epoch"s.
        clip_norm: how long all gradients together may be at most (``ops.clip_by_global_norm``); None leaves them as they are.
        label_smoothing: the share of every label spread over all classes, while training.
        accumulate: in how many parts a batch is taken through the network, one after the other, to need less memory. Their
            gradients add up to the batch's: only batch statistics (BatchNorm) see the parts.
        early_stopping: an ``EarlyStopping``, or its patience in epochs.
        evaluate_sample_num_per_epoch: how many of the first images of either set the accuracies after each epoch are taken
            over; None takes all.
        seed: for the order of the batches; None takes a fresh one.
        precision: what the factors of products are rounded to while training, on devices that are faster so
            (``ops.use_precision``); weights and activations stay float32.
        compile_step: let the backend record a whole step and replay it (CuPy: a CUDA graph); others run it as it is.
        verbose: show a progress bar.

    Attributes:
        train_loss_list: the loss of every step.
        epoch_loss_list: its mean over the images of every epoch.
        train_acc_list, test_acc_list: the accuracies after every epoch.
        test_loss_list: the mean loss over the test images after every epoch, where ``early_stopping`` watches it.
        epoch: epochs done.
        stopped_early: whether ``early_stopping`` has ended the training.

    Raises:
        ShapeError, LabelError, ArrayError, NotFiniteError, ArgumentError: bad data or numbers, before anything is changed.
    """

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
        precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32",
        compile_step: bool = False,
        verbose: bool = True,
    ) -> None:
        self.model = model
        self.backend: Backend = model._home()
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
            raise ArgumentError(f"a batch of mini_batch_size={mini_batch_size} has no {accumulate} parts (accumulate)")
        self.early_stopping = make_early_stopping(early_stopping)
        self.seed = check_seed(seed)
        self.verbose = verbose
        self.x_train, self.t_train = self._take(x_train, t_train, "train")
        self.x_test, self.t_test = self._take(x_test, t_test, "test")
        if self.mini_batch_size > self.x_train.shape[0]:
            raise ArgumentError(
                f"mini_batch_size is {mini_batch_size}, but there are only {self.x_train.shape[0]} training images"
            )
        self.steps_per_epoch = -(-self.x_train.shape[0] // self.mini_batch_size)
        self._feed = self._feed_of(self.x_train, self.t_train)
        self.compile_step = bool(compile_step)
        self.precision = one_of("precision", precision, *PRECISIONS)
        if precision not in self.backend.precisions or model.dtype != "float32" != precision:
            raise ArgumentError(
                f"precision={precision!r} is not to be had for {model.dtype} on {self.backend}; it has "
                f"{', '.join(self.backend.precisions)}, for models of float32"
            )
        self.schedule = self._take_schedule(schedule, schedule_unit)
        self.train_loss_list: list[float] = []
        self.epoch_loss_list: list[float] = []
        self.train_acc_list: list[float] = []
        self.test_acc_list: list[float] = []
        self.test_loss_list: list[float] = []
        self.epoch = 0
        self.stopped_early = False
        self._best_weights: dict[str, HostArray] | None = None
        self._unread: list[Array] = []  # the reports of steps, still on the device
        self._ok = self._fine()
        self._step: Any = None
        self._workspace = Workspace()

    def _take(self, x: Array, t: Array, what: str) -> tuple[Array, Array]:
        """Check one set of images and labels, once and on the host; bring it to the model's device where there is room.

        Returns:
            Images as ``Model.accept`` gives them, on the device, or NumPy's of the same dtype; labels on the device.
        """
        source = backend_of(x)
        if x.ndim == 0 or x.shape[0] == 0:
            raise ArgumentError(f"x_{what} has no images")
        labels = self.model.labels(t, x.shape[0], f"t_{what}")
        dtype = self.model.kept_as(x)
        if is_float(source.xp, x.dtype) and not bool(source.to_host(source.xp.all(source.xp.isfinite(x)))):
            raise NotFiniteError(f"x_{what} holds NaN or infinity ({describe(x)}); clean the data first")
        nbytes = prod(x.shape) * (1 if dtype == "uint8" else int(dtype.removeprefix("float")) // 8)
        if source.name == "numpy" != self.backend.name and not fits(nbytes, self.backend.free_memory()):
            return source.contiguous(source.xp.astype(x, source.dtype(dtype), copy=False)), labels
        with self.backend.active():
            return self.backend.contiguous(self.model.accept(x)), labels  # a gather reads whole images

    def _feed_of(self, images: Array, labels: Array) -> Resident | Streamed:
        if backend_of(images).name == self.backend.name:
            return Resident(self.model, images, labels)
        return Streamed(self.model, images, self.backend.to_host(labels))

    def _take_schedule(self, schedule: Schedule | str | None, unit: str) -> Schedule:
        """Check the schedule at both ends of the training, and have it count steps."""
        if unit not in ("step", "epoch"):
            raise ArgumentError(f'schedule_unit must be "step" or "epoch", got {unit!r}')
        total = self.epochs * self.steps_per_epoch
        made = make_schedule(schedule, total if unit == "step" else self.epochs)
        if unit == "epoch":
            made = PerEpoch(made, self.steps_per_epoch)
        for step in (0, total - 1) if total else ():
            not_negative(f"the schedule's learning rate at step {step}", made(step, self.optimizer.lr))
        return made

    def lr(self, step: int) -> float:
        """The learning rate at this step, counted from 0 over all epochs."""
        return not_negative(f"the schedule's learning rate at step {step}", self.schedule(step, self.optimizer.lr))

    def _fine(self) -> Array:
        with self.backend.active():
            return self.backend.xp.ones((), dtype=self.backend.xp.bool, device=self.backend.device)

    def train(self) -> None:
        """Train up to ``epochs`` epochs in all, or until it is stopped early; called again, it goes on where it was.

        An epoch that was broken off, by an error or by hand, is begun anew, with the weights as they are.

        Raises:
            NotFiniteError: a loss, a gradient or a running statistic was NaN or infinite; weights and statistics are those
                from before that step.
            StateError: the model was moved to another device since the Trainer was made.
        """
        if self.model.backend != self.backend:
            raise StateError(
                f"the model was moved to {self.model.backend} from {self.backend}; make a new Trainer for it"
            )
        if self.epoch >= self.epochs or self.stopped_early:
            return
        batches = self.steps_per_epoch
        del self.train_loss_list[self.epoch * batches :]
        self._unread.clear()
        self._ok = self._fine()
        with self.backend.active(), Progress(self.epochs * batches, self.epoch * batches, self.verbose) as progress:
            while self.epoch < self.epochs and not self.stopped_early:
                order = permutation(self.seed, self.epoch, self.x_train.shape[0])
                for number, batch in enumerate(self._feed.epoch(order, self.mini_batch_size), start=1):
                    self.run_batch(*batch)
                    progress.step()
                    if number % LOG_EVERY == 0 or number == batches:
                        self._read_losses()
                        progress.show(self.epoch + 1, loss=self.train_loss_list[-1])
                self._end_epoch()
                progress.epoch(self.epoch, self.epoch_loss_list[-1], self.train_acc_list[-1], self.test_acc_list[-1])
        if self._best_weights is not None:
            self.model.load_state_dict(self._best_weights)

    def _end_epoch(self) -> None:
        """Add the epoch's figures to the lists, and see whether it was the best, or the last."""
        count, size = self.x_train.shape[0], self.mini_batch_size
        sizes = [min(size, count - first) for first in range(0, count, size)]
        losses = self.train_loss_list[-len(sizes) :]
        self.epoch_loss_list.append(sum(n * loss for n, loss in zip(sizes, losses, strict=True)) / count)
        self.train_acc_list.append(self._evaluate(self.x_train, self.t_train))
        self.test_acc_list.append(self._evaluate(self.x_test, self.t_test))
        self.epoch += 1
        if self.early_stopping is not None:
            figures = self.test_acc_list
            if self.early_stopping.monitor == "loss":
                figures = self.test_loss_list
                figures.append(self._test_loss())
            if self.early_stopping.restore_best and self.early_stopping.best_epoch(figures) == self.epoch:
                self._best_weights = self.model.state_dict()
            self.stopped_early = self.early_stopping.is_over(figures)

    def run_batch(self, *batch: Array) -> None:
        """Make one step with a batch of the training set: what ``train`` does, batch by batch.

        Nothing is read back: the loss waits on the device until ``train`` fetches it.

        Args:
            batch: which images, in which order: int64 (B,) on the model's device. Of a set that the device has no room for,
                images and labels (see ``feed.Streamed``).

        Raises:
            OutOfMemoryError: weights and statistics are those from before this step.
        """
        number = len(self.train_loss_list) + len(self._unread)
        state = StepState(number, self.lr(number), self.optimizer.steps + 1, self._ok)
        if self._step is None:
            self._step = self._whole_step
            if self.compile_step:
                self._step = self.backend.compile_step(self._whole_step, (*batch, state))
        try:
            with self.backend.active(), ops.use_precision(self.precision):
                report, self._ok = self._step(*batch, state)
        except MemoryError as error:
            raise self._out_of_memory(error, batch[-1].shape[0]) from error
        self.optimizer.advance()
        self._unread.append(report)

    def _whole_step(self, *batch_and_state: Any) -> tuple[Array, Array]:
        """From a batch as the feed gives it to the step's report, (loss, whether all was finite), and ``state.ok`` after it."""
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
            for buffer, old in zip(buffers, before, strict=True):  # running statistics have taken the batch in already
                buffer[...] = xp.where(ok, buffer, old)
            # Last, since nothing that comes after it could be undone.
            self.optimizer.update(self.model.named_parameters(), grads, ok, lr=state.lr, count=state.count)
        except MemoryError:
            for buffer, old in zip(buffers, before, strict=True):
                buffer[...] = old
            raise
        return loss, ok

    def _out_of_memory(self, error: MemoryError, size: int) -> OutOfMemoryError:
        """What to say of it; and let go of everything that was kept for this step."""
        clear_frames(error.__traceback__)  # while somebody looks at the error, they would hold what the step had made
        self.model.forget()
        self._workspace, self._step = Workspace(), None
        asked, held = self.backend.memory_error(error) or (None, None)
        figures = f" ({asked} bytes asked for, {held} held)" if asked is not None else ""
        return OutOfMemoryError(
            f"{self.backend} has no room for a training step of {size} images{figures}; the model is as it was before the "
            f"step. Make a Trainer with a smaller mini_batch_size than {self.mini_batch_size}, or accumulate more parts"
        )

    def _gradients(self, x: Array, t: Array, step: int) -> Array:
        """Forward and backward, in parts where it is to ``accumulate``; the model then has the whole batch's gradients.

        Returns:
            The batch's mean loss. Each part counts by its share of the images, so that mean and gradients are the batch's own.
        """
        count = x.shape[0]
        size = -(-self.mini_batch_size // self.accumulate)
        loss: Any = 0.0
        earlier: dict[str, Array] = {}  # the gradients of the parts before, added up
        for first in range(0, count, size):
            last = min(first + size, count)
            part = (last - first) / count
            self._before_step(step, first)
            with workspace(self._workspace):
                logits = self.model.forward(pack(x[first:last, ...]), train=True)
                mean, cache = ops.softmax_cross_entropy(logits, t[first:last], label_smoothing=self.label_smoothing)
                loss = loss + part * mean
                self.model.backward(ops.softmax_cross_entropy_backward(part, cache), need_dx=False)
            grads = self.model.named_gradients()
            for path, sum_so_far in earlier.items():
                grads[path] += sum_so_far
            if last < count:
                earlier = {path: self.backend.xp.asarray(grad, copy=True) for path, grad in grads.items()}
        return loss

    def _before_step(self, step: int, first: int) -> None:
        """Before a forward pass over (a part of) a batch, whose first image is the ``first`` of step number ``step``."""
        self.model.at_step(step, first)

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
            raise NotFiniteError(
                f"the loss of step {step + 1} (epoch {self.epoch + 1}) is {loss}"
                f"{', its gradients or running statistics are not finite' if isfinite(loss) else ''}; "
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
        n = min(self.evaluate_sample_num_per_epoch or x.shape[0], x.shape[0])
        return x[:n, ...], t[:n]
