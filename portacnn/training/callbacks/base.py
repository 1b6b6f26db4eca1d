"""``Callback``: the base class of objects that a ``Trainer`` calls between its steps."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from portacnn.arguments import AnswersKeywords
from portacnn.runtime import Array

if TYPE_CHECKING:
    from collections.abc import Mapping

    from portacnn.training.trainer import Trainer


class Callback(AnswersKeywords):
    """Base of all callbacks. A subclass overrides the methods that it needs.

    All methods except ``on_train_end`` run between two whole steps. ``Trainer.train`` stops at an
    exception in one of them and raises it. The model then has the weights of the last finished
    step, and ``train()`` continues from there. To end a training run without an error, call
    ``trainer.stop()``.

    Attributes:
        every_step: whether ``on_step_end`` is called. It gets the step's loss, so each step waits
            for the device.
        inside_step: whether the callback needs code inside each step, for example a layer's
            ``on_output``. Steps are then not captured (``Trainer(compile_step=...)``).
        every_rank: whether the methods are called on each process of a distributed training run,
            as one that changes the model needs. Otherwise they are called on rank 0 only, as one
            that writes files needs. Pass the same callbacks on all ranks in any case.
    """

    every_step: ClassVar[bool] = False
    inside_step: ClassVar[bool] = False
    every_rank: ClassVar[bool] = True

    def on_train_begin(self, trainer: "Trainer") -> None:
        """Called when ``train()`` begins, also when it continues."""

    def on_epoch_begin(self, trainer: "Trainer") -> None:
        """Called before an epoch's first step."""

    def on_update(self, trainer: "Trainer", ok: Array) -> None:
        """Called after each step. It may compute on the device, but should not transfer from it.

        Args:
            ok: 0-dimensional boolean on the device: whether all steps so far were finite. If it is
                false, the step has not changed the weights.
        """

    def on_step_end(self, trainer: "Trainer", loss: float) -> None:
        """Called after each step with its loss, if ``every_step`` is true."""

    def on_epoch_end(self, trainer: "Trainer", figures: dict[str, Any]) -> None:
        """Called after an epoch, with its value of each list of ``Trainer.history``."""

    def on_train_end(self, trainer: "Trainer") -> None:
        """Called when ``train()`` ends in any way, if ``on_train_begin`` returned."""

    def evaluating(self, trainer: "Trainer") -> AbstractContextManager[Any]:
        """Return a context in which the model is evaluated after each epoch."""
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """Return the callback's state for checkpoints: NumPy arrays and JSON values by name."""
        return {}

    def load_state_dict(self, state: "Mapping[str, Any]") -> None:
        """Continue from a ``state_dict``."""
