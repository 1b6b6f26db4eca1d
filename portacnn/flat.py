"""Flat buffers: several arrays stored one after another in one long array, so that one operation
covers them all.

A network's parameters share one flat buffer, its gradients another with the same layout, and each
optimizer state another. An update is then one operation for any number of layers, a captured step
finds everything at fixed addresses, and a transfer between devices is one message. Each array is a
view of its part and stays the same object as long as the network stays on its device. This requires
a library whose slices are views (``Backend.views_alias``).
"""

from collections.abc import Mapping, Sequence
from math import prod

from portacnn.runtime import Array, Backend


class Flat:
    """Arrays of one dtype by name, each a view of ``whole``.

    Attributes:
        whole: (L,), the buffer.
        views: the arrays by name.
        parts: (begin, end) of each array in ``whole``. Flat buffers with the same layout share this
            object.
    """

    def __init__(
        self,
        backend: Backend,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: str,
        parts: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        self.backend, self.dtype = backend, dtype
        self.parts = _parts(shapes) if parts is None else parts
        length = max((end for _, end in self.parts.values()), default=0)
        with backend.active():
            self.whole = backend.xp.zeros(
                (length,), dtype=backend.dtype(dtype), device=backend.device
            )
        self.views: dict[str, Array] = {
            name: backend.xp.reshape(self.whole[slice(*self.parts[name])], shape)
            for name, shape in shapes.items()
        }

    def like(self) -> "Flat":
        """Return zeros with the same layout."""
        return Flat(
            self.backend,
            {name: tuple(view.shape) for name, view in self.views.items()},
            self.dtype,
            self.parts,
        )

    def stretch(self, names: Sequence[str]) -> Array:
        """Return the part of ``whole`` from the first to the last of these names, which must be
        adjacent.
        """
        return self.whole[self.parts[names[0]][0] : self.parts[names[-1]][1]]


class Named(dict[str, Array]):
    """Arrays by name. ``flats`` are the flat buffers that these arrays cover completely; empty if
    they do not.
    """

    flats: tuple[Flat, ...] = ()

    @classmethod
    def of(cls, arrays: Mapping[str, Array], flats: Sequence[Flat]) -> "Named":
        """Return the arrays with ``flats``, if the arrays are exactly the views of these buffers;
        else without.
        """
        named = cls(arrays)
        views = {name: view for flat in flats for name, view in flat.views.items()}
        if named.keys() == views.keys() and all(
            named[name] is view for name, view in views.items()
        ):
            named.flats = tuple(flats)
        return named

    def wholes(self) -> list[Array]:
        """Return all elements in as few arrays as possible, for operations that treat all elements
        alike.
        """
        return [flat.whole for flat in self.flats] or list(self.values())


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
