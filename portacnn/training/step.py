"""One step of a training run: ``Updater`` runs forward pass, backward pass and update.

Everything stays on the device. A loss, a gradient or a running statistic that is not finite stops
all updates from that step on (``StepState.ok``). An exception within a step leaves running
statistics as they were before it.
"""

from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from functools import partial
from traceback import clear_frames
from typing import Any
from weakref import WeakMethod

from portacnn import ops
from portacnn.errors import ArgumentError, OutOfMemoryError, StateError
from portacnn.layers import at_step, one_backward_pass
from portacnn.layers.passes import without_dx
from portacnn.layers.running import run
from portacnn.losses import Loss
from portacnn.models import Model
from portacnn.ops.layout import pack
from portacnn.ops.statistics import statistics_over
from portacnn.optim import Optimizer
from portacnn.runtime import Array, Backend
from portacnn.training.options import Options, check_trainable
from portacnn.training.ranks import Ranks
from portacnn.training.reducing import Reducer
from portacnn.training.shares import Share, Split

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
        share: which images of the batch are given; None for all of them.
    """

    step: Any
    lr: Any
    count: Any
    ok: Array
    share: Share | None = None


class Updater:
    """Makes the steps of a ``Trainer``, which holds it as ``updater``.

    Attributes:
        model, optimizer, loss, clip_norm, precision, compile_step, sync_batch_norm,
            compress_gradients: see ``Trainer``.
        split: how batches are split into parts.
        reducer: sums over processes; None if this is the only one.
        ok: 0-dimensional boolean on the device: whether all steps so far were finite.
        compiled: the step as the backend runs it (``Backend.compile_step``), None until the first
            step.
    """

    def __init__(
        self,
        model: Model,
        optimizer: Optimizer,
        loss: Loss,
        options: Options,
        split: Split,
        ranks: Ranks,
    ) -> None:
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.clip_norm, self.precision = options.clip_norm, options.precision
        self.compile_step, self.sync_batch_norm = options.compile_step, options.sync_batch_norm
        self.split, self._batch_size = split, options.batch_size
        self.compress_gradients = options.compress_gradients
        self.reducer = None if ranks.alone else Reducer(ranks, options.compress_gradients)
        self._revision = model.revision
        self._changes = -1  # of the network, when the step was prepared
        self._begin()

    def _begin(self) -> None:
        self.backend: Backend = self.model.home
        self.compiled: Any = None
        self.start_over()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _NOT_COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.reducer = copy(self.reducer)
        if self.reducer is not None and self.reducer.ranks.alone:  # read from a pickle
            self.reducer, self.split = None, Split(self.split.most)
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
        if network is not None and network.changes != self._changes:
            check_trainable(self.model)
            self._changes, self.compiled = network.changes, None

    def share_of(self, count: int, size: int | None = None) -> Share:
        """Return which images of a batch these are.

        Args:
            count: the number of images that this process has read for it.
            size: of the batch, of all processes. None: all processes have as many.

        Raises:
            ArgumentError: if the process must have another number.
        """
        split = self.split
        if split.ranks == 1:
            return split.of(count)
        share = split.of(count * split.ranks if size is None else size)
        if share.rows != count:
            raise ArgumentError(
                f"expected {share.rows} images on rank {split.rank} of {split.ranks} for a batch of"
                f" {share.count}, got {count}; pass the batches of Trainer.read, and their size"
            )
        return share

    def run(
        self,
        whole_step: Callable[..., tuple[Array, Array]],
        batch: tuple[Array, ...],
        number: int,
        lr: float,
        *,
        share: Share | None = None,
        may_record: bool = True,
    ) -> Array:
        """Run ``whole_step`` for a batch, recorded by the backend if ``compile_step`` is set.

        Args:
            whole_step: a bound method that takes the batch's arrays and a ``StepState``. It returns
                the step's report, and the new ``StepState.ok``.
            number: of the step, from 0.
            lr: its learning rate.
            share: which images of a batch these are; None for all of them.
            may_record: whether the step may be recorded.

        Returns:
            The report.

        Raises:
            OutOfMemoryError: if there is not enough memory.
        """
        state = StepState(number, lr, self.optimizer.steps + 1, self.ok, share)
        if self.compiled is None:
            wanted = self.backend.compiles if self.compile_step is None else self.compile_step
            step = WeakMethod(whole_step)  # a bound method would keep its object alive

            def weak_step(*arguments: Any) -> tuple[Array, Array]:
                return step()(*arguments)  # type: ignore[misc]

            self.compiled = (
                self.backend.compile_step(weak_step, (*batch, state))
                if wanted and may_record and self.reducer is None
                else weak_step
            )
        try:
            with self.backend.active(), ops.use_precision(self.precision):
                report, self.ok = self.compiled(*batch, state)
        except Exception as error:
            if not self.backend.is_out_of_memory(error):
                raise
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
            loss = self._gradients(x, t, weight, state, buffers, before)
            grads = self.model.named_gradients()
            ok = state.ok & xp.isfinite(loss)
            if grads or buffers:
                ok = ok & ops.all_finite([*grads.wholes(), *buffers])
            if self.clip_norm is not None:
                clip = ops.clip_by_global_norm if self.reducer is None else self.reducer.clip
                clip(grads.wholes(), self.clip_norm)
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

    def _gradients(
        self,
        x: Array,
        t: Array,
        weight: Array | None,
        state: StepState,
        buffers: list[Array],
        before: list[Array],
    ) -> Array:
        """Run forward and backward, in ``accumulate`` parts; the model then has the whole batch's
        gradients and running statistics, also if it is spread over several processes.

        Args:
            buffers, before: the running statistics, and what they were before the step.

        Returns:
            The batch's mean loss. Each part contributes its share of it, so that mean and gradients
            are those of the batch.
        """
        share, reducer, dtype = state.share, self.reducer, self.model.dtype
        if share is None:
            share = self.share_of(x.shape[0])
        if reducer is None:
            whole = self.loss.count(t, weight, dtype)
            with one_backward_pass():
                return self._share_of_loss(x, t, weight, state.step, share, whole)
        reducer.begin(self.model)
        whole = reducer.whole_count(self.loss, t, weight, dtype, share.count, self.backend)
        done = partial(reducer.forward_done, buffers, before, x.shape[0] / share.count)
        total = reducer.ranks.communicator.all_reduce
        with (
            statistics_over(total) if self.sync_batch_norm else nullcontext(),
            one_backward_pass(reducer.wrote),
        ):
            self._share_of_loss(x, t, weight, state.step, share, whole, done)
        return reducer.finish(self.model.named_gradients())

    def _share_of_loss(
        self,
        x: Array,
        t: Array,
        weight: Array | None,
        step: int,
        share: Share,
        whole: Any,
        done: Callable[[Any, Array], None] | None = None,
    ) -> Array:
        """Run forward and backward for all parts of the batch that this process has. Return their
        share of the batch's loss."""
        last, loss, final = 0, 0.0, len(share.parts) - 1
        for number, (place, size) in enumerate(share.parts):
            first, last = last, last + size
            with at_step(step, place):
                part = self.model.train_in_memory(
                    self._part_gradients,
                    x[first:last, ...],
                    t[first:last, ...],
                    None if weight is None else weight[first:last],
                    whole,
                    None if done is None or number < final else partial(done, loss),
                )
            loss = loss + part
        return loss

    def _part_gradients(
        self,
        x: Array,
        t: Array,
        weight: Array | None,
        whole: Any,
        done: Callable[[Array], None] | None,
    ) -> Array:
        """Run forward and backward for a part of a batch. Return its share of the batch's loss, in
        new memory.

        Args:
            done: is called with that share between the two passes.
        """
        with without_dx(self.model):
            y, kept = run(self.model, pack(x), True, True)
        share, cache = self.loss.forward_part(y, t, weight, whole)
        if done is not None:
            done(share)
        self.model.backward(self.loss.backward_part(cache), kept, need_dx=False)
        return share

    def _out_of_memory(self, error: Exception, size: int) -> OutOfMemoryError:
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
