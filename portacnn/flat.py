"""Arrays that belong together, one after another in one long array: what is done to all of them is
done in one go.

A network's parameters lie so, its gradients in a second such array of the same order, an
optimizer's state in others: an update is one operation then, however many layers there are, a
captured step finds everything at the addresses it knows, and what is sent between devices is one
message. Each array is a view of its part, and stays the same object as long as the network stays on
its device. Only libraries whose slices are views of the whole can do this
(``Backend.views_alias``).
"""

from collections.abc import Mapping, Sequence
from math import prod

from portacnn.runtime import Array, Backend


class Flat:
    """Arrays of one dtype by name, each a view of ``whole``.

    Attributes:
        whole: (L,), all of them.
        views: the arrays by name.
        parts: where in ``whole`` each one begins and ends. One object for all that are laid out
            alike.
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
        """Zeros, laid out in the same way."""
        return Flat(
            self.backend,
            {name: tuple(view.shape) for name, view in self.views.items()},
            self.dtype,
            self.parts,
        )

    def stretch(self, names: Sequence[str]) -> Array:
        """The part of ``whole`` from the first of these names, which follow each other, to the
        last."""
        return self.whole[self.parts[names[0]][0] : self.parts[names[-1]][1]]


class Named(dict[str, Array]):
    """Arrays by name. ``flats`` are what they are views of, where together they are all that lies
    there; else there are none."""

    flats: tuple[Flat, ...] = ()

    @classmethod
    def of(cls, arrays: Mapping[str, Array], flats: Sequence[Flat]) -> "Named":
        """These arrays, and those ``flats`` if each of the arrays is still a view of theirs, and
        none is missing."""
        named = cls(arrays)
        views = {name: view for flat in flats for name, view in flat.views.items()}
        if named.keys() == views.keys() and all(
            named[name] is view for name, view in views.items()
        ):
            named.flats = tuple(flats)
        return named

    def wholes(self) -> list[Array]:
        """Everything, in as few arrays as there can be: to be copied, summed or looked through, not
        told apart."""
        return [flat.whole for flat in self.flats] or list(self.values())


def runs(names: Sequence[str], flat: Flat) -> list[list[str]]:
    """Names, all of them ``flat``'s, in the order of its memory, cut into lists of names that
    follow each other there."""
    place = {name: number for number, name in enumerate(flat.parts)}
    found: list[list[str]] = []
    for name in sorted(names, key=place.__getitem__):
        if found and place[name] == place[found[-1][-1]] + 1:
            found[-1].append(name)
        else:
            found.append([name])
    return found


def _parts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Where each array begins and ends. There is nothing between them: what is done to the whole is
    done to them alone."""
    parts, begin = {}, 0
    # Biases and norms, which often do not decay, stand behind the weights: then either kind is one
    # stretch. The largest come first, whose sizes are mostly multiples of a cache line: so they
    # begin where one does.
    for name in sorted(shapes, key=lambda name: (len(shapes[name]) <= 1, -prod(shapes[name]))):
        parts[name] = (begin, begin + prod(shapes[name]))
        begin = parts[name][1]
    return parts
