"""The choice between the kernels of a convolution by its number of groups."""

from functools import wraps
from typing import Any

from portacnn.runtime import Kernel


def by_groups(
    dense: dict[str, Kernel], grouped: dict[str, Kernel], saved_by_grouped: type | tuple[type, ...]
) -> dict[str, Kernel]:
    """Return the kernels of ``grouped`` for several groups, joined with those of the same names in
    ``dense`` for one.

    Both are kernels of convolutions, with ``groups`` as the fifth argument.

    Args:
        saved_by_grouped: the class, or classes, of what the forward kernels in ``grouped`` store.
    """
    return {name: _joined(dense.get(name), own, saved_by_grouped) for name, own in grouped.items()}


def _joined(dense: Kernel | None, grouped: Kernel, saved_by_grouped: Any) -> Kernel:
    def chosen(groups: int) -> Kernel | None:
        return grouped if groups > 1 else dense

    @wraps(grouped.forward)
    def forward(
        x: Any, weight: Any, bias: Any, windows: Any, groups: int, *args: Any, **options: Any
    ) -> Any:
        kernel = chosen(groups)
        if kernel is None:
            return NotImplemented
        return kernel.forward(x, weight, bias, windows, groups, *args, **options)

    preparing = grouped.prepare or (dense and dense.prepare)

    def prepare(
        x: Any, weight: Any, bias: Any, windows: Any, groups: int, *args: Any, **options: Any
    ) -> Any:
        kernel = chosen(groups)
        if kernel is None or kernel.prepare is None:
            return NotImplemented
        return kernel.prepare(x, weight, bias, windows, groups, *args, **options)

    prepared = wraps(preparing)(prepare) if preparing else None
    if grouped.backward is None:
        return Kernel(forward, None, prepared)
    of_grouped = grouped.backward

    @wraps(of_grouped)
    def backward(dy: Any, saved: Any, **options: Any) -> Any:
        if dense is None or dense.backward is None or isinstance(saved, saved_by_grouped):
            return of_grouped(dy, saved, **options)
        return dense.backward(dy, saved, **options)

    return Kernel(forward, backward, prepared)
