"""``Trainer``: a model, data and an optimizer; epochs of shuffled batches; losses and accuracies as lists.

A step is one forward and one backward pass. Losses stay on the device and are fetched together, every ``LOG_EVERY`` steps and at
the end of an epoch; a step itself reads nothing back. A loss that is not finite stops all updates from that step on, so when
training ends with an error the weights are those before it.
"""

from collections.abc import Mapping
from typing import Any

from portacnn import ops
from portacnn.errors import ArgumentError, NotFiniteError
from portacnn.models import Model
from portacnn.ops.layout import pack
from portacnn.optim import Optimizer, make_optimizer
from portacnn.runtime import Array, Backend, backend_of, describe
from portacnn.seeds import check_seed, permutation
from portacnn.training.progress import Progress

LOG_EVERY = 50


class Trainer:
    """Trains a built ``Model``.

    Args:
        model: on its device already; the data follow it there.
        x_train, x_test: images (N, *input_shape), floating point.
        t_train, t_test: labels, integers (N,) or one-hot (N, classes).
        epochs: how often to go through the training images. Each epoch shuffles them anew, by ``seed`` and its number.
        mini_batch_size: images a step; the last batch of an epoch may be shorter.
        optimizer: "sgd", "momentum", "adam", or an ``Optimizer``.
        optimizer_param: the optimizer's arguments, such as {"lr": 0.001}.
        evaluate_sample_num_per_epoch: how many of the first images of either set the accuracies after each epoch are taken
            over; None takes all.
        seed: for the order of the batches; None takes a fresh one.
        verbose: show a progress bar.

    Attributes:
        train_loss_list: the loss of every step.
        train_acc_list, test_acc_list: the accuracies after every epoch.
        epoch: epochs done.

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
        evaluate_sample_num_per_epoch: int | None = None,
        seed: int | None = 0,
        verbose: bool = True,
    ) -> None:
        self.model = model
        self.backend: Backend = model._home()
        self.epochs = _count("epochs", epochs, 0)
        self.mini_batch_size = _count("mini_batch_size", mini_batch_size, 1)
        self.evaluate_sample_num_per_epoch = evaluate_sample_num_per_epoch
        if evaluate_sample_num_per_epoch is not None:
            _count("evaluate_sample_num_per_epoch", evaluate_sample_num_per_epoch, 1)
        if optimizer_param is None and optimizer == "adam":
            optimizer_param = {"lr": 0.001}
        self.optimizer = make_optimizer(optimizer, optimizer_param)
        self.seed = check_seed(seed)
        self.verbose = verbose
        self.x_train, self.t_train = self._take(x_train, t_train, "train")
        self.x_test, self.t_test = self._take(x_test, t_test, "test")
        if self.mini_batch_size > self.x_train.shape[0]:
            raise ArgumentError(
                f"mini_batch_size is {mini_batch_size}, but there are only {self.x_train.shape[0]} training images"
            )
        self.train_loss_list: list[float] = []
        self.train_acc_list: list[float] = []
        self.test_acc_list: list[float] = []
        self.epoch = 0
        self._unread: list[Array] = []  # losses still on the device
        self._ok = self._fine()
        self._step: Any = None

    def _take(self, x: Array, t: Array, what: str) -> tuple[Array, Array]:
        """Check one set of images and labels, once and on the host, and bring it to the model's device."""
        if x.shape[0] == 0:
            raise ArgumentError(f"x_{what} has no images")
        labels = self.model.labels(t, x.shape[0], f"t_{what}")
        source = backend_of(x)
        images = self.model.accept(x)
        if not bool(source.to_host(source.xp.all(source.xp.isfinite(x)))):
            raise NotFiniteError(f"x_{what} holds NaN or infinity ({describe(x)}); clean the data first")
        return images, labels

    def _fine(self) -> Array:
        return self.backend.xp.ones((), dtype=self.backend.xp.bool, device=self.backend.device)

    def train(self) -> None:
        """Train up to ``epochs`` epochs in all; called again, it goes on where it was.

        An epoch that was broken off, by an error or by hand, is begun anew, with the weights as they are.

        Raises:
            NotFiniteError: a loss was NaN or infinite; the weights are those from before that step.
        """
        count = self.x_train.shape[0]
        size = self.mini_batch_size
        batches = -(-count // size)
        del self.train_loss_list[self.epoch * batches :]
        self._unread.clear()
        self._ok = self._fine()
        with Progress(self.epochs * batches, self.epoch * batches, self.verbose) as progress:
            while self.epoch < self.epochs:
                order = self.backend.asarray(permutation(self.seed, self.epoch, count))
                for batch in range(batches):
                    chosen = order[batch * size : min((batch + 1) * size, count)]
                    self._run(chosen)
                    progress.step()
                    if (batch + 1) % LOG_EVERY == 0 or batch + 1 == batches:
                        self._read_losses()
                        progress.show(self.epoch + 1, loss=self.train_loss_list[-1])
                self.epoch += 1
                self.train_acc_list.append(self._evaluate(self.x_train, self.t_train))
                self.test_acc_list.append(self._evaluate(self.x_test, self.t_test))
                progress.epoch(self.epoch, self.train_loss_list[-1], self.train_acc_list[-1], self.test_acc_list[-1])

    def _run(self, chosen: Array) -> None:
        """Gather a batch and make one step with it."""
        xp = self.backend.xp
        x, t = pack(xp.take(self.x_train, chosen, axis=0)), xp.take(self.t_train, chosen, axis=0)
        if self._step is None:
            self._step = self.backend.compile_step(self.step, (x, t, self._ok))
        loss, self._ok = self._step(x, t, self._ok)
        self._unread.append(loss)

    def step(self, x: Array, t: Array, ok: Array) -> tuple[Array, Array]:
        """One forward pass, one backward pass, one update. Everything stays on the device.

        Args:
            x, t: a batch, of the model's dtype and device; labels int64.
            ok: 0-dimensional boolean: whether all losses so far were finite. If not, nothing is updated.

        Returns:
            The loss, 0-dimensional, and ``ok`` with this loss taken in.
        """
        xp = self.backend.xp
        loss, cache = ops.softmax_cross_entropy(self.model.forward(x, train=True), t)
        ok = ok & xp.isfinite(loss)
        self.model.backward(ops.softmax_cross_entropy_backward(1.0, cache), need_dx=False)
        self.optimizer.update(self.model.named_parameters(), self.model.named_gradients(), ok)
        return loss, ok

    def _read_losses(self) -> None:
        """Fetch the losses that have gathered on the device."""
        losses = self.backend.to_host(self.backend.xp.stack(self._unread)).tolist()
        self._unread.clear()
        self.train_loss_list.extend(losses)
        for index, loss in enumerate(losses):
            if not -float("inf") < loss < float("inf"):
                step = len(self.train_loss_list) - len(losses) + index + 1
                raise NotFiniteError(
                    f"the loss of step {step} (epoch {self.epoch + 1}) is {loss}; the weights are those before that step. "
                    f"Lower the learning rate ({self.optimizer.lr})"
                )

    def _evaluate(self, x: Array, t: Array) -> float:
        n = min(self.evaluate_sample_num_per_epoch or x.shape[0], x.shape[0])
        x, t = x[:n, ...], t[:n]
        return self.model.count_correct(x, t) / x.shape[0]


def _count(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise ArgumentError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return int(value)
