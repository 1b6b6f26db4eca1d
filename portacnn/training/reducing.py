"""``Reducer``: the sums over processes in a training step, while the step computes.

Each process has its share of the batch's loss and gradients (``Loss.forward_part``), so their sum
is the batch's. Gradients are summed in *buckets*, stretches of the network's flat gradients. The
backward pass completes gradients one after the other. As soon as all of a bucket are complete, its
sum starts, while the backward pass of earlier layers still runs. A small network has one bucket.

When a gradient is complete is learned in the first step: after as many writes as it had then.
Layers in several places write several times.
"""

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Any

from portacnn.distributed import Pending
from portacnn.errors import StateError
from portacnn.flat import Flat, Named
from portacnn.layers import Layer
from portacnn.losses import Loss
from portacnn.models import Model
from portacnn.ops.update import clip_factor, global_norm
from portacnn.runtime import Array, Backend, backend_of, is_float
from portacnn.training.ranks import Ranks

BUCKET = 1 << 22
"""Bytes of gradients that a bucket has at least, the last one excepted. Smaller messages would be
dominated by their latency, larger ones would start later."""
Place = tuple[Layer, str]


class Bucket:
    """A stretch of the gradients.

    Attributes:
        array: the stretch.
        writes: by layer and name of each parameter, the number of writes until its gradient is
            complete.
        left: the same, of those that are not yet complete in this step.
    """

    def __init__(self, array: Array, writes: dict[Place, int]) -> None:
        self.array, self.writes = array, writes
        self.left: dict[Place, int] = {}


class Reducer:
    """The sums over processes of one Trainer's steps.

    Args:
        compress: the dtype to which gradients are rounded on their way, or None.
    """

    def __init__(self, ranks: Ranks, compress: Any = None) -> None:
        self.ranks, self.compress = ranks, compress
        self._counts: dict[int, tuple[list[Any], list[Any]]] = {}
        self._forget()

    def __copy__(self) -> "Reducer":
        return Reducer(self.ranks, self.compress)

    def __reduce__(self) -> Any:
        return Reducer, (self.ranks, self.compress)

    def _forget(self) -> None:
        """Learn anew when gradients are complete."""
        self._buckets: list[Bucket] = []  # in the order in which they are summed
        self._of: dict[Place, Bucket] = {}
        self._flats: tuple[Array, ...] = ()  # the gradients that these are stretches of
        self._seen: dict[Place, int] = {}  # writes of the step that is learned from, last one last
        self._begun = 0  # buckets whose sum has started
        self._last = False  # whether the last part of the batch runs
        self._pending: list[Pending] = []
        self._extras: tuple[Any, ...] = ()

    # --- counts -----------------------------------------------------------------------------------

    def whole_count(
        self, loss: Loss, t: Array, weight: Array | None, dtype: str, size: int, home: Backend
    ) -> Any:
        """Return ``loss.count`` of the whole batch.

        Args:
            t, weight, dtype: of this process's part.
            size: of the whole batch.
        """
        counts = loss.part_count(t, weight, dtype)
        leaves = _leaves(counts)
        if any(hasattr(leaf, "shape") for leaf in leaves):
            xp = home.xp
            made = [
                xp.asarray(leaf, dtype=home.dtype(dtype), device=home.device) for leaf in leaves
            ]
            sums = xp.stack(made)
            self.ranks.communicator.all_reduce(sums)
            return loss.whole_count(_like(counts, iter([sums[i] for i in range(len(made))])))
        if size not in self._counts:
            told = self.ranks.communicator.gather(leaves)
            self._counts[size] = leaves, [sum(each) for each in zip(*told, strict=True)]
        before, added = self._counts[size]
        if before != leaves:
            raise StateError(
                f"{type(loss).__name__}.count returned {leaves} for a batch of the same size as one"
                f" of {before}; return an array if it depends on the values of the targets"
            )
        return loss.whole_count(_like(counts, iter(added)))

    # --- a step -----------------------------------------------------------------------------------

    def begin(self, model: Model) -> None:
        """Begin a step."""
        self._end_failed()
        network = model.belongs_to
        flats = tuple(flat.whole for flat in network.grads) if network is not None else ()
        same = len(flats) == len(self._flats) and all(
            one is other for one, other in zip(flats, self._flats, strict=True)
        )
        if not same or not self._buckets:
            self._forget()
        self._last, self._begun, self._pending = False, 0, []
        for bucket in self._buckets:
            bucket.left = dict(bucket.writes)

    def _end_failed(self) -> None:
        """End the sums of a step in which all ranks raised an error: their arrays are written to
        again. One that raised earlier than others starts those that it has left out."""
        if self._pending:
            for bucket in self._buckets[self._begun :]:
                self._start(bucket.array)
            self._wait()

    def forward_done(
        self,
        buffers: Sequence[Array],
        before: Sequence[Array],
        share: float,
        earlier: Any,
        last: Array,
    ) -> None:
        """The forward pass of the last part is done: start to sum the loss and the changes of the
        running statistics.

        Args:
            buffers, before: running statistics, now and before the step.
            share: the part of the batch that this process has.
            earlier, last: the shares of the batch's loss of the parts before, and of this one.
        """
        self._last, loss = True, earlier + last
        backend = backend_of(loss)
        xp = backend.xp
        changes, of = [], []
        for buffer, old in zip(buffers, before, strict=True):
            if is_float(xp, buffer.dtype):
                # a change, so that what no rank changes keeps its bits
                change = (buffer - old) * share
                changes.append(xp.astype(change, loss.dtype))
                of.append((buffer, old))
        packed = _packed([loss, *changes])
        self._pending.append(self.ranks.communicator.start_all_reduce(packed))
        self._extras = packed, of

    def wrote(self, layer: Layer, name: str) -> None:
        """A gradient was written; see ``one_backward_pass``."""
        if not self._last:
            return
        place = layer, name
        if not self._buckets:
            self._seen[place] = self._seen.pop(place, 0) + 1
            return
        bucket = self._of.get(place)
        if bucket is None or place not in bucket.left:
            raise StateError(
                f"the gradient of {layer.full_name(name)} was written more often than in the first "
                "step, after its sum over processes had started; a layer must write its gradients "
                "in every step alike"
            )
        bucket.left[place] -= 1
        if not bucket.left[place]:
            del bucket.left[place]
        while self._begun < len(self._buckets) and not self._buckets[self._begun].left:
            self._start(self._buckets[self._begun].array)
            self._begun += 1

    def _start(self, array: Array) -> None:
        start = self.ranks.communicator.start_all_reduce
        self._pending.append(start(array, compress=self.compress))

    def _wait(self) -> None:
        for pending in self._pending:
            pending.wait()
        self._pending = []

    def finish(self, grads: Named) -> Array:
        """Wait for the sums of gradients, running statistics and loss. Returns the batch's loss."""
        packed = None
        if self._buckets:
            for bucket in self._buckets[self._begun :]:
                self._start(bucket.array)
        elif grads.flats:
            for array in grads.wholes():
                self._start(array)
            self._learn(grads.flats)
        elif grads:
            packed = _packed(list(grads.values()))
            self._start(packed)
        self._wait()
        if packed is not None:
            shapes = [grad.shape for grad in grads.values()]
            for grad, summed in zip(grads.values(), _apart(packed, shapes), strict=True):
                grad[...] = summed
        return self._taken()

    def clip(self, grads: Sequence[Array], max_norm: float) -> None:
        """Clip summed gradients as ``ops.clip_by_global_norm`` does, by rank 0's norm: those of
        other ranks may differ in the last bit, if they have another number of threads."""
        xp = backend_of(grads[0]).xp
        norm = xp.reshape(global_norm(list(grads)), (1,))
        self.ranks.communicator.broadcast(norm)
        factor = clip_factor(norm[0], max_norm)
        for grad in grads:
            grad[...] = grad * factor

    def _taken(self) -> Array:
        """Write the sums of the running statistics' changes; return the loss."""
        packed, of = self._extras
        self._extras = ()
        loss, *changes = _apart(packed, [(), *(old.shape for _, old in of)])
        for (buffer, old), change in zip(of, changes, strict=True):
            buffer[...] = old + backend_of(old).xp.astype(change, old.dtype)
        return loss

    def _learn(self, flats: Sequence[Flat]) -> None:
        """Make buckets from what the step has written."""
        paths = {layer.full_name(name): (layer, name) for layer, name in self._seen}
        last = {place: number for number, place in enumerate(self._seen)}
        made: list[tuple[int, Bucket]] = []
        for flat in flats:
            for names in _stretches(flat):
                places = [paths[name] for name in names if name in paths]
                bucket = Bucket(flat.stretch(names), {place: self._seen[place] for place in places})
                made.append((max((last[place] for place in places), default=-1), bucket))
        order = sorted(range(len(made)), key=lambda number: made[number][0])
        self._buckets = [made[number][1] for number in self.ranks.share(order)]
        self._of = {place: bucket for bucket in self._buckets for place in bucket.writes}
        self._flats = tuple(flat.whole for flat in flats)
        self._seen = {}


def _stretches(flat: Flat) -> list[list[str]]:
    """Return the names of a flat buffer's arrays, in memory order, by bucket."""
    groups: list[list[str]] = [[]]
    size, least = 0, BUCKET // _itemsize(flat.dtype)
    for name, (begin, end) in flat.parts.items():
        if size >= least:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += end - begin
    return groups if groups[-1] else []


def _itemsize(dtype: str) -> int:
    return int(dtype.removeprefix("float")) // 8


def _packed(arrays: Sequence[Array]) -> Array:
    xp = backend_of(arrays[0]).xp
    return xp.concat([xp.reshape(array, (-1,)) for array in arrays])


def _apart(packed: Array, shapes: Iterable[tuple[int, ...]]) -> Iterator[Array]:
    """Yield the arrays that ``_packed`` has joined."""
    last, xp = 0, backend_of(packed).xp
    for shape in shapes:
        first, last = last, last + prod(shape)
        yield xp.reshape(packed[first:last], shape)


def _leaves(counts: Any) -> list[Any]:
    """Return a loss's counts, a tuple of tuples for sums of losses, as a list."""
    if isinstance(counts, tuple):
        return [leaf for each in counts for leaf in _leaves(each)]
    return [counts]


def _like(counts: Any, leaves: Any) -> Any:
    """Return leaves in the form of counts."""
    return (
        tuple(_like(each, leaves) for each in counts) if isinstance(counts, tuple) else next(leaves)
    )
