"""``PerOutput``: a loss for each output of a network with several.

Such a network returns a row for each sample, with the elements of all outputs
(``models.GraphModel``). Targets are made rows as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any, ClassVar

from portacnn.arguments import told, wholes
from portacnn.data.targets import on_host
from portacnn.errors import ArgumentError, LabelError, PortacnnError
from portacnn.losses.base import Loss, Shape
from portacnn.runtime import Array, HostArray, backend_of


@dataclass(frozen=True)
class PerOutput(Loss):
    """The sum of the losses of a network's outputs.

        loss = PerOutput.of(model, {"boxes": SmoothL1(), "scores": 0.5 * CrossEntropy()})
        Trainer(model, x, {"boxes": boxes, "scores": labels}, loss=loss, metrics=())

    Targets are a dictionary {name: targets}. An output without a loss is not trained. The object
    remembers the form of the first targets that it checks: use it for one kind of targets.

    Args:
        terms: (name, shape of the output, loss or None) for all outputs, in the network's order.
    """

    terms: Sequence[tuple[str, Sequence[int], Loss | None]]

    _forms: ClassVar[dict[str, tuple[Shape, str]]]  # of each object, no field

    def __post_init__(self) -> None:
        terms = tuple(_term(term) for term in self.terms)
        if not any(loss for _, _, loss in terms):
            raise ArgumentError("expected a loss for one or more outputs, got none")
        object.__setattr__(self, "terms", terms)
        # by name: the shape and dtype of a sample's targets, shared with ``for_evaluation``
        object.__setattr__(self, "_forms", {})

    @classmethod
    def of(cls, model: Any, losses: Mapping[str, str | Loss]) -> "PerOutput":
        """Return the loss for a ``GraphModel`` with several outputs.

        Args:
            losses: losses or their names, by the output's name.

        Raises:
            ArgumentError: if there is no such output.
        """
        from portacnn.losses.named import named

        shapes = getattr(model, "output_shapes", {})
        if unknown := [name for name in losses if name not in shapes]:
            raise ArgumentError(
                f"the network has no output {told(unknown[0])}; it has {', '.join(shapes) or 'one'}"
            )
        return cls(
            tuple(
                (name, shape, named(losses[name]) if name in losses else None)
                for name, shape in shapes.items()
            )
        )

    @property
    def _trained(self) -> list[tuple[str, Shape, Loss]]:
        return [(name, tuple(shape), loss) for name, shape, loss in self.terms if loss is not None]

    # --- targets ----------------------------------------------------------------------------------

    def check_targets(
        self,
        t: Any,
        output_shape: Shape,
        *,
        count: int | None = None,
        dtype: str = "float32",
        what: str = "targets",
    ) -> HostArray:
        """See ``Loss.check_targets``. The result has a row for each sample."""
        sizes = sum(prod(shape) for _, shape, _ in self.terms)
        if tuple(output_shape) != (sizes,):
            raise LabelError(
                f"the loss is for outputs of {sizes} elements, but the network's are "
                f"{tuple(output_shape)}",
                what,
            )
        names = [name for name, _, _ in self._trained]
        if not isinstance(t, Mapping):
            return self._rows_again(t, count, what, names)
        if set(t) != set(names):
            raise LabelError(
                f"expected targets of {', '.join(names)}, got {', '.join(map(str, t))}", what
            )
        rows = []
        for name, shape, loss in self._trained:
            part = f"{what}[{name!r}]"
            made = loss.check_targets(t[name], shape, count=count, dtype=dtype, what=part)
            form = made.shape[1:], made.dtype.name
            if self._forms.setdefault(name, form) != form:
                raise LabelError(
                    f"expected {self._forms[name][1]} targets (N, *{self._forms[name][0]}) as "
                    f"before, got {made.dtype} {made.shape}; use a new PerOutput for them",
                    part,
                )
            rows.append(made.reshape(len(made), prod(form[0])).astype(dtype))
            if made.dtype.kind in "iu" and (rows[-1] != made.reshape(rows[-1].shape)).any():
                raise LabelError(f"labels beyond 2^24 are not exact in {dtype}", part)
        if len({len(row) for row in rows}) > 1:
            raise LabelError(f"numbers of targets differ: {[len(row) for row in rows]}", what)
        return backend_of(rows[0]).xp.concat(rows, axis=1)

    def _rows_again(self, t: Any, count: int | None, what: str, names: Sequence[str]) -> HostArray:
        """Return targets that are rows already, as from this method."""
        width = sum(prod(shape) for shape, _ in self._forms.values())
        if getattr(t, "ndim", 0) != 2 or not self._forms or t.shape[1] != width:
            raise LabelError(
                f"expected a dictionary with the targets of {', '.join(names)}, got {told(t)}", what
            )
        if count is not None and len(t) != count:
            raise LabelError(f"expected {count} targets, got {len(t)}", what)
        return on_host(t)

    def _targets(self, t: Array) -> list[Array]:
        """Return the targets of each loss from rows."""
        xp = backend_of(t).xp
        forms = [self._forms[name] for name, _, _ in self._trained]
        ends = [0, *accumulate(prod(shape) for shape, _ in forms)]
        parts = []
        for (shape, dtype), first, last in zip(forms, ends[:-1], ends[1:], strict=True):
            part = xp.reshape(t[:, first:last], (t.shape[0], *shape))
            parts.append(part if dtype.startswith("float") else xp.astype(part, xp.int64))
        return parts

    def num_outputs(self, t: Any) -> int | None:
        return None

    # --- the loss ---------------------------------------------------------------------------------

    def for_evaluation(self) -> "PerOutput":
        made = replace(
            self,
            terms=tuple(
                (n, s, None if x is None else x.for_evaluation()) for n, s, x in self.terms
            ),
        )
        object.__setattr__(made, "_forms", self._forms)
        return made

    def _outputs(self, y: Array) -> list[Array]:
        """Return the outputs that have a loss from rows."""
        parts, first = [], 0
        for _, shape, loss in self.terms:
            last = first + prod(shape)
            if loss is not None:
                part = y[:, first:last]
                parts.append(backend_of(y).xp.reshape(part, (y.shape[0], *shape)))
            first = last
        return parts

    def forward(self, y: Array, t: Array, weight: Array | None = None) -> tuple[Array, Any]:
        return self.forward_part(y, t, weight, self.count(t, weight))

    def backward(self, cache: Any, dloss: Array | float = 1.0) -> Array:
        return dloss * self.backward_part(cache)

    def count(self, t: Array, weight: Array | None = None, dtype: str = "float32") -> Any:
        pairs = zip(self._trained, self._targets(t), strict=True)
        return tuple(loss.count(part, weight, dtype) for (_, _, loss), part in pairs)

    def part_count(self, t: Array, weight: Array | None = None, dtype: str = "float32") -> Any:
        pairs = zip(self._trained, self._targets(t), strict=True)
        return tuple(loss.part_count(part, weight, dtype) for (_, _, loss), part in pairs)

    def whole_count(self, added: Any) -> Any:
        pairs = zip(self._trained, added, strict=True)
        return tuple(loss.whole_count(each) for (_, _, loss), each in pairs)

    def forward_part(
        self, y: Array, t: Array, weight: Array | None, whole: Any
    ) -> tuple[Array, Any]:
        total, caches = None, []
        for (_, _, loss), part, target, count in zip(
            self._trained, self._outputs(y), self._targets(t), whole, strict=True
        ):
            share, cache = loss.forward_part(part, target, weight, count)
            total = share if total is None else total + share
            caches.append(cache)
        assert total is not None
        return total, (caches, y)

    def backward_part(self, saved: Any) -> Array:
        caches, y = saved
        xp, kept, rows = backend_of(y).xp, iter(caches), []
        for _, shape, loss in self.terms:
            if loss is None:
                size = (y.shape[0], prod(shape))
                rows.append(xp.zeros(size, dtype=y.dtype, device=y.device))
            else:
                rows.append(xp.reshape(loss.backward_part(next(kept)), (y.shape[0], prod(shape))))
        return xp.concat(rows, axis=1)

    def predictions(self, y: Array, threshold: float = 0.5) -> Array:
        return y

    def scores(self, y: Array) -> Array:
        return y


def _term(term: Any) -> tuple[str, tuple[int, ...], Loss | None]:
    if not isinstance(term, tuple | list) or len(term) != 3 or not isinstance(term[0], str):
        raise ArgumentError(f"expected (name, shape, loss) for every output, got {told(term)}")
    name, shape, loss = term
    if loss is not None and not isinstance(loss, Loss):
        raise ArgumentError(f"expected a loss or None for {told(name)}, got {told(loss)}")
    try:
        return name, wholes("shape", shape, 1), loss
    except PortacnnError as error:
        raise error.at(told(name))
