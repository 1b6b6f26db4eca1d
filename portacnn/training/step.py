"""One step of a training run: ``Updater`` runs forward pass, backward pass and update.

Everything stays on the device. A loss, a gradient or a running statistic that is not finite stops
all updates from that step on (``StepState.ok``). An exception within a step leaves running
statistics as they were before it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from traceback import clear_frames
from typing import Any
from weakref import WeakMethod

from portacnn import ops
from portacnn.errors import OutOfMemoryError, StateError
from portacnn.layers import at_step, one_backward_pass
from portacnn.layers.passes import without_dx
from portacnn.layers.running import run
from portacnn.losses import Loss
from portacnn.models import Model
from portacnn.ops.layout import pack
from portacnn.optim import Optimizer
from portacnn.runtime import Array, Backend
from portacnn.training.feed import part_sizes
from portacnn.training.options import Options, check_trainable

_NOT_COPIED = {"backend", "ok", "compiled"}


@dataclass(frozen=True)
class StepState:
    """The values that differ from step to step, besides the batch.

    If a backend records the step and replays it (``Backend.compile_step``), the int and the floats
    are 0-dimensional arrays on the device, int64 and float64.

    Attributes:
        step: number of the step in the whole training run, from 0.
        lr: learning rate of this step.
        count: number of the optimizer's update, from 1.
        ok: 0-dimensional boolean; true if all steps so far were finite. If it is false, nothing is
            updated any more.
    """

    step: Any
    lr: Any
    count: Any
    ok: Array


class Updater:
    """Makes the steps of a ``Trainer``, which holds it as ``updater``.

    Attributes:
        model, optimizer, loss, clip_norm, precision, compile_step: see ``Trainer``.
        ok: 0-dimensional boolean on the device: whether all steps so far were finite.
        compiled: the step as the backend runs it (``Backend.compile_step``), None until the first
            step.
    """

    def __init__(self, model: Model, optimizer: Optimizer, loss: Loss, options: Options) -> None:
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.clip_norm, self.precision = options.clip_norm, options.precision
        self.compile_step = options.compile_step
        self._part, self._batch_size = options.part, options.batch_size
        self._revision = model.revision
        self._freezes = -1  # of the network, when the step was prepared
        self._begin()

    def _begin(self) -> None:
        self.backend: Backend = self.model.home
        self.compiled: Any = None
        self.start_over()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _NOT_COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()
        optimizer_state = self.optimizer.state_dict()
        for arrays in self.optimizer.state.values():
            arrays.clear()  # to be laid out like the parameters
        self.optimizer.load_state_dict(optimizer_state, self.model.named_parameters())

    def start_over(self) -> None:
        """Forget that a step was not finite."""
        xp = self.backend.xp
        with self.backend.active():
            self.ok: Array = xp.ones((), dtype=xp.bool, device=self.backend.device)

    def release_memory(self) -> None:
        """Release the memory that a step keeps for the next one, which allocates it again."""
        self.model.release_memory()

    def check_model(self) -> None:
        """Raise StateError if the model was built again or changed since the Trainer was made."""
        if self.model.revision != self._revision:
            raise StateError(
                "the model was built again or changed by replace after the Trainer was made, so "
                "the optimizer's state does not match it; make a new Trainer"
            )
        network = self.model.belongs_to
        if network is not None and network.freezes != self._freezes:
            check_trainable(self.model)
            self._freezes, self.compiled = network.freezes, None

    def run(
        self,
        whole_step: Callable[..., tuple[Array, Array]],
        batch: tuple[Array, ...],
        number: int,
        lr: float,
        *,
        may_record: bool = True,
    ) -> Array:
        """Run ``whole_step`` for a batch, recorded by the backend if ``compile_step`` is set.

        Args:
            whole_step: a bound method that takes the batch's arrays and a ``StepState``. It returns
                the step's report, and the new ``StepState.ok``.
            number: of the step, from 0.
            lr: its learning rate.
            may_record: whether the step may be recorded.

        Returns:
            The report.

        Raises:
            OutOfMemoryError: if there is not enough memory.
        """
        state = StepState(number, lr, self.optimizer.steps + 1, self.ok)
        if self.compiled is None:
            compiles = self.backend.compiles
            step = WeakMethod(whole_step)  # a bound method would keep its object alive

            def weak_step(*arguments: Any) -> tuple[Array, Array]:
                return step()(*arguments)  # type: ignore[misc]

            self.compiled = (
                self.backend.compile_step(weak_step, (*batch, state))
                if (compiles if self.compile_step is None else self.compile_step) and may_record
                else weak_step
            )
        try:
            with self.backend.active(), ops.use_precision(self.precision):
                report, self.ok = self.compiled(*batch, state)
        except MemoryError as error:
            raise self._out_of_memory(error, batch[0].shape[0]) from error
        self.optimizer.advance()
        return report

    def step(
        self, x: Array, t: Array, state: StepState, weight: Array | None = None
    ) -> tuple[Array, Array]:
        """Run one forward pass, one backward pass and one update; see ``Trainer.step``."""
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
                    part = self.model.train_in_memory(
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

    def _out_of_memory(self, error: MemoryError, size: int) -> OutOfMemoryError:
        """Return the error to raise, and release everything that was kept for this step."""
        # otherwise the traceback would keep the step's arrays alive
        clear_frames(error.__traceback__)
        self.compiled = None
        self.model.release_memory()
        asked, held = self.backend.memory_error(error) or (None, None)
        figures = f" ({asked} bytes requested, {held} in use)" if asked is not None else ""
        return OutOfMemoryError(
            f"{self.backend} has not enough memory for a training step of {size} images{figures}; "
            "the model is as it was before the step. Make a Trainer with a smaller batch_size "
            f"than {self._batch_size}, or a larger accumulate"
        )
