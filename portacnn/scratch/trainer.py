"""The book's ``Trainer`` (``common/trainer.py``), for any network with ``params``, ``gradient``,
``loss`` and ``accuracy``."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from portacnn.arguments import answering_keywords, one_of, whole
from portacnn.console import say
from portacnn.errors import LabelError, NotFiniteError
from portacnn.runtime import Array, HostArray, backend_of
from portacnn.scratch.functions import number
from portacnn.scratch.optimizers import OPTIMIZERS
from portacnn.seeds import check_seed, permutation


class Trainer:
    """Train a network of the book's form: SimpleConvNet, or one copied from any chapter.

    A step takes two forward passes, as in the book. ``portacnn.Trainer``, for portacnn's own
    models, takes one and has more features.

    Differences from the book: an epoch uses all images in shuffled order, and its last batch is
    filled with images from its start (the book draws each batch at random and misses a third of the
    images); accuracies are computed at an epoch's end (in the book after its first step); the
    losses of single steps are not printed.

    Args:
        network: has ``params``, ``gradient(x, t)``, ``loss(x, t)``, ``accuracy(x, t)``.
        x_train, t_train, x_test, t_test: images and labels. NumPy arrays are copied once to the
            device of the network's parameters.
        epochs: number of passes through the training images.
        mini_batch_size: images per step.
        optimizer: "SGD", "Momentum", "Nesterov", "AdaGrad", "RMSprop" or "Adam", in any case.
        optimizer_param: its arguments; default {"lr": 0.01}.
        evaluate_sample_num_per_epoch: number of images, from the first, for accuracies; None takes
            all.
        verbose: print each epoch's accuracies.
        seed: of the shuffling; None draws one.

    Attributes:
        train_loss_list: for each step, the loss of its batch after the update.
        train_acc_list, test_acc_list: for each epoch.
        current_iter, current_epoch: number of finished steps and epochs.

    Raises:
        ArgumentError: if the optimizer is unknown or a number is out of range.
        LabelError: if the numbers of labels and images differ.
    """

    @answering_keywords(
        "Trainer", dict.fromkeys(("lr", "learning_rate"), 'write optimizer_param={"lr": ...}')
    )
    def __init__(
        self,
        network: Any,
        x_train: Array,
        t_train: Array,
        x_test: Array,
        t_test: Array,
        epochs: int = 20,
        mini_batch_size: int = 100,
        optimizer: str = "SGD",
        optimizer_param: Mapping[str, Any] | None = None,
        evaluate_sample_num_per_epoch: int | None = None,
        verbose: bool = True,
        *,
        seed: int | None = 0,
    ) -> None:
        self.network, self.verbose = network, verbose
        self.x_train, self.t_train = self._take(x_train, t_train, "train")
        self.x_test, self.t_test = self._take(x_test, t_test, "test")
        self.epochs = whole("epochs", epochs, 0)
        self.batch_size = whole("mini_batch_size", mini_batch_size, 1)
        sample = evaluate_sample_num_per_epoch
        self.evaluate_sample_num_per_epoch = (
            None if sample is None else whole("evaluate_sample_num_per_epoch", sample, 1)
        )
        kind = OPTIMIZERS[one_of("optimizer", str(optimizer).lower(), *OPTIMIZERS)]
        self.optimizer = kind(**({"lr": 0.01} if optimizer_param is None else optimizer_param))
        self.seed = check_seed(seed)
        self.train_size = self.x_train.shape[0]
        self.iter_per_epoch = max(-(-self.train_size // self.batch_size), 1)
        self.max_iter = self.epochs * self.iter_per_epoch
        self.current_iter = self.current_epoch = 0
        self._order: HostArray = None
        self.train_loss_list: list[float] = []
        self.train_acc_list: list[float] = []
        self.test_acc_list: list[float] = []

    def _take(self, x: Array, t: Array, what: str) -> tuple[Array, Array]:
        if x.shape[0] != t.shape[0] or not x.shape[0]:
            raise LabelError(
                f"expected as many labels as images and at least one, got {t.shape[0]} and "
                f"{x.shape[0]}",
                what,
            )
        return self._brought(x), self._brought(t)

    def _brought(self, array: Array) -> Array:
        """Copy a NumPy array to the device of the network's parameters; return other arrays as they
        are."""
        home = next(iter(self.network.params.values()))
        if backend_of(array).name != "numpy" or backend_of(home).name == "numpy":
            return array
        return backend_of(home).xp.asarray(array, device=home.device, copy=True)

    def train_step(self) -> None:
        """Run one step with the next batch; compute accuracies at an epoch's end.

        Raises:
            NotFiniteError: if the loss is NaN or infinite.
        """
        xp = backend_of(self.x_train).xp
        chosen = xp.asarray(self._chosen(), device=self.x_train.device)
        x, t = xp.take(self.x_train, chosen, axis=0), xp.take(self.t_train, chosen, axis=0)
        self.optimizer.update(self.network.params, self.network.gradient(x, t))
        loss = number(self.network.loss(x, t))
        self.train_loss_list.append(loss)
        self.current_iter += 1
        if not isfinite(loss):
            raise NotFiniteError(
                f"the loss after step {self.current_iter} is {loss}; lower the learning rate "
                f"({self.optimizer.lr})"
            )
        if self.current_iter % self.iter_per_epoch == 0:
            self._end_epoch()

    def _chosen(self) -> HostArray:
        """Return the indices of the next batch's images."""
        epoch, batch = divmod(self.current_iter, self.iter_per_epoch)
        if batch == 0 or self._order is None:
            self._order = permutation(self.seed, epoch, self.train_size)
        first = batch * self.batch_size
        return self._order.take(range(first, first + self.batch_size), mode="wrap")

    def _end_epoch(self) -> None:
        self.current_epoch += 1
        self.train_acc_list.append(self._accuracy(self.x_train, self.t_train))
        self.test_acc_list.append(self._accuracy(self.x_test, self.t_test))
        if self.verbose:
            train, test = self.train_acc_list[-1], self.test_acc_list[-1]
            say(f"=== epoch:{self.current_epoch}, train acc:{train}, test acc:{test} ===")

    def _accuracy(self, x: Array, t: Array) -> float:
        n = min(self.evaluate_sample_num_per_epoch or x.shape[0], x.shape[0])
        return number(self.network.accuracy(x[:n, ...], t[:n, ...]))

    def train(self) -> None:
        """Train for ``epochs`` epochs, then compute the accuracy over all test images."""
        for _ in range(self.max_iter):
            self.train_step()
        if self.verbose:
            accuracy = number(self.network.accuracy(self.x_test, self.t_test))
            say("=============== Final Test Accuracy ===============", f"test acc:{accuracy}")
