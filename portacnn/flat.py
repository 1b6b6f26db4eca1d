"""Flat buffers: several arrays stored one after another in one long array, so that one operation
covers them all.

A network's parameters share one flat buffer, its gradients another with the same layout, and each
optimizer state another. An update is then one operation for any number of layers, a captured step
finds everything at fixed addresses, and a transfer between devices is one message. Each array is a
view of its part and stays the same object as long as the network stays on its device. This requires
a library whose slices are views (``Backend.views_alias``).
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from math import prod

from portacnn.runtime import Array, Backend


class Flat:
    """Arrays of one dtype by name, each a view of ``whole``.

    Attributes:
        whole: (L,), the buffer.
        views: the arrays by name.
        parts: (begin, end) of each array in ``whole``.
        family: an object that flat buffers share which hold the same names, or some of them, in the
            same order: arrays that are adjacent in all of them are one stretch in each.
    """

    def __init__(
        self,
        backend: Backend,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: str,
        family: object = None,
    ) -> None:
        self.backend, self.dtype, self.family = backend, dtype, family or object()
        self.parts = _parts(shapes)
        length = max((end for _, end in self.parts.values()), default=0)
        with backend.active():
            self.whole = backend.xp.zeros(
                (length,), dtype=backend.dtype(dtype), device=backend.device
            )
        self.views: dict[str, Array] = {
            name: backend.xp.reshape(self.whole[slice(*self.parts[name])], shape)
            for name, shape in shapes.items()
        }

    def like(self, names: Iterable[str] | None = None) -> "Flat":
        """Return zeros of the same family, for these names or for all of them."""
        chosen = set(self.views if names is None else names)
        # The same order as here: it is sorted by the same key, and sorting is stable.
        shapes = {name: tuple(view.shape) for name, view in self.views.items() if name in chosen}
        return Flat(self.backend, shapes, self.dtype, self.family)

    def without(self, names: Container[str]) -> "Flat":
        """Return zeros of the same family, for all but these names."""
        return self.like([name for name in self.views if name not in names])

    def stretch(self, names: Sequence[str]) -> Array:
        """Return the part of ``whole`` from the first to the last of these names, which must be
        adjacent.
        """
        return self.whole[self.parts[names[0]][0] : self.parts[names[-1]][1]]


class Named(dict[str, Array]):
    """Arrays by name. ``flats`` are the flat buffers in which all of these arrays lie; empty if one
    does not.
    """

    flats: tuple[Flat, ...] = ()

    @classmethod
    def of(cls, arrays: Mapping[str, Array], flats: Sequence[Flat]) -> "Named":
        """Return the arrays with ``flats``, if all of them are views of these buffers; else
        without.
        """
        named = cls(arrays)
        views = {name: view for flat in flats for name, view in flat.views.items()}
        if all(views.get(name) is array for name, array in named.items()):
            named.flats = tuple(flats)
        return named

    def wholes(self) -> list[Array]:
        """Return all elements in as few arrays as possible, for operations that treat all elements
        alike: whole buffers, or if they hold other arrays as well, stretches of them.
        """
        if not self.flats:
            return list(self.values())
        found = []
        for flat in self.flats:
            own = [name for name in self if name in flat.views]
            if len(own) == len(flat.views):
                found.append(flat.whole)
            else:
                found += [flat.stretch(names) for names in runs(own, flat)]
        return found


def runs(names: Sequence[str], flat: Flat) -> list[list[str]]:
    """Group names of ``flat`` into lists of names that are adjacent in memory, in memory order."""
    place = {name: number for number, name in enumerate(flat.parts)}
    found: list[list[str]] = []
    for name in sorted(names, key=place.__getitem__):
        if found and place[name] == place[found[-1][-1]] + 1:
            found[-1].append(name)
        else:
            found.append([name])
    return found


def _parts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Return (begin, end) of each array. There are no gaps, so that an operation on the whole
    covers the arrays only.
    """
    parts, begin = {}, 0
    # Biases and norms, which often have no weight decay, come after the weights, so that each kind
    # is contiguous. Larger arrays come first. Their sizes are mostly multiples of a cache line, so
    # that they start on one.
    for name in sorted(shapes, key=lambda name: (len(shapes[name]) <= 1, -prod(shapes[name]))):
        parts[name] = (begin, begin + prod(shapes[name]))
        begin = parts[name][1]
    return parts
