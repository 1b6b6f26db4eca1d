"""``Sum``: a weighted sum of losses of the same outputs and targets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from portacnn.arguments import not_negative, told
from portacnn.errors import ArgumentError, LabelError
from portacnn.losses.base import Loss, Shape
from portacnn.runtime import Array, HostArray


@dataclass(frozen=True)
class Sum(Loss):
    """The sum of factor * loss, such as ``0.5 * CrossEntropy() + Dice()``.

    Args:
        terms: pairs (factor, loss). The first loss defines ``predictions`` and ``scores``.

    All losses take the same targets. Each has its own ``count``, so the sum's count is a tuple.
    """

    terms: Sequence[tuple[float, Loss]]

    def __post_init__(self) -> None:
        terms = tuple(_term(term) for term in self.terms)
        if not terms:
            raise ArgumentError("expected at least one (factor, loss), got none")
        object.__setattr__(self, "terms", terms)

    @property
    def task(self) -> Any:
        return self.terms[0][1].task

    @property
    def metrics(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.terms[0][1].metrics

    @property
    def ignore_index(self) -> int | None:  # type: ignore[override]
        return getattr(self.terms[0][1], "ignore_index", None)

    @property
    def soft_targets(self) -> bool:  # type: ignore[override]
        return all(loss.soft_targets for _, loss in self.terms)

    def forward(self, y: Array, t: Array, weight: Array | None = None) -> tuple[Array, Any]:
        parts = [loss.forward(y, t, weight) for _, loss in self.terms]
        return self._added([value for value, _ in parts]), [cache for _, cache in parts]

    def backward(self, cache: Any, dloss: Array | float = 1.0) -> Array:
        pairs = zip(self.terms, cache, strict=True)
        return _total([loss.backward(kept, factor * dloss) for (factor, loss), kept in pairs])

    def count(self, t: Array, weight: Array | None = None, dtype: str = "float32") -> Any:
        return tuple(loss.count(t, weight, dtype) for _, loss in self.terms)

    def part_count(self, t: Array, weight: Array | None = None, dtype: str = "float32") -> Any:
        return tuple(loss.part_count(t, weight, dtype) for _, loss in self.terms)

    def whole_count(self, added: Any) -> Any:
        pairs = zip(self.terms, added, strict=True)
        return tuple(loss.whole_count(each) for (_, loss), each in pairs)

    def forward_part(
        self, y: Array, t: Array, weight: Array | None, whole: Any
    ) -> tuple[Array, Any]:
        pairs = zip(self.terms, whole, strict=True)
        parts = [loss.forward_part(y, t, weight, count) for (_, loss), count in pairs]
        return self._added([value for value, _ in parts]), [cache for _, cache in parts]

    def backward_part(self, saved: Any) -> Array:
        pairs = zip(self.terms, saved, strict=True)
        return _total([factor * loss.backward_part(kept) for (factor, loss), kept in pairs])

    def _added(self, values: list[Array]) -> Array:
        return _total(
            [factor * value for (factor, _), value in zip(self.terms, values, strict=True)]
        )

    def _checked(self, t: HostArray, shape: Shape, dtype: str) -> HostArray:
        (_, first), *others = self.terms
        made = first._checked(t, shape, dtype)
        for _, loss in others:
            again = loss._checked(t, shape, dtype)
            if again.shape != made.shape:
                raise LabelError(
                    f"{type(first).__name__} takes these targets as {made.shape}, "
                    f"{type(loss).__name__} as {again.shape}; the losses of a sum share targets"
                )
        return made

    def num_outputs(self, t: Any) -> int | None:
        return self.terms[0][1].num_outputs(t)


def _term(term: Any) -> tuple[float, Loss]:
    if not isinstance(term, tuple | list) or len(term) != 2 or not isinstance(term[1], Loss):
        raise ArgumentError(f"expected pairs (factor, loss), got {told(term)}")
    return not_negative("factor", term[0]), term[1]


def _total(arrays: list[Array]) -> Array:
    total = arrays[0]
    for array in arrays[1:]:
        total = total + array
    return total


def _terms(loss: Loss) -> tuple[tuple[float, Loss], ...]:
    return tuple(loss.terms) if isinstance(loss, Sum) else ((1.0, loss),)


def added(loss: Loss, other: Any) -> Any:
    """Return ``loss + other``."""
    return Sum((*_terms(loss), *_terms(other))) if isinstance(other, Loss) else NotImplemented


def scaled(loss: Loss, factor: Any) -> Any:
    """Return ``factor * loss``."""
    if isinstance(factor, Loss):
        return NotImplemented
    number = not_negative("factor", factor)
    return Sum(tuple((number * own, term) for own, term in _terms(loss)))
